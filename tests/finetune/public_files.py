"""Files as others publish them, made by formula or small."""

from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from models.detector_settings import DetectorSettings
from models.interop.detr import to_detr_names
from models.patch_queries import PatchDetector, QueryPatches
from tests.finetune.small_detector import SETTINGS
from tests.parity import formula

MANIFESTS = Path(__file__).parents[1] / "parity" / "manifests"


@lru_cache(maxsize=1)
def formula_tensors(manifest: str) -> dict[str, Tensor]:
    """Everything that a public model of the manifest holds; to be read only."""
    made = formula.weights(MANIFESTS / f"{manifest}.json", {})
    return {name: torch.from_numpy(np.asarray(value)) for name, value in made.items()}


def formula_file(manifest: str, folder: Path) -> str:
    """As the public code saves it."""
    path = folder / f"{manifest}.pth"
    torch.save({"model": formula_tensors(manifest)}, path)
    return str(path)


def pretraining_settings() -> DetectorSettings:
    """Of the small detector: pre-norm, two labels."""
    return SETTINGS.model_copy(update={"pre_norm": True, "num_classes": 2, "num_queries": 6})


def patch_detector(seed: int = 1) -> PatchDetector:
    """A small UP-DETR in pretraining."""
    generator = torch.Generator().manual_seed(seed)
    return PatchDetector(pretraining_settings(), QueryPatches(num_patches=3), generator)


def pretraining_file(folder: Path) -> str:
    """A small pretraining checkpoint of the public code."""
    path = folder / "updetr.pth"
    torch.save({"model": to_detr_names(patch_detector())}, path)
    return str(path)
