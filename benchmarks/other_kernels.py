"""Kernels that ours is compared with: a stand-in for the public algorithm, and the public code's.

Each is compiled by NVRTC and launched through the driver, so that no library has to be built.
"""

import ctypes
import re
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_calls import BATCH, CHANNELS, HEADS, LEVELS, POINTS, SHAPES, TOKENS, Call
from models.ops import nvrtc
from models.ops.reference import locations_and_weights

PUBLIC_FILE = "models/ops/src/cuda/ms_deform_im2col_cuda.cuh"
"""In a clone of fundamentalvision/Deformable-DETR."""

_STARTS = [sum(rows * columns for rows, columns in SHAPES[:level]) for level in range(LEVELS)]


class Program:
    """Compiled kernels, launched on torch's current stream."""

    def __init__(self, source: str) -> None:
        major, minor = torch.cuda.get_device_capability()
        cubin = nvrtc.find_nvrtc().compile(source, major * 10 + minor)
        torch.cuda.current_stream().synchronize()  # the device's context is there
        self.driver = ctypes.CDLL("libcuda.so.1")
        self.module = ctypes.c_void_p()
        self._check(self.driver.cuModuleLoadData(ctypes.byref(self.module), cubin))

    def launch(self, name: str, blocks: int, threads: int, *arguments: Any) -> None:
        """`arguments` are ctypes numbers and structures, as the kernel takes them."""
        function = ctypes.c_void_p()
        here = ctypes.byref(function)
        self._check(self.driver.cuModuleGetFunction(here, self.module, name.encode()))
        pointers = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(a) for a in arguments))
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        sizes = (blocks, 1, 1, threads, 1, 1, 0)
        self._check(self.driver.cuLaunchKernel(function, *sizes, stream, pointers, None))

    def _check(self, status: int) -> None:
        if status != 0:
            raise RuntimeError(f"the CUDA driver answered {status}")


def beside(name: str) -> str:
    """The text of a file of this folder."""
    return (Path(__file__).parent / name).read_text(encoding="utf-8")


class OtherKernels(ABC):
    """Float32 kernels that take a call's locations and weights."""

    name: str

    def __init__(self, call: Call) -> None:
        others = call.references, call.offsets, call.logits
        locations, weights = locations_and_weights(SHAPES, *others)
        self.value, self.grad_output = call.value, call.grad_output
        self.locations, self.weights = locations.contiguous(), weights.contiguous()
        self.output = torch.empty_like(call.grad_output)
        self.grads = [torch.empty_like(t) for t in (self.value, self.locations, self.weights)]
        self.queries = call.offsets.shape[1]
        self.pairs = BATCH * self.queries * HEADS

    @abstractmethod
    def forward(self) -> None:
        """Into `output`."""

    @abstractmethod
    def backward(self) -> None:
        """Into `grads`: of values, locations and weights."""

    def check(self) -> None:
        """Both algorithms compute the same, or the comparison would be of nothing."""
        self.forward()
        self.backward()
        flat = [size for shape in SHAPES for size in shape]
        operators = torch.ops.querypatch
        tensors = self.value, flat, self.locations, self.weights
        _assert_near(operators.deformable_attention(*tensors), self.output)
        ours = operators.deformable_attention_backward(
            self.grad_output, *tensors, True, True, True, False
        )
        for found, theirs in zip(ours, self.grads, strict=True):
            _assert_near(found, theirs)


def _assert_near(found: Tensor, theirs: Tensor) -> None:
    error = float((found - theirs).norm() / theirs.norm())
    assert error < 1e-4, f"relative error {error:.1e}"


class _Level(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int) for name in ("rows", "columns", "start")]


class _Problem(ctypes.Structure):
    """As in thread_per_channel.cu."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("value", "locations", "weights", "grad_output")),
        *((name, ctypes.c_void_p) for name in ("output", "grad_value", "grad_locations")),
        ("grad_weights", ctypes.c_void_p),
        *((name, ctypes.c_int) for name in ("batch", "tokens", "heads", "channels", "queries")),
        *((name, ctypes.c_int) for name in ("levels", "points")),
        ("level", _Level * LEVELS),
    ]


class ThreadPerChannel(OtherKernels):
    """The stand-in for the public algorithm."""

    name = "thread per channel"

    def __init__(self, call: Call) -> None:
        super().__init__(call)
        self.program = Program(beside("thread_per_channel.cu"))
        given = (self.value, self.locations, self.weights, self.grad_output, self.output)
        levels = [_Level(*shape, start) for shape, start in zip(SHAPES, _STARTS, strict=True)]
        sizes = (BATCH, TOKENS, HEADS, CHANNELS, self.queries, LEVELS, POINTS)
        pointers = [t.data_ptr() for t in (*given, *self.grads)]
        self.problem = _Problem(*pointers, *sizes, (_Level * LEVELS)(*levels))

    def forward(self) -> None:
        """Into `output`."""
        blocks = -(-self.pairs * CHANNELS // 1024)
        self.program.launch("forward", blocks, 1024, self.problem)

    def backward(self) -> None:
        """Into `grads`."""
        self.grads[0].zero_()
        self.program.launch("backward", self.pairs, CHANNELS, self.problem)


class PublicKernels(OtherKernels):
    """Those of Deformable DETR's code, launched as its host code launches them."""

    name = "public code"

    def __init__(self, call: Call, clone: Path) -> None:
        super().__init__(call)
        self.program = Program(public_source((clone / PUBLIC_FILE).read_text(encoding="utf-8")))
        self.shapes = torch.tensor(SHAPES, device="cuda")
        self.starts = torch.tensor(_STARTS, device="cuda")
        levels = (self.shapes, self.starts)
        self.given = (self.value, *levels, self.locations, self.weights)
        self.count = self.pairs * CHANNELS
        self.sizes = (BATCH, TOKENS, HEADS, CHANNELS, LEVELS, self.queries, POINTS)

    def forward(self) -> None:
        """Into `output`."""
        blocks = -(-self.count // 1024)
        self._launch("forward", blocks, 1024, self.given, (self.output,))

    def backward(self) -> None:
        """Into `grads`."""
        self.grads[0].zero_()
        given = (self.grad_output, *self.given)
        self._launch("backward", self.pairs, CHANNELS, given, tuple(self.grads))

    def _launch(
        self,
        name: str,
        blocks: int,
        threads: int,
        given: tuple[Tensor, ...],
        found: tuple[Tensor, ...],
    ) -> None:
        before, after = ([ctypes.c_void_p(t.data_ptr()) for t in some] for some in (given, found))
        sizes = [ctypes.c_int(size) for size in self.sizes]
        self.program.launch(
            name, blocks, threads, ctypes.c_int(self.count), *before, *sizes, *after
        )


def public_source(text: str) -> str:
    """The device code of the public file, with the two kernels that 32 channels take by name."""
    device_code = text[: text.index("template <typename scalar_t>\nvoid ms_deformable_im2col_cuda")]
    device_code = re.sub(r"^#include.*$", "", device_code, flags=re.MULTILINE)
    device_code = device_code.replace("__global__ void", "__device__ __forceinline__ void")
    sizes = "int batch, int tokens, int heads, int channels, int levels, int queries, int points"
    given = "const float* value, const int64_t* shapes, const int64_t* starts, const float* where"
    said = "batch, tokens, heads, channels, levels, queries, points"
    backward = "ms_deformable_col2im_gpu_kernel_shm_blocksize_aware_reduce_v1"
    return f"""typedef long long int64_t;
{device_code}
extern "C" __global__ void forward(int n, {given}, const float* weights, {sizes}, float* out) {{
  ms_deformable_im2col_gpu_kernel<float>(n, value, shapes, starts, where, weights, {said}, out);
}}
extern "C" __global__ void backward(int n, const float* grad, {given}, const float* weights,
                                    {sizes}, float* to_value, float* to_where, float* to_weights) {{
  {backward}<float, {CHANNELS}>(
      n, grad, value, shapes, starts, where, weights, {said}, to_value, to_where, to_weights);
}}
"""
