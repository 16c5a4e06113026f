"""Query patches: the reference's distribution of crops, its boxes to the bit, Pillow's pixels."""

from pathlib import Path

import numpy as np
import pytest
import torch
from jaxtyping import Int64, UInt8
from PIL import Image
from pydantic import ValidationError
from scipy.stats import ks_2samp

from data.colour import ColourSettings, colour_patches
from data.patches import (
    ColourOn,
    PatchSample,
    PatchSettings,
    cut_patches,
    draw_boxes,
    draw_short_side,
)
from data.pictures import BrokenPicture, TooSmallPicture, decode_picture
from data.randomness import sample_generator

Picture = UInt8[np.ndarray, "height width 3"]


def picture_of(height: int, width: int) -> Picture:
    rows, columns = np.mgrid[0:height, 0:width]
    grain = np.random.default_rng(0).integers(0, 9, (height, width, 3))
    shade = np.stack([rows * 240 / height, columns * 240 / width, (rows + columns) % 240], axis=2)
    return (shade + grain).astype(np.uint8)


PICTURE = picture_of(60, 91)
SETTINGS = PatchSettings(patch_size=32, short_sides=(40, 48, 56), max_size=80)


def cut(
    colour_on: ColourOn = "none", picture: Picture = PICTURE, num_patches: int = 7
) -> PatchSample:
    return cut_patches(picture, SETTINGS, num_patches, 48, sample_generator(1, 2, 3), colour_on)


def test_the_defaults_are_the_references() -> None:
    settings = PatchSettings()
    assert settings.patch_size == 128
    assert settings.min_side == 8
    assert settings.short_sides == (320, 336, 352, 368, 400, 416, 432, 448, 464, 480)
    assert settings.max_size == 600
    assert settings.held_out_short_side == 480
    colour = settings.colour
    assert (colour.jitter_probability, colour.grey_probability, colour.blur_probability) == (
        0.8,
        0.2,
        0.5,
    )
    assert (colour.brightness, colour.contrast, colour.saturation, colour.hue) == (0.4,) * 3 + (
        0.1,
    )


def test_a_sample_is_a_resized_picture_and_its_patches() -> None:
    sample = cut("cpu")
    assert sample.picture.shape == (48, 72, 3)
    assert sample.patches.shape == (7, 32, 32, 3)
    assert sample.boxes_cxcywh.shape == (7, 4)
    assert sample.boxes_cxcywh.dtype == np.float32
    assert sample.colours is None


def test_patches_are_pillows_crops_squashed_within_a_level() -> None:
    boxes = draw_boxes(60, 91, 8, 7, sample_generator(1, 2, 3))
    image = Image.fromarray(PICTURE)
    for patch, box in zip(cut().patches, boxes.tolist(), strict=True):
        expected = np.array(image.crop(box).resize((32, 32), Image.Resampling.BILINEAR))
        assert np.abs(patch.astype(int) - expected).max() <= 1


def test_the_picture_is_only_resized() -> None:
    expected = np.array(Image.fromarray(PICTURE).resize((72, 48), Image.Resampling.BILINEAR))
    assert np.abs(cut("cpu").picture.astype(int) - expected).max() <= 1


def test_boxes_are_the_references_to_the_bit() -> None:
    boxes = draw_boxes(60, 91, 8, 7, sample_generator(1, 2, 3))
    expected = _reference_boxes(torch.from_numpy(boxes), (91, 60), (72, 48))
    assert torch.from_numpy(cut().boxes_cxcywh).equal(expected)


def _reference_boxes(
    boxes_xyxy: torch.Tensor, size: tuple[int, int], resized: tuple[int, int]
) -> torch.Tensor:
    """The reference's float32 steps: scaled by its resize, then centred and normalised."""
    ratios = torch.tensor([new / old for new, old in zip(resized, size, strict=True)] * 2)
    left, top, right, bottom = (boxes_xyxy * ratios).unbind(-1)
    centred = [(left + right) / 2, (top + bottom) / 2, right - left, bottom - top]
    return torch.stack(centred, dim=-1) / torch.tensor(resized * 2, dtype=torch.float32)


def test_a_sample_depends_on_its_generator_alone() -> None:
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    first = cut("cpu")
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    again = cut("cpu")
    other = cut_patches(PICTURE, SETTINGS, 7, 48, sample_generator(1, 2, 4), "cpu")
    assert first.patches.tolist() == again.patches.tolist()
    assert first.boxes_cxcywh.tolist() == again.boxes_cxcywh.tolist()
    assert first.boxes_cxcywh.tolist() != other.boxes_cxcywh.tolist()


def test_the_crops_are_the_same_wherever_the_colours_change() -> None:
    plain, here, there = cut("none"), cut("cpu"), cut("device")
    assert plain.boxes_cxcywh.tolist() == here.boxes_cxcywh.tolist()
    assert plain.boxes_cxcywh.tolist() == there.boxes_cxcywh.tolist()
    assert plain.patches.tolist() == there.patches.tolist()
    assert plain.picture.tolist() == here.picture.tolist()
    assert plain.colours is None
    assert there.colours is not None
    assert colour_patches(there.patches, there.colours).tolist() == here.patches.tolist()


def test_the_first_patches_do_not_depend_on_colour_settings() -> None:
    settings = SETTINGS.model_copy(update={"colour": ColourSettings(blur_probability=0.1)})
    other = cut_patches(PICTURE, settings, 7, 48, sample_generator(1, 2, 3), "cpu")
    assert other.boxes_cxcywh.tolist() == cut("cpu").boxes_cxcywh.tolist()


@pytest.mark.parametrize("size", [(16, 90), (90, 16), (1, 1)])
def test_a_picture_too_small_for_patches_is_named(size: tuple[int, int]) -> None:
    with pytest.raises(TooSmallPicture, match="both sides need more than 16") as raised:
        cut(picture=picture_of(*size))
    assert isinstance(raised.value, BrokenPicture)
    assert f"{size[1]} x {size[0]} pixels" in str(raised.value)


def test_the_smallest_picture_gives_patches_of_its_two_possible_sides() -> None:
    boxes = draw_boxes(17, 17, 8, 400, sample_generator(0, 0, 0))
    sides = boxes[:, 2:] - boxes[:, :2]
    assert set(sides.ravel().tolist()) == {8, 9}
    assert set(boxes[:, 0].tolist()) == set(range(9))
    assert boxes[:, 2:].max() == 16
    assert cut(picture=picture_of(17, 17)).patches.shape == (7, 32, 32, 3)


def test_a_very_long_picture_keeps_a_row() -> None:
    assert cut(picture=picture_of(17, 3000)).picture.shape[0] == 1


def test_crops_are_distributed_as_in_the_reference() -> None:
    """Kolmogorov-Smirnov of sides, places and areas against the reference's own draws."""
    ours = draw_boxes(375, 500, 8, 20_000, sample_generator(5, 0, 0))
    theirs = _reference_crops(375, 500, 20_000)
    for column in range(4):
        assert ks_2samp(ours[:, column], theirs[:, column]).pvalue > 0.001
    assert ks_2samp(_areas(ours), _areas(theirs)).pvalue > 0.001
    assert _areas(ours).mean() / (375 * 500) == pytest.approx(0.25, abs=0.005)
    sides = ours[:, 2:] - ours[:, :2]
    assert sides.min(axis=0).tolist() == [8, 8]
    assert sides.max(axis=0).tolist() == [492, 367]


def test_no_crop_touches_the_right_or_the_bottom_edge() -> None:
    boxes = draw_boxes(30, 41, 8, 20_000, sample_generator(5, 0, 0))
    assert boxes.min(axis=0).tolist() == [0, 0, 8, 8]
    assert boxes.max(axis=0)[2:].tolist() == [40, 29]


def test_the_crops_of_a_picture_are_independent() -> None:
    boxes = draw_boxes(375, 500, 8, 20_000, sample_generator(5, 0, 0)).T
    across = np.corrcoef(boxes[:, :-1], boxes[:, 1:])[:4, 4:]
    assert np.abs(across).max() < 5 / np.sqrt(20_000)


def _reference_crops(height: int, width: int, count: int) -> Int64[np.ndarray, "count 4"]:
    """The draws as the reference states them (reference text, section 1.2, step 2)."""
    generator = np.random.default_rng(1)
    sides = [generator.integers(8, side - 8 + 1, count) for side in (width, height)]
    left, top = (
        generator.integers(0, side - own) for side, own in zip((width, height), sides, strict=True)
    )
    return np.stack([left, top, left + sides[0], top + sides[1]], axis=1)


def _areas(boxes: Int64[np.ndarray, "patches 4"]) -> Int64[np.ndarray, " patches"]:
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def test_every_short_side_is_drawn_alike() -> None:
    settings = PatchSettings()
    generator = sample_generator(0, 0, 0)
    drawn = [draw_short_side(settings, generator) for _ in range(10_000)]
    sides, counts = np.unique(drawn, return_counts=True)
    assert sides.tolist() == list(settings.short_sides)
    assert np.abs(counts - 1000).max() < 4 * np.sqrt(900)


def test_a_side_below_one_cell_is_named() -> None:
    with pytest.raises(ValidationError, match=r"short_sides=\(320, 31\) goes below one cell"):
        PatchSettings(short_sides=(320, 31))


def test_real_photographs_are_cut_within_a_level_of_pillow(shared_data: Path) -> None:
    settings = PatchSettings()
    differences = []
    for number, file in enumerate(sorted((shared_data / "imagenet-sample").glob("*.JPEG"))[::25]):
        picture = decode_picture(file.read_bytes())
        boxes = draw_boxes(*picture.shape[:2], 8, 5, sample_generator(0, 0, number))
        sample = cut_patches(picture, settings, 5, 400, sample_generator(0, 0, number), "none")
        image = Image.fromarray(picture)
        for patch, box in zip(sample.patches, boxes.tolist(), strict=True):
            expected = image.crop(box).resize((128, 128), Image.Resampling.BILINEAR)
            differences.append(np.abs(patch.astype(int) - np.array(expected)))
    assert max(difference.max() for difference in differences) <= 1
    assert np.mean([difference.mean() for difference in differences]) < 0.1
