"""When to stop early, and which evaluation was the best: pure functions of a run's history.

The evaluation before the first update (step 0) tells whether evaluating works, not how good what
was trained is: it is never the best one, and no patience is spent on it. A metric that is not a
number (no object of that kind) is no progress and never the best.
"""

import math
from collections.abc import Sequence

from pydantic import Field

from models.settings import Settings


class EarlyStopSettings(Settings):
    """After how many evaluations without progress a run stops."""

    metric: str = "eval/ap"
    """The number that is to grow, by its name in the journal."""
    patience: int = Field(ge=1)
    """Evaluations in a row without progress after which the run stops."""
    min_delta: float = Field(default=0.0, ge=0)
    """By how much, in the metric's unit, an evaluation exceeds the best one to be progress."""


def stopped_at(history: Sequence[tuple[int, float]], settings: EarlyStopSettings) -> int | None:
    """The step at which a run with this history stops; None while it goes on.

    `history`: (updates done, metric) of each evaluation, in order.
    """
    best, waited = -math.inf, 0
    for step, value in _after_training(history):
        if value > best + settings.min_delta:
            best, waited = value, 0
        else:
            waited += 1
        if waited >= settings.patience:
            return step
    return None


def best_step(history: Sequence[tuple[int, float]]) -> int | None:
    """The step of the highest metric, the earliest of equals; None where there is none yet."""
    known = [(step, value) for step, value in _after_training(history) if not math.isnan(value)]
    return max(known, key=lambda entry: entry[1])[0] if known else None


def _after_training(history: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    return [entry for entry in history if entry[0] > 0]
