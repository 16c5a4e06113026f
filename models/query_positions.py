"""Where object queries are, and what that says to attention: what tells decoders apart.

Given: vectors that stay (DETR), or stay beside reference points and boxes (Deformable DETR).
Conditional: a vector that stays, and the sines of its point as spatial query, scaled channel by
channel by what the query has become (Conditional DETR, Meng et al., ICCV 2021, section 3.3).
Anchors: all is made of a box that every layer moves, position and spatial query of its sines, and
its sides set how far the query looks (DAB-DETR, Liu et al., ICLR 2022, sections 4.2 to 4.4).
"""

import math
from dataclasses import dataclass
from typing import Literal, assert_never

import torch
from jaxtyping import Float
from torch import Tensor, nn

from models.heads import BoxHead, Perceptron, read_boxes
from models.position import waves
from models.structures import LearnedQueries

PositionKind = Literal["given", "conditional", "anchor"]

_ANCHOR_EPSILON = 1e-3
"""Anchors closer than this to 0 or 1 are moved as if they were that close, as in public code."""

_SMALLEST_SIDE = 1e-6
"""Sides divide; only those that float32 would round to nothing are smaller."""


@dataclass(frozen=True)
class References:
    """The points or boxes of a group's queries, in shares of the picture; DETR's have none."""

    around: Float[Tensor, "batch queries coordinates"] | None
    """Where a layer looks around; refined ones have no gradient to the layer before."""
    start: Float[Tensor, "batch queries coordinates"] | None
    """The same place as what the layer's boxes begin from; anchors have that gradient."""


@dataclass(frozen=True)
class QueryPlace:
    """Where the queries of a group are, as attention hears it."""

    position: Float[Tensor, "batch queries dim"]
    sine: Float[Tensor, "batch queries dim"] | None = None
    """The spatial query of conditional attention, in the code of the memory's positions."""


class GivenPositions(nn.Module):
    """The group's own vectors in all layers."""


class ConditionalPositions(nn.Module):
    """The group's vectors, and the sines of its points beside them."""

    def __init__(self, dim: int, num_layers: int) -> None:
        super().__init__()
        self.dim = dim
        self.scale = _scale(dim, num_layers)

    def forward(
        self,
        content: Float[Tensor, "batch queries dim"],
        points: Float[Tensor, "batch queries 2"],
        *,
        first: bool,
    ) -> Float[Tensor, "batch queries dim"]:
        """The spatial query; contents scale it in all layers but the first."""
        return _scaled(box_waves(points, self.dim), content, self.scale, first)


class AnchorPositions(nn.Module):
    """Position, spatial query and its reach, all of a box."""

    def __init__(self, dim: int, num_layers: int) -> None:
        super().__init__()
        self.dim = dim
        self.scale = _scale(dim, num_layers)
        self.coder = Perceptron(2 * dim, dim, dim, num_layers=2)
        self.sides = Perceptron(dim, dim, 2, num_layers=2)

    def forward(
        self,
        content: Float[Tensor, "batch queries dim"],
        anchors: Float[Tensor, "batch queries 4"],
        *,
        first: bool,
    ) -> QueryPlace:
        """Where the queries are and look.

        The waves of x count by the side that the content asks for over that of the anchor, those
        of y alike (DAB-DETR, equation 8).
        """
        code = box_waves(anchors, self.dim)
        position = self.coder(code.to(self.coder.first.weight.dtype))
        sine = _scaled(code[..., : self.dim], content, self.scale, first)
        width_height = anchors[..., 2:].clamp(min=_SMALLEST_SIDE)
        wide, high = (self.sides(content).float().sigmoid() / width_height).split(1, dim=-1)
        y, x = sine.chunk(2, dim=-1)
        return QueryPlace(position, torch.cat((y * high, x * wide), dim=-1))


Positions = GivenPositions | ConditionalPositions | AnchorPositions


def query_positions(kind: PositionKind, dim: int, num_layers: int) -> Positions:
    """The policy of a decoder of `dim` channels."""
    match kind:
        case "given":
            return GivenPositions()
        case "conditional":
            return ConditionalPositions(dim, num_layers)
        case "anchor":
            return AnchorPositions(dim, num_layers)
        case _:
            assert_never(kind)


def place_of(
    positions: Positions,
    content: Float[Tensor, "batch queries dim"],
    given: Float[Tensor, "batch queries dim"] | None,
    around: Float[Tensor, "batch queries coordinates"] | None,
    *,
    first: bool,
) -> QueryPlace:
    """Where queries of these contents, `given` positions and references are in a layer."""
    match positions:
        case GivenPositions():
            assert given is not None
            return QueryPlace(given)
        case ConditionalPositions():
            assert given is not None
            assert around is not None
            return QueryPlace(given, positions(content, around, first=first))
        case AnchorPositions():
            assert around is not None
            place: QueryPlace = positions(content, around, first=first)
            return place
        case _:
            assert_never(positions)


def moved(
    positions: Positions,
    head: BoxHead,
    state: Float[Tensor, "batch queries dim"],
    hidden: Float[Tensor, "batch queries dim"],
    now: References,
) -> tuple[Float[Tensor, "batch queries 4"], References]:
    """The boxes of a layer, of its normalised states, and the references of the next one.

    References are the boxes, without a gradient (Deformable DETR, A.4). Anchors are moved by the
    states as they are, not normalised, and the next boxes begin from them with their gradient: so
    does the public code of DAB-DETR, the paper says neither.
    """
    match positions:
        case AnchorPositions():
            boxes = read_boxes(head, hidden, now.start, _ANCHOR_EPSILON)
            anchors = read_boxes(head, state, now.around, _ANCHOR_EPSILON)
            return boxes, References(anchors.detach(), anchors)
        case GivenPositions() | ConditionalPositions():
            boxes = read_boxes(head, hidden, now.start)
            return boxes, References(boxes.detach(), boxes.detach())
        case _:
            assert_never(positions)


def anchor_queries(
    anchors: Float[Tensor, "anchors 4"], patterns: nn.Embedding | None, dim: int
) -> LearnedQueries:
    """Each anchor, given as logits of a box, once with every pattern; the first pattern's first.

    Without patterns contents are empty.
    """
    boxes = anchors.float().sigmoid()
    if patterns is None:
        return LearnedQueries(None, anchors.new_zeros(len(anchors), dim), boxes)
    contents = patterns.weight.repeat_interleave(len(anchors), dim=0)
    return LearnedQueries(None, contents, boxes.repeat(len(patterns.weight), 1))


def box_waves(
    places: Float[Tensor, "batch queries coordinates"], dim: int
) -> Float[Tensor, "batch queries channels"]:
    """Sines and cosines of y, x and, of boxes, width and height: dim / 2 channels each.

    y is first, as in the positions of the memory; a share of 1 is 2 pi.
    """
    order = [1, 0, *range(2, places.shape[-1])]
    return waves(places[..., order].float() * (2 * math.pi), dim // 2).flatten(-2)


def _scaled(
    sine: Float[Tensor, "batch queries dim"],
    content: Float[Tensor, "batch queries dim"],
    scale: Perceptron | None,
    first: bool,
) -> Float[Tensor, "batch queries dim"]:
    """The sines times what contents say of each channel; in the first layer they say nothing."""
    return sine if first or scale is None else sine * scale(content)


def _scale(dim: int, num_layers: int) -> Perceptron | None:
    """Nothing in a decoder of one layer: no gradient would reach it, and DDP waits for each."""
    return Perceptron(dim, dim, dim, num_layers=2) if num_layers > 1 else None
