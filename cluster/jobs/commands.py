"""What `querypatch submit` and `status` do, for the person who waits."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

import typer
from ray.job_submission import JobSubmissionClient
from rich.console import Console

from cluster.commands.bars import say
from cluster.jobs.client import JobsError, connect, is_this_machine
from cluster.jobs.cluster_check import check_cluster, pins_of_this_machine
from cluster.jobs.queue import RUN, active_job_of, find_job, list_jobs
from cluster.jobs.status import read_status, status_json, status_text
from cluster.jobs.submitting import Order, submit
from cluster.jobs.views import followed, is_run, job_content, quieten
from cluster.pipeline.status import pipeline_json, pipeline_text, read_pipeline
from training.run_folder import open_run_folder


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
    quieten()
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
    return followed(client, id, console)


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
        return json.dumps({**job_content(job), "run_status": told}, indent=1)
    line = f"job {job.submission_id}: {job.status.value}, {job.message}"
    return f"{line}\n{_run_status(run, False)}" if run else line


def _check_nobody_writes(client: JobSubmissionClient, run: str) -> None:
    """Said early for a friendly word; what guards the run is the lease in its folder."""
    job = active_job_of(list_jobs(client), run)
    if job is not None:
        raise JobsError(
            f"{run} is being written by job {job.submission_id} on this cluster; stop it with "
            f"`querypatch stop {run}`, or wait for its end"
        )


def _run_status(name: str, as_json: bool) -> str:
    folder = open_run_folder(name)
    pipeline = read_pipeline(folder)
    if pipeline is not None:
        return pipeline_json(pipeline) if as_json else pipeline_text(pipeline)
    status = read_status(folder)
    return status_json(status) if as_json else status_text(status)
