"""Which class is which."""

from models.interop.class_names import ALIASES, coco_91, distinct_names, match_names
from models.structures import Classes

VOC = Classes(
    (
        *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
        *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa"),
        *("train", "tvmonitor"),
    ),
    tuple(range(1, 21)),
)


def test_all_of_voc_is_found_among_cocos_91_labels() -> None:
    """By their COCO ids, from COCO's own list."""
    assert match_names(VOC, coco_91()) == (
        *(5, 2, 16, 9, 44, 6, 3, 17, 62, 21, 67, 18, 19, 4, 1, 64, 20, 63, 7, 72),
    )


def test_names_match_by_themselves_before_their_alias_and_whatever_their_case() -> None:
    given = Classes(("tvmonitor", "TV", "person"), (1, 2, 3))
    assert match_names(Classes(("tv", "Person", "ghost"), (7, 8, 9)), given) == (1, 2, None)
    assert match_names(Classes(("tv",), (7,)), Classes(("tvmonitor",), (1,))) == (0,)


def test_cocos_labels_are_its_ids_and_eleven_of_them_are_empty() -> None:
    classes = coco_91()
    assert classes.ids == tuple(range(91))
    empty = [label for label, name in enumerate(classes.names) if name.startswith("N/A")]
    assert empty == [0, 12, 26, 29, 30, 45, 66, 68, 69, 71, 83]
    assert (classes.names[1], classes.names[90]) == ("person", "toothbrush")


def test_a_name_that_comes_twice_is_told_apart_by_its_label() -> None:
    assert distinct_names(["N/A", "cat", "N/A"]) == ("N/A (0)", "cat", "N/A (2)")


def test_six_pairs_of_names_are_aliases() -> None:
    assert sorted(min(pair) for pair in ALIASES) == [
        *("aeroplane", "couch", "dining table", "motorbike", "potted plant", "tv"),
    ]
