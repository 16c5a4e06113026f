"""The CUDA kernels run by the processor: built with g++, called as the library would call them.

`emulation/device.h` says how a warp is imitated. The whole way from a checked call to the kernels
is the library's own, down to what it asks of libcuda.so.1, which is `emulation/driver.cpp`.
"""

import ctypes
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

SOURCES = Path(__file__).parents[3] / "models" / "ops" / "csrc"
EMULATION = Path(__file__).parent / "emulation"
TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""In the order of `Number` in problem.h."""
GUARD = 256
"""Bytes before and after each tensor that no kernel may write."""
_GUARD_BYTE = 0x5A

Compiler = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_int32)


class Level(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("rows", "columns", "start")]


class Problem(ctypes.Structure):
    """As in problem.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "tokens", "heads", "channels")),
        *((name, ctypes.c_int64) for name in ("queries", "points", "levels")),
        ("level", ctypes.POINTER(Level)),
        ("coordinates", ctypes.c_int32),
        *((name, ctypes.c_int32) for name in ("value_type", "point_type", "weight_type")),
        ("deterministic", ctypes.c_bool),
    ]


class ForwardTensors(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_void_p) for name in ("value", "references", "points", "weights", "output")
    ]


class BackwardTensors(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("grad_output", "value", "references")),
        *((name, ctypes.c_void_p) for name in ("points", "weights")),
        *((name, ctypes.c_void_p) for name in ("grad_value", "grad_references")),
        *((name, ctypes.c_void_p) for name in ("grad_points", "grad_weights", "workspace")),
    ]


@dataclass(frozen=True)
class Inputs:
    """Of one call; `references` is None for the classic operator."""

    value: Tensor
    spatial_shapes: tuple[tuple[int, int], ...]
    references: Tensor | None
    points: Tensor
    weights: Tensor


@dataclass(frozen=True)
class Gradients:
    value: Tensor | None
    references: Tensor | None
    points: Tensor | None
    weights: Tensor | None


class EmulatedError(RuntimeError):
    """What the CUDA side says went wrong."""


@dataclass
class Emulated:
    """The CUDA side, with a device that is not one."""

    folder: Path
    calls: ctypes.CDLL
    device: ctypes.CDLL
    answer: Callable[[bytes, int], bytes | str]
    """Stands for NVRTC: machine code, or why there is none."""
    compiler: object = None
    """Python's half of the callback; kept, for the library calls it."""

    def lend_compiler(self) -> None:
        def compile_for(kernels: bytes, architecture: int) -> None:
            given = self.answer(kernels, architecture)
            if isinstance(given, bytes):
                self.calls.querypatch_cuda_accept(given, ctypes.c_uint64(len(given)))
            else:
                self.calls.querypatch_cuda_refuse(given.encode())

        self.compiler = Compiler(compile_for)
        self.calls.querypatch_cuda_set_compiler(self.compiler)

    def forward(self, inputs: Inputs, device: int = 0) -> Tensor:
        memory = _Memory(self.device)
        batch, _, heads, channels = inputs.value.shape
        shape = (batch, inputs.points.shape[1], heads * channels)
        output = memory.new(shape, inputs.value.dtype)
        tensors = ForwardTensors(*memory.of(inputs), output.data_ptr())
        problem = _problem(inputs, deterministic=False)
        _check(self.calls.emulated_forward(ctypes.byref(problem), ctypes.byref(tensors), device))
        memory.check()
        return output

    def backward(
        self,
        inputs: Inputs,
        grad_output: Tensor,
        needed: Sequence[bool] = (True, True, True, True),
        deterministic: bool = False,
        device: int = 0,
    ) -> Gradients:
        memory = _Memory(self.device)
        given = (inputs.value, inputs.references, inputs.points, inputs.weights)
        grads = [
            memory.new(tensor.shape, tensor.dtype) if wanted and tensor is not None else None
            for wanted, tensor in zip(needed, given, strict=True)
        ]
        tensors = BackwardTensors(
            memory.copy(grad_output), *memory.of(inputs), *(_pointer(grad) for grad in grads), None
        )
        problem = _problem(inputs, deterministic)
        both = ctypes.byref(problem), ctypes.byref(tensors)
        size = self.calls.emulated_workspace(*both)
        tensors.workspace = memory.new((max(size, 1),), torch.uint8).data_ptr()
        _check(self.calls.emulated_backward(*both, device))
        memory.check()
        return Gradients(*grads)


def build(folder: Path, kernels: str) -> Emulated:
    """`kernels` as in the end of cuda_kernels.cu, e.g. `QUERYPATCH_ANY(f32)`."""
    device, calls = folder / "libcuda_emulated.so", folder / "libcalls.so"
    (folder / "kernels.h").write_text(f"#define QUERYPATCH_ONLY {kernels}\n", encoding="utf-8")
    common = ["g++", "-std=c++17", "-O1", "-fPIC", "-shared", f"-I{SOURCES}", "-w"]
    sources = EMULATION / "calls.cpp", SOURCES / "cuda_driver.cpp", SOURCES / "cuda_launch.cpp"
    building = [
        subprocess.Popen([*common, *arguments, "-ldl"])
        for arguments in (
            ["-include", folder / "kernels.h", EMULATION / "driver.cpp", "-o", device],
            [f'-DQUERYPATCH_LIBCUDA="{device}"', *sources, "-o", calls],
        )
    ]
    assert [process.wait() for process in building] == [0, 0]
    return load(folder, calls)


def load(folder: Path, calls: Path) -> Emulated:
    loaded = ctypes.CDLL(str(calls))
    loaded.emulated_forward.restype = loaded.emulated_backward.restype = ctypes.c_char_p
    loaded.emulated_workspace.restype = ctypes.c_int64
    device = ctypes.CDLL(str(folder / "libcuda_emulated.so"))
    emulated = Emulated(folder, loaded, device, lambda kernels, _: kernels)
    emulated.lend_compiler()
    return emulated


def without_memory(emulated: Emulated, folder: Path) -> Emulated:
    """The same as it was before its first call: a copy of the library knows no kernel yet."""
    copy = folder / "libcalls.so"
    shutil.copy(emulated.folder / "libcalls.so", copy)
    return load(emulated.folder, copy)


def program() -> str:
    """The CUDA program as the library carries it: one text."""
    seen: set[str] = set()

    def with_headers(name: str) -> str:
        lines = (SOURCES / name).read_text(encoding="utf-8").splitlines()
        return "\n".join(part for line in lines if (part := replaced(line)) is not None)

    def replaced(line: str) -> str | None:
        header = re.match(r'#include "(cuda_\w+\.cuh)"', line)
        if header is None or header[1] in seen:
            return line if header is None else None
        seen.add(header[1])
        return with_headers(header[1])

    return with_headers("cuda_kernels.cu").replace("#pragma once", "")


def compiler_is_there() -> bool:
    return shutil.which("g++") is not None


def _problem(inputs: Inputs, deterministic: bool) -> Problem:
    batch, tokens, heads, channels = inputs.value.shape
    queries, levels, points = inputs.points.shape[1], *inputs.points.shape[3:5]
    table, start = (Level * max(levels, 1))(), 0
    for number, (rows, columns) in enumerate(inputs.spatial_shapes):
        table[number] = Level(rows, columns, start)
        start += rows * columns
    coordinates = 0 if inputs.references is None else inputs.references.shape[-1]
    types = (TYPES.index(t.dtype) for t in (inputs.value, inputs.points, inputs.weights))
    sizes = (batch, tokens, heads, channels, queries, points, levels)
    return Problem(*sizes, table, coordinates, *types, deterministic)


def _check(error: bytes | None) -> None:
    if error is not None:
        raise EmulatedError(error.decode())


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


class _Memory:
    """Tensors between guards, at multiples of 256 bytes, as torch's CUDA allocator gives them."""

    def __init__(self, device: ctypes.CDLL) -> None:
        self.device = device
        self.buffers: list[tuple[Tensor, int, int]] = []
        device.emulation_forbid_all()

    def new(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Uninitialised: every byte is that of the guards."""
        elements = torch.Size(shape).numel()
        size = elements * dtype.itemsize
        buffer = torch.full((size + 3 * GUARD,), _GUARD_BYTE, dtype=torch.uint8)
        start = GUARD + -buffer.data_ptr() % GUARD
        self.buffers.append((buffer, start, start + size))
        inside = buffer[start : start + size]
        if size:
            self.device.emulation_allow(ctypes.c_void_p(inside.data_ptr()), ctypes.c_size_t(size))
        return inside.view(dtype).view(shape)

    def copy(self, tensor: Tensor) -> int:
        return self.new(tensor.shape, tensor.dtype).copy_(tensor).data_ptr()

    def of(self, inputs: Inputs) -> tuple[int | None, ...]:
        given = (inputs.value, inputs.references, inputs.points, inputs.weights)
        return tuple(None if tensor is None else self.copy(tensor) for tensor in given)

    def check(self) -> None:
        for buffer, start, end in self.buffers:
            untouched = torch.cat([buffer[:start], buffer[end:]])
            assert (untouched == _GUARD_BYTE).all(), "a kernel wrote beside a tensor"
