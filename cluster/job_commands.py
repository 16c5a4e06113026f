"""What `querypatch submit`, `jobs`, `logs` and `status` do, for the person who waits."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

import typer
from ray.job_submission import JobDetails, JobSubmissionClient
from rich.console import Console

from cluster.bars import say
from cluster.cluster_check import check_cluster, pins_of_this_machine
from cluster.jobs import (
    RUN,
    Order,
    active_job_of,
    find_job,
    follow,
    list_jobs,
    submit,
    succeeded,
)
from cluster.jobs_api import JobsError, connect, in_one_line, is_this_machine
from cluster.pipeline_status import pipeline_json, pipeline_text, read_pipeline
from cluster.status import read_status, status_json, status_text
from models.urls import public_url
from training.run_folder import open_run_folder
from training.run_recipe import absolute

_CHATTY = (
    *("ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk"),
    "ray._private.runtime_env.packaging",
)


@dataclass(frozen=True)
class Submission:
    """How an order is given to a cluster."""

    address: str
    """http://HEAD:8265."""
    insecure: bool = False
    """Whether a cluster that asks for no token will do."""
    follow: bool = False
    """Show the job's log until it ends."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables for the job."""
    check: bool = True
    """Ask the cluster first what it has installed."""
    install: bool = False
    """Install this machine's versions on the cluster."""


def submit_order(order: Order, how: Submission, console: Console) -> bool:
    """Checks the cluster and starts the job; its id goes to stdout.

    Returns whether the job went well, which only a followed one can fail to. Raises JobsError:
    the cluster does not fit or did not take it, or a job is writing this run already.
    """
    _quieten()
    client = connect(how.address, how.insecure)
    if order.run is not None:
        _check_nobody_writes(client, order.run)
    if order.paths and not is_this_machine(how.address):
        keys = ", ".join(order.paths)
        say(console, f"paths and no URLs, the same on all machines of the cluster: {keys}")
    pins = pins_of_this_machine() if how.install else ()
    if how.check:
        for line in check_cluster(client, how.environment, pins):
            say(console, line)
    id = submit(client, order, how.environment, pins)
    typer.echo(id)
    if not how.follow:
        say(console, f"follow it with `querypatch logs {id} -f --address {how.address}`")
        return True
    return _followed(client, id, console)


def jobs_text(address: str, insecure: bool, as_json: bool) -> str:
    """The jobs of a cluster as a table, or as JSON."""
    jobs = list_jobs(connect(address, insecure))
    if as_json:
        return json.dumps([_job_content(job) for job in jobs], indent=1)
    if not jobs:
        return f"{address} has no jobs"
    rows = [("job", "state", "began", "run"), *map(_row, jobs)]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, [*widths, 0], strict=True)).rstrip()
        for row in rows
    )


def show_logs(name: str, address: str, insecure: bool, until_end: bool, console: Console) -> bool:
    """Prints a job's log; followed to its end, returns whether it went well."""
    _quieten()
    client = connect(address, insecure)
    id = str(named_job(client, name).submission_id)
    if until_end:
        return _followed(client, id, console)
    with in_one_line(address):
        typer.echo(client.get_job_logs(id), nl=False)
    return True


def status_of(name: str, address: str | None, insecure: bool, as_json: bool) -> str:
    """How a run is, told by its folder; of a job without a run, how the job is."""
    if is_run(name):
        return _run_status(name, as_json)
    if address is None:
        raise JobsError(f"{name} is no folder; for the id of a job give --address as well")
    job = find_job(connect(address, insecure), name)
    run = (job.metadata or {}).get(RUN)
    if as_json:
        told = json.loads(_run_status(run, True)) if run else None
        return json.dumps({**_job_content(job), "run_status": told}, indent=1)
    line = f"job {job.submission_id}: {job.status.value}, {job.message}"
    return f"{line}\n{_run_status(run, False)}" if run else line


def named_job(client: JobSubmissionClient, name: str) -> JobDetails:
    """The job of that id, or the newest one of the run at that URL."""
    if not is_run(name):
        return find_job(client, name)
    run = public_url(absolute(name) or "").rstrip("/")
    jobs = [job for job in list_jobs(client) if (job.metadata or {}).get(RUN) == run]
    if not jobs:
        raise JobsError(f"{client.get_address()} has no job of the run {run}")
    return jobs[-1]


def is_run(name: str) -> bool:
    """Whether a word names a folder rather than a job: ids of jobs have no slash."""
    return "/" in name or bool(open_run_folder(name).names(""))


def _quieten() -> None:
    """Ray's client logs what its caller says better."""
    for chatty in _CHATTY:
        logging.getLogger(chatty).setLevel(logging.WARNING)


def _check_nobody_writes(client: JobSubmissionClient, run: str) -> None:
    """Said early for a friendly word; what guards the run is the lease in its folder."""
    job = active_job_of(list_jobs(client), run)
    if job is not None:
        raise JobsError(
            f"{run} is being written by job {job.submission_id} on this cluster; stop it with "
            f"`querypatch stop {run}`, or wait for its end"
        )


def _followed(client: JobSubmissionClient, id: str, console: Console) -> bool:
    try:
        job = follow(client, id, lambda text: typer.echo(text, nl=False))
    except KeyboardInterrupt:
        say(console, f"\nthe job goes on; end it with `querypatch stop {id} --address ...`")
        return True
    if succeeded(job):
        return True
    say(console, f"job {id} {job.status.value}: {_last_line(job.message)}")
    return False


def _run_status(name: str, as_json: bool) -> str:
    folder = open_run_folder(name)
    pipeline = read_pipeline(folder)
    if pipeline is not None:
        return pipeline_json(pipeline) if as_json else pipeline_text(pipeline)
    status = read_status(folder)
    return status_json(status) if as_json else status_text(status)


def _row(job: JobDetails) -> tuple[str, str, str, str]:
    run = (job.metadata or {}).get(RUN, "")
    return str(job.submission_id), job.status.value, _moment(job.start_time), run


def _job_content(job: JobDetails) -> dict[str, object]:
    return {
        "job": job.submission_id,
        "state": job.status.value,
        "run": (job.metadata or {}).get(RUN),
        "began": _moment(job.start_time) or None,
        "ended": _moment(job.end_time) or None,
        "message": job.message,
    }


def _moment(milliseconds: int | None) -> str:
    if not milliseconds:
        return ""
    return datetime.fromtimestamp(milliseconds / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def _last_line(message: str | None) -> str:
    lines: Sequence[str] = [line.strip() for line in (message or "").splitlines() if line.strip()]
    return lines[-1] if lines else "no reason was given"
