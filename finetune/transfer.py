"""What a finetuning run takes from pretrained weights (UP-DETR, section 4; `--pretrain`).

The architecture is the file's. Backbone, transformer, box head and query embeddings, in order, go
over; what only pretraining uses stays behind. Class heads are new but for the classes that the file
knows by name, whose rows go over together with that of "no object". The public code drops every
class head, and loads what happens to fit without a word. Where the recipe asks the transformer in
another way than the file, e.g. by proposals: `finetune.fitting`.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch

from finetune.agreement import guesses, resolved_settings
from finetune.artefacts import BESIDE, bare_tensors, fill, open_weights
from finetune.fitting import CLASS_HEADS, class_head_note, fitted
from models.artefact import Artefact
from models.detector import Detector
from models.detector_settings import DetectorSettings
from models.interop.backbones import RANDOM_WEIGHTS, load_backbone
from models.interop.class_names import match_names
from models.interop.placing import LoadReport, listed
from models.structures import Classes
from models.urls import public_url


def resolve_model(
    settings: DetectorSettings, init: str | None, classes: Classes
) -> DetectorSettings:
    """The detector's settings with what the init file and the data tell of it.

    A key that the recipe leaves out is the file's, or its default without a file. Resolving twice
    changes nothing.

    Raises:
        WeightsError: a key that the recipe gives differs from the file's or the data's, with both
            values; or what `open_weights` raises.
    """
    artefact = None if init is None else open_weights(init)
    return resolved_settings(settings, artefact, len(classes.names))


def initial_detector(
    settings: DetectorSettings, init: str | None, classes: Classes, seed: int
) -> tuple[Detector, LoadReport]:
    """The detector before its first step, the same on every worker, and where it came from.

    `detector.settings` are resolved, as by `resolve_model`.

    Raises:
        WeightsError: as `resolve_model`, or tensors that do not fit, by name.
    """
    artefact = None if init is None else open_weights(init)
    resolved = resolved_settings(settings, artefact, len(classes.names))
    detector = Detector(resolved, torch.Generator().manual_seed(seed))
    if artefact is None:
        return detector, _from_scratch(detector)
    report = _transferred(detector, artefact, classes)
    return detector, with_backbone(detector, report)


def with_backbone(detector: Detector, report: LoadReport) -> LoadReport:
    """Loads the backbone that the recipe names in place of init's; the report says whose it is.

    `random` is no file to load: init's backbone stays, as in pretraining.
    """
    weights = detector.settings.backbone.weights
    if weights is None or weights == RANDOM_WEIGHTS:
        return _noted(report, "backbone: that of init")
    replaced = load_backbone(detector.backbone)
    shown = public_url(weights)
    note = f"backbone: that of model.backbone.weights={shown}, not that of init"
    if replaced.new:
        note += f", except {listed(replaced.new)}, which that file does not have"
    return _noted(report, note)


def _from_scratch(detector: Detector) -> LoadReport:
    backbone = load_backbone(detector.backbone)
    loaded = tuple(f"backbone.body.{name}" for name in backbone.loaded)
    given = detector.settings.backbone.weights
    weights = given and public_url(given)
    return LoadReport(
        loaded=loaded,
        reshaped=(),
        new=tuple(name for name in detector.state_dict() if name not in set(loaded)),
        left_out=backbone.left_out,
        notes=("from scratch: no init", f"backbone: that of model.backbone.weights={weights}"),
        chain=(weights,) if loaded and weights else (),
    )


def _transferred(detector: Detector, artefact: Artefact, classes: Classes) -> LoadReport:
    rows = _known_rows(artefact, classes)
    ready = fitted(bare_tensors(artefact), detector, artefact.detector, rows)
    left_out = (*BESIDE, *ready.left_out)
    report = fill(
        detector, replace(artefact, tensors=ready.tensors), new=ready.new, left_out=left_out
    )
    chosen = tuple(name for name in report.loaded if name.startswith(CLASS_HEADS))
    report = replace(
        report,
        reshaped=(*report.reshaped, *chosen),
        chain=(artefact.source, *artefact.provenance.init),
    )
    class_note = _class_note(detector.settings, artefact, classes, rows)
    return _noted(report, *guesses(artefact), class_note, *ready.notes)


def _known_rows(artefact: Artefact, classes: Classes) -> dict[int, int]:
    """Label of the data -> label of the file, for the classes that both name."""
    if artefact.classes is None:
        return {}
    found = match_names(classes, artefact.classes)
    return {ours: theirs for ours, theirs in enumerate(found) if theirs is not None}


def _class_note(
    settings: DetectorSettings, artefact: Artefact, classes: Classes, rows: Mapping[int, int]
) -> str:
    other = class_head_note(settings, artefact.detector)
    if other is not None:
        return f"class head: {other}"
    if not rows:
        why = "names no classes" if artefact.classes is None else "names none of these classes"
        return f"class head: new, {artefact.source} {why}"
    whose = " (taken to be COCO's, by their number)" if "classes" in artefact.guessed else ""
    missing = [name for label, name in enumerate(classes.names) if label not in rows]
    new = f"; new: {', '.join(missing)}" if missing else ""
    return f"class head: {len(rows)} of {len(classes.names)} classes by name{whose}{new}"


def _noted(report: LoadReport, *notes: str) -> LoadReport:
    return replace(report, notes=(*report.notes, *notes))
