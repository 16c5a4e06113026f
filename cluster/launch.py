"""A job: checks first, then the workers, with a bar for the person who waits."""

import logging
import os
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from rich.console import Console

from cluster.board import Board, Message
from cluster.stages import Recipe
from cluster.storage import forget_ray_record, ray_storage
from cluster.worker import device_of, run_on_ray
from training.checkpoint import FOLDER
from training.progress import Bar, PlainLines, open_display
from training.recipe import recipe_yaml
from training.resources import Resources
from training.run_folder import RunFolder, open_run_folder
from training.stopping import StopFlag, stop_on_signals

logger = logging.getLogger(__name__)

POLL_S = 0.3
"""Seconds between two looks at the board."""

SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "60",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
"""Of Ray, where the user has not set them: no telemetry, no doubled lines, a lost worker is noticed
after a second and not after two."""


NOT_SHIPPED = (".git", ".venv", ".ci", "runs", "demo", "shards", "build", "dist", "*.tar")
"""What is never sent to a cluster with the checkout."""


class JobFailed(RuntimeError):  # noqa: N818
    """The workers failed more often than resources.max_restarts; the message holds their error."""


def run_with_ray(recipe: Recipe, address: str | None, console: Console) -> None:
    """Runs the recipe on a Ray cluster, a fresh local one where `address` is None, to its end.

    The first signal asks the workers for a checkpoint and an end; a second one ends this process.
    Raises JobFailed, or ValueError where this machine lacks the device that is asked for.
    """
    if address is None:
        device_of(recipe.resources)
    folder = open_run_folder(recipe.run)
    forget_ray_record(folder)
    flag = StopFlag()
    try:
        with _connected(recipe.resources, address):
            board = ray.remote(num_cpus=0, max_restarts=3)(Board).remote()
            trainer = _trainer(recipe, folder, board)
            with stop_on_signals(flag):
                _watch(_Fit(trainer), board, flag, console)
    except JobFailed:
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


def _trainer(recipe: Recipe, folder: RunFolder, board: Any) -> TorchTrainer:
    resources = recipe.resources
    use_gpu = _uses_gpus(resources)
    path, filesystem = ray_storage(folder)
    return TorchTrainer(
        run_on_ray,
        train_loop_config={"recipe": recipe_yaml(recipe), "board": board},
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=resources.max_workers,
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
            failure_config=FailureConfig(max_failures=resources.max_restarts),
            logging_config=LoggingConfig(log_level="WARNING"),
        ),  # type: ignore[call-arg]  # Ray's stubs show the first version's RunConfig
    )


def _uses_gpus(resources: Resources) -> bool:
    """Whether the workers take GPUs: as asked, or where the cluster has enough of them."""
    if resources.device != "auto":
        return resources.device == "cuda"
    found: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return found.get("GPU", 0) >= resources.max_workers


def _watch(fit: _Fit, board: Any, flag: StopFlag, console: Console) -> None:
    """Shows the board until the workers are done, and passes a stop request on."""
    asked = False
    with ExitStack() as stack:
        display: Bar | PlainLines | None = None
        while fit.is_alive():
            fit.join(POLL_S)
            if flag() and not asked:
                asked = True
                board.request_stop.remote()
                console.print("stopping: the workers write a checkpoint first", highlight=False)
            failure = _asked(board.failure)
            if failure is not None:
                raise JobFailed(failure)
            message = _asked(board.take)
            if message is None:
                continue
            if display is None:
                display = open_display(console, message.start_step, message.total_steps)
                stack.enter_context(display)
            _show(display, message)
        last = _asked(board.take)
        if display is not None and last is not None:
            _show(display, last)
    if fit.error is not None:
        raise JobFailed(_reason(fit.error)) from fit.error
    if not fit.is_finished:
        raise JobFailed("Ray Train ended in an unforeseen way; its traceback stands above")


def _asked(method: Any) -> Any:
    """The board's answer; None while it is away."""
    try:
        return ray.get(method.remote(), timeout=10)
    except (RayActorError, GetTimeoutError) as error:
        logger.warning("the progress board does not answer, the run goes on: %s", error)
        return None


def _show(display: Bar | PlainLines, message: Message) -> None:
    if message.record is not None:
        display.show(message.record)
    for note in message.notes:
        display.note(note)
    display.advance(message.step)


def _reason(error: BaseException) -> str:
    """The last line of the first worker's traceback, which is our own message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


@contextmanager
def _connected(resources: Resources, address: str | None) -> Iterator[None]:
    """A connection to the cluster at `address`, or to a fresh one on this machine.

    After JobFailed it goes with the process: Ray Train may still wait in its thread, and Ray that
    is shut down under it ends the process at once, before anybody has said why (seen).
    """
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    options: dict[str, Any] = {"log_to_driver": True, "logging_level": logging.WARNING}
    if address is None:
        # A worker that is asked for gets its share of the machine, however small that is.
        cores = max(os.cpu_count() or 1, resources.max_workers * resources.cpus_per_worker)
        ray.init(address="local", num_cpus=cores, include_dashboard=True, **options)
    else:
        ray.init(address=address, runtime_env=_shipped_code(), **options)
    failed = False
    try:
        yield
    except JobFailed:
        failed = True
        raise
    finally:
        if not failed:
            ray.shutdown()


def _shipped_code() -> dict[str, Any]:
    """This checkout as the workers' code, or nothing where querypatch is installed as a wheel."""
    checkout = Path(__file__).parents[1]
    if not (checkout / "pyproject.toml").is_file():
        return {}
    return {"working_dir": str(checkout), "excludes": list(NOT_SHIPPED)}
