"""A store that fails as it is told: `chaos:///folder` is that folder of this machine's disk.

For fsspec it is no local disk, so a run in it takes the ways of an object store: whole objects,
sizes asked for after an upload, nothing appended, no renames. What fails is a function of (key,
request, name, how often that was asked), not of timing, so that two threads may ask in any order.
"""

import errno
import shutil
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from data.randomness import sample_generator

PROTOCOL = "chaos"

_REFUSALS: tuple[Callable[[], OSError], ...] = (
    lambda: OSError(errno.EIO, "503 Slow Down"),
    lambda: OSError(errno.EIO, "500 Internal Server Error"),
    lambda: TimeoutError("the store did not answer"),
    lambda: ConnectionResetError("connection reset by peer"),
)


@dataclass
class Weather:
    """What the store does to this process from now on."""

    key: int = 0
    """Decides, with the request, what fails."""
    stumbling: float = 0.0
    """Share of requests that fail, half of them after they were done, or are slow."""
    torn: float = 0.0
    """Share of uploads that leave a part of the object."""
    tells_torn: bool = True
    away_until: float = 0.0
    """Moment of `time.monotonic` until which nothing answers."""
    half_then: Callable[[], None] | None = None
    """Called when half of the next upload is there."""
    asked: Counter[str] = field(default_factory=Counter)
    lock: Lock = field(default_factory=Lock)

    def dice(self, request: str, name: str) -> tuple[float, float, float]:
        """Three numbers in 0..1 of this request; of the name only the end counts."""
        told = f"{request} {'/'.join(Path(name).parts[-2:])}"
        with self.lock:
            self.asked[told] += 1
            count = self.asked[told]
        generator = sample_generator(self.key, 0, count, told)
        return generator.random(), generator.random(), generator.random()


class ChaosFileSystem(fsspec.AbstractFileSystem):  # type: ignore[misc]
    """Objects in a folder; `weather` is this process's own."""

    protocol = PROTOCOL
    cachable = False
    weather = Weather()

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._disk = LocalFileSystem()

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(path).removeprefix(f"{PROTOCOL}://").rstrip("/")

    def cat_file(
        self, path: str, start: int | None = None, end: int | None = None, **_: Any
    ) -> bytes:
        """Bytes of an object; a connection that breaks in the middle gives fewer."""
        name = self._strip_protocol(path)

        def read() -> bytes:
            data = Path(name).read_bytes()
            return data[slice(start, end)]

        data: bytes = self._asked("read", name, read)
        is_cut = self.weather.dice("cut", name)[0] < self.weather.stumbling / 2
        return data[: len(data) // 2] if is_cut and start is not None else data

    def get_file(self, rpath: str, lpath: str, **_: Any) -> None:
        """A copy of an object on this machine."""
        name = self._strip_protocol(rpath)
        self._asked("read", name, lambda: shutil.copyfile(name, lpath))

    def put_file(self, lpath: str, rpath: str, **_: Any) -> None:
        """A local file as an object."""
        self._put(Path(lpath).read_bytes(), self._strip_protocol(rpath), "overwrite")

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **_: Any) -> None:
        """Bytes as an object; with mode `create` only where there is none yet."""
        self._put(value, self._strip_protocol(path), mode)

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        """Name, size and kind of what lies there."""
        name = self._strip_protocol(path)
        found: dict[str, Any] = self._asked("look at", name, lambda: self._disk.info(name))
        return found

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        """What lies in a folder; an object store has no folders without objects."""
        name = self._strip_protocol(path)
        found: list[Any] = self._asked("list", name, lambda: self._disk.ls(name, detail=True))
        seen = [entry for entry in found if _is_seen(Path(entry["name"]))]
        return seen if detail else [entry["name"] for entry in seen]

    def rm_file(self, path: str) -> None:
        """Removes an object."""
        name = self._strip_protocol(path)
        self._asked("delete", name, lambda: Path(name).unlink())

    def created(self, path: str) -> Any:
        """Not known."""
        raise NotImplementedError

    def _asked(self, request: str, name: str, action: Callable[[], Any]) -> Any:
        """What the action gives, or what becomes of it in this weather."""
        weather = self.weather
        if time.monotonic() < weather.away_until:
            raise ConnectionRefusedError(f"{request} {name}: the store is away")
        fate, kind, also = weather.dice(request, name)
        if fate >= weather.stumbling:
            return action()
        if kind < 1 / 3:
            time.sleep(0.1 * also)
            return action()
        if kind < 2 / 3:
            # Done, and nobody is told.
            action()
        raise _REFUSALS[int(also * len(_REFUSALS))]()

    def _put(self, data: bytes, name: str, mode: str) -> None:
        weather = self.weather
        is_torn = weather.dice("tear", name)[0] < weather.torn
        if weather.half_then is not None:
            _publish(data[: len(data) // 2], name, "overwrite")
            weather.half_then()
        if is_torn and mode == "overwrite":
            self._asked("write", name, lambda: _publish(data[: len(data) * 2 // 3], name, mode))
            if weather.tells_torn:
                raise ConnectionResetError("connection reset by peer")
            return
        self._asked("write", name, lambda: _publish(data, name, mode))


_UNFINISHED = ".chaos-part"


def _is_seen(path: Path) -> bool:
    if path.is_dir():
        return any(map(_is_seen, path.iterdir()))
    return path.suffix != _UNFINISHED


def _publish(data: bytes, name: str, mode: str) -> None:
    """The object, at once; with mode `create` FileExistsError where there is one."""
    target = Path(name)
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{target.name}.{time.monotonic_ns()}{_UNFINISHED}")
    part.write_bytes(data)
    if mode == "create":
        try:
            target.hardlink_to(part)
        finally:
            part.unlink()
    else:
        part.replace(target)


fsspec.register_implementation(PROTOCOL, ChaosFileSystem, clobber=True)
