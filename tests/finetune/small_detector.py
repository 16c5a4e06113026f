"""A detector that is small enough for tests, with classes whose ids have gaps."""

from pathlib import Path

import torch
from safetensors.torch import save_file

from models.artefact import PictureInput, Provenance, artefact_metadata
from models.backbone import BackboneSettings
from models.detector import Detector
from models.detector_settings import DetectorSettings
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


def write_weights(path: Path, settings: DetectorSettings = SETTINGS, seed: int = 0) -> None:
    """A safetensors file of the detector that tells all of itself."""
    detector = Detector(settings, torch.Generator().manual_seed(seed))
    metadata = artefact_metadata("detector", settings, CLASSES, INPUT, Provenance())
    save_file(detector.state_dict(), path, metadata=metadata)
