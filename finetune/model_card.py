"""The model card of an exported detector: what it is, how good, whence, and how to load it."""

from typing import Literal, assert_never

from models.artefact import Artefact, querypatch_version
from models.detector_settings import DetectorSettings

_SHOWN_CLASSES = 100

_LOAD = {
    "querypatch": """```python
import querypatch

detector = querypatch.load_detector("THIS_FOLDER")
for found in detector.predict(["picture.jpg"], threshold=0.5):
    print(found.names, found.scores, found.boxes_xyxy)
```
""",
    "hf": """```python
from transformers import AutoImageProcessor, DetrForObjectDetection

processor = AutoImageProcessor.from_pretrained("THIS_FOLDER")
detector = DetrForObjectDetection.from_pretrained("THIS_FOLDER")
```

`querypatch.load_detector("THIS_FOLDER")` loads it too.
""",
}
_LOAD_OTHERS = """It is no detector of classes by itself: name it with `init=` in a finetuning run.
"""


_LOAD_BACKBONES = """`querypatch evaluate THIS_FOLDER DATA`; with a classifier
`querypatch predict THIS_FOLDER pictures/` too.
A detector takes the backbone with `model.backbone.weights=THIS_FOLDER/model.safetensors`.
"""


def model_card(artefact: Artefact, form: Literal["querypatch", "hf"]) -> str:
    """Markdown with the front matter of model hubs; numbers are those that the weights bring."""
    pipeline, family = "object-detection", "detr"
    if artefact.kind == "classifier":
        pipeline, family = "image-classification", artefact.detector.backbone.name
    elif artefact.kind in ("retinanet", "mask_rcnn"):
        family = artefact.kind
    tags = "\n".join(f"- {tag}" for tag in (pipeline, family, "querypatch"))
    library = "transformers" if form == "hf" else "querypatch"
    load = _LOAD[form] if artefact.kind in ("detector", "panoptic") else _LOAD_OTHERS
    if artefact.kind in ("classifier", "retinanet", "mask_rcnn"):
        load = _LOAD_BACKBONES
    sections = (
        f"---\nlibrary_name: {library}\npipeline_tag: {pipeline}\ntags:\n{tags}\n---",
        f"# {_title(artefact)}",
        architecture(artefact),
        f"## Results\n\n{_results(artefact)}",
        f"## Classes\n\n{_classes(artefact)}",
        f"## Input\n\n{_input(artefact)}",
        f"## Where it comes from\n\n{_provenance(artefact)}",
        f"## How to load it\n\n{load}",
    )
    return "\n\n".join(sections)


def architecture(artefact: Artefact) -> str:
    """The network in one line."""
    settings = artefact.detector
    backbone, count = settings.backbone, settings.num_classes
    match artefact.kind:
        case "classifier":
            return f"{backbone.name} ({backbone.output}) with a linear head, {count} classes"
        case "retinanet" | "mask_rcnn":
            return f"{artefact.kind} on a feature pyramid over {backbone.name}, {count} classes"
        case "detector" | "patch_detector" | "one_shot" | "panoptic":
            return _detector(settings)
        case _:
            assert_never(artefact.kind)


def _detector(settings: DetectorSettings) -> str:
    backbone = settings.backbone
    dilated = " DC5" if backbone.dilation else ""
    return (
        f"{_family(settings)} on {backbone.name}{dilated} ({backbone.output}): "
        f"{settings.encoder_layers} + {settings.decoder_layers} layers of {settings.hidden_dim} "
        f"channels, {settings.num_heads} heads, {'pre' if settings.pre_norm else 'post'}-norm, "
        f"{settings.total_queries} queries, {settings.num_classes} classes"
    )


def _family(settings: DetectorSettings) -> str:
    """The paper's name of the detector and what sets it apart from the plain one."""
    if settings.decoder_attention == "conditional" and settings.rho is None:
        return _conditional_family(settings)
    sampled = "deformable" in (settings.encoder_attention, settings.decoder_attention)
    if not sampled and settings.rho is None:
        return "DETR"
    said = [f"{settings.feature_levels} level{'s' if settings.feature_levels > 1 else ''}"]
    if settings.rho is not None:
        said.append(f"rho {settings.rho}")
    if settings.two_stage:
        said.append("two-stage")
    elif settings.box_refinement:
        said.append("box refinement")
    name = "Deformable DETR" if settings.rho is None else "Sparse DETR"
    return f"{name} ({', '.join(said)})"


def _conditional_family(settings: DetectorSettings) -> str:
    if settings.query_kind == "position":
        return "Conditional DETR"
    patterns = f" ({settings.num_patterns} patterns)" if settings.num_patterns else ""
    return f"DAB-DETR{patterns}"


def _title(artefact: Artefact) -> str:
    match artefact.kind:
        case "detector":
            return "A DETR detector"
        case "patch_detector":
            return "A pretrained detection transformer (UP-DETR)"
        case "one_shot":
            return "A one-shot detector (UP-DETR)"
        case "panoptic":
            return "A panoptic DETR"
        case "classifier":
            return "A classifier"
        case "retinanet":
            return "A RetinaNet"
        case "mask_rcnn":
            return "A Mask R-CNN"


def _results(artefact: Artefact) -> str:
    metrics = artefact.provenance.metrics
    if not metrics:
        return "Not evaluated at these weights, as far as the file says."
    rows = "\n".join(f"| {name} | {value:.4f} |" for name, value in sorted(metrics.items()))
    return f"| metric | value |\n|---|---|\n{rows}"


def _classes(artefact: Artefact) -> str:
    if artefact.classes is None:
        return "The file does not name them."
    pairs = zip(artefact.classes.ids, artefact.classes.names, strict=True)
    listed = [f"{name} ({id})" for id, name in pairs]
    more = f" and {len(listed) - _SHOWN_CLASSES} more" if len(listed) > _SHOWN_CLASSES else ""
    return f"Names, and ids in the data: {', '.join(listed[:_SHOWN_CLASSES])}{more}."


def _input(artefact: Artefact) -> str:
    size = artefact.input
    if size.resize is not None:
        shape = "with" if size.keep_aspect else "as a square, without"
        return (
            f"RGB, {size.resize} pixels on the shorter side, {shape} its shape; the middle "
            f"{size.short_side} x {size.short_side} pixels, normalised by ImageNet's mean and "
            "deviation."
        )
    return (
        f"RGB, shorter side {size.short_side} pixels and at most {size.max_size} on the longer "
        "one, normalised by ImageNet's mean and deviation, padded with zeros."
    )


def _provenance(artefact: Artefact) -> str:
    told = artefact.provenance
    lines = {
        "Data": told.data,
        "Run": told.run,
        "Step": None if told.step is None else str(told.step),
        "Weights": "the moving average" if told.averaged else None,
        "Began from": ", which began from ".join(told.init) or None,
        "Read from": artefact.source,
        "Exported by": f"querypatch {querypatch_version()}",
    }
    return "\n".join(f"- {what}: {value}" for what, value in lines.items() if value)
