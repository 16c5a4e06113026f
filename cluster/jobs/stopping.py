"""`querypatch stop`: a run is asked through its folder, and heard of when it has ended.

The word goes through the folder (`control/stop.json`), so it reaches a run on any cluster from any
machine that may write there. Ray is asked only for `--now`.
"""

import getpass
import socket
import time
from collections.abc import Callable

from rich.console import Console

from cluster.commands.bars import say
from cluster.jobs.client import JobsError, connect, in_one_line
from cluster.jobs.queue import RUN, STOP_WAIT_S, find_job, wait_for_end
from cluster.jobs.status import NoRun, RunStatus, read_status
from cluster.jobs.views import is_run, named_job
from cluster.pipeline.status import stage_that_is_written
from models.urls import public_url
from training.control import ask_to_stop
from training.run_folder import RunFolder, open_run_folder

LOOK_EVERY_S = 2.0
_OVER = ("finished", "stopped", "failed")


def stop_run(
    name: str, address: str | None, insecure: bool, wait_s: float, console: Console
) -> None:
    """Asks the run, or the run of that job, to end with a checkpoint; waits until it has.

    Raises JobsError: no such job, nobody writes the run, or it did not end in time.
    """
    folder = open_run_folder(_run_of(name, address, insecure))
    stage = stage_that_is_written(folder)
    folder = folder if stage is None else open_run_folder(stage)
    status = _status_to_stop(folder, name)
    if status.state in _OVER:
        say(console, f"{status.run} is not running: {status.state} at step {status.step}")
        return
    ask_to_stop(folder, by=f"{getpass.getuser()} on {socket.gethostname()}")
    say(console, f"asked {status.run} to write a checkpoint and end")
    ended = ended_status(folder, wait_s)
    if ended is None:
        raise JobsError(
            f"{status.run} has not ended {wait_s:.0f} s after it was asked; see `querypatch status "
            f"{status.run}`, or end it with --now --address http://HEAD:8265"
        )
    step = "none" if ended.checkpoint_step is None else f"step {ended.checkpoint_step}"
    say(console, f"{ended.run}: {ended.state} at step {ended.step}, newest checkpoint: {step}")


def ended_status(
    folder: RunFolder,
    wait_s: float,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> RunStatus | None:
    """The status of the run once nobody writes it any more; None where that lasts too long."""
    deadline = clock() + wait_s
    while True:
        status = read_status(folder)
        if status.state in _OVER:
            return status
        if clock() > deadline:
            return None
        sleep(LOOK_EVERY_S)


def stop_job_now(name: str, address: str | None, insecure: bool, console: Console) -> None:
    """Ends a job through Ray, or the newest job of that run: SIGTERM, and SIGKILL after 30 s.

    Raises JobsError: no such job, or no address.
    """
    if address is None:
        raise JobsError("--now asks Ray; give the cluster with --address http://HEAD:8265")
    client = connect(address, insecure)
    job = named_job(client, name)
    id = str(job.submission_id)
    if job.status.is_terminal():
        say(console, f"job {id} is not running: {job.status.value}")
        return
    with in_one_line(address):
        client.stop_job(id)
    ended = wait_for_end(client, id, 2 * STOP_WAIT_S)
    if ended is None:
        raise JobsError(f"job {id} still runs {2 * STOP_WAIT_S} s after Ray was asked to end it")
    say(console, f"job {id} {ended.status.value}")
    run = (job.metadata or {}).get(RUN)
    if run is not None:
        _tell_checkpoint(run, console)


def _run_of(name: str, address: str | None, insecure: bool) -> str:
    if is_run(name):
        return name
    if address is None:
        raise JobsError(f"{name} is no folder; for the id of a job give --address as well")
    run = (find_job(connect(address, insecure), name).metadata or {}).get(RUN)
    if run is None:
        raise JobsError(f"job {name} writes no run; end it with --now")
    return run


def _status_to_stop(folder: RunFolder, name: str) -> RunStatus:
    try:
        return read_status(folder)
    except NoRun as error:
        if is_run(name):
            raise
        raise JobsError(f"job {name} has not begun its run yet; end it with --now") from error


def _tell_checkpoint(run: str, console: Console) -> None:
    try:
        status = read_status(open_run_folder(run))
    except (NoRun, OSError) as error:
        say(console, f"what {public_url(run)} holds cannot be said from here: {error}")
        return
    step = "none" if status.checkpoint_step is None else f"step {status.checkpoint_step}"
    say(console, f"{status.run}: newest checkpoint: {step}")
