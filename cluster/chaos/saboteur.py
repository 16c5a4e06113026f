"""What a worker under faults does to itself: notes what it sees, and meets the faults it was told.

Faults happen between two lines of the program: when a batch is taken, when a file is stored, or in
the store that the worker talks to.
"""

import json
import multiprocessing
import os
import resource
import signal
import threading
import time
from collections.abc import Generator, Mapping
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, assert_never

import torch
from torch import nn

from cluster.chaos.schedule import (
    AskToStop,
    Fault,
    Freeze,
    FullDisk,
    Hang,
    Kill,
    KillAtFile,
    LoseLoader,
    Notice,
    Rival,
    StoreAway,
    StoreStumbles,
    Terminate,
    TornUploads,
    fault_line,
)
from cluster.chaos.store import ChaosFileSystem, Weather
from cluster.stages import parsed_recipe
from data.stream import ExactStream
from models.structures import Images
from training.control import ask_to_stop
from training.job import Checkpoints
from training.run_folder import RunFolder, open_run_folder
from training.snapshot import Position, TrainingState
from training.world import World

FULL_AT_BYTES = 4096
"""Size beyond which no file grows on a full disk."""


@dataclass(frozen=True)
class Assignment:
    """What one worker is told; it travels to its process."""

    recipe: str
    """YAML."""
    rank: int
    world: int
    rendezvous: str
    """A file that is not there yet, where the workers find each other."""
    notes: str
    """File for this worker's notes."""
    log: str
    temporary: str
    """Folder for temporary files, of this machine."""
    faults: tuple[Fault, ...]
    key: int
    """Decides what fails where a share of something does."""
    poisoned_step: int
    """The step whose first worker's pictures are not finite."""


class Saboteur:
    """Notes what the worker is given, and does to it what its attempt says."""

    def __init__(self, told: Assignment) -> None:
        self._told = told
        self._notes = os.open(told.notes, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._updates = 0
        self._step = -1
        self._stored: dict[str, int] = {}
        self._weather = Weather(key=told.key)
        self._has_notice = False
        self._has_begun = False

    def begin(self) -> None:
        """Puts itself around the stream, the run's folder, the store and the model."""
        ChaosFileSystem.weather = self._weather
        for fault in self._told.faults:
            match fault:
                case StoreStumbles(share):
                    self._weather.stumbling = share
                case TornUploads(share, is_told):
                    self._weather.torn, self._weather.tells_torn = share, is_told
                case _:
                    pass
        self._watch_stream()
        self._watch_files()
        nn.modules.module.register_module_forward_pre_hook(self._see_module)

    def note(self, **content: object) -> None:
        """One line, there before this returns."""
        os.write(self._notes, (json.dumps(content) + "\n").encode())

    def _watch_stream(self) -> None:
        from_step, saboteur = ExactStream.from_step, self

        def noted(self: ExactStream[Any], step: int) -> Generator[Any, None, None]:
            for batch in from_step(self, step):
                saboteur._take(batch)
                yield batch

        ExactStream.from_step = noted  # type: ignore[method-assign]

    def _watch_files(self) -> None:
        put, write, saboteur = RunFolder.put, RunFolder.write, self

        def noted_put(self: RunFolder, source: Path, name: str) -> None:
            saboteur._before_file(Path(name).name)
            put(self, source, name)
            saboteur._after_file(Path(name).name)

        def noted_write(self: RunFolder, name: str, data: bytes) -> None:
            saboteur._before_file(Path(name).name)
            write(self, name, data)
            saboteur._after_file(Path(name).name)

        RunFolder.put = noted_put  # type: ignore[method-assign]
        RunFolder.write = noted_write  # type: ignore[method-assign]

    def noting(self, checkpoints: Checkpoints, _: World) -> Checkpoints:
        """The writer of checkpoints, with a note of each one."""
        return _Noted(checkpoints, self) if self._told.rank == 0 else checkpoints

    def has_notice(self) -> bool:
        """Whether this worker's machine has announced its end since this was asked last."""
        has, self._has_notice = self._has_notice, False
        return has

    def _see_module(self, module: nn.Module, arguments: tuple[Any, ...]) -> Any:
        """Notes the weights that the first update begins with; poisons one batch."""
        if not self._has_begun and self._step >= 0:
            self._has_begun = True
            self.note(begins=self._step, weights=weights_digest(module))
        if self._step != self._told.poisoned_step or self._told.rank != 0:
            return None
        match arguments:
            case (Images() as images, *others):
                return (replace(images, pixels=images.pixels * torch.nan), *others)
            case _:
                return None

    def _take(self, batch: Any) -> None:
        self._step = batch.step
        skipped = [picture.id for picture in batch.skipped]
        at = time.monotonic()
        self.note(step=batch.step, keys=list(batch.keys), skipped=skipped, at=at)
        update, self._updates = self._updates, self._updates + 1
        if update == 0:
            self.note(loaders=[loader.pid for loader in multiprocessing.active_children()])
        for fault in self._told.faults:
            self.meet(fault, update)

    def meet(self, fault: Fault, update: int) -> None:
        """What the fault does when the batch of an update was taken."""
        match fault:
            case Kill(_, at, _) if update == at:
                self.fire(fault)
                # In the middle of the computation, as it comes.
                threading.Timer(0.01 * (at % 3), _die).start()
            case AskToStop(at) if update == at:
                self.fire(fault)
                ask_to_stop(open_run_folder(parsed_recipe(self._told.recipe).run), "chaos")
            case Notice(_, at, updates):
                if update == at:
                    self.fire(fault)
                    self._has_notice = True
                elif update == at + updates:
                    _die()
            case Rival(at) | Freeze(at) if update == at:
                self.fire(fault)
            case Terminate(at, grace_s) if update == at:
                self.fire(fault)
                os.kill(os.getpid(), signal.SIGTERM)
                if grace_s is not None:
                    threading.Timer(grace_s, _die).start()
            case Hang(_, at) if update == at:
                self.fire(fault)
                time.sleep(3600)
            case LoseLoader(_, at) if update == at:
                self.fire(fault)
                for loader in multiprocessing.active_children():
                    loader.kill()
            case FullDisk(at, updates):
                if update == at:
                    self.fire(fault)
                    _limit_files(FULL_AT_BYTES)
                elif update == at + updates:
                    _limit_files(resource.RLIM_INFINITY)
            case StoreAway(at, seconds) if update == at:
                self.fire(fault)
                self._weather.away_until = time.monotonic() + seconds
            case (
                Kill()
                | KillAtFile()
                | Terminate()
                | AskToStop()
                | Hang()
                | Rival()
                | Freeze()
                | LoseLoader()
                | StoreAway()
                | StoreStumbles()
                | TornUploads()
            ):
                pass
            case _:
                assert_never(fault)

    def _before_file(self, name: str) -> None:
        self._stored[name] = self._stored.get(name, 0) + 1
        match self._at_file(name):
            case KillAtFile(moment="before") as fault:
                self.fire(fault)
                _die()
            case KillAtFile(moment="half") as fault:
                self.fire(fault)
                self._weather.half_then = _die
            case _:
                pass

    def _after_file(self, name: str) -> None:
        match self._at_file(name):
            case KillAtFile(moment="after") as fault:
                self.fire(fault)
                _die()
            case _:
                pass

    def _at_file(self, name: str) -> KillAtFile | None:
        for fault in self._told.faults:
            match fault:
                case KillAtFile(file, count, _) if (file, count) == (name, self._stored[name]):
                    return fault
                case _:
                    pass
        return None

    def fire(self, fault: Fault) -> None:
        """Notes that a fault happens."""
        self.note(fault=fault_line(fault))


@dataclass(frozen=True)
class _Noted:
    """Checkpoints that are noted with their weights."""

    checkpoints: Checkpoints
    saboteur: Saboteur

    def save(self, state: TrainingState, position: Position, metrics: Mapping[str, float]) -> None:
        self.saboteur.note(saves=position.step, weights=weights_digest(state.model))
        self.checkpoints.save(state, position, metrics)

    def flush(self) -> None:
        self.checkpoints.flush()


def weights_digest(model: nn.Module) -> str:
    """A hash of the weights that are trained, in the order of the model."""
    digest = sha256()
    for parameter in model.parameters():
        if parameter.requires_grad:
            digest.update(parameter.detach().numpy().tobytes())
    return digest.hexdigest()


def _limit_files(size: int) -> None:
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, most))


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
