"""Packed batches: everything of a batch in one uint8 buffer, from a loader process to the device.

Pictures travel as bytes, height x width x 3 (a quarter of their size as floats, and channels-last
for the network without a copy); they are normalised on the device. One tensor per batch crosses
the process border, because each costs a file descriptor and a page-table update.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod

import numpy as np
import torch
from jaxtyping import Float32, Int64, UInt8
from torch import Tensor

from data.colour import DRAW_COLUMNS, pack_draws
from data.device_colour import colour_on_device
from data.patches import PatchSample
from models.structures import Images, PatchBatch, Targets, padding_of

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

BLANK_ID = -1
"""Sample id of the empty picture that stands in where every picture of a batch is broken."""
_BLANK_SIDE = 64

_ALIGNMENT = 64
"""Every array of a buffer begins at a multiple of this many bytes, so that it can be viewed."""


@dataclass(frozen=True)
class CutPicture:
    """A picture that is ready to be packed."""

    stream: int
    """Its stream, which is its place in the global batch."""
    id: int
    key: str
    sample: PatchSample


@dataclass(frozen=True)
class SkippedPicture:
    """A picture that could not be used."""

    id: int
    key: str
    shard: str
    reason: str

    def __str__(self) -> str:
        return f"{self.key} in {self.shard}: {self.reason}"


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

    `shared` packs into shared memory at once, so that nothing is copied on the way to another
    process (saves a fifth of what sending costs, measured).
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
        buffer=_empty_shared(_num_bytes(shape)) if shared else _empty(_num_bytes(shape)),
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
        _place(arrays["pictures"][row], sample.picture)
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
        buffer=_empty(_num_bytes(shape), pin),
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
    padding = padding_of(on_device.sizes, packed.shape.height, packed.shape.width)
    pixels = _normalised(on_device.pictures.permute(0, 3, 1, 2).to(torch.float32))
    pixels.masked_fill_(padding[:, None], 0.0)
    count, num_patches = on_device.patches.shape[:2]
    patches = on_device.patches.flatten(0, 1).permute(0, 3, 1, 2)
    if packed.shape.has_draws:
        levels = colour_on_device(patches, host.draws.flatten(0, 1))
    else:
        levels = patches.to(torch.float32)
    labels = torch.ones(num_patches, dtype=torch.int64, device=device)
    return PatchBatch(
        images=Images(pixels, padding, on_device.sizes),
        patches=_normalised(levels).view(count, num_patches, *levels.shape[1:]),
        targets=Targets(tuple(on_device.boxes_cxcywh.unbind()), (labels,) * count),
        keys=packed.keys,
        sample_ids=host.ids,
        skipped=tuple(picture.key for picture in packed.skipped),
        blank=packed.blank,
    )


def _views(buffer: UInt8[Tensor, " bytes"], shape: BatchShape) -> BatchViews:
    arrays = {}
    first = 0
    for name, dtype, sizes in _arrays(shape):
        num_bytes = prod(sizes) * dtype.itemsize
        arrays[name] = buffer[first : first + num_bytes].view(dtype).view(sizes)
        first += _aligned(num_bytes)
    return BatchViews(**arrays)


def _arrays(shape: BatchShape) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
    """Name, type and sizes of the arrays of a buffer, in their order there."""
    count, num_patches, side = shape.count, shape.num_patches, shape.patch_size
    return [
        ("ids", torch.int64, (count,)),
        ("sizes", torch.int64, (count, 2)),
        ("boxes_cxcywh", torch.float32, (count, num_patches, 4)),
        ("draws", torch.float32, (count, num_patches, DRAW_COLUMNS * shape.has_draws)),
        ("pictures", torch.uint8, (count, shape.height, shape.width, 3)),
        ("patches", torch.uint8, (count, num_patches, side, side, 3)),
    ]


def _num_bytes(shape: BatchShape) -> int:
    sizes = (_aligned(prod(sizes) * dtype.itemsize) for _, dtype, sizes in _arrays(shape))
    # Never 0: an empty buffer cannot be viewed as another type.
    return max(_ALIGNMENT, sum(sizes))


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT


def _empty(num_bytes: int, pin: bool = False) -> UInt8[Tensor, " bytes"]:
    if pin:
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
    # numpy asks for huge pages, torch does not: filling it takes a quarter of the time (measured).
    return torch.from_numpy(np.empty(num_bytes, np.uint8))


def _empty_shared(num_bytes: int) -> UInt8[Tensor, " bytes"]:
    # As torch's own default_collate does in a loader process.
    storage = torch.UntypedStorage._new_shared(num_bytes)  # type: ignore[no-untyped-call]
    return torch.empty(0, dtype=torch.uint8).set_(storage)


def _place(
    target: UInt8[np.ndarray, "_ _ 3"], picture: UInt8[np.ndarray, "height width 3"]
) -> None:
    height, width = picture.shape[:2]
    target[:height, :width] = picture
    target[height:] = 0
    target[:height, width:] = 0


def _copy_row(target: BatchViews, row: int, source: BatchViews, source_row: int) -> None:
    for name in ("ids", "sizes", "boxes_cxcywh", "draws", "patches"):
        vars(target)[name][row] = vars(source)[name][source_row]
    height, width = source.sizes[source_row].tolist()
    picture = source.pictures[source_row, :height, :width]
    _place(target.pictures[row].numpy(), picture.numpy())


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
    shape = BatchShape(1, _BLANK_SIDE, _BLANK_SIDE, num_patches, side, has_draws=False)
    buffer = _empty(_num_bytes(shape), pin).zero_()
    blank = PackedPatchBatch(buffer, shape, part.step, (), (), skipped, blank=True)
    views = views_of(blank)
    views.ids[0] = BLANK_ID
    views.sizes[0] = _BLANK_SIDE
    views.boxes_cxcywh[0] = torch.tensor([0.5, 0.5, 1.0, 1.0])
    return blank


def _normalised(
    levels: Float32[Tensor, "batch 3 height width"],
) -> Float32[Tensor, "batch 3 height width"]:
    """Levels 0..255 in place to ImageNet's mean 0 and deviation 1, by the reference's own steps."""
    mean, std = _mean_and_std(levels.device)
    return levels.div_(255).sub_(mean).div_(std)


@lru_cache
def _mean_and_std(
    device: torch.device,
) -> tuple[Float32[Tensor, "3 1 1"], Float32[Tensor, "3 1 1"]]:
    """Made once per device: making them there anew would wait for the device each time."""
    mean = torch.tensor(IMAGENET_MEAN, device=device)[:, None, None]
    return mean, torch.tensor(IMAGENET_STD, device=device)[:, None, None]
