"""The CUDA kernels, run lane by lane on the processor, against the plain operator in float64."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.models.ops.cuda_cases import (
    ANY,
    FIXED,
    Types,
    bf16,
    f16,
    f32,
    f64,
    grad_output_of,
    inputs_of,
    meant,
    meant_gradients,
)
from tests.models.ops.emulated import Emulated, EmulatedError, compiler_is_there, without_memory

pytestmark = pytest.mark.skipif(not compiler_is_there(), reason="needs g++")

TOLERANCE = {f64: 1e-12, f32: 2e-5, f16: 1.5e-3, bf16: 1e-2}


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
