"""Weights from wherever they lie: a file, an exported folder, a run; ours or others'.

Nothing foreign is unpickled. One reading of the whole file; a run's checkpoint is held to its
hashes.
"""

import json
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from models.artefact import Artefact
from models.detector import Detector
from models.detector_settings import DetectorSettings
from models.interop.checkpoint_files import WeightsError, read_checkpoint
from models.interop.placing import LoadReport, place_tensors
from models.interop.recognise import recognise
from models.urls import public_url
from training.recipe import load_recipe
from training.run_folder import RunFolder, open_run_folder
from training.run_weights import RunWeights, run_weights

CONFIG = "config.json"
FILES = ("model.safetensors", "pytorch_model.bin")
"""What the weights in an exported folder are called, ours and transformers'."""

OF_DISTILLATION = ("query_projection.*",)
"""Tensors that a student has only while it learns from a teacher of another width."""

BESIDE = (
    *("patch_projection.*", "reconstruction.*", "attention.*", "mask_head.*"),
    *OF_DISTILLATION,
)
"""Tensors beside a detector in the models that hold one, by shell pattern."""

COUNTERS = "*.num_batches_tracked"
"""Of BatchNorms that were not frozen; of no use to frozen ones."""

_DETECTOR = "detector."


def open_weights(source: str) -> Artefact:
    """The weights at a path or any fsspec URL, with all that is known of them.

    `source` is a safetensors or torch file of ours, of DETR, UP-DETR or transformers; a folder that
    `export` or transformers wrote; a checkpoint's folder; or a run's folder: its best weights, else
    the newest whole checkpoint, of the moving average where there is one.

    Raises:
        WeightsError: there is nothing of the kind, or it is damaged; one line.
        CheckpointError: a damaged checkpoint that was asked for by name.
        OSError: it cannot be read.
    """
    found = run_weights(source, best=True)
    if found is not None:
        return _of_run(found)
    folder = open_run_folder(source)
    if folder.filesystem.isfile(folder.root):
        return _of_file(source, _config_beside(folder))
    for name in FILES:
        if folder.size(name) is not None:
            return _of_file(f"{folder.url}/{name}", _config(folder))
    raise WeightsError(
        f"{public_url(source)} holds no weights: it is no file, has no "
        f"{' or '.join(FILES)} and no checkpoints of a run; give one of these"
    )


def build_detector(artefact: Artefact) -> Detector:
    """The detector of an artefact with its weights, in evaluation mode, on the CPU.

    Of a panoptic one its detector.

    Raises:
        WeightsError: it finds no classes, or its tensors do not fit its architecture.
    """
    if artefact.kind in ("classifier", "retinanet", "mask_rcnn"):
        raise WeightsError(
            f"{artefact.source} is a {artefact.kind}, not a DETR detector; take its backbone for "
            "one with model.backbone.weights="
        )
    if artefact.kind not in ("detector", "panoptic"):
        raise WeightsError(
            f"{artefact.source} is a {artefact.kind}: it finds what a crop shows and knows no "
            "classes; finetune a detector with init= this file"
        )
    detector = Detector(artefact.detector, torch.Generator())
    fill(detector, artefact, left_out=BESIDE if artefact.kind == "panoptic" else OF_DISTILLATION)
    return detector.eval()


def fill(
    model: nn.Module, artefact: Artefact, *, new: tuple[str, ...] = (), left_out: tuple[str, ...]
) -> LoadReport:
    """Puts an artefact's tensors into a `Detector` or a model that holds one as `detector`.

    Strict: `new` are shell patterns of the model's tensors that keep their values, `left_out` of
    the artefact's that may go unused; both without `detector.`.

    Raises:
        WeightsError: names everything that does not fit; the model is unchanged then.
    """
    report = place_tensors(
        model,
        bare_tensors(artefact),
        file_name=bare_name,
        left_out=(*left_out, *new, COUNTERS),
        new=tuple(pattern for name in new for pattern in (name, _DETECTOR + name)),
        source=artefact.source,
    )
    return replace(report, notes=(*report.notes, *artefact.notes))


def bare_tensors(artefact: Artefact) -> dict[str, Tensor]:
    """The tensors by `bare_name`, the same whether the detector stood alone or not."""
    return {bare_name(name): tensor for name, tensor in artefact.tensors.items()}


def bare_name(name: str) -> str:
    """A tensor's name in a Detector, or beside it, without the `detector.` of what holds it."""
    return name.removeprefix(_DETECTOR)


def _of_run(found: RunWeights) -> Artefact:
    artefact = recognise(
        found.tensors, found.metadata, found.source, detector=_recipes_detector(found)
    )
    known = {"averaged": found.averaged, "step": found.step, "metrics": dict(found.metrics)}
    said = {key: value for key, value in known.items() if value}
    return replace(artefact, provenance=artefact.provenance.model_copy(update=said))


def _recipes_detector(found: RunWeights) -> DetectorSettings | None:
    """For checkpoints from before headers; a recipe that leaves the classes open does not tell."""
    model = found.recipe.get("model")
    if not isinstance(model, Mapping) or model.get("num_classes") is None:
        return None
    return load_recipe(DetectorSettings, model)


def _of_file(source: str, config: Mapping[str, object] | None) -> Artefact:
    file = read_checkpoint(source)
    return recognise(file.tensors, file.metadata, source, arguments=file.arguments, config=config)


def _config_beside(file: RunFolder) -> Mapping[str, object] | None:
    """The config.json of the folder that a model file lies in; any other file has none."""
    folder, _, name = file.url.rpartition("/")
    return _config(open_run_folder(folder or "/")) if name in FILES else None


def _config(folder: RunFolder) -> Mapping[str, object] | None:
    try:
        found = json.loads(folder.read(CONFIG))
    except FileNotFoundError:
        return None
    except json.JSONDecodeError as error:
        raise WeightsError(f"{folder.url}/{CONFIG} is not JSON: {error}; fetch it again") from None
    return found if isinstance(found, dict) else None
