"""A local cache of pieces of files with a size limit, shared by any number of processes.

Each piece is a file of its own, published by rename, so a reader sees a whole piece or none; a
checksum at its end tells a damaged one, which is then read again from the storage. The least
recently used pieces go first, and those that nobody used for long go anyway. Trimming lists the
folder, so it is done only after every 1/32 of the limit that a process wrote: P processes may
exceed the limit by P/32 of it for a while.
"""

import os
import tempfile
import time
import zlib
from pathlib import Path
from threading import Lock

_TRIM_SHARE = 32
_TRIM_TO = 0.9
_PART_PREFIX = ".part-"
_STALE_PART_S = 3600.0
_CHECKSUM_BYTES = 4


class ByteCache:
    """Pieces of bytes by key (fit to be a file name); threads and processes may share it."""

    def __init__(self, folder: Path, limit_bytes: int, max_age_s: float | None = None) -> None:
        """Makes the folder; OSError where that cannot be.

        What was not used for `max_age_s` goes at the next trimming.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._limit_bytes = limit_bytes
        self._max_age_s = max_age_s
        # The first piece trims what earlier runs left.
        self._untrimmed_bytes = limit_bytes
        self._lock = Lock()

    def get(self, key: str) -> bytes | None:
        """The piece, or None where it is not there or damaged; marks it as used."""
        path = self._path(key)
        try:
            stored = path.read_bytes()
            os.utime(path)
        except FileNotFoundError:
            return None
        data, checksum = stored[:-_CHECKSUM_BYTES], stored[-_CHECKSUM_BYTES:]
        if checksum != _checksum(data):
            path.unlink(missing_ok=True)
            return None
        return data

    def put(self, key: str, data: bytes) -> None:
        """Stores a piece whole or not at all; OSError where the disk is full or faulty."""
        path = self._path(key)
        path.parent.mkdir(exist_ok=True)
        handle, part = tempfile.mkstemp(prefix=_PART_PREFIX, dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.write(_checksum(data))
            Path(part).replace(path)
        except OSError:
            Path(part).unlink(missing_ok=True)
            raise
        self._trim_now_and_then(len(data))

    def _path(self, key: str) -> Path:
        return self._folder / key[:2] / key

    def _trim_now_and_then(self, written: int) -> None:
        with self._lock:
            self._untrimmed_bytes += written
            if self._untrimmed_bytes * _TRIM_SHARE <= self._limit_bytes:
                return
            self._untrimmed_bytes = 0
            _trim(self._folder, self._limit_bytes, self._max_age_s)


def _trim(folder: Path, limit_bytes: int, max_age_s: float | None) -> None:
    """Removes the pieces that were used least recently until the limit is kept with some room.

    And those of before `max_age_s`. Other processes may do the same meanwhile.
    """
    pieces = []
    for group in os.scandir(folder):
        if group.is_dir():
            pieces += _pieces(Path(group.path))
    total = sum(size for _, size, _ in pieces)
    oldest_ns = 0 if max_age_s is None else time.time_ns() - int(max_age_s * 1e9)
    goal = total if total <= limit_bytes else limit_bytes * _TRIM_TO
    for used_ns, size, path in sorted(pieces):
        if total <= goal and used_ns >= oldest_ns:
            return
        path.unlink(missing_ok=True)
        total -= size


def _pieces(group: Path) -> list[tuple[int, int, Path]]:
    """(time of last use in ns, bytes, path) of the pieces; unfinished ones of dead processes go."""
    pieces = []
    for entry in os.scandir(group):
        try:
            status = entry.stat()
        except FileNotFoundError:
            continue
        path = Path(entry.path)
        if not entry.name.startswith(_PART_PREFIX):
            pieces.append((status.st_mtime_ns, status.st_size, path))
        elif time.time() - status.st_mtime > _STALE_PART_S:
            path.unlink(missing_ok=True)
    return pieces


def _checksum(data: bytes) -> bytes:
    return zlib.crc32(data).to_bytes(_CHECKSUM_BYTES, "little")
