"""One buffer, many arrays: they do not overlap, keep their types, and may be of nothing."""

import numpy as np
import torch

from data.packing import ArrayShape, arrays_in, empty_buffer, place_picture

ARRAYS = [
    ArrayShape("ids", torch.int64, (3,)),
    ArrayShape("none", torch.float32, (0, 4)),
    ArrayShape("pictures", torch.uint8, (1, 2, 5, 3)),
    ArrayShape("boxes", torch.float32, (2, 4)),
]


def test_arrays_of_one_buffer_keep_their_own_values() -> None:
    buffer = empty_buffer(ARRAYS)
    views = arrays_in(buffer, ARRAYS)
    for number, view in enumerate(views.values()):
        view.fill_(number + 1)
    again = arrays_in(buffer, ARRAYS)
    assert {name: (view.dtype, tuple(view.shape)) for name, view in again.items()} == {
        array.name: (array.dtype, array.sizes) for array in ARRAYS
    }
    assert [view.unique().tolist() for view in again.values()] == [[1], [], [3], [4.0]]


def test_a_buffer_of_nothing_can_be_viewed() -> None:
    nothing = [ArrayShape("ids", torch.int64, (0,))]
    assert arrays_in(empty_buffer(nothing), nothing)["ids"].shape == (0,)


def test_a_shared_buffer_lies_in_shared_memory() -> None:
    assert empty_buffer(ARRAYS, shared=True).is_shared()
    assert not empty_buffer(ARRAYS).is_shared()


def test_a_picture_is_placed_at_the_top_left_and_the_rest_is_zero() -> None:
    target = np.full((3, 4), 9, np.int16)
    place_picture(target, np.array([[1, 2, 3]], np.int16))
    assert target.tolist() == [[1, 2, 3, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
