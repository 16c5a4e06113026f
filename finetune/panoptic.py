"""The panoptic task: a mask head on a finished detector of things and stuff (DETR, section 4.4)."""

from finetune.panoptic_postprocess import SegmentSettings
from models.mask_head import MaskHeadSettings
from models.mask_losses import MaskLossWeights
from models.settings import Settings


class PanopticSettings(Settings):
    """The second stage: the mask head, its losses, and how its masks become segments."""

    head: MaskHeadSettings = MaskHeadSettings()
    """The mask head."""
    losses: MaskLossWeights = MaskLossWeights()
    """What its losses weigh."""
    segments: SegmentSettings = SegmentSettings()
    """Which queries become segments."""
