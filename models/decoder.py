"""The one decoder of the DETR family, batch first (Carion et al., ECCV 2020, 3.2, A.3).

Detectors differ in two parts of a layer: how queries look at the memory (dense, conditional or
deformable attention) and where queries are (`models.query_positions`). Positions are added to
queries and keys, never to values; conditional attention sets them beside contents. A deformable
decoder has no last norm.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import assert_never

from jaxtyping import Bool, Float
from torch import Tensor, nn

from models.attention import Attention, attention_weights
from models.conditional_attention import ConditionalCrossAttention, ConditionalSelfAttention
from models.deformable_attention import DeformableAttention, in_every_level
from models.detector_settings import DetectorSettings
from models.heads import BoxHead
from models.query_positions import (
    PositionKind,
    QueryPlace,
    References,
    moved,
    place_of,
    query_positions,
)
from models.structures import Memory, QueryGroup, Record, SampledAttention
from models.transformer import FeedForward, Norm, TransformerShape, attention_to_cells, shape_of


def decoder_shape(settings: DetectorSettings) -> TransformerShape:
    """The layers of a detector's decoder."""
    return shape_of(settings, settings.decoder_attention, settings.decoder_points)


def position_kind(settings: DetectorSettings) -> PositionKind:
    """How a detector's decoder learns where its queries are."""
    if settings.query_kind == "anchor":
        return "anchor"
    return "conditional" if settings.decoder_attention == "conditional" else "given"


@dataclass(frozen=True)
class DecodedLayer:
    """One group's queries after one decoder layer and, if recorded, what they looked at."""

    hidden: Float[Tensor, "batch queries dim"]
    self_attention: Float[Tensor, "batch heads queries queries"] | None = None
    cross_attention: Float[Tensor, "batch heads queries tokens"] | SampledAttention | None = None
    reference: Float[Tensor, "batch queries coordinates"] | None = None
    """Where the layer looked around and its boxes begin, in shares of the unpadded picture."""
    boxes: Float[Tensor, "batch queries 4"] | None = None
    """boxes_cxcywh, where they are refined from layer to layer."""


class Decoder(nn.Module):
    """Object queries look at those of their own group and at the memory, layer after layer.

    All groups go through the same weights; what a group puts out does not depend on which other
    groups are there.
    """

    def __init__(
        self, shape: TransformerShape, num_layers: int, positions: PositionKind = "given"
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DecoderLayer(shape, first=n == 0) for n in range(num_layers))
        self.norm = nn.LayerNorm(shape.dim) if shape.sampling is None else nn.Identity()
        self.positions = query_positions(positions, shape.dim, num_layers)

    def forward(
        self,
        memory: Memory,
        groups: tuple[QueryGroup, ...],
        record: Record = "nothing",
        box_heads: Sequence[BoxHead] | None = None,
    ) -> tuple[tuple[DecodedLayer, ...], ...]:
        """The layers of each group, first layer first, each through the decoder's final norm.

        With `box_heads`, one per layer, a layer's boxes are the references of the next (iterative
        bounding box refinement, Deformable DETR, A.4; anchors, DAB-DETR, 4.3).
        """
        contents = [group.content for group in groups]
        references = [References(group.reference, group.reference) for group in groups]
        decoded: list[list[DecodedLayer]] = [[] for _ in groups]
        for depth, layer in enumerate(self.layers):
            assert isinstance(layer, DecoderLayer)
            view = layer.view_of(memory)
            for number, group in enumerate(groups):
                content, now = contents[number], references[number]
                place = place_of(
                    self.positions, content, group.position, now.around, first=depth == 0
                )
                step = layer(content, place, now.around, group.intra_mask, view, record)
                contents[number] = step.hidden
                hidden, boxes = self.norm(step.hidden), None
                if box_heads is not None:
                    boxes, references[number] = moved(
                        self.positions, box_heads[depth], step.hidden, hidden, now
                    )
                decoded[number].append(
                    DecodedLayer(
                        hidden, step.self_attention, step.cross_attention, now.start, boxes
                    )
                )
        return tuple(tuple(layers) for layers in decoded)


@dataclass(frozen=True)
class DenseView:
    """The memory as one layer without sampling sees it, computed once for all groups."""

    keys: Float[Tensor, "batch heads tokens key_dim"]
    values: Float[Tensor, "batch heads tokens head_dim"]
    hidden: Bool[Tensor, "batch 1 1 tokens"]


@dataclass(frozen=True)
class SampledView:
    """The memory as one deformable decoder layer sees it, computed once for all groups."""

    values: Float[Tensor, "batch tokens heads head_dim"]
    spatial_shapes: tuple[tuple[int, int], ...]
    valid_ratios: Float[Tensor, "batch levels 2"]


class DecoderLayer(nn.Module):
    """Self-attention within a group, cross-attention to the memory, a feed-forward network."""

    def __init__(self, shape: TransformerShape, *, first: bool = False) -> None:
        super().__init__()
        size = (shape.dim, shape.num_heads, shape.dropout)
        self.self_attention: Attention | ConditionalSelfAttention
        self.cross_attention: Attention | ConditionalCrossAttention | DeformableAttention
        if shape.conditional:
            self.self_attention = ConditionalSelfAttention(*size)
            self.cross_attention = ConditionalCrossAttention(*size, first=first)
        else:
            self.self_attention = Attention(*size)
            self.cross_attention = attention_to_cells(shape)
        self.feedforward = FeedForward(shape)
        self.norm1 = Norm(shape)
        self.norm2 = Norm(shape)
        self.norm3 = Norm(shape)
        self.dropout = nn.Dropout(shape.dropout)

    def view_of(self, memory: Memory) -> DenseView | SampledView:
        """What this layer reads of the memory."""
        attention = self.cross_attention
        hidden = memory.padding[:, None, None, :]
        match attention:
            case DeformableAttention():
                return SampledView(
                    values=attention.project_values(memory.tokens, memory.padding),
                    spatial_shapes=memory.spatial_shapes,
                    valid_ratios=memory.valid_ratios,
                )
            case ConditionalCrossAttention():
                keys = attention.project_keys(memory.tokens, memory.position)
            case Attention():
                keys = attention.project_keys(memory.tokens + memory.position)
            case _:
                assert_never(attention)
        return DenseView(keys, attention.project_values(memory.tokens), hidden)

    def forward(
        self,
        content: Float[Tensor, "batch queries dim"],
        place: QueryPlace,
        reference: Float[Tensor, "batch queries coordinates"] | None,
        intra_mask: Bool[Tensor, "queries queries"] | None,
        memory: DenseView | SampledView,
        record: Record,
    ) -> DecodedLayer:
        """The states of a group's queries after this layer, not yet normalised."""
        among = self.self_attention.project_among(self.norm1.before(content), place.position)
        intra = None if intra_mask is None else intra_mask[None, None]
        looked = self.self_attention(among.queries, among.keys, among.values, intra)
        content = self.norm1.after(content + self.dropout(looked))

        searching = self.norm2.before(content)
        looked, seen = self._look(searching, place, reference, memory, record)
        content = self.norm2.after(content + self.dropout(looked))

        thought = self.feedforward(self.norm3.before(content))
        content = self.norm3.after(content + self.dropout(thought))
        between = None
        if record == "all":
            between = attention_weights(among.queries, among.keys, intra)
        return DecodedLayer(content, self_attention=between, cross_attention=seen)

    def _look(
        self,
        content: Tensor,
        place: QueryPlace,
        reference: Tensor | None,
        memory: DenseView | SampledView,
        record: Record,
    ) -> tuple[Tensor, Tensor | SampledAttention | None]:
        """What the queries take from the memory and, if recorded, where from."""
        attention = self.cross_attention
        match attention:
            case DeformableAttention():
                assert isinstance(memory, SampledView)
                assert reference is not None
                queries = content + place.position
                references = in_every_level(reference, memory.valid_ratios)
                shapes = memory.spatial_shapes
                looked = attention(queries, references, memory.values, shapes)
                if record == "nothing":
                    return looked, None
                keep_graph = record == "all"
                seen = attention.looked_at(queries, references, shapes, keep_graph=keep_graph)
                return looked, seen
            case ConditionalCrossAttention():
                assert place.sine is not None
                queries = attention.project_queries(content, place.position, place.sine)
            case Attention():
                queries = attention.project_queries(content + place.position)
            case _:
                assert_never(attention)
        assert isinstance(memory, DenseView)
        looked = attention(queries, memory.keys, memory.values, memory.hidden)
        if record == "nothing":
            return looked, None
        return looked, attention_weights(queries, memory.keys, memory.hidden)
