"""What a finetuning run takes from pretrained weights (UP-DETR, section 4; `--pretrain`).

The architecture is the file's. Backbone, transformer, box head and query embeddings, in order, go
over; what only pretraining uses stays behind. The class head is new but for the classes that the
file knows by name, whose rows go over together with that of "no object". The public code drops
every class head, and loads what happens to fit without a word.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from finetune.artefacts import BESIDE, bare_tensors, fill, open_weights
from models.artefact import Artefact, without_credentials
from models.detector import Detector
from models.detector_settings import DetectorSettings
from models.interop.backbones import RANDOM_WEIGHTS, load_backbone
from models.interop.checkpoint_files import WeightsError
from models.interop.class_names import match_names
from models.interop.placing import LoadReport
from models.settings import Settings
from models.structures import Classes

ARCHITECTURE = (
    *("hidden_dim", "num_heads", "encoder_layers", "decoder_layers", "feedforward_dim"),
    *("pre_norm", "position", "num_queries"),
    *("backbone.name", "backbone.dilation", "backbone.stride_in_1x1", "backbone.output"),
)
"""Keys of the detector's settings that its tensors depend on; all others are the recipe's."""

CLASS_HEAD = ("class_head.weight", "class_head.bias")


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


def resolved_settings(
    settings: DetectorSettings, artefact: Artefact | None, num_classes: int
) -> DetectorSettings:
    """As `resolve_model`, of opened weights and for a number of classes."""
    if settings.num_classes not in (None, num_classes):
        raise WeightsError(
            f"model.num_classes={settings.num_classes}, but the data have {num_classes} classes; "
            "leave model.num_classes out"
        )
    values = {"num_classes": num_classes}
    if artefact is None:
        if settings.backbone.weights is None:
            raise WeightsError(
                "neither init nor model.backbone.weights is given; name the weights to start from, "
                "or say model.backbone.weights=random"
            )
        return settings.model_copy(update=values)
    return _agreed(settings, artefact, values)


def with_backbone(detector: Detector, report: LoadReport) -> LoadReport:
    """Loads the backbone that the recipe names in place of init's; the report says whose it is.

    `random` is no file to load: init's backbone stays, as in pretraining.
    """
    weights = detector.settings.backbone.weights
    if weights is None or weights == RANDOM_WEIGHTS:
        return _noted(report, "backbone: that of init")
    replaced = load_backbone(detector.backbone)
    shown = without_credentials(weights)
    note = f"backbone: that of model.backbone.weights={shown}, not that of init"
    if replaced.new:
        names = {f"backbone.{name}" for name in replaced.new}
        loaded = tuple(name for name in report.loaded if name not in names)
        report = replace(report, loaded=loaded, new=(*report.new, *sorted(names)))
    return _noted(report, note)


def _agreed(
    settings: DetectorSettings, artefact: Artefact, values: Mapping[str, object]
) -> DetectorSettings:
    given, told = dict(_said(settings)), dict(_leaves(artefact.detector))
    taken = {
        key: given[key] if key in artefact.guessed and key in given else told[key]
        for key in ARCHITECTURE
    }
    conflicts = [
        f"model.{key}={given[key]} in the recipe, {taken[key]} in the file"
        for key in ARCHITECTURE
        if key in given and given[key] != taken[key]
    ]
    if conflicts:
        raise WeightsError(
            f"init={artefact.source} has another architecture: {'; '.join(conflicts)}; "
            "leave these keys out to take the file's"
        )
    backbone = settings.backbone.model_dump()
    model = settings.model_dump()
    for key, value in taken.items():
        section, _, name = key.rpartition(".")
        (backbone if section else model)[name] = value
    return DetectorSettings.model_validate({**model, **values, "backbone": backbone})


def _said(settings: DetectorSettings) -> Iterator[tuple[str, object]]:
    """The keys that the recipe gives, with their values."""
    for key, value in _leaves(settings):
        section, _, name = key.rpartition(".")
        owner: Settings = settings.backbone if section else settings
        if name in owner.model_fields_set:
            yield key, value


def _leaves(settings: DetectorSettings) -> Iterator[tuple[str, object]]:
    values = settings.model_dump()
    backbone = values.pop("backbone")
    yield from values.items()
    for name, value in backbone.items():
        yield f"backbone.{name}", value


def _from_scratch(detector: Detector) -> LoadReport:
    backbone = load_backbone(detector.backbone)
    loaded = tuple(f"backbone.body.{name}" for name in backbone.loaded)
    given = detector.settings.backbone.weights
    weights = given and without_credentials(given)
    return LoadReport(
        loaded=loaded,
        reshaped=(),
        new=tuple(name for name in detector.state_dict() if name not in set(loaded)),
        left_out=backbone.left_out,
        notes=("from scratch: no init", f"backbone: that of model.backbone.weights={weights}"),
        chain=(weights,) if loaded and weights else (),
    )


def _transferred(detector: Detector, artefact: Artefact, classes: Classes) -> LoadReport:
    tensors = bare_tensors(artefact)
    rows = _known_rows(artefact, classes)
    new = () if rows else ("class_head.*",)
    if rows:
        for name, own in zip(CLASS_HEAD, _class_head(detector), strict=True):
            tensors[name] = _rows_by_name(own, tensors[name], rows)
    report = fill(detector, replace(artefact, tensors=tensors), new=new, left_out=BESIDE)
    if rows:
        report = replace(report, reshaped=(*report.reshaped, *CLASS_HEAD))
    report = replace(report, chain=(artefact.source, *artefact.provenance.init))
    return _noted(report, *_guesses(artefact), _class_note(artefact, classes, rows))


def _known_rows(artefact: Artefact, classes: Classes) -> dict[int, int]:
    """Label of the data -> label of the file, for the classes that both name."""
    if artefact.classes is None:
        return {}
    found = match_names(classes, artefact.classes)
    return {ours: theirs for ours, theirs in enumerate(found) if theirs is not None}


def _class_head(detector: Detector) -> tuple[Tensor, Tensor]:
    return detector.class_head.weight.detach(), detector.class_head.bias.detach()


def _rows_by_name(own: Tensor, given: Tensor, rows: Mapping[int, int]) -> Tensor:
    """Random rows, but for those of known classes and, last, of no object."""
    taken = own.clone()
    taken[list(rows)] = given[list(rows.values())].to(own.dtype)
    taken[-1] = given[-1].to(own.dtype)
    return taken


def _class_note(artefact: Artefact, classes: Classes, rows: Mapping[int, int]) -> str:
    if not rows:
        why = "names no classes" if artefact.classes is None else "names none of these classes"
        return f"class head: new, {artefact.source} {why}"
    whose = " (taken to be COCO's, by their number)" if "classes" in artefact.guessed else ""
    missing = [name for label, name in enumerate(classes.names) if label not in rows]
    new = f"; new: {', '.join(missing)}" if missing else ""
    return f"class head: {len(rows)} of {len(classes.names)} classes by name{whose}{new}"


def _guesses(artefact: Artefact) -> tuple[str, ...]:
    told = dict(_leaves(artefact.detector))
    return tuple(
        f"{key}={told[key]}: the file cannot tell; give model.{key} if it is another"
        for key in artefact.guessed
        if key in told
    )


def _noted(report: LoadReport, *notes: str) -> LoadReport:
    return replace(report, notes=(*report.notes, *notes))
