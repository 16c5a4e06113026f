"""Checking shards against their index: every byte is hashed and every picture decoded.

About 2 ms CPU a picture; for keys that repeat in different shards all keys are held at once, about
150 bytes each (0.2 GB for ImageNet).
"""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.index import Shard, ShardIndex, read_index
from data.indexing import repeated_keys, sha256_of
from data.pictures import BrokenPicture, decode_picture
from data.storage import Folder, StorageOptions, file_sizes, local_copy, open_folder
from data.tar_layout import DamagedTarError, TarLayout, picture_part, read_layout

_PUT_BACK = "copy the shard again from its source, or write the shards again"
_INDEX = "if it is as it should be, run `querypatch shards index`"


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong with a shard."""

    shard: str
    """File name."""
    sample: str | None
    """Key of the sample, or None where the whole shard is meant."""
    problem: str
    remedy: str

    def __str__(self) -> str:
        place = self.shard if self.sample is None else f"{self.shard}, sample {self.sample}"
        return f"{place}: {self.problem}; {self.remedy}"


def check_shards(
    url: str,
    storage_options: StorageOptions | None = None,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Fault, ...]:
    """All faults of the shards in the folder `url`, shard by shard; () where all is well.

    Found are: a shard that is missing, cut off, changed (size or sha256), or not in the index; a
    wrong number or position of samples; a key that comes twice; a picture that is missing, cannot
    be decoded, or has another size. `progress` hears (shards done, of how many).
    Raises ShardIndexError where there is no index to check against.
    """
    index = read_index(url, storage_options)
    folder = open_folder(url, storage_options)
    sizes = file_sizes(folder)
    faults, holders = list[Fault](), dict[str, str]()
    with ThreadPoolExecutor(workers or min(32, (os.cpu_count() or 1) + 4)) as pool:
        checks = pool.map(lambda shard: _check_shard(folder, shard, sizes), index.shards)
        for number, (shard, (found, keys)) in enumerate(zip(index.shards, checks, strict=True)):
            faults += [*found, *_repeated_elsewhere(shard.name, keys, holders)]
            if progress is not None:
                progress(number + 1, len(index.shards))
    return (*faults, *_not_indexed(index, sizes))


def _check_shard(
    folder: Folder, shard: Shard, sizes: dict[str, int]
) -> tuple[list[Fault], tuple[str, ...]]:
    """The faults of one shard, and its keys."""
    if shard.name not in sizes:
        problem = "is in the index, but not in the folder"
        return [Fault(shard.name, None, problem, _PUT_BACK)], ()
    with local_copy(folder, shard.name) as path:
        faults = list(_content_faults(path, shard))
        try:
            layout = read_layout(path, shard.name)
        except DamagedTarError as error:
            return [*faults, Fault(shard.name, None, error.problem, error.remedy)], ()
        faults += _layout_faults(layout, shard)
        faults += _picture_faults(path, layout, shard)
    return faults, tuple(sample.key for sample in layout.samples)


def _content_faults(path: Path, shard: Shard) -> Iterator[Fault]:
    size = path.stat().st_size
    if size != shard.size:
        cut = "it is cut off" if size < shard.size else "it was changed"
        problem = f"holds {size} bytes where the index says {shard.size}: {cut}"
        yield Fault(shard.name, None, problem, f"{_PUT_BACK}; {_INDEX}")
        return
    sha256 = sha256_of(path)
    if sha256 != shard.sha256:
        problem = f"has sha256 {sha256[:12]}... where the index says {shard.sha256[:12]}..."
        yield Fault(shard.name, None, f"{problem}: it was changed", f"{_PUT_BACK}; {_INDEX}")


def _layout_faults(layout: TarLayout, shard: Shard) -> Iterator[Fault]:
    if len(layout.samples) != shard.num_samples:
        problem = f"holds {len(layout.samples)} samples where the index says {shard.num_samples}"
        yield Fault(shard.name, None, problem, f"{_PUT_BACK}; {_INDEX}")
    elif not np.array_equal(layout.offsets, shard.offsets):
        problem = "its samples do not stand where the index says"
        yield Fault(shard.name, None, problem, f"{_PUT_BACK}; {_INDEX}")
    for key in repeated_keys(layout):
        remedy = "write the shards again with `querypatch shards write`, which makes keys unique"
        yield Fault(shard.name, key, "the key comes twice in this shard", remedy)


def _picture_faults(path: Path, layout: TarLayout, shard: Shard) -> Iterator[Fault]:
    sizes: list[tuple[int, int] | None] = [None] * len(layout.samples)
    if len(layout.samples) == shard.num_samples:
        sizes = list(zip(shard.heights.tolist(), shard.widths.tolist(), strict=True))
    with path.open("rb") as file:
        for sample, size in zip(layout.samples, sizes, strict=True):
            part = picture_part(sample)
            file.seek(part.start if part else 0)
            problem = _picture_problem(file.read(part.size) if part else None, size)
            if problem is not None:
                remedy = "the stream leaves it out; to be rid of it, write the shards again"
                yield Fault(shard.name, sample.key, problem, remedy)


def _picture_problem(data: bytes | None, size: tuple[int, int] | None) -> str | None:
    if data is None:
        return "holds no picture"
    try:
        height, width, _ = decode_picture(data).shape
    except BrokenPicture as error:
        return f"the picture cannot be decoded ({error})"
    if size is not None and size != (height, width):
        return f"the picture is {width} x {height} where the index says {size[1]} x {size[0]}"
    return None


def _repeated_elsewhere(
    name: str, keys: tuple[str, ...], holders: dict[str, str]
) -> Iterator[Fault]:
    """One fault for each other shard that shares keys: a shard copied twice shares thousands."""
    shared = dict[str, list[str]]()
    for key in dict.fromkeys(keys):
        holder = holders.setdefault(key, name)
        if holder != name:
            shared.setdefault(holder, []).append(key)
    for holder, repeated in shared.items():
        problem = f"the key is in {holder} too ({len(repeated)} such keys)"
        remedy = (
            "take one of the shards away and index the folder again, or write the shards again "
            "with `querypatch shards write`, which makes keys unique"
        )
        yield Fault(name, repeated[0], problem, remedy)


def _not_indexed(index: ShardIndex, sizes: dict[str, int]) -> Iterator[Fault]:
    known = {shard.name for shard in index.shards}
    for name in sorted(sizes):
        if name.endswith(".tar") and name not in known:
            remedy = "take it away, or run `querypatch shards index` to make it part of the set"
            yield Fault(name, None, "is in the folder, but not in the index", remedy)
