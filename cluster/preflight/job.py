"""Preflight as a job of a cluster that is reached by its Jobs API: its machines are asked there."""

from collections.abc import Sequence
from dataclasses import replace

from rich.console import Console

from cluster.jobs.commands import Submission, submit_order
from cluster.jobs.orders import ON_ITS_CLUSTER, start_order
from cluster.preflight.run import Wishes

NAME = "preflight"
"""What the ids of these jobs begin with."""


def preflight_as_job(
    recipe: str,
    overrides: Sequence[str],
    wishes: Wishes,
    as_json: bool,
    how: Submission,
    console: Console,
) -> bool:
    """Submits the look and shows what it says; whether nothing must be mended.

    Raises RecipeError or JobsError, as `querypatch submit`.
    """
    order = start_order(recipe, overrides, NAME)
    file = order.words[1]
    words = (NAME, file, *ON_ITS_CLUSTER, "--depth", wishes.depth, *_more(wishes, as_json))
    return submit_order(replace(order, words=words, run=None), how, console)


def _more(wishes: Wishes, as_json: bool) -> list[str]:
    price = [] if wishes.price is None else ["--price", str(wishes.price)]
    return [*price, "--json"] if as_json else price
