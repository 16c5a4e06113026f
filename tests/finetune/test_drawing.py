"""Drawn pictures: boxes where they are, names that can be read, one colour a class."""

import numpy as np
import pytest
from PIL import Image

from finetune.drawing import (
    LEAST_LONG_SIDE,
    SEGMENT_OPACITY,
    Tile,
    colour_of,
    draw_boxes,
    draw_segments,
    draw_sheet,
)

GREY = np.full((500, 640, 3), 128, np.uint8)
NO_BOXES = np.zeros((0, 4), np.float32)
NO_LABELS = np.zeros(0, np.int64)


def boxes(*sides: tuple[float, float, float, float]) -> np.ndarray:
    return np.array(sides, np.float32).reshape(-1, 4)


def test_a_box_is_drawn_where_it_is_and_nowhere_else() -> None:
    drawn = np.array(draw_boxes(GREY, boxes((100, 200, 300, 420)), np.array([3]), [""]))
    changed = (drawn != 128).any(axis=2)
    rows, columns = np.nonzero(changed[230:])
    assert (columns.min(), columns.max(), rows.max() + 230) == (100, 299, 419)
    assert tuple(drawn[300, 100]) == colour_of(3)
    assert tuple(drawn[419, 200]) == colour_of(3)
    assert not changed[230:410, 110:290].any()


def test_a_picture_without_boxes_comes_back_as_it_is() -> None:
    assert np.array(draw_boxes(GREY, NO_BOXES, NO_LABELS, [])).tolist() == GREY.tolist()


def test_boxes_that_leave_the_picture_are_drawn_as_far_as_they_lie_in_it() -> None:
    outside = boxes((-50, -60, 700, 900), (5000, 5000, 6000, 6000), (-9, -9, -5, -5))
    drawn = draw_boxes(GREY, outside, np.array([0, 1, 2]), ["all", "right of it", "left of it"])
    assert drawn.size == (640, 500)
    assert drawn.getpixel((0, 300)) == colour_of(0)


def test_the_surest_box_lies_on_top() -> None:
    same = boxes((100, 100, 300, 300), (100, 100, 300, 300))
    drawn = draw_boxes(GREY, same, np.array([4, 5]), ["", ""])
    assert drawn.getpixel((299, 200)) == colour_of(4)


def test_captions_of_one_corner_do_not_hide_each_other() -> None:
    same = boxes(*((100, 100, 400, 400),) * 5)
    drawn = np.array(draw_boxes(GREY, same, np.arange(5), [f"name {n} 0.9" for n in range(5)]))
    pixels = {tuple(pixel) for pixel in drawn.reshape(-1, 3).tolist()}
    assert {colour_of(label) for label in range(5)} <= pixels
    for label in range(1, 5):
        own = (drawn == colour_of(label)).all(axis=2).sum()
        assert own > 300


@pytest.mark.parametrize("size", [(1, 1), (3, 40), (64, 64), (2000, 9)])
def test_a_small_picture_is_enlarged_so_that_names_can_be_read(size: tuple[int, int]) -> None:
    picture = np.zeros((*size, 3), np.uint8)
    drawn = draw_boxes(picture, boxes((0, 0, size[1], size[0])), np.array([0]), ["a long name"])
    assert max(drawn.size) == max(*size, LEAST_LONG_SIDE)


def test_letters_grow_with_the_picture() -> None:
    def captioned(side: int) -> int:
        picture = np.zeros((side, side, 3), np.uint8)
        drawn = draw_boxes(picture, boxes((0, 0, 1, 1)), np.array([0]), ["name"])
        return int((np.array(drawn) == colour_of(0)).all(axis=2).sum())

    assert captioned(2400) > 6 * captioned(600)


def test_a_class_has_one_colour_and_neighbours_differ() -> None:
    assert [colour_of(label) for label in (0, 7)] == [colour_of(label) for label in (0, 7)]
    assert len({colour_of(label) for label in range(91)}) == 91
    for label in range(90):
        difference = np.abs(np.subtract(colour_of(label), colour_of(label + 1)))
        assert difference.sum() > 100


def test_segments_are_tinted_and_outlined_and_the_rest_is_left() -> None:
    picture = np.full((4, 6, 3), 100, np.uint8)
    segments = np.zeros((4, 6), np.int16)
    segments[:, 3:] = 2
    drawn = draw_segments(picture, segments, np.array([7, 9]))
    tint = np.array(colour_of(9)) * SEGMENT_OPACITY + 100 * (1 - SEGMENT_OPACITY)
    assert drawn[1, 4].tolist() == np.round(tint).astype(int).tolist()
    assert drawn[:, 2].tolist() == [[255, 255, 255]] * 4
    assert drawn[:, :2].tolist() == picture[:, :2].tolist()


def test_a_sheet_has_the_columns_that_were_asked_for() -> None:
    tiles = [Tile(f"a picture {n} " * 9, Image.new("RGB", (50, 20 + 9 * n))) for n in range(5)]
    sheet = draw_sheet(tiles, columns=3, width=100)
    assert sheet.width == 12 + 3 * 112
    assert draw_sheet(tiles[:2], columns=3, width=100).width == 12 + 2 * 112
