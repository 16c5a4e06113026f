"""One uint8 buffer with named arrays: everything of a batch, from a loader process to the device.

One tensor per batch crosses the process border, because each costs a file descriptor and a
page-table update, and a device takes it in one copy.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from jaxtyping import Shaped, UInt8
from torch import Tensor

BLANK_ID = -1
"""Sample id of the empty picture that stands in where every picture of a batch is broken."""
BLANK_SIDE = 64
"""Height and width of that picture in pixels."""

_ALIGNMENT = 64
"""Every array of a buffer begins at a multiple of this many bytes, so that it can be viewed."""


@dataclass(frozen=True)
class ArrayShape:
    """One array of a buffer."""

    name: str
    dtype: torch.dtype
    sizes: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of the array, without what aligns the next one."""
        return prod(self.sizes) * self.dtype.itemsize


@dataclass(frozen=True)
class SkippedPicture:
    """A picture that could not be used."""

    id: int
    key: str
    shard: str
    reason: str

    def __str__(self) -> str:
        return f"{self.key} in {self.shard}: {self.reason}"


def empty_buffer(
    arrays: Sequence[ArrayShape], pin: bool = False, shared: bool = False
) -> UInt8[Tensor, " bytes"]:
    """A buffer that holds just these arrays, not yet filled.

    `pin` takes pinned memory, from which a GPU copies on its own. `shared` takes shared memory, so
    that nothing is copied on the way to another process (a fifth of what sending costs, measured).
    """
    # Never 0: an empty buffer cannot be viewed as another type.
    num_bytes = max(_ALIGNMENT, sum(_aligned(array.num_bytes) for array in arrays))
    if shared:
        # As torch's own default_collate does in a loader process.
        storage = torch.UntypedStorage._new_shared(num_bytes)  # type: ignore[no-untyped-call]
        return torch.empty(0, dtype=torch.uint8).set_(storage)
    if pin:
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
    # numpy asks for huge pages, torch does not: filling it takes a quarter of the time (measured).
    return torch.from_numpy(np.empty(num_bytes, np.uint8))


def arrays_in(
    buffer: UInt8[Tensor, " bytes"], arrays: Sequence[ArrayShape]
) -> Mapping[str, Shaped[Tensor, "..."]]:
    """The arrays of a buffer by name, as views that share its memory."""
    views = {}
    first = 0
    for array in arrays:
        piece = buffer[first : first + array.num_bytes]
        views[array.name] = piece.view(array.dtype).view(array.sizes)
        first += _aligned(array.num_bytes)
    return views


def added_counts(counts: Sequence[Mapping[str, int]]) -> dict[str, int]:
    """The sum of each count, by name; a name that one does not have counts 0 there."""
    names = dict.fromkeys(name for each in counts for name in each)
    return {name: sum(each.get(name, 0) for each in counts) for name in names}


def place_picture(
    target: Shaped[np.ndarray, "_ _ *channels"],
    picture: Shaped[np.ndarray, "height width *channels"],
) -> None:
    """Puts a picture at the top left of its place in a batch, and 0 on the rest."""
    height, width = picture.shape[:2]
    target[:height, :width] = picture
    target[height:] = 0
    target[:height, width:] = 0


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
