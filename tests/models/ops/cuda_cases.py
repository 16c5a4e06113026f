"""Calls of deformable attention that take every path of the CUDA kernels, and what they mean."""

import torch
from torch import Tensor

from models.ops.reference import deformable_attention, fused_deformable_attention
from tests.models.ops.emulated import Gradients, Inputs

f32, bf16, f16, f64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
NAMES = {f32: "f32", bf16: "bf16", f16: "f16", f64: "f64"}
Types = tuple[torch.dtype, torch.dtype, torch.dtype]

FIXED: tuple[tuple[Types, int, int, int], ...] = (
    ((f32, f32, f32), 32, 4, 4),  # 8 lanes of 2 samples
    ((bf16, bf16, bf16), 32, 4, 4),  # 4 lanes, each with a level; 8 in a backward
    ((bf16, f32, bf16), 64, 4, 4),
    ((f16, f16, f16), 16, 2, 3),  # 2 lanes of 3 samples; 4 in a backward, some without any
    ((f16, f32, f32), 8, 3, 2),  # one lane with three levels; 2 in a backward
    ((f32, f32, f32), 16, 3, 3),  # 4 lanes of 3 samples: the last lane has none
    ((f32, f32, f32), 16, 5, 2),  # 4 lanes of 3 samples: the last one is not full
    ((f32, f32, f32), 128, 2, 2),  # 32 lanes for 4 samples
    ((f32, f32, f32), 4, 2, 1),  # one lane
    ((f16, f16, f16), 256, 1, 4),  # 32 lanes of 8 channels, in a backward too
)
"""Types of value, points and weights; channels; levels; points."""

ANY: tuple[tuple[Types, int, int, int], ...] = (
    ((f32, f32, f32), 5, 3, 2),
    ((f32, f32, f32), 33, 2, 17),  # 2 turns of channels, 2 boards of samples
    ((bf16, bf16, f32), 24, 2, 3),
    ((f16, f32, f16), 3, 1, 1),
    ((f64, f64, f64), 32, 4, 4),
    ((f64, f32, f64), 1, 2, 20),
)

SHAPES = ((5, 7), (3, 4), (2, 1), (1, 3), (1, 1))


def emulated_kernels() -> str:
    """What these cases need, as the end of cuda_kernels.cu writes it."""
    fixed = {
        f"QUERYPATCH_FIXED({','.join(NAMES[t] for t in types)},{','.join(map(str, sizes))})"
        for (value, point, weight), *sizes in FIXED
        for types in ((value, point, weight), (value, f32, weight))  # locations are float32
    }
    for_any = {f"QUERYPATCH_ANY({name})" for name in NAMES.values()}
    return " ".join(sorted(fixed | for_any))


def inputs_of(
    types: Types, channels: int, levels: int, points: int, coordinates: int, seed: int = 0
) -> Inputs:
    """2 images, 3 queries, 3 heads; some samples lie outside, one is infinite and one is NaN."""
    make = torch.Generator().manual_seed(seed)
    value_type, point_type, weight_type = types
    shapes = SHAPES[:levels]
    tokens = sum(rows * columns for rows, columns in shapes)
    real = f64 if value_type is f64 else f32
    value = torch.randn((2, tokens, 3, channels), generator=make, dtype=f64)
    where = torch.rand((2, 3, 3, levels, points, 2), generator=make, dtype=f64) * 1.4 - 0.2
    references = None
    if coordinates:
        references = torch.rand((2, 3, levels, coordinates), generator=make, dtype=f64).to(real)
        where = (where - 0.5) * (4 if coordinates == 2 else 3)
    where[0, 1, 2, 0, 0, 0] = float("nan")
    where[1, 0, 1, levels - 1, points - 1, 1] = float("inf")
    weights = torch.randn(where.shape[:-1], generator=make, dtype=f64)
    if not coordinates:
        point_type = real
        weights = weights.abs() * 3
    return Inputs(
        value.to(value_type), shapes, references, where.to(point_type), weights.to(weight_type)
    )


def grad_output_of(inputs: Inputs) -> Tensor:
    batch, _, heads, channels = inputs.value.shape
    make = torch.Generator().manual_seed(5)
    shape = (batch, inputs.points.shape[1], heads * channels)
    return torch.randn(shape, generator=make, dtype=f64).to(inputs.value.dtype)


def meant(inputs: Inputs) -> Tensor:
    """The plain operator's output, in the inputs' dtypes."""
    if inputs.references is None:
        return deformable_attention(
            inputs.value, inputs.spatial_shapes, inputs.points, inputs.weights
        )
    return fused_deformable_attention(
        inputs.value, inputs.spatial_shapes, inputs.references, inputs.points, inputs.weights
    )


def meant_gradients(inputs: Inputs, grad_output: Tensor) -> Gradients:
    """In float64, of the inputs as they were rounded; points that lie nowhere lie far away."""
    far_away = inputs.points.nan_to_num(nan=1e3, posinf=1e3)
    given = (inputs.value, inputs.references, far_away, inputs.weights)
    precise = [None if t is None else t.to(f64).requires_grad_() for t in given]
    value, references, points, weights = precise
    assert value is not None
    assert points is not None
    assert weights is not None
    meant(Inputs(value, inputs.spatial_shapes, references, points, weights)).backward(
        grad_output.to(f64)
    )
    return Gradients(*(None if t is None else t.grad for t in precise))
