"""Weights of backbones as others publish them.

torchvision and timm use the names that ours uses; SwAV (Caron et al., NeurIPS 2020) adds `module.`,
a projection head and prototypes. Whether the stride sits in the 1x1 convolution cannot be seen in
the tensors: the settings say it. What files of a Swin-T or a DAT look like is told in `swin.py` and
`dat.py`.
"""

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import assert_never

from torch import Tensor

from models.backbone import Backbone, BackboneSettings
from models.interop.checkpoint_files import WeightsError, read_tensors
from models.interop.dat import dat_file, is_dat
from models.interop.placing import FileNames, LoadReport, place_tensors
from models.interop.swin import BODY, swin_file

RANDOM_WEIGHTS = "random"
"""The explicit word for a backbone without pretrained weights."""

LEFT_OUT = ("fc.*", "*.num_batches_tracked", "projection_head.*", "prototypes.*")
"""Classifiers of torchvision and timm, BatchNorm's counters, SwAV's heads."""

_OUR_BODIES = ("backbone.body.", "detector.backbone.body.", "model.backbone.own.body.")
"""Where the backbone of our own classifiers and detectors has its tensors."""

_OUR_TRANSFORMERS = "patch_embedding."
"""How a tensor of our own Swin or DAT begins, which has one by a name of no public file."""

_OUR_LAST_STAGE = ("stages.2.merging.*", "stages.3.*", "norms.3.*")
_OUR_HEAD = "head."

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
    """Output norms keep their values where the file is a classifier's, which has none."""
    body = backbone_tensors(tensors)
    names = file_names(backbone, body, source)
    report = place_tensors(
        backbone.body,
        body,
        file_name=names.name,
        left_out=names.left_out,
        new=names.new,
        source=source,
    )
    others = tuple(name for name in tensors if _bare(name) not in body)
    return replace(report, left_out=(*report.left_out, *others))


def _bare(name: str) -> str:
    for prefix in (BODY, *_OUR_BODIES):
        name = name.removeprefix(prefix)
    return name


def file_names(backbone: Backbone, tensors: Mapping[str, Tensor], source: str) -> FileNames:
    """How a file of such tensors names those of a backbone; WeightsError where it is of another."""
    settings, swin = backbone.settings, swin_file(tensors, backbone.body.num_stages)
    if any(name.startswith(_OUR_TRANSFORMERS) for name in tensors):
        beyond = _OUR_LAST_STAGE if settings.output == "layer3" else ()
        return FileNames(lambda ours: ours, beyond, new=(), head=_OUR_HEAD, norm=None)
    match settings.name:
        case "resnet18" | "resnet34" | "resnet50" | "resnet101":
            if swin or is_dat(tensors):
                raise _another(settings, tensors, source, "give the file of a ResNet")
            left_out = (*LEFT_OUT, *_stages_beyond(settings))
            return FileNames(lambda ours: ours, left_out, new=(), head="fc.", norm=None)
        case "swin_t":
            if swin is None:
                advice = "give the file of a Swin-T with the names of its authors, of timm or of "
                raise _another(settings, tensors, source, advice + "torchvision")
            return swin
        case name:
            if not is_dat(tensors):
                advice = "give a file with the names of DAT's authors"
                raise _another(settings, tensors, source, advice)
            return dat_file(settings, name, tensors, source)


def _another(
    settings: BackboneSettings, tensors: Mapping[str, Tensor], source: str, advice: str
) -> WeightsError:
    """A file of another network than the settings say."""
    if swin_file(tensors, num_stages=4):
        found, name = "a Swin", "swin_t"
    elif is_dat(tensors):
        found, name = "a DAT", "dat_t or the like"
    elif "layer1.0.conv1.weight" in tensors:
        found, name = "a ResNet", "resnet50 or the like"
    else:
        found, name = "none of the networks that are known here", ""
    other = f", or say name={name}" if name else ""
    return WeightsError(
        f"{source} holds {found}, and backbone.name={settings.name}; {advice}{other}"
    )


def backbone_tensors(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The backbone's tensors by their own names, out of the file of a detector or of its own."""
    for prefix in (BODY, *_OUR_BODIES):
        inner = {
            name.removeprefix(prefix): tensor
            for name, tensor in tensors.items()
            if name.startswith(prefix)
        }
        if inner:
            return inner
    return tensors


def _stages_beyond(settings: BackboneSettings) -> tuple[str, ...]:
    match settings.output:
        case "layer3":
            return ("layer4.*",)
        case "layer4":
            return ()
        case _:
            assert_never(settings.output)
