"""Attention of Conditional DETR's decoder (Meng et al., ICCV 2021, sections 3.3 and 3.4; DAB-DETR).

What a query is (content) and where it looks (position) have projections of their own. Among queries
the two are added; towards the memory they are set side by side in each head, so that contents are
compared with contents and places with places: queries and keys are twice as wide as values.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from models.attention import Projected, mixture, split_heads


class ConditionalSelfAttention(nn.Module):
    """Queries look at each other, by content plus position."""

    def __init__(self, dim: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.query_content = nn.Linear(dim, dim)
        self.query_position = nn.Linear(dim, dim)
        self.key_content = nn.Linear(dim, dim)
        self.key_position = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.out_proj = nn.Linear(dim, dim)

    def project_among(
        self,
        content: Float[Tensor, "batch queries dim"],
        position: Float[Tensor, "batch queries dim"],
    ) -> Projected:
        """What is compared and mixed."""
        queries = self.query_content(content) + self.query_position(position)
        keys = self.key_content(content) + self.key_position(position)
        return Projected(
            split_heads(queries, self.num_heads),
            split_heads(keys, self.num_heads),
            split_heads(self.value(content), self.num_heads),
        )

    def forward(
        self,
        queries: Float[Tensor, "batch heads queries head_dim"],
        keys: Float[Tensor, "batch heads queries head_dim"],
        values: Float[Tensor, "batch heads queries head_dim"],
        hidden: Bool[Tensor, "#batch #heads queries queries"] | None,
    ) -> Float[Tensor, "batch queries dim"]:
        """The mixtures of values, projected; no query sees another where `hidden` is True."""
        dropout = self.dropout if self.training else 0.0
        projected: Tensor = self.out_proj(mixture(queries, keys, values, hidden, dropout))
        return projected


class ConditionalCrossAttention(nn.Module):
    """Queries look at the memory, by content beside place; the first layer's also by their sum.

    In the first layer contents say nothing yet, so that position vectors are added to them, as in
    DETR; the keys' positions then count twice.
    """

    def __init__(self, dim: int, num_heads: int, dropout: float, *, first: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.query_content = nn.Linear(dim, dim)
        self.query_position = nn.Linear(dim, dim) if first else None
        self.query_sine = nn.Linear(dim, dim)
        self.key_content = nn.Linear(dim, dim)
        self.key_position = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.out_proj = nn.Linear(dim, dim)

    def project_queries(
        self,
        content: Float[Tensor, "batch queries dim"],
        position: Float[Tensor, "batch queries dim"],
        sine: Float[Tensor, "batch queries dim"],
    ) -> Float[Tensor, "batch heads queries twice_head_dim"]:
        """What is looked for; `sine` says where, in the code of the memory's positions."""
        looked_for = self.query_content(content)
        if self.query_position is not None:
            looked_for = looked_for + self.query_position(position)
        return self._beside(looked_for, self.query_sine(sine))

    def project_keys(
        self,
        tokens: Float[Tensor, "batch tokens dim"],
        position: Float[Tensor, "batch tokens dim"],
    ) -> Float[Tensor, "batch heads tokens twice_head_dim"]:
        """What is looked at."""
        content, place = self.key_content(tokens), self.key_position(position)
        return self._beside(content if self.query_position is None else content + place, place)

    def project_values(
        self, tokens: Float[Tensor, "batch tokens dim"]
    ) -> Float[Tensor, "batch heads tokens head_dim"]:
        """What is taken."""
        return split_heads(self.value(tokens), self.num_heads)

    def forward(
        self,
        queries: Float[Tensor, "batch heads queries twice_head_dim"],
        keys: Float[Tensor, "batch heads tokens twice_head_dim"],
        values: Float[Tensor, "batch heads tokens head_dim"],
        hidden: Bool[Tensor, "#batch 1 1 tokens"] | None,
    ) -> Float[Tensor, "batch queries dim"]:
        """The mixtures of values, projected; no query sees a token where `hidden` is True."""
        dropout = self.dropout if self.training else 0.0
        projected: Tensor = self.out_proj(mixture(queries, keys, values, hidden, dropout))
        return projected

    def _beside(self, content: Tensor, place: Tensor) -> Tensor:
        """In each head the content's channels, then the place's."""
        halves = (split_heads(content, self.num_heads), split_heads(place, self.num_heads))
        return torch.cat(halves, dim=-1)
