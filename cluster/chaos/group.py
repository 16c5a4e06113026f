"""The workers of one attempt: started together, watched, and ended together, as Ray does.

A worker that is lost takes the others with it: they fail in their next sum over the workers, or are
killed a moment later. A group that gives no sign of life is taken for hung. Processes come from a
fork server that has torch loaded, so a start costs a second and not ten.
"""

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cluster.chaos.saboteur import Assignment
from cluster.chaos.schedule import (
    Attempt,
    Fault,
    Freeze,
    FullDisk,
    Hang,
    Kill,
    KillAtFile,
    LoseLoader,
    Notice,
    Rival,
    Terminate,
    fault_line,
)
from cluster.chaos.worker import work
from cluster.processes import kill_tree

START_S = 180.0
"""Seconds that a group has until its first batch."""
UNFORESEEN_S = 60.0
"""Seconds without a batch after which a group is taken for hung."""
END_S = 4.0
"""Seconds that the others have when one worker is gone."""
REFUSED_S = 60.0
"""Seconds in which a group that may not write must have ended by itself."""

_POLL_S = 0.02
_UNDER_WAY = 2
"""Batches after which a group has shown that it trains."""

Ending = Literal["finished", "lost", "hung", "frozen"]
"""How a group ended: all returned; one was lost or failed; no sign of life; they stand still."""


@dataclass(frozen=True)
class Note:
    """A batch that a worker took."""

    step: int
    keys: tuple[str, ...]
    skipped: tuple[int, ...]
    at: float
    """Of `time.monotonic`, which all processes of a machine share."""


@dataclass(frozen=True)
class Ended:
    """What became of an attempt."""

    workers: int
    ending: Ending
    step: int | None
    """Updates done, where all workers returned."""
    notes: tuple[tuple[Note, ...], ...]
    """Of each worker."""
    begins: tuple[int, str] | None
    """The first update, and a hash of the weights it began with."""
    saves: tuple[tuple[int, str], ...]
    """Updates done at each checkpoint, and a hash of its weights."""
    fired: tuple[str, ...]
    """The faults that happened."""
    refused: str | None
    """Why the run's folder was not its own to write to."""
    loaders: tuple[int, ...]
    """Processes that the workers had started."""
    log: Path


@dataclass(frozen=True)
class Place:
    """Where an attempt keeps what is not the run's."""

    folder: Path
    recipe: str
    machines: Path
    """Folder with a folder for temporary files of each machine."""
    key: int
    poisoned_step: int


class Group:
    """Processes of one attempt."""

    def __init__(self, attempt: Attempt, place: Place) -> None:
        self.attempt = attempt
        self.ending: Ending | None = None
        self._place = place
        place.folder.mkdir(parents=True)
        (place.machines / str(attempt.machine)).mkdir(parents=True, exist_ok=True)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([work.__module__])
        assignments = [_assignment(attempt, place, rank) for rank in range(attempt.workers)]
        self._notes = [Path(told.notes) for told in assignments]
        self._processes: list[Any] = [
            context.Process(target=work, args=(told,)) for told in assignments
        ]
        self._noted, self._noted_at = 0, time.monotonic()
        for process in self._processes:
            process.start()

    def look(self) -> Ending | None:
        """How it ended, if it did; the others are ended then too."""
        if self.ending is None:
            self.ending = self._found_ending()
            if self.ending is not None:
                self.end()
        return self.ending

    def has_met(self, fault: Fault) -> bool:
        """Whether the fault happened here."""
        return any(fault_line(fault) in told for told in _fired(self._read_notes()))

    @property
    def is_under_way(self) -> bool:
        """Whether it trains."""
        return any(len(list(_batches(lines))) >= _UNDER_WAY for lines in self._read_notes())

    def freeze(self) -> None:
        """All processes stand still."""
        self._signal(signal.SIGSTOP)
        self.ending = "frozen"

    def thaw(self) -> None:
        """All go on."""
        self._signal(signal.SIGCONT)

    def is_gone(self) -> bool:
        """Whether no process is left."""
        return all(process.exitcode is not None for process in self._processes)

    def end(self) -> None:
        """Kills what is left."""
        for process in self._processes:
            if process.pid is not None and process.is_alive():
                kill_tree(process.pid)
            process.join()

    def ended(self) -> Ended:
        """What became of it."""
        assert self.ending is not None
        return ended_of(self._read_notes(), self.ending, _log_of(self._place))

    def _found_ending(self) -> Ending | None:
        codes = [process.exitcode for process in self._processes]
        if all(code == 0 for code in codes):
            return "finished"
        if any(code not in (None, 0) for code in codes):
            if not _takes_all(self.attempt, codes):
                self._wait(END_S)
            return "lost"
        return None if self._shows_life() else "hung"

    def _shows_life(self) -> bool:
        now = time.monotonic()
        noted = sum(path.stat().st_size for path in self._notes if path.exists())
        if noted != self._noted:
            self._noted, self._noted_at = noted, now
        return now - self._noted_at < (UNFORESEEN_S if noted else START_S)

    def _wait(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        for process in self._processes:
            process.join(max(0.0, deadline - time.monotonic()))

    def _signal(self, number: signal.Signals) -> None:
        for process in self._processes:
            with suppress(ProcessLookupError):
                os.kill(process.pid, number)

    def _read_notes(self) -> list[list[dict[str, Any]]]:
        return [read_notes(path) for path in self._notes]


def ended_of(notes: list[list[dict[str, Any]]], ending: Ending, log: Path) -> Ended:
    """What became of a group by the notes of its workers, in the order of their ranks."""
    lines = [line for worker in notes for line in worker]
    steps = {int(line["end"]) for line in lines if "end" in line}
    return Ended(
        workers=len(notes),
        ending=ending,
        step=min(steps, default=None) if ending == "finished" else None,
        notes=tuple(tuple(_batches(worker)) for worker in notes),
        begins=next(_pairs(notes[0], "begins"), None),
        saves=tuple(_pairs(notes[0], "saves")),
        fired=tuple(dict.fromkeys(_fired(notes))),
        refused=next((line["refused"] for line in lines if "refused" in line), None),
        loaders=tuple(pid for line in lines for pid in line.get("loaders", ())),
        log=log,
    )


def run_attempt(attempt: Attempt, place: Place, frozen: list[Group]) -> list[Ended]:
    """Starts the workers of an attempt and returns when they are gone, or frozen.

    What comes back is the attempt, and a second start of the run where it had one. Groups in
    `frozen` go on once this one trains; one that freezes is put there.
    """
    group, rival = Group(attempt, place), None
    rivalry, freezing = _first(attempt, Rival), _first(attempt, Freeze)
    try:
        while group.look() is None:
            time.sleep(_POLL_S)
            if rivalry and rival is None and group.has_met(rivalry):
                alone = Attempt(attempt.workers, machine=1 - attempt.machine)
                rival = Group(alone, _beside(place))
            if freezing and group.has_met(freezing):
                group.freeze()
                frozen.append(group)
            elif frozen and group.is_under_way:
                thaw_all(frozen)
        if rival is None:
            return [group.ended()]
        while rival.look() is None:
            time.sleep(_POLL_S)
        return [group.ended(), rival.ended()]
    finally:
        if group.ending != "frozen":
            group.end()
        if rival is not None:
            rival.end()


def trained_together(one: Ended, other: Ended) -> bool:
    """Whether both took batches in the same stretch of time."""
    spans = [
        [note.at for worker in ended.notes for note in worker] or [0.0] for ended in (one, other)
    ]
    return min(spans[0]) < max(spans[1]) and min(spans[1]) < max(spans[0])


def thaw_all(frozen: list[Group]) -> None:
    """Lets frozen groups go on."""
    for group in frozen:
        group.thaw()


def wait_for_end(frozen: list[Group]) -> list[Group]:
    """The groups that did not end by themselves in time; they are ended then."""
    thaw_all(frozen)
    deadline = time.monotonic() + REFUSED_S
    while time.monotonic() < deadline and not all(group.is_gone() for group in frozen):
        time.sleep(_POLL_S)
    left = [group for group in frozen if not group.is_gone()]
    for group in left:
        group.end()
    return left


def _assignment(attempt: Attempt, place: Place, rank: int) -> Assignment:
    return Assignment(
        recipe=place.recipe,
        rank=rank,
        world=attempt.workers,
        rendezvous=str(place.folder / "rendezvous"),
        notes=str(place.folder / f"rank-{rank}.jsonl"),
        log=str(_log_of(place)),
        temporary=str(place.machines / str(attempt.machine)),
        faults=tuple(fault for fault in attempt.faults if meets(fault, rank)),
        key=place.key,
        poisoned_step=place.poisoned_step,
    )


def meets(fault: Fault, rank: int) -> bool:
    """Whether a worker has a part in the fault; what is of the store is everybody's."""
    match fault:
        case (
            Kill(worker=worker)
            | Notice(worker=worker)
            | Hang(worker=worker)
            | LoseLoader(worker=worker)
        ):
            return worker == rank
        case KillAtFile() | FullDisk() | Terminate() | Rival() | Freeze():
            return rank == 0
        case _:
            return True


def _takes_all(attempt: Attempt, codes: list[int | None]) -> bool:
    return -signal.SIGKILL in codes and any(
        isinstance(fault, KillAtFile | Terminate | Notice)
        or (isinstance(fault, Kill) and fault.everybody)
        for fault in attempt.faults
    )


def _first(attempt: Attempt, kind: type[Rival | Freeze]) -> Fault | None:
    return next((fault for fault in attempt.faults if isinstance(fault, kind)), None)


def _beside(place: Place) -> Place:
    folder = place.folder.with_name(f"{place.folder.name}-rival")
    return Place(folder, place.recipe, place.machines, place.key + 50, place.poisoned_step)


def read_notes(path: Path) -> list[dict[str, Any]]:
    """The lines of one worker; none where it did not begin."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


def _batches(lines: list[dict[str, Any]]) -> Iterator[Note]:
    for line in lines:
        if "step" in line:
            yield Note(line["step"], tuple(line["keys"]), tuple(line["skipped"]), line["at"])


def _pairs(lines: list[dict[str, Any]], name: str) -> Iterator[tuple[int, str]]:
    for line in lines:
        if name in line:
            yield line[name], line["weights"]


def _fired(notes: list[list[dict[str, Any]]]) -> Iterator[str]:
    for lines in notes:
        for line in lines:
            if "fault" in line:
                yield line["fault"]


def _log_of(place: Place) -> Path:
    return place.folder / "log.txt"
