"""DAT, a vision transformer with deformable attention, as a backbone (Xia et al., CVPR 2022).

Four stages as in Swin; the first two attend within windows, the last two in turn within windows and
at deformed points. The networks of DAT++ (arXiv 2309.01430), which the authors' code has put under
the same names, are `dat_pp_*`: neighbourhoods for windows, deformed points in all stages, and
convolutions where v1 has patches.

Maps are channels last inside, (batch, rows, columns, channels), and any size goes: pictures are
padded with zeros to whole patches, maps to whole windows and to even sides before they merge. Bias
tables keep the size that they were trained with and are stretched over the map.
"""

import copy
import math
from dataclasses import dataclass
from typing import Literal, Self, assert_never

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from models.dat_attention import DatAttention, DeformableKind, ReferenceGrid
from models.neighbourhood import NeighbourhoodAttention
from models.windows import WindowAttention

DatName = Literal["dat_t", "dat_s", "dat_b", "dat_pp_t", "dat_pp_s", "dat_pp_b"]
TrainedSize = Literal[224, 384]

_PATCH = 4
_WIDENING = 4
_KERNELS = (9, 7, 5, 3)
_STRIDES = (8, 4, 2, 1)
_NEIGHBOURHOOD = 7
_OFFSET_RANGE = 2.0
_Attention = Literal["window", "shifted window", "deformable", "neighbourhood"]
_Stages = tuple[tuple[_Attention, _Attention], ...]


@dataclass(frozen=True)
class DatLayout:
    """The numbers of a published network, by stage where there are four."""

    width: int
    """Channels of the first stage; each next one has twice as many."""
    depths: tuple[int, int, int, int]
    groups: tuple[int, int, int, int]
    attention: _Stages
    """Of the blocks in turn."""
    is_plus_plus: bool
    drop_path: float
    """Published for training on ImageNet."""

    @property
    def channels(self) -> tuple[int, ...]:
        """Of the map of each stage, strides 4, 8, 16, 32."""
        return tuple(self.width * 2**stage for stage in range(4))


_DEPTH_OF_A_HEAD = 32
_LOCAL: _Stages = (("window", "shifted window"),)
_DEFORMED: _Stages = (("window", "deformable"),)
_NEAR: _Stages = (("neighbourhood", "deformable"),)
_ALL_DEFORMED: _Stages = (("deformable", "deformable"),)
_FIRST = _LOCAL * 2 + _DEFORMED * 2
_PLUS_PLUS = _NEAR * 3 + _ALL_DEFORMED


def dat_layout(name: DatName) -> DatLayout:
    """What the name stands for (CVPR 2022, table 1; DAT++, table 1 and the authors' settings)."""
    deep = (2, 4, 18, 2)
    match name:
        case "dat_t":
            return DatLayout(96, (2, 2, 6, 2), (0, 0, 3, 6), _FIRST, False, 0.2)
        case "dat_s":
            return DatLayout(96, (2, 2, 18, 2), (0, 0, 3, 6), _FIRST, False, 0.3)
        case "dat_b":
            return DatLayout(128, (2, 2, 18, 2), (0, 0, 4, 8), _FIRST, False, 0.5)
        case "dat_pp_t":
            return DatLayout(64, deep, (1, 2, 4, 8), _PLUS_PLUS, True, 0.2)
        case "dat_pp_s":
            return DatLayout(96, deep, (1, 2, 3, 6), _PLUS_PLUS, True, 0.4)
        case "dat_pp_b":
            return DatLayout(128, deep, (2, 4, 8, 16), _PLUS_PLUS, True, 0.7)
        case _:
            assert_never(name)


@dataclass(frozen=True)
class FoldedDat:
    """A DAT ready to run; what holds it does not take it for a part of its own."""

    network: "Dat"


def run_dat(
    dat: FoldedDat, pixels: Float[Tensor, "batch 3 height width"], count: int
) -> tuple[Float[Tensor, "batch _ _ _"], ...]:
    """The maps of the last `count` stages, shallowest first, in the precision of the weights."""
    maps: tuple[Tensor, ...] = dat.network(pixels, count)
    return maps


class Dat(nn.Module):
    """The stages of a DAT up to the third or fourth, without the classifier.

    Each map leaves through a LayerNorm of its own; what goes on to the next stage does not.
    `trained_size` is the side of the pictures, in pixels, that windows and bias tables are for.
    `drop_path` is how often the last block is skipped for a picture in training; earlier blocks are
    skipped less, the first never.
    """

    def __init__(
        self,
        name: DatName,
        *,
        num_stages: int,
        drop_path: float,
        trained_size: TrainedSize,
        grid: ReferenceGrid,
    ) -> None:
        super().__init__()
        layout = dat_layout(name)
        self.num_stages = num_stages
        self.channels = layout.channels[num_stages - 1]
        self.patch_embedding = (
            ConvolutionalStem(layout.width) if layout.is_plus_plus else PatchEmbedding(layout.width)
        )
        total = sum(layout.depths)
        chances = iter([drop_path * number / (total - 1) for number in range(total)])
        self.stages = nn.ModuleList(
            DatStage(
                [
                    DatBlock(
                        layout.channels[stage],
                        _attention(layout, stage, block, trained_size, grid),
                        is_plus_plus=layout.is_plus_plus,
                        drop_path=next(chances),
                    )
                    for block in range(layout.depths[stage])
                ],
                _merging(layout, stage) if stage + 1 < num_stages else None,
            )
            for stage in range(num_stages)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(layout.channels[n]) for n in range(num_stages))

    def train(self, mode: bool = True) -> Self:
        """Parts without a trained parameter stay in eval mode, hence without stochastic depth."""
        super().train(mode)
        for part in (self.patch_embedding, *self.stages, *self.norms):
            if not any(parameter.requires_grad for parameter in part.parameters()):
                part.eval()
        return self

    def fold(self, dtype: torch.dtype) -> FoldedDat:
        """The network as it is run: itself, or where the precision differs a frozen copy."""
        if self.norms[0].weight.dtype == dtype:
            return FoldedDat(self)
        return FoldedDat(copy.deepcopy(self).requires_grad_(False).to(dtype).eval())

    def forward(
        self, pixels: Float[Tensor, "batch 3 height width"], count: int
    ) -> tuple[Float[Tensor, "batch _ _ _"], ...]:
        """The maps of the last `count` stages, shallowest first."""
        features = self.patch_embedding(pixels)
        first = self.num_stages - count
        outputs = []
        for position, (stage, norm) in enumerate(zip(self.stages, self.norms, strict=True)):
            assert isinstance(stage, DatStage)
            for block in stage.blocks:
                features = block(features)
            if position >= first:
                outputs.append(norm(features).permute(0, 3, 1, 2))
            if stage.merging is not None:
                features = stage.merging(features)
        return tuple(outputs)


class DatStage(nn.Module):
    """Blocks on one map, then the convolution to half its size for the next stage."""

    def __init__(self, blocks: list["DatBlock"], merging: "Convolution | None") -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.merging = merging


class DatBlock(nn.Module):
    """Attention, then two linear layers, each added to what it was given.

    In DAT++ a depthwise convolution goes before (its "local perception unit") and another between
    the linear layers.
    """

    def __init__(
        self,
        channels: int,
        attention: WindowAttention | DatAttention | NeighbourhoodAttention,
        *,
        is_plus_plus: bool,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.local_perception = AddedDepthwise(channels) if is_plus_plus else nn.Identity()
        self.norm1 = nn.LayerNorm(channels)
        self.attention = attention
        self.norm2 = nn.LayerNorm(channels)
        self.mlp = nn.Sequential(
            nn.Linear(channels, _WIDENING * channels),
            AddedDepthwise(_WIDENING * channels) if is_plus_plus else nn.Identity(),
            nn.GELU(),
            nn.Linear(_WIDENING * channels, channels),
        )
        self.stochastic_depth = StochasticDepth(drop_path, "row")

    def forward(
        self, features: Float[Tensor, "batch rows columns channels"]
    ) -> Float[Tensor, "batch rows columns channels"]:
        """A map of the same size."""
        features = self.local_perception(features)
        features = features + self.stochastic_depth(self.attention(self.norm1(features)))
        thought: Tensor = self.stochastic_depth(self.mlp(self.norm2(features)))
        return features + thought


class AddedDepthwise(nn.Module):
    """A 3x3 convolution of each channel by itself, added to what it was given."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)

    def forward(
        self, features: Float[Tensor, "batch rows columns channels"]
    ) -> Float[Tensor, "batch rows columns channels"]:
        """A map of the same size."""
        seen: Tensor = self.convolution(features.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return features + seen


class PatchEmbedding(nn.Module):
    """Each patch of 4x4 pixels as a token; zeros fill up the last row and column of patches."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.convolution = Convolution(3, channels, kernel=_PATCH, stride=_PATCH, bias=True)

    def forward(
        self, pixels: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch rows columns channels"]:
        """The normed tokens, in the precision of the weights."""
        tokens: Tensor = self.convolution(_channels_last(pixels, self.convolution))
        return tokens


class ConvolutionalStem(nn.Module):
    """Two 3x3 convolutions of stride 2, as DAT++ begins."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = Convolution(3, channels // 2, kernel=3, stride=2, bias=True)
        self.second = Convolution(channels // 2, channels, kernel=3, stride=2, bias=True)

    def forward(
        self, pixels: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch rows columns channels"]:
        """The normed tokens, in the precision of the weights."""
        seen = F.gelu(self.first(_channels_last(pixels, self.first)))
        tokens: Tensor = self.second(seen)
        return tokens


class Convolution(nn.Module):
    """A convolution to a smaller map and a LayerNorm; sizes are rounded up.

    A kernel as large as its stride has no border: zeros fill up the last row and column.
    """

    def __init__(
        self, channels_in: int, channels_out: int, *, kernel: int, stride: int, bias: bool
    ) -> None:
        super().__init__()
        padding = 0 if kernel == stride else kernel // 2
        self.projection = nn.Conv2d(
            channels_in, channels_out, kernel, stride, padding=padding, bias=bias
        )
        self.norm = nn.LayerNorm(channels_out)

    def forward(
        self, features: Float[Tensor, "batch rows columns _"]
    ) -> Float[Tensor, "batch _ _ channels"]:
        """Rows and columns divided by the stride."""
        if self.projection.padding == (0, 0):
            (down, across), (rows, columns) = self.projection.stride, features.shape[1:3]
            features = F.pad(features, (0, 0, 0, -columns % across, 0, -rows % down))
        seen = self.projection(features.permute(0, 3, 1, 2))
        normed: Tensor = self.norm(seen.permute(0, 2, 3, 1))
        return normed


def _channels_last(pixels: Tensor, first: Convolution) -> Tensor:
    """In the precision of the weights."""
    given = pixels.to(first.norm.weight.dtype, memory_format=torch.channels_last)
    return given.permute(0, 2, 3, 1)


def _merging(layout: DatLayout, stage: int) -> Convolution:
    kernel = 3 if layout.is_plus_plus else 2
    channels = layout.channels[stage]
    return Convolution(channels, 2 * channels, kernel=kernel, stride=2, bias=False)


def _attention(
    layout: DatLayout, stage: int, block: int, trained_size: TrainedSize, grid: ReferenceGrid
) -> WindowAttention | DatAttention | NeighbourhoodAttention:
    channels = layout.channels[stage]
    heads = channels // _DEPTH_OF_A_HEAD
    window = trained_size // 32
    kind = layout.attention[stage][block % 2]
    match kind:
        case "window":
            return WindowAttention(channels, heads, window, shift=0)
        case "shifted window":
            return WindowAttention(channels, heads, window, shift=math.ceil(window / 2))
        case "neighbourhood":
            return NeighbourhoodAttention(channels, heads, _NEIGHBOURHOOD)
        case "deformable":
            deformable = DeformableKind(
                channels=channels,
                heads=heads,
                groups=layout.groups[stage],
                kernel=_KERNELS[stage],
                stride=_STRIDES[stage] if layout.is_plus_plus else 1,
                offset_range=None if layout.is_plus_plus else _OFFSET_RANGE,
                table_side=2 * (trained_size // (_PATCH * 2**stage)) - 1,
            )
            return DatAttention(deformable, grid)
        case _:
            assert_never(kind)
