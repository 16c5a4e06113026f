"""Packed patch batches: pictures and query patches in one buffer (`data.packing`), and back."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float32, Int64, UInt8
from torch import Tensor

from data.colour import DRAW_COLUMNS, pack_draws
from data.device_colour import colour_on_device
from data.normalise import normalised, normalised_images
from data.packing import (
    BLANK_ID,
    BLANK_SIDE,
    ArrayShape,
    SkippedPicture,
    arrays_in,
    empty_buffer,
    place_picture,
)
from data.patches import PatchSample
from models.structures import PatchBatch, Targets


@dataclass(frozen=True)
class CutPicture:
    """A picture that is ready to be packed."""

    stream: int
    """Its stream, which is its place in the global batch."""
    id: int
    key: str
    sample: PatchSample


@dataclass(frozen=True)
class BatchShape:
    """Sizes of the arrays in a packed batch."""

    count: int
    """Pictures."""
    height: int
    """Pixels of the largest picture."""
    width: int
    num_patches: int
    patch_size: int
    has_draws: bool
    """Whether the patches' colours are still to be changed on the device."""


@dataclass(frozen=True)
class PackedPatchBatch:
    """A batch, or one loader process's part of it; `views_of` gives the arrays in its buffer."""

    buffer: UInt8[Tensor, " bytes"]
    shape: BatchShape
    step: int
    """Number of the global batch since the beginning of the run."""
    streams: tuple[int, ...]
    """Stream of each picture, rising: the place in the global batch."""
    keys: tuple[str, ...]
    """Name of each picture in its shard."""
    skipped: tuple[SkippedPicture, ...] = ()
    """Pictures of this batch that could not be used; nothing takes their place."""
    blank: bool = False
    """True where all pictures were skipped: one empty picture stands in, without key or stream."""
    counts: Mapping[str, int] = field(default_factory=dict)
    """What else is counted: nothing, for patches."""

    @property
    def count(self) -> int:
        """Pictures of the stream; the blank one is none."""
        return len(self.keys)


@dataclass(frozen=True)
class BatchViews:
    """The arrays of a packed batch, as views of its buffer."""

    ids: Int64[Tensor, " batch"]
    sizes: Int64[Tensor, "batch 2"]
    """(height, width) of each picture in pixels, before padding."""
    boxes_cxcywh: Float32[Tensor, "batch patches 4"]
    """Of the patches, normalised to the unpadded picture."""
    draws: Float32[Tensor, "batch patches columns"]
    """Colour changes for the device (`data.colour.pack_draws`); no columns where none are left."""
    pictures: UInt8[Tensor, "batch height width 3"]
    """RGB, 0 on the padding at the bottom and the right."""
    patches: UInt8[Tensor, "batch patches side side 3"]


def pack(
    pictures: Sequence[CutPicture],
    skipped: Sequence[SkippedPicture],
    step: int,
    num_patches: int,
    patch_size: int,
    shared: bool = False,
) -> PackedPatchBatch:
    """Pictures in the order of their streams, padded to one size; there may be none.

    `shared` packs into shared memory at once, see `data.packing.empty_buffer`.
    """
    samples = [picture.sample for picture in pictures]
    shape = BatchShape(
        count=len(samples),
        height=max((sample.picture.shape[0] for sample in samples), default=0),
        width=max((sample.picture.shape[1] for sample in samples), default=0),
        num_patches=num_patches,
        patch_size=patch_size,
        has_draws=any(sample.colours is not None for sample in samples),
    )
    packed = PackedPatchBatch(
        buffer=empty_buffer(_arrays(shape), shared=shared),
        shape=shape,
        step=step,
        streams=tuple(picture.stream for picture in pictures),
        keys=tuple(picture.key for picture in pictures),
        skipped=tuple(skipped),
    )
    views = views_of(packed)
    arrays = {name: view.numpy() for name, view in vars(views).items()}
    for row, picture in enumerate(pictures):
        sample = picture.sample
        arrays["ids"][row] = picture.id
        arrays["sizes"][row] = sample.picture.shape[:2]
        arrays["boxes_cxcywh"][row] = sample.boxes_cxcywh
        arrays["patches"][row] = sample.patches
        place_picture(arrays["pictures"][row], sample.picture)
        if sample.colours is not None:
            arrays["draws"][row] = pack_draws(sample.colours)
    return packed


def join(parts: Sequence[PackedPatchBatch], pin: bool = False) -> PackedPatchBatch:
    """The parts of one step as one batch in the order of the streams, in pinned memory if asked.

    Where no part holds a picture, the batch is `blank`: one black picture, its patches black, each
    box the whole picture.
    """
    if len(parts) == 1 and parts[0].shape.count and not pin:
        return parts[0]
    places = sorted(
        (stream, number, row)
        for number, part in enumerate(parts)
        for row, stream in enumerate(part.streams)
    )
    skipped = tuple(picture for part in parts for picture in part.skipped)
    if not places:
        return _blank(parts[0], skipped, pin)
    shape = _common_shape([part.shape for part in parts])
    joined = PackedPatchBatch(
        buffer=empty_buffer(_arrays(shape), pin),
        shape=shape,
        step=parts[0].step,
        streams=tuple(stream for stream, _, _ in places),
        keys=tuple(parts[number].keys[row] for _, number, row in places),
        skipped=skipped,
    )
    sources = [views_of(part) for part in parts]
    target = views_of(joined)
    for row, (_, number, source_row) in enumerate(places):
        _copy_row(target, row, sources[number], source_row)
    return joined


def views_of(packed: PackedPatchBatch) -> BatchViews:
    """The arrays in the buffer of a packed batch; they share its memory."""
    return _views(packed.buffer, packed.shape)


def to_device(packed: PackedPatchBatch, device: torch.device) -> PatchBatch:
    """The batch on its device: one copy, normalised by ImageNet's mean and deviation, padding 0.

    Pixels come out channels-last. Colour changes that the loader left to the device are made here.
    """
    host = views_of(packed)
    on_device = _views(packed.buffer.to(device, non_blocking=True), packed.shape)
    count, num_patches = on_device.patches.shape[:2]
    patches = on_device.patches.flatten(0, 1).permute(0, 3, 1, 2)
    if packed.shape.has_draws:
        levels = colour_on_device(patches, host.draws.flatten(0, 1))
    else:
        levels = patches.to(torch.float32)
    labels = torch.ones(num_patches, dtype=torch.int64, device=device)
    return PatchBatch(
        images=normalised_images(on_device.pictures, on_device.sizes),
        patches=normalised(levels).view(count, num_patches, *levels.shape[1:]),
        targets=Targets(tuple(on_device.boxes_cxcywh.unbind()), (labels,) * count),
        keys=packed.keys,
        sample_ids=host.ids,
        skipped=tuple(picture.key for picture in packed.skipped),
        blank=packed.blank,
        # The empty picture has no place; what is drawn for it counts for nothing.
        places=packed.streams or (0,),
    )


def _views(buffer: UInt8[Tensor, " bytes"], shape: BatchShape) -> BatchViews:
    return BatchViews(**arrays_in(buffer, _arrays(shape)))


def _arrays(shape: BatchShape) -> list[ArrayShape]:
    count, num_patches, side = shape.count, shape.num_patches, shape.patch_size
    return [
        ArrayShape("ids", torch.int64, (count,)),
        ArrayShape("sizes", torch.int64, (count, 2)),
        ArrayShape("boxes_cxcywh", torch.float32, (count, num_patches, 4)),
        ArrayShape("draws", torch.float32, (count, num_patches, DRAW_COLUMNS * shape.has_draws)),
        ArrayShape("pictures", torch.uint8, (count, shape.height, shape.width, 3)),
        ArrayShape("patches", torch.uint8, (count, num_patches, side, side, 3)),
    ]


def _copy_row(target: BatchViews, row: int, source: BatchViews, source_row: int) -> None:
    for name in ("ids", "sizes", "boxes_cxcywh", "draws", "patches"):
        vars(target)[name][row] = vars(source)[name][source_row]
    height, width = source.sizes[source_row].tolist()
    picture = source.pictures[source_row, :height, :width]
    place_picture(target.pictures[row].numpy(), picture.numpy())


def _common_shape(shapes: Sequence[BatchShape]) -> BatchShape:
    return BatchShape(
        count=sum(shape.count for shape in shapes),
        height=max(shape.height for shape in shapes),
        width=max(shape.width for shape in shapes),
        num_patches=shapes[0].num_patches,
        patch_size=shapes[0].patch_size,
        has_draws=any(shape.has_draws for shape in shapes),
    )


def _blank(
    part: PackedPatchBatch, skipped: tuple[SkippedPicture, ...], pin: bool
) -> PackedPatchBatch:
    num_patches, side = part.shape.num_patches, part.shape.patch_size
    shape = BatchShape(1, BLANK_SIDE, BLANK_SIDE, num_patches, side, has_draws=False)
    buffer = empty_buffer(_arrays(shape), pin).zero_()
    blank = PackedPatchBatch(buffer, shape, part.step, (), (), skipped, blank=True)
    views = views_of(blank)
    views.ids[0] = BLANK_ID
    views.sizes[0] = BLANK_SIDE
    views.boxes_cxcywh[0] = torch.tensor([0.5, 0.5, 1.0, 1.0])
    return blank
