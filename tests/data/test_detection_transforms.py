"""DETR's augmentation: its arithmetic on boxes, its distribution of sizes; nothing is mixed up."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from jaxtyping import Float32, UInt8
from PIL import Image
from pydantic import ValidationError
from scipy.stats import ks_2samp
from torchvision.transforms import functional as F

from data.annotations import BoxAnnotation, parse_annotation
from data.detection_transforms import (
    AugmentSettings,
    BoxedPicture,
    augment,
    cut_picture,
    flipped_picture,
    pick,
    resized_picture,
)
from data.pictures import decode_picture
from data.randomness import sample_generator
from data.sources import list_source, read_item

SMALL = AugmentSettings(
    short_sides=(32, 40, 48), max_size=64, crop_short_sides=(30, 37, 45), crop_sides=(28, 45)
)


def boxed(height: int, width: int, count: int, seed: int = 0) -> BoxedPicture:
    """Noise, with boxes that lie anywhere, each filled by its own segment."""
    generator = np.random.default_rng(seed)
    corners = generator.random((count, 2, 2)) * [width, height]
    boxes = np.concatenate([corners.min(1), corners.max(1) + 1], axis=1)
    boxes = np.minimum(boxes, [width, height] * 2).astype(np.float32)
    segments = np.zeros((height, width), np.int16)
    for number, (left, top, right, bottom) in enumerate(boxes.astype(int).tolist(), start=1):
        segments[top:bottom, left:right] = number
    picture = generator.integers(0, 256, (height, width, 3)).astype(np.uint8)
    return BoxedPicture(picture, boxes, np.arange(count) * 3 + 1, segments)


def smooth(height: int, width: int) -> UInt8[np.ndarray, "height width 3"]:
    rows, columns = np.mgrid[0:height, 0:width]
    shade = [rows * 240 / height, columns * 240 / width, (rows + columns) * 120 / (height + width)]
    return np.stack(shade, axis=2).astype(np.uint8)


# --- the reference, restated from facebookresearch/detr's datasets/transforms.py ---


def detr_size(size: tuple[int, int], short_side: int, max_size: int | None) -> tuple[int, int]:
    """(height, width) that RandomResize gives a picture of (width, height)."""
    width, height = size
    if max_size is not None:
        low, high = float(min(size)), float(max(size))
        if high / low * short_side > max_size:
            short_side = round(max_size * low / high)
    if short_side in (min(size),):
        return height, width
    if width < height:
        return int(short_side * height / width), short_side
    return short_side, int(short_side * width / height)


def detr_resize(
    image: Image.Image, boxes: torch.Tensor, short_side: int, max_size: int | None
) -> tuple[Image.Image, torch.Tensor]:
    resized = F.resize(image, detr_size(image.size, short_side, max_size))
    across, down = (new / old for new, old in zip(resized.size, image.size, strict=True))
    return resized, boxes * torch.tensor([across, down, across, down])


def detr_flip(image: Image.Image, boxes: torch.Tensor) -> tuple[Image.Image, torch.Tensor]:
    width = image.size[0]
    turned = boxes[:, [2, 1, 0, 3]] * torch.tensor([-1, 1, -1, 1])
    return F.hflip(image), turned + torch.tensor([width, 0, width, 0])


def detr_cut(
    image: Image.Image, boxes: torch.Tensor, region: tuple[int, int, int, int]
) -> tuple[Image.Image, torch.Tensor, torch.Tensor]:
    top, left, height, width = region
    moved = boxes - torch.tensor([left, top, left, top], dtype=torch.float32)
    sides = torch.tensor([width, height], dtype=torch.float32)
    clipped = torch.min(moved.reshape(-1, 2, 2), sides).clamp(min=0)
    kept = torch.all(clipped[:, 1] > clipped[:, 0], dim=1)
    return F.crop(image, *region), clipped.reshape(-1, 4)[kept], kept


def detr_augment(
    image: Image.Image,
    boxes: torch.Tensor,
    labels: torch.Tensor,
    settings: AugmentSettings,
    draws: list[float],
    scale: float,
) -> tuple[Image.Image, torch.Tensor, torch.Tensor]:
    """The composition of its make_coco_transforms, with our draws in its order."""
    if draws[0] < 0.5:
        image, boxes = detr_flip(image, boxes)
    if draws[1] < 0.5:
        image, boxes = detr_resize(image, boxes, pick(settings.crop_short_sides, draws[2]), None)
        low, high = settings.crop_sides
        width = low + int(draws[3] * (min(image.width, high) - low + 1))
        height = low + int(draws[4] * (min(image.height, high) - low + 1))
        top = int(draws[5] * (image.height - height + 1))
        left = int(draws[6] * (image.width - width + 1))
        image, boxes, kept = detr_cut(image, boxes, (top, left, height, width))
        labels = labels[kept]
    image, boxes = detr_resize(image, boxes, pick(settings.short_sides, scale), settings.max_size)
    return image, boxes, labels


def test_the_defaults_are_the_references() -> None:
    settings = AugmentSettings()
    assert settings.kind == "detr"
    assert settings.short_sides == tuple(range(480, 801, 32))
    assert settings.max_size == 1333
    assert (settings.flip, settings.crop) == (0.5, 0.5)
    assert settings.crop_short_sides == (400, 500, 600)
    assert settings.crop_sides == (384, 600)


def test_boxes_and_pixels_follow_the_reference_through_the_whole_of_it() -> None:
    branches = set()
    for seed in range(40):
        height, width = 47 + seed % 30, 77 - seed % 40
        start = boxed(height, width, 6, seed)
        start = BoxedPicture(smooth(height, width), start.boxes_xyxy, start.labels)
        draws = sample_generator(seed, 0, 0).random(7).tolist()
        branches.add((draws[0] < 0.5, draws[1] < 0.5))
        scale = (seed * 7 % 10) / 10
        ours = augment(start, SMALL, scale, sample_generator(seed, 0, 0))
        image, boxes, labels = detr_augment(
            Image.fromarray(start.picture),
            torch.from_numpy(start.boxes_xyxy),
            torch.from_numpy(start.labels),
            SMALL,
            draws,
            scale,
        )
        assert ours.picture.shape == (image.height, image.width, 3)
        assert ours.labels.tolist() == labels.tolist()
        np.testing.assert_allclose(ours.boxes_xyxy, boxes.numpy(), rtol=0, atol=1e-3)
        assert np.abs(ours.picture.astype(int) - np.array(image)).max() <= 2
    assert len(branches) == 4


def test_real_coco_boxes_follow_the_reference_to_a_thousandth_of_a_pixel(shared_data: Path) -> None:
    settings = AugmentSettings()
    for number, (picture, annotation) in enumerate(_coco(shared_data, 12)):
        boxes = np.array(annotation.boxes_xyxy, np.float32).reshape(-1, 4)
        start = BoxedPicture(picture, boxes, np.arange(len(boxes)))
        draws = sample_generator(7, 0, number).random(7).tolist()
        ours = augment(start, settings, number / 12, sample_generator(7, 0, number))
        image, expected, labels = detr_augment(
            Image.fromarray(picture),
            torch.from_numpy(boxes),
            torch.arange(len(boxes)),
            settings,
            draws,
            number / 12,
        )
        assert ours.picture.shape == (image.height, image.width, 3)
        assert ours.labels.tolist() == labels.tolist()
        np.testing.assert_allclose(ours.boxes_xyxy, expected.numpy(), rtol=0, atol=1e-3)


def _coco(shared_data: Path, count: int) -> list[tuple[UInt8[np.ndarray, "_ _ 3"], BoxAnnotation]]:
    source = list_source(str(shared_data / "coco" / "annotations" / "instances_val2017.json"))
    parts = [read_item(source, item) for item in source.items[:count]]
    return [
        (decode_picture(next(iter(one.values()))), parse_annotation(one["json"])) for one in parts
    ]


def test_sizes_and_places_are_distributed_as_in_the_reference() -> None:
    """Kolmogorov-Smirnov of finished sizes, and of what remains of a box, against its own draws."""
    ours, theirs = [], []
    generator = np.random.default_rng(3)
    reference = random.Random(4)
    start = BoxedPicture(
        np.zeros((48, 64, 3), np.uint8), np.array([[20, 10, 50, 40]], np.float32), np.array([0])
    )
    for _ in range(3000):
        made = augment(start, SMALL, generator.random(), generator)
        ours.append((*made.picture.shape[:2], *_first_box(made.boxes_xyxy)))
        theirs.append(_reference_draw(reference))
    for ours_column, theirs_column in zip(
        zip(*ours, strict=True), zip(*theirs, strict=True), strict=True
    ):
        assert ks_2samp(ours_column, theirs_column).pvalue > 0.001


def _reference_draw(generator: random.Random) -> tuple[float, ...]:
    """(height, width, box) after the reference's own calls of random, for the picture above."""
    size, boxes = (64, 48), torch.tensor([[20.0, 10, 50, 40]])
    image = Image.new("RGB", size)
    if generator.random() < 0.5:
        image, boxes = detr_flip(image, boxes)
    if generator.random() < 0.5:
        image, boxes = detr_resize(image, boxes, generator.choice([30, 37, 45]), None)
        width = generator.randint(28, min(image.width, 45))
        height = generator.randint(28, min(image.height, 45))
        top = generator.randint(0, image.height - height)
        left = generator.randint(0, image.width - width)
        image, boxes, _ = detr_cut(image, boxes, (top, left, height, width))
    image, boxes = detr_resize(image, boxes, generator.choice([32, 40, 48]), 64)
    return (image.height, image.width, *_first_box(boxes.numpy()))


def _first_box(boxes: Float32[np.ndarray, "boxes 4"]) -> tuple[float, ...]:
    return tuple(boxes[0].tolist()) if len(boxes) else (-1.0,) * 4


# --- properties ---


def test_mirrored_twice_is_the_same() -> None:
    start = boxed(13, 22, 4)
    again = flipped_picture(flipped_picture(start))
    assert again.picture.tolist() == start.picture.tolist()
    np.testing.assert_allclose(again.boxes_xyxy, start.boxes_xyxy, atol=1e-5)
    assert again.labels.tolist() == start.labels.tolist()
    assert again.segments is not None
    assert start.segments is not None
    assert again.segments.tolist() == start.segments.tolist()


@pytest.mark.parametrize("kind", ["detr", "flip", "none"])
def test_no_change_mixes_up_labels_boxes_and_segments(kind: str) -> None:
    """Peers' bug 14: a flip corrupted labels. Each object is painted in the colour of its label."""
    colours = np.array([(0, 0, 0), (250, 0, 0), (0, 250, 0), (0, 0, 250)], np.uint8)
    settings = AugmentSettings.model_validate_json(
        SMALL.model_copy(update={"kind": kind}).model_dump_json()
    )
    seen = set()
    for seed in range(60):
        start = painted(colours, seed)
        made = augment(start, settings, 0.5, sample_generator(seed, 0, 0))
        assert len(made.labels) == len(made.boxes_xyxy)
        assert made.segments is not None
        assert made.segments.shape == made.picture.shape[:2]
        assert set(np.unique(made.segments).tolist()) <= set(range(len(made.labels) + 1))
        for number, (box, label) in enumerate(zip(made.boxes_xyxy, made.labels, strict=True)):
            seen.add(int(label))
            left, top, right, bottom = box.tolist()
            inner = (slice(int(top) + 3, int(bottom) - 2), slice(int(left) + 3, int(right) - 2))
            if made.segments[inner].size:
                assert set(np.unique(made.segments[inner]).tolist()) == {number + 1}
                worst = np.abs(made.picture[inner].astype(int) - colours[label]).max()
                assert worst <= 2
    assert seen == {1, 2, 3}


def painted(colours: UInt8[np.ndarray, "classes 3"], seed: int) -> BoxedPicture:
    """Three rectangles that do not touch, in any order of labels."""
    labels = np.random.default_rng(seed).permutation(np.arange(1, 4))
    boxes = np.array([[4, 5, 22, 30], [30, 2, 58, 17], [35, 25, 55, 44]], np.float32)
    picture = np.zeros((48, 60, 3), np.uint8)
    segments = np.zeros((48, 60), np.int16)
    for number, (box, label) in enumerate(zip(boxes.astype(int), labels, strict=True), start=1):
        left, top, right, bottom = box.tolist()
        picture[top:bottom, left:right] = colours[label]
        segments[top:bottom, left:right] = number
    return BoxedPicture(picture, boxes, labels, segments)


def test_a_cut_drops_what_it_leaves_out_and_numbers_the_rest_anew() -> None:
    boxes = np.array([[0, 0, 4, 4], [5, 1, 9, 6], [4, 0, 5, 3], [6, 2, 8, 4]], np.float32)
    segments = np.zeros((6, 10), np.int16)
    segments[0:4, 0:4], segments[1:6, 5:9], segments[0:3, 4], segments[2:4, 6:8] = 1, 2, 3, 4
    picture = np.arange(180).reshape(6, 10, 3).astype(np.uint8)
    cut = cut_picture(BoxedPicture(picture, boxes, np.array([7, 8, 9, 7]), segments), 1, 5, 3, 4)
    assert cut.boxes_xyxy.tolist() == [[0, 0, 4, 3], [1, 1, 3, 3]]
    assert cut.labels.tolist() == [8, 7]
    assert cut.segments is not None
    assert cut.segments.tolist() == [[1, 1, 1, 1], [1, 2, 2, 1], [1, 2, 2, 1]]
    assert cut.picture.tolist() == picture[1:4, 5:9].tolist()


def test_a_box_that_only_touches_the_cut_has_no_area_and_goes() -> None:
    start = BoxedPicture(
        np.zeros((6, 10, 3), np.uint8), np.array([[0, 0, 5, 6]], np.float32), np.array([2])
    )
    empty = cut_picture(start, 0, 5, 6, 5)
    assert empty.boxes_xyxy.shape == (0, 4)
    assert empty.labels.tolist() == []


def test_segments_are_resized_as_torchs_nearest() -> None:
    start = boxed(24, 32, 5)
    for short_side in (12, 36, 48):
        resized = resized_picture(start, short_side, 1000).segments
        assert resized is not None
        assert start.segments is not None
        expected = torch.nn.functional.interpolate(
            torch.from_numpy(start.segments)[None, None].float(), size=resized.shape, mode="nearest"
        )
        assert resized.tolist() == expected[0, 0].short().tolist()


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (700, 2), (3, 90), (31, 31)])
@pytest.mark.parametrize("count", [0, 3])
def test_pictures_smaller_than_the_cut_and_the_stride_go_through(
    size: tuple[int, int], count: int
) -> None:
    """Peers' bug 17: pictures smaller than the stride work."""
    settings = AugmentSettings(crop=1.0)
    for seed in range(3):
        made = augment(boxed(*size, count, seed), settings, 0.99, sample_generator(seed, 0, 0))
        height, width = made.picture.shape[:2]
        assert min(height, width) >= 1
        # The short side is rounded: the long one follows by up to half the aspect ratio.
        assert max(height, width) <= 1333 + max(height, width) / min(height, width)
        assert (made.boxes_xyxy >= 0).all()
        assert (made.boxes_xyxy <= np.array([width, height] * 2) + 1e-3).all()


def test_a_very_long_picture_does_not_fill_the_memory() -> None:
    made = augment(boxed(1, 10_000, 1), AugmentSettings(crop=1.0), 0.5, sample_generator(0, 0, 0))
    assert made.picture.shape[0] <= 1337


def test_none_is_the_largest_scale_and_nothing_else() -> None:
    start = boxed(60, 45, 2)
    settings = SMALL.model_copy(update={"kind": "none"})
    made = [augment(start, settings, scale, sample_generator(5, 0, 0)) for scale in (0.0, 0.9)]
    expected = resized_picture(start, 48, 64)
    for one in made:
        assert one.picture.tolist() == expected.picture.tolist()
        assert one.boxes_xyxy.tolist() == expected.boxes_xyxy.tolist()


def test_flip_resizes_and_mirrors_half_of_the_pictures() -> None:
    start = boxed(60, 45, 2)
    settings = SMALL.model_copy(update={"kind": "flip"})
    generator = sample_generator(1, 0, 0)
    plain = resized_picture(start, 40, 64).boxes_xyxy
    mirrored = resized_picture(flipped_picture(start), 40, 64).boxes_xyxy
    made = [augment(start, settings, 0.5, generator).boxes_xyxy.tolist() for _ in range(200)]
    assert made.count(plain.tolist()) + made.count(mirrored.tolist()) == 200
    assert 70 < made.count(mirrored.tolist()) < 130


@pytest.mark.parametrize("kind", ["detr", "flip", "none"])
def test_every_kind_takes_the_same_numbers_from_the_generator(kind: str) -> None:
    generator, expected = sample_generator(1, 2, 3), sample_generator(1, 2, 3)
    augment(boxed(40, 50, 1), SMALL.model_copy(update={"kind": kind}), 0.1, generator)
    expected.random(7)
    assert generator.random() == expected.random()


def test_every_scale_is_as_likely_as_the_others() -> None:
    assert [pick((3, 5, 9), draw) for draw in (0.0, 0.33, 0.34, 0.66, 0.67, 0.999)] == [
        3, 3, 5, 5, 9, 9,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"short_sides": [31]}, "short_sides=(31,) goes below one cell"),
        ({"max_size": 600}, "max_size=600 is less than 800 of short_sides; raise it, e.g. to 1333"),
        ({"crop_sides": [600, 384]}, "crop_sides=(600, 384) must rise"),
        ({"crop_sides": [0, 384]}, "crop_sides=(0, 384) must rise"),
        ({"crop_short_sides": [400, 300]}, "384 pixels of crop_sides cannot be cut out of 300"),
        ({"flip": 1.5}, "less than or equal to 1"),
        ({"kind": "mixup"}, "Input should be 'detr', 'flip' or 'none'"),
        ({"horizontal_flip": 0.5}, "Extra inputs are not permitted"),
    ],
)
def test_settings_that_cannot_be_are_named(fields: dict[str, object], complaint: str) -> None:
    with pytest.raises(ValidationError) as raised:
        AugmentSettings.model_validate_json(json.dumps(fields))
    assert complaint in str(raised.value)


def test_scales_for_small_pictures_need_no_other_change() -> None:
    made = augment(
        boxed(90, 120, 3),
        AugmentSettings(short_sides=(96, 128), max_size=213, crop=1.0),
        0.0,
        sample_generator(0, 0, 0),
    )
    assert min(made.picture.shape[:2]) == 96
