"""Small Deformable and Sparse DETRs, and what their tests feed them."""

import copy
import functools

import torch
from torch import Tensor

from models.detector import Detector
from models.detector_settings import DetectorSettings
from models.structures import DetectorOutput, Images, Memory, TokenPredictions
from tests.models.test_detector import images, settings

DEFORMABLE: dict[str, object] = {
    "encoder_attention": "deformable",
    "decoder_attention": "deformable",
    "feature_levels": 4,
    "class_scores": "sigmoid",
    "encoder_layers": 2,
}
REFINED = DEFORMABLE | {"box_refinement": True}
TWO_STAGE = REFINED | {"two_stage": True}
SPARSE = TWO_STAGE | {"proposal_content": "memory", "proposal_classes": "all", "rho": 0.3}
OBJECTNESS = SPARSE | {"selection": {"criterion": "objectness"}}
RANDOM = SPARSE | {"selection": {"criterion": "random"}}

CHANNELS = (128, 256, 512)
"""Of the last three stages of a ResNet-18."""


def small(kind: dict[str, object], **changes: object) -> DetectorSettings:
    """A detector of 16 channels that proposes 5 boxes of 3 classes."""
    return settings(**(kind | changes))


def drawn(kind: dict[str, object], *, noise: float = 0.0, **changes: object) -> Detector:
    """It in eval mode; `noise` moves every weight off its first value, which is often 0."""
    model = copy.deepcopy(_first(small(kind, **changes).model_dump_json()))
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


def pictures() -> Images:
    """A picture of 64x96 pixels and one of 96x32."""
    return images((64, 96), (96, 32))


def feature_maps(
    rows: int, columns: int, padding: Tensor | None = None, seed: int = 2
) -> tuple[Tensor, ...]:
    """Maps of strides 8, 16, 32 of pictures with rows x columns cells of stride 32."""
    generator = torch.Generator().manual_seed(seed)
    batch = 1 if padding is None else len(padding)
    maps = []
    for level, channels in enumerate(CHANNELS):
        side = 2 ** (2 - level)
        shape = (batch, channels, rows * side, columns * side)
        one = torch.randn(shape, generator=generator)
        if padding is not None:
            step = 32 // side
            one = one * ~padding[:, None, ::step, ::step]
        maps.append(one)
    return tuple(maps)


def predictions(output: DetectorOutput) -> list[Tensor]:
    """Everything that a loss may read."""
    memory = output.memory
    layers = [layer for group in output.groups for layer in group.layers]
    tokens = [each for each in _of_tokens(memory) if each is not None]
    said = [each for one in (*layers, *tokens) for each in (one.logits, one.boxes)]
    if memory.selection is not None and memory.selection.scores is not None:
        said.append(memory.selection.scores)
    return said


def _of_tokens(memory: Memory) -> tuple[TokenPredictions | None, ...]:
    return (memory.proposals, memory.objectness, *memory.encoder_layers)
