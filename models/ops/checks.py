"""Arguments of deformable attention, checked: what does not fit is one line that names it.

The compiled operators check again what would make them read elsewhere; here the words are those of
the public functions, for every way of computing them.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

_VALUE_TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def checked_classic(
    value: Tensor, spatial_shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """Locations and weights in the types that the kernels take; ValueError on what does not fit."""
    _check_value(value, spatial_shapes)
    _check_samples(value, spatial_shapes, ("locations", locations), ("weights", weights))
    return _precise("locations", locations, value), _widened("weights", weights, value)


def checked_fused(
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    references: Tensor,
    offsets: Tensor,
    logits: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """References, offsets and logits in the types that the kernels take; ValueError otherwise."""
    _check_value(value, spatial_shapes)
    _check_samples(value, spatial_shapes, ("offsets", offsets), ("logits", logits))
    expected = (value.shape[0], offsets.shape[1], len(spatial_shapes), "2 or 4")
    _check_shape("references", references, expected)
    if references.shape[3] not in (2, 4):
        raise ValueError(
            f"references has {references.shape[3]} coordinates, expected 2 (x, y) or "
            "4 (cx, cy, w, h)"
        )
    _check_device("references", references, value)
    return (
        _precise("references", references, value),
        _widened("offsets", offsets, value),
        _widened("logits", logits, value),
    )


def _check_value(value: Tensor, spatial_shapes: Sequence[tuple[int, int]]) -> None:
    _check_shape("value", value, ("batch", "tokens", "heads", "channels"))
    if value.dtype not in _VALUE_TYPES:
        raise ValueError(f"value is {value.dtype}, expected a floating-point dtype")
    cells = 0
    for rows, columns in spatial_shapes:
        if rows < 0 or columns < 0:
            raise ValueError(f"spatial_shapes holds a level of {rows} x {columns} cells")
        cells += rows * columns
    if value.shape[1] != cells:
        raise ValueError(
            f"value has {value.shape[1]} tokens, spatial_shapes {tuple(spatial_shapes)} hold "
            f"{cells}"
        )


def _check_samples(
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    points: tuple[str, Tensor],
    weights: tuple[str, Tensor],
) -> None:
    batch, _, heads, _ = value.shape
    levels = len(spatial_shapes)
    _check_shape(*points, (batch, "queries", heads, levels, "points", 2))
    queries, count = points[1].shape[1], points[1].shape[4]
    _check_shape(*weights, (batch, queries, heads, levels, count))
    _check_device(*points, value)
    _check_device(*weights, value)


def _check_shape(name: str, tensor: Tensor, expected: tuple[int | torch.SymInt | str, ...]) -> None:
    """Words stand for any size."""
    fits = tensor.dim() == len(expected) and all(
        isinstance(wanted, str) or size == wanted
        for size, wanted in zip(tensor.shape, expected, strict=True)
    )
    if not fits:
        wanted = ", ".join(str(size) for size in expected)
        raise ValueError(f"{name} has the shape {tuple(tensor.shape)}, expected ({wanted})")


def _check_device(name: str, tensor: Tensor, value: Tensor) -> None:
    if tensor.device != value.device:
        raise ValueError(f"{name} is on {tensor.device}, value on {value.device}; move one of them")


def _precise(name: str, tensor: Tensor, value: Tensor) -> Tensor:
    """float32, float64 beside a float64 value. Half precision moves samples by whole cells."""
    if tensor.dtype in (torch.bfloat16, torch.float16):
        raise ValueError(
            f"{name} is {tensor.dtype}, in which samples move by whole cells; compute it in float32"
        )
    return _widened(name, tensor, value)


def _widened(name: str, tensor: Tensor, value: Tensor) -> Tensor:
    """In value's dtype or float32, float64 beside a float64 value: never rounded."""
    if tensor.dtype not in _VALUE_TYPES:
        raise ValueError(f"{name} is {tensor.dtype}, expected a floating-point dtype")
    if value.dtype == torch.float64:
        return tensor.to(torch.float64)
    if tensor.dtype == torch.float64:
        raise ValueError(f"{name} is float64 beside a value of {value.dtype}; round it yourself")
    return tensor if tensor.dtype == value.dtype else tensor.to(torch.float32)
