"""Query crops: which objects say what to look for, in training and in testing."""

from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest

from data.annotations import BoxAnnotation
from data.query_crops import (
    CropCatalogue,
    ListedObjects,
    catalogue_of,
    class_weights,
    cut_crop,
    draw_crop,
    draw_label,
    is_of_picture,
    list_objects,
    reference_crops,
)
from data.randomness import sample_generator
from models.structures import Classes

CLASSES = Classes(("boat", "cat", "dog"), (1, 4, 17))
BIG = (0.0, 0.0, 30.0, 20.0)


def annotation(*objects: tuple[str, tuple[float, ...]], **changes: object) -> BoxAnnotation:
    fields: dict[str, object] = {
        "image_id": "p",
        "width": 40,
        "height": 30,
        "boxes_xyxy": tuple(box for _, box in objects),
        "names": tuple(name for name, _ in objects),
        "labels": None,
        "areas": None,
        "crowd": (False,) * len(objects),
        "difficult": (False,) * len(objects),
    }
    return BoxAnnotation(**(fields | changes))  # type: ignore[arg-type]


def three_pictures() -> ListedObjects:
    pictures = [
        (3, annotation(("dog", BIG), ("cat", BIG), ("dog", (1.0, 1.0, 25.0, 25.0)))),
        (5, annotation(("dog", (2.0, 2.0, 28.0, 28.0)))),
        (9, annotation(("boat", BIG), ("dog", (0.0, 0.0, 6.0, 20.0)))),
    ]
    return list_objects(pictures, CLASSES)


def catalogue(min_side: float = 8.0) -> CropCatalogue:
    return catalogue_of(three_pictures(), (0, 1, 2), 3, min_side)


def test_crowds_and_boxes_without_area_are_no_objects_and_boxes_end_at_the_picture() -> None:
    listed = list_objects(
        [
            (
                2,
                annotation(
                    ("cat", (-5.0, 3.0, 50.0, 9.0)),
                    ("cat", BIG),
                    ("dog", (45.0, 1.0, 60.0, 9.0)),
                    ("dog", BIG),
                    crowd=(False, True, False, False),
                    difficult=(False, False, False, True),
                ),
            )
        ],
        CLASSES,
    )
    assert listed.sample_ids.tolist() == [2, 2]
    assert listed.labels.tolist() == [1, 2]
    assert listed.boxes_xyxy.tolist() == [[0, 3, 40, 9], [0, 0, 30, 20]]
    assert listed.difficult.tolist() == [False, True]


def test_an_unknown_class_is_named_with_its_picture() -> None:
    with pytest.raises(ValueError, match="picture p: the class 'cow' is none of the 3"):
        list_objects([(0, annotation(("cow", BIG)))], CLASSES)


def test_references_lie_by_class_and_small_ones_are_left_out() -> None:
    found = catalogue()
    assert found.firsts.tolist() == [0, 1, 2, 5]
    assert found.sample_ids.tolist() == [9, 3, 3, 3, 5]
    assert [found.count(label) for label in range(3)] == [1, 1, 3]
    assert catalogue(min_side=1.0).count(2) == 4


def test_difficult_objects_and_classes_that_are_not_asked_for_give_no_references() -> None:
    objects = list_objects([(0, annotation(("dog", BIG), difficult=(True,)))], CLASSES)
    assert catalogue_of(objects, (2,), 3, 1.0).count(2) == 0
    unseen = catalogue_of(three_pictures(), (0, 1), 3, 1.0)
    assert [unseen.count(label) for label in range(3)] == [1, 1, 0]


def test_a_class_is_asked_for_by_one_over_its_number_of_objects() -> None:
    weights = class_weights(three_pictures(), (1, 2), 3)
    assert weights.tolist() == [0, 1, 0.25]
    present = np.array([2, 1, 2])
    drawn = [draw_label(present, weights, sample_generator(0, 0, n)) for n in range(2000)]
    assert abs(drawn.count(1) / 2000 - 0.8) < 0.03
    assert set(drawn) == {1, 2}


def test_a_class_without_weight_is_never_asked_for() -> None:
    weights = class_weights(three_pictures(), (2,), 3)
    drawn = {draw_label(np.array([0, 2]), weights, sample_generator(0, 0, n)) for n in range(50)}
    assert drawn == {2}


def test_every_reference_of_another_picture_is_drawn_and_none_of_the_own_one() -> None:
    found = catalogue()
    drawn = {draw_crop(found, 2, 5, sample_generator(0, 0, n)) for n in range(100)}
    assert drawn == {2, 3}
    assert {draw_crop(found, 2, 3, sample_generator(0, 0, n)) for n in range(20)} == {4}


def test_the_own_object_is_taken_only_where_there_is_no_other() -> None:
    found = catalogue()
    crop = draw_crop(found, 0, 9, sample_generator(0, 0, 0))
    assert crop == 0
    assert is_of_picture(found, crop, 9)
    assert not is_of_picture(found, crop, 3)


def test_a_class_without_references_is_refused() -> None:
    nothing = catalogue_of(three_pictures(), (1,), 3, 1.0)
    with pytest.raises(ValueError, match="class 2 has no reference crops"):
        draw_crop(nothing, 2, 0, sample_generator(0, 0, 0))


def test_references_of_a_test_picture_are_always_the_same_and_begin_anew_when_they_end() -> None:
    found = catalogue()
    asked = reference_crops(found, 2, 7, 5)
    assert asked == reference_crops(found, 2, 7, 5)
    assert sorted(asked[:3]) == [2, 3, 4]
    assert asked[3:] == asked[:2]
    assert reference_crops(found, 2, 7, 1) == asked[:1]
    assert {tuple(reference_crops(found, 2, id, 3)) for id in range(60)} > {(2, 3, 4), (4, 3, 2)}


def test_a_crop_is_the_pixels_that_the_box_touches_squashed_and_mirrored_if_asked() -> None:
    picture = np.zeros((6, 8, 3), np.uint8)
    picture[1:3, 2:6] = 100
    picture[1:3, 4:6] = 200
    box = np.array([2.4, 1.0, 5.6, 3.0], np.float32)
    crop = cut_crop(picture, box, 4)
    assert crop[:, :, 0].tolist() == [[100, 100, 200, 200]] * 4
    assert np.array_equal(cut_crop(picture, box, 4, flipped=True), crop[:, ::-1])


@pytest.mark.parametrize(
    "box", [(7.9, 5.9, 9.0, 9.0), (-4.0, -4.0, 0.0, 0.0), (20.0, 20.0, 30.0, 30.0)]
)
def test_a_box_at_or_beyond_the_edge_still_has_a_pixel(box: tuple[float, ...]) -> None:
    """Stored pictures may be smaller than annotated (peers' bug 17)."""
    crop = cut_crop(np.full((6, 8, 3), 7, np.uint8), np.array(box, np.float32), 8)
    assert (crop == 7).all()


def test_processes_share_the_catalogue_and_do_not_copy_it() -> None:
    """Memory of each loader process stays flat (peers' bug 11)."""
    found = catalogue()
    ForkingPickler.dumps(found)
    assert all(part.is_shared() for part in (found.sample_ids, found.boxes_xyxy, found.firsts))
