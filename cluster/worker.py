"""One worker: what Ray says of it becomes plain numbers, and the stage runs.

The same assembly runs without Ray (`run_alone`), in this process.
"""

import logging
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, assert_never

import ray.train
import ray.train.torch
import torch
from rich.console import Console

from cluster.board import BoardDisplay
from cluster.kernels import check_kernels
from cluster.stages import Recipe, parsed_recipe, run_stage
from cluster.storage import RayCheckpoints
from models.ops.deformable import set_allow_reference
from training.checkpoint_writer import CheckpointWriter
from training.job import Checkpoints
from training.progress import Display, open_display
from training.recipe import recipe_digest
from training.resources import Resources
from training.run_folder import StoreError, open_run_folder
from training.snapshot import Position
from training.stage import Host
from training.stopping import StopFlag, stop_on_signals
from training.uploads import Uploads
from training.world import World

PERMANENT = (ValueError, ArithmeticError)
"""Errors that say what is wrong with the input: a new start would meet them again."""

LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def run_on_ray(config: Mapping[str, Any]) -> None:
    """The function that Ray calls on every worker: `recipe` (YAML) and `board` (an actor)."""
    recipe = parsed_recipe(config["recipe"])
    context = ray.train.get_context()
    world = World(context.get_world_rank(), context.get_world_size(), ray.train.torch.get_device())
    _log_to_driver(world)
    torch.set_num_threads(recipe.resources.cpus_per_worker)
    display = BoardDisplay(config["board"], time.monotonic)
    stop = display.stop_requested if world.is_first else _never
    try:
        run_worker(recipe, world, stop, display.begin, RayCheckpoints)
    except PERMANENT as error:
        # Ray would start the workers again, to the same end.
        ray.get(config["board"].fail.remote(str(error)))
        raise


def run_alone(recipe: Recipe, console: Console) -> Position:
    """The whole run in this process, without Ray; signals ask it to stop."""
    torch.set_num_threads(recipe.resources.cpus_per_worker)
    world = World.alone(device_of(recipe.resources))
    flag = StopFlag()
    with stop_on_signals(flag):
        return run_worker(
            recipe, world, flag, lambda start, total: open_display(console, start, total), _as_it_is
        )


def run_worker(
    recipe: Recipe,
    world: World,
    stop: Callable[[], bool],
    display: Callable[[int, int], AbstractContextManager[Display]],
    announced: Callable[[CheckpointWriter, World], Checkpoints],
) -> Position:
    """The stage of the recipe, on this worker; `announced` wraps the writer of checkpoints."""
    set_allow_reference(recipe.ops.allow_reference)
    check_kernels(recipe, world.device)
    folder = open_run_folder(recipe.run)
    uploads = Uploads()
    writer = CheckpointWriter(folder, uploads, recipe.checkpoints, world, recipe_digest(recipe))
    host = Host(
        world=world,
        folder=folder,
        uploads=uploads,
        checkpoints=announced(writer, world),
        stop=stop,
        display=display,
    )
    try:
        position = run_stage(recipe, host)
    finally:
        uploads.close()
    if uploads.failures_in_a_row:
        raise StoreError(
            f"{folder.url}: the last {uploads.failures_in_a_row} uploads failed, the newest "
            f"checkpoint in the store is older than step {position.step}; once it can be reached, "
            f"`querypatch resume {folder.url}`"
        )
    return position


def device_of(resources: Resources) -> torch.device:
    """The device of a worker that is alone on its machine.

    Raises ValueError where a GPU is asked for and there is none.
    """
    match resources.device:
        case "cpu":
            return torch.device("cpu")
        case "cuda":
            if not torch.cuda.is_available():
                raise ValueError(
                    "resources.device=cuda: this machine has no usable GPU; use cpu or auto"
                )
            return torch.device("cuda", 0)
        case "auto":
            return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
        case _:
            assert_never(resources.device)


def _log_to_driver(world: World) -> None:
    """Our lines go to the driver through Ray; Ray's own only where they warn."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(LOG_FORMAT))
    handler.addFilter(_is_ours_or_warns)
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    if not world.is_first:
        # Every worker loads the same weights: one of them says so.
        logging.getLogger("models.interop").setLevel(logging.ERROR)


def _is_ours_or_warns(record: logging.LogRecord) -> bool:
    # Ray Train names its loggers by their files.
    return record.levelno >= logging.WARNING or "/ray/" not in record.name


def _never() -> bool:
    return False


def _as_it_is(writer: CheckpointWriter, _: World) -> Checkpoints:
    return writer
