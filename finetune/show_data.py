"""`querypatch show data`: labelled pictures as training sees them, with boxes, names, segments.

What is drawn went through the very functions of the stream: opening, labels, augmentation. A wrong
box, a shifted class or a flipped mask shows here before anything is spent.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from data.annotations import AnnotationError
from data.detection_content import boxed_picture
from data.detection_set import DetectionSet, SetKind, open_detection_set
from data.detection_transforms import AugmentSettings, BoxedPicture, augment
from data.held_out import read_samples
from data.panoptic_content import segmented_picture
from data.pictures import BrokenPicture
from data.randomness import sample_generator
from data.samples import SEGMENTS_PART, Sample
from finetune.drawing import TILE_WIDTH, Tile, draw_boxes, draw_segments, draw_sheet
from models.structures import Classes
from training.recipe import load_recipe


@dataclass(frozen=True)
class DrawnData:
    """What a sheet shows."""

    num_pictures: int
    num_boxes: int
    skipped: tuple[str, ...]
    """Pictures that could not be used, with the reason."""


def draw_data(
    url: str,
    out: Path,
    count: int = 12,
    overrides: Sequence[str] = (),
    *,
    kind: SetKind | None = None,
    pictures: str | None = None,
    classes: Sequence[str] | None = None,
    seed: int = 0,
    columns: int = 4,
) -> DrawnData:
    """Writes a PNG of `count` augmented pictures, evenly spread over the labelled set at `url`.

    `overrides` are those of `AugmentSettings`, e.g. `kind=none` or `short_sides=[320,384]`; `kind`,
    `pictures` and `classes` are those of `open_detection_set`. The same `seed` draws the same
    sheet. Raises ValueError where the set or an override is not what it is said to be, or where no
    picture could be used.
    """
    if count < 1:
        raise ValueError(f"count={count} draws nothing; use 1 or more")
    settings = load_recipe(AugmentSettings, {}, overrides)
    data = open_detection_set(url, kind=kind, pictures=pictures, classes=classes)
    skipped: list[str] = []
    made = list(_augmented(data, count, settings, seed, skipped))
    if not made:
        raise ValueError(
            f"no picture of {url} could be drawn: {'; '.join(skipped) or 'it is empty'}"
        )
    tiles = [Tile(_title(key, picture), draw_boxed(picture, data.classes)) for key, picture in made]
    out.parent.mkdir(parents=True, exist_ok=True)
    draw_sheet(tiles, columns).save(out)
    num_boxes = sum(len(picture.labels) for _, picture in made)
    return DrawnData(len(made), num_boxes, tuple(skipped))


def draw_boxed(picture: BoxedPicture, classes: Classes) -> Image.Image:
    """A tile with the boxes, names and, where there are any, segments of the objects."""
    pixels = picture.picture
    if picture.segments is not None:
        pixels = draw_segments(pixels, picture.segments, picture.labels)
    names = [classes.names[label] for label in picture.labels]
    return draw_boxes(pixels, picture.boxes_xyxy, picture.labels, names, TILE_WIDTH)


def _augmented(
    data: DetectionSet, count: int, settings: AugmentSettings, seed: int, skipped: list[str]
) -> Iterator[tuple[str, BoxedPicture]]:
    """Key and augmented picture; those that cannot be used are put on `skipped`."""
    total = data.index.num_samples
    shown = min(count, total)
    ids = [number * total // shown for number in range(shown)]
    for sample in read_samples(data.index, ids, data.storage_options, None, data.files):
        try:
            yield sample.key, _one(sample, data.classes, settings, seed)
        except (BrokenPicture, AnnotationError) as error:
            skipped.append(f"{sample.key}: {error}")


def _one(sample: Sample, classes: Classes, settings: AugmentSettings, seed: int) -> BoxedPicture:
    generator = sample_generator(seed, 0, sample.id, "augmentation that is looked at")
    scale = float(generator.random())
    has_segments = SEGMENTS_PART in sample.parts
    picture = (
        segmented_picture(sample, classes)
        if has_segments
        else boxed_picture(sample, classes, "keep")
    )
    return augment(picture, settings, scale, generator)


def _title(key: str, picture: BoxedPicture) -> str:
    height, width = picture.picture.shape[:2]
    return f"{key}  {width} x {height}  objects: {len(picture.labels)}"
