"""One start of a run, whatever its stage: resume, stream, loop, record.

A stage (pretraining, finetuning) says what is trained on what; this walks from there to the loop.
"""

import time
from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager, ExitStack, closing
from dataclasses import dataclass, field
from typing import Generic

from torch import nn

from models.sampling_parts import sampling_parts
from training.checkpoint import resume
from training.ema import Ema
from training.job import (
    B,
    Checkpoints,
    Evaluate,
    Evaluated,
    Job,
    Objective,
    Plan,
    Surroundings,
    nothing_wanted,
    plan_steps,
    unheard,
)
from training.loop import train
from training.metrics import Journal
from training.optimiser import build_optimiser
from training.parallel import parallel_model
from training.progress import Display
from training.record import begin_record
from training.run_folder import RunFolder
from training.run_recipe import RunRecipe
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
    checkpoint_wanted: Callable[[], bool] = nothing_wanted
    """As in `Surroundings`."""
    beat: Callable[[int], None] = unheard
    """As in `Surroundings`."""


@dataclass(frozen=True)
class Stage(Generic[B]):
    """What is trained, on what, and how it is judged."""

    recipe: RunRecipe
    model: nn.Module
    """With its first weights, on the CPU; equal on every worker."""
    backbone: nn.Module | None
    """The part of the model with a learning rate of its own."""
    objective: Objective[B]
    batches_per_epoch: int
    batches_from: Callable[[int], Generator[B, None, None]]
    """This worker's batches on its device, from the given number on, without end."""
    counters: Callable[[], Mapping[str, float | int]]
    """Counts of the stream for the record."""
    evaluate: Evaluate | None = None
    judge: Callable[[Evaluated], bool] | None = None
    """As in `Surroundings`."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    """Goes into the header of every checkpoint's weights."""


def train_stage(stage: Stage[B], host: Host) -> Position:
    """Trains from the run's newest whole checkpoint to its end; returns how far it came.

    Called on every worker. Raises what `resume`, the stream and `train` raise.
    """
    recipe, world = stage.recipe, host.world
    wrapped = parallel_model(stage.model, world, recipe.loop.compile)
    state = TrainingState(
        model=stage.model,
        optimiser=build_optimiser(
            stage.model, stage.backbone, recipe.optimiser, sampling_parts(stage.model)
        ),
        ema=Ema(stage.model, recipe.ema) if recipe.ema else None,
        metadata=stage.metadata,
    )
    start = resume(host.folder, state, world)
    plan = plan_steps(recipe.loop, stage.batches_per_epoch)
    with ExitStack() as stack:
        batches = stack.enter_context(closing(stage.batches_from(plan.first_batch(start))))
        job = Job(
            state=state,
            model=wrapped,
            objective=stage.objective,
            batches=batches,
            plan=plan,
            schedule=schedule_in_steps(recipe.schedule, plan.total_steps, plan.steps_per_epoch),
            settings=recipe.loop,
            clip_norm=recipe.optimiser.clip_norm,
            seed=recipe.seed,
            world=world,
            max_pictures_per_pass=recipe.pictures_per_pass,
        )
        return train(job, _surroundings(stage, host, start, plan, stack), start)


def _surroundings(
    stage: Stage[B], host: Host, start: Position, plan: Plan, stack: ExitStack
) -> Surroundings:
    journal = display = None
    if host.world.is_first:
        begin_record(host.folder, stage.recipe, start.step, host.world)
        journal = Journal(host.folder, host.uploads, start.step, time.monotonic)
        stack.callback(journal.close)
        display = stack.enter_context(host.display(start.step, plan.total_steps))
    return Surroundings(
        checkpoints=host.checkpoints,
        clock=time.monotonic,
        stop=host.stop,
        journal=journal,
        display=display,
        evaluate=stage.evaluate,
        judge=stage.judge,
        counters=lambda: {**stage.counters(), "uploads_failed": float(host.uploads.failures)},
        checkpoint_wanted=host.checkpoint_wanted,
        beat=host.beat,
    )
