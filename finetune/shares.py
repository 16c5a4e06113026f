"""One worker's part of an evaluation: what the pictures hold and what was found in them.

Detections leave the device once a batch, in float32. On its way to the other workers a picture with
100 of them takes 3.5 kB, 5,000 pictures half a second to pack (measured).
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor, nn

from data.evaluation_batches import EvaluationBatch
from finetune.scores import PictureDetections, PictureTruth, truth_of
from models.detector import Detector
from models.interop.class_names import match_names
from models.matching import ClassScores
from models.postprocess import MAX_PAIRS, detections
from models.selection_losses import selection_correlation
from models.structures import Classes, DetectorOutput, Images, LayerOutput


@dataclass(frozen=True)
class JudgedPicture:
    """A picture with what it holds and what was found in it."""

    sample_id: int
    """Its position in the index of its set."""
    truth: PictureTruth
    detections: PictureDetections


@dataclass(frozen=True)
class Share:
    """What one worker found; labels are those of the data."""

    pictures: tuple[JudgedPicture, ...]
    skipped: tuple[str, ...]
    """Pictures that could not be read, and why."""
    left_out: Mapping[str, int]
    """Detections of each class of the model that the data do not have."""
    not_finite: int = 0
    """Detections whose score or box is not a number; they do not count."""
    corr: Mapping[str, float] = field(default_factory=dict)
    """Corr of a token selection by the public code's names, summed over the pictures."""


@dataclass(frozen=True)
class ClassMap:
    """How the classes of a model meet those of the data, by name."""

    labels: Int64[np.ndarray, " model_classes"]
    """The label in the data of each class of the model; -1 where the data do not have it."""
    missing: tuple[str, ...]
    """Classes of the data that the model does not know."""
    unknown: tuple[str, ...]
    """Classes of the model that the data do not have."""


def map_classes(model: Classes, data: Classes) -> ClassMap:
    """Which class of the data each class of the model is.

    The very name comes first; else case does not matter, and `tvmonitor` is `tv`, as where class
    heads are carried over (`models.interop.class_names`).

    Raises:
        ValueError: none of the model's classes is in the data.
    """
    places = {name: label for label, name in enumerate(data.names)}
    like = [-1 if label is None else label for label in match_names(model, data)]
    pairs = zip(model.names, like, strict=True)
    labels = np.array([places.get(name, other) for name, other in pairs], np.int64)
    if not (labels >= 0).any():
        raise ValueError(
            f"no class of the detector ({_few(model.names)}) is one of the data "
            f"({_few(data.names)}): evaluate on data whose classes have the same names"
        )
    return ClassMap(
        labels=labels,
        missing=tuple(name for n, name in enumerate(data.names) if n not in labels),
        unknown=tuple(name for name, n in zip(model.names, labels, strict=True) if n < 0),
    )


@torch.no_grad()
def predict_share(
    model: nn.Module,
    batches: Iterable[EvaluationBatch],
    model_classes: Classes,
    classes: Classes,
    max_detections: int,
    precision: Literal["float32", "bf16"],
    class_scores: ClassScores = "softmax",
) -> Share:
    """Runs the model, which is in evaluation mode, over the batches; `classes` are the data's.

    Raises:
        ValueError: an object of a class that is none of `classes`, or no class in common.
    """
    shares = predict_layers(
        model, batches, model_classes, classes, max_detections, precision, class_scores, (-1,)
    )
    return shares[0]


@torch.no_grad()
def predict_layers(
    model: nn.Module,
    batches: Iterable[EvaluationBatch],
    model_classes: Classes,
    classes: Classes,
    max_detections: int,
    precision: Literal["float32", "bf16"],
    class_scores: ClassScores,
    layers: Sequence[int],
) -> tuple[Share, ...]:
    """As `predict_share`, what each of these decoder layers says, in one pass over the batches."""
    class_map = map_classes(model_classes, classes)
    finds = tuple(Finds() for _ in layers)
    skipped: list[str] = []
    corr = defaultdict[str, float](float)
    for batch in batches:
        skipped += map(str, batch.skipped)
        if not batch.keys:
            continue
        output = _answer(model, batch.images, precision)
        for name, mean in selection_correlation(output).items():
            corr[name] += float(mean) * len(batch.keys)
        truths = [truth_of(annotation, classes) for annotation in batch.annotations]
        for found, layer in zip(finds, layers, strict=True):
            said = output.groups[0].layers[layer]
            each = picture_detections(said, batch.stored_sizes, class_scores, max_detections)
            found.add(batch.sample_ids.tolist(), truths, each, class_map, max_detections)
    return tuple(
        Share(
            tuple(found.pictures),
            tuple(skipped),
            {model_classes.names[label]: count for label, count in found.left_out.items()},
            found.not_finite,
            dict(corr),
        )
        for found in finds
    )


@dataclass
class Finds:
    """What one layer found so far."""

    pictures: list[JudgedPicture] = field(default_factory=list)
    left_out: Counter[int] = field(default_factory=Counter)
    """Detections by the model's label of a class that the data do not have."""
    not_finite: int = 0

    def add(
        self,
        sample_ids: Sequence[int],
        truths: Sequence[PictureTruth],
        found: Sequence[PictureDetections],
        class_map: ClassMap,
        max_detections: int,
    ) -> None:
        """Takes a batch in, with the data's labels."""
        for sample_id, truth, each in zip(sample_ids, truths, found, strict=True):
            finite = np.isfinite(each.scores) & np.isfinite(each.boxes_xyxy).all(axis=1)
            known = finite & (class_map.labels[each.labels] >= 0)
            self.not_finite += int((~finite).sum())
            self.left_out.update(int(label) for label in each.labels[finite & ~known])
            surest = _surest(_chosen(each, np.flatnonzero(known)), max_detections)
            renamed = replace(surest, labels=class_map.labels[surest.labels])
            self.pictures.append(JudgedPicture(sample_id, truth, renamed))


def picture_detections(
    layer: LayerOutput,
    sizes: Int64[Tensor, "batch 2"],
    class_scores: ClassScores = "softmax",
    max_pairs: int = MAX_PAIRS,
) -> list[PictureDetections]:
    """What `detections` finds, in pixels of pictures of these (height, width)."""
    found = detections(layer, sizes.to(layer.boxes.device), class_scores, max_pairs)
    columns = (found.boxes_xyxy, found.labels, found.scores)
    return [
        PictureDetections(boxes, labels, scores)
        for boxes, labels, scores in zip(*(part.cpu().numpy() for part in columns), strict=True)
    ]


def _answer(
    model: nn.Module, images: Images, precision: Literal["float32", "bf16"]
) -> DetectorOutput:
    """With the cross-attention where tokens are selected: Corr tells how well."""
    with torch.autocast(images.pixels.device.type, torch.bfloat16, enabled=precision == "bf16"):
        output: DetectorOutput
        if isinstance(model, Detector) and model.settings.rho is not None:
            output = model(images, record="cross")
        else:
            output = model(images)
    return output


def _surest(found: PictureDetections, count: int) -> PictureDetections:
    return _chosen(found, np.argsort(-found.scores, kind="stable")[:count])


def _chosen(found: PictureDetections, places: Int64[np.ndarray, " _"]) -> PictureDetections:
    return PictureDetections(found.boxes_xyxy[places], found.labels[places], found.scores[places])


def _few(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
