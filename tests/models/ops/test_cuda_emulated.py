"""The CUDA kernels, run lane by lane on the processor, against the plain operator in float64."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from models.ops.reference import deformable_attention, fused_deformable_attention
from tests.models.ops.emulated import (
    Emulated,
    EmulatedError,
    Gradients,
    Inputs,
    build,
    compiler_is_there,
    without_memory,
)

pytestmark = pytest.mark.skipif(not compiler_is_there(), reason="needs g++")

f32, bf16, f16, f64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
NAMES = {f32: "f32", bf16: "bf16", f16: "f16", f64: "f64"}
Types = tuple[torch.dtype, torch.dtype, torch.dtype]

FIXED: tuple[tuple[Types, int, int, int], ...] = (
    ((f32, f32, f32), 32, 4, 4),  # 8 lanes of 2 samples
    ((bf16, bf16, bf16), 32, 4, 4),  # 4 lanes, each with a level
    ((bf16, f32, bf16), 64, 4, 4),
    ((f16, f16, f16), 16, 2, 3),  # 2 lanes of 3 samples
    ((f16, f32, f32), 8, 3, 2),  # one lane with three levels
    ((f32, f32, f32), 16, 3, 3),  # 4 lanes of 3 samples: the last lane has none
    ((f32, f32, f32), 16, 5, 2),  # 4 lanes of 3 samples: the last one is not full
    ((f32, f32, f32), 128, 2, 2),  # 32 lanes for 4 samples
    ((f32, f32, f32), 4, 2, 1),  # one lane
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
TOLERANCE = {f64: 1e-12, f32: 2e-5, f16: 1.5e-3, bf16: 1e-2}


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Emulated:
    fixed = {
        f"QUERYPATCH_FIXED({','.join(NAMES[t] for t in types)},{','.join(map(str, sizes))})"
        for (value, point, weight), *sizes in FIXED
        for types in ((value, point, weight), (value, f32, weight))  # locations are float32
    }
    for_any = {f"QUERYPATCH_ANY({name})" for name in NAMES.values()}
    return build(tmp_path_factory.mktemp("emulated"), " ".join(sorted(fixed | for_any)))


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


def assert_near(found: Tensor | None, expected: Tensor | None, dtype: torch.dtype) -> None:
    if expected is None:
        assert found is None
        return
    assert found is not None
    error = (found.to(f64) - expected).norm() / expected.norm().clamp(min=1e-30)
    assert error < TOLERANCE[dtype], f"relative error {error:.1e}"


@pytest.mark.parametrize("coordinates", [0, 2, 4])
@pytest.mark.parametrize("case", [*FIXED, *ANY], ids=str)
def test_the_kernels_sample_what_the_plain_operator_samples(
    emulated: Emulated, case: tuple[Types, int, int, int], coordinates: int
) -> None:
    inputs = inputs_of(*case, coordinates)
    precise = replace(
        inputs,
        value=inputs.value.to(f64),
        references=None if inputs.references is None else inputs.references.to(f64),
        points=inputs.points.to(f64),
        weights=inputs.weights.to(f64),
    )
    output = emulated.forward(inputs)
    assert output.dtype == inputs.value.dtype
    assert_near(output, meant(precise), output.dtype)


@pytest.mark.parametrize("coordinates", [0, 2, 4])
@pytest.mark.parametrize("case", [*FIXED, *ANY], ids=str)
def test_every_gradient_is_that_of_the_plain_operator(
    emulated: Emulated, case: tuple[Types, int, int, int], coordinates: int
) -> None:
    inputs = inputs_of(*case, coordinates)
    grad_output = grad_output_of(inputs)
    expected = meant_gradients(inputs, grad_output)
    found = emulated.backward(inputs, grad_output)
    assert_near(found.value, expected.value, inputs.value.dtype)
    assert_near(found.references, expected.references, f32)
    assert_near(found.points, expected.points, inputs.points.dtype)
    assert_near(found.weights, expected.weights, inputs.weights.dtype)


@pytest.mark.parametrize("coordinates", [0, 4])
@pytest.mark.parametrize("types", [(f32,) * 3, (bf16,) * 3, (f64,) * 3], ids=str)
def test_whole_numbers_add_up_to_the_same_gradient_in_any_order(
    emulated: Emulated, types: Types, coordinates: int
) -> None:
    inputs = inputs_of(types, 32, 4, 4, coordinates)
    grad_output = grad_output_of(inputs)
    first = emulated.backward(inputs, grad_output, deterministic=True)
    emulated.device.emulation_run_backwards(1)
    second = emulated.backward(inputs, grad_output, deterministic=True)
    emulated.device.emulation_run_backwards(0)
    assert first.value is not None
    assert second.value is not None
    assert torch.equal(first.value, second.value)
    expected = meant_gradients(inputs, grad_output).value
    assert_near(first.value, expected, inputs.value.dtype)


def test_the_emulated_device_can_add_in_another_order(emulated: Emulated) -> None:
    inputs = inputs_of((f32, f32, f32), 32, 4, 4, 2)
    grad_output = grad_output_of(inputs)
    first = emulated.backward(inputs, grad_output).value
    emulated.device.emulation_run_backwards(1)
    second = emulated.backward(inputs, grad_output).value
    emulated.device.emulation_run_backwards(0)
    assert first is not None
    assert second is not None
    assert not torch.equal(first, second)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_gradient_that_is_not_finite_stays_so_in_whole_numbers(
    emulated: Emulated, bad: float
) -> None:
    inputs = inputs_of((f32, f32, f32), 5, 3, 2, 2)
    grad_output = grad_output_of(inputs)
    grad_output[1, 2, 3] = bad
    found = emulated.backward(inputs, grad_output, deterministic=True).value
    assert found is not None
    assert found[0].isfinite().all()
    assert found[1].isnan().all()


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_whole_numbers_follow_the_size_of_the_gradient(emulated: Emulated, scale: float) -> None:
    inputs = inputs_of((f32, f32, f32), 5, 3, 2, 2)
    grad_output = grad_output_of(inputs) * scale
    found = emulated.backward(inputs, grad_output, deterministic=True).value
    assert_near(found, meant_gradients(inputs, grad_output).value, f32)


@pytest.mark.parametrize("case", [FIXED[1], ANY[2]], ids=str)
def test_gradients_that_nobody_needs_are_not_computed(
    emulated: Emulated, case: tuple[Types, int, int, int]
) -> None:
    inputs = inputs_of(*case, 4)
    grad_output = grad_output_of(inputs)
    whole = emulated.backward(inputs, grad_output)
    for number, name in enumerate(("value", "references", "points", "weights")):
        needed = [i == number for i in range(4)]
        found = emulated.backward(inputs, grad_output, needed)
        kept = {n: getattr(found, n) for n in ("value", "references", "points", "weights")}
        alone = kept.pop(name)
        assert alone is not None
        torch.testing.assert_close(alone, getattr(whole, name))
        assert set(kept.values()) == {None}


@pytest.mark.parametrize("case", [FIXED[0], ANY[0]], ids=str)
def test_levels_without_cells_are_not_sampled(
    emulated: Emulated, case: tuple[Types, int, int, int]
) -> None:
    inputs = inputs_of(*case, 2)
    shapes = ((0, 7), *inputs.spatial_shapes[1:-1], (3, 0))
    tokens = sum(rows * columns for rows, columns in shapes)
    inputs = replace(inputs, spatial_shapes=shapes, value=inputs.value[:, :tokens].contiguous())
    assert_near(emulated.forward(inputs), meant(inputs).to(f64), f32)
    grad_output = grad_output_of(inputs)
    expected = meant_gradients(inputs, grad_output)
    found = emulated.backward(inputs, grad_output)
    assert_near(found.value, expected.value, f32)
    assert_near(found.points, expected.points, f32)


def test_where_there_is_nothing_to_sample_the_output_and_gradients_are_zero(
    emulated: Emulated,
) -> None:
    inputs = inputs_of((f32, f32, f32), 5, 3, 2, 2)
    empty = replace(inputs, spatial_shapes=((0, 1),) * 3, value=inputs.value[:, :0].contiguous())
    assert emulated.forward(empty).eq(0).all()
    found = emulated.backward(empty, grad_output_of(empty))
    for gradient in (found.references, found.points, found.weights):
        assert gradient is not None
        assert gradient.eq(0).all()


def test_no_queries_launch_nothing(emulated: Emulated) -> None:
    inputs = inputs_of((f32, f32, f32), 5, 3, 2, 2)
    assert inputs.references is not None
    none = replace(
        inputs,
        references=inputs.references[:, :0].contiguous(),
        points=inputs.points[:, :0].contiguous(),
        weights=inputs.weights[:, :0].contiguous(),
    )
    before = emulated.device.emulation_launches()
    assert emulated.forward(none).shape == (2, 0, 15)
    found = emulated.backward(none, grad_output_of(none)).value
    assert emulated.device.emulation_launches() == before
    assert found is not None
    assert found.eq(0).all()


def test_an_image_does_not_depend_on_its_batch(emulated: Emulated) -> None:
    inputs = inputs_of((f32, f32, f32), 32, 4, 4, 2)
    assert inputs.references is not None
    alone = replace(
        inputs,
        value=inputs.value[1:],
        references=inputs.references[1:],
        points=inputs.points[1:],
        weights=inputs.weights[1:],
    )
    assert torch.equal(emulated.forward(inputs)[1:], emulated.forward(alone))


@pytest.fixture
def fresh(emulated: Emulated, tmp_path: Path) -> Emulated:
    """A device that was never asked for a kernel."""
    return without_memory(emulated, tmp_path)


def test_the_compiler_is_asked_once_for_the_very_numbers(fresh: Emulated) -> None:
    asked = []

    def answer(kernels: bytes, architecture: int) -> bytes:
        asked.append((kernels.decode(), architecture))
        return kernels

    fresh.answer = answer
    inputs = inputs_of((f32, f32, f32), 4, 2, 1, 2)
    output = fresh.forward(inputs)
    fresh.forward(inputs)
    fresh.backward(inputs, grad_output_of(inputs), needed=(True, False, True, True))
    assert asked == [("QUERYPATCH_FIXED(f32,f32,f32,4,2,1)", 90)]
    fresh.forward(inputs, device=1)
    assert len(asked) == 2
    assert_near(output, meant(inputs).to(f64), f32)


def test_kernels_for_any_shape_serve_where_the_fixed_ones_cannot_be_compiled(
    fresh: Emulated,
) -> None:
    fresh.answer = lambda kernels, _: b"code" if b"ANY" in kernels else "no NVRTC here"
    inputs = inputs_of((f32, f32, f32), 4, 2, 1, 2)
    assert_near(fresh.forward(inputs), meant(inputs).to(f64), f32)


def test_what_cannot_run_is_said_in_one_line(fresh: Emulated) -> None:
    inputs = inputs_of((f32, f32, f32), 5, 2, 1, 2)
    fresh.answer = lambda _kernels, _architecture: "libnvrtc.so.13 is not there"
    with pytest.raises(EmulatedError, match=r"^no CUDA kernel forward_f32 .*libnvrtc"):
        fresh.forward(inputs)
    fresh.answer = lambda _kernels, _architecture: b""
    with pytest.raises(EmulatedError, match="the compiler gave no answer"):
        fresh.forward(inputs)
    with pytest.raises(EmulatedError, match=r"find cuda:7: invalid device ordinal \(101\)"):
        fresh.forward(inputs, device=7)
    many = inputs_of((f32, f32, f32), 5, 1, 1, 0)
    levels = 65
    many = replace(
        many,
        spatial_shapes=((1, 1),) * levels,
        value=many.value[:, :1].expand(-1, levels, -1, -1).contiguous(),
        points=many.points.expand(-1, -1, -1, levels, -1, -1).contiguous(),
        weights=many.weights.expand(-1, -1, -1, levels, -1).contiguous(),
    )
    with pytest.raises(EmulatedError, match="levels = 65, but the CUDA kernels take at most 64"):
        fresh.forward(many)
