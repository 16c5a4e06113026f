"""What `querypatch jobs` and `logs` show, and whose log it is."""

import json
import logging
from collections.abc import Sequence
from datetime import UTC, datetime

import typer
from ray.job_submission import JobDetails, JobSubmissionClient
from rich.console import Console

from cluster.commands.bars import say
from cluster.jobs.client import JobsError, connect, in_one_line
from cluster.jobs.queue import RUN, find_job, follow, list_jobs, succeeded
from models.urls import public_url
from training.run_folder import open_run_folder

_CHATTY = (
    *("ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk"),
    "ray._private.runtime_env.packaging",
)


def jobs_text(address: str, insecure: bool, as_json: bool) -> str:
    """The jobs of a cluster as a table, or as JSON."""
    jobs = list_jobs(connect(address, insecure))
    if as_json:
        return json.dumps([job_content(job) for job in jobs], indent=1)
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
    quieten()
    client = connect(address, insecure)
    id = str(named_job(client, name).submission_id)
    if until_end:
        return followed(client, id, console)
    with in_one_line(address):
        typer.echo(client.get_job_logs(id), nl=False)
    return True


def named_job(client: JobSubmissionClient, name: str) -> JobDetails:
    """The job of that id, or the newest one of the run at that URL."""
    if not is_run(name):
        return find_job(client, name)
    run = public_url(open_run_folder(name).url)
    jobs = [job for job in list_jobs(client) if (job.metadata or {}).get(RUN) == run]
    if not jobs:
        raise JobsError(f"{client.get_address()} has no job of the run {run}")
    return jobs[-1]


def is_run(name: str) -> bool:
    """Whether a word names a folder rather than a job: ids of jobs have no slash."""
    return "/" in name or bool(open_run_folder(name).names(""))


def followed(client: JobSubmissionClient, id: str, console: Console) -> bool:
    """Shows a job's log until it ends; whether it went well. Ctrl-C ends the showing alone."""
    try:
        job = follow(client, id, lambda text: typer.echo(text, nl=False))
    except KeyboardInterrupt:
        say(console, f"\nthe job goes on; end it with `querypatch stop {id} --address ...`")
        return True
    if succeeded(job):
        return True
    say(console, f"job {id} {job.status.value}: {_last_line(job.message)}")
    return False


def quieten() -> None:
    """Ray's client logs what its caller says better."""
    for chatty in _CHATTY:
        logging.getLogger(chatty).setLevel(logging.WARNING)


def job_content(job: JobDetails) -> dict[str, object]:
    """A job as values of JSON."""
    return {
        "job": job.submission_id,
        "state": job.status.value,
        "run": (job.metadata or {}).get(RUN),
        "began": _moment(job.start_time) or None,
        "ended": _moment(job.end_time) or None,
        "message": job.message,
    }


def _row(job: JobDetails) -> tuple[str, str, str, str]:
    run = (job.metadata or {}).get(RUN, "")
    return str(job.submission_id), job.status.value, _moment(job.start_time), run


def _moment(milliseconds: int | None) -> str:
    if not milliseconds:
        return ""
    return datetime.fromtimestamp(milliseconds / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def _last_line(message: str | None) -> str:
    lines: Sequence[str] = [line.strip() for line in (message or "").splitlines() if line.strip()]
    return lines[-1] if lines else "no reason was given"
