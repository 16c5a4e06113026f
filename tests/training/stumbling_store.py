"""A store in memory that fails as real ones do, at chosen moments."""

from collections.abc import Callable
from dataclasses import dataclass, field

from fsspec.implementations.memory import MemoryFileSystem

from training.run_folder import Patience, RunFolder


class Killed(BaseException):
    """Stands for SIGKILL: nothing may run after it."""


@dataclass
class Moods:
    """What the store does next."""

    fail_puts: int = 0
    """Puts that raise before anything is stored."""
    cut_puts: int = 0
    """Puts that store half a file and tell nobody."""
    alter_puts: int = 0
    """Puts that store as many bytes, but others."""
    error: Exception = field(default_factory=lambda: OSError("503 slow down"))
    may_delete: bool = True
    """False where deletes are refused, even of what is not there."""
    kill_at: int | None = None
    """Number of the write or delete, 0 first, before which the process is killed."""
    writes: int = 0
    """Writes and deletes so far."""
    before_put: Callable[[], None] = lambda: None
    before_read: Callable[[], None] = lambda: None
    ignores_conditions: bool = False
    """True where a file is replaced that should be written only if it is not there."""


class StumblingFileSystem(MemoryFileSystem):
    protocol = "stumbling"
    cachable = False

    def __init__(self, moods: Moods) -> None:
        super().__init__()
        self.moods = moods
        self.store = {}
        self.pseudo_dirs = [""]

    def put_file(self, lpath: str, rpath: str, **kwargs: object) -> None:
        self._before_put()
        super().put_file(lpath, rpath, **kwargs)
        self._cut(rpath)

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **_: object) -> None:
        self._before_put()
        super().pipe_file(path, value, "overwrite" if self.moods.ignores_conditions else mode)
        self._cut(path)

    def cat_file(self, path: str, **kwargs: object) -> bytes:
        self.moods.before_read()
        return bytes(super().cat_file(path, **kwargs))

    def rm_file(self, path: str) -> None:
        if not self.moods.may_delete:
            raise PermissionError("AccessDenied")
        if self.exists(path):
            self._count()
        super().rm_file(path)

    def _before_put(self) -> None:
        self._count()
        self.moods.before_put()
        if self.moods.fail_puts:
            self.moods.fail_puts -= 1
            raise self.moods.error

    def _cut(self, path: str) -> None:
        if self.moods.cut_puts:
            self.moods.cut_puts -= 1
            data = self.store[path].getvalue()
            super().pipe_file(path, data[: len(data) // 2])
        if self.moods.alter_puts:
            self.moods.alter_puts -= 1
            super().pipe_file(path, self.store[path].getvalue()[:-1] + b"?")

    def _count(self) -> None:
        if self.moods.kill_at == self.moods.writes:
            raise Killed
        self.moods.writes += 1


def stumbling_folder(moods: Moods) -> RunFolder:
    patience = Patience(attempts=3, backoff_s=0.0)
    return RunFolder("stumbling://run", "/run", StumblingFileSystem(moods), patience)
