"""Encoder and decoder layers of the DETR family, batch first (Carion et al., ECCV 2020, 3.2, A.3).

Positions are added to queries and keys at every attention, never to values. Post-norm (DETR)
normalises after each residual sum, pre-norm (UP-DETR's public weights) before each sublayer;
pre-norm has one more norm after the encoder. Attention to cells is dense, or deformable (Zhu et
al., ICLR 2021): then queries sample around reference points, and the decoder has no last norm.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from models.attention import Attention, attention_weights
from models.deformable_attention import DeformableAttention, in_every_level
from models.detector_settings import AttentionKind, DetectorSettings
from models.heads import BoxHead, read_boxes
from models.structures import Memory, QueryGroup, Record, SampledAttention, TokenSelection


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


def encoder_shape(settings: DetectorSettings) -> TransformerShape:
    """The layers of a detector's encoder."""
    return _shape(settings, settings.encoder_attention, settings.encoder_points)


def decoder_shape(settings: DetectorSettings) -> TransformerShape:
    """The layers of a detector's decoder."""
    return _shape(settings, settings.decoder_attention, settings.decoder_points)


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


@dataclass(frozen=True)
class DecodedLayer:
    """One group's queries after one decoder layer and, if recorded, what they looked at."""

    hidden: Float[Tensor, "batch queries dim"]
    self_attention: Float[Tensor, "batch heads queries queries"] | None = None
    cross_attention: Float[Tensor, "batch heads queries tokens"] | SampledAttention | None = None
    reference: Float[Tensor, "batch queries coordinates"] | None = None
    """Where the layer looked around, in shares of the unpadded picture."""
    boxes: Float[Tensor, "batch queries 4"] | None = None
    """boxes_cxcywh, where they are refined from layer to layer."""


class Encoder(nn.Module):
    """Self-attention over the cells of the feature maps; all of them, or a selection."""

    def __init__(self, shape: TransformerShape, num_layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(shape) for _ in range(num_layers))
        self.norm = nn.LayerNorm(shape.dim) if shape.pre_norm else nn.Identity()

    def forward(
        self, cells: Cells, selection: TokenSelection | None = None, keep_layers: bool = False
    ) -> EncodedCells:
        """The tokens after all layers; nothing is read from padding.

        Of a selection only its tokens are updated, all others pass through unchanged and are still
        attended to (Sparse DETR, equation 4); all layers have the same selection.
        """
        tokens = cells.tokens
        updated = take(tokens, selection)
        position = take(cells.position, selection)
        references = None if cells.references is None else take(cells.references, selection)
        after: list[Tensor] = []
        for layer in self.layers:
            updated = layer(updated, position, references, cells, tokens)
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


class Decoder(nn.Module):
    """Object queries look at those of their own group and at the memory, layer after layer.

    All groups go through the same weights; what a group puts out does not depend on which other
    groups are there.
    """

    def __init__(self, shape: TransformerShape, num_layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DecoderLayer(shape) for _ in range(num_layers))
        self.norm = nn.LayerNorm(shape.dim) if shape.sampling is None else nn.Identity()

    def forward(
        self,
        memory: Memory,
        groups: tuple[QueryGroup, ...],
        record: Record = "nothing",
        box_heads: Sequence[BoxHead] | None = None,
    ) -> tuple[tuple[DecodedLayer, ...], ...]:
        """The layers of each group, first layer first, each through the decoder's final norm.

        With `box_heads`, one per layer, each layer's boxes are the references of the next, without
        a gradient from there (iterative bounding box refinement, Deformable DETR, A.4).
        """
        contents = [group.content for group in groups]
        references = [group.reference for group in groups]
        decoded: list[list[DecodedLayer]] = [[] for _ in groups]
        for depth, layer in enumerate(self.layers):
            assert isinstance(layer, DecoderLayer)
            view = layer.view_of(memory)
            for number, group in enumerate(groups):
                reference = references[number]
                step = layer(contents[number], group, reference, view, record)
                contents[number] = step.hidden
                hidden, boxes = self.norm(step.hidden), None
                if box_heads is not None:
                    boxes = read_boxes(box_heads[depth], hidden, reference)
                    references[number] = boxes.detach()
                decoded[number].append(
                    DecodedLayer(
                        hidden, step.self_attention, step.cross_attention, reference, boxes
                    )
                )
        return tuple(tuple(layers) for layers in decoded)


@dataclass(frozen=True)
class DenseView:
    """The memory as one dense decoder layer sees it, computed once for all groups."""

    keys: Float[Tensor, "batch heads tokens head_dim"]
    values: Float[Tensor, "batch heads tokens head_dim"]
    hidden: Bool[Tensor, "batch 1 1 tokens"]


@dataclass(frozen=True)
class SampledView:
    """The memory as one deformable decoder layer sees it, computed once for all groups."""

    values: Float[Tensor, "batch tokens heads head_dim"]
    spatial_shapes: tuple[tuple[int, int], ...]
    valid_ratios: Float[Tensor, "batch levels 2"]


class EncoderLayer(nn.Module):
    """Self-attention and a feed-forward network, each with a residual sum."""

    def __init__(self, shape: TransformerShape) -> None:
        super().__init__()
        self.self_attention = _attention_to_cells(shape)
        self.feedforward = FeedForward(shape)
        self.norm1 = _Norm(shape)
        self.norm2 = _Norm(shape)
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


class DecoderLayer(nn.Module):
    """Self-attention within a group, cross-attention to the memory, a feed-forward network."""

    def __init__(self, shape: TransformerShape) -> None:
        super().__init__()
        self.self_attention = Attention(shape.dim, shape.num_heads, shape.dropout)
        self.cross_attention = _attention_to_cells(shape)
        self.feedforward = FeedForward(shape)
        self.norm1 = _Norm(shape)
        self.norm2 = _Norm(shape)
        self.norm3 = _Norm(shape)
        self.dropout = nn.Dropout(shape.dropout)

    def view_of(self, memory: Memory) -> DenseView | SampledView:
        """What this layer reads of the memory."""
        attention = self.cross_attention
        if isinstance(attention, DeformableAttention):
            return SampledView(
                values=attention.project_values(memory.tokens, memory.padding),
                spatial_shapes=memory.spatial_shapes,
                valid_ratios=memory.valid_ratios,
            )
        return DenseView(
            keys=attention.project_keys(memory.tokens + memory.position),
            values=attention.project_values(memory.tokens),
            hidden=memory.padding[:, None, None, :],
        )

    def forward(
        self,
        content: Float[Tensor, "batch queries dim"],
        group: QueryGroup,
        reference: Float[Tensor, "batch queries coordinates"] | None,
        memory: DenseView | SampledView,
        record: Record,
    ) -> DecodedLayer:
        """The states of the group's queries after this layer, not yet normalised."""
        before = self.norm1.before(content)
        queries, keys = self.self_attention.project_queries_and_keys(before + group.position)
        values = self.self_attention.project_values(before)
        intra = None if group.intra_mask is None else group.intra_mask[None, None]
        looked = self.self_attention(queries, keys, values, intra)
        content = self.norm1.after(content + self.dropout(looked))

        searching = self.norm2.before(content) + group.position
        looked, seen = self._look(searching, reference, memory, record != "nothing")
        content = self.norm2.after(content + self.dropout(looked))

        thought = self.feedforward(self.norm3.before(content))
        content = self.norm3.after(content + self.dropout(thought))
        between = attention_weights(queries, keys, intra) if record == "all" else None
        return DecodedLayer(content, self_attention=between, cross_attention=seen)

    def _look(
        self,
        queries: Tensor,
        reference: Tensor | None,
        memory: DenseView | SampledView,
        record: bool,
    ) -> tuple[Tensor, Tensor | SampledAttention | None]:
        """What the queries take from the memory and, if recorded, where from."""
        attention = self.cross_attention
        if isinstance(attention, DeformableAttention):
            assert isinstance(memory, SampledView)
            assert reference is not None
            references = in_every_level(reference, memory.valid_ratios)
            shapes = memory.spatial_shapes
            looked = attention(queries, references, memory.values, shapes)
            return looked, attention.looked_at(queries, references, shapes) if record else None
        assert isinstance(memory, DenseView)
        projected = attention.project_queries(queries)
        looked = attention(projected, memory.keys, memory.values, memory.hidden)
        seen = attention_weights(projected, memory.keys, memory.hidden) if record else None
        return looked, seen


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


def _shape(settings: DetectorSettings, kind: AttentionKind, num_points: int) -> TransformerShape:
    sampled = kind == "deformable"
    return TransformerShape(
        dim=settings.hidden_dim,
        num_heads=settings.num_heads,
        feedforward_dim=settings.feedforward_dim,
        dropout=settings.dropout,
        pre_norm=settings.pre_norm,
        sampling=SamplingShape(settings.feature_levels, num_points) if sampled else None,
    )


def _attention_to_cells(shape: TransformerShape) -> Attention | DeformableAttention:
    sampling = shape.sampling
    if sampling is None:
        return Attention(shape.dim, shape.num_heads, shape.dropout)
    return DeformableAttention(shape.dim, shape.num_heads, sampling.num_levels, sampling.num_points)


def _rows(selection: TokenSelection) -> Tensor:
    """The picture of each index, to broadcast with the indices."""
    return torch.arange(selection.indices.shape[0], device=selection.indices.device)[:, None]
