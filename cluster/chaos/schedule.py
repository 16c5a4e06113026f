"""Fault schedules of `querypatch chaos`: which faults a run meets, and when. Pure.

A schedule is a few attempts, one after the other, each with its number of workers and its faults.
It is a pure function of (seed, number), so that one that went wrong can be repeated alone. Places
in time are counted in updates and files, not in seconds, as far as a fault allows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar, assert_never

import numpy as np

from data.randomness import sample_generator

T = TypeVar("T")

Store = Literal["disk", "objects"]
"""Where the run lies: a folder of this machine, or what behaves like an object store."""

_WORKERS = (1, 1, 2, 2, 3)
_LATEST = 5
"""Updates of an attempt before which its faults happen."""
_OF_CHECKPOINTS = ("model.safetensors", "state.pt", "manifest.json")
_OF_STARTS = ("metrics.jsonl", "recipe.yaml", "environment.json")


@dataclass(frozen=True)
class Kill:
    """SIGKILL of a worker, or of all of them, while they compute an update."""

    worker: int
    update: int
    """Of this attempt, 0 first; so below."""
    everybody: bool


@dataclass(frozen=True)
class KillAtFile:
    """SIGKILL of all while the first worker stores a file."""

    file: str
    count: int
    """The how-manieth time in this attempt that such a file is stored, 1 first."""
    moment: Literal["before", "half", "after"]
    """Of publishing the file; `half` leaves half of it, on a store where that can be."""


@dataclass(frozen=True)
class Terminate:
    """SIGTERM to the run: a checkpoint and an end."""

    update: int
    grace_s: float | None
    """Seconds after which all are killed as well; None leaves them the time they need."""


@dataclass(frozen=True)
class AskToStop:
    """The request of `querypatch stop` in the run's folder."""

    update: int


@dataclass(frozen=True)
class Notice:
    """A worker's machine announces its end, and all are killed some updates later."""

    worker: int
    update: int
    updates: int
    """Until the end."""


@dataclass(frozen=True)
class Hang:
    """A worker does nothing any more, until its watchdog ends it."""

    worker: int
    update: int


@dataclass(frozen=True)
class Rival:
    """The run is started a second time while it goes on."""

    update: int


@dataclass(frozen=True)
class Freeze:
    """All stand still, and go on when the next start of the run is under way."""

    update: int


@dataclass(frozen=True)
class LoseLoader:
    """SIGKILL of a worker's loader process."""

    worker: int
    update: int


@dataclass(frozen=True)
class FullDisk:
    """No file of the first worker may grow beyond 4 KiB for a while."""

    update: int
    updates: int
    """How long."""


@dataclass(frozen=True)
class StoreStumbles:
    """A share of requests fails (5xx, timeout, reset; some were done all the same) or is slow."""

    share: float


@dataclass(frozen=True)
class StoreAway:
    """Every request fails for a while."""

    update: int
    seconds: float


@dataclass(frozen=True)
class TornUploads:
    """A share of the uploads leaves only a part of the object."""

    share: float
    is_told: bool
    """Whether the request fails, too; else it says that all is well."""


Fault = (
    Kill
    | KillAtFile
    | Terminate
    | AskToStop
    | Notice
    | Hang
    | Rival
    | Freeze
    | LoseLoader
    | FullDisk
    | StoreStumbles
    | StoreAway
    | TornUploads
)


@dataclass(frozen=True)
class Attempt:
    """One start of the run."""

    workers: int
    faults: tuple[Fault, ...] = ()
    machine: int = 0
    """Whose disk holds what is not in the run's folder."""


@dataclass(frozen=True)
class Schedule:
    """What happens to one run; when all attempts are over it is started until it is done."""

    seed: int
    number: int
    store: Store
    loaders: int
    """Loader processes of each worker."""
    attempts: tuple[Attempt, ...]

    @property
    def last_workers(self) -> int:
        """Workers of the starts after the last attempt."""
        return self.attempts[-1].workers


def draw_schedule(seed: int, number: int) -> Schedule:
    """Schedule `number` of a seed."""
    dice = _Dice(sample_generator(seed, 0, number, "chaos"))
    store: Store = dice.one_of(("disk", "objects"))
    loaders = 1 if dice.happens(0.06) else 0
    workers = dice.one_of(_WORKERS)
    is_elastic = dice.happens(0.4)
    attempts = []
    for _ in range(1 + dice.below(3)):
        faults = [*_accompanying(dice, store), _ending(dice, store, loaders, workers)]
        attempts.append(Attempt(workers, tuple(faults), machine=dice.below(2)))
        if is_elastic:
            workers = dice.one_of(_WORKERS)
    last = tuple(_accompanying(dice, store))
    attempts.append(Attempt(workers, last, machine=dice.below(2)))
    return Schedule(seed, number, store, loaders, tuple(attempts))


def draw_ray_schedule(seed: int, number: int) -> Schedule:
    """Schedule `number` of a seed for whole jobs through Ray: one job that meets a fault, or two,
    and one that finishes.
    """
    dice = _Dice(sample_generator(seed, 0, number, "chaos through Ray"))
    attempts = []
    for _ in range(1 + dice.below(2)):
        workers, update = 1 + dice.below(2), dice.below(_LATEST)
        worker = dice.below(workers)
        faults: tuple[Fault, ...] = (
            Kill(worker, update, everybody=False),
            Kill(worker, update, everybody=True),
            KillAtFile(dice.one_of(_OF_CHECKPOINTS), 1 + dice.below(2), "before"),
            Terminate(update, None),
            Hang(worker, update),
        )
        attempts.append(Attempt(workers, (dice.one_of(faults),)))
    attempts.append(Attempt(1 + dice.below(2)))
    return Schedule(seed, number, "disk", 0, tuple(attempts))


def schedule_lines(schedule: Schedule) -> list[str]:
    """The schedule for a person, one line an attempt, under a line that names it."""
    where = {"disk": "on disk", "objects": "in an object store"}[schedule.store]
    loaders = f", {schedule.loaders} loader process a worker" if schedule.loaders else ""
    return [
        f"schedule {schedule.number} of seed {schedule.seed}: run {where}{loaders}",
        *(f"  {place}. {_attempt_line(attempt)}" for place, attempt in _counted(schedule)),
    ]


def fault_line(fault: Fault) -> str:
    """A fault in a few words."""
    match fault:
        case Kill(worker, update, everybody):
            whom = "all workers" if everybody else f"worker {worker}"
            return f"SIGKILL of {whom} in update {update}"
        case KillAtFile(file, count, moment):
            return f"SIGKILL of all {moment} {file} no. {count} is stored"
        case Terminate(update, grace_s):
            after = "" if grace_s is None else f", SIGKILL {grace_s:g} s later"
            return f"SIGTERM in update {update}{after}"
        case AskToStop(update):
            return f"asked to stop in update {update}"
        case Notice(worker, update, updates):
            return (
                f"worker {worker}'s machine announces its end in update {update}, "
                f"SIGKILL of all {updates} later"
            )
        case Hang(worker, update):
            return f"worker {worker} hangs in update {update}"
        case Rival(update):
            return f"started a second time in update {update}"
        case Freeze(update):
            return f"all frozen in update {update}, until the next start trains"
        case LoseLoader(worker, update):
            return f"SIGKILL of a loader process of worker {worker} in update {update}"
        case FullDisk(update, updates):
            return f"disk full from update {update} on, for {updates}"
        case StoreStumbles(share):
            return f"{share:.0%} of requests fail or are slow"
        case StoreAway(update, seconds):
            return f"store away in update {update} for {seconds:g} s"
        case TornUploads(share, is_told):
            return f"{share:.0%} of uploads torn{'' if is_told else ', untold'}"
        case _:
            assert_never(fault)


def kinds_of(schedules: Sequence[Schedule]) -> dict[str, int]:
    """How often each kind of fault is in the schedules."""
    names = [type(f).__name__ for s in schedules for a in s.attempts for f in a.faults]
    return {name: names.count(name) for name in sorted(set(names))}


class _Dice:
    """Draws by `random()` alone, whose numbers numpy does not change."""

    def __init__(self, generator: np.random.Generator) -> None:
        self._generator = generator

    def below(self, count: int) -> int:
        return int(self._generator.random() * count)

    def happens(self, share: float) -> bool:
        return bool(self._generator.random() < share)

    def one_of(self, choices: Sequence[T]) -> T:
        return choices[self.below(len(choices))]


def _ending(dice: _Dice, store: Store, loaders: int, workers: int) -> Fault:
    """A fault that ends an attempt, or should."""
    worker, update = dice.below(workers), dice.below(_LATEST)
    moments: tuple[Literal["before", "half", "after"], ...] = ("before", "after")
    if store == "objects":
        moments = ("before", "half", "after")
    endings: list[Fault] = [
        Kill(worker, update, everybody=False),
        Kill(worker, update, everybody=True),
        KillAtFile(dice.one_of(_OF_STARTS), 1, dice.one_of(moments)),
        KillAtFile(dice.one_of(_OF_CHECKPOINTS), 1 + dice.below(2), dice.one_of(moments)),
        KillAtFile(dice.one_of(_OF_CHECKPOINTS), 1 + dice.below(2), dice.one_of(moments)),
        Terminate(update, None),
        Terminate(update, dice.one_of((0.05, 0.2, 0.5))),
        AskToStop(update),
        Notice(worker, update, 1 + dice.below(4)),
        Hang(worker, update),
        Rival(update),
        Freeze(update),
        FullDisk(update, 1 + dice.below(4)),
    ]
    if loaders:
        endings = [*endings, *[LoseLoader(worker, update)] * 8]
    return dice.one_of(endings)


def _accompanying(dice: _Dice, store: Store) -> list[Fault]:
    """Faults that an attempt may live through."""
    if store == "disk" or dice.happens(0.4):
        return []
    choices: tuple[Fault, ...] = (
        StoreStumbles(dice.one_of((0.05, 0.2))),
        StoreAway(dice.below(_LATEST), dice.one_of((0.3, 2.0))),
        TornUploads(dice.one_of((0.1, 0.3)), is_told=dice.happens(0.5)),
    )
    return [dice.one_of(choices)]


def _counted(schedule: Schedule) -> list[tuple[int, Attempt]]:
    return list(enumerate(schedule.attempts, start=1))


def _attempt_line(attempt: Attempt) -> str:
    plural = "" if attempt.workers == 1 else "s"
    faults = "; ".join(map(fault_line, attempt.faults)) or "no fault"
    return f"{attempt.workers} worker{plural} on machine {attempt.machine}: {faults}"
