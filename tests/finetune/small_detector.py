"""A detector that is small enough for tests, with classes whose ids have gaps."""

import torch

from models.artefact import PictureInput
from models.backbone import BackboneSettings
from models.detector import Detector, DetectorSettings
from models.structures import Classes

CLASSES = Classes(("person", "car", "dog"), (1, 4, 17))
INPUT = PictureInput(short_side=64, max_size=106)
SETTINGS = DetectorSettings(
    backbone=BackboneSettings(name="resnet18", weights="random", frozen_precision="float32"),
    hidden_dim=32,
    num_heads=2,
    encoder_layers=1,
    decoder_layers=2,
    feedforward_dim=48,
    num_queries=7,
    num_classes=3,
)


def small_detector(seed: int = 0) -> Detector:
    """The same weights for the same seed, in evaluation mode."""
    return Detector(SETTINGS, torch.Generator().manual_seed(seed)).eval()
