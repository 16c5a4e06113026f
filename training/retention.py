"""Which checkpoints stay: the last few, the best by a metric, and one every so many steps. Pure."""

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from models.settings import Settings
from training.manifest import Manifest


class RetentionSettings(Settings):
    """Which checkpoints stay in the run's folder."""

    keep_last: int = Field(default=2, ge=1)
    """Newest checkpoints that stay."""
    keep_every_steps: int | None = Field(default=None, ge=1)
    """Checkpoints at multiples of this many steps stay for good; null keeps none."""
    best_metric: str | None = None
    """Metric of the evaluation by which the best one stays, e.g. eval/ap; null keeps none."""
    best_is: Literal["max", "min"] = "max"
    """Whether the largest or the smallest value of best_metric is the best."""
    wait_for_store_minutes: float = Field(default=10, ge=0)
    """Minutes that the end of a run waits for a store that does not take the last checkpoint."""


def expired(checkpoints: Sequence[Manifest], settings: RetentionSettings) -> tuple[Manifest, ...]:
    """The checkpoints that no rule keeps, oldest first; never the newest."""
    ordered = sorted(checkpoints, key=lambda checkpoint: checkpoint.step)
    kept = {checkpoint.step for checkpoint in ordered[-settings.keep_last :]}
    best = best_of(ordered, settings)
    kept |= {best.step} if best else set()
    if settings.keep_every_steps is not None:
        kept |= {c.step for c in ordered if c.step % settings.keep_every_steps == 0}
    return tuple(checkpoint for checkpoint in ordered if checkpoint.step not in kept)


def best_of(checkpoints: Sequence[Manifest], settings: RetentionSettings) -> Manifest | None:
    """The best by the settings' metric, the first of equals; None where none was measured."""
    metric = settings.best_metric
    measured = [c for c in checkpoints if metric is not None and metric in c.metrics]
    if metric is None or not measured:
        return None
    sign = 1.0 if settings.best_is == "max" else -1.0
    return max(measured, key=lambda checkpoint: sign * checkpoint.metrics[metric])
