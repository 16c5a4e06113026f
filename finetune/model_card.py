"""The model card of an exported detector: what it is, how good, whence, and how to load it."""

from typing import Literal

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


def model_card(artefact: Artefact, form: Literal["querypatch", "hf"]) -> str:
    """Markdown with the front matter of model hubs; numbers are those that the weights bring."""
    tags = "\n".join(f"- {tag}" for tag in ("object-detection", "detr", "querypatch"))
    library = "transformers" if form == "hf" else "querypatch"
    load = _LOAD[form] if artefact.kind in ("detector", "panoptic") else _LOAD_OTHERS
    sections = (
        f"---\nlibrary_name: {library}\npipeline_tag: object-detection\ntags:\n{tags}\n---",
        f"# {_title(artefact)}",
        architecture(artefact.detector),
        f"## Results\n\n{_results(artefact)}",
        f"## Classes\n\n{_classes(artefact)}",
        f"## Input\n\n{_input(artefact)}",
        f"## Where it comes from\n\n{_provenance(artefact)}",
        f"## How to load it\n\n{load}",
    )
    return "\n\n".join(sections)


def architecture(settings: DetectorSettings) -> str:
    """The detector in one line."""
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
