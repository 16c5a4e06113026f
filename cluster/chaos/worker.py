"""One worker of a run under faults: a process of its own that runs `cluster.worker.run_worker`.

The first worker is the run's writer too, as the driver of a job is. Only here, in a process that is
made for it, are methods of others replaced (`cluster.chaos.saboteur`) and waits of minutes cut to
seconds.
"""

import logging
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed
from rich.console import Console

import cluster.writing
import training.checkpoint_writer
import training.run_folder
from cluster.chaos.saboteur import Assignment, Saboteur
from cluster.chaos.schedule import Fault, Hang
from cluster.stages import Recipe, parsed_recipe
from cluster.worker import LOG_FORMAT, Links, run_worker
from cluster.writing import writing
from training.control import stop_on_request
from training.lease import LeaseHeld, LeaseLost, LeaseSettings, check_held, take_lease
from training.run_folder import Patience, open_run_folder
from training.stopping import stop_on_signals
from training.world import World

HUNG_S = 3.0
"""Seconds without progress after which the watchdog of a worker that hangs ends it."""
LEASE = LeaseSettings(ttl_s=2.0, renew_every_s=0.3, settle_s=0.2)
"""Of the run's writer."""

_PATIENCE = Patience(attempts=6, backoff_s=0.02)
_LOOK_EVERY_S = 0.1
_RETRY_S = 0.2


def work(told: Assignment) -> None:
    """Runs the worker to the end of the run, or until it is asked to stop."""
    _log_to(told.log)
    tempfile.tempdir = told.temporary
    torch.set_num_threads(1)
    _shorten_waits()
    recipe = _with_watchdog(parsed_recipe(told.recipe), told.faults)
    saboteur = Saboteur(told)
    saboteur.begin()
    try:
        with _writer(told, recipe) as (stop, links):
            _join(told)
            links = replace(links, checkpoint_wanted=saboteur.has_notice)
            world = World(told.rank, told.world, torch.device("cpu"))
            position = run_worker(recipe, world, stop, _no_display, saboteur.noting, links)
            saboteur.note(end=position.step)
            _leave(told)
    except (LeaseHeld, LeaseLost) as error:
        saboteur.note(refused=str(error))
        raise


@contextmanager
def _writer(told: Assignment, recipe: Recipe) -> Iterator[tuple[Callable[[], bool], Links]]:
    """What the job gives a worker; the first one is the run's writer for the block."""
    if told.rank:
        yield lambda: False, Links()
        return
    folder = open_run_folder(recipe.run)
    with (
        writing(recipe, folder, Console(file=sys.stderr)) as work,
        stop_on_signals(work.flag),
    ):

        def stop() -> bool:
            work.check_lease()
            return work.flag()

        hung = partial(work.history.add, "hung")
        yield stop, Links(hung=hung, may_write=partial(check_held, folder, work.lease.token))


def _shorten_waits() -> None:
    """Cuts the waits of minutes to moments: a schedule shall take seconds."""
    training.run_folder.Patience = partial(  # type: ignore[assignment,misc]
        Patience, attempts=_PATIENCE.attempts, backoff_s=_PATIENCE.backoff_s
    )
    training.checkpoint_writer.RETRY_S = _RETRY_S
    writers: Any = cluster.writing
    writers.take_lease = partial(take_lease, settings=LEASE)
    writers.stop_on_request = partial(stop_on_request, every_s=_LOOK_EVERY_S)


def _with_watchdog(recipe: Recipe, faults: tuple[Fault, ...]) -> Recipe:
    """Strict where a worker hangs; on a busy machine a slow one shall not be taken for hung."""
    hangs = any(isinstance(fault, Hang) for fault in faults)
    resources = recipe.resources.model_copy(update={"hang_minutes": HUNG_S / 60 if hangs else None})
    return recipe.model_copy(update={"resources": resources})


class _Blind:
    """A display for nobody."""

    def show(self, record: object) -> None:
        """Nothing."""

    def advance(self, step: int) -> None:
        """Nothing."""

    def note(self, text: str) -> None:
        """Nothing."""


def _no_display(_: int, __: int) -> AbstractContextManager[_Blind]:
    return nullcontext(_Blind())


def _join(told: Assignment) -> None:
    if told.world == 1:
        return
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{told.rendezvous}",
        rank=told.rank,
        world_size=told.world,
    )


def _leave(told: Assignment) -> None:
    if told.world > 1:
        torch.distributed.barrier()


def _log_to(path: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, sys.stdout.fileno())
    os.dup2(descriptor, sys.stderr.fileno())
    logging.basicConfig(level=logging.INFO, format=LOG_FORMAT, stream=sys.stderr, force=True)
