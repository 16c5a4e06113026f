"""Checks before anything is spent: a job that cannot run says so at once, in one line.

Also keeps the one word that tells a run's data: `data.json`, the digests of its shards, so that a
resume is refused when the shards are others than those that the run began with.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import assert_never

import fsspec
import torch

from cluster.kernels import check_kernels
from cluster.stages import Recipe, free_keys, parsed_recipe
from data.index import index_digest, read_index
from data.order import batches_per_epoch
from finetune.recipe import FinetuneRecipe
from finetune.run import checked_recipe
from models.interop.backbones import RANDOM_WEIGHTS
from pretrain.recipe import PretrainRecipe
from training.checkpoint import newest_checkpoint
from training.recipe import load_recipe, override
from training.record import check_same_recipe, read_recipe_values
from training.run_folder import RunFolder, open_run_folder
from training.storage_settings import RunStorage, apply_storage_options

logger = logging.getLogger(__name__)

DATA = "data.json"


class RefusedJob(ValueError):  # noqa: N818
    """A job that must not start; the message names the way out."""


def checked_new_run(recipe: Recipe) -> Recipe:
    """The recipe with what its data and weights tell; raises RefusedJob where a run lies there
    already, and what `checked_inputs` raises.
    """
    apply_storage_options(recipe.storage)
    folder = open_run_folder(recipe.run)
    if read_recipe_values(folder) is not None:
        raise RefusedJob(
            f"run={recipe.run} holds a run already; continue it with `querypatch resume "
            f"{recipe.run}`, or give another run="
        )
    checked = checked_inputs(recipe)
    folder.write(DATA, json.dumps(checked.digests, indent=1).encode())
    return checked.recipe


def resumed_recipe(url: str, overrides: Sequence[str]) -> Recipe:
    """The recipe of the run at `url`, with overrides of keys that change nothing of what it learns.

    Raises RefusedJob or RecipeError: no run there, other keys differ, or its data changed.
    """
    # The run's own recipe says how its store is reached, and can be read only when it is.
    said = override({}, [text for text in overrides if text.startswith("storage.")])
    apply_storage_options(load_recipe(RunStorage, said).storage)
    folder = open_run_folder(url)
    values = read_recipe_values(folder)
    if values is None:
        raise RefusedJob(
            f"{folder.url} holds no run (no recipe.yaml); start one with "
            f"`querypatch pretrain RECIPE run={url}` or `querypatch finetune RECIPE run={url}`"
        )
    recipe = parsed_recipe(values, [*overrides, f"run={url}"])
    apply_storage_options(recipe.storage)
    check_same_recipe(folder, recipe, may_differ=free_keys(recipe))
    is_fresh = newest_checkpoint(folder) is None
    _check_same_data(folder, checked_inputs(recipe, is_fresh).digests)
    return recipe


@dataclass(frozen=True)
class CheckedInputs:
    """What a look at a run's inputs told."""

    recipe: Recipe
    """Complete: with the architecture and the classes that weights and data tell."""
    digests: dict[str, str]
    """Of the data, by key."""


def checked_inputs(recipe: Recipe, is_fresh: bool = True) -> CheckedInputs:
    """Reads what the run will read; the weights only where it `is_fresh`, without a checkpoint.

    Raises the errors of the readers, RefusedJob: too few pictures, or no such weights; NoKernels,
    where a GPU of this machine has none and the run would fall back to plain PyTorch.
    """
    if recipe.resources.device != "cpu" and torch.cuda.is_available():
        check_kernels(recipe, torch.device("cuda"))
    if is_fresh and recipe.model.backbone.weights is not None:
        _check_exists("model.backbone.weights", recipe.model.backbone.weights)
    if is_fresh and recipe.init is not None:
        _check_exists("init", recipe.init)
    match recipe:
        case PretrainRecipe():
            return CheckedInputs(recipe, _shard_digests(recipe))
        case FinetuneRecipe():
            complete, digests = checked_recipe(recipe, is_fresh)
            return CheckedInputs(complete, digests)
        case _:
            assert_never(recipe)


def _shard_digests(recipe: PretrainRecipe) -> dict[str, str]:
    shards = read_index(recipe.data.shards)
    batches_per_epoch(shards, recipe.global_batch, recipe.data.order)
    digests = {"data.shards": index_digest(shards)}
    if recipe.data.held_out is not None:
        digests["data.held_out"] = index_digest(read_index(recipe.data.held_out))
        if digests["data.held_out"] == digests["data.shards"]:
            logger.warning("data.held_out holds the shards that are learned from: no fair measure")
    elif recipe.loop.evaluate_every is not None or recipe.loop.evaluate_every_epochs is not None:
        logger.warning("data.held_out is not given: nothing is evaluated during the run")
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
                f"{key} holds other pictures than those that {folder.url} began with, so its "
                "order cannot be continued; restore them, or start a new run with init="
            )
