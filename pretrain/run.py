"""The assembly of a pretraining run: recipe to model, objective, stream and loop."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, closing
from dataclasses import asdict, dataclass

import torch
from torch import nn

from data.batches import PackedPatchBatch, to_device
from data.index import ShardIndex, read_index
from data.loader import StreamSource
from data.patches import ColourOn
from data.stream import PatchStream
from models.structures import PatchBatch
from pretrain.evaluation import evaluate_held_out
from pretrain.objective import PatchObjective
from pretrain.recipe import PretrainRecipe
from pretrain.weights import initial_model
from training.checkpoint import resume
from training.ema import Ema
from training.job import Checkpoints, Job, Scoring, Surroundings, plan_steps
from training.loop import train
from training.metrics import Journal
from training.optimiser import build_optimiser
from training.parallel import parallel_model
from training.progress import Display
from training.record import begin_record
from training.run_folder import RunFolder
from training.schedule import schedule_in_steps
from training.snapshot import Position, TrainingState
from training.uploads import Uploads
from training.world import World


@dataclass(frozen=True)
class Host:
    """What the machines around one worker offer it."""

    world: World
    folder: RunFolder
    """Of the run."""
    uploads: Uploads
    """This worker's background uploads."""
    checkpoints: Checkpoints
    stop: Callable[[], bool]
    """True once the run is asked to stop."""
    display: Callable[[int, int], AbstractContextManager[Display]]
    """Opens a display for (start step, total steps); asked by the first worker only."""


def pretrain(recipe: PretrainRecipe, host: Host) -> Position:
    """Trains from the run's newest whole checkpoint to its end; returns how far it came.

    Called on every worker. Raises what `read_index`, `initial_model`, `resume` and `train` raise.
    """
    world = host.world
    index = read_index(recipe.data.shards)
    model = initial_model(recipe)
    wrapped = parallel_model(model, world, recipe.loop.compile)
    state = TrainingState(
        model=model,
        optimiser=build_optimiser(model, model.detector.backbone, recipe.optimiser),
        ema=Ema(model, recipe.ema) if recipe.ema else None,
    )
    start = resume(host.folder, state, world)
    stream = PatchStream(
        stream_source(recipe, index, world.device),
        recipe.data.stream,
        world.rank,
        world.size,
        pin=world.device.type == "cuda",
    )
    plan = plan_steps(recipe.loop, stream.batches_per_epoch)
    with ExitStack() as stack:
        batches = stack.enter_context(closing(stream.from_step(plan.first_batch(start))))
        job = Job(
            state=state,
            model=wrapped,
            objective=PatchObjective(recipe, world),
            batches=on_device(batches, world.device),
            plan=plan,
            schedule=schedule_in_steps(recipe.schedule, plan.total_steps, plan.steps_per_epoch),
            settings=recipe.loop,
            clip_norm=recipe.optimiser.clip_norm,
            seed=recipe.seed,
            world=world,
        )
        return train(
            job, _surroundings(recipe, host, stream, start, plan.total_steps, stack), start
        )


def stream_source(recipe: PretrainRecipe, index: ShardIndex, device: torch.device) -> StreamSource:
    """What decides the pixels of every batch."""
    return StreamSource(
        index=index,
        seed=recipe.seed,
        global_batch=recipe.global_batch,
        num_patches=recipe.queries.num_patches,
        order=recipe.data.order,
        patches=recipe.data.patches,
        colour_on=colour_place(recipe, device),
    )


def colour_place(recipe: PretrainRecipe, device: torch.device) -> ColourOn:
    """Where the patches' colours change on this device."""
    if recipe.data.colour_on != "auto":
        return recipe.data.colour_on
    return "device" if device.type == "cuda" else "cpu"


def on_device(batches: Iterator[PackedPatchBatch], device: torch.device) -> Iterator[PatchBatch]:
    """The batches on the training device, normalised there."""
    for packed in batches:
        yield to_device(packed, device)


def _surroundings(
    recipe: PretrainRecipe,
    host: Host,
    stream: PatchStream,
    start: Position,
    total_steps: int,
    stack: ExitStack,
) -> Surroundings:
    journal = display = None
    if host.world.is_first:
        begin_record(host.folder, recipe, start.step, host.world)
        journal = Journal(host.folder, host.uploads, start.step, time.monotonic)
        stack.callback(journal.close)
        display = stack.enter_context(host.display(start.step, total_steps))
    return Surroundings(
        checkpoints=host.checkpoints,
        clock=time.monotonic,
        stop=host.stop,
        journal=journal,
        display=display,
        evaluate=_evaluation(recipe, host.world),
        counters=lambda: _counters(stream, host.uploads),
    )


def _evaluation(recipe: PretrainRecipe, world: World) -> Callable[[nn.Module], Scoring] | None:
    if recipe.data.held_out is None:
        return None
    source = stream_source(recipe, read_index(recipe.data.held_out), world.device)

    def evaluate(model: nn.Module) -> Scoring:
        numbers = evaluate_held_out(model, recipe, source, world)
        return lambda: numbers

    return evaluate


def _counters(stream: PatchStream, uploads: Uploads) -> dict[str, float]:
    reading = asdict(stream.counters.reading)
    named = {f"reading/{name}": float(value) for name, value in reading.items()}
    return {**named, "uploads_failed": float(uploads.failures)}
