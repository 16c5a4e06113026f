"""`querypatch chaos --ray`: fault schedules on whole jobs through Ray, each held to a calm run.

The faults are those without Ray that have a meaning for a job. A worker that is lost, hangs or dies
over a file is Ray's to start again; SIGTERM, and SIGKILL of all, go to the job, and the next
attempt is a new job on the same folder. A job starts in half a minute on a small machine, so this
is for a few schedules. The calm runs are made without Ray: their numbers are the same.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from cluster.chaos.campaign import (
    MORE_ATTEMPTS,
    Bench,
    Verdict,
    judged,
    open_bench,
    recipe_at,
    tell_all,
    told_workers,
    verdict_lines,
)
from cluster.chaos.check import Differs
from cluster.chaos.group import Ended, ended_of, read_notes
from cluster.chaos.ray_job import Plan
from cluster.chaos.schedule import Attempt, Kill, Schedule, Terminate, draw_ray_schedule, fault_line
from cluster.processes import kill_tree
from training.outcome import read_outcome
from training.run_folder import open_run_folder

JOB_S = 400.0
"""Seconds after which a job is taken for hung."""

HUNG_S = 30.0
"""Seconds without progress after which a worker is taken for hung; its start counts too."""

_POLL_S = 0.05


def run_chaos_with_ray(
    name: str,
    overrides: Sequence[str],
    seed: int,
    numbers: Sequence[int],
    out: Path,
    console: Console,
) -> None:
    """As `cluster.chaos.campaign.run_chaos`, through Ray."""
    # A worker that hangs shall not take the minutes that a real one is given.
    strict = ("resources.max_restarts=3", f"resources.hang_minutes={HUNG_S / 60}")
    bench = open_bench(name, [*overrides, *strict], out)
    verdicts: list[Verdict] = []
    for number in numbers:
        schedule = draw_ray_schedule(seed, number)
        verdicts.append(judged(bench, schedule, "ray-schedule", _run_jobs))
        console.print("\n".join(verdict_lines(verdicts[-1])), highlight=False, markup=False)
    tell_all(verdicts, seed, out, console)


def _run_jobs(bench: Bench, schedule: Schedule, home: Path, attempts: list[Ended]) -> None:
    recipe = recipe_at(bench, home / "run", schedule.store, schedule.loaders)
    more = [Attempt(schedule.last_workers)] * MORE_ATTEMPTS
    for number, attempt in enumerate((*schedule.attempts, *more)):
        folder = home / f"job-{number + 1}"
        (folder / "starts").mkdir(parents=True)
        plan = Plan(
            recipe=told_workers(recipe, attempt.workers),
            folder=str(folder / "starts"),
            seed=schedule.seed,
            number=schedule.number,
            attempt=number,
            poisoned_step=bench.steps // 2,
        )
        status = _run_job(plan, attempt, folder)
        starts = sorted((folder / "starts").iterdir())
        attempts += _ended(starts, status, folder / "log.txt", bench.steps)
        if status and not attempt.faults:
            raise Differs(f"job {number + 1} met no fault and failed, see {folder / 'log.txt'}")
        if read_outcome(open_run_folder(str(home / "run"))) is not None:
            return
    raise Differs(f"the run is not over after {len(schedule.attempts) + MORE_ATTEMPTS} jobs")


def _run_job(plan: Plan, attempt: Attempt, folder: Path) -> int:
    """The status of the job; what its faults do to it as a whole is done here."""
    (folder / "plan.json").write_text(json.dumps(asdict(plan)))
    command = [sys.executable, "-m", "cluster.chaos.ray_job", str(folder / "plan.json")]
    with (folder / "log.txt").open("ab") as log:
        job = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    deadline, told = time.monotonic() + JOB_S, False
    while job.poll() is None:
        time.sleep(_POLL_S)
        if time.monotonic() > deadline:
            kill_tree(job.pid)
        for fault in attempt.faults:
            if not told and fault_line(fault) in _fired(Path(plan.folder)):
                told = True
                _act(fault, job.pid)
    return job.wait()


def _act(fault: object, pid: int) -> None:
    match fault:
        case Kill(everybody=True):
            kill_tree(pid)
        case Terminate():
            os.kill(pid, signal.SIGTERM)
        case _:
            pass


def _fired(starts: Path) -> str:
    return "".join(path.read_text() for path in starts.glob("*/*.jsonl"))


def _ended(starts: Sequence[Path], status: int, log: Path, steps: int) -> Iterator[Ended]:
    """What became of each start of a job's workers; the last one's end is the job's."""
    for start in starts:
        notes = [read_notes(path) for path in sorted(start.iterdir())]
        is_last = start == starts[-1] and status == 0
        ended = ended_of(notes, "finished" if is_last else "lost", log)
        if not is_last:
            yield ended
            continue
        done = max((note.step + 1 for worker in ended.notes for note in worker), default=steps)
        yield Ended(**{**vars(ended), "step": done})
