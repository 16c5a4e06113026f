"""Encoder and decoder layers of DETR, batch first (Carion et al., ECCV 2020, 3.2, A.3).

Positions are added to queries and keys at every attention, never to values. Post-norm (DETR)
normalises after each residual sum, pre-norm (UP-DETR's public weights) before each sublayer;
pre-norm has one more norm after the encoder.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from models.attention import Attention, attention_weights
from models.structures import Memory, QueryGroup


@dataclass(frozen=True)
class TransformerShape:
    """What the layers of a transformer have in common."""

    dim: int
    num_heads: int
    feedforward_dim: int
    dropout: float
    pre_norm: bool


@dataclass(frozen=True)
class DecodedLayer:
    """One group's queries after one decoder layer and, if recorded, what they looked at."""

    hidden: Float[Tensor, "batch queries dim"]
    self_attention: Float[Tensor, "batch heads queries queries"] | None = None
    cross_attention: Float[Tensor, "batch heads queries tokens"] | None = None


class Encoder(nn.Module):
    """Self-attention over the cells of the feature map."""

    def __init__(self, shape: TransformerShape, num_layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(shape) for _ in range(num_layers))
        self.norm = nn.LayerNorm(shape.dim) if shape.pre_norm else nn.Identity()

    def forward(
        self,
        tokens: Float[Tensor, "batch tokens dim"],
        position: Float[Tensor, "batch tokens dim"],
        padding: Bool[Tensor, "batch tokens"],
    ) -> Float[Tensor, "batch tokens dim"]:
        """The tokens after all layers; nothing is read from padding."""
        hidden = padding[:, None, None, :]
        for layer in self.layers:
            tokens = layer(tokens, position, hidden)
        normed: Tensor = self.norm(tokens)
        return normed


class Decoder(nn.Module):
    """Object queries look at those of their own group and at the memory, layer after layer.

    All groups go through the same weights; what a group puts out does not depend on which other
    groups are there.
    """

    def __init__(self, shape: TransformerShape, num_layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DecoderLayer(shape) for _ in range(num_layers))
        self.norm = nn.LayerNorm(shape.dim)

    def forward(
        self, memory: Memory, groups: tuple[QueryGroup, ...], record: bool = False
    ) -> tuple[tuple[DecodedLayer, ...], ...]:
        """The layers of each group, first layer first, each through the decoder's final norm."""
        contents = [group.content for group in groups]
        decoded: list[list[DecodedLayer]] = [[] for _ in groups]
        for layer in self.layers:
            assert isinstance(layer, DecoderLayer)
            view = layer.view_of(memory)
            for number, group in enumerate(groups):
                step = layer(contents[number], group, view, record)
                contents[number] = step.hidden
                decoded[number].append(
                    DecodedLayer(self.norm(step.hidden), step.self_attention, step.cross_attention)
                )
        return tuple(tuple(layers) for layers in decoded)


@dataclass(frozen=True)
class MemoryView:
    """The memory as one decoder layer sees it, computed once for all groups."""

    keys: Float[Tensor, "batch heads tokens head_dim"]
    values: Float[Tensor, "batch heads tokens head_dim"]
    hidden: Bool[Tensor, "batch 1 1 tokens"]


class EncoderLayer(nn.Module):
    """Self-attention and a feed-forward network, each with a residual sum."""

    def __init__(self, shape: TransformerShape) -> None:
        super().__init__()
        self.self_attention = Attention(shape.dim, shape.num_heads, shape.dropout)
        self.feedforward = FeedForward(shape)
        self.norm1 = _Norm(shape)
        self.norm2 = _Norm(shape)
        self.dropout = nn.Dropout(shape.dropout)

    def forward(
        self,
        tokens: Float[Tensor, "batch tokens dim"],
        position: Float[Tensor, "batch tokens dim"],
        hidden: Bool[Tensor, "batch 1 1 tokens"],
    ) -> Float[Tensor, "batch tokens dim"]:
        """The tokens after this layer."""
        before = self.norm1.before(tokens)
        queries, keys = self.self_attention.project_queries_and_keys(before + position)
        values = self.self_attention.project_values(before)
        looked = self.self_attention(queries, keys, values, hidden)
        tokens = self.norm1.after(tokens + self.dropout(looked))
        thought = self.feedforward(self.norm2.before(tokens))
        return self.norm2.after(tokens + self.dropout(thought))


class DecoderLayer(nn.Module):
    """Self-attention within a group, cross-attention to the memory, a feed-forward network."""

    def __init__(self, shape: TransformerShape) -> None:
        super().__init__()
        self.self_attention = Attention(shape.dim, shape.num_heads, shape.dropout)
        self.cross_attention = Attention(shape.dim, shape.num_heads, shape.dropout)
        self.feedforward = FeedForward(shape)
        self.norm1 = _Norm(shape)
        self.norm2 = _Norm(shape)
        self.norm3 = _Norm(shape)
        self.dropout = nn.Dropout(shape.dropout)

    def view_of(self, memory: Memory) -> MemoryView:
        """Keys and values of the memory in this layer."""
        return MemoryView(
            keys=self.cross_attention.project_keys(memory.tokens + memory.position),
            values=self.cross_attention.project_values(memory.tokens),
            hidden=memory.padding[:, None, None, :],
        )

    def forward(
        self,
        content: Float[Tensor, "batch queries dim"],
        group: QueryGroup,
        memory: MemoryView,
        record: bool,
    ) -> DecodedLayer:
        """The states of the group's queries after this layer, not yet normalised."""
        before = self.norm1.before(content)
        queries, keys = self.self_attention.project_queries_and_keys(before + group.position)
        values = self.self_attention.project_values(before)
        intra = None if group.intra_mask is None else group.intra_mask[None, None]
        looked = self.self_attention(queries, keys, values, intra)
        content = self.norm1.after(content + self.dropout(looked))

        cross_queries = self.cross_attention.project_queries(
            self.norm2.before(content) + group.position
        )
        looked = self.cross_attention(cross_queries, memory.keys, memory.values, memory.hidden)
        content = self.norm2.after(content + self.dropout(looked))

        thought = self.feedforward(self.norm3.before(content))
        content = self.norm3.after(content + self.dropout(thought))
        if not record:
            return DecodedLayer(content)
        return DecodedLayer(
            content,
            self_attention=attention_weights(queries, keys, intra),
            cross_attention=attention_weights(cross_queries, memory.keys, memory.hidden),
        )


class FeedForward(nn.Module):
    """Two linear layers with ReLU and dropout between them."""

    def __init__(self, shape: TransformerShape) -> None:
        super().__init__()
        self.widen = nn.Linear(shape.dim, shape.feedforward_dim)
        self.narrow = nn.Linear(shape.feedforward_dim, shape.dim)
        self.dropout = nn.Dropout(shape.dropout)

    def forward(
        self, tokens: Float[Tensor, "batch tokens dim"]
    ) -> Float[Tensor, "batch tokens dim"]:
        """What is added to the tokens."""
        narrowed: Tensor = self.narrow(self.dropout(F.relu(self.widen(tokens))))
        return narrowed


class _Norm(nn.LayerNorm):
    """Layer normalisation in its place: before a sublayer (pre-norm) or after the residual sum."""

    def __init__(self, shape: TransformerShape) -> None:
        super().__init__(shape.dim)
        self.pre_norm = shape.pre_norm

    def before(self, tokens: Tensor) -> Tensor:
        return self(tokens) if self.pre_norm else tokens

    def after(self, tokens: Tensor) -> Tensor:
        return tokens if self.pre_norm else self(tokens)
