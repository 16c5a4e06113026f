"""The nouns that cross borders between floors; each axis word means the same thing in every file.

Boxes are `boxes_cxcywh` (normalised to the unpadded picture, never to the padded batch) or
`boxes_xyxy` (pixels). Padding masks are True on padding, as in DETR.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, Self

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int16, Int64
from torch import Tensor

Record = Literal["nothing", "cross", "all"]
"""Which attention a decoder hands out: none, that to the memory, or that among queries too."""


@dataclass(frozen=True)
class Images:
    """A batch of normalised pictures, padded with zeros at the bottom and the right to one size."""

    pixels: Float[Tensor, "batch 3 height width"]
    padding: Bool[Tensor, "batch height width"]
    sizes: Int64[Tensor, "batch 2"]
    """(height, width) of each picture before padding, in pixels."""

    @property
    def extent(self) -> tuple[int, int]:
        """(height, width) of the padded pictures, in pixels."""
        return self.pixels.shape[2], self.pixels.shape[3]

    def part(self, rows: slice) -> "Images":
        """Some of the pictures, padded as they are."""
        return Images(self.pixels[rows], self.padding[rows], self.sizes[rows])

    def padded(self, height: int, width: int) -> "Images":
        """The pictures padded to a size that is not below theirs."""
        more = (0, width - self.extent[1], 0, height - self.extent[0])
        padding = F.pad(self.padding, more, value=True)
        return Images(F.pad(self.pixels, more), padding, self.sizes)


@dataclass(frozen=True)
class Targets:
    """What each picture of a batch holds: one tensor of boxes and one of labels per picture."""

    boxes_cxcywh: tuple[Float[Tensor, "_ 4"], ...]
    """Normalised to the size of the unpadded picture."""
    labels: tuple[Int64[Tensor, " _"], ...]

    def part(self, rows: slice) -> "Targets":
        """What some of the pictures hold."""
        return Targets(self.boxes_cxcywh[rows], self.labels[rows])


@dataclass(frozen=True)
class PatchBatch:
    """Pictures on the training device and the query patches cut from them (UP-DETR, 3.2)."""

    images: Images
    patches: Float[Tensor, "batch patches 3 side side"]
    targets: Targets
    """The patches' own boxes; every label is 1, "matches a patch"."""
    keys: tuple[str, ...]
    """Name of each picture in its shard, for messages and for proving the order."""
    sample_ids: Int64[Tensor, " batch"]
    """Position of each picture in the shard index."""
    skipped: tuple[str, ...] = ()
    """Keys of the pictures of this batch that could not be decoded: counted, never replaced."""
    blank: bool = False
    """True where all pictures of this rank were broken: an empty one stands in, with weight 0."""
    places: tuple[int, ...] | None = None
    """Place of each picture in the batch of all workers, by which what is drawn for it is found;
    None where this is that whole batch.
    """

    @property
    def extent(self) -> tuple[int, int]:
        """(height, width) that pictures are padded to, in pixels; 0 of what counts for nothing."""
        return (0, 0) if self.blank else self.images.extent

    def part(self, rows: slice) -> Self:
        """Some of the pictures, padded as they are."""
        return replace(
            self,
            images=self.images.part(rows),
            patches=self.patches[rows],
            targets=self.targets.part(rows),
            keys=self.keys[rows],
            sample_ids=self.sample_ids[rows],
            skipped=(),
            places=None if self.places is None else self.places[rows],
        )

    def padded(self, height: int, width: int) -> Self:
        """Padded to a size; a larger picture that counts for nothing stays as it is."""
        return replace(self, images=_padded(self.images, height, width))


@dataclass(frozen=True)
class Classes:
    """The classes of a detector. Label n, 0 first, is `names[n]`, and `ids[n]` in its data."""

    names: tuple[str, ...]
    """One name per class, no two alike."""
    ids: tuple[int, ...]
    """The numbers that the data give them, with gaps or not: 1..90 for COCO's 80, 1..20 for VOC."""
    things: tuple[bool, ...] | None = None
    """Panoptic data: True for what can be counted, False for stuff; None where all are things."""

    def __post_init__(self) -> None:
        """Raises ValueError where names or ids come twice, or are not equally many."""
        for what, found in (("name", self.names), ("id", self.ids)):
            twice = sorted({str(one) for one in found if found.count(one) > 1})
            if twice:
                raise ValueError(f"the {what} {twice[0]} stands for two classes; give each its own")
        if len(self.names) != len(self.ids):
            raise ValueError(f"{len(self.names)} class names and {len(self.ids)} ids: give as many")
        if self.things is not None and len(self.things) != len(self.names):
            raise ValueError(
                f"{len(self.names)} class names, {len(self.things)} of them marked as thing or "
                "stuff: mark all or none"
            )


@dataclass(frozen=True)
class DetectionBatch:
    """Pictures on the training device and what is to be found in them."""

    images: Images
    targets: Targets
    """Labels are those of `Classes`; without crowds, and without boxes that have no area."""
    keys: tuple[str, ...]
    """Name of each picture, for messages and for proving the order."""
    sample_ids: Int64[Tensor, " batch"]
    """Position of each picture in its index."""
    query_patches: Float[Tensor, "batch patches 3 side side"] | None = None
    """One-shot detection: a crop of the class that is asked for, one per picture."""
    segments: Int16[Tensor, "batch height width"] | None = None
    """Panoptic segmentation: number of the target at each pixel, 1 first; 0 for none."""
    skipped: tuple[str, ...] = ()
    """Keys of the pictures of this batch that could not be used: counted, never replaced."""
    blank: bool = False
    """True where all pictures of this rank were broken: an empty one stands in, with weight 0."""

    @property
    def extent(self) -> tuple[int, int]:
        """(height, width) that pictures are padded to, in pixels; 0 of what counts for nothing."""
        return (0, 0) if self.blank else self.images.extent

    def part(self, rows: slice) -> Self:
        """Some of the pictures, padded as they are."""
        return replace(
            self,
            images=self.images.part(rows),
            targets=self.targets.part(rows),
            keys=self.keys[rows],
            sample_ids=self.sample_ids[rows],
            query_patches=None if self.query_patches is None else self.query_patches[rows],
            segments=None if self.segments is None else self.segments[rows],
            skipped=(),
        )

    def padded(self, height: int, width: int) -> Self:
        """Padded to a size; a larger picture that counts for nothing stays as it is."""
        images, segments = _padded(self.images, height, width), self.segments
        if segments is not None:
            more = (
                0,
                images.extent[1] - segments.shape[2],
                0,
                images.extent[0] - segments.shape[1],
            )
            segments = F.pad(segments, more)
        return replace(self, images=images, segments=segments)


@dataclass(frozen=True)
class TokenPredictions:
    """Boxes that tokens say, without a decoder."""

    logits: Float[Tensor, "batch tokens classes"]
    boxes: Float[Tensor, "batch tokens 4"]
    """boxes_cxcywh, normalised to the unpadded picture; all ones where a token must not propose."""


@dataclass(frozen=True)
class TokenSelection:
    """The tokens that the encoder updates; the others pass through unchanged (Sparse DETR, 3.2)."""

    indices: Int64[Tensor, "batch selected"]
    """Ascending; as many for every picture as the batch's fullest one selects."""
    kept: Bool[Tensor, "batch selected"]
    """False for those that only fill up a picture that selects fewer."""
    scores: Float[Tensor, "batch tokens"] | None
    """What the scoring network says of every token, as logits; None where nothing is learned."""


@dataclass(frozen=True)
class Memory:
    """Encoder output, one token per feature cell, row-major, levels one after the other."""

    tokens: Float[Tensor, "batch tokens dim"]
    position: Float[Tensor, "batch tokens dim"]
    padding: Bool[Tensor, "batch tokens"]
    spatial_shapes: tuple[tuple[int, int], ...]
    """(height, width) of each level in cells."""
    valid_ratios: Float[Tensor, "batch levels 2"]
    """Share of each level's (height, width) that is not padding."""
    selection: TokenSelection | None = None
    """Sparse DETR: the tokens that the encoder updated."""
    proposals: TokenPredictions | None = None
    """Two-stage: what every token proposes after the encoder."""
    encoder_layers: tuple[TokenPredictions, ...] = ()
    """What the selected tokens say after each encoder layer but the last; in training alone."""
    objectness: TokenPredictions | None = None
    """What every token says before the encoder, where that is the criterion of the selection."""


@dataclass(frozen=True)
class QueryGroup:
    """Object queries that share the decoder with other groups and never see them."""

    name: str
    content: Float[Tensor, "batch queries dim"]
    position: Float[Tensor, "batch queries dim"] | None
    """None of anchors: there the decoder makes it of the reference."""
    reference: Float[Tensor, "batch queries coordinates"] | None = None
    """Points (x, y) or boxes_cxcywh to look around, in shares of the picture; None in DETR."""
    intra_mask: Bool[Tensor, "queries queries"] | None = None
    """True where a query (row) must not attend to a query (column) of the same group."""


@dataclass(frozen=True)
class LearnedQueries:
    """The object queries that do not come from the picture."""

    position: Float[Tensor, "queries dim"] | None
    """None of anchors, which are their reference."""
    content: Float[Tensor, "queries dim"]
    reference: Float[Tensor, "queries coordinates"] | None
    """Where each looks around, in shares of the picture: (x, y), of anchors boxes_cxcywh; None in a
    dense decoder.
    """

    def of_pictures(self, name: str, batch: int) -> QueryGroup:
        """A group of them, the same in every picture of a batch."""
        return QueryGroup(
            name,
            content=self.content.expand(batch, -1, -1),
            position=None if self.position is None else self.position.expand(batch, -1, -1),
            reference=None if self.reference is None else self.reference.expand(batch, -1, -1),
        )


@dataclass(frozen=True)
class SampledAttention:
    """Where deformable attention looked: sampling locations, and how much each of them counts."""

    locations: Float[Tensor, "batch queries heads levels points 2"]
    """(x, y), normalised to the padded level: the centre of its first cell is at half a cell."""
    weights: Float[Tensor, "batch queries heads levels points"]
    """Sum to 1 over the levels and points of a head."""


@dataclass(frozen=True)
class LayerOutput:
    """What one decoder layer says about each query."""

    hidden: Float[Tensor, "batch queries dim"]
    logits: Float[Tensor, "batch queries classes"]
    boxes: Float[Tensor, "batch queries 4"]
    """boxes_cxcywh, normalised to the unpadded picture."""
    reference: Float[Tensor, "batch queries coordinates"] | None = None
    self_attention: Float[Tensor, "batch heads queries queries"] | None = None
    cross_attention: Float[Tensor, "batch heads queries tokens"] | SampledAttention | None = None


@dataclass(frozen=True)
class GroupOutput:
    """The outputs of one query group, first decoder layer first."""

    name: str
    layers: tuple[LayerOutput, ...]


@dataclass(frozen=True)
class DetectorOutput:
    """Everything that a detector says about a batch."""

    groups: tuple[GroupOutput, ...]
    memory: Memory


@dataclass(frozen=True)
class Losses:
    """The weighted sum that is differentiated and every term by name, unweighted."""

    total: Float[Tensor, ""]
    terms: Mapping[str, Float[Tensor, ""]] = field(default_factory=dict)


def _padded(images: Images, height: int, width: int) -> Images:
    own_height, own_width = images.extent
    return images.padded(max(height, own_height), max(width, own_width))


def padding_of(
    sizes: Int64[Tensor, "batch 2"], height: int, width: int
) -> Bool[Tensor, "batch height width"]:
    """The padding mask of pictures of the given sizes in a batch of height x width pixels."""
    rows = torch.arange(height, device=sizes.device)[None, :, None] >= sizes[:, 0, None, None]
    columns = torch.arange(width, device=sizes.device)[None, None, :] >= sizes[:, 1, None, None]
    return rows | columns
