"""A job small enough to follow by hand: a linear model with dropout on numbered batches."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Self

import torch
from torch import Tensor, nn

from models.shares import Share
from models.structures import Losses
from training.ema import Ema, EmaSettings
from training.job import B, Job, LoopSettings, Objective, Surroundings, plan_steps
from training.optimiser import OptimiserSettings, build_optimiser
from training.schedule import ScheduleSettings, schedule_in_steps
from training.snapshot import Position, TrainingState
from training.world import World

CPU = torch.device("cpu")
BATCHES_PER_EPOCH = 5


@dataclass(frozen=True)
class NumberBatch:
    """Three pictures of a numbered batch, each a row of four numbers."""

    rows: Tensor
    keys: tuple[str, ...]
    skipped: tuple[str, ...] = ()

    @property
    def extent(self) -> tuple[int, int]:
        return (1, 4)

    def padded(self, height: int, width: int) -> Self:
        return self

    def part(self, rows: slice) -> Self:
        return replace(self, rows=self.rows[rows], keys=self.keys[rows], skipped=())


class DropoutLine(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Linear(4, 3)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(3, 2)

    def forward(self, rows: Tensor) -> Tensor:
        return self.head(self.dropout(torch.relu(self.backbone(rows))))


Function = Callable[[nn.Module, NumberBatch, torch.Generator], Losses]


@dataclass(frozen=True)
class FunctionObjective:
    """The losses of a function, where a batch is computed by one worker in one pass."""

    function: Function

    def counts(self, batch: NumberBatch) -> Tensor:
        return torch.zeros(3)

    def __call__(
        self, model: nn.Module, batch: NumberBatch, share: Share, generator: torch.Generator
    ) -> Losses:
        return self.function(model, batch, generator)


def line_objective(model: nn.Module, batch: NumberBatch, generator: torch.Generator) -> Losses:
    """Squares, and a term that uses the step's generator."""
    found = model(batch.rows)
    noise = torch.randn(found.shape, generator=generator)
    squares = (found**2).mean()
    return Losses(squares + (found * noise).mean(), {"squares": squares})


def losses_alone(objective: Objective[B], model: nn.Module, batch: B, seed: int = 0) -> Losses:
    """The losses of a batch that one worker computes in one pass."""
    generator = torch.Generator().manual_seed(seed)
    return objective(model, batch, Share(objective.counts(batch)), generator)


def number_batch(number: int, rows: int = 3) -> NumberBatch:
    generator = torch.Generator().manual_seed(number)
    keys = tuple(f"b{number}p{row}" for row in range(rows))
    return NumberBatch(torch.randn(rows, 4, generator=generator), keys)


def number_batches(first: int) -> Iterator[NumberBatch]:
    number = first
    while True:
        yield number_batch(number)
        number += 1


def small_state(ema: EmaSettings | None = None, model: nn.Module | None = None) -> TrainingState:
    if model is None:
        torch.manual_seed(1)
        model = DropoutLine()
    optimiser = build_optimiser(model, None, OptimiserSettings(lr=0.01))
    return TrainingState(model, optimiser, Ema(model, ema) if ema else None)


def small_job(
    state: TrainingState,
    settings: LoopSettings,
    start: Position | None = None,
    batches: Callable[[int], Iterator[NumberBatch]] = number_batches,
    objective: Function = line_objective,
    clip_norm: float | None = 0.1,
) -> Job[NumberBatch]:
    plan = plan_steps(settings, BATCHES_PER_EPOCH)
    schedule = ScheduleSettings(drop_at=(3,), unit="steps")
    return Job(
        state=state,
        model=state.model,
        objective=FunctionObjective(objective),
        batches=batches(plan.first_batch(start or Position())),
        plan=plan,
        schedule=schedule_in_steps(schedule, plan.total_steps, plan.steps_per_epoch),
        settings=settings,
        clip_norm=clip_norm,
        seed=7,
        world=World.alone(CPU),
    )


@dataclass
class KeptCheckpoints:
    """Remembers what was saved, as (step, metrics)."""

    saved: list[tuple[int, dict[str, float]]] = field(default_factory=list)

    def save(self, state: TrainingState, position: Position, metrics: Mapping[str, float]) -> None:
        self.saved.append((position.step, dict(metrics)))

    def flush(self) -> None:
        return


@dataclass
class Ticks:
    """A clock that moves by one second at each look."""

    now: float = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


def surroundings(checkpoints: KeptCheckpoints | None = None) -> Surroundings:
    return Surroundings(
        checkpoints=checkpoints or KeptCheckpoints(), clock=Ticks(), stop=lambda: False
    )
