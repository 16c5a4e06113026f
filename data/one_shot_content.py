"""One-shot detection's content of a batch: a picture, a crop of one of its classes, its boxes.

In every epoch anew, one of the picture's seen classes is drawn by 1 / its number of objects, then
an object of it from another picture (CoAE's sampling; UP-DETR, 4.4). Targets are all boxes of that
class, with the label "matches"; objects of other classes are no targets. Pictures in which nothing
can be asked for are left out of the set, as CoAE does: testing never asks for what is not there.
Where a cut leaves no box of the class, the picture stays and teaches to say no. Costs one more read
and decoding a picture, and the reads of a batch are under way together.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from jaxtyping import Float64, UInt8
from torch import Tensor

from data.detection_batches import (
    PackedDetectionBatch,
    ReadyPicture,
    TargetForm,
    join_detection,
    pack_detection,
)
from data.detection_content import COUNTED, Difficult, augmented, boxed_and_counted
from data.detection_set import DetectionSet
from data.detection_transforms import AugmentSettings, BoxedPicture, kept_boxes
from data.loader import Place, ReadSample
from data.packing import SkippedPicture
from data.picture_files import restricted
from data.pictures import BrokenPicture
from data.query_crops import (
    CropCatalogue,
    CropSettings,
    ListedObjects,
    catalogue_of,
    class_weights,
    cut_crop,
    draw_crop,
    draw_label,
    is_of_picture,
    picture_of,
)
from data.randomness import sample_generator
from data.samples import Sample
from models.structures import Classes

MATCHES = 1
"""Label of the targets; 0 is dead, as in pretraining."""

COUNTED_ALSO = ("boxes_not_asked_for", "crops_of_own_picture")
"""Names of what is counted besides `data.detection_content.COUNTED`: boxes of other classes, and
query crops from the very picture, because its class has no other object."""

_READS = 8
"""References of a batch that are read at once."""


@dataclass(frozen=True)
class OneShotContent:
    """Samples to pictures with query crops and targets; a `data.loader.BatchContent`."""

    classes: Classes
    catalogue: CropCatalogue
    """References of the seen classes; sample ids are those of the set that is streamed."""
    weights: Float64[Tensor, " labels"]
    """How likely each class is to be asked for; 0 for unseen ones."""
    difficult: Difficult = "keep"
    crops: CropSettings = field(default_factory=CropSettings)
    augment: AugmentSettings = field(default_factory=AugmentSettings)

    def part(
        self,
        place: Place,
        streams: Sequence[int],
        samples: Sequence[Sample],
        read: ReadSample,
        shared: bool,
    ) -> PackedDetectionBatch:
        """The augmented pictures, each with a query crop and the boxes of its class.

        Raises AnnotationError as `data.detection_content.boxed_picture`.
        """
        counts = Counter(dict.fromkeys((*COUNTED, *COUNTED_ALSO), 0))
        asked = [self._asked(place, sample, counts) for sample in samples]
        references = _read_all([each for each in asked if isinstance(each, _Asked)], read)
        ready: list[ReadyPicture] = []
        skipped: list[SkippedPicture] = []
        for stream, sample, each in zip(streams, samples, asked, strict=True):
            try:
                ready.append(self._ready(place, stream, sample, each, references))
            except BrokenPicture as error:
                skipped.append(SkippedPicture(sample.id, sample.key, sample.shard, str(error)))
        form = TargetForm(num_patches=1, patch_size=self.crops.side)
        return pack_detection(ready, skipped, place.step, counts, form, shared)

    def join(self, parts: Sequence[PackedDetectionBatch], pin: bool) -> PackedDetectionBatch:
        """The parts of one step as one batch, see `data.detection_batches.join_detection`."""
        return join_detection(parts, pin)

    def _asked(
        self, place: Place, sample: Sample, counts: Counter[str]
    ) -> "_Asked | BrokenPicture":
        """The picture with the targets of a drawn class, and the crop that asks for it."""
        try:
            boxed, counted = boxed_and_counted(sample, self.classes, self.difficult)
        except BrokenPicture as error:
            return error
        weights = self.weights.numpy()
        present = boxed.labels[weights[boxed.labels] > 0]
        if not len(present):
            return BrokenPicture("no object in it is of a class that can be asked for")
        generator = sample_generator(place.seed, place.epoch, sample.id, "query crop")
        label = draw_label(present, weights, generator)
        crop = draw_crop(self.catalogue, label, sample.id, generator)
        targets = kept_boxes(boxed, boxed.labels == label)
        counts.update(counted)
        counts["boxes"] += len(targets.labels) - len(boxed.labels)
        counts["boxes_not_asked_for"] += len(boxed.labels) - len(targets.labels)
        counts["crops_of_own_picture"] += is_of_picture(self.catalogue, crop, sample.id)
        return _Asked(
            boxed=replace(targets, labels=np.full_like(targets.labels, MATCHES)),
            crop=crop,
            reference_id=int(self.catalogue.sample_ids[crop]),
            flipped=generator.random() < self.crops.flip,
        )

    def _ready(
        self,
        place: Place,
        stream: int,
        sample: Sample,
        asked: "_Asked | BrokenPicture",
        references: Mapping[int, Sample],
    ) -> ReadyPicture:
        if isinstance(asked, BrokenPicture):
            raise asked
        reference = _reference_picture(references[asked.reference_id])
        box_xyxy = self.catalogue.boxes_xyxy[asked.crop].numpy()
        crop = cut_crop(reference, box_xyxy, self.crops.side, asked.flipped)
        boxed = augmented(asked.boxed, self.augment, place, sample.id)
        return ReadyPicture(stream, sample.id, sample.key, boxed, query_patches=crop[None])


def one_shot_set(
    data: DetectionSet,
    objects: ListedObjects,
    unseen: Sequence[str],
    difficult: Difficult,
    crops: CropSettings,
    augment: AugmentSettings,
) -> tuple[DetectionSet, OneShotContent]:
    """The pictures of a set in which a seen class can be asked for, and what is made of them.

    `objects` are those of `data`. Raises ValueError: an unseen class that the data do not have, or
    nothing to ask for.
    """
    seen = seen_labels(data.classes, unseen, data.url)
    num_labels = len(data.classes.names)
    learned = objects.only(~objects.difficult) if difficult == "drop" else objects
    catalogue = catalogue_of(learned, seen, num_labels, crops.min_side)
    usable = [label for label in seen if catalogue.count(label)]
    ids = np.unique(learned.sample_ids[np.isin(learned.labels, usable)])
    if not len(ids):
        raise ValueError(
            f"{data.url} has no object that can be a query crop: {len(seen)} seen classes, "
            f"min_side={crops.min_side:g}; lower one_shot.crops.min_side, or use other data"
        )
    index, files = restricted(data.index, data.files, ids.tolist())
    # Every reference is of a class that makes its picture stay.
    places = np.searchsorted(ids, catalogue.sample_ids.numpy())
    content = OneShotContent(
        classes=data.classes,
        catalogue=replace(catalogue, sample_ids=torch.from_numpy(places)),
        weights=torch.from_numpy(class_weights(learned, usable, num_labels)),
        difficult=difficult,
        crops=crops,
        augment=augment,
    )
    return replace(data, index=index, files=files), content


def seen_labels(classes: Classes, unseen: Sequence[str], url: str) -> tuple[int, ...]:
    """Labels of all classes but the unseen ones; ValueError where one of these is not there."""
    unknown = [name for name in unseen if name not in classes.names]
    if unknown:
        shown = ", ".join(classes.names[:20])
        raise ValueError(
            f"one_shot.unseen names {unknown[0]!r}, which is no class of {url} ({shown}); name "
            "classes of the data, e.g. one_shot.unseen='[" + classes.names[0] + "]'"
        )
    return tuple(label for label, name in enumerate(classes.names) if name not in unseen)


@dataclass(frozen=True)
class _Asked:
    """A picture before its augmentation, and what asks for its targets."""

    boxed: BoxedPicture
    crop: int
    """Number of the reference in the catalogue."""
    reference_id: int
    """Sample that the reference is cut from."""
    flipped: bool


def _read_all(asked: Sequence[_Asked], read: ReadSample) -> dict[int, Sample]:
    """The samples of the references, a few reads at once."""
    ids = sorted({each.reference_id for each in asked})
    if len(ids) < 2:
        return {id: read(id) for id in ids}
    with ThreadPoolExecutor(min(_READS, len(ids)), thread_name_prefix="reference-reader") as pool:
        return dict(zip(ids, pool.map(read, ids), strict=True))


def _reference_picture(sample: Sample) -> UInt8[np.ndarray, "height width 3"]:
    try:
        return picture_of(sample)
    except BrokenPicture as error:
        raise BrokenPicture(f"its reference {sample.key}: {error}") from error
