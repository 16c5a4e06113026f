"""Jobs as a person thinks of them: listed, followed, found again. Ray keeps them.

Waits for neither torch nor our own floors: what a person looks at shall come at once.
"""

import asyncio
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import aiohttp
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from cluster.jobs.client import JobsError, in_one_line

STOP_WAIT_S = 30
"""Seconds that `ray job stop` leaves a job to write its checkpoint, before it is killed."""

RUN = "run"
"""Key of a job's metadata: the URL of its run."""

_LOOK_EVERY_S = 0.5
_RECONNECT_S = 2.0
_RECONNECTS = 30


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
