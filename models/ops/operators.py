"""What torch must know of the compiled operators besides their kernels: shapes and gradients.

With the fake kernels `torch.compile` and `torch.export` take an operator as one node; the gradient
of an operator is an operator too, of which there is no further gradient.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

Gradients = tuple[Tensor | None, ...]


def register() -> None:
    """To be called once, after the library is loaded."""
    _register("deformable_attention", _fake_classic, _fake_classic_backward, _classic_backward)
    _register("fused_deformable_attention", _fake_fused, _fake_fused_backward, _fused_backward)


def classic(
    value: Float[Tensor, "batch tokens heads channels"],
    spatial_shapes: Sequence[tuple[int, int]],
    locations: Float[Tensor, "batch queries heads levels points 2"],
    weights: Float[Tensor, "batch queries heads levels points"],
) -> Float[Tensor, "batch queries heads*channels"]:
    """`models.ops.reference.deformable_attention` by the library."""
    shapes = [size for shape in spatial_shapes for size in shape]
    out: Tensor = torch.ops.querypatch.deformable_attention(value, shapes, locations, weights)
    return out


def fused(
    value: Float[Tensor, "batch tokens heads channels"],
    spatial_shapes: Sequence[tuple[int, int]],
    references: Float[Tensor, "batch queries levels coordinates"],
    offsets: Float[Tensor, "batch queries heads levels points 2"],
    logits: Float[Tensor, "batch queries heads levels points"],
) -> Float[Tensor, "batch queries heads*channels"]:
    """`models.ops.reference.fused_deformable_attention` by the library."""
    shapes = [size for shape in spatial_shapes for size in shape]
    out: Tensor = torch.ops.querypatch.fused_deformable_attention(
        value, shapes, references, offsets, logits
    )
    return out


def value_gradient(
    grad_output: Float[Tensor, "batch queries _"],
    value: Float[Tensor, "batch tokens heads channels"],
    spatial_shapes: Sequence[tuple[int, int]],
    locations: Float[Tensor, "batch queries heads levels points 2"],
    weights: Float[Tensor, "batch queries heads levels points"],
) -> Float[Tensor, "batch tokens heads channels"]:
    """The gradient of `classic` with respect to the value alone."""
    shapes = [size for shape in spatial_shapes for size in shape]
    gradient: Tensor = torch.ops.querypatch.deformable_attention_backward(
        grad_output, value, shapes, locations, weights, True, False, False, _deterministic()
    )[0]
    return gradient


def _register(name: str, fake: Any, fake_backward: Any, backward: Any) -> None:
    torch.library.register_fake(f"querypatch::{name}", fake)
    torch.library.register_fake(f"querypatch::{name}_backward", fake_backward)
    torch.library.register_autograd(f"querypatch::{name}", backward, setup_context=_keep)
    torch.library.register_autograd(f"querypatch::{name}_backward", _no_second_derivative)


def _deterministic() -> bool:
    return torch.are_deterministic_algorithms_enabled()


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    value, ctx.shapes, *others = inputs
    ctx.save_for_backward(value, *others)


def _classic_backward(ctx: Any, grad: Tensor) -> Gradients:
    value, locations, weights = ctx.saved_tensors
    needs = [needed for place, needed in enumerate(ctx.needs_input_grad) if place != 1]
    found = torch.ops.querypatch.deformable_attention_backward(
        grad, value, ctx.shapes, locations, weights, *needs, _deterministic()
    )
    return _with_shapes(found, needs)


def _fused_backward(ctx: Any, grad: Tensor) -> Gradients:
    value, references, offsets, logits = ctx.saved_tensors
    needs = [needed for place, needed in enumerate(ctx.needs_input_grad) if place != 1]
    found = torch.ops.querypatch.fused_deformable_attention_backward(
        grad, value, ctx.shapes, references, offsets, logits, *needs, _deterministic()
    )
    return _with_shapes(found, needs)


def _with_shapes(found: Sequence[Tensor], needs: Sequence[bool]) -> Gradients:
    """The gradients of all inputs, the integers at place 1 included."""
    of_value, *others = (
        gradient if needed else None for gradient, needed in zip(found, needs, strict=True)
    )
    return of_value, None, *others


def _no_second_derivative(ctx: Any, *grads: Tensor) -> Gradients:
    raise RuntimeError(
        "deformable attention has no second derivative in querypatch_ops; "
        "take models.ops.reference, in plain PyTorch, where one is needed"
    )


def _fake_classic(value: Tensor, shapes: list[int], locations: Tensor, weights: Tensor) -> Tensor:
    batch, _, heads, channels = value.shape
    return value.new_empty((batch, locations.shape[1], heads * channels))


def _fake_fused(
    value: Tensor, shapes: list[int], references: Tensor, offsets: Tensor, logits: Tensor
) -> Tensor:
    return _fake_classic(value, shapes, offsets, logits)


def _fake_classic_backward(
    grad_output: Tensor,
    value: Tensor,
    shapes: list[int],
    locations: Tensor,
    weights: Tensor,
    needs_value: bool,
    needs_locations: bool,
    needs_weights: bool,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        _room(value, needs_value),
        _room(locations, needs_locations),
        _room(weights, needs_weights),
    )


def _fake_fused_backward(
    grad_output: Tensor,
    value: Tensor,
    shapes: list[int],
    references: Tensor,
    offsets: Tensor,
    logits: Tensor,
    needs_value: bool,
    needs_references: bool,
    needs_offsets: bool,
    needs_logits: bool,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        _room(value, needs_value),
        _room(references, needs_references),
        _room(offsets, needs_offsets),
        _room(logits, needs_logits),
    )


def _room(of: Tensor, needed: bool) -> Tensor:
    return of.new_empty(of.shape if needed else (0,))
