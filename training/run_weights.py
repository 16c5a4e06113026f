"""The weights of a run or of one of its checkpoints, by URL: what `init=` and `export` read.

Every file is held to the sha256 of its manifest. Where a run kept a moving average, that is what
its evaluations were of, so it is what is taken.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from models.interop.checkpoint_files import WeightsError, read_checkpoint
from training.checkpoint import FOLDER, list_checkpoints, load_checkpoint, read_manifest
from training.manifest import Manifest
from training.record import read_recipe_values
from training.run_folder import RunFolder, open_run_folder
from training.snapshot import MODEL, CheckpointError

BEST = "best"
"""Folder inside a run of the weights that were best so far; may be absent."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunWeights:
    """What was found, and what is known of it."""

    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]
    """Of the header of the model's file."""
    source: str
    """URL of the checkpoint, or of the file of best weights."""
    step: int | None = None
    """Updates done; None where only the header may tell."""
    averaged: bool = False
    """True for the moving average of the weights."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Of the evaluation at this very step."""
    recipe: Mapping[str, object] = field(default_factory=dict)
    """The values of the run's recipe."""


def run_weights(source: str, *, best: bool) -> RunWeights | None:
    """The weights of a run's folder or of a checkpoint's folder; None where `source` is neither.

    Of a run the newest whole checkpoint; with `best` its `best/` before that, which only finetuning
    leaves: the held-out AP of a pretraining run is too noisy to choose a checkpoint by (seen).

    Raises:
        WeightsError: a run without a whole checkpoint.
        CheckpointError: a damaged checkpoint that was asked for by name.
        StoreError: the store does not answer.
    """
    folder = open_run_folder(source)
    if folder.filesystem.isfile(folder.root):
        return None
    above, _, name = folder.url.rpartition(f"/{FOLDER}/")
    if above and name.removeprefix("step_").isdecimal():
        return _of_checkpoint(open_run_folder(above), int(name.removeprefix("step_")))
    if best and folder.size(f"{BEST}/{MODEL}") is not None:
        return _of_best_file(folder)
    if not folder.names(FOLDER):
        return None
    return _of_run(folder)


def weights_file(source: str) -> str:
    """`source`, or the model.safetensors in it where it is an exported folder."""
    folder = open_run_folder(source)
    if folder.filesystem.isfile(folder.root) or folder.size(MODEL) is None:
        return source
    return f"{folder.url}/{MODEL}"


def _of_checkpoint(folder: RunFolder, step: int) -> RunWeights:
    manifest = read_manifest(folder, step)
    if manifest is None:
        raise CheckpointError(
            f"{folder.url}/{FOLDER}: step {step} has no manifest, so it is not a whole checkpoint; "
            "give the run's folder to take its newest whole one"
        )
    return _loaded(folder, manifest, _recipe(folder))


def _of_best_file(folder: RunFolder) -> RunWeights:
    place = f"{folder.url}/{BEST}/{MODEL}"
    file = read_checkpoint(place)
    return RunWeights(file.tensors, file.metadata, place, recipe=_recipe(folder))


def _of_run(folder: RunFolder) -> RunWeights:
    recipe = _recipe(folder)
    for manifest in list_checkpoints(folder):
        try:
            return _loaded(folder, manifest, recipe)
        except CheckpointError as error:
            logger.warning("passing over a checkpoint: %s", error)
    raise WeightsError(f"{folder.url}: the run has no whole checkpoint; give another one")


def _loaded(folder: RunFolder, manifest: Manifest, recipe: Mapping[str, object]) -> RunWeights:
    snapshot = load_checkpoint(folder, manifest)
    return RunWeights(
        tensors={**snapshot.model, **(snapshot.ema or {})},
        metadata=snapshot.metadata,
        source=f"{folder.url}/{FOLDER}/{manifest.name}",
        step=manifest.step,
        averaged=snapshot.ema is not None,
        metrics=manifest.metrics,
        recipe=recipe,
    )


def _recipe(folder: RunFolder) -> Mapping[str, object]:
    return read_recipe_values(folder) or {}
