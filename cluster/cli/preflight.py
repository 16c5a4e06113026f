"""`querypatch preflight`: mounted by the front door.

Imports nothing that takes seconds until it is called.
"""

import logging
from typing import Annotated, Literal

import typer

from cluster.cli.jobs import AsJson
from cluster.cli.words import (
    Address,
    Insecure,
    Overrides,
    RecipeName,
    console,
    is_jobs_address,
    one_line_errors,
)

Depth = Literal["quick", "trial", "whole"]
# Written out here, since importing its module takes seconds; a test holds it to the original.


def preflight(
    recipe: RecipeName,
    overrides: Overrides = None,
    address: Address = None,
    price: Annotated[
        float | None, typer.Option(min=0, help="Of one worker for one hour, in any currency.")
    ] = None,
    depth: Annotated[
        Depth, typer.Option(help="quick tries no step; whole reads every byte of the data.")
    ] = "trial",
    insecure: Insecure = False,
    as_json: AsJson = False,
) -> None:
    """Is all well before money is spent? Storage, data, weights, a trial step, time and cost.

    RECIPE as for pretrain or finetune; STAGE/NAME where both stages have it. 1 if a fault is found.
    """
    with one_line_errors():
        from cluster.preflight.checks import Check, check_line, checks_json, verdict_line
        from cluster.preflight.run import Wishes, asked_recipe, preflight_here

        # What they warn of is told as a check.
        for chatty in ("training.run_folder", "models.interop", "data.stream"):
            logging.getLogger(chatty).setLevel(logging.ERROR)

        wishes = Wishes(depth, price)

        def hear(check: Check) -> None:
            if not as_json:
                typer.echo(check_line(check))

        if address is not None and is_jobs_address(address):
            from cluster.jobs.commands import Submission
            from cluster.preflight.job import preflight_as_job

            how = Submission(address, insecure, follow=True, check=False)
            if not preflight_as_job(recipe, overrides or [], wishes, as_json, how, console()):
                raise typer.Exit(1)
            return
        asked = asked_recipe(recipe, overrides or [])
        if address is None:
            found = preflight_here(asked, wishes, hear)
        else:
            from cluster.preflight.through_ray import preflight_on

            found = preflight_on(address, asked, wishes, hear)
        typer.echo(checks_json(found.checks) if as_json else verdict_line(found.checks))
        if not found.is_ready:
            raise typer.Exit(1)
