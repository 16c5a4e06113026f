"""What happened to a run, told once: `history/START.jsonl`, one small file for every start.

The one process that drives a start writes it: the driver of a Ray job, or the run itself where it
is alone. A file is rewritten whole in the background at every event, so anybody can read it while
the run goes on, on stores that cannot append too. Telling never stops the run: what a store did not
take is kept and written with the next event.
"""

import json
import logging
import secrets
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from typing import Literal

from training.moments import Now, utc_now
from training.run_folder import RunFolder

logger = logging.getLogger(__name__)

FOLDER = "history"

Kind = Literal[
    "started",
    "workers",
    "first_step",
    "preemption_notice",
    "worker_lost",
    "restarting",
    "waiting",
    "resized",
    "hung",
    "bad_step",
    "upload_failed",
    "store_away",
    "store_back",
    "stop_asked",
    "stopped",
    "finished",
    "failed",
    "lease_lost",
]
"""The words for what happens."""


@dataclass(frozen=True)
class Event:
    """One thing that happened."""

    at: str
    """UTC, by the clock of the writer."""
    kind: str
    """One of `Kind`, or a word of another version."""
    text: str
    """One line for a person."""
    step: int | None = None
    """Updates done, where that is known."""
    facts: Mapping[str, object] = field(default_factory=dict)
    """What a program may want to know; plain values."""


class History:
    """The events of one start; `add` may be called from any thread."""

    def __init__(self, folder: RunFolder, now: Now = utc_now) -> None:
        self._folder = _place(folder)
        self._now = now
        self._name = _file_name(now())
        self._events: list[Event] = []
        self._lock = threading.Lock()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="history")
        self._written = 0
        self._queued: Future[None] | None = None

    def add(self, kind: Kind, text: str, step: int | None = None, **facts: object) -> None:
        """Tells an event; returns at once and never raises for a store that stumbles."""
        with self._lock:
            self._events.append(Event(self._now(), kind, text, step, facts))
        if self._queued is None or self._queued.done() or self._queued.running():
            self._queued = self._thread.submit(self._write)

    def close(self) -> None:
        """Returns when all is written, or the store has refused it, which is logged."""
        if self._queued is not None:
            self._queued.result()
        self._thread.shutdown()
        if self._written < len(self._events):
            logger.error(
                "%d events are not in %s/%s",
                len(self._events) - self._written,
                self._folder.url,
                self._name,
            )

    def __enter__(self) -> "History":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _write(self) -> None:
        with self._lock:
            events = tuple(self._events)
        text = "".join(json.dumps(asdict(event), default=str) + "\n" for event in events)
        try:
            self._folder.write(self._name, text.encode())
        except OSError as error:
            logger.warning("the history waits for the next event to be written: %s", error)
        else:
            self._written = len(events)


def read_history(folder: RunFolder) -> tuple[Event, ...]:
    """The events of all starts, in order; empty where nothing was told.

    Raises:
        StoreError: the store cannot be read.
    """
    place = _place(folder)
    names = [name for name in place.names("") if name.endswith(".jsonl")]
    return tuple(event for name in names for event in _events_of(place, name))


def _events_of(place: RunFolder, name: str) -> Iterator[Event]:
    for line in place.read(name).decode().splitlines():
        try:
            yield Event(**json.loads(line))
        except (TypeError, ValueError):
            logger.warning("%s/%s: leaving out a line: %s", place.url, name, line[:60])


def _place(folder: RunFolder) -> RunFolder:
    """With a spool of its own: the run's writer clears that of the run's folder when it starts."""
    return replace(folder, url=f"{folder.url}/{FOLDER}", root=f"{folder.root}/{FOLDER}")


def _file_name(moment: str) -> str:
    """Sorted as the starts were; two starts at one moment have two files."""
    return f"{moment.replace(':', '')}-{secrets.token_hex(3)}.jsonl"
