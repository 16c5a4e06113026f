"""What a file of weights says of itself: kind, architecture, classes, picture sizes, origin.

It lies as JSON in the header of every `model.safetensors` of ours, checkpoints and exports alike,
under the key `querypatch`: one file is enough to rebuild the detector and to name what it finds.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Literal

from pydantic import Field, ValidationError
from torch import Tensor

from models.detector_settings import DetectorSettings
from models.interop.checkpoint_files import WeightsError
from models.mask_head import MaskHeadSettings
from models.settings import Settings
from models.structures import Classes
from models.urls import public_url

METADATA_KEY = "querypatch"
"""Where the JSON lies in a safetensors header."""

STEP_KEY = "step"
"""Where a training checkpoint's step lies in a safetensors header."""

ArtefactKind = Literal[
    "detector", "patch_detector", "one_shot", "panoptic", "classifier", "retinanet", "mask_rcnn"
]
"""Which model the tensors are of: `Detector`, one that holds a `Detector` as `detector`, or a
`Classifier` or `HeadedDetector`, of whose `detector` settings the backbone and the number of
classes count.
"""


class PictureInput(Settings):
    """The size that a picture is brought to before the detector sees it."""

    short_side: int = Field(default=800, ge=1)
    """Shorter side in pixels, unless the longer one would exceed max_size."""
    max_size: int = Field(default=1333, ge=1)
    """Longest side in pixels."""
    resize: int | None = Field(default=None, ge=32)
    """Of a classifier: both sides, or with `keep_aspect` the short one, before the crop of
    `short_side` pixels in the middle; null for others."""
    keep_aspect: bool = True
    """Of a classifier: whether the picture keeps its shape."""
    query_side: int | None = Field(default=None, ge=8)
    """Side in pixels of the square that a query crop is squashed to, where it was told."""


class Provenance(Settings):
    """Where weights come from. URLs are without credentials."""

    version: str = ""
    """The querypatch that wrote them; empty for files of others."""
    run: str | None = None
    """Folder of the run that trained them."""
    step: int | None = Field(default=None, ge=0)
    """Updates of that run."""
    averaged: bool = False
    """True for the moving average of the weights in place of the live ones."""
    init: tuple[str, ...] = ()
    """What the run began from, what that began from, and so on."""
    data: str | None = None
    """What the run learned from."""
    metrics: dict[str, float] = Field(default_factory=dict)
    """Of the evaluation at this very step, those that exist; empty where there was none."""


@dataclass(frozen=True)
class Artefact:
    """Weights with everything that is needed to use them."""

    kind: ArtefactKind
    detector: DetectorSettings
    """Its `num_classes` is never None; `backbone.weights` says where that backbone began."""
    classes: Classes | None
    """None where the file does not name them, or has none of its own (pretraining, one-shot)."""
    input: PictureInput
    tensors: Mapping[str, Tensor]
    """By our names, those of the model of this kind, on the CPU, in the file's own shapes."""
    provenance: Provenance
    source: str
    """Path or URL that was read, without credentials."""
    form: Literal["querypatch", "detr", "hf"] = "querypatch"
    """Whose names the file used: ours, those of the detector's public code, or transformers'."""
    guessed: tuple[str, ...] = ()
    """Keys, e.g. `num_heads`, that the file cannot tell and that have their usual value here."""
    masks: MaskHeadSettings | None = None
    """Of a panoptic detector's mask head, None for other kinds."""
    notes: tuple[str, ...] = ()
    """What else a reader of the file should know, a sentence each."""


class _Header(Settings):
    """The JSON in the header."""

    format: Literal[1] = 1
    kind: ArtefactKind
    detector: DetectorSettings
    class_names: tuple[str, ...] | None
    class_ids: tuple[int, ...] | None
    class_things: tuple[bool, ...] | None = None
    input: PictureInput
    provenance: Provenance
    masks: MaskHeadSettings | None = None


def artefact_metadata(
    kind: ArtefactKind,
    detector: DetectorSettings,
    classes: Classes | None,
    picture_input: PictureInput,
    provenance: Provenance,
    masks: MaskHeadSettings | None = None,
) -> dict[str, str]:
    """What goes into the header of a safetensors file; credentials in URLs are taken out."""
    backbone = detector.backbone
    weights = backbone.weights and public_url(backbone.weights)
    clean = backbone.model_copy(update={"weights": weights})
    header = _Header(
        kind=kind,
        detector=detector.model_copy(update={"backbone": clean}),
        class_names=None if classes is None else classes.names,
        class_ids=None if classes is None else classes.ids,
        class_things=None if classes is None else classes.things,
        input=picture_input,
        provenance=_cleaned(provenance),
        masks=masks,
    )
    return {METADATA_KEY: header.model_dump_json()}


def parse_artefact_metadata(
    metadata: Mapping[str, str], tensors: Mapping[str, Tensor], source: str
) -> Artefact | None:
    """The artefact of a safetensors file's header and tensors; None where it has no such header.

    Raises:
        WeightsError: the header is damaged, or of a newer querypatch; one line.
    """
    if METADATA_KEY not in metadata:
        return None
    try:
        header = _Header.model_validate_json(metadata[METADATA_KEY])
        classes = _classes(header)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise WeightsError(
            f"{source}: its header is not one of this querypatch ({key or 'JSON'}: {first['msg']});"
            " use the version that wrote it, or export it again"
        ) from None
    except ValueError as error:
        raise WeightsError(f"{source}: its header is damaged: {error}") from None
    step = metadata.get(STEP_KEY, "")
    provenance = header.provenance
    if step.isdecimal() and provenance.step is None:
        provenance = provenance.model_copy(update={"step": int(step)})
    return Artefact(
        kind=header.kind,
        detector=header.detector,
        classes=classes,
        input=header.input,
        tensors=tensors,
        provenance=provenance,
        source=public_url(source),
        masks=header.masks,
    )


def querypatch_version() -> str:
    """Of the installed package; "unknown" in a checkout that is not installed."""
    try:
        return version("querypatch")
    except PackageNotFoundError:
        return "unknown"


def _cleaned(provenance: Provenance) -> Provenance:
    return provenance.model_copy(
        update={
            "version": provenance.version or querypatch_version(),
            "run": provenance.run and public_url(provenance.run),
            "data": provenance.data and public_url(provenance.data),
            "init": tuple(map(public_url, provenance.init)),
            # JSON has no word for a number that is none, and a null would make the file unreadable.
            "metrics": {
                name: value for name, value in provenance.metrics.items() if math.isfinite(value)
            },
        }
    )


def _classes(header: _Header) -> Classes | None:
    if header.class_names is None or header.class_ids is None:
        return None
    return Classes(header.class_names, header.class_ids, header.class_things)
