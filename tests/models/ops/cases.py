"""Tiny problems for the operator, of every shape that could go wrong, and how far results are."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SHAPES = ((5, 7), (3, 2), (1, 4), (0, 3), (1, 1))

Attention = Callable[..., Tensor]


@dataclass(frozen=True)
class Sizes:
    """Of one problem; asymmetric."""

    batch: int = 2
    heads: int = 3
    channels: int = 8
    levels: int = 3
    points: int = 4
    queries: int = 5
    coordinates: int = 0
    """0 for the classic operator, 2 or 4 for the fused one."""

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """Rows and columns of the levels."""
        return SHAPES[: self.levels]

    @property
    def tokens(self) -> int:
        """Of all levels."""
        return sum(rows * columns for rows, columns in self.shapes)


def inputs(sizes: Sizes, seed: int = 0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """value and what belongs to the operator, in order; locations reach outside of the levels.

    value, offsets, logits and weights are rounded to `dtype`, locations and references are float32
    at least.
    """
    draw = torch.Generator().manual_seed(seed)
    precise = torch.promote_types(dtype, torch.float32)
    per_query = (sizes.batch, sizes.queries, sizes.heads, sizes.levels, sizes.points)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64)

    value = normal(sizes.batch, sizes.tokens, sizes.heads, sizes.channels).to(dtype)
    if not sizes.coordinates:
        locations = torch.rand((*per_query, 2), generator=draw, dtype=torch.float64) * 1.4 - 0.2
        return [value, locations.to(precise), normal(*per_query).to(dtype)]
    references = torch.rand(
        (sizes.batch, sizes.queries, sizes.levels, sizes.coordinates),
        generator=draw,
        dtype=torch.float64,
    )
    offsets = (1.5 * normal(*per_query, 2)).to(dtype)
    return [value, references.to(precise), offsets, normal(*per_query).to(dtype)]


def run(
    attention: Attention, sizes: Sizes, given: Sequence[Tensor], grad: Tensor | None = None
) -> list[Tensor]:
    """The output, then the gradients of all inputs."""
    traced = [tensor.detach().clone().requires_grad_() for tensor in given]
    out = attention(traced[0], sizes.shapes, *traced[1:])
    if grad is None:
        grad = grad_of(out)
    return [out.detach(), *torch.autograd.grad(out, traced, grad.to(out.dtype))]


def grad_of(out: Tensor) -> Tensor:
    """A gradient of the output, the same whenever the shape is."""
    draw = torch.Generator().manual_seed(7)
    return torch.randn(out.shape, generator=draw, dtype=torch.float64).to(out.dtype)


def relative(found: Tensor, wanted: Tensor) -> float:
    """The L2 norm of the difference over that of what is wanted."""
    difference = (found.double() - wanted.double()).norm()
    return float(difference / wanted.double().norm().clamp(min=1e-30))
