"""What a one-shot run takes from pretrained weights: all that UP-DETR's pretraining learned.

Unlike a finetuned detector, one-shot detection asks the question of pretraining: which boxes match
the patch? So `patch2query` goes over, and the class head, matches or not, too. (Neither the paper
nor the public threads say so for the class head: our choice.) From a detector of other classes only
the rest goes over; both are new then.
"""

from dataclasses import replace

import torch

from finetune.agreement import resolved_settings
from finetune.artefacts import bare_tensors, fill, open_weights
from finetune.fitting import fitted
from finetune.transfer import with_backbone
from models.artefact import Artefact
from models.detector_settings import DetectorSettings
from models.interop.backbones import load_backbone
from models.interop.checkpoint_files import WeightsError
from models.interop.placing import LoadReport
from models.one_shot import NUM_CLASSES, one_shot_detector, one_shot_settings
from models.patch_queries import PatchDetector
from models.urls import public_url

LEFT_OUT = ("reconstruction.*", "attention.*", "mask_head.*")
"""Tensors of other models that one-shot detection has no use for."""


def resolve_one_shot_model(settings: DetectorSettings, init: str | None) -> DetectorSettings:
    """As `finetune.transfer.resolve_model`, with the labels of one-shot detection.

    Raises:
        ValueError: the recipe says another number of classes.
        WeightsError: a key of the recipe differs from the file's, with both values.
    """
    artefact = None if init is None else open_weights(init)
    return resolved_settings(one_shot_settings(settings), artefact, NUM_CLASSES)


def initial_one_shot(
    settings: DetectorSettings, init: str | None, seed: int
) -> tuple[PatchDetector, LoadReport]:
    """The model before its first step, the same on every worker, and where it came from.

    `model.detector.settings` are resolved. Raises WeightsError as `resolve_one_shot_model`, or
    names the tensors that do not fit.
    """
    artefact = None if init is None else open_weights(init)
    resolved = resolved_settings(one_shot_settings(settings), artefact, NUM_CLASSES)
    model = one_shot_detector(resolved, torch.Generator().manual_seed(seed))
    if artefact is None:
        return model, _from_scratch(model)
    report = _transferred(model, artefact)
    return model, with_backbone(model.detector, report)


def finished_one_shot(artefact: Artefact) -> PatchDetector:
    """The one-shot detector of an artefact with its weights, in evaluation mode, on the CPU.

    Weights of pretraining serve as they are: they find patches, and know nothing of classes.

    Raises:
        WeightsError: the weights are of another kind of model, or do not fit.
    """
    if not _asks_the_same(artefact):
        raise WeightsError(
            f"{artefact.source} is a {artefact.kind} ({artefact.detector.num_classes} classes): no "
            "crop can tell it what to find; give a run of task=one_shot"
        )
    model = one_shot_detector(artefact.detector, torch.Generator())
    fill(model, artefact, left_out=LEFT_OUT)
    return model.eval()


def _transferred(model: PatchDetector, artefact: Artefact) -> LoadReport:
    kept = {"patch_projection": _has_projection(artefact), "class_head": _asks_the_same(artefact)}
    rows = {label: label for label in range(NUM_CLASSES)} if kept["class_head"] else {}
    ready = fitted(bare_tensors(artefact), model.detector, artefact.detector, rows)
    new = () if kept["patch_projection"] else ("patch_projection.*",)
    report = fill(
        model,
        replace(artefact, tensors=ready.tensors),
        new=(*new, *ready.new),
        left_out=(*LEFT_OUT, *ready.left_out),
    )
    notes = (
        f"{part}: " + ("carried over" if is_kept else f"new, {artefact.source} asks for no match")
        for part, is_kept in kept.items()
    )
    chain = (artefact.source, *artefact.provenance.init)
    return replace(report, chain=chain, notes=(*report.notes, *notes, *ready.notes))


def _has_projection(artefact: Artefact) -> bool:
    """Whether the weights are of a model that was told by a crop what to find."""
    return "patch_projection.weight" in bare_tensors(artefact)


def _asks_the_same(artefact: Artefact) -> bool:
    """Whether its class head, too, says of boxes whether they match."""
    return _has_projection(artefact) and artefact.detector.num_classes == NUM_CLASSES


def _from_scratch(model: PatchDetector) -> LoadReport:
    backbone = load_backbone(model.detector.backbone)
    given = model.detector.settings.backbone.weights
    weights = given and public_url(given)
    loaded = tuple(f"detector.backbone.body.{name}" for name in backbone.loaded)
    return LoadReport(
        loaded=loaded,
        reshaped=(),
        new=tuple(name for name in model.state_dict() if name not in set(loaded)),
        left_out=backbone.left_out,
        notes=("from scratch: no init", f"backbone: that of model.backbone.weights={weights}"),
        chain=(weights,) if loaded and weights else (),
    )
