"""Multi-scale deformable attention (Deformable DETR, section 4.1, equation 3), as fast as it goes.

The compiled kernels compute it where they are, on the CPU and on CUDA devices; ONNX exports get a
form of plain gathers; `models.ops.reference` says what all of them mean. The gradients are of the
first order only. On the CPU they are the same bits for any number of threads, on CUDA under
`torch.use_deterministic_algorithms(True)`.
"""

import logging
from collections.abc import Sequence
from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor

from models.ops import gather, operators, reference
from models.ops.checks import checked_classic, checked_fused
from models.ops.library import Library, Missing, load_library
from models.ops.nvrtc import NvrtcError, find_nvrtc
from models.settings import Settings

_LOG = logging.getLogger(__name__)

_COMPILED_FOR = ("cpu", "cuda", "meta")

_LIBRARY = load_library()
"""Loaded with this module, so that a traced function never meets the loading."""

if isinstance(_LIBRARY, Library):
    operators.register()


class OpsSettings(Settings):
    """How operators are computed."""

    allow_reference: bool = False
    """Whether plain PyTorch may stand in on a GPU without compiled kernels: many times slower."""


def deformable_attention(
    value: Float[Tensor, "batch tokens heads channels"],
    spatial_shapes: Sequence[tuple[int, int]],
    locations: Float[Tensor, "batch queries heads levels points 2"],
    weights: Float[Tensor, "batch queries heads levels points"],
) -> Float[Tensor, "batch queries heads*channels"]:
    """Each query's weighted samples of its locations (x, y), head after head, in value's dtype.

    Raises ValueError where an argument does not fit (locations are float32, or float64 beside a
    float64 value), RuntimeError on a device without compiled kernels, see `set_allow_reference`.
    """
    locations, weights = checked_classic(value, spatial_shapes, locations, weights)
    if torch.onnx.is_in_onnx_export():
        return gather.deformable_attention(value, spatial_shapes, locations, weights)
    if _runs_compiled(value.device.type):
        return operators.classic(value, spatial_shapes, locations, weights)
    return reference.deformable_attention(value, spatial_shapes, locations, weights)


def fused_deformable_attention(
    value: Float[Tensor, "batch tokens heads channels"],
    spatial_shapes: Sequence[tuple[int, int]],
    references: Float[Tensor, "batch queries levels coordinates"],
    offsets: Float[Tensor, "batch queries heads levels points 2"],
    logits: Float[Tensor, "batch queries heads levels points"],
) -> Float[Tensor, "batch queries heads*channels"]:
    """The same from reference points or boxes, raw offsets and logits; neither locations nor
    weights are stored.

    A point (x, y) is moved by offsets in cells of each level, a box (cx, cy, w, h) by offsets of
    which `points` reach from its centre to its edge. Raises as `deformable_attention` does.
    """
    given = checked_fused(value, spatial_shapes, references, offsets, logits)
    if torch.onnx.is_in_onnx_export():
        return gather.fused_deformable_attention(value, spatial_shapes, *given)
    if _runs_compiled(value.device.type):
        return operators.fused(value, spatial_shapes, *given)
    return reference.fused_deformable_attention(value, spatial_shapes, *given)


def value_gradient(
    grad_output: Float[Tensor, "batch queries _"],
    value: Float[Tensor, "batch tokens heads channels"],
    spatial_shapes: Sequence[tuple[int, int]],
    locations: Float[Tensor, "batch queries heads levels points 2"],
    weights: Float[Tensor, "batch queries heads levels points"],
) -> Float[Tensor, "batch tokens heads channels"]:
    """The gradient of `deformable_attention` with respect to the value alone, without a graph."""
    locations, weights = checked_classic(value, spatial_shapes, locations, weights)
    if _runs_compiled(value.device.type):
        return operators.value_gradient(grad_output, value, spatial_shapes, locations, weights)
    with torch.enable_grad():
        traced = value.detach().requires_grad_()
        out = reference.deformable_attention(
            traced, spatial_shapes, locations.detach(), weights.detach()
        )
    return torch.autograd.grad(out, traced, grad_output)[0]


_allow_reference = False


def set_allow_reference(allowed: bool) -> None:
    """Lets plain PyTorch stand in on devices without compiled kernels, for this process."""
    global _allow_reference
    _allow_reference = allowed


def describe(device: torch.device) -> str:
    """Which kernels deformable attention takes on a device, and why; one line for a person."""
    match _LIBRARY:
        case Missing(reason):
            return f"plain PyTorch: {reason}"
        case Library():
            return _describe_compiled(_LIBRARY, device)


def _runs_compiled(device_type: str) -> bool:
    """False where the plain version is to be taken; RuntimeError where it may not be."""
    compiled = isinstance(_LIBRARY, Library) and device_type in _COMPILED_FOR
    if not compiled and device_type not in ("cpu", "meta") and not _allow_reference:
        raise RuntimeError(
            f"no compiled deformable attention on {device_type}: {_why_not(device_type)}, or say "
            "ops.allow_reference=true to use plain PyTorch, many times slower"
        )
    if not torch.compiler.is_compiling():
        _say_once(device_type, compiled)
    return compiled


def _why_not(device_type: str) -> str:
    if isinstance(_LIBRARY, Missing):
        return _LIBRARY.reason
    return f"there are no kernels for {device_type}; use a CPU or a CUDA device"


@cache
def _say_once(device_type: str, compiled: bool) -> None:
    if compiled:
        _LOG.info("deformable attention: %s", describe(torch.device(device_type)))
    else:
        _LOG.warning("deformable attention runs in plain PyTorch: %s", _why_not(device_type))


def _describe_compiled(library: Library, device: torch.device) -> str:
    where = f"compiled, {library.path}"
    match device.type:
        case "cpu":
            return f"{where}, CPU kernels for {library.cpu_isa}"
        case "cuda" if torch.cuda.is_available():
            return f"{where}, {_describe_cuda(library, torch.cuda.get_device_capability(device))}"
        case "cuda":
            return f"{where}, but this torch sees no CUDA device"
        case other:
            return f"plain PyTorch: there are no kernels for {other}"


def _describe_cuda(library: Library, capability: tuple[int, int]) -> str:
    major, minor = capability
    fitting = [arch for arch in library.cubins if arch // 10 == major and arch % 10 <= minor]
    if fitting:
        return f"CUDA kernels for sm_{max(fitting)} built in, others by NVRTC at first use"
    try:
        return f"CUDA kernels compiled at first use by NVRTC {find_nvrtc().version}"
    except NvrtcError as error:
        return f"no CUDA kernels for sm_{major}{minor}: {error}"
