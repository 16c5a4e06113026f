"""`--continue`: a command that may be given again and again, and goes on where its run exists.

For whoever starts commands without knowing what became of the last one: a job that a cluster tries
again, a manifest, a pipeline.
"""

import json
from collections.abc import Iterator, Mapping, Sequence

from cluster.preflight.inputs import checked_new_run, resumed_recipe
from cluster.stages import Recipe, StageName, free_keys, parsed_recipe, recipe_values
from models.urls import public_url
from training.outcome import read_outcome
from training.record import check_same_recipe, read_recipe_values
from training.run_folder import RunFolder, open_run_folder
from training.storage_settings import apply_storage_options


def begun_or_continued(
    stage: StageName, name: str | Mapping[str, object], overrides: Sequence[str]
) -> Recipe:
    """The recipe to start with: checked as a new run's, or that of the run which is there already.

    Whatever the recipe says must be what the run there was begun with, but for the keys that a
    resume may change. Raises RecipeError or RefusedJob, as `checked_new_run` and `resumed_recipe`.
    """
    values = recipe_values(stage, name, overrides)
    recipe = parsed_recipe(values, (), stage)
    apply_storage_options(recipe.storage)
    if read_recipe_values(open_run_folder(recipe.run)) is None:
        return checked_new_run(recipe)
    return resumed_recipe(recipe.run, said(values, recipe))


def told_over(recipe: Recipe) -> str | None:
    """A line that says so where the run is over, and there is nothing to go on with."""
    folder = open_run_folder(recipe.run)
    outcome = read_outcome(folder)
    if outcome is None:
        return None
    how = "its last step is done" if outcome.reason == "done" else "it stopped early"
    return f"{public_url(folder.url)} is over at step {outcome.step}: {how}"


def held_to_its_run(folder: RunFolder, overrides: Sequence[str]) -> None:
    """Raises RecipeError where what `said` gives is not what the run in `folder` was begun with."""
    values = read_recipe_values(folder) or {}
    recipe = parsed_recipe(values, overrides)
    check_same_recipe(folder, recipe, may_differ=free_keys(recipe))


def said(values: Mapping[str, object], recipe: Recipe) -> list[str]:
    """Overrides for the keys in `values`, with what the recipe has there: absolute paths.

    What is left unsaid may be told to the run by its weights or data.
    """
    return list(_said(values, recipe.model_dump(mode="json"), ""))


def _said(
    values: Mapping[str, object], resolved: Mapping[str, object], prefix: str
) -> Iterator[str]:
    for key, value in values.items():
        inner = resolved.get(key)
        if isinstance(value, Mapping) and value and isinstance(inner, Mapping):
            yield from _said(value, inner, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}={json.dumps(inner)}"
