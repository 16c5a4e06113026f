"""A classifier's weights: the first ones of a run, and those of a finished one."""

from dataclasses import replace

import torch

from data.classification_content import ClassSizes
from finetune.artefacts import open_weights
from models.artefact import Artefact, PictureInput
from models.backbone import Backbone, BackboneSettings
from models.classifier import Classifier
from models.detector_settings import DetectorSettings
from models.interop.backbones import load_backbone
from models.interop.checkpoint_files import WeightsError
from models.interop.classifiers import load_classifier
from models.interop.placing import LoadReport, place_tensors
from models.structures import Classes
from models.urls import public_url


def resolve_classifier(
    settings: DetectorSettings, init: str | None, classes: Classes
) -> DetectorSettings:
    """The settings with what the data tell; of them the backbone alone counts.

    Raises WeightsError: other classes than the data's, or no weights are named.
    """
    count = len(classes.names)
    if settings.num_classes not in (None, count):
        raise WeightsError(
            f"model.num_classes={settings.num_classes}, but the data have {count} classes; leave "
            "model.num_classes out"
        )
    if init is None and settings.backbone.weights is None:
        raise WeightsError(
            "neither init nor model.backbone.weights is given; name the weights to start from, or "
            "say model.backbone.weights=random"
        )
    return settings.model_copy(update={"num_classes": count})


def initial_classifier(
    settings: BackboneSettings, init: str | None, classes: Classes, seed: int
) -> tuple[Classifier, LoadReport]:
    """The classifier before its first step, the same on every worker, and where it came from.

    `init` is a classifier of ours or of others: its head goes over where its classes are the same
    by name (ours) or number (others'), and is new otherwise.

    Raises:
        WeightsError: tensors that do not fit, by name.
    """
    classifier = Classifier(settings, len(classes.names), torch.Generator().manual_seed(seed))
    if init is None:
        return classifier, _from_backbone(classifier)
    artefact = _of_ours(init)
    if artefact is None:
        return classifier, replace(load_classifier(classifier, init), chain=(public_url(init),))
    same = artefact.classes is not None and artefact.classes.names == classes.names
    report = place_tensors(
        classifier,
        artefact.tensors,
        file_name=lambda name: name,
        left_out=() if same else ("head.*",),
        new=() if same else ("head.*",),
        source=artefact.source,
    )
    note = "head: that of init" if same else "head: new, init has other classes"
    chain = (artefact.source, *artefact.provenance.init)
    return classifier, replace(report, notes=(*report.notes, note), chain=chain)


def classifier_input(sizes: ClassSizes) -> PictureInput:
    """How a classifier that is judged at these sizes is given its pictures."""
    return PictureInput(
        short_side=sizes.crop,
        max_size=sizes.crop,
        resize=sizes.resize,
        keep_aspect=sizes.keep_aspect,
    )


def sizes_of(picture_input: PictureInput) -> ClassSizes:
    """The other way round."""
    return ClassSizes(
        resize=picture_input.resize or picture_input.short_side,
        keep_aspect=picture_input.keep_aspect,
        crop=picture_input.short_side,
    )


def build_classifier(artefact: Artefact) -> Classifier:
    """The classifier of an artefact with its weights, in evaluation mode, on the CPU.

    Raises:
        WeightsError: it is none, or its tensors do not fit.
    """
    if artefact.kind != "classifier":
        raise WeightsError(
            f"{artefact.source} is a {artefact.kind}, not a classifier; train one with "
            "task=classify"
        )
    assert artefact.detector.num_classes is not None
    backbone = artefact.detector.backbone
    classifier = Classifier(backbone, artefact.detector.num_classes, torch.Generator())
    place_tensors(
        classifier,
        artefact.tensors,
        file_name=lambda name: name,
        left_out=(),
        new=(),
        source=artefact.source,
    )
    return classifier.eval()


def _of_ours(init: str) -> Artefact | None:
    """None for a public file, which says nothing of itself; WeightsError for a detector of ours."""
    try:
        artefact = open_weights(init)
    except WeightsError:
        return None
    if artefact.kind != "classifier":
        raise WeightsError(
            f"init={artefact.source} is a {artefact.kind}; take its backbone with "
            "model.backbone.weights= and from_scratch=true"
        )
    return artefact


def _from_backbone(classifier: Classifier) -> LoadReport:
    backbone: Backbone = classifier.backbone
    found = load_backbone(backbone)
    loaded = tuple(f"backbone.body.{name}" for name in found.loaded)
    given = backbone.settings.weights
    weights = given and public_url(given)
    return LoadReport(
        loaded=loaded,
        reshaped=(),
        new=tuple(name for name in classifier.state_dict() if name not in set(loaded)),
        left_out=found.left_out,
        notes=("head: new", f"backbone: that of model.backbone.weights={weights}"),
        chain=(weights,) if loaded and weights else (),
    )
