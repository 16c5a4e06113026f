"""The exact stream of labelled pictures: equal bits for any workers, of files and of shards."""

import multiprocessing
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch

from data.detection_batches import PackedDetectionBatch, detection_to_device, detection_views
from data.detection_content import DetectionContent
from data.detection_set import DetectionSet, open_detection_set
from data.detection_transforms import AugmentSettings
from data.index import read_index
from data.loader import StreamSettings, StreamSource
from data.loader_processes import StreamError
from data.order import OrderSettings
from data.picture_files import restricted
from data.shards import write_shards
from data.sources import list_source
from data.storage import open_folder
from data.stream import ExactStream
from models.structures import Classes
from tests.data.labelled import files_set
from tests.data.streams import digest
from tests.servers import S3Store

SMALL = AugmentSettings(
    short_sides=(32, 36, 44), max_size=64, crop_short_sides=(40, 50), crop_sides=(24, 40)
)
COCO_AUGMENT = AugmentSettings(
    short_sides=(64, 80, 96), max_size=160, crop_short_sides=(60, 80), crop_sides=(48, 72)
)

Pictures = dict[tuple[int, int], tuple[int, str, str]]
"""(id, key, hash of the pixels, boxes and labels) of each picture by (step, stream)."""

STEPS = 7
"""A global batch of 6: an epoch and two batches of the 30 pictures below, of the 30 of COCO too."""


@pytest.fixture(scope="module")
def coco(shared_data: Path) -> DetectionSet:
    """30 pictures of COCO val2017 as files, with their boxes."""
    whole = open_detection_set(str(shared_data / "coco/annotations/instances_val2017.json"))
    index, files = restricted(whole.index, whole.files, range(0, 150, 5))
    return replace(whole, index=index, files=files)


@pytest.fixture(scope="module")
def coco_shards(
    shared_data: Path, coco: DetectionSet, tmp_path_factory: pytest.TempPathFactory
) -> DetectionSet:
    """30 pictures of COCO val2017 as they lie in shards."""
    url = str(tmp_path_factory.mktemp("coco") / "shards")
    json = str(shared_data / "coco/annotations/instances_val2017.json")
    write_shards(list_source(json, "coco"), url)
    index, _ = restricted(read_index(url), None, range(20, 50))
    return DetectionSet(url, "shards", index, None, coco.classes)


@pytest.fixture(autouse=True)
def _no_process_is_left() -> Iterator[None]:
    yield
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("kind", ["coco", "coco_shards"])
def test_real_batches_are_the_same_bits_for_any_workers_processes_and_seeks(
    kind: str, request: pytest.FixtureRequest
) -> None:
    source = source_of(request.getfixturevalue(kind), COCO_AUGMENT)
    reference = global_batches(source, 0, STEPS)
    assert len(reference) == STEPS * 6
    assert len({look for _, _, look in reference.values()}) == STEPS * 6
    assert global_batches(source, 0, STEPS, world=2, processes=2) == reference
    late = {place: value for place, value in reference.items() if place[0] >= 4}
    assert global_batches(source, 4, STEPS - 4, world=3, processes=1) == late


@pytest.mark.parametrize(("world", "processes"), [(1, 2), (2, 1), (3, 0)])
def test_global_batches_are_the_same_bits_for_any_ranks_and_loader_processes(
    tmp_path: Path, world: int, processes: int
) -> None:
    source = source_of(files_set(tmp_path, 30))
    reference = global_batches(source, 0, STEPS)
    assert global_batches(source, 0, STEPS, world, processes) == reference


def test_a_picture_keeps_its_boxes_and_looks_different_in_every_epoch(tmp_path: Path) -> None:
    pictures = global_batches(source_of(files_set(tmp_path, 30)), 0, 20)
    looks: dict[int, set[str]] = {}
    for id, key, look in pictures.values():
        assert key == f"p{id}"
        looks.setdefault(id, set()).add(look)
    # Four epochs; pictures as small as these may look alike by chance in two of them.
    assert sum(len(found) for found in looks.values()) > 0.9 * 4 * 30


def test_a_batch_has_one_final_scale_by_default_and_pictures_their_own_on_request(
    tmp_path: Path,
) -> None:
    data = files_set(tmp_path, 30)

    def scales(order: OrderSettings) -> list[set[int]]:
        flips = SMALL.model_copy(update={"kind": "flip"})
        source = replace(source_of(data, flips), order=order)
        batches = taken(ExactStream(source, StreamSettings(processes=0)))
        sizes = [detection_views(batch).sizes for batch in batches]
        return [set(each.min(dim=1).values.tolist()) & {32, 36, 44} for each in sizes]

    per_batch = scales(OrderSettings())
    assert all(len(found) <= 1 for found in per_batch)
    assert set().union(*per_batch) == {32, 36, 44}
    assert any(len(found) > 1 for found in scales(OrderSettings(scale_per="picture")))


def test_what_is_dropped_is_counted_by_the_stream(tmp_path: Path) -> None:
    stream = ExactStream(source_of(files_set(tmp_path, 30)), StreamSettings(processes=2))
    taken(stream, count=5)
    counted = stream.counters.content
    # Of 30 pictures, 8 have 0 boxes, 8 one, 7 two and 7 three.
    assert counted["boxes"] == 8 + 2 * 7 + 3 * 7
    assert counted["pictures_without_boxes"] == 8
    assert counted["boxes_crowd"] == 0
    assert stream.counters.pictures == 30


def test_a_missing_picture_is_skipped_named_and_nothing_moves_up(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = files_set(tmp_path, 30)
    reference = global_batches(source_of(data), 0, STEPS)
    (tmp_path / "0004.jpg").unlink()
    stream = ExactStream(source_of(data), StreamSettings(processes=2))
    batches = taken(stream, count=STEPS)
    assert pictures_of(batches) == {k: v for k, v in reference.items() if v[0] != 4}
    assert stream.counters.skipped == sum(value[0] == 4 for value in reference.values())
    warned = {record.getMessage() for record in caplog.records}
    assert warned == {"skipped p4 in 0004.jpg: no such file: 0004.jpg"}


def test_picture_files_on_s3_are_the_same_stream_as_on_a_disk(
    tmp_path: Path, s3_store: S3Store
) -> None:
    data = files_set(tmp_path, 30)
    reference = global_batches(source_of(data), 0, STEPS)
    folder = open_folder(f"{s3_store.url}/pictures", s3_store.storage_options)
    for picture in sorted(tmp_path.glob("*.jpg")):
        if picture.name != "0004.jpg":
            folder.filesystem.pipe_file(folder.at(picture.name), picture.read_bytes())
    away = replace(
        source_of(data),
        index=replace(data.index, url=folder.url),
        storage_options=s3_store.storage_options,
    )
    pictures = global_batches(away, 0, STEPS, processes=1)
    assert pictures == {place: value for place, value in reference.items() if value[0] != 4}


def test_too_many_missing_pictures_stop_the_stream_and_say_what_to_run(tmp_path: Path) -> None:
    data = files_set(tmp_path, 12, broken=range(6))
    stream = ExactStream(source_of(data), StreamSettings(processes=0, max_broken_share=0.005))
    with pytest.raises(StreamError, match=f"run `querypatch data check {tmp_path}`"):
        taken(stream, count=9)


@pytest.mark.parametrize("processes", [0, 2])
def test_an_unknown_class_stops_the_stream_with_one_line(tmp_path: Path, processes: int) -> None:
    source = source_of(replace(files_set(tmp_path, 12), classes=Classes(("cat", "dog"), (1, 2))))
    stream = ExactStream(source, StreamSettings(processes=processes))
    with pytest.raises(StreamError, match=r"p\d+ in \d+.jpg has an object of the class 'emu'"):
        taken(stream, count=4)


def test_every_box_of_a_real_batch_lies_in_its_picture(coco: DetectionSet) -> None:
    source = source_of(coco, AugmentSettings())
    (packed,) = taken(ExactStream(source, StreamSettings(processes=0)), count=1)
    batch = detection_to_device(packed, torch.device("cpu"))
    boxes = torch.cat(batch.targets.boxes_cxcywh)
    assert len(boxes) > 6
    corners = torch.cat([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2])
    assert float(corners.min()) > -1e-6
    assert float(corners.max()) < 1 + 1e-6
    assert float(boxes[:, 2:].min()) > 0
    assert max(int(labels.max()) for labels in batch.targets.labels if len(labels)) < 80


def source_of(
    data: DetectionSet, augment: AugmentSettings = SMALL
) -> StreamSource[PackedDetectionBatch]:
    """Batches of 6 pictures."""
    return StreamSource(
        index=data.index,
        seed=5,
        global_batch=6,
        content=DetectionContent(data.classes, "keep", augment),
        files=data.files,
    )


def global_batches(
    source: StreamSource[PackedDetectionBatch],
    step: int,
    count: int,
    world: int = 1,
    processes: int = 0,
) -> Pictures:
    """The pictures of `count` global batches, of all ranks together."""
    pictures: Pictures = {}
    for rank in range(world):
        stream = ExactStream(source, StreamSettings(processes=processes), rank, world)
        pictures |= pictures_of(taken(stream, step, count))
    return pictures


def taken(
    stream: ExactStream[PackedDetectionBatch], step: int = 0, count: int = 10
) -> list[PackedDetectionBatch]:
    with closing(stream.from_step(step)) as batches:
        return list(islice(batches, count))


def pictures_of(batches: list[PackedDetectionBatch]) -> Pictures:
    """Every picture of the batches, without its padding."""
    pictures: Pictures = {}
    for batch in batches:
        views = detection_views(batch)
        boxes = views.boxes_cxcywh.split(batch.box_counts)
        labels = views.labels.split(batch.box_counts)
        for row, stream in enumerate(batch.streams):
            height, width = views.sizes[row].tolist()
            look = digest(views.pictures[row, :height, :width], boxes[row], labels[row])
            pictures[batch.step, stream] = (int(views.ids[row]), batch.keys[row], look)
    return pictures
