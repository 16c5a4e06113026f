"""`querypatch submit`, `jobs`, `logs`, `status`, `stop`: what a person does with a cluster's jobs.

And `pipeline`, several stages as one job.
"""

from typing import Annotated

import typer
from rich.console import Console

from cluster.cli.words import (
    Follow,
    Insecure,
    Local,
    Overrides,
    console,
    is_jobs_address,
    keep_ray_on_loopback,
    one_line_errors,
)

jobs_cli = typer.Typer()

_HELP = "The cluster's Jobs API, http://HEAD:8265."
JobsAddress = Annotated[str, typer.Option("--address", help=_HELP, envvar="RAY_API_SERVER_ADDRESS")]
MaybeAddress = Annotated[
    str | None, typer.Option("--address", help=_HELP, envvar="RAY_API_SERVER_ADDRESS")
]
RunOrJob = Annotated[str, typer.Argument(help="URL or path of a run, or the id of a job.")]
AsJson = Annotated[bool, typer.Option("--json", help="For programs.")]
Name = Annotated[
    str | None, typer.Option(help="What the job's id begins with; default: the run's.")
]
Variables = Annotated[
    list[str] | None, typer.Option("--env", help="A variable to pass on; may be repeated.")
]
NoCheck = Annotated[
    bool, typer.Option("--no-check", help="Do not ask the cluster first what it has installed.")
]
Install = Annotated[
    bool, typer.Option("--install", help="Install this machine's versions there with pip.")
]


@jobs_cli.command()
def submit(
    recipe: Annotated[str, typer.Argument(help="[STAGE/]NAME of a shipped one, or a YAML file.")],
    address: JobsAddress,
    overrides: Overrides = None,
    follow: Follow = False,
    name: Name = None,
    env: Variables = None,
    no_check: NoCheck = False,
    install: Install = False,
    insecure: Insecure = False,
) -> None:
    """Send a run to a cluster as a job, begun or continued; prints the job's id."""
    with one_line_errors():
        from cluster.jobs.commands import Submission, submit_order
        from cluster.jobs.orders import environment, start_order

        how = Submission(address, insecure, follow, environment(env or []), not no_check, install)
        if not submit_order(start_order(recipe, overrides or [], name), how, console()):
            raise typer.Exit(1)


@jobs_cli.command()
def jobs(address: JobsAddress, insecure: Insecure = False, as_json: AsJson = False) -> None:
    """The jobs of a cluster, newest last: id, state, since when, run."""
    with one_line_errors():
        from cluster.jobs.views import jobs_text

        typer.echo(jobs_text(address, insecure, as_json))


@jobs_cli.command()
def logs(
    job: Annotated[str, typer.Argument(help="Id of a job, or URL of a run: its newest job.")],
    address: JobsAddress,
    follow: Follow = False,
    insecure: Insecure = False,
) -> None:
    """What a job said so far; with -f until it ends, and 1 if it did not succeed."""
    with one_line_errors():
        from cluster.jobs.views import show_logs

        if not show_logs(job, address, insecure, follow, console()):
            raise typer.Exit(1)


@jobs_cli.command()
def status(
    run: RunOrJob,
    address: MaybeAddress = None,
    insecure: Insecure = False,
    as_json: AsJson = False,
) -> None:
    """How a run is: step, time left, speed, checkpoint, workers, what happened. Without Ray."""
    with one_line_errors():
        from cluster.jobs.commands import status_of

        typer.echo(status_of(run, address, insecure, as_json))


@jobs_cli.command()
def stop(
    run: RunOrJob,
    address: MaybeAddress = None,
    now: Annotated[
        bool, typer.Option("--now", help="Through Ray: ended within 30 s, checkpoint or not.")
    ] = False,
    wait_s: Annotated[
        float, typer.Option("--wait", help="Seconds to wait for its checkpoint.")
    ] = 600,
    insecure: Insecure = False,
) -> None:
    """Ask a run to write a checkpoint and end, and wait until it has."""
    with one_line_errors():
        from cluster.jobs.stopping import stop_job_now, stop_run

        if now:
            stop_job_now(run, address, insecure, console())
        else:
            stop_run(run, address, insecure, wait_s, console())


@jobs_cli.command()
def pipeline(
    file: Annotated[str, typer.Argument(help="YAML of stages, or the folder of a begun pipeline.")],
    overrides: Overrides = None,
    local: Local = False,
    address: Annotated[
        str | None,
        typer.Option(help="As of pretrain: HOST:PORT, auto, or http://HEAD:8265 for one job."),
    ] = None,
    follow: Follow = False,
    env: Variables = None,
    no_check: NoCheck = False,
    insecure: Insecure = False,
) -> None:
    """Pretrain, finetune, evaluate, export in one go; what is done is not done again."""
    with one_line_errors():
        if address is None:
            keep_ray_on_loopback()
        from cluster.pipeline.commands import submit_pipeline, walk_pipeline

        if address is not None and is_jobs_address(address):
            from cluster.jobs.commands import Submission
            from cluster.jobs.orders import environment

            how = Submission(address, insecure, follow, environment(env or []), not no_check)
            if not submit_pipeline(file, overrides or [], how, console()):
                raise typer.Exit(1)
        elif not walk_pipeline(file, overrides or [], local, address, Console()):
            raise typer.Exit(1)
