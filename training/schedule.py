"""The learning rate as a pure function of the step: drops or half a cosine, after a warm-up.

DETR and UP-DETR drop once by ten (UP-DETR, section 4.1: after epoch 40 of 60). There is no
scheduler object and so nothing to store: a resumed run computes the same numbers.
"""

import logging
import math
from dataclasses import dataclass
from typing import Literal, Self, assert_never

from pydantic import Field, model_validator

from models.settings import Settings

logger = logging.getLogger(__name__)


class ScheduleSettings(Settings):
    """How the learning rate moves over a run."""

    kind: Literal["step", "cosine"] = "step"
    """`step` multiplies by drop_factor at each of drop_at; `cosine` falls to final_share."""
    unit: Literal["epochs", "steps"] = "epochs"
    """What drop_at and warmup count."""
    drop_at: tuple[float, ...] = ()
    """Points, in `unit`, from which the rate is lower (kind=step only)."""
    drop_factor: float = Field(default=0.1, gt=0, le=1)
    """Factor of one drop."""
    warmup: float = Field(default=0.0, ge=0)
    """Length of the linear rise from zero, in `unit`; 0 starts at the full rate."""
    final_share: float = Field(default=0.0, ge=0, le=1)
    """Share of the base rate that is left at the last step (kind=cosine only)."""

    @model_validator(mode="after")
    def _drops_rise(self) -> Self:
        if list(self.drop_at) != sorted(set(self.drop_at)) or any(at <= 0 for at in self.drop_at):
            raise ValueError(
                f"drop_at={list(self.drop_at)} must be positive and rising, e.g. drop_at=[40, 50]"
            )
        if self.kind == "cosine" and self.drop_at:
            raise ValueError(
                f"drop_at={list(self.drop_at)} does nothing with kind=cosine; "
                "remove it or use kind=step"
            )
        return self


@dataclass(frozen=True)
class Schedule:
    """A schedule with every length in steps."""

    kind: Literal["step", "cosine"]
    drop_steps: tuple[int, ...]
    drop_factor: float
    warmup_steps: int
    final_share: float
    total_steps: int


def schedule_in_steps(
    settings: ScheduleSettings, total_steps: int, steps_per_epoch: float
) -> Schedule:
    """The schedule of a run of `total_steps`; lengths in epochs are rounded to the nearest step.

    A drop that lies beyond the end is kept, never reached, and said once as a warning.
    """
    scale = steps_per_epoch if settings.unit == "epochs" else 1.0
    drops = tuple(round(at * scale) for at in settings.drop_at)
    late = [at for at, step in zip(settings.drop_at, drops, strict=True) if step >= total_steps]
    if late:
        logger.warning(
            "schedule.drop_at=%s (%s) lies beyond the last step, %d: the rate never drops there",
            late,
            settings.unit,
            total_steps,
        )
    return Schedule(
        kind=settings.kind,
        drop_steps=drops,
        drop_factor=settings.drop_factor,
        warmup_steps=round(settings.warmup * scale),
        final_share=settings.final_share,
        total_steps=total_steps,
    )


def learning_rate(schedule: Schedule, base_lr: float, step: int) -> float:
    """The rate of the update number `step`, 0 first."""
    if step < schedule.warmup_steps:
        return base_lr * (step + 1) / schedule.warmup_steps
    match schedule.kind:
        case "step":
            drops = sum(step >= drop for drop in schedule.drop_steps)
            return base_lr * schedule.drop_factor**drops
        case "cosine":
            return base_lr * _cosine_share(schedule, step)
        case _:
            assert_never(schedule.kind)


def _cosine_share(schedule: Schedule, step: int) -> float:
    length = max(1, schedule.total_steps - schedule.warmup_steps)
    done = min(1.0, (step - schedule.warmup_steps) / length)
    return schedule.final_share + (1 - schedule.final_share) * 0.5 * (1 + math.cos(math.pi * done))
