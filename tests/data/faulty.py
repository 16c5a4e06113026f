"""A filesystem for tests that fails as it is told: "faulty://path" is the local file at /path."""

from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pytest
from fsspec import AbstractFileSystem

Fault = Callable[[bytes], bytes]
"""What happens to the bytes of one ranged read; it may raise."""


class FaultyFileSystem(AbstractFileSystem):
    """Each ranged read meets the next fault of the list; reads are honest when it is used up."""

    protocol = "faulty"
    cachable = False
    faults: list[Fault]
    reads: list[tuple[str, int, int]]

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(path).removeprefix("faulty:/")

    def cat_file(self, path: str, start: int | None = None, end: int | None = None) -> bytes:
        assert start is not None
        assert end is not None
        data = Path(path).read_bytes()[start:end]
        type(self).reads.append((path, start, end))
        return type(self).faults.pop(0)(data) if type(self).faults else data

    def size(self, path: str) -> int:
        return Path(path).stat().st_size


@pytest.fixture
def faulty() -> Iterator[type[FaultyFileSystem]]:
    """The class of the filesystem, its faults to be set."""
    FaultyFileSystem.faults = []
    FaultyFileSystem.reads = []
    fsspec.register_implementation("faulty", FaultyFileSystem, clobber=True)
    yield FaultyFileSystem
    FaultyFileSystem.faults = []


def cut_off(data: bytes) -> bytes:
    """A connection that ends in the middle without a word."""
    return data[: len(data) // 2]


def timed_out(data: bytes) -> bytes:
    """A request that is not answered."""
    raise TimeoutError("no answer")


def forbidden(data: bytes) -> bytes:
    """Credentials that do not reach."""
    raise PermissionError("Access Denied")
