"""Trial steps: does one fit into memory, how long does it take, and who waits for whom?

The run's own loop computes them, in this process, with no more than the run's folder left out.
Pictures a second are measured three ways: of the loader alone, of steps on a batch that is there
already, and of both together, which is what the run will do.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from itertools import repeat

import torch

from cluster.preflight.batches import AnyBatch, repeated
from cluster.preflight.kit import Kit
from models.sampling_parts import sampling_parts
from training.ema import Ema
from training.job import Job, Plan, Surroundings, plan_steps
from training.loop import NonFiniteLoss, train
from training.optimiser import build_optimiser
from training.parallel import parallel_model
from training.schedule import schedule_in_steps
from training.snapshot import Position, TrainingState
from training.world import World

STEPS_S = 10.0
"""Seconds that steps on a batch that is there may take, beyond the first two."""
LOADER_S = 5.0
"""Seconds that the loader is listened to, beyond its first batches."""
TOGETHER_S = 10.0
"""Seconds that both are watched together, beyond the first updates."""
_WARM = 2
"""First steps that are not counted: kernels are chosen, memory is found."""
_MOST = 40
"""Steps after which a measurement is good enough."""
_FEW = 2
"""Pictures of the first, careful step."""


@dataclass(frozen=True)
class Pace:
    """How fast one worker is."""

    pictures: int
    """Of this worker in one update."""
    step_s: float
    """Seconds of an update whose pictures are there."""
    wait_s: float
    """Seconds that an update waits for its pictures."""
    loader_pictures_per_s: float
    """Of the loader alone, with nobody computing beside it."""
    first_batch_s: float
    """Seconds until the first batch."""
    measured_with: int
    """Pictures of the batch that steps were timed with; fewer than a worker's where it is slow."""

    @property
    def update_s(self) -> float:
        """Seconds from one update to the next."""
        return self.step_s + self.wait_s

    @property
    def pictures_per_s(self) -> float:
        """Of this worker."""
        return self.pictures / self.update_s

    @property
    def wait_share(self) -> float:
        """Share of the time in which the worker waits for pictures."""
        return self.wait_s / self.update_s


class Bench:
    """A model and its optimiser on their device, and the run's loop to try them with."""

    def __init__(self, kit: Kit, device: torch.device) -> None:
        recipe = kit.recipe
        self.kit = kit
        self.device = device
        self._world = World.alone(device)
        # Compiling takes minutes: steps are tried as they are without.
        self._model = parallel_model(kit.model, self._world, compiled=False)
        self.state = TrainingState(
            model=kit.model,
            optimiser=build_optimiser(
                kit.model, kit.backbone, recipe.optimiser, sampling_parts(kit.model)
            ),
            ema=Ema(kit.model, recipe.ema) if recipe.ema else None,
        )

    def steps(
        self,
        batches: Iterator[AnyBatch],
        most: int,
        until: Callable[[], bool] = lambda: False,
        per_pass: int | None = None,
    ) -> None:
        """The run's first updates, `most` of them, or fewer once `until` says so.

        `per_pass` pictures are computed at once; None takes what the recipe says.

        Raises NonFiniteLoss where one is not finite, torch.OutOfMemoryError where it does not fit.
        """
        recipe = self.kit.recipe
        whole = plan_steps(recipe.loop, self.kit.batches_per_epoch)
        silent = {"log_every": most + 1, "max_bad_steps": 1, "checkpoint_every_steps": None}
        job = Job(
            state=self.state,
            model=self._model,
            objective=self.kit.objective,
            batches=batches,
            plan=Plan(most, whole.batches_per_epoch, whole.accumulate),
            schedule=schedule_in_steps(recipe.schedule, whole.total_steps, whole.steps_per_epoch),
            settings=recipe.loop.model_copy(update=silent),
            clip_norm=recipe.optimiser.clip_norm,
            seed=recipe.seed,
            world=self._world,
            max_pictures_per_pass=per_pass or recipe.pictures_per_pass,
        )
        around = Surroundings(checkpoints=_Nowhere(), clock=time.monotonic, stop=until)
        try:
            train(job, around, Position())
        except NonFiniteLoss as error:
            what = str(error).partition("; the last checkpoint")[0]
            raise NonFiniteLoss(
                f"{what}: look whether init= or model.backbone.weights hold numbers that are not "
                "finite, or say loop.precision=float32 or a lower optimiser.lr"
            ) from error
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def measured_pace(bench: Bench) -> Pace:
    """How fast a worker with the run's pictures is; takes half a minute at most, or two updates.

    Where one update would take longer than that, steps are timed with fewer pictures. Raises
    NonFiniteLoss, StreamError and the other errors of steps and stream.
    """
    recipe = bench.kit.recipe
    share = pictures_of_worker(recipe.global_batch, recipe.resources.max_workers)
    count, step_s = _step_alone(bench, share)
    with closing(bench.kit.stream()) as stream:
        first_batch_s, loader_s = _loader_alone(bench, stream)
        loader = share / loader_s
        if count < share:
            step_s *= share / count
            has_processes = recipe.data.stream.processes > 0
            update_loader_s = loader_s * recipe.loop.accumulate
            wait_s = max(0.0, update_loader_s - step_s) if has_processes else update_loader_s
        else:
            watch = _Watch(stream)
            bench.steps(watch, _WARM + _MOST, watch.seen_enough(recipe.loop.accumulate))
            step_s, wait_s = watch.of_an_update(recipe.loop.accumulate)
    return Pace(
        pictures=share * recipe.loop.accumulate,
        step_s=step_s,
        wait_s=wait_s,
        loader_pictures_per_s=loader,
        first_batch_s=first_batch_s,
        measured_with=count,
    )


def pictures_of_worker(global_batch: int, workers: int) -> int:
    """Pictures of a batch that the fullest of the workers has."""
    return -(-global_batch // workers)


def _step_alone(bench: Bench, share: int) -> tuple[int, float]:
    """Pictures that a step was timed with, and seconds of an update with them."""
    few = min(_FEW, share)
    batch = bench.kit.batch(share)
    count, seconds = few, _seconds_of_step(bench, repeated(batch, few))
    if few < share and seconds * share / few <= STEPS_S:
        count, seconds = share, _seconds_of_step(bench, repeated(batch, share))
    return count, seconds


def _seconds_of_step(bench: Bench, batch: AnyBatch) -> float:
    watch = _Watch(repeat(batch))
    bench.steps(watch, _WARM + 1)
    return watch.of_an_update(bench.kit.recipe.loop.accumulate)[0]


def _loader_alone(bench: Bench, stream: Iterator[AnyBatch]) -> tuple[float, float]:
    """Seconds to the first batch, and between two later ones."""
    settings = bench.kit.recipe.data.stream
    began = time.monotonic()
    next(stream)
    arrivals = [time.monotonic()]
    # What was made ahead while nobody asked would count as if it took no time.
    ahead = settings.processes * settings.parts_ahead
    while len(arrivals) < ahead + 2 or arrivals[-1] - arrivals[ahead] < LOADER_S:
        next(stream)
        arrivals.append(time.monotonic())
        if len(arrivals) >= ahead + _MOST or arrivals[-1] - arrivals[0] > 2 * LOADER_S:
            break
    first = min(ahead, len(arrivals) - 2)
    between = (arrivals[-1] - arrivals[first]) / (len(arrivals) - 1 - first)
    return arrivals[0] - began, between


class _Nowhere:
    """Checkpoints of a trial are not kept."""

    def save(self, state: TrainingState, position: Position, metrics: Mapping[str, float]) -> None:
        """Keeps nothing."""

    def flush(self) -> None:
        """There is nothing to wait for."""


@dataclass
class _Watch:
    """Lets batches through, and notes how long each was waited for and computed."""

    batches: Iterator[AnyBatch]
    waits: list[float] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)
    _given: float | None = None

    def __iter__(self) -> "_Watch":
        return self

    def __next__(self) -> AnyBatch:
        asked = time.monotonic()
        if self._given is not None:
            self.steps.append(asked - self._given)
        batch = next(self.batches)
        self._given = time.monotonic()
        self.waits.append(self._given - asked)
        return batch

    def seen_enough(self, accumulate: int) -> Callable[[], bool]:
        """True once time is up and one update was watched to its end, the first one if need be."""
        deadline = time.monotonic() + TOGETHER_S
        return lambda: time.monotonic() > deadline and len(self.steps) >= accumulate

    def of_an_update(self, accumulate: int) -> tuple[float, float]:
        """Mean seconds of computing and of waiting, of the updates that were not the first."""
        whole = len(self.steps) // accumulate
        first = min(_WARM, whole - 1) * accumulate
        updates = whole - first // accumulate
        steps, waits = self.steps[first:], self.waits[first : len(self.steps)]
        return sum(steps) / updates, sum(waits) / updates
