"""The one process that drives a start of a run: what it holds, hears and tells.

Around the work, through Ray or alone, it holds the run's lease, listens for words in the run's
folder, and writes the run's history, down to how it ended.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType

from rich.console import Console

from cluster.stages import Recipe
from models.urls import public_url
from training.checkpoint import newest_checkpoint
from training.control import StopRequest, clear_stop, stop_on_request
from training.history import History
from training.lease import Lease, LeaseLost, take_lease, this_process
from training.outcome import read_outcome
from training.run_folder import RunFolder, StoreError
from training.stopping import StopFlag

JOB = "QUERYPATCH_JOB"
"""Environment variable with the id of the job that this process is of, if it was submitted."""


AWAY_AFTER_S = 20.0
"""Seconds without a renewal of the lease after which the store is said to be away."""


@dataclass
class Writing:
    """A start of a run that is under way."""

    history: History
    flag: StopFlag
    """Set once the run is asked to end, by whatever way."""
    lease: Lease

    _away_s: float = 0.0

    def check_lease(self) -> None:
        """Tells of a store that is away or back; called again and again while the work goes on.

        Raises LeaseLost where the run has another writer by now.
        """
        reason = self.lease.lost()
        if reason is not None:
            raise LeaseLost(reason)
        silent_s = self.lease.silent_s()
        if silent_s > AWAY_AFTER_S:
            if not self._away_s:
                self.history.add("store_away", f"no answer for {silent_s:.0f} s, the run goes on")
            self._away_s = silent_s
        elif self._away_s:
            text = f"after {self._away_s:.0f} s"
            self.history.add("store_back", text, seconds=round(self._away_s))
            self._away_s = 0.0


@contextmanager
def writing(recipe: Recipe, folder: RunFolder, console: Console) -> Iterator[Writing]:
    """Makes this process the run's writer for the block, and tells how the block ended.

    Raises LeaseHeld: another job writes to the run.
    """
    job = os.environ.get(JOB, f"driver-{os.getpid()}")
    flag = StopFlag()
    with (
        take_lease(folder, this_process(job), say=lambda text: _say(console, text)) as lease,
        History(folder) as history,
    ):
        clear_stop(folder)
        _tell_start(history, recipe, job)

        def ask(request: StopRequest) -> None:
            history.add("stop_asked", f"by {request.by}, through the run's folder", by=request.by)
            _say(console, f"asked to stop by {request.by}")
            flag.ask()

        with _Ending(history, folder, flag), stop_on_request(folder, ask):
            yield Writing(history, flag, lease)


def _tell_start(history: History, recipe: Recipe, job: str) -> None:
    workers = recipe.resources.workers
    text = f"{recipe.stage}, job {job}, workers asked for: {workers}"
    history.add("started", text, job=job, workers=workers)


@dataclass(frozen=True)
class _Ending:
    """Tells, whatever ends its block, how it ended."""

    history: History
    folder: RunFolder
    flag: StopFlag

    def __enter__(self) -> None:
        return

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        match error:
            case None:
                self._tell_end()
            case LeaseLost():
                self.history.add("lease_lost", str(error))
            case KeyboardInterrupt() | SystemExit():
                self.history.add("failed", "ended by a second signal, without a checkpoint")
            case _:
                self.history.add("failed", _first_line(error))

    def _tell_end(self) -> None:
        try:
            outcome, newest = read_outcome(self.folder), newest_checkpoint(self.folder)
        except (StoreError, ValueError) as error:
            unknown = f"how far the run came cannot be read: {_first_line(error)}"
            self.history.add("stopped", unknown)
            return
        if outcome is not None:
            is_done = outcome.reason == "done"
            how = "its last step is done" if is_done else "its evaluations grew no more"
            self.history.add("finished", how, outcome.step, reason=outcome.reason)
            return
        step = newest.step if newest else 0
        how = "as asked" if self.flag() else "before its last step"
        text = f"{how}; go on with `querypatch resume {public_url(self.folder.url)}`"
        self.history.add("stopped", text, step, checkpoint=step)


def _say(console: Console, text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
