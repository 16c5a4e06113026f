"""Swin-T, a transformer over shifted windows, as a backbone (Liu et al., ICCV 2021, section 3).

Patch merging and stochastic depth are torchvision's. Its attention is not: it leaves the windows
unshifted where one covers the map, as classifiers do; the Swin that detectors use always shifts
them, and ours does either. Maps are channels last inside, (batch, rows, columns, channels), and any
size goes: pictures are padded with zeros to whole patches, maps to whole windows and to even sides
before they merge.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Self

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torchvision.models.swin_transformer import PatchMerging
from torchvision.ops import StochasticDepth

from models.windows import WindowAttention

SwinName = Literal["swin_t"]

CHANNELS = (96, 192, 384, 768)
"""Depth of the map of each stage, strides 4, 8, 16, 32."""
DEPTHS = (2, 2, 6, 2)
"""Blocks of each stage."""
HEADS = (3, 6, 12, 24)
"""Attention heads of each stage."""
WINDOW = 7
"""Rows and columns of a window."""

_PATCH = 4
_WIDENING = 4
_SHIFT = WINDOW // 2


@dataclass(frozen=True)
class FoldedSwin:
    """A Swin ready to run; what holds it does not take it for a part of its own."""

    network: "Swin"


def run_swin(
    swin: FoldedSwin, pixels: Float[Tensor, "batch 3 height width"], count: int
) -> tuple[Float[Tensor, "batch _ _ _"], ...]:
    """The maps of the last `count` stages, shallowest first, in the precision of the weights."""
    maps: tuple[Tensor, ...] = swin.network(pixels, count)
    return maps


class Swin(nn.Module):
    """The stages of a Swin-T up to the third or fourth, without the classifier.

    Each map but that of stride 4 leaves through a LayerNorm of its own, as in detectors; what goes
    on to the next stage does not. `drop_path` is how often the last block is skipped for a picture
    in training; earlier blocks are skipped less, the first never. `shifts_covering_windows` says
    whether windows are shifted where one covers the map's rows or columns.
    """

    def __init__(self, *, num_stages: int, drop_path: float, shifts_covering_windows: bool) -> None:
        super().__init__()
        self.num_stages = num_stages
        self.channels = CHANNELS[num_stages - 1]
        self.patch_embedding = PatchEmbedding()
        chances = iter(torch.linspace(0, drop_path, sum(DEPTHS), device="cpu").tolist())
        self.stages = nn.ModuleList(
            SwinStage(stage, chances, merges=stage + 1 < num_stages) for stage in range(num_stages)
        )
        self.norms = nn.ModuleList(
            nn.LayerNorm(CHANNELS[stage]) if stage else nn.Identity() for stage in range(num_stages)
        )
        for part in self.modules():
            if isinstance(part, WindowAttention):
                part.shifts_covering = shifts_covering_windows

    def train(self, mode: bool = True) -> Self:
        """Parts without a trained parameter stay in eval mode, hence without stochastic depth."""
        super().train(mode)
        for part in (self.patch_embedding, *self.stages, *self.norms):
            if not any(parameter.requires_grad for parameter in part.parameters()):
                part.eval()
        return self

    def fold(self, dtype: torch.dtype) -> FoldedSwin:
        """The network as it is run: itself, or where the precision differs a frozen copy."""
        if self.patch_embedding.projection.weight.dtype == dtype:
            return FoldedSwin(self)
        return FoldedSwin(copy.deepcopy(self).requires_grad_(False).to(dtype).eval())

    def forward(
        self, pixels: Float[Tensor, "batch 3 height width"], count: int
    ) -> tuple[Float[Tensor, "batch _ _ _"], ...]:
        """The maps of the last `count` stages, shallowest first."""
        features = self.patch_embedding(pixels)
        first = self.num_stages - count
        outputs = []
        for position, (stage, norm) in enumerate(zip(self.stages, self.norms, strict=True)):
            assert isinstance(stage, SwinStage)
            for block in stage.blocks:
                features = block(features)
            if position >= first:
                outputs.append(norm(features).permute(0, 3, 1, 2))
            if stage.merging is not None:
                features = stage.merging(features)
        return tuple(outputs)


class PatchEmbedding(nn.Module):
    """Each patch of 4x4 pixels as a token; zeros fill up the last row and column of patches."""

    def __init__(self) -> None:
        super().__init__()
        self.projection = nn.Conv2d(3, CHANNELS[0], _PATCH, _PATCH)
        self.norm = nn.LayerNorm(CHANNELS[0])

    def forward(
        self, pixels: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch rows columns channels"]:
        """The normed tokens, in the precision of the weights."""
        height, width = pixels.shape[-2:]
        whole = F.pad(pixels, (0, -width % _PATCH, 0, -height % _PATCH))
        patches = self.projection(whole.to(self.projection.weight.dtype))
        normed: Tensor = self.norm(patches.permute(0, 2, 3, 1))
        return normed


class SwinStage(nn.Module):
    """Blocks on one map, then the merging of 2x2 tokens into one for the next stage."""

    def __init__(self, stage: int, chances: Iterator[float], *, merges: bool) -> None:
        super().__init__()
        channels, heads = CHANNELS[stage], HEADS[stage]
        self.blocks = nn.ModuleList(
            SwinBlock(channels, heads, _SHIFT if position % 2 else 0, drop_path=next(chances))
            for position in range(DEPTHS[stage])
        )
        self.merging = PatchMerging(channels) if merges else None


class SwinBlock(nn.Module):
    """Attention within windows, then two linear layers, each added to what it was given."""

    def __init__(self, channels: int, num_heads: int, shift: int, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attention = WindowAttention(channels, num_heads, WINDOW, shift)
        self.norm2 = nn.LayerNorm(channels)
        self.mlp = nn.Sequential(
            nn.Linear(channels, _WIDENING * channels),
            nn.GELU(),
            nn.Linear(_WIDENING * channels, channels),
        )
        self.stochastic_depth = StochasticDepth(drop_path, "row")

    def forward(
        self, features: Float[Tensor, "batch rows columns channels"]
    ) -> Float[Tensor, "batch rows columns channels"]:
        """A map of the same size."""
        features = features + self.stochastic_depth(self.attention(self.norm1(features)))
        thought: Tensor = self.stochastic_depth(self.mlp(self.norm2(features)))
        return features + thought
