"""Indexing tars that others wrote: each is read through once.

Keys may have dots, samples several parts, tars folders and long names; what WebDataset would read
wrongly without a word (a cut tar, keys that merge or repeat) is an error that names it. Costs about
0.2 ms a sample and the time to read the tars; pictures' sizes are taken from their headers.
"""

import hashlib
import io
import os
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from data.index import Shard, ShardIndex, ShardIndexError, sorted_shards
from data.pictures import FORMATS
from data.storage import Folder, StorageOptions, file_sizes, local_copy, open_folder
from data.tar_layout import (
    DamagedTarError,
    TarLayout,
    TarSample,
    merged_by_dots,
    picture_part,
    read_layout,
)


def index_shards(
    url: str,
    storage_options: StorageOptions | None = None,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> ShardIndex:
    """The index of all `*.tar` directly in the folder `url`; `write_index` puts it there.

    `workers` threads (default: CPUs + 4, at most 32) each hold one tar, as a local copy where it is
    elsewhere. `progress` hears (tars done, of how many) in the caller's thread.
    Raises ShardIndexError where no tar is there, DamagedTarError for a tar that is cut off,
    compressed, none, or that holds a key twice.
    """
    folder = open_folder(url, storage_options)
    names = sorted(name for name in file_sizes(folder) if name.endswith(".tar"))
    if not names:
        raise ShardIndexError(
            f"no tars in {folder.url}: check the URL (only *.tar directly in the folder count), or "
            "make shards with `querypatch shards write`"
        )
    shards = list[Shard]()
    with ThreadPoolExecutor(workers or min(32, (os.cpu_count() or 1) + 4)) as pool:
        for shard in pool.map(lambda name: index_shard(folder, name), names):
            shards.append(shard)
            if progress is not None:
                progress(len(shards), len(names))
    return ShardIndex(folder.url, sorted_shards(shards))


def index_shard(folder: Folder, name: str) -> Shard:
    """The entry of one tar; errors as `index_shards`."""
    place = f"{folder.url}/{name}"
    with local_copy(folder, name) as path, path.open("rb") as file:
        layout = read_layout(path, place)
        _refuse_merged(layout, place)
        repeated = repeated_keys(layout)
        if repeated:
            raise DamagedTarError(
                place,
                f"holds the key {repeated[0]!r} twice ({len(repeated)} such keys)",
                f"write it again with `querypatch shards write {place} DST`: keys become unique",
            )
        sizes = [_picture_size(file, sample) for sample in layout.samples]
        return Shard(
            name=name,
            sha256=sha256_of(path),
            offsets=layout.offsets,
            widths=np.array([width for width, _ in sizes], dtype=np.int32),
            heights=np.array([height for _, height in sizes], dtype=np.int32),
            size=path.stat().st_size,
        )


def repeated_keys(layout: TarLayout) -> list[str]:
    """Keys that more than one sample of a tar has, in the order in which they first come."""
    counts = Counter(sample.key for sample in layout.samples)
    return [key for key, count in counts.items() if count > 1]


def sha256_of(path: Path) -> str:
    """The file's sha256 in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _refuse_merged(layout: TarLayout, place: str) -> None:
    for sample in layout.samples:
        names = merged_by_dots(sample)
        if names is not None:
            raise DamagedTarError(
                place,
                f"holds {names[0]} and {names[1]}, one sample for WebDataset (a key ends at its "
                "first dot)",
                f"write it again with `querypatch shards write {place} DST`: keys lose their dots",
            )


def _picture_size(file: BinaryIO, sample: TarSample) -> tuple[int, int]:
    """(width, height) by the picture's header; (0, 0) where there is none to be read."""
    part = picture_part(sample)
    if part is None:
        return 0, 0
    file.seek(part.start)
    try:
        with Image.open(io.BytesIO(file.read(part.size)), formats=FORMATS) as image:
            return image.size
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return 0, 0
