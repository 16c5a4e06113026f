"""The compiled operator is the plain one, forward and backward, whatever the sizes and dtypes."""

import random
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from models.ops import reference
from models.ops.deformable import deformable_attention, fused_deformable_attention
from models.ops.library import Library, load_library
from tests.models.ops.cases import Attention, Sizes, grad_of, inputs, relative, run

pytestmark = pytest.mark.skipif(
    not isinstance(load_library(), Library), reason="the operator library is not built"
)

ASKED = {
    "classic": Sizes(),
    "points": Sizes(coordinates=2, levels=4, heads=2),
    "boxes": Sizes(coordinates=4, points=3, channels=5, levels=2),
    "32 channels": Sizes(heads=2, channels=32, levels=2),
    "64 channels": Sizes(batch=1, coordinates=2, channels=64, levels=2),
    "one of each": Sizes(batch=1, heads=1, channels=1, levels=1, points=1, queries=1),
    "more samples than tokens": Sizes(queries=301, heads=1, levels=2, coordinates=4),
}
EMPTY = {
    "no levels": Sizes(levels=0, batch=1),
    "no queries": Sizes(queries=0, coordinates=2),
    "no points": Sizes(points=0),
    "no points around boxes": Sizes(points=0, coordinates=4),
    "no heads": Sizes(heads=0, coordinates=2),
    "no channels": Sizes(channels=0),
    "no pictures": Sizes(batch=0, coordinates=2),
}


def ours_and_plain(sizes: Sizes) -> tuple[Attention, Attention]:
    if sizes.coordinates:
        return fused_deformable_attention, reference.fused_deformable_attention
    return deformable_attention, reference.deformable_attention


def drawn_sizes(seed: int) -> Sizes:
    draw = random.Random(seed)
    return Sizes(
        batch=draw.randint(1, 3),
        heads=draw.randint(1, 7),
        channels=draw.choice((1, 4, 8, 16, 24, 30, 32, 64, 71)),
        levels=draw.randint(1, 5),
        points=draw.randint(1, 8),
        queries=draw.choice((1, 3, 17, 70)),
        coordinates=draw.choice((0, 2, 4)),
    )


@pytest.mark.parametrize(
    "sizes", [*ASKED.values(), *map(drawn_sizes, range(24))], ids=[*ASKED, *map(str, range(24))]
)
def test_outputs_and_gradients_are_those_of_the_plain_operator(sizes: Sizes) -> None:
    ours, plain = ours_and_plain(sizes)
    given = inputs(sizes)
    for found, wanted in zip(run(ours, sizes, given), run(plain, sizes, given), strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("sizes", EMPTY.values(), ids=EMPTY)
def test_where_nothing_is_sampled_outputs_and_gradients_are_zeros(sizes: Sizes) -> None:
    ours, _ = ours_and_plain(sizes)
    given = inputs(sizes)
    out, *gradients = run(ours, sizes, given)
    assert out.shape == (sizes.batch, sizes.queries, sizes.heads * sizes.channels)
    assert not out.any()
    for gradient, tensor in zip(gradients, given, strict=True):
        assert torch.equal(gradient, torch.zeros_like(tensor))


@pytest.mark.parametrize("name", ["classic", "points", "boxes", "32 channels", "64 channels"])
@pytest.mark.parametrize(
    ("dtype", "output", "gradients"),
    [
        (torch.float32, 5e-6, 2e-5),
        (torch.bfloat16, 3e-3, 5e-3),
        (torch.float16, 4e-4, 6e-4),
    ],
    ids=str,
)
def test_rounding_stays_that_of_the_results_dtype(
    name: str, dtype: torch.dtype, output: float, gradients: float
) -> None:
    """Against the plain operator in float64 on the same rounded inputs: nothing is added up in
    half precision, so that only results are rounded."""
    sizes = ASKED[name]
    ours, plain = ours_and_plain(sizes)
    given = inputs(sizes, dtype=dtype)
    grad = grad_of(torch.empty(sizes.batch, sizes.queries, sizes.heads * sizes.channels)).to(dtype)
    exact = run(plain, sizes, [tensor.double() for tensor in given], grad.double())
    found = run(ours, sizes, given, grad)
    assert [tensor.dtype for tensor in found] == [dtype, *(tensor.dtype for tensor in given)]
    assert relative(found[0], exact[0]) <= output
    for ours_, exact_ in zip(found[1:], exact[1:], strict=True):
        assert relative(ours_, exact_) <= gradients


@pytest.mark.parametrize("sizes", [ASKED["classic"], ASKED["points"], ASKED["boxes"]], ids=str)
def test_wide_offsets_and_weights_beside_a_narrow_value_keep_their_precision(sizes: Sizes) -> None:
    ours, plain = ours_and_plain(sizes)
    value, *others = inputs(sizes, dtype=torch.float32)
    given = [value.bfloat16(), *others]
    exact = run(plain, sizes, [tensor.double() for tensor in given])
    found = run(ours, sizes, given)
    assert [tensor.dtype for tensor in found[2:]] == [torch.float32] * len(others)
    assert relative(found[0], exact[0]) <= 3e-3


@pytest.mark.parametrize("coordinates", [0, 2, 4])
@pytest.mark.parametrize("channels", [3, 8])
def test_gradients_pass_gradcheck_in_float64(coordinates: int, channels: int) -> None:
    sizes = Sizes(batch=1, heads=2, levels=2, queries=2, points=3, channels=channels)
    sizes = replace(sizes, coordinates=coordinates)
    ours, _ = ours_and_plain(sizes)
    given = [tensor.requires_grad_() for tensor in inputs(sizes, seed=3)]
    assert torch.autograd.gradcheck(
        lambda value, *others: ours(value, sizes.shapes, *others), given, eps=1e-7, atol=1e-5
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("queries", [3, 401])
def test_the_gradient_of_the_value_is_the_adjoint_of_the_forward(
    dtype: torch.dtype, queries: int
) -> None:
    """<forward(v), g> = <v, backward(g)>: no addition is lost, none goes to another image."""
    sizes = Sizes(batch=3, heads=2, channels=16, levels=2, queries=queries)
    given = inputs(sizes, dtype=dtype)
    out, of_value, *_ = run(deformable_attention, sizes, given)
    left = (out.double() * grad_of(out).double()).sum()
    right = (given[0].double() * of_value.double()).sum()
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    assert abs(float(left - right)) <= tolerance * float(out.double().norm() * queries**0.5 * 10)


@pytest.mark.parametrize("name", ["classic", "points", "boxes", "32 channels"])
@pytest.mark.parametrize("queries", [5, 301])
def test_results_are_the_same_bits_for_any_number_of_threads(name: str, queries: int) -> None:
    sizes = replace(ASKED[name], queries=queries)
    ours, _ = ours_and_plain(sizes)
    given = inputs(sizes, dtype=torch.float32)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 1, 2, 4):
            torch.set_num_threads(threads)
            found.append(run(ours, sizes, given))
    finally:
        torch.set_num_threads(before)
    for others in found[1:]:
        assert all(map(torch.equal, found[0], others))


def test_a_picture_gets_the_same_bits_alone_and_in_a_batch_of_65() -> None:
    sizes = Sizes(batch=65, heads=2, levels=2, coordinates=2, queries=3)
    given = inputs(sizes, dtype=torch.float32)
    together = run(fused_deformable_attention, sizes, given)
    grad = grad_of(together[0])
    for image in (0, 1, 64):
        part = slice(image, image + 1)
        alone = run(
            fused_deformable_attention,
            replace(sizes, batch=1),
            [tensor[part] for tensor in given],
            grad[part],
        )
        assert all(torch.equal(one, many[part]) for one, many in zip(alone, together, strict=True))


def test_permuted_queries_give_permuted_outputs() -> None:
    sizes = Sizes(queries=9)
    value, locations, weights = inputs(sizes, dtype=torch.float32)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    straight = deformable_attention(value, sizes.shapes, locations, weights)
    mixed = deformable_attention(value, sizes.shapes, locations[:, order], weights[:, order])
    assert torch.equal(mixed, straight[:, order])


def test_tensors_may_lie_in_memory_as_they_like() -> None:
    sizes = Sizes()
    given = inputs(sizes, dtype=torch.float32)
    strided = [_backwards(tensor) for tensor in given]
    assert not any(tensor.is_contiguous() for tensor in strided)
    straight, crooked = (run(deformable_attention, sizes, which) for which in (given, strided))
    assert all(map(torch.equal, straight, crooked))


def _backwards(tensor: Tensor) -> Tensor:
    """The same numbers with the axes of memory in reverse order."""
    axes = tuple(reversed(range(tensor.dim())))
    return tensor.permute(axes).contiguous().permute(axes)


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf, 1e30])
def test_a_location_that_is_no_place_samples_nothing(wrong: float) -> None:
    sizes = Sizes()
    value, locations, weights = inputs(sizes, dtype=torch.float32)
    locations[0, 1, 2, 0, 3, 1] = wrong
    out, of_value, of_locations, of_weights = run(
        deformable_attention, sizes, [value, locations, weights]
    )
    without = weights.clone()
    without[0, 1, 2, 0, 3] = 0
    expected = run(deformable_attention, sizes, [value, locations, without])
    torch.testing.assert_close(out, expected[0])
    torch.testing.assert_close(of_value, expected[1])
    assert of_locations[0, 1, 2, 0, 3].tolist() == [0, 0]
    assert of_weights[0, 1, 2, 0, 3] == 0


def test_values_that_are_not_numbers_reach_only_who_samples_them() -> None:
    """Corners outside of a level count as zeros, whatever lies at its edge."""
    value = torch.full((1, 6, 1, 8), torch.nan)
    value[0, 4] = 1.0  # the cell in row 1, column 1 of 2 x 3
    where = torch.tensor([[1.5 / 3, 1.5 / 2], [-0.5, 0.5], [1.4, 1.9]]).view(1, 3, 1, 1, 1, 2)
    out = deformable_attention(value, ((2, 3),), where, torch.ones(1, 3, 1, 1, 1))
    assert out[0, 1].tolist() == [0] * 8
    assert out[0, 2].tolist() == [0] * 8


def test_minus_infinity_among_logits_takes_no_share() -> None:
    sizes = Sizes(coordinates=2)
    value, references, offsets, logits = inputs(sizes, dtype=torch.float32)
    logits[..., 0] = -torch.inf
    ours = fused_deformable_attention(value, sizes.shapes, references, offsets, logits)
    plain = reference.fused_deformable_attention(value, sizes.shapes, references, offsets, logits)
    torch.testing.assert_close(ours, plain)
    logits[0, 0] = torch.nan
    ours = fused_deformable_attention(value, sizes.shapes, references, offsets, logits)
    assert ours[0, 0].isnan().all()
    assert not ours[0, 1:].isnan().any()


def test_half_precision_is_read_and_rounded_as_torch_does() -> None:
    """Every number of 16 bits through the value, and a float32 sum rounded to it."""
    for dtype in (torch.bfloat16, torch.float16):
        every = torch.arange(2**16).to(torch.uint16).view(dtype)
        value = every.view(1, 1, 1, -1)
        centre = torch.full((1, 1, 1, 1, 1, 2), 0.5)
        for weight in (1.0, 0.3333):
            share = torch.full((1, 1, 1, 1, 1), weight)
            out = deformable_attention(value, ((1, 1),), centre, share).flatten()
            wanted = (every.float() * share.flatten()).to(dtype)
            torch.testing.assert_close(out, wanted, rtol=0, atol=0, equal_nan=True)
