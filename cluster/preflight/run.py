"""`querypatch preflight`: everything that can be known before money is spent, in a minute or two.

What reads and writes is tried as the run will do it; what computes is tried with the run's own loop
on a worker's own device. Nothing is left behind.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from cluster.doctor import findings
from cluster.kernels import check_kernels
from cluster.preflight.checks import Check, Hear, Look, first_fault, looked_at
from cluster.preflight.data import DataLook, Depth
from cluster.preflight.forecast import Forecast, forecast, forecast_checks, pace_checks
from cluster.preflight.kit import open_kit
from cluster.preflight.memory import Seat, free_memory, memory_checks
from cluster.preflight.nodes import NodeFacts, machine_checks
from cluster.preflight.room import cache_checks, checkpoint_checks, shared_memory_checks
from cluster.preflight.store import NAME as RUN_FOLDER
from cluster.preflight.store import store_checks
from cluster.preflight.trial import Bench, Pace, measured_pace
from cluster.stages import Recipe, found_recipe, parsed_recipe
from cluster.worker import device_of
from finetune.task import TaskSets
from models.interop.backbones import RANDOM_WEIGHTS
from models.ops.deformable import set_allow_reference
from training.recipe import override, parse_recipe
from training.storage_settings import apply_storage_options


@dataclass(frozen=True)
class Wishes:
    """What is asked of a look before a job."""

    depth: Depth = "trial"
    price: float | None = None
    """Of one worker for one hour, in any currency."""


@dataclass(frozen=True)
class Report:
    """What was found."""

    checks: tuple[Check, ...]
    forecast: Forecast | None = None
    """None where no step could be tried."""

    @property
    def is_ready(self) -> bool:
        """Whether nothing must be mended before the job starts."""
        return first_fault(self.checks) is None


def asked_recipe(name: str, overrides: Sequence[str]) -> Recipe:
    """The recipe that `recipe show` would show; RecipeError with one line per mistake."""
    stage, source = found_recipe(name)
    return parsed_recipe(override(parse_recipe(source), overrides), (), stage)


def preflight_here(recipe: Recipe, wishes: Wishes, hear: Hear) -> Report:
    """Looks from this machine, which will do the work itself."""
    apply_storage_options(recipe.storage)
    store = looked_at(RUN_FOLDER, lambda: store_checks(recipe.run), hear)
    data = DataLook(recipe, wishes.depth, hear)
    data.look()
    machine = looked_at("machine", lambda: _this_machine(recipe), hear)
    seat = Seat(torch.device("cpu"), recipe.resources.max_workers, free_memory())
    trial = WorkerLook(recipe, wishes, seat, hear)
    trial.look(data.sets, (*store, *data.checks))
    return Report((*store, *data.checks, *machine, *trial.checks), trial.forecast)


class WorkerLook(Look):
    """What a worker finds on its own machine: kernels, weights, a trial step, a checkpoint."""

    def __init__(self, recipe: Recipe, wishes: Wishes, seat: Seat, hear: Hear) -> None:
        super().__init__(hear)
        self.forecast: Forecast | None = None
        self._recipe = recipe
        self._wishes = wishes
        self._seat = seat
        self._bench: Bench | None = None
        self._pace: Pace | None = None

    def look(self, sets: TaskSets | None = None, before: Sequence[Check] = ()) -> None:
        """Makes all checks; those that need what failed `before` are left unchecked."""
        store = [check for check in before if check.name.startswith(RUN_FOLDER)]
        data = [check for check in before if check.name.startswith("data")]
        kernels = self._add("kernels", self._kernels)
        cache = self._add("cache", lambda: cache_checks(self._recipe))
        if self._wishes.depth == "quick":
            return
        threads = torch.get_num_threads()
        torch.set_num_threads(self._recipe.resources.cpus_per_worker)
        try:
            weights = self._add("weights", lambda: self._weights(sets), (*data, *kernels))
            if self._bench is not None:
                self._try_out(self._bench, store, (*cache, *weights))
        finally:
            torch.set_num_threads(threads)

    @property
    def _device(self) -> torch.device:
        return device_of(self._recipe.resources)

    def _kernels(self) -> Iterator[Check]:
        set_allow_reference(self._recipe.ops.allow_reference)
        device = self._device
        check_kernels(self._recipe, device)
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"
        yield Check("kernels", "well", f"a worker computes on {name}")

    def _weights(self, sets: TaskSets | None) -> Iterator[Check]:
        kit = open_kit(self._recipe, self._device, sets)
        self._bench = Bench(kit, self._device)
        is_random = self._recipe.model.backbone.weights == RANDOM_WEIGHTS
        if is_random and self._recipe.init is None:
            said = "the backbone is random: its features mean nothing; give model.backbone.weights"
            yield Check("weights", "warning", said)
        else:
            yield Check("weights", "well", kit.weights)

    def _try_out(self, bench: Bench, store: Sequence[Check], before: Sequence[Check]) -> None:
        recipe, seat = bench.kit.recipe, self._seat
        here = Seat(bench.device, seat.workers, seat.free_bytes)
        shared = self._add("shared memory", lambda: shared_memory_checks(bench, here))
        memory = self._add("memory", lambda: memory_checks(bench, here), before)
        self._add("speed", lambda: self._speed(bench), (*shared, *memory))
        self._add(
            "checkpoint", lambda: checkpoint_checks(recipe, bench.state, self._pace),
            (*store, *memory),
        )  # fmt: skip
        if self._pace is not None:
            found = forecast(
                recipe, self._pace, bench.kit.batches_per_epoch, here, cores(), self._wishes.price
            )
            self.forecast = found
            self._add("forecast", lambda: forecast_checks(found))

    def _speed(self, bench: Bench) -> Iterator[Check]:
        self._pace = measured_pace(bench)
        yield from pace_checks(bench.kit.recipe, self._pace)


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _this_machine(recipe: Recipe) -> Iterator[Check]:
    here = NodeFacts("this machine", findings(), cores(), torch.cuda.device_count())
    yield from machine_checks(recipe, here)
