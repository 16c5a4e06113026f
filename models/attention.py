"""Fused multi-head attention, its weights on request only (Vaswani et al., NeurIPS 2017, 3.2).

Tensor names and shapes are those of `torch.nn.MultiheadAttention`, so that published weights fit.
That module computes and averages the attention weights at every call unless told otherwise; here
they exist only where `attention_weights` is called for.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn


@dataclass(frozen=True)
class Projected:
    """What attention compares and mixes; queries and keys may be wider than values."""

    queries: Float[Tensor, "batch heads queries head_dim"]
    keys: Float[Tensor, "batch heads tokens head_dim"]
    values: Float[Tensor, "batch heads tokens value_dim"]


class Attention(nn.Module):
    """Queries look at keys and take a mixture of values; the heads share `dim` channels evenly."""

    def __init__(self, dim: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = nn.Linear(dim, dim)

    def project_queries(
        self, tokens: Float[Tensor, "batch queries dim"]
    ) -> Float[Tensor, "batch heads queries head_dim"]:
        """What is looked for."""
        return split_heads(self._project(tokens, 0, 1), self.num_heads)

    def project_keys(
        self, tokens: Float[Tensor, "batch tokens dim"]
    ) -> Float[Tensor, "batch heads tokens head_dim"]:
        """What is looked at."""
        return split_heads(self._project(tokens, 1, 2), self.num_heads)

    def project_values(
        self, tokens: Float[Tensor, "batch tokens dim"]
    ) -> Float[Tensor, "batch heads tokens head_dim"]:
        """What is taken."""
        return split_heads(self._project(tokens, 2, 3), self.num_heads)

    def project_among(
        self,
        content: Float[Tensor, "batch queries dim"],
        position: Float[Tensor, "batch queries dim"],
    ) -> Projected:
        """Self-attention of tokens that stand at the given positions."""
        queries, keys = self.project_queries_and_keys(content + position)
        return Projected(queries, keys, self.project_values(content))

    def project_queries_and_keys(
        self, tokens: Float[Tensor, "batch tokens dim"]
    ) -> tuple[
        Float[Tensor, "batch heads tokens head_dim"], Float[Tensor, "batch heads tokens head_dim"]
    ]:
        """Queries and keys of self-attention, in one product."""
        queries, keys = self._project(tokens, 0, 2).chunk(2, dim=-1)
        return split_heads(queries, self.num_heads), split_heads(keys, self.num_heads)

    def forward(
        self,
        queries: Float[Tensor, "batch heads queries head_dim"],
        keys: Float[Tensor, "batch heads tokens head_dim"],
        values: Float[Tensor, "batch heads tokens head_dim"],
        hidden: Bool[Tensor, "#batch #heads #queries tokens"] | None,
    ) -> Float[Tensor, "batch queries dim"]:
        """The mixtures of values, projected; no query sees a token where `hidden` is True."""
        dropout = self.dropout if self.training else 0.0
        projected: Tensor = self.out_proj(mixture(queries, keys, values, hidden, dropout))
        return projected

    def _project(self, tokens: Tensor, first: int, end: int) -> Tensor:
        """Parts `first` to `end` - 1 of the joint projection: 0 queries, 1 keys, 2 values."""
        dim = self.in_proj_weight.shape[1]
        rows = slice(first * dim, end * dim)
        return F.linear(tokens, self.in_proj_weight[rows], self.in_proj_bias[rows])


def split_heads(
    tokens: Float[Tensor, "batch tokens dim"], num_heads: int
) -> Float[Tensor, "batch heads tokens head_dim"]:
    """The channels shared evenly between the heads."""
    batch, length, dim = tokens.shape
    return tokens.view(batch, length, num_heads, dim // num_heads).transpose(1, 2)


def mixture(
    queries: Float[Tensor, "batch heads queries head_dim"],
    keys: Float[Tensor, "batch heads tokens head_dim"],
    values: Float[Tensor, "batch heads tokens value_dim"],
    hidden: Bool[Tensor, "#batch #heads #queries tokens"] | None,
    dropout: float,
) -> Float[Tensor, "batch queries dim"]:
    """The mixtures of values of all heads side by side; nothing comes from where `hidden` is True.

    `dropout` is the share of attention weights that is dropped.
    """
    width, more = values.shape[-1], queries.shape[-1] - values.shape[-1]
    if more and values.device.type == "cpu" and _is_fused():
        values = F.pad(values, (0, more))
    mixed = F.scaled_dot_product_attention(
        queries,
        keys,
        values,
        attn_mask=None if hidden is None else ~hidden,
        dropout_p=dropout,
    )
    return mixed[..., :width].transpose(1, 2).flatten(2)


def _is_fused() -> bool:
    """Whether the CPU's fused kernel is allowed, which takes values as wide as queries alone.

    With padded values it takes a third of the time of the plain one. The switch is CUDA's by name
    and the CPU's too; a compiler does not follow it.
    """
    if torch.compiler.is_compiling():
        return True
    return bool(torch.backends.cuda.flash_sdp_enabled())  # type: ignore[no-untyped-call]


def attention_weights(
    queries: Float[Tensor, "batch heads queries head_dim"],
    keys: Float[Tensor, "batch heads tokens head_dim"],
    hidden: Bool[Tensor, "#batch #heads #queries tokens"] | None,
) -> Float[Tensor, "batch heads queries tokens"]:
    """How much each query looks at each token, before dropout, float32; rows sum to 1."""
    with torch.autocast(queries.device.type, enabled=False):
        scores = queries.float() @ keys.float().transpose(-1, -2) / math.sqrt(queries.shape[-1])
    if hidden is not None:
        scores = scores.masked_fill(hidden, -math.inf)
    return scores.softmax(-1)
