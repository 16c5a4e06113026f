"""Weights of ResNets as others publish them.

torchvision and timm use the names that ours uses; SwAV (Caron et al., NeurIPS 2020) adds `module.`,
a projection head and prototypes. Whether the stride sits in the 1x1 convolution cannot be seen in
the tensors: the settings say it.
"""

import logging
from typing import assert_never

from models.backbone import Backbone, BackboneSettings
from models.interop.checkpoint_files import WeightsError, read_tensors
from models.interop.placing import LoadReport, place_tensors

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
    report = place_tensors(
        backbone.body,
        read_tensors(settings.weights),
        file_name=lambda ours: ours,
        left_out=(*LEFT_OUT, *_stages_beyond(settings)),
        source=settings.weights,
    )
    _log.info("backbone from %s: %s", settings.weights, report.summary())
    return report


def _stages_beyond(settings: BackboneSettings) -> tuple[str, ...]:
    match settings.output:
        case "layer3":
            return ("layer4.*",)
        case "layer4":
            return ()
        case _:
            assert_never(settings.output)
