"""Jobs as a person thinks of them: submitted, listed, followed, found again.

A job is one `querypatch ...` command that runs on the cluster. Ray keeps the jobs; what this adds
is an id that says what runs and how often it was tried, and the run's URL beside it.
"""

import asyncio
import re
import shlex
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import aiohttp
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from cluster.jobs_api import JobsError, in_one_line
from cluster.packaging import shipped_code, shipped_environment
from cluster.writing import JOB
from models.artefact import querypatch_version

STOP_WAIT_S = 30
"""Seconds that `ray job stop` leaves a job to write its checkpoint, before it is killed."""

RUN = "run"
"""Key of a job's metadata: the URL of its run."""

_LOOK_EVERY_S = 0.5
_RECONNECT_S = 2.0
_RECONNECTS = 30


@dataclass(frozen=True)
class Order:
    """One command to be run on a cluster."""

    words: tuple[str, ...]
    """Of the command after `querypatch`; files are found under `submitted/`."""
    name: str
    """What the ids of its jobs begin with."""
    run: str | None = None
    """URL of the run that it writes, without credentials."""
    files: Mapping[str, bytes] = field(default_factory=dict)
    """What the command reads, by name."""
    paths: tuple[str, ...] = ()
    """Keys that name files which every machine of the cluster must have."""


def submit(
    client: JobSubmissionClient,
    order: Order,
    environment: Mapping[str, str],
    pins: Sequence[str] = (),
) -> str:
    """Ships the code and starts the command; returns the job's id, `NAME-ATTEMPT`.

    `environment` are variables for the job and its workers, `pins` packages for pip. Raises
    JobsError: the cluster did not take it.
    """
    url = client.get_address()
    name = job_name(order.name)
    folder = str(shipped_code(order.files))
    entrypoint = shlex.join(["exec", "python", "-m", "querypatch", *order.words])
    ours = {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S), **shipped_environment()}
    variables = {**ours, **environment}
    runtime_env: dict[str, Any] = {"working_dir": folder, **({"pip": list(pins)} if pins else {})}
    metadata = {"querypatch": querypatch_version(), **({RUN: order.run} if order.run else {})}
    with in_one_line(url):
        taken = {str(job.submission_id) for job in client.list_jobs()}
        for attempt in count(_next_attempt(name, taken)):
            id = f"{name}-{attempt}"
            try:
                return str(
                    client.submit_job(
                        entrypoint=entrypoint,
                        submission_id=id,
                        runtime_env={**runtime_env, "env_vars": {**variables, JOB: id}},
                        metadata=metadata,
                    )
                )
            except RuntimeError as error:
                # Somebody took the same id at the same moment.
                if "already exists" not in str(error):
                    raise
    raise AssertionError("unreachable")


def job_name(text: str) -> str:
    """`text` as the beginning of a job's id, e.g. the last part of a run's URL."""
    last = text.rstrip("/").rpartition("/")[2]
    return re.sub(r"[^\w.-]+", "-", last).strip("-.") or "job"


def list_jobs(client: JobSubmissionClient) -> tuple[JobDetails, ...]:
    """The submitted jobs of the cluster, oldest first."""
    with in_one_line(client.get_address()):
        jobs = [job for job in client.list_jobs() if job.submission_id]
    return tuple(sorted(jobs, key=lambda job: job.start_time or 0))


def find_job(client: JobSubmissionClient, id: str) -> JobDetails:
    """The job of that id; JobsError where the cluster has none, with those that it has."""
    jobs = list_jobs(client)
    for job in jobs:
        if id in (job.submission_id, job.job_id):
            return job
    known = ", ".join(str(job.submission_id) for job in jobs[-5:]) or "none at all"
    raise JobsError(f"{client.get_address()} has no job {id!r}; its newest are {known}")


def active_job_of(jobs: Iterable[JobDetails], run: str) -> JobDetails | None:
    """The job that is writing the run, or is about to."""
    for job in jobs:
        if (job.metadata or {}).get(RUN) == run and not job.status.is_terminal():
            return job
    return None


def follow(client: JobSubmissionClient, id: str, show: Callable[[str], None]) -> JobDetails:
    """Hands the job's log to `show` from its beginning, until the job ends; returns how it ended.

    A connection that breaks is taken up where it broke; JobsError where it stays broken.
    """
    log, misses = _Log(show), 0
    while True:
        before = log.shown
        try:
            asyncio.run(log.tail(client, id))
        except (aiohttp.ClientError, OSError, RuntimeError) as error:
            misses = 0 if log.shown > before else misses + 1
            if misses > _RECONNECTS:
                raise JobsError(f"{client.get_address()} is lost: {error}") from error
        job = _looked_at(client, id)
        if job is not None and job.status.is_terminal():
            return job
        time.sleep(_RECONNECT_S)


def wait_for_end(
    client: JobSubmissionClient,
    id: str,
    within_s: float,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> JobDetails | None:
    """The job when it has ended; None where it has not after `within_s` seconds."""
    deadline = clock() + within_s
    while True:
        job = find_job(client, id)
        if job.status.is_terminal():
            return job
        if clock() > deadline:
            return None
        sleep(_LOOK_EVERY_S)


def succeeded(job: JobDetails) -> bool:
    """Whether a job ended well."""
    return bool(job.status == JobStatus.SUCCEEDED)


@dataclass
class _Log:
    """A job's log, of which each character is shown once."""

    show: Callable[[str], None]
    shown: int = 0
    """Characters so far."""

    async def tail(self, client: JobSubmissionClient, id: str) -> None:
        """Shows what is new; Ray tells a log from its beginning at every connection."""
        seen = 0
        async for text in client.tail_job_logs(id):
            fresh = text[max(0, self.shown - seen) :]
            seen += len(text)
            if fresh:
                self.shown = seen
                self.show(fresh)


def _looked_at(client: JobSubmissionClient, id: str) -> JobDetails | None:
    """The job; None while the cluster cannot be reached."""
    try:
        with in_one_line(client.get_address()):
            return client.get_job_info(id)
    except JobsError:
        return None


def _next_attempt(name: str, taken: Iterable[str]) -> int:
    """One more than the highest number that was used with this name."""
    numbers = [
        int(number)
        for id in taken
        if (number := id.removeprefix(f"{name}-")) != id and number.isdecimal()
    ]
    return max(numbers, default=0) + 1
