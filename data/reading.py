"""Reads of shards and files through fsspec: retried, counted, checked, optionally cached.

Neighbouring samples are one byte range and one request. What passes (a cut connection, a timeout, a
5xx) is tried again with exponential backoff and jitter; what stays (no such file, no permission, a
shard that is not the one of the index) fails at once. A range that comes back short counts as a cut
connection: fsspec does not treat it as an error everywhere, and webdataset would take it for the
end of the shard.

The filesystem is made by the process that reads, not before: s3fs and gcsfs run their requests on a
thread of their own, which no other process has.
"""

import errno
import hashlib
import logging
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from threading import Lock

from pydantic import Field

from data.byte_cache import ByteCache
from data.index import Shard
from data.ranges import SampleRange
from data.samples import Sample, parse_samples
from data.storage import StorageOptions, StorageUnreachable, open_folder, transient_errors
from models.settings import Settings
from models.urls import is_refusal

_LOG = logging.getLogger(__name__)

CHUNK_BYTES = 4 << 20
"""Piece of a shard that is cached as one file."""

PERMANENT_ERRNO = frozenset(
    {errno.EINVAL, errno.EPERM, errno.ENOSYS, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR}
)
"""Errors of a filesystem that trying again cannot cure."""


_LONG_DELAY_S = 3.0
"""Seconds of a delay from which on it is told."""


class ShardReadError(ValueError):
    """A shard that cannot be read; the message names its URL, the reason and the way out."""


class _ShortReadError(OSError):
    """Fewer bytes came than were asked for."""


class CacheSettings(Settings):
    """A local cache of what was read from the storage."""

    folder: str = Field(min_length=1)
    """Local folder of the cache; all processes of a machine may share it."""
    limit_gb: float = Field(default=50.0, gt=0)
    """Size limit in GB (10^9 bytes); the least recently used pieces are removed."""
    max_age_days: float | None = Field(default=14.0, gt=0)
    """Days after which pieces that nobody used are removed, so that a node's disk does not keep the
    data of jobs long past; null keeps them."""


class ReadingSettings(Settings):
    """How shards are read."""

    threads: int = Field(default=4, ge=1)
    """Ranged reads that each loader process has under way at once."""
    max_range_mb: int = Field(default=16, ge=1)
    """Longest ranged read in MB (10^6 bytes); a longer single sample is still read."""
    attempts: int = Field(default=45, ge=1)
    """Times that a read is tried before it fails; 45 with the delays below last about ten minutes,
    in which a run waits for its store."""
    first_delay_s: float = Field(default=0.2, ge=0)
    """Seconds before the second attempt; doubled each time, shortened at random by up to a half."""
    longest_delay_s: float = Field(default=20.0, ge=0)
    """Most seconds between two attempts."""
    cache: CacheSettings | None = None
    """Local cache; none by default."""


@dataclass(frozen=True)
class ReadCounters:
    """What reading took."""

    bytes_read: int = 0
    """Bytes that came from the storage."""
    reads: int = 0
    """Ranged reads that succeeded."""
    retries: int = 0
    """Reads that were tried again."""
    cache_hits: int = 0
    """Pieces of shards found in the cache."""
    cache_faults: int = 0
    """Pieces that could not be read from or written to the cache; the storage stood in."""

    def __add__(self, other: "ReadCounters") -> "ReadCounters":
        sums = {f.name: self.__dict__[f.name] + other.__dict__[f.name] for f in fields(self)}
        return ReadCounters(**sums)


class StorageReader:
    """Reads of one folder, tried again where the error may pass, and counted; threads share it."""

    def __init__(
        self,
        url: str,
        storage_options: StorageOptions,
        settings: ReadingSettings,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Opens the folder `url`; StorageError where its protocol is unknown."""
        self.folder = open_folder(url, storage_options)
        self.transient = transient_errors(url)
        """Errors that may pass by themselves."""
        self._settings = settings
        self._cache = _cache_of(settings)
        self._sleep = sleep
        # Only spreads the attempts of many processes over time; no data depends on it.
        self._jitter = random.Random(f"{os.getpid()} {url}")
        self._counters = ReadCounters()
        self._has_read = False
        self._lock = Lock()

    @property
    def had_access(self) -> bool:
        """Whether a read succeeded before, so that a refusal may be of credentials that change."""
        return self._has_read

    @property
    def has_cache(self) -> bool:
        """Whether what was read is kept on a local disk."""
        return self._cache is not None

    def read(
        self, name: str, once: Callable[[], bytes], refuse: Callable[[Exception], None]
    ) -> bytes:
        """What `once` reads of the file `name`, tried again where the error may pass.

        `refuse` is given each such error first, and raises where trying again cannot help. Raises
        StorageUnreachable after the last attempt.
        """
        settings, delay_s = self._settings, self._settings.first_delay_s
        for attempt in range(1, settings.attempts + 1):
            try:
                data = once()
            except self.transient as error:
                refuse(error)
                if attempt == settings.attempts:
                    raise StorageUnreachable(
                        f"{self.folder.url}/{name}: failed {attempt} times, last with "
                        f"{one_line(error)}; check the storage and the network, then resume"
                    ) from error
                self._count(ReadCounters(retries=1))
                if delay_s >= _LONG_DELAY_S:
                    _LOG.warning(
                        "%s/%s: failed %d times, last with %s; trying again",
                        self.folder.url,
                        name,
                        attempt,
                        one_line(error),
                    )
                self._sleep(delay_s * self._jitter.uniform(0.5, 1.0))
                delay_s = min(2 * delay_s, settings.longest_delay_s)
            else:
                self._count(ReadCounters(bytes_read=len(data), reads=1))
                self._has_read = True
                return data
        raise AssertionError("attempts is at least 1")

    def cached(self, key: str) -> bytes | None:
        """What the cache holds under `key`; None where it has nothing, or there is no cache."""
        if self._cache is None:
            return None
        try:
            piece = self._cache.get(_cache_key(key))
        except OSError as error:
            self._cache_fault(error)
            return None
        self._count(ReadCounters(cache_hits=int(piece is not None)))
        return piece

    def keep(self, key: str, piece: bytes) -> None:
        """Puts something into the cache, if there is one."""
        if self._cache is None:
            return
        try:
            self._cache.put(_cache_key(key), piece)
        except OSError as error:
            self._cache_fault(error)

    def take_counters(self) -> ReadCounters:
        """What was counted since the last call."""
        with self._lock:
            counters, self._counters = self._counters, ReadCounters()
        return counters

    def _cache_fault(self, error: OSError) -> None:
        if not self._counters.cache_faults:
            _LOG.warning("the cache is of no use here, reading goes on without it: %s", error)
        self._count(ReadCounters(cache_faults=1))

    def _count(self, counters: ReadCounters) -> None:
        with self._lock:
            self._counters += counters


class RangeReader:
    """Reads ranges of an index's shards; threads may share it. Make it where it is used."""

    def __init__(
        self,
        url: str,
        storage_options: StorageOptions,
        settings: ReadingSettings,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Opens the folder `url`; StorageError where its protocol is unknown."""
        self._storage = StorageReader(url, storage_options, settings, sleep)
        self._folder = self._storage.folder

    def samples(self, wanted: SampleRange) -> tuple[Sample, ...]:
        """The samples of a range, in order; DamagedShardError, or as `read`."""
        shard, last = wanted.shard, wanted.first + wanted.count
        data = self.read(shard, int(shard.offsets[wanted.first]), int(shard.offsets[last]))
        return parse_samples(data, shard.name, wanted.first_id, wanted.count)

    def read(self, shard: Shard, start: int, end: int) -> bytes:
        """Bytes `start` to `end` (not included) of a shard, all of them.

        Raises ShardReadError, or StorageUnreachable where another start may be luckier.
        """
        if not self._storage.has_cache:
            return self._read_storage(shard, start, end)
        pieces = range(start // CHUNK_BYTES, -(-end // CHUNK_BYTES))
        data = b"".join(self._pieces(shard, pieces))
        skip = pieces.start * CHUNK_BYTES
        return data[start - skip : end - skip]

    def take_counters(self) -> ReadCounters:
        """What was counted since the last call."""
        return self._storage.take_counters()

    def _pieces(self, shard: Shard, pieces: range) -> Iterator[bytes]:
        """Pieces of a shard, from the cache where they are there; the rest in one read per gap."""
        found = [self._storage.cached(self._piece_key(shard, number)) for number in pieces]
        for first, length in _gaps([piece is None for piece in found]):
            begin = pieces[first] * CHUNK_BYTES
            data = self._read_storage(shard, begin, min(begin + length * CHUNK_BYTES, shard.size))
            for number in range(length):
                piece = data[number * CHUNK_BYTES : (number + 1) * CHUNK_BYTES]
                found[first + number] = piece
                self._storage.keep(self._piece_key(shard, pieces[first + number]), piece)
        return (piece for piece in found if piece is not None)

    def _piece_key(self, shard: Shard, piece: int) -> str:
        place = f"{piece * CHUNK_BYTES} {CHUNK_BYTES}"
        return f"{self._folder.url}/{shard.name} {shard.sha256} {place}"

    def _read_storage(self, shard: Shard, start: int, end: int) -> bytes:
        return self._storage.read(
            shard.name,
            lambda: self._read_once(shard, start, end),
            lambda error: self._refuse_permanent(error, shard),
        )

    def _read_once(self, shard: Shard, start: int, end: int) -> bytes:
        # By keyword: the third argument of s3fs is a version, not the start.
        data: bytes = self._folder.filesystem.cat_file(
            self._folder.at(shard.name), start=start, end=end
        )
        if len(data) != end - start:
            raise _ShortReadError(f"{len(data)} of {end - start} bytes came from byte {start} on")
        return data

    def _refuse_permanent(self, error: Exception, shard: Shard) -> None:
        """Raises ShardReadError where trying again cannot help."""
        match error:
            case FileNotFoundError():
                raise self._error(shard, "no such shard", self._check()) from error
            case PermissionError() if not self._storage.had_access:
                raise self._error(
                    shard, f"no permission ({one_line(error)})", "check the credentials"
                ) from error
            case _ShortReadError():
                self._refuse_other_size(shard)
            case OSError() if is_permanent(error):
                self._refuse_other_size(shard)
                raise self._error(shard, one_line(error), self._check()) from error

    def _refuse_other_size(self, shard: Shard) -> None:
        try:
            size = self._folder.filesystem.size(self._folder.at(shard.name))
        except self._storage.transient:
            # The storage is in trouble, so its size tells nothing: try again.
            return
        if size != shard.size:
            raise self._error(
                shard, f"{size} bytes are there, the index says {shard.size}", self._check()
            )

    def _check(self) -> str:
        return f"run `querypatch shards check {self._folder.url}`"

    def _error(self, shard: Shard, reason: str, way_out: str) -> ShardReadError:
        return ShardReadError(f"{self._folder.url}/{shard.name}: {reason}; {way_out}")


def is_permanent(error: OSError) -> bool:
    """Whether trying again cannot cure it, neither on a disk nor in a store that said no."""
    if isinstance(error, PermissionError):
        return False
    return error.errno in PERMANENT_ERRNO or is_refusal(error)


def one_line(error: Exception) -> str:
    """The kind of an error and its message, without line breaks."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _cache_of(settings: ReadingSettings) -> ByteCache | None:
    if settings.cache is None:
        return None
    cache = settings.cache
    max_age_s = None if cache.max_age_days is None else cache.max_age_days * 86400
    return ByteCache(Path(cache.folder), int(cache.limit_gb * 10**9), max_age_s)


def _cache_key(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _gaps(missing: Sequence[bool]) -> Iterator[tuple[int, int]]:
    """(first, length) of each row of True values."""
    first = 0
    for place, gap in enumerate([*missing, False]):
        if not gap:
            if place > first:
                yield first, place - first
            first = place + 1
