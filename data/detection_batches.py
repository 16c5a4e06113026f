"""Packed detection batches: pictures and their targets in one buffer (`data.packing`), and back.

One-shot detection adds query crops, panoptic segmentation the segments. Boxes and labels of all
pictures lie one after the other; how many each has is known without asking the device, so that
nothing waits for it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float32, Int16, Int64, UInt8
from torch import Tensor

from data.detection_transforms import BoxedPicture
from data.normalise import normalised, normalised_images
from data.packing import (
    BLANK_ID,
    BLANK_SIDE,
    ArrayShape,
    SkippedPicture,
    added_counts,
    arrays_in,
    empty_buffer,
    place_picture,
)
from models.structures import DetectionBatch, Targets


@dataclass(frozen=True)
class ReadyPicture:
    """A picture as the detector will see it, with what is to be found in it."""

    stream: int
    """Its stream, which is its place in the global batch."""
    id: int
    key: str
    boxed: BoxedPicture
    query_patches: UInt8[np.ndarray, "patches side side 3"] | None = None
    """One-shot detection: crops of the class that is asked for."""


@dataclass(frozen=True)
class TargetForm:
    """What the pictures of a task carry beside boxes and labels; the same in all its batches."""

    num_patches: int = 0
    """Query crops of each picture."""
    patch_size: int = 0
    """Side of a query crop in pixels."""
    has_segments: bool = False


@dataclass(frozen=True)
class DetectionShape:
    """Sizes of the arrays in a packed detection batch."""

    count: int
    """Pictures."""
    height: int
    """Pixels of the largest picture."""
    width: int
    num_boxes: int
    """Boxes of all pictures together."""
    form: TargetForm


@dataclass(frozen=True)
class PackedDetectionBatch:
    """A batch, or one loader process's part of it; `detection_views` gives its arrays."""

    buffer: UInt8[Tensor, " bytes"]
    shape: DetectionShape
    step: int
    """Number of the global batch since the beginning of the run."""
    streams: tuple[int, ...]
    """Stream of each picture, rising: the place in the global batch."""
    keys: tuple[str, ...]
    """Name of each picture."""
    box_counts: tuple[int, ...]
    """Boxes of each picture."""
    skipped: tuple[SkippedPicture, ...] = ()
    """Pictures of this batch that could not be used; nothing takes their place."""
    blank: bool = False
    """True where all pictures were skipped: one empty picture stands in, without key or stream."""
    counts: Mapping[str, int] = field(default_factory=dict)
    """What was counted while it was made, by name."""

    @property
    def count(self) -> int:
        """Pictures of the stream; the blank one is none."""
        return len(self.keys)


@dataclass(frozen=True)
class DetectionViews:
    """The arrays of a packed detection batch, as views of its buffer."""

    ids: Int64[Tensor, " batch"]
    sizes: Int64[Tensor, "batch 2"]
    """(height, width) of each picture in pixels, before padding."""
    boxes_cxcywh: Float32[Tensor, "boxes 4"]
    """Of all pictures one after the other, normalised to the unpadded picture."""
    labels: Int64[Tensor, " boxes"]
    pictures: UInt8[Tensor, "batch height width 3"]
    """RGB, 0 on the padding at the bottom and the right."""
    query_patches: UInt8[Tensor, "batch patches side side 3"]
    segments: Int16[Tensor, "batch rows columns"]
    """Of no rows and columns where there are no segments."""


def pack_detection(
    pictures: Sequence[ReadyPicture],
    skipped: Sequence[SkippedPicture],
    step: int,
    counts: Mapping[str, int],
    form: TargetForm | None = None,
    shared: bool = False,
) -> PackedDetectionBatch:
    """Pictures in the order of their streams, padded to one size; there may be none.

    `shared` packs into shared memory at once, see `data.packing.empty_buffer`.
    """
    boxed = [picture.boxed for picture in pictures]
    shape = DetectionShape(
        count=len(pictures),
        height=max((each.picture.shape[0] for each in boxed), default=0),
        width=max((each.picture.shape[1] for each in boxed), default=0),
        num_boxes=sum(len(each.labels) for each in boxed),
        form=form or TargetForm(),
    )
    packed = PackedDetectionBatch(
        buffer=empty_buffer(_arrays(shape), shared=shared),
        shape=shape,
        step=step,
        streams=tuple(picture.stream for picture in pictures),
        keys=tuple(picture.key for picture in pictures),
        box_counts=tuple(len(each.labels) for each in boxed),
        skipped=tuple(skipped),
        counts=dict(counts),
    )
    views = detection_views(packed)
    first = 0
    for row, picture in enumerate(pictures):
        _fill_row(views, row, first, picture)
        first += packed.box_counts[row]
    return packed


def join_detection(
    parts: Sequence[PackedDetectionBatch], pin: bool = False
) -> PackedDetectionBatch:
    """The parts of one step as one batch in the order of the streams, in pinned memory if asked.

    Counts are added up. Where no part holds a picture, the batch is `blank`: one black picture
    without a box, its query crops black.
    """
    if len(parts) == 1 and parts[0].keys and not pin:
        return parts[0]
    places = sorted(
        (stream, number, row)
        for number, part in enumerate(parts)
        for row, stream in enumerate(part.streams)
    )
    skipped = tuple(picture for part in parts for picture in part.skipped)
    counts = added_counts([part.counts for part in parts])
    if not places:
        return _blank(parts[0], skipped, counts, pin)
    shape = _common_shape([part.shape for part in parts])
    joined = PackedDetectionBatch(
        buffer=empty_buffer(_arrays(shape), pin),
        shape=shape,
        step=parts[0].step,
        streams=tuple(stream for stream, _, _ in places),
        keys=tuple(parts[number].keys[row] for _, number, row in places),
        box_counts=tuple(parts[number].box_counts[row] for _, number, row in places),
        skipped=skipped,
        counts=counts,
    )
    sources = [detection_views(part) for part in parts]
    firsts = [np.cumsum([0, *part.box_counts]).tolist() for part in parts]
    target, first = detection_views(joined), 0
    for row, (_, number, source_row) in enumerate(places):
        boxes = slice(firsts[number][source_row], firsts[number][source_row + 1])
        _copy_row(target, row, first, sources[number], source_row, boxes)
        first += joined.box_counts[row]
    return joined


def detection_views(packed: PackedDetectionBatch) -> DetectionViews:
    """The arrays in the buffer of a packed batch; they share its memory."""
    return _views(packed.buffer, packed.shape)


def detection_to_device(packed: PackedDetectionBatch, device: torch.device) -> DetectionBatch:
    """The batch on its device: one copy, normalised by ImageNet's mean and deviation, padding 0.

    Pixels come out channels-last. The device is not waited for.
    """
    on_device = _views(packed.buffer.to(device, non_blocking=True), packed.shape)
    form, box_counts = packed.shape.form, list(packed.box_counts)
    return DetectionBatch(
        images=normalised_images(on_device.pictures, on_device.sizes),
        targets=Targets(
            torch.split(on_device.boxes_cxcywh, box_counts),
            torch.split(on_device.labels, box_counts),
        ),
        keys=packed.keys,
        sample_ids=detection_views(packed).ids,
        query_patches=_normalised_patches(on_device.query_patches) if form.num_patches else None,
        segments=on_device.segments if form.has_segments else None,
        skipped=tuple(picture.key for picture in packed.skipped),
        blank=packed.blank,
    )


def _normalised_patches(
    patches: UInt8[Tensor, "batch patches side side 3"],
) -> Float32[Tensor, "batch patches 3 side side"]:
    levels = patches.flatten(0, 1).permute(0, 3, 1, 2).to(torch.float32)
    return normalised(levels).view(*patches.shape[:2], *levels.shape[1:])


def _views(buffer: UInt8[Tensor, " bytes"], shape: DetectionShape) -> DetectionViews:
    return DetectionViews(**arrays_in(buffer, _arrays(shape)))


def _arrays(shape: DetectionShape) -> list[ArrayShape]:
    count, num_boxes, form = shape.count, shape.num_boxes, shape.form
    height, width = shape.height, shape.width
    has_segments = int(form.has_segments)
    side = form.patch_size
    return [
        ArrayShape("ids", torch.int64, (count,)),
        ArrayShape("sizes", torch.int64, (count, 2)),
        ArrayShape("boxes_cxcywh", torch.float32, (num_boxes, 4)),
        ArrayShape("labels", torch.int64, (num_boxes,)),
        ArrayShape("pictures", torch.uint8, (count, height, width, 3)),
        ArrayShape("query_patches", torch.uint8, (count, form.num_patches, side, side, 3)),
        ArrayShape("segments", torch.int16, (count, height * has_segments, width * has_segments)),
    ]


def _fill_row(views: DetectionViews, row: int, first_box: int, picture: ReadyPicture) -> None:
    boxed = picture.boxed
    boxes = slice(first_box, first_box + len(boxed.labels))
    views.ids[row] = picture.id
    views.sizes.numpy()[row] = boxed.picture.shape[:2]
    views.boxes_cxcywh.numpy()[boxes] = _normalised_boxes(boxed)
    views.labels.numpy()[boxes] = boxed.labels
    place_picture(views.pictures.numpy()[row], boxed.picture)
    if picture.query_patches is not None:
        views.query_patches.numpy()[row] = picture.query_patches
    if boxed.segments is not None:
        place_picture(views.segments.numpy()[row], boxed.segments)


def _normalised_boxes(boxed: BoxedPicture) -> Float32[np.ndarray, "boxes 4"]:
    """boxes_cxcywh by DETR's own float32 steps."""
    left, top, right, bottom = boxed.boxes_xyxy.T
    centred = np.stack([(left + right) / 2, (top + bottom) / 2, right - left, bottom - top], axis=1)
    return centred / np.array(boxed.picture.shape[1::-1] * 2, np.float32)


def _copy_row(
    target: DetectionViews,
    row: int,
    first_box: int,
    source: DetectionViews,
    source_row: int,
    source_boxes: slice,
) -> None:
    boxes = slice(first_box, first_box + source_boxes.stop - source_boxes.start)
    target.boxes_cxcywh[boxes] = source.boxes_cxcywh[source_boxes]
    target.labels[boxes] = source.labels[source_boxes]
    for name in ("ids", "sizes", "query_patches"):
        vars(target)[name][row] = vars(source)[name][source_row]
    height, width = source.sizes[source_row].tolist()
    for name in ("pictures", "segments"):
        picture = vars(source)[name][source_row, :height, :width]
        place_picture(vars(target)[name][row].numpy(), picture.numpy())


def _common_shape(shapes: Sequence[DetectionShape]) -> DetectionShape:
    return DetectionShape(
        count=sum(shape.count for shape in shapes),
        height=max(shape.height for shape in shapes),
        width=max(shape.width for shape in shapes),
        num_boxes=sum(shape.num_boxes for shape in shapes),
        form=shapes[0].form,
    )


def _blank(
    part: PackedDetectionBatch,
    skipped: tuple[SkippedPicture, ...],
    counts: Mapping[str, int],
    pin: bool,
) -> PackedDetectionBatch:
    shape = DetectionShape(1, BLANK_SIDE, BLANK_SIDE, 0, part.shape.form)
    blank = PackedDetectionBatch(
        buffer=empty_buffer(_arrays(shape), pin).zero_(),
        shape=shape,
        step=part.step,
        streams=(),
        keys=(),
        box_counts=(0,),
        skipped=skipped,
        blank=True,
        counts=counts,
    )
    views = detection_views(blank)
    views.ids[0] = BLANK_ID
    views.sizes[0] = BLANK_SIDE
    return blank
