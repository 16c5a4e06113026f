"""Folders by their URL: one way to open them and to put whole files there, on any filesystem.

A file is never streamed to its final name: fsspec's `open(path, "wb")` publishes what was written
so far when an exception passes (seen on S3: 20 MiB of a cut file, visible). A file is made locally,
put whole, and its size is checked.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import fsspec
from fsspec.implementations.local import LocalFileSystem

from models.urls import has_login, public_url

StorageOptions = Mapping[str, object]


class StorageError(ValueError):
    """A URL that cannot be opened, or a file that did not arrive whole."""


class StorageUnreachable(OSError):  # noqa: N818
    """A storage that did not answer however often it was asked; a later start may find it back."""


@dataclass(frozen=True)
class Folder:
    """A folder (or a file) on some filesystem."""

    url: str
    """As the user wrote it, without a slash at the end; used in messages."""
    filesystem: fsspec.AbstractFileSystem
    path: str
    """The folder's path inside the filesystem."""

    @property
    def is_local(self) -> bool:
        """True where the files are on this machine's own disks."""
        return isinstance(self.filesystem, LocalFileSystem)

    def at(self, name: str) -> str:
        """Path of a file of this folder inside the filesystem."""
        return f"{self.path}/{name}"

    def inside(self, name: str) -> "Folder":
        """A folder in this one."""
        return Folder(f"{self.url}/{name}", self.filesystem, self.at(name))


def open_folder(url: str, storage_options: StorageOptions | None = None) -> Folder:
    """The folder of a local path or any fsspec URL; it need not exist yet.

    Raises StorageError where the protocol is unknown or its package is not installed, or a password
    stands in the URL, which gets into messages and files.
    """
    if has_login(url):
        raise StorageError(
            f"{public_url(url)} was given with a password in it: leave it out and give it by the "
            "environment, e.g. AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or FSSPEC_SFTP_PASSWORD"
        )
    try:
        filesystem, path = fsspec.core.url_to_fs(url, **dict(storage_options or {}))
    except (ImportError, ValueError) as error:
        raise StorageError(
            f"cannot open {public_url(url)}: {error} (s3:// needs `pip install 'querypatch[s3]'`, "
            "gs:// needs `pip install 'querypatch[gcs]'`)"
        ) from error
    return Folder(url.rstrip("/") or "/", filesystem, path.rstrip("/"))


def transient_errors(url: str) -> tuple[type[Exception], ...]:
    """What may pass by itself; a filesystem's own errors exist only where its package does."""
    match url.partition("://")[0]:
        case "s3" | "s3a":
            from aiohttp import ClientError
            from botocore.exceptions import BotoCoreError

            return (OSError, ClientError, BotoCoreError)
        case "gs" | "gcs":
            from aiohttp import ClientError
            from gcsfs.retry import ChecksumError, HttpError
            from google.auth.exceptions import GoogleAuthError

            return (OSError, ClientError, ChecksumError, HttpError, GoogleAuthError)
        case "http" | "https":
            from aiohttp import ClientError

            return (OSError, ClientError)
        case _:
            return (OSError,)


def file_sizes(folder: Folder) -> dict[str, int]:
    """Size in bytes of each file that lies directly in the folder, by name; empty where it is not.

    What the filesystem object remembers of earlier listings is not used.
    """
    folder.filesystem.invalidate_cache(folder.path)
    try:
        entries = folder.filesystem.ls(folder.path, detail=True)
    except FileNotFoundError:
        return {}
    files = (entry for entry in entries if entry["type"] == "file")
    return {entry["name"].rpartition("/")[2]: int(entry["size"]) for entry in files}


def put_bytes(folder: Folder, name: str, data: bytes) -> None:
    """Write a small file so that it is there whole or not at all."""
    if not folder.is_local:
        folder.filesystem.pipe_file(folder.at(name), data)
        return
    path = Path(folder.at(name))
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.part")
    unfinished.write_bytes(data)
    unfinished.replace(path)


def move_file(local: Path, folder: Folder, name: str, attempts: int = 3) -> None:
    """Move a local file into the folder and check that all its bytes arrived.

    Tries again where fewer arrived (on top of the filesystem's own retries), then StorageError.
    """
    path, size = folder.at(name), local.stat().st_size
    if folder.is_local:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        shutil.move(local, path)
        return
    for _ in range(attempts):
        folder.filesystem.put_file(str(local), path)
        folder.filesystem.invalidate_cache(folder.path)
        arrived = folder.filesystem.size(path)
        if arrived == size:
            local.unlink()
            return
    raise StorageError(
        f"{folder.url}/{name} holds {arrived} bytes after writing {size}, {attempts} times: the "
        "storage is full or faulty; make room and run the same command again"
    )


@contextmanager
def local_copy(folder: Folder, name: str) -> Iterator[Path]:
    """The file on this machine: itself where it is here, else a copy that is removed afterwards."""
    if folder.is_local:
        yield Path(folder.at(name))
        return
    with tempfile.TemporaryDirectory(prefix="querypatch-") as scratch:
        copy = Path(scratch) / "copy"
        folder.filesystem.get_file(folder.at(name), str(copy))
        yield copy
