"""Calls of deformable attention at full size: pictures of 800 x 1333, batch 2."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

SHAPES = ((100, 167), (50, 84), (25, 42), (13, 21))
TOKENS = sum(rows * columns for rows, columns in SHAPES)
HEADS, CHANNELS, LEVELS, POINTS, BATCH = 8, 32, 4, 4, 2


@dataclass(frozen=True)
class Call:
    """Tensors of one fused call."""

    value: Tensor
    references: Tensor
    offsets: Tensor
    logits: Tensor
    grad_output: Tensor

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What the operator takes."""
        return self.value, self.references, self.offsets, self.logits


def make_call(queries: int, dtype: torch.dtype, spread: str) -> Call:
    """Queries of the encoder stand at the cells' centres, those of the decoder anywhere."""
    make = torch.Generator("cuda").manual_seed(0)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=make, device="cuda")

    if queries == TOKENS:
        centres = torch.cat([_centres(rows, columns) for rows, columns in SHAPES])
        centres = centres.cuda().expand(BATCH, -1, -1)
    else:
        centres = torch.rand((BATCH, queries, 2), generator=make, device="cuda")
    references = centres[:, :, None].expand(-1, -1, LEVELS, -1).contiguous()
    shape = (BATCH, queries, HEADS, LEVELS, POINTS, 2)
    if spread == "initial":
        offsets = _initial_offsets().cuda() + normal(*shape)
    else:
        sizes = torch.tensor([(columns, rows) for rows, columns in SHAPES], device="cuda")
        anywhere = (
            torch.rand(shape, generator=make, device="cuda") - centres[:, :, None, None, None]
        )
        offsets = anywhere * sizes[:, None]
    return Call(
        value=normal(BATCH, TOKENS, HEADS, CHANNELS).to(dtype),
        references=references,
        offsets=offsets.to(dtype),
        logits=normal(*shape[:-1]).to(dtype),
        grad_output=normal(BATCH, queries, HEADS * CHANNELS).to(dtype),
    )


def _centres(rows: int, columns: int) -> Tensor:
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return torch.stack([(x + 0.5) / columns, (y + 0.5) / rows], -1).flatten(0, 1)


def _initial_offsets() -> Tensor:
    """Each head looks its own way, 1 to 4 cells far: Deformable DETR, appendix A.4."""
    angles = torch.arange(HEADS) * (2 * math.pi / HEADS)
    directions = torch.stack([angles.cos(), angles.sin()], -1)
    directions = directions / directions.abs().amax(-1, keepdim=True)
    steps = torch.arange(1, POINTS + 1)
    return directions[:, None, None] * steps[:, None].expand(LEVELS, -1, 1)
