"""Who waits for whom, how long the run will take, and what it will cost."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from cluster.preflight.checks import Check, plural
from cluster.preflight.memory import Seat
from cluster.preflight.trial import Pace
from cluster.stages import Recipe
from training.job import plan_steps

MUCH_WAITING = 0.1
"""Share of the time for which a worker may wait for pictures without a word."""


@dataclass(frozen=True)
class Forecast:
    """What a run will take if nothing goes wrong."""

    workers: int
    pictures_per_s: float
    """Of all workers."""
    updates: int
    seconds: float
    """Of training; evaluations, starts and the exchange of gradients come on top."""
    price_per_worker_hour: float | None

    @property
    def cost(self) -> float | None:
        """In the currency of the price."""
        if self.price_per_worker_hour is None:
            return None
        return self.workers * self.seconds / 3600 * self.price_per_worker_hour


def forecast(
    recipe: Recipe, pace: Pace, batches_per_epoch: int, seat: Seat, cores: int, price: float | None
) -> Forecast:
    """From what one worker did to what all will do.

    Workers of one machine that ask for more cores than it has share them.
    """
    workers = recipe.resources.max_workers
    wanted = seat.workers * recipe.resources.cpus_per_worker
    rate = workers * pace.pictures_per_s * min(1.0, cores / wanted)
    plan = plan_steps(recipe.loop, batches_per_epoch)
    pictures = plan.total_steps * plan.accumulate * recipe.global_batch
    return Forecast(workers, rate, plan.total_steps, pictures / rate, price)


def pace_checks(recipe: Recipe, pace: Pace) -> Iterator[Check]:
    """Whether the loader keeps up with the steps."""
    facts = {
        "pictures_per_s": pace.pictures_per_s,
        "loader_pictures_per_s": pace.loader_pictures_per_s,
        "step_s": pace.step_s,
        "wait_share": pace.wait_share,
        "first_batch_s": pace.first_batch_s,
    }
    alone = pace.pictures / pace.step_s
    said = (
        f"one worker computes {alone:.1f} pictures/s, its loader makes "
        f"{pace.loader_pictures_per_s:.1f}"
    )
    if pace.measured_with < pace.pictures:
        said += f" (steps timed with {pace.measured_with} of {pace.pictures} pictures)"
    if pace.wait_share <= MUCH_WAITING:
        waits = (
            "the loader waits for the steps" if recipe.data.stream.processes else "little waiting"
        )
        yield Check("speed", "well", f"{said}: {waits}", facts)
        return
    yield Check(
        "speed",
        "warning",
        f"{said}: the worker waits for pictures {100 * pace.wait_share:.0f} % of the time; "
        f"{_faster_loader(recipe, pace)}",
        facts,
    )


def forecast_checks(found: Forecast) -> Iterator[Check]:
    """The line that one decides by."""
    facts = {
        "workers": found.workers,
        "pictures_per_s": found.pictures_per_s,
        "updates": found.updates,
        "seconds": found.seconds,
        "cost": found.cost,
    }
    said = (
        f"{plural(found.updates, 'update')} with {plural(found.workers, 'worker')} at "
        f"{found.pictures_per_s:.1f} pictures/s: {duration(found.seconds)}"
    )
    if found.cost is not None:
        said += f", {found.cost:.2f} at {found.price_per_worker_hour:g} for a worker's hour"
    more = "exchange of gradients and " if found.workers > 1 else ""
    yield Check("forecast", "well", f"{said}; {more}evaluations come on top", facts)


def duration(seconds: float) -> str:
    """E.g. 45 s, 12 min, 3 h 20 min, 2 d 4 h."""
    minutes = math.ceil(seconds / 60)
    if seconds < 90:
        return f"{seconds:.1f} s" if seconds < 3 else f"{seconds:.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes // 1440} d {minutes % 1440 // 60} h"


def _faster_loader(recipe: Recipe, pace: Pace) -> str:
    """The way out where pictures come too slowly."""
    processes = recipe.data.stream.processes
    if processes == 0:
        return (
            "make them in processes beside it: data.stream.processes=2, with "
            "resources.cpus_per_worker=3"
        )
    times = pace.pictures / pace.step_s / pace.loader_pictures_per_s
    wanted = max(processes + 1, math.ceil(processes * times))
    return (
        f"say data.stream.processes={wanted} where the machines have as many cores "
        f"(resources.cpus_per_worker={wanted + 1}), else data.colour_on=device in pretraining, or "
        "smaller pictures"
    )
