"""A job begins: our code is packed, an id is found, and the cluster is given the command.

A job is one `querypatch ...` command that runs on the cluster. Its id says what runs and how often
it was tried; the run's URL lies beside it.
"""

import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from ray.job_submission import JobSubmissionClient

from cluster.jobs.client import in_one_line
from cluster.jobs.packaging import shipped_code, shipped_environment
from cluster.jobs.queue import RUN, STOP_WAIT_S
from cluster.writing import JOB
from models.artefact import querypatch_version


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


def _next_attempt(name: str, taken: Iterable[str]) -> int:
    """One more than the highest number that was used with this name."""
    numbers = [
        int(number)
        for id in taken
        if (number := id.removeprefix(f"{name}-")) != id and number.isdecimal()
    ]
    return max(numbers, default=0) + 1
