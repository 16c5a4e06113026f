"""A job through Ray whose workers meet faults: `python -m cluster.chaos.ray_job PLAN`.

PLAN is the JSON of a `Plan`. The job is `cluster.launch.run_with_ray`; its workers note what they
see, each start of them in a folder of its own. Faults are for the first start of the workers alone:
what Ray starts again shall go on.
"""

import json
import logging
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ray.train
import torch
from rich.console import Console

import cluster.launch
import cluster.worker
from cluster.chaos.group import meets
from cluster.chaos.saboteur import Assignment, Saboteur
from cluster.chaos.schedule import Attempt, Fault, Kill, Terminate, draw_ray_schedule
from cluster.stages import parsed_recipe
from cluster.storage import RayCheckpoints
from cluster.worker import LOG_FORMAT, run_on_ray
from training.checkpoint_writer import CheckpointWriter
from training.job import Checkpoints
from training.world import World, broadcast_object

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Plan:
    """What a job is told; its faults are those of an attempt of a schedule."""

    recipe: str
    """YAML."""
    folder: str
    """For the notes of the workers."""
    seed: int
    number: int
    attempt: int
    """Of the schedule, 0 first."""
    poisoned_step: int

    @property
    def faults(self) -> tuple[Fault, ...]:
        """Of this attempt; none after the last."""
        attempts: tuple[Attempt, ...] = draw_ray_schedule(self.seed, self.number).attempts
        return attempts[self.attempt].faults if self.attempt < len(attempts) else ()


class JobSaboteur(Saboteur):
    """Leaves to the watcher of the job what is done to the job as a whole."""

    def meet(self, fault: Fault, update: int) -> None:
        """As the worker's own, where the fault is a worker's."""
        match fault:
            case Kill(_, at, True) | Terminate(at, _):
                if update == at:
                    self.fire(fault)
            case _:
                super().meet(fault, update)


def work_on_ray(plan: Plan, config: Mapping[str, Any]) -> None:
    """What Ray runs on every worker."""
    context = ray.train.get_context()
    rank, size = context.get_world_rank(), context.get_world_size()
    starts = Path(plan.folder)
    here = World(rank, size, _CPU)
    is_first_start = broadcast_object(not any(starts.iterdir()), here)
    start = starts / broadcast_object(f"start-{time.time_ns()}", here)
    start.mkdir(exist_ok=True)
    faults = tuple(fault for fault in plan.faults if meets(fault, rank)) if is_first_start else ()
    told = Assignment(
        recipe=plan.recipe, rank=rank, world=size, rendezvous="", log="", temporary="",
        notes=str(start / f"rank-{rank}.jsonl"), faults=faults, key=plan.number,
        poisoned_step=plan.poisoned_step,
    )  # fmt: skip
    saboteur = JobSaboteur(told)
    saboteur.begin()

    def noting(writer: CheckpointWriter, world: World) -> Checkpoints:
        return saboteur.noting(RayCheckpoints(writer, world), world)

    workers: Any = cluster.worker
    workers.RayCheckpoints = noting
    run_on_ray(config)


def main() -> None:
    """Runs the job of the plan."""
    logging.basicConfig(level=logging.INFO, format=LOG_FORMAT)
    plan = Plan(**json.loads(Path(sys.argv[1]).read_text()))
    launched: Any = cluster.launch
    launched.run_on_ray = partial(work_on_ray, plan)
    cluster.launch.run_with_ray(parsed_recipe(plan.recipe), None, Console(file=sys.stderr))


if __name__ == "__main__":
    main()
