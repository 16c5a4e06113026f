"""Deformable attention of DAT: where its points lie, what they read, and its biases."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models import dat_attention
from models.dat_attention import DatAttention, DeformableKind, ReferenceGrid


def kind(**changes: object) -> DeformableKind:
    plain = {"channels": 8, "heads": 4, "groups": 2, "kernel": 3, "stride": 1}
    return DeformableKind(**plain | {"offset_range": 2.0, "table_side": 7} | changes)  # type: ignore[arg-type]


def attention(grid: ReferenceGrid = "published", **changes: object) -> DatAttention:
    """Random weights, offsets among them that do something."""
    torch.manual_seed(0)
    part = DatAttention(kind(**changes), grid)
    with torch.no_grad():
        part.bias_table.normal_()
        part.offsets.offset.weight.normal_()
    return part


def unmoved(part: DatAttention) -> DatAttention:
    with torch.no_grad():
        part.offsets.offset.weight.zero_()
    return part


def features(rows: int, columns: int, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(batch, rows, columns, 8, generator=generator)


def cells(points: Tensor, length: int) -> Tensor:
    """From [-1, 1] to cells of an axis."""
    return (points.detach() + 1) / 2 * (length - 1)


def test_published_points_that_do_not_move_are_read_up_to_half_a_cell_beside_their_own() -> None:
    """Acceptance check 9.9: of 14 cells, at 0.464 to 12.536."""
    points = unmoved(attention()).points(features(14, 14))
    across = cells(points.moved[0, 0, 0, :, 1], 14)
    assert float(across[0]) == pytest.approx(0.464, abs=1e-3)
    assert float(across[-1]) == pytest.approx(12.536, abs=1e-3)


def test_published_points_of_the_second_version_lie_half_a_cell_on_and_within_the_map() -> None:
    """DAT++: 0.5 to 13.5, of which the last is held back."""
    points = unmoved(attention(offset_range=None)).points(features(14, 14))
    across = cells(points.reference[0, :, 1], 14)
    assert across.tolist() == pytest.approx([n + 0.5 for n in range(14)], abs=1e-5)
    assert float(cells(points.moved, 14).max()) == pytest.approx(13)


@pytest.mark.parametrize("offset_range", [2.0, None])
def test_aligned_points_that_do_not_move_read_their_own_cells(offset_range: float | None) -> None:
    part = unmoved(attention("aligned", offset_range=offset_range))
    given = features(5, 9)
    read = dat_attention._read(given, part.points(given).moved)
    assert torch.allclose(read, given.flatten(1, 2), atol=1e-5)


def test_aligned_points_of_a_stride_lie_in_the_middle_of_their_part_of_the_map() -> None:
    part = attention("aligned", offset_range=None, stride=4, kernel=5)
    reference = part.points(features(8, 12)).reference
    assert cells(reference[:, 0, 0], 8).tolist() == pytest.approx([1.5, 5.5], abs=1e-5)
    assert cells(reference[0, :, 1], 12).tolist() == pytest.approx([1.5, 5.5, 9.5], abs=1e-5)


def test_the_bias_of_whole_displacements_is_an_entry_of_the_table() -> None:
    """Acceptance check 9.9, where map and table are of one size: 4 cells, 7 entries."""
    part = unmoved(attention("aligned"))
    points = part.points(features(4, 4)).moved
    placed = part._query_grid((4, 4), points.device)
    bias = part._bias(placed, points.flatten(2, 3)).unflatten(2, (4, 4)).unflatten(4, (4, 4))
    for query, key in (((0, 0), (0, 0)), ((3, 1), (0, 2)), ((1, 0), (3, 3))):
        entry = part.bias_table[:, 3 + query[0] - key[0], 3 + query[1] - key[1]]
        assert torch.allclose(bias[0, :, query[0], query[1], key[0], key[1]], entry, atol=1e-5)


def test_no_point_of_the_first_version_moves_beyond_its_range() -> None:
    """CVPR 2022, section 3.2: s * tanh, here 2 of the units of 2 / cells along an axis."""
    part = attention()
    with torch.no_grad():
        part.offsets.offset.weight.mul_(100)
    points = part.points(features(6, 10))
    moved = (points.moved - points.reference).abs().amax((0, 1, 2, 3))
    assert moved.tolist() == pytest.approx([2 / 6, 2 / 10], rel=1e-2)


def test_attention_is_the_papers_formula_written_out() -> None:
    """CVPR 2022, equations 5 to 9: keys and values of deformed points, one softmax over them."""
    part, given = attention(), features(3, 5)
    points = part.points(given).moved
    looked = []
    for group in range(2):
        own = given[..., 4 * group : 4 * group + 4].permute(0, 3, 1, 2)
        looked.append(F.grid_sample(own, points[:, group].flip(-1), align_corners=True))
    read = torch.cat(looked, 1).flatten(2).mT
    queries = part.query(given).flatten(1, 2)
    keys, values = part.key(read), part.value(read)
    placed = part._query_grid((3, 5), points.device)
    wanted = torch.zeros_like(queries)
    for head in range(4):
        own = slice(2 * head, 2 * head + 2)
        away = (placed[None, :, None] - points[:, head // 2].flatten(1, 2)[:, None]) / 2
        table = part.bias_table[head].expand(2, 1, -1, -1)
        bias = F.grid_sample(table, away.flip(-1), align_corners=True)[:, 0]
        logits = queries[..., own] @ keys[..., own].mT / math.sqrt(2) + bias
        wanted[..., own] = logits.softmax(-1) @ values[..., own]
    assert torch.allclose(part(given).flatten(1, 2), part.projection(wanted), atol=1e-5)


def test_biases_of_some_queries_at_a_time_give_the_same_maps_and_gradients(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    part, given = attention(), features(5, 6)
    found = []
    for at_once in (2**24, 2 * 4 * 30 * 7):
        monkeypatch.setattr(dat_attention, "BIAS_VALUES", at_once)
        part.zero_grad()
        said = part(given)
        said.square().sum().backward()
        grads = [parameter.grad for parameter in part.parameters()]
        with torch.no_grad():
            assert torch.allclose(part(given), said, atol=1e-6)
        found.append([said.detach(), *(grad.clone() for grad in grads if grad is not None)])
    assert len(found[0]) == 1 + len(list(part.parameters()))
    for whole, parts in zip(*found, strict=True):
        assert torch.allclose(whole, parts, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("offset_range", [2.0, None])
@pytest.mark.parametrize("grid", ["published", "aligned"])
def test_maps_of_one_cell_go_too(grid: ReferenceGrid, offset_range: float | None) -> None:
    part = attention(grid, offset_range=offset_range, stride=2)
    assert part(features(1, 3)).shape == (2, 1, 3, 8)
    assert part(features(1, 1)).isfinite().all()


def test_the_attention_that_is_handed_out_is_the_one_that_looks() -> None:
    part, given = attention(), features(3, 4)
    handed = part.attention(given, torch.tensor([2 * 4 + 1, 3]))
    assert handed.shape == (2, 4, 2, 12)
    read = dat_attention._read(given, part.points(given).moved)
    values = part.value(read).unflatten(2, (4, 2)).transpose(1, 2)
    looked = part.projection((handed @ values).transpose(1, 2).flatten(2))
    assert torch.allclose(looked[:, 0], part(given)[:, 2, 1], atol=1e-5)
    assert torch.allclose(looked[:, 1], part(given)[:, 0, 3], atol=1e-5)
