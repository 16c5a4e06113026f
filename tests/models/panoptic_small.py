"""A panoptic detector that is small enough for tests, and a batch for it."""

import torch

from models.backbone import BackboneSettings
from models.detector import Detector
from models.detector_settings import DetectorSettings
from models.mask_head import MaskHeadSettings, PanopticDetector, SoftmaxOver
from models.structures import Images, Targets, padding_of

SETTINGS = DetectorSettings(
    backbone=BackboneSettings(name="resnet18", weights="random", frozen_precision="float32"),
    hidden_dim=128,
    num_heads=8,
    encoder_layers=1,
    decoder_layers=2,
    feedforward_dim=48,
    dropout=0.0,
    num_queries=7,
    num_classes=5,
)


def panoptic_detector(
    softmax_over: SoftmaxOver = "positions", settings: DetectorSettings = SETTINGS, seed: int = 0
) -> PanopticDetector:
    """The same weights for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    detector = Detector(settings, generator)
    return PanopticDetector(detector, MaskHeadSettings(softmax_over=softmax_over), generator)


def two_pictures() -> Images:
    """Of 64 x 96 and 48 x 70 pixels, the second one padded."""
    sizes = torch.tensor([[64, 96], [48, 70]])
    padding = padding_of(sizes, 64, 96)
    pixels = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(3))
    return Images(pixels.masked_fill(padding[:, None], 0.0), padding, sizes)


def some_targets(*counts: int) -> Targets:
    """So many targets in each picture; label n % 5 for target n."""
    return Targets(
        tuple(
            torch.tensor([[0.3 + 0.1 * n, 0.4, 0.2, 0.3] for n in range(count)]).view(-1, 4)
            for count in counts
        ),
        tuple(torch.arange(count) % 5 for count in counts),
    )
