"""What a file of weights is, whoever wrote it: told by its header, or by the names of its tensors.

The tensors of public files do not say their number of heads, dilation or classes. Heads are 8 in
all that were published; a class head of 91 classes is taken to be COCO's, one of 250 COCO
panoptic's, as those of DETR and its descendants are.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

from torch import Tensor

from models.artefact import (
    Artefact,
    ArtefactKind,
    PictureInput,
    Provenance,
    parse_artefact_metadata,
)
from models.backbone import has_bottlenecks
from models.detector_settings import DetectorSettings
from models.interop.class_names import coco_91
from models.interop.conditional import (
    conditional_settings,
    from_conditional,
    is_conditional,
)
from models.interop.copies import repeated_note
from models.interop.deformable import from_deformable, is_deformable
from models.interop.deformable_settings import deformable_settings
from models.interop.detr import detr_name, detr_settings, our_name
from models.interop.hugging_face import (
    from_hugging_face,
    hugging_face_classes,
    hugging_face_settings,
    is_hugging_face,
)
from models.interop.hugging_face_conditional import (
    from_hugging_face_conditional,
    hugging_face_conditional_settings,
    is_hugging_face_conditional,
)
from models.interop.panoptic import NAMES as PANOPTIC_NAMES
from models.interop.panoptic import is_panoptic, panoptic_settings
from models.interop.panoptic_classes import coco_panoptic_250
from models.structures import Classes
from models.urls import public_url

Form = Literal["querypatch", "detr", "hf"]

_UNSEEN = ("num_heads", "backbone.dilation", "backbone.stride_in_1x1")


def recognise(
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    source: str,
    *,
    arguments: Mapping[str, object] | None = None,
    config: Mapping[str, object] | None = None,
    detector: DetectorSettings | None = None,
) -> Artefact:
    """The artefact that a file's tensors, as `read_checkpoint` gives them, are of.

    `arguments` is the command line that a public file keeps, `config` the config.json beside a file
    of transformers, `detector` the architecture where something else tells it, e.g. the recipe of
    the file's run.

    Raises:
        WeightsError: they are of no DETR, or contradict each other.
    """
    if is_deformable(tensors) or is_conditional(tensors):
        return _by_authors(tensors, metadata, source, arguments)
    form = _form(tensors)
    ours = _our_tensors(tensors, form)
    told = parse_artefact_metadata(metadata, ours, source)
    if told is not None:
        return replace(told, form=form)
    if is_panoptic(tensors):
        return _panoptic(tensors, ours, source)
    if form == "hf":
        return _hugging_face(ours, config, source)
    return _nameless(ours, form, source, detector)


def _form(tensors: Mapping[str, Tensor]) -> Form:
    if is_hugging_face(tensors) or is_hugging_face_conditional(tensors):
        return "hf"
    if "query_embed.weight" in tensors or is_panoptic(tensors):
        return "detr"
    return "querypatch"


def _our_tensors(tensors: Mapping[str, Tensor], form: Form) -> dict[str, Tensor]:
    """Under our names; those of a detector inside another model begin with `detector.`."""
    if form == "querypatch":
        return dict(tensors)
    if form == "hf" and is_hugging_face_conditional(tensors):
        return from_hugging_face_conditional(tensors)
    if form == "hf":
        return from_hugging_face(tensors)
    if is_panoptic(tensors):
        return {_our_panoptic_name(theirs): tensor for theirs, tensor in tensors.items()}
    return _inside_patch_detector({our_name(theirs): tensor for theirs, tensor in tensors.items()})


def _inside_patch_detector(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """With `detector.` before the detector's tensors where patch parts are beside it."""
    if "patch_projection.weight" not in named:
        return dict(named)
    beside = ("patch_projection.", "reconstruction.")
    return {
        name if name.startswith(beside) else f"detector.{name}": tensor
        for name, tensor in named.items()
    }


def _our_panoptic_name(theirs: str) -> str:
    if theirs.startswith("detr."):
        return f"detector.{our_name(theirs.removeprefix('detr.'))}"
    for ours, begin in PANOPTIC_NAMES:
        if theirs.startswith(begin):
            return ours + theirs.removeprefix(begin)
    return theirs


def _hugging_face(
    ours: Mapping[str, Tensor], config: Mapping[str, object] | None, source: str
) -> Artefact:
    conditional = "decoder.layers.0.self_attention.query_content.weight" in ours
    read = hugging_face_conditional_settings if conditional else hugging_face_settings
    settings = read(ours, config or {}, source=source)
    assert settings.num_classes is not None
    return _foreign(
        "detector",
        ours,
        settings,
        hugging_face_classes(config or {}, settings.num_classes),
        source,
        form="hf",
        guessed=() if config else _guessed(settings),
    )


def _panoptic(tensors: Mapping[str, Tensor], ours: Mapping[str, Tensor], source: str) -> Artefact:
    settings, masks = panoptic_settings(tensors, source=source)
    guessed = (*_guessed(settings)[1:], "masks.softmax_over")
    classes = _published_classes(settings.num_classes)
    found = _foreign("panoptic", ours, settings, classes, source, form="detr", guessed=guessed)
    return replace(found, masks=masks)


def _by_authors(
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    source: str,
    arguments: Mapping[str, object] | None,
) -> Artefact:
    """Files of Conditional, DAB-, Deformable and Sparse DETR, of their authors or exported here."""
    if is_conditional(tensors):
        read, settings_of = from_conditional, conditional_settings
    else:
        read, settings_of = from_deformable, deformable_settings
    named, repeated = read(tensors, source=source)
    ours = _inside_patch_detector(named)
    notes = repeated_note(repeated)
    told = parse_artefact_metadata(metadata, ours, source)
    if told is not None:
        return replace(told, form="detr", notes=notes)
    settings, guessed = settings_of(tensors, source=source, arguments=arguments)
    kind: ArtefactKind = "patch_detector" if "patch_projection.weight" in ours else "detector"
    classes = _published_classes(settings.num_classes) if kind == "detector" else None
    if classes:
        guessed = (*guessed, "classes")
    found = _foreign(kind, ours, settings, classes, source, form="detr", guessed=guessed)
    return replace(found, notes=notes)


def _nameless(
    ours: Mapping[str, Tensor], form: Form, source: str, detector: DetectorSettings | None
) -> Artefact:
    """Files of DETR and UP-DETR, and ours without a header."""
    public = {detr_name(name): tensor for name, tensor in ours.items()}
    settings = detector or detr_settings(public, source=source)
    kind: ArtefactKind = "patch_detector" if "patch_projection.weight" in ours else "detector"
    classes = _published_classes(settings.num_classes) if kind == "detector" else None
    guessed = () if detector else _guessed(settings)
    return _foreign(
        kind,
        ours,
        settings,
        classes,
        source,
        form=form,
        guessed=(*guessed, "classes") if classes else guessed,
    )


def _published_classes(num_classes: int | None) -> Classes | None:
    """Those that published heads with so many rows have."""
    match num_classes:
        case 91:
            return coco_91()
        case 250:
            return coco_panoptic_250()
        case _:
            return None


def _foreign(
    kind: ArtefactKind,
    ours: Mapping[str, Tensor],
    settings: DetectorSettings,
    classes: Classes | None,
    source: str,
    *,
    form: Form,
    guessed: tuple[str, ...],
) -> Artefact:
    unnamed = settings.backbone.model_copy(update={"weights": None})
    return Artefact(
        kind=kind,
        detector=settings.model_copy(update={"backbone": unnamed}),
        classes=classes,
        input=PictureInput(),
        tensors=ours,
        provenance=Provenance(),
        source=public_url(source),
        form=form,
        guessed=guessed,
    )


def _guessed(settings: DetectorSettings) -> tuple[str, ...]:
    unseen = _UNSEEN if has_bottlenecks(settings.backbone.name) else _UNSEEN[:1]
    return (*unseen, "position_temperature") if settings.query_kind == "anchor" else unseen
