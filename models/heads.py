"""What a query, or a token, says: class logits and a box (DETR, 3.2; Deformable DETR, A.3).

All heads compute in float32 whatever the autocast: bfloat16 rounds boxes to about 1/500.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

PRIOR = 0.01
"""Probability that a sigmoid class head gives at first (focal loss, Lin et al., ICCV 2017, 4.1)."""

EPSILON = 1e-5
"""References closer than this to 0 or 1 are taken as that close."""


class Perceptron(nn.Module):
    """Linear layers with ReLU between them."""

    def __init__(self, dim_in: int, dim_inner: int, dim_out: int, *, num_layers: int) -> None:
        super().__init__()
        dims = [dim_in] + [dim_inner] * (num_layers - 1) + [dim_out]
        self.layers = nn.ModuleList(nn.Linear(dims[n], dims[n + 1]) for n in range(num_layers))

    @property
    def first(self) -> nn.Linear:
        """The layer that reads a token."""
        layer = self.layers[0]
        assert isinstance(layer, nn.Linear)
        return layer

    def forward(self, tokens: Float[Tensor, "*tokens dim"]) -> Float[Tensor, "*tokens dim_out"]:
        """The last layer's output, without an activation."""
        *inner, last = self.layers
        for layer in inner:
            tokens = F.relu(layer(tokens))
        projected: Tensor = last(tokens)
        return projected


class BoxHead(Perceptron):
    """Three layers to the logits of a box."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, dim, 4, num_layers=3)


def class_heads(heads: nn.Module, depth: int) -> tuple[nn.Linear, ...]:
    """The class head of each of `depth` layers; the same one for all where it is shared."""
    found = tuple(heads) if isinstance(heads, nn.ModuleList) else (heads,) * depth
    return tuple(head for head in found if isinstance(head, nn.Linear))


def box_heads(heads: nn.Module, depth: int) -> tuple[BoxHead, ...]:
    """The box head of each of `depth` layers; the same one for all where it is shared."""
    found = tuple(heads) if isinstance(heads, nn.ModuleList) else (heads,) * depth
    return tuple(head for head in found if isinstance(head, BoxHead))


def read_logits(
    head: nn.Linear, hidden: Float[Tensor, "*tokens dim"]
) -> Float[Tensor, "*tokens classes"]:
    """Class logits, float32."""
    with torch.autocast(hidden.device.type, enabled=False):
        logits: Tensor = head(hidden.to(head.weight.dtype))
    return logits


def read_boxes(
    head: BoxHead,
    hidden: Float[Tensor, "*#tokens dim"],
    reference: Float[Tensor, "*#tokens coordinates"] | None,
    epsilon: float = EPSILON,
) -> Float[Tensor, "*#tokens 4"]:
    """boxes_cxcywh: sigmoid of what the head says, plus the logit of the reference if there is one.

    A reference point (x, y) moves the centre alone, a reference box (cx, cy, w, h) all four; one
    reference may serve the queries of several layers.
    """
    return read_boxes_by_logit(
        head, hidden, None if reference is None else logit(reference, epsilon)
    )


def read_boxes_by_logit(
    head: BoxHead,
    hidden: Float[Tensor, "*#tokens dim"],
    start: Float[Tensor, "*#tokens coordinates"] | None,
) -> Float[Tensor, "*#tokens 4"]:
    """`read_boxes` from the logits of the reference."""
    with torch.autocast(hidden.device.type, enabled=False):
        said: Tensor = head(hidden.to(head.first.weight.dtype))
        if start is not None:
            said = said + F.pad(start, (0, 4 - start.shape[-1]))
        return said.sigmoid()


def logit(share: Float[Tensor, "*any"], epsilon: float = EPSILON) -> Float[Tensor, "*any"]:
    """The inverse of the sigmoid; shares closer than epsilon to 0 or 1 are taken as that close."""
    share = share.clamp(0, 1)
    return (share.clamp(min=epsilon) / (1 - share).clamp(min=epsilon)).log()


def begin_rare(head: nn.Linear) -> None:
    """Every class begins with the probability PRIOR, so that the many negatives do not swamp."""
    nn.init.constant_(head.bias, -math.log((1 - PRIOR) / PRIOR))


def begin_at_reference(head: BoxHead, size_logit: float = 0.0) -> None:
    """The first boxes are at the reference; without one of their own, of size sigmoid(logit)."""
    last = head.layers[-1]
    assert isinstance(last, nn.Linear)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    nn.init.constant_(last.bias[2:], size_logit)
