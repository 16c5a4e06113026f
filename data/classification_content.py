"""Classification's content of a batch: pictures of one size with one class each.

The changes are torchvision's, with the settings of DAT and Swin (Xia et al., CVPR 2022, A.1; Liu et
al., ICCV 2021, 4.1): a random crop brought to one size, a flip, RandAugment, random erasing. Every
draw comes from a generator seeded by (seed, epoch, sample), so a resumed run sees the same pixels.
A batch is a detection batch whose pictures hold one target each: the class, in a box that is the
whole picture.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self

import numpy as np
import torch
from jaxtyping import UInt8
from pydantic import Field, model_validator
from torchvision.transforms import InterpolationMode, v2

from data.class_labels import class_label
from data.detection_batches import (
    PackedDetectionBatch,
    ReadyPicture,
    join_detection,
    pack_detection,
)
from data.detection_transforms import BoxedPicture
from data.loader import Place, ReadSample
from data.normalise import IMAGENET_MEAN, IMAGENET_STD
from data.packing import SkippedPicture
from data.pictures import BrokenPicture, decode_picture
from data.randomness import sample_generator
from data.samples import Sample, picture_bytes, why_no_picture
from models.settings import Settings
from models.structures import Classes

_MAGNITUDES = 31
"""torchvision's steps of a change; the papers count to 10."""
_ERASED_SHARES = (0.02, 1 / 3)
_ERASED_ASPECTS = (0.3, 1 / 0.3)
_TRIES = 10


class ClassAugmentSettings(Settings):
    """How pictures change where a classifier learns; the defaults are those of DAT and Swin."""

    side: int = Field(default=224, ge=32)
    """Pixels of the square that the classifier sees."""
    min_area: float = Field(default=0.08, gt=0, le=1)
    """Least share of the picture's area that a crop has; 1 takes nearly all of it."""
    max_aspect: float = Field(default=4 / 3, ge=1)
    """Most that the sides of a crop differ by."""
    flip: float = Field(default=0.5, ge=0, le=1)
    """Share of pictures that are mirrored."""
    rand_augment: float | None = Field(default=9.0, ge=0, le=10)
    """Strength, to 10, of the changes that RandAugment draws; null makes none of them."""
    rand_augment_changes: int = Field(default=2, ge=1)
    """Changes that RandAugment makes in a picture."""
    rand_augment_deviation: float = Field(default=0.5, ge=0)
    """Standard deviation of the strength from picture to picture."""
    colour_jitter: float = Field(default=0.4, ge=0, le=1)
    """Most that brightness, contrast and saturation change, where rand_augment is null."""
    erase: float = Field(default=0.25, ge=0, le=1)
    """Share of pictures in which a rectangle becomes noise."""


class ClassSizes(Settings):
    """The size of pictures where a classifier is judged or used."""

    resize: int = Field(default=256, ge=32)
    """Pixels of both sides before the crop, or of the short one."""
    keep_aspect: bool = False
    """Keep the picture's shape; DAT's published numbers are of pictures squashed to a square."""
    crop: int = Field(default=224, ge=32)
    """Pixels of the square in the middle that is looked at."""

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.crop > self.resize:
            raise ValueError(
                f"crop={self.crop} is more than resize={self.resize}; use {self.crop} or more"
            )
        return self


@dataclass(frozen=True)
class ClassificationContent:
    """Samples to pictures with their class; a `data.loader.BatchContent`."""

    classes: Classes
    augment: ClassAugmentSettings = field(default_factory=ClassAugmentSettings)

    def part(
        self,
        place: Place,
        streams: Sequence[int],
        samples: Sequence[Sample],
        read: ReadSample,  # noqa: ARG002  (a class needs no other picture)
        shared: bool,
    ) -> PackedDetectionBatch:
        """The changed pictures with their classes; AnnotationError where a sample has none."""
        ready: list[ReadyPicture] = []
        skipped: list[SkippedPicture] = []
        for stream, sample in zip(streams, samples, strict=True):
            label = class_label(sample, self.classes)
            try:
                picture = decoded(sample)
            except BrokenPicture as error:
                skipped.append(SkippedPicture(sample.id, sample.key, sample.shard, str(error)))
                continue
            generator = sample_generator(place.seed, place.epoch, sample.id, "classification")
            changed = changed_picture(picture, self.augment, generator)
            ready.append(ReadyPicture(stream, sample.id, sample.key, as_target(changed, label)))
        return pack_detection(ready, skipped, place.step, {}, shared=shared)

    def join(self, parts: Sequence[PackedDetectionBatch], pin: bool) -> PackedDetectionBatch:
        """The parts of one step as one batch, see `join_detection`."""
        return join_detection(parts, pin)


def decoded(sample: Sample) -> UInt8[np.ndarray, "height width 3"]:
    """The picture as stored, RGB; BrokenPicture where it cannot be used."""
    data = picture_bytes(sample)
    if data is None:
        raise BrokenPicture(why_no_picture(sample))
    return decode_picture(data)


def as_target(picture: UInt8[np.ndarray, "height width 3"], label: int | None) -> BoxedPicture:
    """The picture with its class as the one target; with none where the class is not known."""
    height, width = picture.shape[:2]
    boxes = [[0, 0, width, height]] if label is not None else []
    labels = [label] if label is not None else []
    return BoxedPicture(
        picture, np.array(boxes, np.float32).reshape(-1, 4), np.array(labels, np.int64)
    )


def changed_picture(
    picture: UInt8[np.ndarray, "height width 3"],
    settings: ClassAugmentSettings,
    generator: np.random.Generator,
) -> UInt8[np.ndarray, "side side 3"]:
    """The picture as it is learned from; a function of the picture and the generator alone.

    torchvision draws from torch's global state, which is seeded for the picture and put back.
    """
    image = torch.from_numpy(picture).permute(2, 0, 1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(generator.integers(2**63)))
        image = _changes(settings, generator)(image)
    changed = np.ascontiguousarray(image.permute(1, 2, 0).numpy())
    if generator.random() < settings.erase:
        _erase(changed, generator)
    return changed


def judged_picture(
    picture: UInt8[np.ndarray, "height width 3"], sizes: ClassSizes
) -> UInt8[np.ndarray, "crop crop 3"]:
    """The square in the middle of the resized picture (bicubic, as published)."""
    height, width = picture.shape[:2]
    wide, high = sizes.resize, sizes.resize
    if sizes.keep_aspect:
        scale = sizes.resize / min(height, width)
        wide, high = (max(sizes.resize, round(side * scale)) for side in (width, height))
    image = torch.from_numpy(picture).permute(2, 0, 1)
    resized = v2.functional.resize(
        image, [high, wide], interpolation=InterpolationMode.BICUBIC, antialias=True
    )
    cropped = v2.functional.center_crop(resized, [sizes.crop, sizes.crop])
    return np.ascontiguousarray(cropped.permute(1, 2, 0).numpy())


def _changes(settings: ClassAugmentSettings, generator: np.random.Generator) -> v2.Compose:
    found: list[v2.Transform] = [
        v2.RandomResizedCrop(
            settings.side,
            scale=(settings.min_area, 1.0),
            ratio=(1 / settings.max_aspect, settings.max_aspect),
            interpolation=InterpolationMode.BICUBIC,
            antialias=True,
        ),
        v2.RandomHorizontalFlip(settings.flip),
    ]
    if settings.rand_augment is not None:
        strength = generator.normal(settings.rand_augment, settings.rand_augment_deviation)
        steps = round(float(np.clip(strength, 0, 10)) / 10 * (_MAGNITUDES - 1))
        fill = [round(255 * mean) for mean in IMAGENET_MEAN]
        found.append(v2.RandAugment(settings.rand_augment_changes, steps, _MAGNITUDES, fill=fill))
    elif settings.colour_jitter:
        found.append(v2.ColorJitter(*[settings.colour_jitter] * 3))
    return v2.Compose(found)


def _erase(picture: UInt8[np.ndarray, "side side 3"], generator: np.random.Generator) -> None:
    """A rectangle of noise, in place (Zhong et al., AAAI 2020, algorithm 1)."""
    side = picture.shape[0]
    for _ in range(_TRIES):
        area = generator.uniform(*_ERASED_SHARES) * side * side
        aspect = np.exp(generator.uniform(*np.log(_ERASED_ASPECTS)))
        height, width = round(float(np.sqrt(area * aspect))), round(float(np.sqrt(area / aspect)))
        if height < side and width < side:
            top, left = (int(generator.integers(side - each + 1)) for each in (height, width))
            noise = generator.standard_normal((height, width, 3)) * IMAGENET_STD + IMAGENET_MEAN
            picture[top : top + height, left : left + width] = np.clip(255 * noise, 0, 255)
            return
