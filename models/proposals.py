"""Boxes that tokens propose, and the queries made of the best (Deformable DETR, 4.2 and A.4).

Every token of the encoder proposes a box around its own cell; the best `num_queries` of them become
the decoder's queries. Nothing is suppressed in between. Where proposals are not wanted (on padding,
and where the cell's own box would leave the picture) a token's features are zeroed and its box is
the whole of 1s, without a gradient.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from models.heads import BoxHead, read_boxes_by_logit, read_logits
from models.position import waves
from models.structures import QueryGroup, TokenPredictions

_FIRST_SIZE = 0.05
"""Side of the box that a token of the finest level begins with, as a share of the picture."""

_MARGIN = 0.01
"""A token whose first box has a coordinate closer than this to 0 or 1 does not propose."""


@dataclass(frozen=True)
class FirstBoxes:
    """What the tokens' boxes begin with."""

    logits: Float[Tensor, "batch tokens 4"]
    """Of cxcywh; +inf for tokens that are not usable."""
    usable: Bool[Tensor, "batch tokens"]
    """False on padding, and where a coordinate of the first box is outside (0.01, 0.99)."""


class ProposalTokens(nn.Module):
    """The features that proposals are read from; those of unusable tokens are a constant."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.projection = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim)

    def forward(
        self, tokens: Float[Tensor, "batch tokens dim"], usable: Bool[Tensor, "batch tokens"]
    ) -> Float[Tensor, "batch tokens dim"]:
        """Projected and normalised."""
        features: Tensor = self.norm(self.projection(tokens.masked_fill(~usable[..., None], 0.0)))
        return features


class ProposalQueries(nn.Module):
    """What a proposed box says to the decoder: a position, and a content if dim_out = 2 dim."""

    def __init__(self, dim: int, dim_out: int) -> None:
        super().__init__()
        self.dim = dim
        self.projection = nn.Linear(2 * dim, dim_out)
        self.norm = nn.LayerNorm(dim_out)

    def forward(
        self, boxes_cxcywh: Float[Tensor, "batch queries 4"]
    ) -> Float[Tensor, "batch queries dim_out"]:
        """From the sines and cosines of the four coordinates, dim / 2 of each."""
        code = waves(boxes_cxcywh * (2 * math.pi), self.dim // 2).flatten(-2)
        coded: Tensor = self.norm(self.projection(code.to(self.projection.weight.dtype)))
        return coded


def first_boxes(
    padding: Bool[Tensor, "batch tokens"], spatial_shapes: tuple[tuple[int, int], ...]
) -> FirstBoxes:
    """Boxes centred on the tokens' cells in the unpadded picture, of side 0.05 * 2^level."""
    boxes = []
    sizes = [rows * columns for rows, columns in spatial_shapes]
    for level, part in enumerate(torch.split(padding, sizes, dim=1)):
        rows, columns = spatial_shapes[level]
        valid = ~part.view(part.shape[0], rows, columns)
        height, width = valid[:, :, 0].sum(1).clamp(min=1), valid[:, 0, :].sum(1).clamp(min=1)
        y = (torch.arange(rows, device=padding.device) + 0.5) / height[:, None]
        x = (torch.arange(columns, device=padding.device) + 0.5) / width[:, None]
        whole = (padding.shape[0], rows, columns)
        centre = torch.stack((x[:, None].expand(whole), y[:, :, None].expand(whole)), dim=-1)
        side = torch.full_like(centre, _FIRST_SIZE * 2**level)
        boxes.append(torch.cat((centre, side), dim=-1).flatten(1, 2))
    box = torch.cat(boxes, dim=1)
    inside = ((box > _MARGIN) & (box < 1 - _MARGIN)).all(-1)
    usable = inside & ~padding
    logits = (box / (1 - box)).log().masked_fill(~usable[..., None], torch.inf)
    return FirstBoxes(logits, usable)


def predict_tokens(
    features: Float[Tensor, "batch tokens dim"],
    first: Float[Tensor, "batch tokens 4"],
    class_head: nn.Linear,
    box_head: BoxHead,
) -> TokenPredictions:
    """Classes and boxes of tokens whose boxes begin with the logits `first`."""
    return TokenPredictions(
        logits=read_logits(class_head, features),
        boxes=read_boxes_by_logit(box_head, features, first),
    )


@torch.no_grad()
def best_proposals(
    scores: Float[Tensor, "batch tokens"], num_queries: int
) -> Int64[Tensor, "batch queries"]:
    """The tokens of highest score, best first; all of them where there are fewer than queries."""
    return scores.topk(min(num_queries, scores.shape[1]), dim=1).indices


def queries_of(
    best: Int64[Tensor, "batch queries"],
    proposals: TokenPredictions,
    tokens: Float[Tensor, "batch tokens dim"],
    coder: ProposalQueries,
) -> QueryGroup:
    """The best proposals as queries whose references are their boxes, without a gradient.

    The content is the token itself where the coder gives a position alone (Efficient DETR, Yao et
    al., 2021; Sparse DETR, 4.1), else the second half of what it gives.
    """
    picture = torch.arange(best.shape[0], device=best.device)[:, None]
    reference = proposals.boxes[picture, best].detach()
    coded = coder(reference)
    if coded.shape[-1] == tokens.shape[-1]:
        return QueryGroup("queries", tokens[picture, best], coded, reference)
    position, content = coded.chunk(2, dim=-1)
    return QueryGroup("queries", content, position, reference)
