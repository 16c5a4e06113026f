"""The encoder of the DETR family, and what its layers share with those of the decoder, batch first.

Positions are added to queries and keys at every attention, never to values (Carion et al., ECCV
2020, 3.2, A.3). Post-norm (DETR) normalises after each residual sum, pre-norm (UP-DETR's public
weights) before each sublayer; pre-norm has one more norm after the encoder. Attention to cells is
dense, or deformable (Zhu et al., ICLR 2021): then queries sample around reference points.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from models.attention import Attention
from models.deformable_attention import DeformableAttention
from models.detector_settings import Activation, DecoderAttention, DetectorSettings
from models.heads import Perceptron
from models.structures import TokenSelection


@dataclass(frozen=True)
class SamplingShape:
    """How much deformable attention samples per query and head."""

    num_levels: int
    num_points: int
    """In each level."""


@dataclass(frozen=True)
class TransformerShape:
    """What the layers of an encoder or a decoder have in common."""

    dim: int
    num_heads: int
    feedforward_dim: int
    dropout: float
    pre_norm: bool
    sampling: SamplingShape | None = None
    """Of the attention to cells; None where it is dense."""
    conditional: bool = False
    """True where content and position are looked for apart (Conditional DETR's decoder)."""
    activation: Activation = "relu"


def encoder_shape(settings: DetectorSettings) -> TransformerShape:
    """The layers of a detector's encoder."""
    return shape_of(settings, settings.encoder_attention, settings.encoder_points)


def shape_of(
    settings: DetectorSettings, kind: DecoderAttention, num_points: int
) -> TransformerShape:
    """The layers of a transformer with that kind of attention to cells."""
    sampled = kind == "deformable"
    return TransformerShape(
        dim=settings.hidden_dim,
        num_heads=settings.num_heads,
        feedforward_dim=settings.feedforward_dim,
        dropout=settings.dropout,
        pre_norm=settings.pre_norm,
        sampling=SamplingShape(settings.feature_levels, num_points) if sampled else None,
        conditional=kind == "conditional",
        activation=settings.activation,
    )


@dataclass(frozen=True)
class Cells:
    """The cells of all levels as an encoder takes them in; see `Memory` for the axes."""

    tokens: Float[Tensor, "batch tokens dim"]
    position: Float[Tensor, "batch tokens dim"]
    padding: Bool[Tensor, "batch tokens"]
    spatial_shapes: tuple[tuple[int, int], ...]
    valid_ratios: Float[Tensor, "batch levels 2"]
    references: Float[Tensor, "batch tokens levels 2"] | None
    """Where each token samples around; None for a dense encoder."""


@dataclass(frozen=True)
class EncodedCells:
    """All tokens after the last layer and, if asked for, those updated after each layer."""

    tokens: Float[Tensor, "batch tokens dim"]
    updated: tuple[Float[Tensor, "batch updated dim"], ...]


class Encoder(nn.Module):
    """Self-attention over the cells of the feature maps; all of them, or a selection."""

    def __init__(
        self, shape: TransformerShape, num_layers: int, *, scales_positions: bool = False
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(shape) for _ in range(num_layers))
        self.norm = nn.LayerNorm(shape.dim) if shape.pre_norm else nn.Identity()
        self.position_scale: Perceptron | None = None
        if scales_positions and num_layers:
            self.position_scale = Perceptron(shape.dim, shape.dim, shape.dim, num_layers=2)

    def forward(
        self, cells: Cells, selection: TokenSelection | None = None, keep_layers: bool = False
    ) -> EncodedCells:
        """The tokens after all layers; nothing is read from padding.

        Of a selection only its tokens are updated, all others pass through unchanged and are still
        attended to (Sparse DETR, equation 4); all layers have the same selection. Of all tokens
        positions may be scaled, channel by channel, by what the tokens have become (DAB-DETR).
        """
        tokens = cells.tokens
        updated = take(tokens, selection)
        position = take(cells.position, selection)
        references = None if cells.references is None else take(cells.references, selection)
        after: list[Tensor] = []
        for layer in self.layers:
            here = position
            if self.position_scale is not None:
                here = position * self.position_scale(updated)
            updated = layer(updated, here, references, cells, tokens)
            tokens = put(tokens, updated, selection)
            if keep_layers:
                after.append(updated)
        return EncodedCells(self.norm(tokens), tuple(after))


def take(
    values: Float[Tensor, "batch tokens *rest"], selection: TokenSelection | None
) -> Float[Tensor, "batch selected *rest"]:
    """The values of the selected tokens; all of them without a selection."""
    if selection is None:
        return values
    return values[_rows(selection), selection.indices]


def put(
    tokens: Float[Tensor, "batch tokens dim"],
    updated: Float[Tensor, "batch selected dim"],
    selection: TokenSelection | None,
) -> Float[Tensor, "batch tokens dim"]:
    """The tokens with the kept ones of the selection replaced."""
    if selection is None:
        return updated
    now = torch.where(selection.kept[..., None], updated.to(tokens.dtype), take(tokens, selection))
    return tokens.index_put((_rows(selection), selection.indices), now)


class EncoderLayer(nn.Module):
    """Self-attention and a feed-forward network, each with a residual sum."""

    def __init__(self, shape: TransformerShape) -> None:
        super().__init__()
        self.self_attention = attention_to_cells(shape)
        self.feedforward = FeedForward(shape)
        self.norm1 = Norm(shape)
        self.norm2 = Norm(shape)
        self.dropout = nn.Dropout(shape.dropout)

    def forward(
        self,
        updated: Float[Tensor, "batch updated dim"],
        position: Float[Tensor, "batch updated dim"],
        references: Float[Tensor, "batch updated levels 2"] | None,
        cells: Cells,
        tokens: Float[Tensor, "batch tokens dim"],
    ) -> Float[Tensor, "batch updated dim"]:
        """The updated tokens after this layer; they attend to `tokens`, all of this moment."""
        looked = self._look(updated, position, references, cells, tokens)
        updated = self.norm1.after(updated + self.dropout(looked))
        thought = self.feedforward(self.norm2.before(updated))
        return self.norm2.after(updated + self.dropout(thought))

    def _look(
        self,
        updated: Tensor,
        position: Tensor,
        references: Tensor | None,
        cells: Cells,
        tokens: Tensor,
    ) -> Tensor:
        attention, before = self.self_attention, self.norm1.before(updated)
        if isinstance(attention, DeformableAttention):
            assert references is not None
            sampled: Tensor = attention(
                before + position,
                references,
                attention.project_values(tokens, cells.padding),
                cells.spatial_shapes,
            )
            return sampled
        hidden = cells.padding[:, None, None, :]
        if updated is tokens:
            queries, keys = attention.project_queries_and_keys(before + position)
            values = attention.project_values(before)
        else:
            everything = self.norm1.before(tokens)
            queries = attention.project_queries(before + position)
            keys = attention.project_keys(everything + cells.position)
            values = attention.project_values(everything)
        mixed: Tensor = attention(queries, keys, values, hidden)
        return mixed


class FeedForward(nn.Module):
    """Two linear layers with an activation and dropout between them."""

    def __init__(self, shape: TransformerShape) -> None:
        super().__init__()
        self.widen = nn.Linear(shape.dim, shape.feedforward_dim)
        self.narrow = nn.Linear(shape.feedforward_dim, shape.dim)
        self.activation = nn.PReLU() if shape.activation == "prelu" else nn.ReLU()
        self.dropout = nn.Dropout(shape.dropout)

    def forward(
        self, tokens: Float[Tensor, "batch tokens dim"]
    ) -> Float[Tensor, "batch tokens dim"]:
        """What is added to the tokens."""
        narrowed: Tensor = self.narrow(self.dropout(self.activation(self.widen(tokens))))
        return narrowed


class Norm(nn.LayerNorm):
    """Layer normalisation in its place: before a sublayer (pre-norm) or after the residual sum."""

    def __init__(self, shape: TransformerShape) -> None:
        super().__init__(shape.dim)
        self.pre_norm = shape.pre_norm

    def before(self, tokens: Tensor) -> Tensor:
        """What a sublayer gets."""
        return self(tokens) if self.pre_norm else tokens

    def after(self, tokens: Tensor) -> Tensor:
        """What follows the residual sum."""
        return tokens if self.pre_norm else self(tokens)


def attention_to_cells(shape: TransformerShape) -> Attention | DeformableAttention:
    """Dense or deformable attention to the cells of feature maps."""
    sampling = shape.sampling
    if sampling is None:
        return Attention(shape.dim, shape.num_heads, shape.dropout)
    return DeformableAttention(shape.dim, shape.num_heads, sampling.num_levels, sampling.num_points)


def _rows(selection: TokenSelection) -> Tensor:
    """The picture of each index, to broadcast with the indices."""
    return torch.arange(selection.indices.shape[0], device=selection.indices.device)[:, None]
