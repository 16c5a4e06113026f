"""Batches for evaluation: every picture once, like aspects together, annotations as stored."""

import multiprocessing
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from data.detection_set import DetectionSet, open_detection_set
from data.evaluation_batches import (
    EvaluationBatch,
    EvaluationSizes,
    evaluation_batches,
    like_aspects,
)
from data.loader_processes import StreamError
from data.normalise import IMAGENET_MEAN
from data.pictures import decode_picture, resize
from data.reading import ReadingSettings
from tests.data.labelled import CLASSES, files_set
from tests.data.tars import plain_index, write_shards

SMALL = EvaluationSizes(short_side=32, max_size=48)


@pytest.fixture(autouse=True)
def _no_process_is_left() -> Iterator[None]:
    yield
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("processes", [0, 1, 3])
def test_every_picture_comes_once_whatever_the_processes(tmp_path: Path, processes: int) -> None:
    data = files_set(tmp_path, 11)
    batches = evaluated(data, range(11), 3, processes)
    assert [len(batch.keys) for batch in batches] == [3, 3, 3, 2]
    ids = [id for batch in batches for id in batch.sample_ids.tolist()]
    assert sorted(ids) == list(range(11))
    assert [key for batch in batches for key in batch.keys] == [f"p{id}" for id in ids]
    expected = evaluated(data, range(11), 3, 0)
    assert all(
        torch.equal(one.images.pixels, other.images.pixels)
        for one, other in zip(batches, expected, strict=True)
    )


def test_annotations_and_sizes_are_those_of_the_stored_picture(tmp_path: Path) -> None:
    data = files_set(tmp_path, 11)
    for batch in evaluated(data, [7, 2, 3], 2, 0):
        for row, id in enumerate(batch.sample_ids.tolist()):
            annotation = batch.annotations[row]
            assert batch.stored_sizes[row].tolist() == [annotation.height, annotation.width]
            assert annotation.names == (CLASSES.names[id % 3],) * (id % 4)
            assert annotation.boxes_xyxy[:1] == ((1.0, 2.0, 9.5, 20.25),)[: id % 4]


def test_pictures_have_the_size_of_the_evaluation_and_its_pixels(tmp_path: Path) -> None:
    data = files_set(tmp_path, 3)
    (batch,) = evaluated(data, [1], 4, 0)
    height, width = batch.images.sizes[0].tolist()
    assert min(height, width) == 32 or max(height, width) <= 49
    picture = decode_picture((tmp_path / "0001.jpg").read_bytes())
    level = resize(picture, height, width)[5, 6, 0] / 255
    expected = (float(level) - IMAGENET_MEAN[0]) / 0.229
    assert float(batch.images.pixels[0, 0, 5, 6]) == pytest.approx(expected, abs=1e-5)
    assert not batch.images.padding.any()


def test_pictures_of_like_aspect_come_together() -> None:
    index = plain_index((40, 30))
    batches = like_aspects(index, range(70), 8)
    assert sorted(id for batch in batches for id in batch) == list(range(70))
    aspects = np.concatenate([shard.widths / shard.heights for shard in index.shards])
    ordered = aspects[[id for batch in batches for id in batch]]
    assert (np.diff(ordered) >= 0).all()


@pytest.mark.parametrize(
    ("ids", "batch_size", "message"),
    [([0], 0, "batch_size=0 is not a batch"), ([3, 70], 2, "samples 3 to 70 are not all in")],
)
def test_what_cannot_be_batched_is_refused(ids: list[int], batch_size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        like_aspects(plain_index((40, 30)), ids, batch_size)


def test_no_ids_are_no_batches(tmp_path: Path) -> None:
    assert evaluated(files_set(tmp_path, 3), [], 4, 2) == []


def test_broken_pictures_are_named_and_the_others_come(tmp_path: Path) -> None:
    data = files_set(tmp_path, 5, broken=(1, 3))
    (tmp_path / "0004.jpg").unlink()
    batches = evaluated(data, range(5), 2, 0)
    skipped = {picture.key: picture.reason for batch in batches for picture in batch.skipped}
    assert set(skipped) == {"p1", "p3", "p4"}
    assert skipped["p4"] == "no such file: 0004.jpg"
    assert sorted(key for batch in batches for key in batch.keys) == ["p0", "p2"]


def test_a_batch_of_broken_pictures_only_has_no_picture(tmp_path: Path) -> None:
    (batch,) = evaluated(files_set(tmp_path, 2, broken=(0, 1)), range(2), 2, 0)
    assert batch.keys == ()
    assert batch.images.pixels.shape[0] == 0
    assert batch.stored_sizes.shape == (0, 2)
    assert len(batch.skipped) == 2


@pytest.mark.parametrize("processes", [0, 2])
def test_pictures_without_annotations_are_one_clear_error(tmp_path: Path, processes: int) -> None:
    index = write_shards(tmp_path, (4,))
    data = DetectionSet(str(tmp_path), "shards", index, None, CLASSES)
    with pytest.raises(StreamError, match="the json of a sample holds no boxes"):
        evaluated(data, range(4), 2, processes)


def test_closing_the_batches_early_ends_the_processes(tmp_path: Path) -> None:
    data = files_set(tmp_path, 30)
    batches = evaluation_batches(
        data, range(30), SMALL, 2, 2, torch.device("cpu"), ReadingSettings()
    )
    assert len(list(islice(batches, 2))) == 2
    assert len(multiprocessing.active_children()) == 2
    with closing(batches):
        pass


def test_a_set_in_memory_is_for_this_process_only(tmp_path: Path) -> None:
    data = files_set(tmp_path, 3)
    away = replace(data, index=replace(data.index, url="memory://pictures"))
    with pytest.raises(ValueError, match="loader processes cannot read it; use processes=0"):
        evaluated(away, range(3), 2, 2)


def test_a_cap_below_the_short_side_is_refused() -> None:
    with pytest.raises(ValueError, match="max_size=700 is less than short_side=800"):
        EvaluationSizes(max_size=700)


def test_real_pictures_of_like_aspect_need_little_padding(shared_data: Path) -> None:
    data = open_detection_set(str(shared_data / "coco/annotations/instances_val2017.json"))
    ids = range(0, 150, 3)
    batches = evaluated(data, ids, 5, 0, EvaluationSizes(short_side=64, max_size=106))
    padding = torch.cat([batch.images.padding.flatten() for batch in batches])
    assert float(padding.float().mean()) < 0.05
    assert sum(len(batch.keys) for batch in batches) == 50
    crowds = sum(sum(each.crowd) for batch in batches for each in batch.annotations)
    assert crowds > 0


def evaluated(
    data: DetectionSet,
    ids: range | list[int],
    batch_size: int,
    processes: int,
    sizes: EvaluationSizes = SMALL,
) -> list[EvaluationBatch]:
    device = torch.device("cpu")
    return list(
        evaluation_batches(data, ids, sizes, batch_size, processes, device, ReadingSettings())
    )
