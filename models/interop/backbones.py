"""Weights of backbones as others publish them.

torchvision and timm use the names that ours uses; SwAV (Caron et al., NeurIPS 2020) adds `module.`,
a projection head and prototypes. Whether the stride sits in the 1x1 convolution cannot be seen in
the tensors: the settings say it. What files of a Swin-T look like is told in `swin.py`.
"""

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import assert_never

from torch import Tensor

from models.backbone import Backbone, BackboneSettings
from models.interop.checkpoint_files import WeightsError, read_tensors
from models.interop.placing import LoadReport, place_tensors
from models.interop.swin import BODY, swin_file

RANDOM_WEIGHTS = "random"
"""The explicit word for a backbone without pretrained weights."""

LEFT_OUT = ("fc.*", "*.num_batches_tracked", "projection_head.*", "prototypes.*")
"""Classifiers of torchvision and timm, BatchNorm's counters, SwAV's heads."""

_log = logging.getLogger(__name__)


def load_backbone(backbone: Backbone) -> LoadReport:
    """Fill a backbone from its `settings.weights`, and log what became of every tensor.

    WeightsError, naming the tensors, unless every tensor of the backbone is in the file and every
    other one of the file is known to be of no use. `random` keeps the random values, with a
    warning.
    """
    settings = backbone.settings
    if settings.weights is None:
        raise WeightsError(
            "backbone.weights is not said; give the path or URL of a checkpoint, or random"
        )
    if settings.weights == RANDOM_WEIGHTS:
        _log.warning(
            "the %s %s backbone has random weights: its features mean nothing; "
            "give backbone.weights a path or URL for real work",
            "trained" if settings.train else "frozen",
            settings.name,
        )
        return LoadReport(loaded=(), reshaped=(), new=tuple(backbone.state_dict()), left_out=())
    tensors = read_tensors(settings.weights)
    report = _load(backbone, tensors, settings.weights)
    _log.info("backbone from %s: %s", settings.weights, report.summary())
    return report


def _load(backbone: Backbone, tensors: Mapping[str, Tensor], source: str) -> LoadReport:
    if backbone.settings.name == "swin_t":
        return _load_swin(backbone, tensors, source)
    if swin_file(_body(tensors), num_stages=4):
        raise WeightsError(
            f"{source} holds a Swin, and backbone.name={backbone.settings.name}; "
            "say name=swin_t, or give the file of a ResNet"
        )
    return place_tensors(
        backbone.body,
        tensors,
        file_name=lambda ours: ours,
        left_out=(*LEFT_OUT, *_stages_beyond(backbone.settings)),
        source=source,
    )


def _load_swin(backbone: Backbone, tensors: Mapping[str, Tensor], source: str) -> LoadReport:
    """The output norms keep their values where the file is a classifier's, which has none."""
    body = _body(tensors)
    file = swin_file(body, backbone.body.num_stages)
    if file is None:
        found = "a ResNet" if "layer1.0.conv1.weight" in body else "no Swin"
        raise WeightsError(
            f"{source} holds {found}, and backbone.name=swin_t; give the file of a Swin-T "
            "with the names of its authors, of timm or of torchvision, or say another name"
        )
    report = place_tensors(
        backbone.body,
        body,
        file_name=file.name,
        left_out=file.left_out,
        new=file.new,
        source=source,
    )
    others = tuple(name for name in tensors if name.removeprefix(BODY) not in body)
    return replace(report, left_out=(*report.left_out, *others))


def _body(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The backbone's tensors by their own names, out of the file of a detector or of its own."""
    inner = {
        name.removeprefix(BODY): tensor for name, tensor in tensors.items() if name.startswith(BODY)
    }
    return inner or tensors


def _stages_beyond(settings: BackboneSettings) -> tuple[str, ...]:
    match settings.output:
        case "layer3":
            return ("layer4.*",)
        case "layer4":
            return ()
        case _:
            assert_never(settings.output)
