"""A job through Ray: the workers' trainer, and a driver that watches it for whoever waits.

The driver holds the run's lease, shows a bar, passes on requests to stop, writes the history, and
decides when starting the workers again is of no more use. Ray Train starts them again, with as many
as there are where `resources.workers` is a range.
"""

import atexit
import logging
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.config import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from rich.console import Console

from cluster.board import Board, Message, Taken
from cluster.events import RayEvents
from cluster.jobs.packaging import shipped_code, shipped_environment
from cluster.stages import Recipe
from cluster.storage import forget_ray_record, ray_storage
from cluster.watchdog import BEFORE_FIRST
from cluster.witness import Witness
from cluster.worker import device_of, run_on_ray
from cluster.writing import Writing, writing
from training.checkpoint import FOLDER
from training.lease import LeaseLost
from training.progress import Bar, PlainLines, open_display
from training.recipe import recipe_yaml
from training.resources import Resources
from training.run_folder import RunFolder, open_run_folder
from training.stopping import stop_on_signals
from training.storage_settings import apply_storage_options

logger = logging.getLogger(__name__)

POLL_S = 0.3
"""Seconds between two looks at the board."""

BOARD_TIMEOUT_S = 10
"""Seconds to wait for the board's answer."""

SUBMITTED = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Set by Ray's Jobs API in the process of a job that was submitted to it."""


class JobFailed(RuntimeError):  # noqa: N818
    """The workers failed more often than resources.max_restarts; the message holds their error."""


def run_with_ray(recipe: Recipe, address: str | None, console: Console) -> None:
    """Runs the recipe on a Ray cluster, a fresh local one where `address` is None, to its end.

    The first signal asks the workers for a checkpoint and an end, as `querypatch stop` does; a
    second one ends this process. Raises JobFailed; LeaseHeld: another job writes to the run;
    LeaseLost; or ValueError where this machine lacks the device that is asked for.
    """
    if address is None:
        device_of(recipe.resources)
    apply_storage_options(recipe.storage)
    folder = open_run_folder(recipe.run)
    try:
        with writing(recipe, folder, console) as work:
            forget_ray_record(folder)
            with _connected(recipe.resources, address):
                board = _pinned_here(Board)
                trainer = _trainer(recipe, folder, board, work.lease.token)
                # Not earlier: Ray puts its own handler of SIGTERM in the place of any other.
                with stop_on_signals(work.flag):
                    _watch(_Fit(trainer), board, work, recipe.resources, console)
    except (JobFailed, LeaseLost):
        # Ray's printer of the workers' lines may have been stopped in the middle of one (seen).
        console.print()
        raise


class _Fit(threading.Thread):
    """The trainer at work in a thread of its own, so that signals reach the main one."""

    def __init__(self, trainer: TorchTrainer) -> None:
        super().__init__(name="ray train", daemon=True)
        self._trainer = trainer
        self.error: BaseException | None = None
        self.is_finished = False
        self.start()

    def run(self) -> None:
        try:
            self._trainer.fit()
        except (ray.train.TrainingFailedError, RayError) as error:
            self.error = error
        else:
            self.is_finished = True


def _trainer(recipe: Recipe, folder: RunFolder, board: Any, token: str) -> TorchTrainer:
    resources = recipe.resources
    use_gpu = _uses_gpus(resources)
    path, filesystem = ray_storage(folder)
    fewest, most = resources.min_workers, resources.max_workers
    return TorchTrainer(
        run_on_ray,
        train_loop_config={"recipe": recipe_yaml(recipe), "board": board, "lease": token},
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=(fewest, most) if resources.is_elastic else most,
            elastic_resize_monitor_interval_s=resources.resize_every_s,
            use_gpu=use_gpu,
            resources_per_worker={
                "CPU": resources.cpus_per_worker,
                **({"GPU": 1} if use_gpu else {}),
            },
        ),
        run_config=RunConfig(
            name=FOLDER,
            storage_path=path,
            storage_filesystem=filesystem,
            # Failures are counted by the driver, which knows which of them came to nothing.
            failure_config=FailureConfig(
                max_failures=-1, preemption_grace_s=resources.preemption_grace_s
            ),
            logging_config=LoggingConfig(log_level="WARNING"),
            callbacks=[RayEvents(board)],  # type: ignore[list-item]  # any callback, says Ray
        ),  # type: ignore[arg-type]  # Ray's stubs show the first version's RunConfig
    )


def _uses_gpus(resources: Resources) -> bool:
    """Whether the workers take GPUs: as asked, or where the cluster has enough of them."""
    if resources.device != "auto":
        return resources.device == "cuda"
    found: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return found.get("GPU", 0) >= resources.min_workers


def _pinned_here(actor: type) -> Any:
    """An actor on the driver's own machine: it lives as long as the driver does."""
    here = ray.get_runtime_context().get_node_id()
    pinned = NodeAffinitySchedulingStrategy(here, soft=False)
    options = {"num_cpus": 0, "max_restarts": 3, "scheduling_strategy": pinned}
    return ray.remote(**options)(actor).remote()  # type: ignore[call-overload]


def _watch(fit: _Fit, board: Any, work: Writing, resources: Resources, console: Console) -> None:
    """Shows the board until the workers are done, and passes a stop request on."""
    with ExitStack() as stack:
        show = _Screen(console, stack)
        witness = Witness(work.history, resources.max_restarts, show.say)
        while fit.is_alive():
            fit.join(POLL_S)
            work.check_lease()
            taken = _take(board, stop=work.flag())
            if work.flag():
                show.say_stopping()
            if taken is None:
                continue
            reason = witness.see(taken)
            show.message(taken.message)
            if taken.failure or reason:
                raise JobFailed(taken.failure or reason)
        last = _take(board)
        if last is not None:
            witness.see(last)
            show.message(last.message)
    if fit.error is not None:
        raise JobFailed(_reason(fit.error)) from fit.error
    if not fit.is_finished:
        raise JobFailed("Ray Train ended in an unforeseen way; its traceback stands above")


class _Screen:
    """The bar or the lines of the person who waits, from the first message on."""

    def __init__(self, console: Console, stack: ExitStack) -> None:
        self._console = console
        self._stack = stack
        self._display: Bar | PlainLines | None = None
        self._said_stopping = False

    def say_stopping(self) -> None:
        if not self._said_stopping:
            self._said_stopping = True
            self.say("stopping: the workers write a checkpoint first")

    def say(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def message(self, message: Message | None) -> None:
        if message is None:
            return
        if self._display is None:
            self._display = open_display(self._console, message.start_step, message.total_steps)
            self._stack.enter_context(self._display)
        if message.record is not None:
            self._display.show(message.record)
        for note in message.notes:
            self._display.note(note)
        self._display.advance(message.step)


def _take(board: Any, stop: bool = False) -> Taken | None:
    """What is on the board; None while it is away."""
    try:
        taken: Taken = ray.get(board.take.remote(stop), timeout=BOARD_TIMEOUT_S)
    except (RayActorError, GetTimeoutError) as error:
        logger.warning("the progress board does not answer, the run goes on: %s", error)
        return None
    return taken


def _reason(error: BaseException) -> str:
    """The last line of the first worker's traceback, which is our own message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


@contextmanager
def _connected(resources: Resources, address: str | None) -> Iterator[None]:
    """A connection to the cluster at `address`, or to a fresh one on this machine.

    After any error it goes with the process, a second signal included: Ray Train may still wait in
    its thread, and Ray that is shut down under it ends the process at once, before anybody has said
    why, or keeps it for a minute (both seen).
    """
    options: dict[str, Any] = {"log_to_driver": True, "logging_level": logging.WARNING}
    with _ray_settings(resources):
        if address is None:
            # A worker that is asked for gets its share of the machine, however small that is.
            cores = max(os.cpu_count() or 1, resources.max_workers * resources.cpus_per_worker)
            ray.init(address="local", num_cpus=cores, include_dashboard=True, **options)
        else:
            ray.init(address=address, runtime_env=_code(), **options)
        atexit.register(_end_at_once)
        yield
        atexit.unregister(_end_at_once)
        ray.shutdown()


def _end_at_once() -> None:
    """Ends this process, with status 1, before Ray's own exit handler can crash it (seen).

    A local Ray ends with its driver either way.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


@contextmanager
def _ray_settings(resources: Resources) -> Iterator[None]:
    """Ray's own settings for the block, where the user has not set them."""
    hang_s = 600.0 if resources.hang_minutes is None else 60 * resources.hang_minutes
    settings = {
        # No telemetry, no doubled lines.
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
        "RAY_DEDUP_LOGS": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        # A lost worker is noticed after a second and not after two, a notice after 2 and not 5.
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1",
        "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "2",
        # Of a process that answers nothing at all; the watchdog on its steps is quicker.
        "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": f"{min(600.0, BEFORE_FIRST * hang_s):.0f}",
        # Only the wait for machines that are there already counts, not the workers' own start. With
        # a range, Ray waits that long for a machine that is gone before it does with fewer.
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "10" if resources.is_elastic else "60",
    }
    ours = {name: value for name, value in settings.items() if name not in os.environ}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name in ours:
            os.environ.pop(name, None)


def _code() -> dict[str, Any]:
    """Our code for the workers; a job that was submitted has brought it with it already."""
    if SUBMITTED in os.environ:
        return {}
    return {"working_dir": str(shipped_code()), "env_vars": shipped_environment()}
