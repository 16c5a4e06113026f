"""Checks before anything is spent: a job that cannot run says so at once, in one line.

Also keeps the one word that tells a run's data: `data.json`, the digests of its shards, so that a
resume is refused when the shards are others than those that the run began with.
"""

import json
import logging
from collections.abc import Sequence

import fsspec

from data.index import index_digest, read_index
from data.order import batches_per_epoch
from models.interop.backbones import RANDOM_WEIGHTS
from pretrain.recipe import FREE_KEYS, PretrainRecipe, with_absolute_paths
from training.recipe import load_recipe
from training.record import check_same_recipe, read_recipe_values
from training.run_folder import RunFolder, open_run_folder

logger = logging.getLogger(__name__)

DATA = "data.json"


class RefusedJob(ValueError):  # noqa: N818
    """A job that must not start; the message names the way out."""


def check_new_run(recipe: PretrainRecipe) -> None:
    """Refuses a folder that holds a run already, and what `check_inputs` refuses."""
    folder = open_run_folder(recipe.run)
    if read_recipe_values(folder) is not None:
        raise RefusedJob(
            f"run={recipe.run} holds a run already; continue it with `querypatch resume "
            f"{recipe.run}`, or give another run="
        )
    folder.write(DATA, json.dumps(check_inputs(recipe), indent=1).encode())


def resumed_recipe(url: str, overrides: Sequence[str]) -> PretrainRecipe:
    """The recipe of the run at `url`, with overrides of keys that change nothing of what it learns.

    Raises RefusedJob or RecipeError: no run there, other keys differ, or its shards changed.
    """
    folder = open_run_folder(url)
    values = read_recipe_values(folder)
    if values is None:
        raise RefusedJob(
            f"{folder.url} holds no run (no recipe.yaml); start one with "
            f"`querypatch pretrain RECIPE run={url}`"
        )
    recipe = with_absolute_paths(load_recipe(PretrainRecipe, values, [*overrides, f"run={url}"]))
    check_same_recipe(folder, recipe, may_differ=FREE_KEYS)
    _check_same_data(folder, check_inputs(recipe))
    return recipe


def check_inputs(recipe: PretrainRecipe) -> dict[str, str]:
    """Reads what the run will read; returns the digests of its shards by key.

    Raises the errors of `read_index`, or RefusedJob: too few pictures, or no such weights.
    """
    shards = read_index(recipe.data.shards)
    batches_per_epoch(shards, recipe.global_batch, recipe.data.order)
    digests = {"data.shards": index_digest(shards)}
    if recipe.data.held_out is not None:
        digests["data.held_out"] = index_digest(read_index(recipe.data.held_out))
        if digests["data.held_out"] == digests["data.shards"]:
            logger.warning("data.held_out holds the shards that are learned from: no fair measure")
    elif recipe.loop.evaluate_every is not None:
        logger.warning("data.held_out is not given: nothing is evaluated during the run")
    _check_exists("model.backbone.weights", recipe.model.backbone.weights)
    if recipe.init is not None:
        _check_exists("init", recipe.init)
    return digests


def _check_exists(key: str, source: str) -> None:
    if source == RANDOM_WEIGHTS:
        return
    try:
        filesystem, path = fsspec.core.url_to_fs(source)
        found = filesystem.exists(path)
    except (ImportError, OSError, ValueError) as error:
        raise RefusedJob(f"{key}={source} cannot be reached: {error}") from error
    if not found:
        raise RefusedJob(f"{key}={source} does not exist; give a path or URL that does")


def _check_same_data(folder: RunFolder, digests: dict[str, str]) -> None:
    try:
        recorded = json.loads(folder.read(DATA))
    except FileNotFoundError:
        return
    for key, digest in digests.items():
        if recorded.get(key, digest) != digest:
            raise RefusedJob(
                f"{key} holds other shards than those that {folder.url} began with, so its order "
                "cannot be continued; restore them, or start a new run with init="
            )
