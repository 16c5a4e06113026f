"""Writing shards: pictures of any source to ordinary WebDataset tars with an index (`index.json`).

The pictures are put into a seeded order and cut into groups; a group becomes one shard (more where
it would be too large), independently of all others. So the shards are the same to the byte however
many threads write them and however often the writing was interrupted: a finished group leaves a
record in DST/writing/, and only what has none is written. Costs about 2 ms CPU a picture, most of
it decoding: every picture is decoded, to be sure that it can be.
"""

import hashlib
import logging
import os
import tempfile
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import Field

from data.index import ShardIndex, sorted_shards, write_index
from data.shard_group import Group, PictureDone, write_group
from data.source_items import LeftOut, PictureFile, Source, SourceItem
from data.storage import Folder, StorageOptions, move_file, open_folder
from data.write_records import (
    WRITING,
    ShardReport,
    ShardWriteError,
    begin,
    finished_report,
    read_groups,
    record_group,
    remove_records,
    write_report,
)
from models.settings import Settings

_LOG = logging.getLogger(__name__)
_POLL_S = 0.5


class ShardSettings(Settings):
    """How pictures are laid out in shards."""

    seed: int = Field(default=0, ge=0)
    """Of the order in which the pictures are stored."""
    samples_per_shard: int = Field(default=1000, ge=1)
    """Pictures of the source that go into one shard, the broken ones among them included."""
    max_shard_bytes: int = Field(default=512 * 2**20, ge=2**16)
    """Size of a shard in bytes beyond which the rest goes into a further one."""
    max_bad_share: float = Field(default=0.01, ge=0, lt=1)
    """Share of files (0 to 1) that may be no picture or broken; more stops the writing."""


@dataclass(frozen=True)
class WriteProgress:
    """How far the writing is."""

    done: int
    """Pictures written or left out, those of earlier, interrupted attempts included."""
    done_before: int
    """Pictures of earlier attempts: leave them out of a rate."""
    total: int
    num_bytes: int
    """Bytes of the samples that this attempt has written."""
    num_bad: int


def write_shards(
    source: Source,
    url: str,
    settings: ShardSettings | None = None,
    storage_options: StorageOptions | None = None,
    workers: int | None = None,
    progress: Callable[[WriteProgress], None] | None = None,
) -> ShardReport:
    """Write all pictures of `source` to shards in the folder `url`, beside index and report.

    Interrupted, the same call continues; finished, it returns at once. `workers` threads (default:
    CPUs + 4, at most 32) each hold one unfinished shard on a local disk (DST's own, or TMPDIR).
    `progress` is called in the caller's thread, about twice a second.
    Raises ShardWriteError where too many pictures are bad (the report names them), where `url`
    holds other shards or lies in the source; the first failure of the storage passes through.
    """
    settings = settings or ShardSettings()
    folder = open_folder(url, storage_options)
    _refuse_own_tree(source, folder)
    plan = _plan(source, settings)
    report = finished_report(folder, plan.digest)
    if report is not None:
        remove_records(folder)
        return report
    begin(folder, plan.digest)
    tally = _Tally(source, settings.max_bad_share, read_groups(folder, len(plan.stems)))
    try:
        _write_missing(source, folder, plan, settings, tally, workers, progress)
    except _TooManyBadError:
        write_report(folder, tally.report(plan.digest, complete=False))
        raise ShardWriteError(tally.complaint(folder.url)) from None
    report = tally.report(plan.digest, complete=True)
    write_report(folder, report)
    shards = sorted_shards([shard for group in tally.groups.values() for shard in group.shards])
    write_index(ShardIndex(folder.url, shards), storage_options)
    remove_records(folder)
    return report


def _refuse_own_tree(source: Source, folder: Folder) -> None:
    """Shards among the pictures would be listed as bad files the next time."""
    is_tree = source.kind in ("classes", "folder")
    same = type(source.folder.filesystem) is type(folder.filesystem)
    if is_tree and same and f"{folder.path}/".startswith(f"{source.folder.path}/"):
        raise ShardWriteError(
            f"{folder.url} lies in the source {source.folder.url}: choose a folder beside it"
        )


class _TooManyBadError(Exception):
    """More pictures are bad than the settings allow."""


class _StoppedError(Exception):
    """Another thread failed, or the caller was interrupted."""


@dataclass(frozen=True)
class _Plan:
    stems: tuple[str, ...]
    """Name of each group's shard, without extension."""
    groups: tuple[tuple[SourceItem, ...], ...]
    digest: str
    """Of all that the shards' bytes depend on, but for the pictures' own bytes."""


def _plan(source: Source, settings: ShardSettings) -> _Plan:
    order = _order(len(source.items), settings.seed)
    items = [source.items[position] for position in order]
    size = settings.samples_per_shard
    groups = tuple(tuple(items[start : start + size]) for start in range(0, len(items), size))
    digits = max(6, len(str(len(groups) - 1)))
    stems = tuple(f"shard-{number:0{digits}d}" for number in range(len(groups)))
    return _Plan(stems, groups, _digest(items, settings))


def _order(count: int, seed: int) -> list[int]:
    """A permutation by sorting Philox's raw numbers, which no version of numpy may change."""
    numbers = np.random.Philox(key=seed).random_raw(count)
    positions: list[int] = np.argsort(numbers, kind="stable").tolist()
    return positions


def _digest(items: Sequence[SourceItem], settings: ShardSettings) -> str:
    digest = hashlib.sha256(settings.model_dump_json(exclude={"max_bad_share"}).encode())
    for item in items:
        digest.update(f"\n{item.key} {item.name}".encode("utf-8", "surrogateescape"))
        if isinstance(item, PictureFile):
            digest.update(b"".join(data for _, data in item.parts))
    return digest.hexdigest()


def _write_missing(
    source: Source,
    folder: Folder,
    plan: _Plan,
    settings: ShardSettings,
    tally: "_Tally",
    workers: int | None,
    progress: Callable[[WriteProgress], None] | None,
) -> None:
    """Write the groups that have no record; whatever goes wrong stops all threads first."""
    missing = [number for number in range(len(plan.groups)) if number not in tally.groups]
    tally.check()
    threads = workers or min(32, (os.cpu_count() or 1) + 4)
    with _scratch(folder) as scratch, ThreadPoolExecutor(threads) as pool:

        def write(number: int) -> None:
            items, stem = plan.groups[number], plan.stems[number]
            limit = settings.max_shard_bytes
            group = write_group(source, items, stem, Path(scratch), limit, tally.add)
            for shard in group.shards:
                move_file(Path(scratch) / shard.name, folder, shard.name)
            record_group(folder, number, group)
            tally.groups[number] = group

        try:
            _follow([pool.submit(write, number) for number in missing], tally, progress)
        finally:
            tally.stop.set()
            pool.shutdown(cancel_futures=True)


def _follow(
    futures: Sequence[Future[None]],
    tally: "_Tally",
    progress: Callable[[WriteProgress], None] | None,
) -> None:
    """Wait for all; the first failure is raised as soon as it is there."""
    pending = set(futures)
    while pending:
        done, pending = wait(pending, timeout=_POLL_S, return_when=FIRST_COMPLETED)
        for future in done:
            future.result()
        if progress is not None:
            progress(tally.progress())


def _scratch(folder: Folder) -> AbstractContextManager[str]:
    """A folder for unfinished shards: beside the finished ones where those are on a local disk.

    So they arrive by a rename, and a small /tmp does not matter.
    """
    beside = Path(folder.at(WRITING)) if folder.is_local else None
    return tempfile.TemporaryDirectory(prefix="unfinished-", dir=beside, ignore_cleanup_errors=True)


class _Tally:
    """What all threads together have done, and whether to go on."""

    def __init__(self, source: Source, max_bad_share: float, groups: dict[int, Group]) -> None:
        self.source = source
        self.groups = groups
        self.stop = threading.Event()
        self._total = len(source.items) + len(source.left_out)
        self._max_bad_share = max_bad_share
        self._bad = [bad for group in groups.values() for bad in group.left_out]
        self._before = sum(group.num_items for group in groups.values())
        self._now = 0
        self._bytes = 0
        self._lock = threading.Lock()

    def add(self, picture: PictureDone) -> None:
        """One more picture; raises where the writing is to stop."""
        if self.stop.is_set():
            raise _StoppedError
        with self._lock:
            self._now += 1
            self._bytes += picture.num_bytes
            if picture.left_out is not None:
                self._bad.append(picture.left_out)
                self.check()

    def check(self) -> None:
        """Raises _TooManyBadError as soon as it is certain, whatever is still to come."""
        if len(self._all_bad()) > self._max_bad_share * self._total:
            raise _TooManyBadError

    def progress(self) -> WriteProgress:
        return WriteProgress(
            done=self._before + self._now,
            done_before=self._before,
            total=len(self.source.items),
            num_bytes=self._bytes,
            num_bad=len(self._all_bad()),
        )

    def report(self, plan: str, complete: bool) -> ShardReport:
        shards = [shard for group in self.groups.values() for shard in group.shards]
        return ShardReport(
            plan=plan,
            complete=complete,
            source=self.source.folder.url,
            kind=self.source.kind,
            num_samples=sum(shard.num_samples for shard in shards),
            num_shards=len(shards),
            num_bytes=sum(shard.size for shard in shards),
            classes=self.source.classes,
            left_out=tuple(sorted(self._all_bad(), key=lambda bad: bad.name)),
        )

    def complaint(self, url: str) -> str:
        bad = self.report("", complete=False).left_out
        shown = "; ".join(f"{item.name}: {item.reason}" for item in bad[:5])
        more = f"; and {len(bad) - 5} more" if len(bad) > 5 else ""
        return (
            f"{len(bad)} of {self._total} files are no pictures or broken, more than "
            f"max_bad_share={self._max_bad_share}: {shown}{more} (all in {url}/report.json): "
            "repair or remove them, leave names out with ignore, or raise max_bad_share, and run "
            "the same command again"
        )

    def _all_bad(self) -> list[LeftOut]:
        return [*self.source.left_out, *self._bad]
