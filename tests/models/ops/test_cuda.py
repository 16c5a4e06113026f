"""Deformable attention on a GPU: against the plain operator, on streams, in graphs, compiled."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
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
from tests.models.ops.emulated import Inputs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

TOLERANCE = {f64: 1e-12, f32: 2e-5, f16: 1.5e-3, bf16: 1e-2}


def on_device(inputs: Inputs, device: str = "cuda") -> list[Tensor]:
    """value, references, points and weights; without references for the classic operator."""
    given = (inputs.value, inputs.references, inputs.points, inputs.weights)
    return [t.to(device).requires_grad_() for t in given if t is not None]


def attention(inputs: Inputs, tensors: list[Tensor]) -> Tensor:
    from models.ops.deformable import deformable_attention, fused_deformable_attention

    value, *others = tensors
    operator = deformable_attention if inputs.references is None else fused_deformable_attention
    return operator(value, inputs.spatial_shapes, *others)


def assert_near(found: Tensor | None, expected: Tensor | None, dtype: torch.dtype) -> None:
    assert found is not None
    assert expected is not None
    error = (found.detach().cpu().to(f64) - expected).norm() / expected.norm().clamp(min=1e-30)
    assert error < TOLERANCE[dtype], f"relative error {error:.1e}"


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def many_queries(types: Types, coordinates: int) -> Inputs:
    """Enough of them to fill many blocks, all upon the same few cells."""
    inputs = inputs_of(types, 32, 4, 4, coordinates)
    times = 701

    def repeated(tensor: Tensor) -> Tensor:
        noise = torch.rand((tensor.shape[0], times, *tensor.shape[2:]), dtype=f64)
        return (noise * 0.8 + tensor[:, :1].nan_to_num(0).to(f64) * 0.1).to(tensor.dtype)

    return replace(
        inputs,
        references=None if inputs.references is None else repeated(inputs.references),
        points=repeated(inputs.points),
        weights=repeated(inputs.weights),
    )


@pytest.mark.parametrize("coordinates", [0, 2, 4])
@pytest.mark.parametrize("case", [*FIXED, *ANY], ids=str)
def test_output_and_gradients_are_those_of_the_plain_operator(
    case: tuple[Types, int, int, int], coordinates: int
) -> None:
    inputs = inputs_of(*case, coordinates)
    if inputs.value.dtype is f64:
        inputs = replace(inputs, points=inputs.points.to(f64))
    grad_output = grad_output_of(inputs)
    tensors = on_device(inputs)
    output = attention(inputs, tensors)
    output.backward(grad_output.cuda())
    precise = [t.detach().cpu().to(f64) for t in tensors]
    references = precise[1] if coordinates else None
    exact = meant(Inputs(precise[0], inputs.spatial_shapes, references, *precise[-2:]))
    assert_near(output, exact, output.dtype)
    expected = meant_gradients(inputs, grad_output)
    for tensor, grad in zip(
        tensors,
        [
            g
            for g in (expected.value, expected.references, expected.points, expected.weights)
            if g is not None
        ],
        strict=True,
    ):
        assert_near(tensor.grad, grad, tensor.dtype)


@pytest.mark.parametrize("types", [(f32,) * 3, (bf16,) * 3, (f16, f32, f32)], ids=str)
@pytest.mark.parametrize("coordinates", [0, 4])
def test_many_queries_equal_the_plain_operator(types: Types, coordinates: int) -> None:
    inputs = many_queries(types, coordinates)
    grad_output = grad_output_of(inputs)
    tensors = on_device(inputs)
    attention(inputs, tensors).backward(grad_output.cuda())
    assert_near(tensors[0].grad, meant_gradients(inputs, grad_output).value, inputs.value.dtype)


@pytest.mark.parametrize("types", [(f32,) * 3, (bf16,) * 3, (f64,) * 3], ids=str)
def test_deterministic_gradients_are_bit_equal_from_run_to_run(types: Types) -> None:
    inputs = many_queries(types, 2)
    grad_output = grad_output_of(inputs).cuda()

    def gradients() -> list[Tensor]:
        tensors = on_device(inputs)
        output = attention(inputs, tensors)
        output.backward(grad_output)
        return [output.detach(), *(t.grad for t in tensors if t.grad is not None)]

    with deterministic():
        first, *others = gradients(), gradients(), gradients()
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    expected = meant_gradients(inputs, grad_output.cpu()).value
    assert_near(first[1], expected, inputs.value.dtype)


def test_work_goes_to_the_current_stream() -> None:
    inputs = many_queries((f32,) * 3, 2)
    tensors = [t.detach() for t in on_device(inputs)]
    expected = attention(inputs, tensors)
    stream = torch.cuda.Stream()
    late = [torch.empty_like(t) for t in tensors]
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # what is on another stream does not wait for this
        for to, tensor in zip(late, tensors, strict=True):
            to.copy_(tensor)
        output = attention(inputs, late)
    stream.synchronize()
    assert torch.equal(output, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_the_device_is_that_of_the_tensors() -> None:
    inputs = many_queries((f32,) * 3, 2)
    first = attention(inputs, [t.detach() for t in on_device(inputs, "cuda:0")])
    second = attention(inputs, [t.detach() for t in on_device(inputs, "cuda:1")])
    assert second.device == torch.device("cuda:1")
    assert torch.equal(first.cpu(), second.cpu())


@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream")
def test_a_cuda_graph_replays_forward_and_backward() -> None:
    inputs = many_queries((bf16,) * 3, 2)
    tensors = on_device(inputs)
    grad_output = grad_output_of(inputs).cuda()

    def step() -> tuple[Tensor, ...]:
        output = attention(inputs, tensors)
        return (output, *torch.autograd.grad(output, tensors, grad_output))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = step()
    with torch.no_grad():
        tensors[0].mul_(2)
    graph.replay()
    torch.cuda.synchronize()
    for found, expected in zip(recorded, step(), strict=True):
        torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)


def test_torch_compile_keeps_it_in_one_graph() -> None:
    """In a process of its own, where no shape checks stand in the tracer's way."""
    done = subprocess.run(
        [sys.executable, "-c", "from tests.models.ops import test_cuda as t; t.compare_compiled()"],
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def compare_compiled() -> None:
    """For 5 and 70 queries the compiled gradients are those of the plain call."""
    inputs = many_queries((f32,) * 3, 4)
    references = inputs.references
    assert references is not None

    def of_first(queries: int) -> Inputs:
        return replace(
            inputs,
            references=references[:, :queries].contiguous(),
            points=inputs.points[:, :queries].contiguous(),
            weights=inputs.weights[:, :queries].contiguous(),
        )

    def loss(given: Inputs, tensors: list[Tensor]) -> Tensor:
        return attention(given, tensors).square().sum()

    compiled = torch.compile(loss, fullgraph=True)
    for given in (of_first(5), of_first(70)):
        tensors = on_device(given)
        found = torch.autograd.grad(compiled(given, tensors), tensors)
        wanted = torch.autograd.grad(loss(given, tensors), tensors)
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other)


def test_no_queries_and_no_tokens_are_answered() -> None:
    inputs = inputs_of((f32,) * 3, 32, 4, 4, 2)
    assert inputs.references is not None
    none = replace(
        inputs,
        references=inputs.references[:, :0],
        points=inputs.points[:, :0],
        weights=inputs.weights[:, :0],
    )
    tensors = on_device(none)
    attention(none, tensors).sum().backward()
    assert tensors[0].grad is not None
    assert tensors[0].grad.eq(0).all()
    empty = replace(inputs, spatial_shapes=((0, 1),) * 4, value=inputs.value[:, :0])
    assert attention(empty, on_device(empty)).eq(0).all()


@pytest.mark.long
def test_more_than_2_to_the_31_numbers_are_reached() -> None:
    """17 images of 65,536 tokens, 8 heads, 256 channels: 2.3e9 numbers, 4.6 GB."""
    value = torch.zeros(17, 65_536, 8, 256, dtype=bf16, device="cuda")
    value[-1, -1, -1] = 1.0
    shapes = ((256, 256),)
    points = torch.zeros(17, 1, 8, 1, 1, 2, device="cuda")
    points[..., :] = 255.5 / 256
    weights = torch.ones(17, 1, 8, 1, 1, device="cuda", dtype=bf16)
    output = attention(Inputs(value, shapes, None, points, weights), [value, points, weights])
    assert output[-1, -1, -256:].eq(1).all()
    assert output[:-1].eq(0).all()
