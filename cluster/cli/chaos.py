"""`querypatch chaos`: mounted by the front door.

Imports nothing that takes seconds until it is called.
"""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from cluster.cli.words import Overrides, RecipeName, one_line_errors


def chaos(
    recipe: RecipeName = "chaos_cpu",
    overrides: Overrides = None,
    schedules: Annotated[int, typer.Option(min=1, help="How many, from number 1 on.")] = 20,
    seed: Annotated[int, typer.Option(min=0, help="Decides all schedules.")] = 1,
    only: Annotated[
        list[int] | None, typer.Option(help="The number of one schedule; may be repeated.")
    ] = None,
    through_ray: Annotated[
        bool, typer.Option("--ray", help="Whole jobs through Ray: half a minute for each start.")
    ] = False,
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for all runs.")] = Path("chaos"),
) -> None:
    """Break a tiny run in random ways, and hold each to a run without faults; 1 if one differs."""
    with one_line_errors():
        numbers = only or range(1, schedules + 1)
        if through_ray:
            from cluster.chaos.through_ray import run_chaos_with_ray as run
        else:
            from cluster.chaos.campaign import run_chaos as run
        run(recipe, overrides or [], seed, numbers, out, Console())
