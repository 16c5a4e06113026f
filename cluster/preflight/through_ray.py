"""Preflight on a Ray cluster: every machine says what it has, one worker tries the work.

What is the store's and the data's to say is asked from here, where the driver will be.
"""

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import fsspec
import ray
import torch
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.doctor import findings
from cluster.jobs.packaging import shipped_code
from cluster.launch import SUBMITTED
from cluster.preflight.checks import KNOWN, Check, Hear, first_fault, looked_at, one_line
from cluster.preflight.data import DataLook
from cluster.preflight.memory import Seat, free_memory
from cluster.preflight.nodes import NodeFacts, node_checks, takes_gpus, workers_fitting
from cluster.preflight.run import Report, Wishes, WorkerLook
from cluster.preflight.store import NAME as RUN_FOLDER
from cluster.preflight.store import QUICK, probe_name, remove_probe, store_checks
from cluster.stages import Recipe, parsed_recipe
from data.storage import transient_errors
from finetune.recipe import SAME, FinetuneRecipe
from models.interop.backbones import RANDOM_WEIGHTS
from models.urls import public_url
from training.recipe import recipe_yaml
from training.run_folder import open_run_folder
from training.storage_settings import apply_storage_options

NODE_ANSWERS_S = 180.0
"""Seconds for a machine to take over our code, to import it and to answer."""
WORKER_ANSWERS_S = 900.0
"""Seconds for a worker to make all its trials; it may have weights to download."""

_SETTINGS = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
"""No telemetry; a task that asks for no GPU sees them all the same."""


def preflight_on(address: str, recipe: Recipe, wishes: Wishes, hear: Hear) -> Report:
    """Looks from here and from the machines of the cluster at `address`.

    Raises ConnectionError where there is none.
    """
    apply_storage_options(recipe.storage)
    store = looked_at(RUN_FOLDER, lambda: store_checks(recipe.run), hear)
    data = DataLook(recipe, wishes.depth, hear)
    data.look()
    before = (*store, *data.checks)
    nodes, reports = list[NodeFacts](), list[Report]()

    def machines() -> Iterator[Check]:
        with _marked(recipe, store) as places:
            nodes.extend(_asked_nodes(places))
        yield from node_checks(recipe, nodes)

    def trial() -> Iterator[Check]:
        reports.append(_tried(recipe, wishes, nodes, before))
        yield from reports[0].checks

    with _joined(address):
        found = looked_at("machines", machines, hear)
        tried = looked_at("trial", trial, hear, found)
    return Report((*before, *found, *tried), reports[0].forecast if reports else None)


def node_facts(name: str, cpus: float, gpus: float, places: Mapping[str, str]) -> NodeFacts:
    """What the machine that runs this has; `places` of the recipe by their keys."""
    missing = [told for key, url in places.items() if (told := _missing(key, url)) is not None]
    return NodeFacts(name, findings(), cpus, gpus, tuple(missing))


def tried_by_worker(
    recipe_text: str, wishes: Wishes, workers: int, before: Sequence[Check]
) -> Report:
    """The checks of a worker, on its own machine, which `workers` of them will share."""
    recipe = parsed_recipe(recipe_text)
    apply_storage_options(recipe.storage)
    seat = Seat(torch.device("cpu"), workers, free_memory())
    worker = WorkerLook(recipe, wishes, seat, _unheard)
    worker.look(None, before)
    return Report(tuple(worker.checks), worker.forecast)


def _asked_nodes(places: Mapping[str, str]) -> Sequence[NodeFacts]:
    """Every machine that may get workers, in its own words."""
    alive = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0)]  # type: ignore[no-untyped-call]
    if not alive:
        raise RuntimeError(
            "the cluster has no machine with a core for workers, so none can be asked; start one "
            "(an autoscaler does so with the first job), or give the head --num-cpus"
        )
    ask = ray.remote(num_cpus=0, max_retries=0)(node_facts)
    asked = []
    for node in alive:
        here = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        resources = node["Resources"]
        asked.append(
            ask.options(scheduling_strategy=here).remote(
                node["NodeManagerAddress"], resources["CPU"], resources.get("GPU", 0.0), places
            )
        )
    try:
        facts: list[NodeFacts] = ray.get(asked, timeout=NODE_ANSWERS_S)
    except GetTimeoutError as error:
        raise RuntimeError(
            f"not all of {len(alive)} machines answered within {NODE_ANSWERS_S:.0f} s; see `ray "
            "status` and the logs of those that are new"
        ) from error
    except RayError as error:
        raise RuntimeError(
            f"a machine could not run our code ({_last_line(error)}); its image needs querypatch's "
            "dependencies"
        ) from error
    return facts


def _tried(
    recipe: Recipe, wishes: Wishes, nodes: Sequence[NodeFacts], before: Sequence[Check]
) -> Report:
    resources = recipe.resources
    with_gpus = takes_gpus(resources, nodes)
    most_of_a_node = max(workers_fitting(resources, [node], with_gpus) for node in nodes)
    if not with_gpus and resources.device == "auto":
        cpu = resources.model_copy(update={"device": "cpu"})
        recipe = recipe.model_copy(update={"resources": cpu})
    task = ray.remote(
        num_cpus=resources.cpus_per_worker, num_gpus=1 if with_gpus else 0, max_retries=0
    )(tried_by_worker)
    seats = min(resources.max_workers, most_of_a_node)
    answer = task.remote(recipe_yaml(recipe), wishes, seats, tuple(before))
    try:
        report: Report = ray.get(answer, timeout=WORKER_ANSWERS_S)
    except GetTimeoutError as error:
        raise RuntimeError(
            f"no worker has made its trials within {WORKER_ANSWERS_S:.0f} s: is the cluster busy? "
            "See `ray status`"
        ) from error
    except RayError as error:
        raise RuntimeError(
            f"the worker that tried was lost ({_last_line(error)}); it may have taken more memory "
            "than there is: try resources.max_pictures_per_pass=1"
        ) from error
    return report


@contextmanager
def _joined(address: str) -> Iterator[None]:
    code = {} if SUBMITTED in os.environ else {"working_dir": str(shipped_code())}
    ray.init(
        address=address,
        runtime_env={**code, "env_vars": _SETTINGS},
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _marked(recipe: Recipe, store: Sequence[Check]) -> Iterator[dict[str, str]]:
    """Every place of the recipe that all machines must see, with a mark in the run's folder."""
    places = _places(recipe)
    if first_fault(store) is not None:
        yield places
        return
    folder = open_run_folder(recipe.run, patience=QUICK)
    name = probe_name()
    folder.write(f"{name}/mark", b"")
    try:
        yield {"run": f"{folder.url}/{name}/mark", **places}
    finally:
        remove_probe(folder, name)


def _places(recipe: Recipe) -> dict[str, str]:
    """What a worker reads, by key; of a set its name's file or folder."""
    read = {"init": recipe.init, "model.backbone.weights": recipe.model.backbone.weights}
    match recipe:
        case FinetuneRecipe():
            validation = recipe.data.validation
            read["data.train"] = recipe.data.train
            read["data.validation"] = None if validation == SAME else validation
        case _:
            read["data.shards"] = recipe.data.shards
            read["data.held_out"] = recipe.data.held_out
    return {
        key: url.partition("#")[0] for key, url in read.items() if url and url != RANDOM_WEIGHTS
    }


def _missing(key: str, url: str) -> str | None:
    """Why this machine does not see a place of the recipe."""
    shown = f"{key}={public_url(url)}"
    try:
        filesystem, path = fsspec.core.url_to_fs(url)
        filesystem.info(path)
    except FileNotFoundError:
        return shown
    except transient_errors(url) as error:
        return f"{shown} ({one_line(error)})"
    except KNOWN as error:
        return f"{shown} ({one_line(error)})"
    return None


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _unheard(check: Check) -> None:
    """What a worker finds is told by whoever asked it."""
