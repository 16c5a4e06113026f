"""The nouns of the loop: how long to train, what is trained, and what surrounds it."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Generic, Literal, Protocol, Self, TypeVar, runtime_checkable

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn

from models.settings import Settings
from models.shares import Share
from models.structures import Losses
from training.metrics import Journal, StepRecord
from training.progress import Display
from training.schedule import Schedule
from training.snapshot import Position, TrainingState
from training.world import World


class LoopSettings(Settings):
    """How long to train, how precisely, and how often to do what."""

    epochs: float | None = Field(default=None, gt=0)
    """Length of the run in passes over the data; give this or steps."""
    steps: int | None = Field(default=None, ge=1)
    """Length of the run in updates; give this or epochs."""
    accumulate: int = Field(default=1, ge=1)
    """Batches whose gradients are averaged into one update."""
    pad_to: Literal["part", "batch"] = "part"
    """Pad pictures to the largest of the worker's own part, or of the whole batch of all workers.
    The CNN sees the padding at a picture's borders: with `batch` any number of workers learns the
    same but for rounding. It costs one more exchange between the workers in every step.
    """
    precision: Literal["float32", "bf16"] = "float32"
    """`bf16` computes the model in bfloat16 where that is safe, never matching and losses."""
    compile: bool = False
    """Compile the model with torch.compile: minutes at the start, faster steps after."""
    log_every: int = Field(default=50, ge=1)
    """Updates between two records."""
    evaluate_every: int | None = Field(default=None, ge=1)
    """Updates between two evaluations, with one at the start and one at the end; null for none."""
    evaluate_every_epochs: float | None = Field(default=None, gt=0)
    """The same in passes over the data; give this or evaluate_every."""
    score_in_background: bool = False
    """Go on training while the predictions of an evaluation are scored; a checkpoint of the same
    step then carries no metrics.
    """
    checkpoint_every_steps: int | None = Field(default=None, ge=1)
    """Updates between two checkpoints; null leaves it to the minutes."""
    checkpoint_every_minutes: float | None = Field(default=10.0, gt=0)
    """Minutes between two checkpoints; null leaves it to the steps."""
    max_bad_steps: int = Field(default=10, ge=1)
    """Updates in a row that may be left out for not being finite before the run stops."""

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError(
                f"epochs={self.epochs} and steps={self.steps}: give exactly one of them, "
                "e.g. loop.epochs=60 loop.steps=null"
            )
        return self

    @model_validator(mode="after")
    def _one_rhythm(self) -> Self:
        if self.evaluate_every is not None and self.evaluate_every_epochs is not None:
            raise ValueError(
                f"evaluate_every={self.evaluate_every} and evaluate_every_epochs="
                f"{self.evaluate_every_epochs:g}: give one of them, the other as null"
            )
        return self


@dataclass(frozen=True)
class Plan:
    """The length of a run."""

    total_steps: int
    batches_per_epoch: int
    accumulate: int
    evaluate_every: int | None = None
    """Updates between two evaluations; None for no evaluation."""

    @property
    def steps_per_epoch(self) -> float:
        """Updates in one pass over the data; an update may span the end of an epoch."""
        return self.batches_per_epoch / self.accumulate

    def first_batch(self, position: Position) -> int:
        """Number, over all epochs, of the batch that the next update begins with."""
        return position.step * self.accumulate


@runtime_checkable
class Batch(Protocol):
    """What the loop asks of a batch."""

    @property
    def keys(self) -> tuple[str, ...]:
        """The pictures of this worker's part."""
        ...

    @property
    def skipped(self) -> tuple[str, ...]:
        """The pictures of this worker's part that could not be decoded."""
        ...

    @property
    def extent(self) -> tuple[int, int]:
        """(height, width) that pictures are padded to; 0 of what counts for nothing."""
        ...

    def part(self, rows: slice) -> Self:
        """Some of the pictures, padded as they are."""
        ...

    def padded(self, height: int, width: int) -> Self:
        """The same, padded to a size."""
        ...


B = TypeVar("B", bound=Batch)
_B = TypeVar("_B", bound=Batch, contravariant=True)


@runtime_checkable
class Objective(Protocol[_B]):
    """What is learned from a batch, which several workers compute in one pass or more."""

    def counts(self, batch: _B) -> Float[Tensor, "3"]:
        """What losses are divided by, on the batch's device; counts of parts add up."""
        ...

    def __call__(
        self, model: nn.Module, batch: _B, share: Share, generator: torch.Generator
    ) -> Losses:
        """A part's shares of the losses of the whole batch.

        The generator is the same for every part of the batch: what is drawn for a picture must
        hang on its place in the whole batch alone.
        """
        ...


@runtime_checkable
class Checkpoints(Protocol):
    """Where checkpoints go."""

    def save(self, state: TrainingState, position: Position, metrics: Mapping[str, float]) -> None:
        """Keeps the state of `position`; called on every worker."""
        ...

    def flush(self) -> None:
        """Returns when what was saved is stored or has failed."""
        ...


@dataclass(frozen=True)
class Job(Generic[B]):
    """What is trained."""

    state: TrainingState
    model: nn.Module
    """What the objective calls: `state.model`, or DDP around it."""
    objective: Objective[B]
    batches: Iterator[B]
    """Endless; begins at `Plan.first_batch` of the position."""
    plan: Plan
    schedule: Schedule
    settings: LoopSettings
    clip_norm: float | None
    seed: int
    world: World
    max_pictures_per_pass: int | None = None
    """More pictures than these are computed in several passes; None computes all at once."""


Scoring = Callable[[], Mapping[str, float | int]]
"""What is left to do when everything is predicted: gives metrics by name."""

Evaluate = Callable[[nn.Module, Callable[[], None]], Scoring]
"""Predicts with a model; the second argument is called with every batch, as a sign of life."""


@dataclass(frozen=True)
class Evaluated:
    """A model that was judged."""

    step: int
    """Updates it had."""
    metrics: Mapping[str, float]
    """By name, with `eval/` before it."""
    weights: Mapping[str, Tensor]
    """A copy on the CPU of the weights that were judged: the moving average where there is one."""


def nothing_wanted() -> bool:
    """Nobody wants a checkpoint before its time."""
    return False


def unheard(step: int) -> None:
    """Nobody listens for signs of life."""


@dataclass(frozen=True)
class Surroundings:
    """What the run tells and is told; journal and display are of the first worker only."""

    checkpoints: Checkpoints
    clock: Callable[[], float]
    """Seconds that only grow, e.g. time.monotonic."""
    stop: Callable[[], bool]
    """True once this worker has been asked to stop."""
    journal: Journal | None = None
    display: Display | None = None
    evaluate: Evaluate | None = None
    """Predicts with a model in evaluation mode, on every worker; the scoring it returns is called
    on the first worker alone, in another thread where the settings say so.
    """
    judge: Callable[[Evaluated], bool] | None = None
    """Keeps what is worth keeping of an evaluation; True ends the run. On the first worker."""
    counters: Callable[[], Mapping[str, float | int]] | None = None
    """Counts of the stream and the store for the record."""
    report: Callable[[StepRecord], None] | None = None
    """Called with each record on every worker."""
    checkpoint_wanted: Callable[[], bool] = nothing_wanted
    """Asked once a step, on every worker: each True, of any worker, is one checkpoint after the
    step; e.g. where this worker's machine has announced its end.
    """
    beat: Callable[[int], None] = unheard
    """A sign of life, on every worker: called with the updates done, after each of them and with
    every batch of an evaluation.
    """


def plan_steps(settings: LoopSettings, batches_per_epoch: int) -> Plan:
    """The length of a run; a length in epochs is rounded up to whole updates.

    Raises:
        ValueError: the data hold no batch.
    """
    if batches_per_epoch < 1:
        raise ValueError(f"batches_per_epoch={batches_per_epoch}: the data hold no whole batch")
    batches = (settings.epochs or 0) * batches_per_epoch
    steps = settings.steps or -int(-batches // settings.accumulate)
    every = settings.evaluate_every
    if settings.evaluate_every_epochs is not None:
        updates = settings.evaluate_every_epochs * batches_per_epoch / settings.accumulate
        every = max(1, round(updates))
    return Plan(steps, batches_per_epoch, settings.accumulate, every)
