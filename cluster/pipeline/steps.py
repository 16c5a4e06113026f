"""The stages of a pipeline that are no runs: evaluations and exports, done once and kept.

What a stage made lies in its folder, and last `done.json`, which says of what settings: asked for
in other words, it is done again.
"""

import json
import logging
import os
from typing import Any, assert_never

import ray
from ray.exceptions import RayTaskError

from cluster.jobs.packaging import shipped_code
from cluster.launch import SUBMITTED
from cluster.pipeline.stages import EvaluateStage, ExportStage
from finetune.evaluate_weights import judge_weights
from finetune.export import export
from finetune.predict import device_of
from training.moments import utc_now
from training.run_folder import open_run_folder
from training.storage_settings import StorageSettings, apply_storage_options

DONE = "done.json"
SCORES = "scores.json"

Step = EvaluateStage | ExportStage


class StepFailed(RuntimeError):  # noqa: N818
    """A stage that failed on the cluster; the message is its error's."""


def is_done(step: Step, url: str) -> bool:
    """Whether the stage whose folder is `url` was done with these settings."""
    try:
        content = json.loads(open_run_folder(url).read(DONE))
    except (FileNotFoundError, json.JSONDecodeError):
        return False
    return isinstance(content, dict) and content.get("settings") == step.model_dump(mode="json")


def do_step(step: Step, url: str, storage: StorageSettings, address: str | None) -> str:
    """Does it: here, or where `address` is given on a machine of that cluster; returns its tables.

    Raises what `judge_weights` and `export` raise, on a cluster as StepFailed.
    """
    if address is None:
        return _done(step, url, storage)
    code = {} if SUBMITTED in os.environ else {"working_dir": str(shipped_code())}
    ray.init(address=address, runtime_env=code, logging_level=logging.WARNING)
    try:
        task: Any = ray.remote(num_cpus=1, num_gpus=_gpus(step))(_done)
        text: str = ray.get(task.remote(step, url, storage))
    except RayTaskError as error:
        raise StepFailed(str(error.cause)) from error
    finally:
        ray.shutdown()
    return text


def _done(step: Step, url: str, storage: StorageSettings) -> str:
    apply_storage_options(storage)
    folder = open_run_folder(url)
    match step:
        case EvaluateStage():
            judged = judge_weights(
                step.evaluate,
                step.data,
                step.set,
                device_of(step.device),
                kind=step.kind,
                pictures=step.pictures,
            )
            folder.write(SCORES, json.dumps(judged.content, indent=1).encode())
            told = judged.text
        case ExportStage():
            written = export(step.export, _destination(step, url), step.format, overwrite=True)
            told = "\n".join((*written.checks, *(f"wrote {file}" for file in written.files)))
        case _:
            assert_never(step)
    content = {"settings": step.model_dump(mode="json"), "at": utc_now()}
    folder.write(DONE, json.dumps(content, indent=1).encode())
    return told


def _destination(step: ExportStage, url: str) -> str:
    match step.format:
        case "querypatch" | "hf":
            return url
        case "detr":
            return f"{url}/weights.pth"
        case "onnx":
            return f"{url}/model.onnx"
        case _:
            assert_never(step.format)


def _gpus(step: Step) -> int:
    """One for an evaluation, where the cluster has any."""
    if isinstance(step, ExportStage) or step.device == "cpu":
        return 0
    found: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return 1 if step.device == "cuda" or found.get("GPU", 0) >= 1 else 0
