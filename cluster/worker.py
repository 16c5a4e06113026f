"""One worker: what Ray says of it becomes plain numbers, and the stage runs.

The same assembly runs without Ray (`run_alone`), in this process.
"""

import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, assert_never

import ray.train
import ray.train.torch
import torch
from rich.console import Console

from cluster.board import BoardDisplay, Happening, Message, Stored, Taken
from cluster.kernels import check_kernels
from cluster.stages import Recipe, parsed_recipe, run_stage
from cluster.storage import RayCheckpoints
from cluster.watchdog import Watchdog
from cluster.witness import Witness, WitnessedDisplay
from cluster.writing import writing
from models.ops.deformable import set_allow_reference
from training.checkpoint_writer import CheckpointWriter
from training.job import Checkpoints, nothing_wanted, unheard
from training.lease import check_held
from training.outcome import write_outcome
from training.progress import Display, open_display
from training.recipe import recipe_digest
from training.resources import Resources
from training.run_folder import open_run_folder
from training.snapshot import Position, TrainingState
from training.stage import Host
from training.stopping import stop_on_signals
from training.storage_settings import apply_storage_options
from training.uploads import Uploads
from training.world import World

PERMANENT = (ValueError, ArithmeticError)
"""Errors that say what is wrong with the input: a new start would meet them again."""

LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def _log_hung(text: str, step: int) -> None:
    """The watchdog has logged it already."""


@dataclass(frozen=True)
class Links:
    """What else passes between a worker and its job."""

    stored: Callable[[int], None] = unheard
    """Told the step of each checkpoint that is in the store."""
    hung: Callable[[str, int], None] = _log_hung
    """Told in one line that this worker makes no progress, and its last step."""
    checkpoint_wanted: Callable[[], bool] = nothing_wanted
    """As in `Host`."""
    may_write: Callable[[], None] | None = None
    """As in `Uploads`: raises LeaseLost where the run has another writer."""


def run_on_ray(config: Mapping[str, Any]) -> None:
    """The function that Ray calls on every worker: `recipe` (YAML), `board` (an actor), `lease`."""
    recipe = parsed_recipe(config["recipe"])
    board = config["board"]
    context = ray.train.get_context()
    world = World(context.get_world_rank(), context.get_world_size(), ray.train.torch.get_device())
    _log_to_driver(world)
    torch.set_num_threads(recipe.resources.cpus_per_worker)
    display = BoardDisplay(board, time.monotonic)

    def hung(text: str, step: int) -> None:
        told = Happening("hung", f"worker {world.rank}: {text}", step, {"rank": world.rank})
        # Waited for: this process ends next.
        ray.wait([board.tell.remote(told)], timeout=10)

    stop = display.stop_requested if world.is_first else nothing_wanted
    links = Links(
        stored=lambda step: board.tell_stored.remote(step),
        hung=hung,
        checkpoint_wanted=display.checkpoint_wanted if world.is_first else nothing_wanted,
        may_write=_lease_check(recipe, config["lease"]),
    )
    try:
        run_worker(recipe, world, stop, display.begin, RayCheckpoints, links)
    except PERMANENT as error:
        # Ray would start the workers again, to the same end.
        ray.get(board.fail.remote(str(error)))
        raise


def run_alone(recipe: Recipe, console: Console) -> Position:
    """The whole run in this process, without Ray; signals and `querypatch stop` ask it to stop.

    Raises LeaseHeld: another job writes to the run; LeaseLost.
    """
    torch.set_num_threads(recipe.resources.cpus_per_worker)
    world = World.alone(device_of(recipe.resources))
    apply_storage_options(recipe.storage)
    folder = open_run_folder(recipe.run)
    with writing(recipe, folder, console) as work, stop_on_signals(work.flag):
        witness = Witness(work.history, recipe.resources.max_restarts)

        def stop() -> bool:
            work.check_lease()
            return work.flag()

        def see(message: Message) -> None:
            witness.see(Taken(message, (), Stored(), None))

        def display(start: int, total: int) -> WitnessedDisplay:
            return WitnessedDisplay(open_display(console, start, total), see, start, total)

        links = Links(
            hung=lambda text, step: work.history.add("hung", text, step),
            may_write=_lease_check(recipe, work.lease.token),
        )
        return run_worker(recipe, world, stop, display, lambda writer, _: writer, links)


def run_worker(
    recipe: Recipe,
    world: World,
    stop: Callable[[], bool],
    display: Callable[[int, int], AbstractContextManager[Display]],
    announced: Callable[[CheckpointWriter, World], Checkpoints],
    links: Links | None = None,
) -> Position:
    """The stage of the recipe, on this worker; `announced` wraps the writer of checkpoints."""
    links = links or Links()
    set_allow_reference(recipe.ops.allow_reference)
    check_kernels(recipe, world.device)
    apply_storage_options(recipe.storage)
    folder = open_run_folder(recipe.run)
    uploads = Uploads(may_write=links.may_write)
    writer = CheckpointWriter(folder, uploads, recipe.checkpoints, world, recipe_digest(recipe))
    lengths: list[int] = []

    def opened(start: int, total: int) -> AbstractContextManager[Display]:
        lengths.append(total)
        return display(start, total)

    with closing(uploads):
        with _watched(recipe.resources, links) as beat:
            host = Host(
                world=world,
                folder=folder,
                uploads=uploads,
                checkpoints=_Told(announced(writer, world), world, uploads, links.stored),
                stop=stop,
                display=opened,
                checkpoint_wanted=links.checkpoint_wanted,
                beat=beat,
            )
            position = run_stage(recipe, host)
        writer.finish()
    # A run that stopped early in another start opens no display: it has its outcome.
    if world.is_first and lengths and (position.step >= lengths[-1] or not stop()):
        # Nobody asked it to end: its last step is done, or its evaluations grow no more.
        write_outcome(folder, position.step, lengths[-1])
    return position


def _lease_check(recipe: Recipe, token: str) -> Callable[[], None]:
    """What a worker asks before each upload."""
    apply_storage_options(recipe.storage)
    return partial(check_held, open_run_folder(recipe.run), token)


@contextmanager
def _watched(resources: Resources, links: Links) -> Iterator[Callable[[int], None]]:
    """Gives the ear for the signs of life that the block must give."""
    if resources.hang_minutes is None:
        yield unheard
        return
    with Watchdog(60 * resources.hang_minutes, links.hung) as dog:
        yield dog.beat


@dataclass(frozen=True)
class _Told:
    """Checkpoints whose arrival in the store is told, by the first worker."""

    checkpoints: Checkpoints
    world: World
    uploads: Uploads
    stored: Callable[[int], None]

    def save(self, state: TrainingState, position: Position, metrics: Mapping[str, float]) -> None:
        self.checkpoints.save(state, position, metrics)
        if self.world.is_first:
            self.uploads.submit("word of a checkpoint", lambda: self._tell(position.step))

    def flush(self) -> None:
        self.checkpoints.flush()

    def _tell(self, step: int) -> None:
        # Uploads are made in order: the last one before this was the checkpoint.
        if not self.uploads.failures_in_a_row:
            self.stored(step)


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
    # Ray Train names its loggers by their files; the S3 client tells where it found credentials.
    is_theirs = "/ray/" in record.name or record.name.startswith(("aiobotocore", "botocore"))
    return record.levelno >= logging.WARNING or not is_theirs
