"""Panoptic quality, by hand (Kirillov et al., CVPR 2019; panopticapi for void and crowds)."""

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data.annotations import parse_annotation
from data.panoptic_source import PanopticListing, list_panoptic
from data.storage import open_folder
from finetune.panoptic_evaluation import renamed_map, true_map
from finetune.panoptic_quality import (
    PanopticMap,
    PanopticQuality,
    Quality,
    panoptic_quality,
    picture_quality,
    quality_table,
)
from models.structures import Classes

CLASSES = Classes(("cat", "dog", "sky", "sea"), (1, 4, 17, 200), (True, True, False, False))
CAT, DOG, SKY, SEA = range(4)
PERFECT = Quality(1.0, 1.0, 1.0)
NONE = Quality(0.0, 0.0, 0.0)


def test_a_picture_with_one_hit_one_miss_and_one_mistake() -> None:
    truth = drawn(["aaaabbbb"], a=CAT, b=DOG)
    found = drawn(["aaabbbbb"], a=CAT, b=SKY)
    quality = judged((truth, found))
    # The cat: 3 of 4 pixels. The dog is missed, and the sky is a mistake.
    assert quality.by_class == {
        "cat": Quality(0.75, 0.75, 1.0),
        "dog": NONE,
        "sky": NONE,
    }
    assert quality.all == Quality(0.25, 0.25, 1 / 3)
    assert quality.things == Quality(0.375, 0.375, 0.5)
    assert quality.stuff == NONE


def test_an_iou_of_exactly_one_half_is_no_match() -> None:
    truth, found = drawn(["aaaa"], a=CAT), drawn(["aa.."], a=CAT)
    assert judged((truth, found)).by_class["cat"] == NONE
    barely = drawn(["aaa."], a=CAT)
    assert judged((truth, barely)).by_class["cat"] == Quality(0.75, 0.75, 1.0)


def test_another_class_never_matches() -> None:
    quality = judged((drawn(["aaaa"], a=CAT), drawn(["aaaa"], a=DOG)))
    assert quality.by_class == {"cat": NONE, "dog": NONE}


def test_void_pixels_do_not_count_in_the_union() -> None:
    truth, found = drawn(["aaa....."], a=CAT), drawn(["aaaaaa.."], a=CAT)
    assert judged((truth, found)).by_class["cat"] == PERFECT


def test_a_segment_that_lies_more_than_half_on_void_is_no_mistake() -> None:
    truth = drawn(["aabb...."], a=CAT, b=SKY)
    excused = drawn(["aabbccc."], a=CAT, b=SKY, c=DOG)
    assert "dog" not in judged((truth, excused)).by_class
    half = drawn(["aaccccbb"], a=CAT, b=SKY, c=DOG)
    assert judged((truth, half)).by_class["dog"] == NONE


def test_a_crowd_is_neither_missed_nor_matched_and_excuses_its_own_class_alone() -> None:
    truth = drawn(["aaaabbbb"], crowd="a", a=CAT, b=SKY)
    assert judged((truth, drawn(["....bbbb"], b=SKY))).by_class == {"sky": PERFECT}
    cat_on_crowd = drawn(["aaaabbbb"], a=CAT, b=SKY)
    assert judged((truth, cat_on_crowd)).by_class == {"sky": PERFECT}
    dog_on_crowd = drawn(["aaaabbbb"], a=DOG, b=SKY)
    assert judged((truth, dog_on_crowd)).by_class["dog"] == NONE


def test_void_and_crowd_together_excuse_a_segment() -> None:
    truth = drawn(["aa.bbb"], crowd="a", a=CAT, b=SKY)
    found = drawn(["aaaaa."], a=CAT)
    # 2 pixels on the crowd, 1 on void, 2 on the sky: 3 of 5.
    assert "cat" not in judged((truth, found)).by_class


def test_pq_is_sq_times_rq_and_is_summed_over_pictures_before_it_is_divided() -> None:
    first = (drawn(["aaaa"], a=CAT), drawn(["aaa."], a=CAT))
    second = (drawn(["aabb"], a=CAT, b=CAT), drawn(["aa.."], a=CAT))
    quality = judged(first, second).by_class["cat"]
    # 2 matches of IoU 0.75 and 1, one miss.
    assert quality == Quality(1.75 / 2.5, 1.75 / 2, 2 / 2.5)
    assert quality.pq == pytest.approx(quality.sq * quality.rq)


def test_classes_that_do_not_occur_count_in_no_mean() -> None:
    quality = judged((drawn(["aa"], a=CAT), drawn(["aa"], a=CAT)))
    assert (quality.all, quality.stuff) == (PERFECT, None)
    assert set(quality.metrics()) == {"pq", "sq", "rq", "pq_things", "sq_things", "rq_things"}
    assert quality_table(quality).splitlines()[3].split() == ["stuff", "-", "-", "-"]


def test_nothing_there_and_nothing_found_has_no_numbers() -> None:
    void = drawn([".."])
    quality = judged((void, void))
    assert (quality.pictures, quality.all, quality.metrics()) == (1, None, {})


def test_the_numbers_do_not_depend_on_who_judged_which_picture() -> None:
    rng = np.random.default_rng(0)
    pairs = [(random_map(rng), random_map(rng)) for _ in range(30)]
    parts = [picture_quality(id, *pair) for id, pair in enumerate(pairs)]
    shuffled = random.Random(1).sample(parts, len(parts))
    assert panoptic_quality(shuffled, CLASSES) == panoptic_quality(parts, CLASSES)


def test_the_fast_way_equals_the_definition_on_random_maps() -> None:
    rng = np.random.default_rng(2)
    for id in range(40):
        truth, found = random_map(rng, with_crowd=True), random_map(rng)
        fast = picture_quality(id, truth, found)
        slow = counted_by_definition(truth, found)
        for row, label in enumerate(fast.labels.tolist()):
            counts = (
                int(fast.true_positives[row]),
                int(fast.false_positives[row]),
                int(fast.false_negatives[row]),
            )
            assert (*counts, pytest.approx(fast.iou[row])) == slow[label]


def test_maps_of_two_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(3, 1\) pixels, the found ones \(2, 1\)"):
        picture_quality(0, drawn(["aaa"], a=CAT), drawn(["aa"], a=CAT))


def test_segments_of_classes_that_the_data_lack_become_void() -> None:
    found = drawn(["aabb.c"], a=CAT, b=DOG, c=SKY)
    renamed = renamed_map(found, [2, -1, 0, 1])
    assert renamed.numbers.tolist() == [[1, 1, 0, 0, 0, 2]]
    assert renamed.labels.tolist() == [2, 0]


def test_real_truth_judged_by_itself_is_perfect_and_a_lost_segment_costs_what_it_should(
    shared_data: Path,
) -> None:
    listing = list_panoptic(open_folder(f"{shared_data}/coco/annotations/panoptic_val2017.json"))
    truths = [real_map(listing, place) for place in range(12)]
    itself = [
        picture_quality(id, truth, replace(truth, crowd=np.zeros_like(truth.crowd)))
        for id, truth in enumerate(truths)
    ]
    quality = panoptic_quality(itself, listing.classes)
    assert quality.all == quality.things == quality.stuff == PERFECT

    people = sum(int(((t.labels == 0) & ~t.crowd).sum()) for t in truths)
    lost = [without_first_person(truth) for truth in truths]
    num_lost = sum(len(t.labels) - len(f.labels) for t, f in zip(truths, lost, strict=True))
    parts = [picture_quality(n, t, f) for n, (t, f) in enumerate(zip(truths, lost, strict=True))]
    person = panoptic_quality(parts, listing.classes).by_class["person"]
    matched = people - num_lost
    assert num_lost > 3
    recall = matched / (matched + num_lost / 2)
    assert [person.pq, person.sq, person.rq] == pytest.approx([recall, 1.0, recall])


def drawn(rows: list[str], crowd: str = "", **labels: int) -> PanopticMap:
    """A letter for each pixel, a dot for void."""
    letters = list(labels)
    numbers = [[letters.index(pixel) + 1 if pixel != "." else 0 for pixel in row] for row in rows]
    return PanopticMap(
        numbers=np.array(numbers, np.int16),
        labels=np.array(list(labels.values()), np.int64),
        crowd=np.array([letter in crowd for letter in letters], bool),
    )


def judged(*pairs: tuple[PanopticMap, PanopticMap]) -> PanopticQuality:
    parts = [picture_quality(id, truth, found) for id, (truth, found) in enumerate(pairs)]
    return panoptic_quality(parts, CLASSES)


def random_map(rng: np.random.Generator, with_crowd: bool = False) -> PanopticMap:
    """Vertical bands, so that segments overlap well now and then."""
    bounds = np.sort(rng.integers(0, 31, 5))
    bands = np.repeat(np.arange(6), np.diff([0, *bounds, 30]))
    present = np.unique(bands[bands > 0])
    numbers = np.searchsorted(present, bands) + (bands > 0)
    return PanopticMap(
        numbers=np.tile(np.where(bands > 0, numbers, 0), (3, 1)).astype(np.int16),
        labels=rng.integers(0, 2, len(present)),
        crowd=(rng.random(len(present)) < 0.2) & with_crowd,
    )


def counted_by_definition(
    truth: PanopticMap, found: PanopticMap
) -> dict[int, tuple[int, int, int, float]]:
    """Pair by pair and mask by mask, as the paper tells it."""
    counts = {label: [0, 0, 0, 0.0] for label in (*truth.labels.tolist(), *found.labels.tolist())}
    void = truth.numbers == 0
    hit_truths, hit_founds = set(), set()
    for t, label in enumerate(truth.labels.tolist()):
        for f, other in enumerate(found.labels.tolist()):
            true_mask, found_mask = truth.numbers == t + 1, found.numbers == f + 1
            union = (true_mask | (found_mask & ~void)).sum()
            iou = (true_mask & found_mask).sum() / union
            if label == other and not truth.crowd[t] and iou > 0.5:
                hit_truths.add(t)
                hit_founds.add(f)
                counts[label][0] += 1
                counts[label][3] += iou
    for t, label in enumerate(truth.labels.tolist()):
        counts[label][2] += t not in hit_truths and not truth.crowd[t]
    for f, label in enumerate(found.labels.tolist()):
        mask = found.numbers == f + 1
        crowds = np.isin(truth.numbers, np.flatnonzero(truth.crowd & (truth.labels == label)) + 1)
        excused = (mask & (void | crowds)).sum() / mask.sum() > 0.5
        counts[label][1] += f not in hit_founds and not excused
    return {label: (tp, fp, fn, iou) for label, (tp, fp, fn, iou) in counts.items()}


def real_map(listing: PanopticListing, place: int) -> PanopticMap:
    item = listing.items[place]
    png = Path(listing.folder.path, str(item.segments)).read_bytes()
    return true_map(parse_annotation(item.annotation), png, listing.classes)


def without_first_person(truth: PanopticMap) -> PanopticMap:
    """Its pixels become void, which is nothing found."""
    people = np.flatnonzero((truth.labels == 0) & ~truth.crowd)
    none = np.zeros(len(truth.labels), bool)
    if not len(people):
        return PanopticMap(truth.numbers, truth.labels, none)
    labels = np.arange(len(truth.labels))
    numbered = PanopticMap(truth.numbers, labels, none)
    kept = [-1 if place == people[0] else place for place in labels.tolist()]
    renamed = renamed_map(numbered, kept)
    return PanopticMap(renamed.numbers, truth.labels[renamed.labels], renamed.crowd)
