"""What is asked of a cluster: commands with everything they read, and nothing secret in them.

Commands, files and variables of a job can be seen by everybody who sees the cluster, so a secret
among them is refused; docs/cluster.md says where secrets belong.
"""

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from cluster.jobs.continuing import said
from cluster.jobs.packaging import EXTRAS
from cluster.jobs.submitting import Order
from cluster.stages import StageName, found_recipe, parsed_recipe, recipe_values
from models.urls import holds_credentials, public_url
from training.recipe import RecipeError, override, parse_recipe
from training.run_recipe import absolute
from training.strict_yaml import dump_yaml

RECIPE = "recipe.yaml"
ON_ITS_CLUSTER = ("--address", "auto")
"""Words for a job's command: on the cluster that runs it."""

_SECRET = re.compile(
    r"SECRET|TOKEN|PASSW|PASSPHRASE|CREDENTIAL|SIGNATURE|CONNECTION_STRING|(^|_)(KEY|AUTH|SAS)(_|$)"
)


def start_order(
    name: str, overrides: Sequence[str], job: str | None = None, stage: StageName | None = None
) -> Order:
    """The order to begin or continue the run of a recipe; `name` as in `querypatch submit`, or that
    of a recipe of `stage`.

    Raises RecipeError: mistakes in the recipe, of which credentials are one.
    """
    if stage is None:
        stage, source = found_recipe(name)
        values = override(parse_recipe(source), overrides)
    else:
        values = recipe_values(stage, name, overrides)
    recipe = parsed_recipe(values, (), stage)
    shipped = {"stage": stage, **override({}, said(values, recipe))}
    return Order(
        words=(stage, f"{EXTRAS}/{RECIPE}", "--continue", *ON_ITS_CLUSTER),
        name=job or recipe.run,
        run=public_url(recipe.run.rstrip("/")),
        files={RECIPE: dump_yaml(shipped).encode()},
        paths=tuple(_paths(shipped)),
    )


def resume_order(run: str, overrides: Sequence[str], job: str | None = None) -> Order:
    """The order to continue the run at a URL, of which nothing else needs to be known here."""
    url = (absolute(run) or "").rstrip("/")
    _check_nothing_secret((url, *overrides))
    return Order(
        words=("resume", url, *overrides, *ON_ITS_CLUSTER), name=job or url, run=public_url(url)
    )


def environment(names: Iterable[str]) -> dict[str, str]:
    """Variables of this process for a job, by their names.

    Raises ValueError: one that is not set, or whose name or value is that of a secret.
    """
    found = {}
    for name in names:
        value = os.environ.get(name)
        if value is None:
            raise ValueError(f"--env {name}: there is no such variable here; export it first")
        if _SECRET.search(name.upper()) or _is_secret(name, value):
            raise ValueError(
                f"--env {name} looks like a secret, and everybody who sees the cluster's jobs "
                "would see it; give it to the cluster's machines instead (a role, a profile, a "
                "Kubernetes secret: docs/cluster.md)"
            )
        found[name] = value
    return found


def _check_nothing_secret(words: Iterable[str]) -> None:
    """Raises RecipeError where a URL among the words holds credentials."""
    for word in words:
        if holds_credentials(word.partition("=")[2] or word):
            raise RecipeError(
                f"{public_url(word)} was given with credentials in the URL, which everybody who "
                "sees the cluster's jobs would see; leave them out and give them to the cluster's "
                "machines (a role, a profile, a Kubernetes secret)"
            )


def _is_secret(name: str, value: str) -> bool:
    """Of the options that fsspec takes from its variables some are secrets."""
    is_option = name.startswith("FSSPEC_") and re.search(r"secret|password|token|\"key\"", value)
    return bool(is_option) or holds_credentials(value)


def _paths(values: Mapping[str, object], prefix: str = "") -> Iterator[str]:
    """Keys of a recipe that name files of a machine rather than URLs."""
    for key, value in values.items():
        match value:
            case Mapping():
                yield from _paths(value, f"{prefix}{key}.")
            case str() if value.startswith("/"):
                yield prefix + key
