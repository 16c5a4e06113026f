"""A run's folder on any fsspec URL: whole files or none, from stores that stumble too.

Files are prepared locally and then put in one piece. fsspec's `open(path, "wb")` is never used: an
error inside its `with` block publishes the part that was written (measured on S3). On a local disk
a file is synced and renamed into place, so a SIGKILL at any instant leaves the old file, the new
one, or none. Sizes are checked after every put.
"""

import logging
import os
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import fsspec
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from models.urls import holds_credentials, http_status, is_refusal, public_url
from training.stored_content import Content, content_of, is_read_back, is_told, part_bytes
from training.unfinished import abort_uploads, clear_unfinished

T = TypeVar("T")

logger = logging.getLogger(__name__)


class StoreError(OSError):
    """A store that did not do what was asked, after all attempts."""


@dataclass(frozen=True)
class Patience:
    """How a stumbling store is asked again."""

    attempts: int = 6
    """Times in all."""
    backoff_s: float = 0.5
    """Seconds before the second attempt; doubled before each further one, up to 30."""


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run; names are relative to it, with slashes."""

    url: str
    """Absolute, without a slash at the end."""
    root: str
    """The same as the file system spells it."""
    filesystem: AbstractFileSystem
    patience: Patience

    @property
    def is_local(self) -> bool:
        """True where files are on a disk of this machine."""
        return isinstance(self.filesystem, LocalFileSystem)

    @property
    def _is_s3(self) -> bool:
        return "s3" in self.filesystem.protocol

    def path(self, name: str) -> str:
        """`name` as the file system spells it."""
        return f"{self.root}/{name}"

    def put(self, source: Path, name: str) -> None:
        """Publishes a local file as `name`, whole or not at all; a local run takes the file itself.

        Raises:
            StoreError: the store refused it, or every attempt failed.
        """
        try:
            self._retry(lambda: self._put_once(source, name), "write", name)
        except FileNotFoundError as error:
            raise self._no_bucket(name, error) from error

    def write(self, name: str, data: bytes) -> None:
        """Publishes `data` as `name`, whole or not at all, without a local copy of it.

        Raises:
            StoreError: as `put`.
        """
        try:
            self._retry(lambda: self._write_once(data, name), "write", name)
        except FileNotFoundError as error:
            raise self._no_bucket(name, error) from error

    def create(self, name: str, data: bytes) -> None:
        """Publishes `data` as `name` only where nothing is there yet, whole or not at all.

        Some stores ignore the condition and replace what is there (rclone: measured). Where an
        answer was lost on its way, the file that is there may be this one.

        Raises:
            FileExistsError: something is there.
            StoreError: as `put`.
        """
        try:
            self._retry(lambda: self._create_once(data, name), "write", name)
        except FileNotFoundError as error:
            raise self._no_bucket(name, error) from error

    def read(self, name: str) -> bytes:
        """The bytes of `name`.

        Raises:
            FileNotFoundError: there is no such file.
            StoreError: every attempt failed.
        """
        return bytes(self._retry(lambda: self.filesystem.cat_file(self.path(name)), "read", name))

    def fetch(self, name: str, spool: Path) -> Path:
        """A local file with the bytes of `name`: on a local disk itself, else a copy in `spool`.

        Raises:
            FileNotFoundError: there is no such file.
            StoreError: every attempt failed.
        """
        if self.is_local:
            return Path(self.path(name))
        target = spool / Path(name).name
        self._retry(lambda: self.filesystem.get_file(self.path(name), str(target)), "read", name)
        return target

    def size(self, name: str) -> int | None:
        """Bytes of `name`; None where there is no such file."""
        try:
            return int(self._retry(lambda: self._stored_info(name), "look at", name)["size"])
        except FileNotFoundError:
            return None

    def names(self, folder: str) -> list[str]:
        """Names of what lies directly in `folder`, sorted; empty where there is no such folder."""
        try:
            found = self._retry(lambda: self._list(folder), "list", folder)
        except FileNotFoundError:
            return []
        names = sorted(Path(str(path)).name for path in found)
        return [name for name in names if not name.startswith(SPOOL)]

    def delete(self, name: str) -> None:
        """Removes one file; it may be gone already."""
        with suppress(FileNotFoundError):
            self._retry(lambda: self.filesystem.rm_file(self.path(name)), "delete", name)

    def delete_folder(self, name: str) -> None:
        """Removes a folder that holds nothing but what a killed process left half-prepared; object
        stores have none.
        """
        if self.is_local:
            folder = Path(self.path(name))
            for left in folder.glob(f"{SPOOL}*"):
                left.unlink(missing_ok=True)
            with suppress(OSError):
                folder.rmdir()

    @contextmanager
    def spool(self) -> Iterator[Path]:
        """A fresh local folder to prepare files in, on the disk of a local run; gone afterwards."""
        parent = Path(self.root) if self.is_local else None
        if parent:
            parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=parent, prefix=SPOOL) as spool:
            yield Path(spool)

    def clear_spool(self) -> None:
        """Removes what killed processes left half-prepared or half-sent; for the one writer."""
        if self._is_s3:
            try:
                for folder in LARGE:
                    abort_uploads(self.filesystem, self.path(folder))
            except _stumbles() as error:
                logger.warning("%s: parts of files may be left: %s", self.url, _one_line(error))
        if self.is_local:
            clear_unfinished(Path(self.root), SPOOL)

    def _put_once(self, source: Path, name: str) -> None:
        if self.is_local:
            _move_into_place(source, Path(self.path(name)))
            return
        content = content_of(source)
        parts = {"chunksize": part_bytes(content.size)} if self._is_s3 else {}
        self.filesystem.put_file(str(source), self.path(name), **parts)
        self._check_stored(content, name)

    def _write_once(self, data: bytes, name: str) -> None:
        if self.is_local:
            with _beside(Path(self.path(name)), data) as part:
                _move_into_place(part, Path(self.path(name)))
            return
        parts = {"chunksize": part_bytes(len(data))} if self._is_s3 else {}
        self.filesystem.pipe_file(self.path(name), data, **parts)
        self._check_stored(content_of(data), name)

    def _check_stored(self, content: Content, name: str) -> None:
        info = self._stored_info(name)
        if info["size"] != content.size:
            raise StoreError(f"the store holds {info['size']} of {content.size} bytes")
        if is_told(content, info) or is_read_back(content, self.filesystem, self.path(name)):
            return
        raise StoreError("the store holds other bytes than were put there")

    def _create_once(self, data: bytes, name: str) -> None:
        if self.is_local:
            with _beside(Path(self.path(name)), data) as part:
                _link_into_place(part, Path(self.path(name)))
            return
        try:
            self.filesystem.pipe_file(self.path(name), data, mode="create")
        except _stumbles() as error:
            if http_status(error) in (409, 412):
                raise FileExistsError(self.path(name)) from error
            raise

    def _no_bucket(self, name: str, error: FileNotFoundError) -> StoreError:
        return StoreError(
            f"could not write {self.url}/{name}: {_one_line(error)}; does the bucket exist?"
        )

    def _stored_info(self, name: str) -> dict[str, Any]:
        self.filesystem.invalidate_cache()
        info: dict[str, Any] = self.filesystem.info(self.path(name))
        return info

    def _list(self, folder: str) -> list[str]:
        self.filesystem.invalidate_cache()
        found: list[str] = self.filesystem.ls(self.path(folder), detail=False)
        return found

    def _retry(self, action: Callable[[], T], verb: str, name: str) -> T:
        problem: BaseException | None = None
        for attempt in range(self.patience.attempts):
            if attempt:
                time.sleep(min(30.0, self.patience.backoff_s * 2 ** (attempt - 1)))
            try:
                return action()
            except (FileNotFoundError, FileExistsError):
                raise
            except PermissionError as error:
                raise StoreError(
                    f"may not {verb} {self.url}/{name}: {_one_line(error)}; check the credentials"
                ) from error
            except _stumbles() as error:
                if is_refusal(error):
                    raise StoreError(
                        f"could not {verb} {self.url}/{name}: {_one_line(error)}; the store will "
                        "not do this however often it is asked"
                    ) from error
                problem = error
                if attempt + 1 == self.patience.attempts:
                    break  # told by the error below
                logger.warning("%s %s/%s: %s", verb, self.url, name, _one_line(error))
        raise StoreError(
            f"could not {verb} {self.url}/{name} in {self.patience.attempts} attempts: "
            f"{_one_line(problem)}"
        ) from problem


SPOOL = ".writing-"
"""How half-prepared files and folders of them are called, inside a local run and elsewhere."""


LARGE = ("checkpoints", "best")
"""Folders of a run with files so large that they are sent in parts, by nobody but its writer."""


def open_run_folder(
    url: str,
    storage_options: Mapping[str, object] | None = None,
    patience: Patience | None = None,
) -> RunFolder:
    """The run folder at `url`; a path without a protocol is local and is made absolute.

    Nothing is read or written yet. `storage_options` go to fsspec's file system of the URL's
    protocol.

    Raises:
        ValueError: an empty URL, one with a password, an unknown protocol, or one whose package is
            not installed.
    """
    if not url:
        raise ValueError(
            "run= is empty; give a folder or a URL, e.g. run=runs/a or run=s3://bucket/runs/a"
        )
    if holds_credentials(url):
        raise ValueError(
            f"run={public_url(url)} was given with a password or a signature in it: leave it out "
            "and give it by the environment, e.g. AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )
    absolute = url.rstrip("/") if "://" in url else str(Path(url).expanduser().absolute())
    try:
        filesystem, root = fsspec.core.url_to_fs(absolute, **(storage_options or {}))
    except ImportError as error:
        raise ValueError(f"run={url} needs a package that is not installed: {error}") from None
    return RunFolder(absolute, str(root).rstrip("/"), filesystem, patience or Patience())


def _move_into_place(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.stat().st_dev != target.parent.stat().st_dev:
        source = Path(shutil.copyfile(source, target.with_name(f".{target.name}.{os.getpid()}")))
    _sync(source)
    source.replace(target)
    _sync(target.parent)


@contextmanager
def _beside(target: Path, data: bytes) -> Iterator[Path]:
    """A file with `data` in the folder of `target`; gone afterwards, unless it was moved."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{SPOOL}{target.name}-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        part.write_bytes(data)
        yield part
    finally:
        part.unlink(missing_ok=True)


def _link_into_place(part: Path, target: Path) -> None:
    """FileExistsError where there is a `target`."""
    _sync(part)
    try:
        os.link(part, target)
    except FileExistsError:
        raise
    except OSError:
        # No hard links here: a reader may find it half-written for an instant.
        with target.open("xb") as file:
            file.write(part.read_bytes())
        _sync(target)
    _sync(target.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _one_line(error: BaseException | None) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _stumbles() -> tuple[type[Exception], ...]:
    """What the common file systems raise when a store cannot be reached or answers 5xx.

    Most of it is OSError; s3fs and gcsfs let some errors of their libraries through. A library
    that was never imported has raised nothing.
    """
    theirs = [vars(sys.modules[module])[name] for module, name in _FOREIGN if module in sys.modules]
    return (OSError, *theirs)


_FOREIGN = (
    ("botocore.exceptions", "BotoCoreError"),
    ("botocore.exceptions", "ClientError"),
    ("aiohttp.client_exceptions", "ClientError"),
    ("gcsfs.retry", "HttpError"),
)
