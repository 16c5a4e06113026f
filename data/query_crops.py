"""Query crops of one-shot detection: which objects can say to a detector what to look for.

The protocol of CoAE (Hsieh et al., NeurIPS 2019, as its public code has it): in training a class of
the picture and then an object of it are drawn anew each time, in testing a picture's references are
the first of a list that its id shuffles. There an object may be its own reference, and is padded to
a square; here it comes from another picture wherever there is one, and is squashed to a square like
the patches of UP-DETR's pretraining. 24 bytes an object (20 MB for COCO's training set), shared by
all loader processes.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float32, Float64, Int64, UInt8
from pydantic import Field
from torch import Tensor

from data.annotations import BoxAnnotation
from data.pictures import BrokenPicture, decode_picture, resize
from data.randomness import sample_generator
from data.samples import Sample, picture_bytes, why_no_picture
from models.settings import Settings
from models.structures import Classes


class CropSettings(Settings):
    """Which objects may be references, and how they are shown."""

    side: int = Field(default=128, ge=8)
    """Side in pixels of the square that a reference is squashed to, as in pretraining."""
    min_side: float = Field(default=16.0, ge=1)
    """Objects with a shorter side in pixels, as stored, are no references (CoAE has no limit)."""
    flip: float = Field(default=0.5, ge=0, le=1)
    """Probability that a reference is mirrored in training."""


@dataclass(frozen=True)
class ListedObjects:
    """The objects of a set by rising sample id, without crowds and boxes that have no area."""

    sample_ids: Int64[np.ndarray, " objects"]
    labels: Int64[np.ndarray, " objects"]
    boxes_xyxy: Float32[np.ndarray, "objects 4"]
    """Pixels of the stored picture, clipped to it."""
    difficult: Bool[np.ndarray, " objects"]

    def only(self, kept: Bool[np.ndarray, " objects"]) -> "ListedObjects":
        """Those objects alone."""
        return ListedObjects(
            self.sample_ids[kept], self.labels[kept], self.boxes_xyxy[kept], self.difficult[kept]
        )


@dataclass(frozen=True)
class CropCatalogue:
    """The objects that may be references, by class and then by rising sample id."""

    sample_ids: Int64[Tensor, " crops"]
    boxes_xyxy: Float32[Tensor, "crops 4"]
    """Pixels of the stored picture, clipped to it."""
    firsts: Int64[Tensor, " labels_and_end"]
    """Where the crops of each label begin, and at last the number of all crops."""

    def count(self, label: int) -> int:
        """How many references a class has."""
        return int(self.firsts[label + 1] - self.firsts[label])


def list_objects(
    annotations: Iterable[tuple[int, BoxAnnotation]], classes: Classes
) -> ListedObjects:
    """The objects of pictures (sample id, annotation) that come by rising id.

    Raises:
        ValueError: a class name that is none of `classes`.
    """
    labels_of = {name: label for label, name in enumerate(classes.names)}
    listed = [_of_picture(id, annotation, labels_of) for id, annotation in annotations]
    ids, labels, boxes, difficult = ([picture[n] for picture in listed] for n in range(4))
    return ListedObjects(
        sample_ids=np.concatenate([np.empty(0, np.int64), *ids]),
        labels=np.concatenate([np.empty(0, np.int64), *labels]),
        boxes_xyxy=np.concatenate([np.empty((0, 4), np.float32), *boxes]),
        difficult=np.concatenate([np.empty(0, bool), *difficult]),
    )


def catalogue_of(
    objects: ListedObjects, labels: Sequence[int], num_labels: int, min_side: float
) -> CropCatalogue:
    """The objects of `labels` that are not difficult and at least `min_side` pixels on both sides.

    torch moves the arrays into shared memory when they go to another process, so all loader
    processes of a rank share them.
    """
    sides = objects.boxes_xyxy[:, 2:] - objects.boxes_xyxy[:, :2]
    fit = (sides >= min_side).all(axis=1) & ~objects.difficult
    places = np.flatnonzero(fit & np.isin(objects.labels, labels))
    places = places[np.lexsort((places, objects.sample_ids[places], objects.labels[places]))]
    counts = np.bincount(objects.labels[places], minlength=num_labels)
    return CropCatalogue(
        sample_ids=torch.from_numpy(objects.sample_ids[places]),
        boxes_xyxy=torch.from_numpy(objects.boxes_xyxy[places]),
        firsts=torch.from_numpy(np.concatenate([[0], np.cumsum(counts)])),
    )


def class_weights(
    objects: ListedObjects, labels: Sequence[int], num_labels: int
) -> Float64[np.ndarray, " num_labels"]:
    """How likely each class is to be asked for, next to others of its picture: 1 / its objects.

    0 for classes that are not among `labels` or have no object.
    """
    counts = np.bincount(objects.labels, minlength=num_labels)
    asked = np.isin(np.arange(num_labels), labels) & (counts > 0)
    return np.where(asked, 1 / np.maximum(counts, 1), 0.0)


def draw_label(
    present: Int64[np.ndarray, " boxes"],
    weights: Float64[np.ndarray, " labels"],
    generator: np.random.Generator,
) -> int:
    """One of the classes that a picture holds, by their weights; one of them must have a weight."""
    candidates = np.unique(present)
    rising = np.cumsum(weights[candidates])
    place = np.searchsorted(rising, generator.random() * rising[-1], side="right")
    return int(candidates[place])


def draw_crop(
    catalogue: CropCatalogue, label: int, sample_id: int, generator: np.random.Generator
) -> int:
    """Number of a reference of a class, each as likely; of another picture wherever there is one.

    Raises:
        ValueError: the class has no references.
    """
    others = _other_crops(catalogue, label, sample_id)
    return int(others[int(generator.random() * len(others))])


def reference_crops(catalogue: CropCatalogue, label: int, sample_id: int, count: int) -> list[int]:
    """Numbers of the `count` references of a class that a test picture is asked with.

    The first of a list shuffled by the picture's id; from its beginning again where it is too
    short. Always the same. Of other pictures wherever there is one; ValueError as in `draw_crop`.
    """
    others = _other_crops(catalogue, label, sample_id)
    generator = sample_generator(0, 0, sample_id, f"references of class {label}")
    order = np.argsort(generator.random(len(others)), kind="stable")
    return [int(number) for number in np.resize(others[order], count)]


def is_of_picture(catalogue: CropCatalogue, crop: int, sample_id: int) -> bool:
    """Whether a reference comes from the very picture."""
    return int(catalogue.sample_ids[crop]) == sample_id


def picture_of(sample: Sample) -> UInt8[np.ndarray, "height width 3"]:
    """The decoded picture of a sample; BrokenPicture, with the reason, where there is none."""
    data = picture_bytes(sample)
    if data is None:
        raise BrokenPicture(why_no_picture(sample))
    return decode_picture(data)


def cut_crop(
    picture: UInt8[np.ndarray, "height width 3"],
    box_xyxy: Float32[np.ndarray, "4"],
    side: int,
    flipped: bool = False,
) -> UInt8[np.ndarray, "{side} {side} 3"]:
    """The pixels that a box touches, squashed to a square; at least one, wherever the box lies."""
    height, width = picture.shape[:2]
    left, top = (int(low) for low in np.floor(box_xyxy[:2]))
    right, bottom = (int(high) for high in np.ceil(box_xyxy[2:]))
    left, top = min(max(left, 0), width - 1), min(max(top, 0), height - 1)
    part = picture[top : max(bottom, top + 1), left : max(right, left + 1)]
    crop = resize(part, side, side)
    return np.ascontiguousarray(crop[:, ::-1]) if flipped else crop


def _of_picture(
    id: int, annotation: BoxAnnotation, labels_of: dict[str, int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    unknown = [name for name in annotation.names if name not in labels_of]
    if unknown:
        raise ValueError(
            f"picture {annotation.image_id}: the class {unknown[0]!r} is none of the "
            f"{len(labels_of)} of its set; run `querypatch data check` on it"
        )
    boxes = np.asarray(annotation.boxes_xyxy, np.float32).reshape(-1, 4)
    boxes = boxes.clip(0, np.array([annotation.width, annotation.height] * 2, np.float32))
    kept = (boxes[:, 2:] > boxes[:, :2]).all(axis=1) & ~np.asarray(annotation.crowd, bool)
    labels = np.array([labels_of[name] for name in annotation.names], np.int64)
    difficult = np.asarray(annotation.difficult, bool)
    return np.full(kept.sum(), id), labels[kept], boxes[kept], difficult[kept]


def _other_crops(
    catalogue: CropCatalogue, label: int, sample_id: int
) -> Int64[np.ndarray, " crops"]:
    """Numbers of a class's references without those of a picture, unless there are no others."""
    first, end = (int(place) for place in catalogue.firsts[label : label + 2])
    if first == end:
        raise ValueError(f"class {label} has no reference crops; lower min_side, or leave it out")
    own = catalogue.sample_ids[first:end].numpy() == sample_id
    numbers = np.arange(first, end)
    return numbers if own.all() else numbers[~own]
