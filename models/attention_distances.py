"""How far a student's attention is from its teacher's (D3ETR, section 4, attention distillation).

Maps are per head, before dropout, rows of probabilities over queries or tokens. The distance of two
rows is the sum of squared differences or the Kullback-Leibler divergence; both are our reading, the
paper's text was not to be had. Deformable attention has no maps: what counts there is how much each
token is looked at by all queries of a head together.
"""

from collections.abc import Sequence
from typing import Literal, assert_never

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from models.structures import SampledAttention

AttentionDistance = Literal["mse", "kl"]

_SMALLEST = 1e-12


def row_distances(
    student: Float[Tensor, "batch heads rows columns"],
    teacher: Float[Tensor, "batch others rows columns"],
    kind: AttentionDistance,
) -> Float[Tensor, " batch"]:
    """The distance of two rows, summed over its columns, mean over rows and heads.

    Where the numbers of heads differ, of the mean of each one's heads. For `kl` the teacher's rows
    are made to sum to 1, which selected ones do not.
    """
    student, teacher = student.float(), teacher.float()
    if student.shape[1] != teacher.shape[1]:
        student, teacher = student.mean(1, keepdim=True), teacher.mean(1, keepdim=True)
    match kind:
        case "mse":
            distance = (student - teacher).square().sum(-1)
        case "kl":
            wanted = normalised(teacher)
            certain = torch.special.entr(wanted)
            distance = -(certain + wanted * student.clamp(min=_SMALLEST).log()).sum(-1)
        case _:
            assert_never(kind)
    return distance.mean((1, 2))


def normalised(rows: Float[Tensor, "*rows columns"]) -> Float[Tensor, "*rows columns"]:
    """Rows that sum to 1; those of zeros stay."""
    return rows / rows.sum(-1, keepdim=True).clamp(min=_SMALLEST)


def of_partners(
    attention: Float[Tensor, "batch heads teachers columns"],
    partners: Int64[Tensor, "batch students"],
) -> Float[Tensor, "batch heads students columns"]:
    """The rows of each student's partner."""
    index = partners[:, None, :, None].expand(-1, attention.shape[1], -1, attention.shape[3])
    return attention.gather(2, index)


def among_partners(
    attention: Float[Tensor, "batch heads teachers teachers"],
    partners: Int64[Tensor, "batch students"],
) -> Float[Tensor, "batch heads students students"]:
    """What the partners pay to each other: entry (i, j) is that of i's partner to j's."""
    rows = of_partners(attention, partners)
    index = partners[:, None, None, :].expand(-1, rows.shape[1], rows.shape[2], -1)
    return rows.gather(3, index)


def resampled(
    attention: Float[Tensor, "batch heads queries theirs"],
    from_shape: tuple[int, int],
    to_shape: tuple[int, int],
    padding: Bool[Tensor, "batch ours"],
) -> Float[Tensor, "batch heads queries ours"]:
    """A map over the cells of another grid (rows, columns) of the same picture; rows sum to 1.

    A DC5 teacher has four cells for each of the student's; what lies on padding is taken away.
    """
    if from_shape == to_shape:
        return attention
    grid = attention.flatten(0, 2).view(-1, 1, *from_shape)
    pooled = F.adaptive_avg_pool2d(grid, to_shape).view(*attention.shape[:3], -1)
    return normalised(pooled.masked_fill(padding[:, None, None, :], 0.0))


def token_shares(
    sampled: SampledAttention, spatial_shapes: Sequence[tuple[int, int]]
) -> Float[Tensor, "batch heads tokens"]:
    """How much each token is looked at, mean over the queries; differentiable.

    A sample's weight is split among the four cells around it as the operator mixes their values;
    what falls outside of a level is lost, so that a head's shares sum to 1 at the most.
    """
    shares = []
    weights = sampled.weights.float()
    for level, (rows, columns) in enumerate(spatial_shapes):
        at = sampled.locations[:, :, :, level].float()
        weight = weights[:, :, :, level]
        x, y = at[..., 0] * columns - 0.5, at[..., 1] * rows - 0.5
        left, top = x.detach().floor(), y.detach().floor()
        cells = weight.new_zeros((*weight.shape[:1], weight.shape[2], rows * columns))
        for column, of_x in ((left, left + 1 - x), (left + 1, x - left)):
            for row, of_y in ((top, top + 1 - y), (top + 1, y - top)):
                inside = (column >= 0) & (column < columns) & (row >= 0) & (row < rows)
                cell = row.clamp(0, rows - 1) * columns + column.clamp(0, columns - 1)
                part = torch.where(inside, weight * of_x * of_y, 0.0)
                by_head = (each.transpose(1, 2).flatten(2) for each in (cell.long(), part))
                cells = cells.scatter_add(2, *by_head)
        shares.append(cells)
    return torch.cat(shares, dim=2) / weights.shape[1]
