"""One-shot batches: a picture, a crop of one of its seen classes, the boxes of that class."""

from collections.abc import Sequence
from contextlib import closing
from itertools import islice
from pathlib import Path

import pytest
import torch

import models.one_shot
from data.detection_batches import PackedDetectionBatch, detection_to_device, detection_views
from data.detection_set import DetectionSet
from data.detection_transforms import AugmentSettings
from data.loader import StreamSettings, StreamSource
from data.one_shot_content import MATCHES, OneShotContent, one_shot_set, seen_labels
from data.query_crops import CropSettings, list_objects
from data.reading import ReadingSettings
from data.set_annotations import set_annotations
from data.stream import ExactStream
from tests.data.labelled import CLASSES
from tests.data.one_shot_sets import SCENES, scene_set, told_by
from tests.data.streams import digest

CROPS = CropSettings(side=16, min_side=8.0)
PLAIN = AugmentSettings(kind="none", short_sides=(44,), max_size=64)
CHANGED = AugmentSettings(
    short_sides=(40, 44), max_size=64, crop_short_sides=(40,), crop_sides=(16, 30)
)

Row = tuple[str, str, int, int, str]
"""(key, class of the crop, picture of the crop, boxes, hash of all) of a picture in a batch."""


def prepared(
    data: DetectionSet,
    unseen: Sequence[str] = ("emu",),
    augment: AugmentSettings = PLAIN,
) -> tuple[DetectionSet, OneShotContent]:
    objects = list_objects(set_annotations(data, ReadingSettings()), data.classes)
    return one_shot_set(data, objects, unseen, "keep", CROPS, augment)


def batches(
    data: DetectionSet,
    content: OneShotContent,
    count: int,
    step: int = 0,
    world: int = 1,
    processes: int = 0,
) -> dict[tuple[int, int], Row]:
    """The pictures of `count` global batches of four, by step and place."""
    rows: dict[tuple[int, int], Row] = {}
    source = StreamSource(
        index=data.index, seed=3, global_batch=4, content=content, files=data.files
    )
    for rank in range(world):
        stream = ExactStream(source, StreamSettings(processes=processes), rank, world)
        with closing(stream.from_step(step)) as made:
            for batch in islice(made, count):
                rows |= {(batch.step, place): row for place, row in rows_of(batch)}
    return rows


def rows_of(batch: PackedDetectionBatch) -> list[tuple[int, Row]]:
    views, rows, first = detection_views(batch), [], 0
    for row, (place, key) in enumerate(zip(batch.streams, batch.keys, strict=True)):
        boxes = slice(first, first + batch.box_counts[row])
        first = boxes.stop
        height, width = views.sizes[row].tolist()
        crop = views.query_patches[row, 0]
        parts = (
            views.pictures[row, :height, :width].contiguous(),
            views.boxes_cxcywh[boxes],
            views.labels[boxes],
            crop,
        )
        assert (views.labels[boxes] == MATCHES).all()
        told = told_by(crop.numpy())
        rows.append((place, (key, *told, batch.box_counts[row], digest(*parts))))
    return rows


def test_a_crop_shows_the_class_whose_boxes_are_the_targets_from_another_picture(
    tmp_path: Path,
) -> None:
    rows = batches(*prepared(scene_set(tmp_path)), 12).values()
    for key, name, source, count, _ in rows:
        own = int(key.removeprefix("scene"))
        assert count == [label for label, _ in SCENES[own]].count(name)
        assert source != own
    assert {(row[0], row[1]) for row in rows} == {
        ("scene0", "cat"),
        ("scene0", "dog"),
        ("scene2", "dog"),
        ("scene3", "cat"),
        ("scene5", "cat"),
        ("scene5", "dog"),
    }


def test_unseen_classes_are_neither_targets_nor_crops_and_their_pictures_stay_away(
    tmp_path: Path,
) -> None:
    whole = scene_set(tmp_path)
    data, content = prepared(whole)
    assert whole.index.num_samples == 6
    assert data.index.num_samples == 4
    assert content.catalogue.count(2) == 0
    assert float(content.weights[2]) == 0
    rows = batches(data, content, 12).values()
    assert {row[1] for row in rows} == {"cat", "dog"}
    assert {row[0] for row in rows} == {"scene0", "scene2", "scene3", "scene5"}


def test_batches_are_the_same_for_any_workers_and_after_any_seek(tmp_path: Path) -> None:
    data, content = prepared(scene_set(tmp_path), augment=CHANGED)
    whole = batches(data, content, 5)
    assert batches(data, content, 5, world=2) == whole
    later = {place: row for place, row in whole.items() if place[0] >= 3}
    assert batches(data, content, 2, step=3) == later


def test_loader_processes_make_the_same_batches(tmp_path: Path) -> None:
    data, content = prepared(scene_set(tmp_path), augment=CHANGED)
    assert batches(data, content, 3, processes=2) == batches(data, content, 3)


def test_epochs_ask_anew_and_mirror_half_of_the_crops(tmp_path: Path) -> None:
    rows = batches(*prepared(scene_set(tmp_path)), 10)
    of_one = {row[4] for row in rows.values() if row[0] == "scene0"}
    assert len(of_one) > 2


def test_a_cut_that_leaves_no_box_leaves_a_picture_that_teaches_to_say_no(tmp_path: Path) -> None:
    """Empty targets on one worker neither break nor hang anything (peers' bug 5)."""
    corner = ((("cat", (0, 0, 10, 10)),), (("cat", (2, 0, 12, 10)),))
    tight = CHANGED.model_copy(update={"crop": 1.0, "crop_sides": (16, 16)})
    data, content = prepared(scene_set(tmp_path, corner * 2), augment=tight)
    counts = {row[3] for row in batches(data, content, 8).values()}
    assert counts == {0, 1}


def test_an_only_object_is_its_own_reference_and_that_is_counted(tmp_path: Path) -> None:
    scenes = ((("cat", (2, 2, 20, 22)),), *[(("dog", (2, 2, 20, 22)),)] * 3)
    data, content = prepared(scene_set(tmp_path, scenes))
    source = StreamSource(
        index=data.index, seed=3, global_batch=4, content=content, files=data.files
    )
    with closing(ExactStream(source, StreamSettings(processes=0)).from_step(0)) as made:
        counts = next(made).counts
    assert counts["crops_of_own_picture"] == 1
    assert counts["boxes"] == 4
    assert counts["boxes_not_asked_for"] == 0


def test_a_broken_reference_is_named_with_the_picture_that_it_was_for(tmp_path: Path) -> None:
    scenes = [(("cat", (2, 2, 20, 22)),)] * 4
    data, content = prepared(scene_set(tmp_path, scenes, broken=(1, 2, 3)))
    source = StreamSource(
        index=data.index, seed=3, global_batch=4, content=content, files=data.files
    )
    with closing(ExactStream(source, StreamSettings(processes=0)).from_step(0)) as made:
        batch = next(made)
    assert batch.blank
    reasons = {picture.key: picture.reason for picture in batch.skipped}
    assert set(reasons) == {"scene0", "scene1", "scene2", "scene3"}
    assert reasons["scene0"].startswith("its reference scene")
    assert "its reference" not in reasons["scene1"]


def test_the_device_gets_one_normalised_crop_a_picture(tmp_path: Path) -> None:
    data, content = prepared(scene_set(tmp_path))
    source = StreamSource(
        index=data.index, seed=3, global_batch=4, content=content, files=data.files
    )
    with closing(ExactStream(source, StreamSettings(processes=0)).from_step(0)) as made:
        packed = next(made)
    batch = detection_to_device(packed, torch.device("cpu"))
    assert batch.query_patches is not None
    assert batch.query_patches.shape == (4, 1, 3, 16, 16)
    levels = detection_views(packed).query_patches[0, 0, :, :, 2].float() / 255
    wanted = (levels - 0.406) / 0.225
    torch.testing.assert_close(batch.query_patches[0, 0, 2], wanted)
    assert all((labels == MATCHES).all() for labels in batch.targets.labels)


def test_targets_have_the_label_that_the_model_calls_a_match() -> None:
    assert MATCHES == models.one_shot.MATCHES


def test_an_unseen_class_that_the_data_do_not_have_is_refused() -> None:
    assert seen_labels(CLASSES, ("dog",), "set") == (0, 2)
    with pytest.raises(ValueError, match=r"one_shot\.unseen names 'cow', .* \(cat, dog, emu\)"):
        seen_labels(CLASSES, ("cow",), "set")


def test_a_set_without_anything_to_ask_for_is_refused(tmp_path: Path) -> None:
    data = scene_set(tmp_path)
    with pytest.raises(ValueError, match="no object that can be a query crop: 0 seen classes"):
        prepared(data, unseen=CLASSES.names)
