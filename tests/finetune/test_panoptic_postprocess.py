"""From masks to segments, by hand (DETR, section 4.4)."""

import pytest
import torch
from torch import Tensor

from finetune.panoptic_postprocess import SegmentSettings, merged_segments, panoptic_maps
from finetune.panoptic_quality import PanopticMap
from models.mask_head import PanopticDetector
from models.structures import Classes
from tests.models.panoptic_small import panoptic_detector, two_pictures

THINGS = torch.tensor([True, True, False, False])
CLASSES = Classes(tuple("abcde"), (1, 4, 17, 20, 30), (True, True, True, False, False))


def test_every_pixel_goes_to_the_mask_with_the_highest_logit() -> None:
    logits = torch.tensor([[[3.0, -1.0, 0.0, 2.0]], [[2.0, -0.5, 1.0, 4.0]]])
    found = merged(logits, [0, 0])
    assert found.numbers.tolist() == [[1, 2, 2, 2]]
    assert found.labels.tolist() == [0, 0]
    assert not found.crowd.any()


def test_stuff_of_one_class_becomes_one_segment_with_the_score_of_its_surest_query() -> None:
    logits = torch.tensor([[[9.0, 0, 0, 0]], [[0, 9.0, 0, 0]], [[0, 0, 9.0, 0]], [[0, 0, 0, 9.0]]])
    found = merged(logits, [2, 0, 2, 3], scores=[0.9, 0.91, 0.95, 0.99])
    assert found.numbers.tolist() == [[1, 2, 1, 3]]
    assert found.labels.tolist() == [2, 0, 3]
    assert found.scores is not None
    assert found.scores.tolist() == pytest.approx([0.95, 0.91, 0.99])


def test_things_of_one_class_stay_apart() -> None:
    logits = torch.tensor([[[9.0, 0]], [[0, 9.0]]])
    assert merged(logits, [1, 1]).numbers.tolist() == [[1, 2]]


def test_small_segments_are_taken_out_and_their_pixels_go_to_the_next_best() -> None:
    logits = torch.tensor([[[9.0, 0, 0, 0, 0]], [[5.0, 5, 5, 0, 0]], [[1.0, 1, 1, 1, 1]]])
    assert merged(logits, [0, 1, 0], small=0).numbers.tolist() == [[1, 2, 2, 3, 3]]
    once = merged(logits, [0, 1, 0], small=1)
    assert (once.labels.tolist(), once.numbers.tolist()) == ([1, 0], [[1, 1, 1, 2, 2]])
    assert not merged(logits, [0, 1, 0], small=2).numbers.any()


def test_merged_stuff_keeps_its_pixels_when_another_segment_is_taken_out() -> None:
    """The public code would give the second stuff query's pixels to the thing beside it."""
    sky, other_sky, cat, speck = 2, 2, 0, 1
    logits = torch.tensor(
        [
            [[9.0, 9, 0, 0, 0, 0, 0, 0]],
            [[0, 0, 9.0, 9, 0, 0, 0, 0]],
            [[0, 0, 1.0, 1, 9, 9, 9, 0]],
            [[0, 0, 0.0, 0, 0, 0, 0, 9]],
        ]
    )
    found = merged(logits, [sky, other_sky, cat, speck], small=1)
    assert found.labels.tolist() == [2, 0]
    assert found.numbers[0, :7].tolist() == [1, 1, 1, 1, 2, 2, 2]


def test_stuff_is_small_as_a_whole_and_not_by_query() -> None:
    logits = torch.tensor([[[9.0, 0, 0, 0]], [[0, 9.0, 0, 0]], [[0, 0, 9.0, 9]]])
    assert merged(logits, [2, 2, 0], small=1).numbers.tolist() == [[1, 1, 2, 2]]


def test_where_all_segments_are_small_the_picture_is_void() -> None:
    found = merged(torch.ones(2, 1, 3), [0, 1], small=4)
    assert found.numbers.tolist() == [[0, 0, 0]]
    assert len(found.labels) == 0


def test_areas_are_those_of_the_stored_picture_which_is_sampled_at_the_middles() -> None:
    logits = torch.tensor([[[9.0, 0, 0, 0]], [[0, 1.0, 1, 1]]])
    found = merged(logits, [0, 1], small=4, stored=(2, 2))
    # Of 4 pixels the middles of the new 2 lie on pixels 1 and 3, as Pillow takes them.
    assert (found.labels.tolist(), found.numbers.tolist()) == ([], [[0, 0], [0, 0]])
    larger = merged(logits, [0, 1], small=4, stored=(2, 12))
    assert larger.numbers.tolist() == [[1] * 3 + [2] * 9] * 2


def test_only_sure_queries_take_part_and_void_is_the_rest() -> None:
    model = surely(panoptic_detector(), {0: 1, 2: 3})
    images = two_pictures()
    first, second = panoptic_maps(model, images, [(30, 45), (48, 70)], CLASSES, SegmentSettings())
    assert first.numbers.shape == (30, 45)
    assert second.numbers.shape == (48, 70)
    assert set(first.labels.tolist()) <= {1, 3}
    none = panoptic_maps(
        panoptic_detector().eval(), images, [(30, 45), (48, 70)], CLASSES, SegmentSettings()
    )
    assert [found.numbers.any() for found in none] == [False, False]


def test_a_padded_mask_is_cut_to_its_picture_and_not_stretched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The public code would move the border from column 48 of 70 to 35."""
    halves = torch.full((2, 16, 24), -5.0)
    halves[0, :, :12] = 5
    halves[1, :, 12:] = 5
    model = surely(panoptic_detector(), {0: 1, 1: 0})
    monkeypatch.setattr(model, "masks", lambda source, picture, query: halves[query])
    _, found = panoptic_maps(
        model, two_pictures(), [(64, 96), (48, 70)], CLASSES, SegmentSettings()
    )
    assert found.labels.tolist() == [1, 0]
    assert found.numbers.tolist() == [[1] * 48 + [2] * 22] * 48


def merged(
    logits: Tensor,
    labels: list[int],
    scores: list[float] | None = None,
    small: int = 0,
    stored: tuple[int, int] | None = None,
) -> PanopticMap:
    height, width = logits.shape[1:]
    return merged_segments(
        logits,
        torch.tensor(labels),
        torch.tensor(scores or [0.9] * len(labels)),
        THINGS,
        stored or (height, width),
        small,
    )


def surely(model: PanopticDetector, labels: dict[int, int]) -> PanopticDetector:
    """A detector whose query n is sure of a class, for some; the others are sure of nothing."""
    head = model.detector.class_head

    def answer(_: torch.nn.Module, __: object, said: Tensor) -> Tensor:
        sure = torch.zeros_like(said)
        sure[..., -1] = 20
        for query, label in labels.items():
            sure[..., query, label] = 40
        return sure

    head.register_forward_hook(answer)
    return model.eval()
