"""Drawn grids show the boxes where they are, in columns without holes."""

import numpy as np

from pretrain.drawing import MARGIN, TEXT_HEIGHT, Tile, draw_grid


def tile(height: int, found: bool) -> Tile:
    return Tile(
        title="a",
        picture=np.full((height, 100, 3), 255, np.uint8),
        patches=np.zeros((2, 8, 8, 3), np.uint8),
        boxes_xyxy=np.array([[10.0, 20.0, 60.0, 40.0], [0.0, 0.0, 5.0, 5.0]]),
        found_xyxy=np.array([[30.0, 30.0, 90.0, 50.0], [0.0, 0.0, 0.0, 0.0]]) if found else None,
    )


def test_the_first_patch_is_framed_in_its_colour_at_its_place() -> None:
    sheet = np.asarray(draw_grid([tile(60, found=False)], width=200))
    top, left = MARGIN + TEXT_HEIGHT, MARGIN
    assert sheet[top + 40, left + 60].tolist() == [242, 36, 36]  # upper edge of (10, 20) x 2
    assert sheet[top + 100, left + 150].tolist() == [255, 255, 255]


def test_what_was_found_is_drawn_only_where_weights_are_given() -> None:
    without = np.asarray(draw_grid([tile(60, found=False)], width=200))
    with_found = np.asarray(draw_grid([tile(60, found=True)], width=200))
    row = MARGIN + TEXT_HEIGHT + 60
    assert (without[row] != with_found[row]).any()


def test_a_tile_goes_to_the_shortest_column() -> None:
    tall, low = tile(300, found=False), tile(40, found=False)
    sheet = draw_grid([tall, low, low], columns=2, width=100)
    assert sheet.height == draw_grid([tall], columns=1, width=100).height
