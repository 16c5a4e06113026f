"""ResNet with frozen BatchNorm as a stack of convolutions (He et al., CVPR 2016).

A frozen BatchNorm is y = scale * x + shift with constants, so it is always run inside the
convolution before it: conv(x, scale * weight) + shift. The product is over weights, not over
feature maps, and it is differentiable, so the same code trains (folded anew in every step) and
infers (folded once, in a lower precision if wished). Channels last throughout.

Measured, forward of a ResNet-50 on 2 pictures of 480x600 and 20 patches of 128x128, one thread of
a CPU with AVX-512: 2.22 s as torchvision runs it, 1.71 s folded, 0.85 s folded in bfloat16.
Tensors have torchvision's names.
"""

from dataclasses import dataclass
from typing import Literal, assert_never

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

ResNetName = Literal["resnet18", "resnet34", "resnet50", "resnet101"]

_BATCH_NORM_EPSILON = 1e-5
_BOTTLENECK_EXPANSION = 4


@dataclass(frozen=True)
class FoldedConvolution:
    """A convolution with the constants of its BatchNorm multiplied in."""

    weight: Tensor
    shift: Tensor
    stride: int
    padding: int
    dilation: int


@dataclass(frozen=True)
class FoldedBlock:
    """Convolutions in a row, beside the shortcut, which is the identity where None."""

    convolutions: tuple[FoldedConvolution, ...]
    shortcut: FoldedConvolution | None


@dataclass(frozen=True)
class FoldedResNet:
    """A ResNet ready to run: the stem and the blocks of each stage."""

    stem: FoldedConvolution
    stages: tuple[tuple[FoldedBlock, ...], ...]


def run_stem(resnet: FoldedResNet, pixels: Tensor) -> Tensor:
    """Features of stride 4, before the first stage, in the precision of the folded weights."""
    pixels = pixels.to(resnet.stem.weight.dtype, memory_format=torch.channels_last)
    return F.max_pool2d(_convolve(resnet.stem, pixels).relu_(), kernel_size=3, stride=2, padding=1)


def run_stage(blocks: tuple[FoldedBlock, ...], features: Tensor) -> Tensor:
    """The output of one stage (`layer1` to `layer4`)."""
    for block in blocks:
        features = _run_block(block, features)
    return features


def run_resnet(
    resnet: FoldedResNet, pixels: Float[Tensor, "batch 3 height width"]
) -> Float[Tensor, "batch channels rows columns"]:
    """The output of the last stage in the precision of the folded weights, channels last."""
    features = run_stem(resnet, pixels)
    for blocks in resnet.stages:
        features = run_stage(blocks, features)
    return features


def run_levels(
    resnet: FoldedResNet, pixels: Float[Tensor, "batch 3 height width"], count: int
) -> tuple[Float[Tensor, "batch _ _ _"], ...]:
    """The outputs of the last `count` stages, shallowest first; the last is `run_resnet`'s.

    All of them stay in memory, which `run_resnet` spares.
    """
    features = run_stem(resnet, pixels)
    first = len(resnet.stages) - count
    outputs = []
    for stage, blocks in enumerate(resnet.stages):
        features = run_stage(blocks, features)
        if stage >= first:
            outputs.append(features)
    return tuple(outputs)


def _run_block(block: FoldedBlock, features: Tensor) -> Tensor:
    shortcut = features if block.shortcut is None else _convolve(block.shortcut, features)
    *inner, last = block.convolutions
    for convolution in inner:
        features = _convolve(convolution, features).relu_()
    return _convolve(last, features).add_(shortcut).relu_()


def _convolve(convolution: FoldedConvolution, features: Tensor) -> Tensor:
    return F.conv2d(
        features,
        convolution.weight,
        convolution.shift,
        stride=convolution.stride,
        padding=convolution.padding,
        dilation=convolution.dilation,
    )


class FrozenBatchNorm(nn.Module):
    """The constants of a BatchNorm that is never trained: four buffers of one value per channel."""

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.ones(channels))
        self.register_buffer("bias", torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def scale_and_shift(self) -> tuple[Tensor, Tensor]:
        """What the layer does: y = scale * x + shift, per channel."""
        scale = self.weight * (self.running_var + _BATCH_NORM_EPSILON).rsqrt()
        return scale, self.bias - self.running_mean * scale


class Block(nn.Module):
    """A residual block with BatchNorms: two 3x3 convolutions, or 1x1, 3x3, 1x1 (bottleneck)."""

    def __init__(
        self,
        *,
        bottleneck: bool,
        channels_in: int,
        width: int,
        stride: int,
        dilation: int,
        stride_in_1x1: bool,
    ) -> None:
        super().__init__()
        first_stride, second_stride = (
            (1, stride) if bottleneck and not stride_in_1x1 else (stride, 1)
        )
        channels_out = width * (_BOTTLENECK_EXPANSION if bottleneck else 1)
        first_kernel = 1 if bottleneck else 3
        self.conv1 = _convolution(channels_in, width, first_kernel, first_stride)
        self.bn1 = FrozenBatchNorm(width)
        self.conv2 = _convolution(width, width, 3, second_stride, dilation)
        self.bn2 = FrozenBatchNorm(width)
        self.conv3 = _convolution(width, channels_out, 1) if bottleneck else None
        self.bn3 = FrozenBatchNorm(channels_out) if bottleneck else None
        reshapes = stride != 1 or channels_in != channels_out
        self.downsample = (
            nn.Sequential(
                _convolution(channels_in, channels_out, 1, stride), FrozenBatchNorm(channels_out)
            )
            if reshapes
            else None
        )

    def fold(self, dtype: torch.dtype) -> FoldedBlock:
        """The block as it is run."""
        folded = [_fold(self.conv1, self.bn1, dtype), _fold(self.conv2, self.bn2, dtype)]
        if self.conv3 is not None and self.bn3 is not None:
            folded.append(_fold(self.conv3, self.bn3, dtype))
        shortcut = (
            None
            if self.downsample is None
            else _fold(self.downsample[0], self.downsample[1], dtype)
        )
        return FoldedBlock(tuple(folded), shortcut)


class ResNet(nn.Module):
    """The convolutions of a ResNet up to `layer3` or `layer4`, without the classifier.

    `dilation` keeps the stride of `layer4` at 16 ("DC5"); `stride_in_1x1` puts the stride of a
    bottleneck on its first convolution instead of the second. `forward` is missing on purpose:
    fold, then `run_resnet`.
    """

    def __init__(
        self, name: ResNetName, *, num_stages: int, dilation: bool, stride_in_1x1: bool
    ) -> None:
        super().__init__()
        self.conv1 = _convolution(3, 64, 7, 2)
        self.bn1 = FrozenBatchNorm(64)
        bottleneck, depths = resnet_layout(name)
        channels, current_dilation = 64, 1
        for stage, depth in enumerate(depths[:num_stages]):
            stride = 1 if stage == 0 else 2
            first_dilation = current_dilation
            if stage == 3 and dilation:
                current_dilation, stride = current_dilation * stride, 1
            blocks: list[Block] = []
            for position in range(depth):
                blocks.append(
                    Block(
                        bottleneck=bottleneck,
                        channels_in=channels,
                        width=64 * 2**stage,
                        stride=stride if position == 0 else 1,
                        dilation=first_dilation if position == 0 else current_dilation,
                        stride_in_1x1=stride_in_1x1,
                    )
                )
                channels = stage_channels(name, stage)
            self.add_module(f"layer{stage + 1}", nn.ModuleList(blocks))
        self.num_stages = num_stages
        self.channels = channels

    def fold(self, dtype: torch.dtype) -> FoldedResNet:
        """The network as it is run, in the given precision; gradients flow to the weights."""
        stages = (
            self.get_submodule(f"layer{stage + 1}").children() for stage in range(self.num_stages)
        )
        return FoldedResNet(
            stem=_fold(self.conv1, self.bn1, dtype),
            stages=tuple(
                tuple(block.fold(dtype) for block in blocks if isinstance(block, Block))
                for blocks in stages
            ),
        )


def resnet_layout(name: ResNetName) -> tuple[bool, tuple[int, int, int, int]]:
    """Whether the blocks are bottlenecks, and the number of blocks of each stage."""
    match name:
        case "resnet18":
            return False, (2, 2, 2, 2)
        case "resnet34":
            return False, (3, 4, 6, 3)
        case "resnet50":
            return True, (3, 4, 6, 3)
        case "resnet101":
            return True, (3, 4, 23, 3)
        case _:
            assert_never(name)


def stage_channels(name: ResNetName, stage: int) -> int:
    """Channels that a stage (0 for `layer1`) puts out."""
    bottleneck, _ = resnet_layout(name)
    width: int = 64 * 2**stage
    return width * (_BOTTLENECK_EXPANSION if bottleneck else 1)


def _convolution(
    channels_in: int, channels_out: int, kernel: int, stride: int = 1, dilation: int = 1
) -> nn.Conv2d:
    return nn.Conv2d(
        channels_in,
        channels_out,
        kernel,
        stride,
        padding=dilation * (kernel // 2),
        dilation=dilation,
        bias=False,
    )


def _fold(convolution: nn.Module, norm: nn.Module, dtype: torch.dtype) -> FoldedConvolution:
    assert isinstance(convolution, nn.Conv2d)
    assert isinstance(norm, FrozenBatchNorm)
    scale, shift = norm.scale_and_shift()
    weight = convolution.weight * scale[:, None, None, None]
    return FoldedConvolution(
        weight=weight.to(dtype, memory_format=torch.channels_last),
        shift=shift.to(dtype),
        stride=convolution.stride[0],
        padding=int(convolution.padding[0]),
        dilation=convolution.dilation[0],
    )
