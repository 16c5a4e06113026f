"""Small Conditional DETRs and DAB-DETRs, and a memory that their tests decode."""

import copy
import functools

import torch
from torch import Tensor

from models.detector import Detector
from models.detector_settings import DetectorSettings
from models.structures import Memory
from tests.models.test_detector import settings

CONDITIONAL: dict[str, object] = {"decoder_attention": "conditional", "class_scores": "sigmoid"}
ANCHORS = CONDITIONAL | {
    "query_kind": "anchor",
    "scale_positions": True,
    "activation": "prelu",
    "position_temperature": 20.0,
    "dropout": 0.0,
}
PATTERNS = ANCHORS | {"num_patterns": 2}


def drawn(kind: dict[str, object], *, noise: float = 0.0, **changes: object) -> Detector:
    """A detector of 16 channels in eval mode; `noise` moves every weight off its first value."""
    model = copy.deepcopy(_first(settings(**(kind | changes)).model_dump_json()))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if not name.startswith("backbone."):
                weight.add_(noise * torch.randn(weight.shape, generator=generator))
    return model


@functools.cache
def _first(chosen: str) -> Detector:
    """Drawn once for all tests: most of a small detector is a ResNet-18."""
    read = DetectorSettings.model_validate_json(chosen)
    return Detector(read, torch.Generator().manual_seed(0)).eval()


def memory(batch: int = 2, tokens: int = 5) -> Memory:
    """Of which the last two tokens of the first picture are padding."""
    padding = torch.zeros(batch, tokens, dtype=torch.bool)
    padding[0, -2:] = True
    return Memory(
        tokens=normal(batch, tokens, 16, seed=1),
        position=normal(batch, tokens, 16, seed=2),
        padding=padding,
        spatial_shapes=((1, tokens),),
        valid_ratios=torch.ones(batch, 1, 2),
    )


def normal(*lengths: int, seed: int = 0) -> Tensor:
    return torch.randn(*lengths, generator=torch.Generator().manual_seed(seed))
