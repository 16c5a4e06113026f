"""A store for tests that refuses what it is told to: "refusing://path" is the local file /path."""

import hashlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem


class RefusingFileSystem(AbstractFileSystem):
    """Everything goes to the local disk, but for the words in `refused`."""

    protocol = "refusing"
    cachable = False
    refused: set[str]
    """Of write, read, list, delete. And what it does without a word: `changes` gives back other
    bytes, `hides` lists nothing, `keeps` deletes nothing, `overwrites` takes the second of two
    conditional writes, `sleeps` does not answer for some seconds.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._local = LocalFileSystem(auto_mkdir=True)

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(path).removeprefix("refusing:/")

    def put_file(self, lpath: str, rpath: str, **options: Any) -> None:
        self._refuse("write")
        self._local.put_file(lpath, rpath)

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **options: Any) -> None:
        self._refuse("write")
        taken = mode == "create" and "overwrites" not in self.refused
        self._local.pipe_file(path, value, mode="create" if taken else "overwrite")

    def cat_file(self, path: str, start: Any = None, end: Any = None, **options: Any) -> bytes:
        self._refuse("read")
        data: bytes = self._local.cat_file(path, start=start, end=end)
        return bytes(len(data)) if "changes" in self.refused else data

    def get_file(self, rpath: str, lpath: str, **options: Any) -> None:
        self._refuse("read")
        self._local.get_file(rpath, lpath)

    def info(self, path: str, **options: Any) -> dict[str, Any]:
        # The hash of what arrived, as S3 tells it: nothing is read back for that.
        told = dict(self._local.info(path))
        is_file = told["type"] == "file"
        return (
            {**told, "ETag": hashlib.md5(Path(path).read_bytes()).hexdigest()} if is_file else told
        )

    def ls(self, path: str, detail: bool = True, **options: Any) -> list[Any]:
        self._refuse("list")
        return [] if "hides" in self.refused else list(self._local.ls(path, detail=detail))

    def rm_file(self, path: str) -> None:
        self._refuse("delete")
        if "keeps" not in self.refused:
            self._local.rm_file(path)

    def rm(self, path: str, recursive: bool = False, maxdepth: int | None = None) -> None:
        self._refuse("delete")
        self._local.rm(path, recursive=recursive)

    def _refuse(self, word: str) -> None:
        if "sleeps" in self.refused:
            time.sleep(5)
        if word in self.refused:
            raise PermissionError("Access Denied")


@pytest.fixture
def refused() -> Iterator[set[str]]:
    """What the store refuses, to be filled."""
    RefusingFileSystem.refused = set()
    fsspec.register_implementation("refusing", RefusingFileSystem, clobber=True)
    yield RefusingFileSystem.refused
    RefusingFileSystem.refused = set()
