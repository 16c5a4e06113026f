"""COCO panoptic: the listing, the PNGs, and the content of a training batch."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from data.annotations import AnnotationError, parse_annotation
from data.loader_processes import url_for_processes
from data.panoptic_content import segmented_picture
from data.panoptic_maps import decode_segment_ids, encode_segment_ids, numbered_segments
from data.panoptic_source import list_panoptic
from data.picture_files import pack_files
from data.pictures import BrokenPicture, decode_picture
from data.samples import SEGMENTS_PART
from data.set_check import check_detection_set
from data.source_items import SourceError
from data.storage import open_folder
from models.structures import DetectionBatch
from tests.data.panoptic_batches import first_batch, sample_of
from tests.data.panoptic_sets import panoptic_set, write_panoptic


def test_a_colour_is_an_id_and_back() -> None:
    ids = np.array([[0, 1, 255], [256, 65_536, 2**24 - 1]], np.int32)
    assert decode_segment_ids(encode_segment_ids(ids)).tolist() == ids.tolist()


def test_the_id_is_red_plus_256_green_plus_65536_blue() -> None:
    png = encode_segment_ids(np.array([[3 + 256 * 5 + 65_536 * 7]], np.int32))
    assert decode_picture(png).tolist() == [[[3, 5, 7]]]


def test_segments_are_numbered_as_they_are_asked_for_and_others_are_0() -> None:
    ids = np.array([[9, 9, 300, 5], [0, 7, 300, 301]], np.int32)
    assert numbered_segments(ids, [300, 9, 77]).tolist() == [[2, 2, 1, 0], [0, 0, 1, 0]]
    assert numbered_segments(ids, []).tolist() == [[0] * 4] * 2


def test_a_damaged_png_is_a_broken_picture() -> None:
    with pytest.raises(BrokenPicture):
        decode_segment_ids(b"\x89PNG")


def test_classes_are_things_and_stuff_by_rising_id(tmp_path: Path) -> None:
    """Peers' bug 8: sparse ids stay those of the data."""
    listing = list_panoptic(open_folder(str(write_panoptic(tmp_path, 2))))
    assert listing.classes.names == ("dog", "cat", "sky", "sea")
    assert listing.classes.ids == (4, 17, 180, 200)
    assert listing.classes.things == (True, True, False, False)


def test_boxes_areas_and_sizes_are_those_of_the_segments(tmp_path: Path) -> None:
    listing = list_panoptic(open_folder(str(write_panoptic(tmp_path, 1))))
    (item,) = listing.items
    annotation = parse_annotation(item.annotation)
    assert (item.name, item.segments) == (
        "train2017/000000000000.jpg",
        "panoptic_train2017/000000000000.png",
    )
    ids = decode_segment_ids((tmp_path / str(item.segments)).read_bytes())
    assert annotation.segment_ids is not None
    for id, box, area in zip(
        annotation.segment_ids, annotation.boxes_xyxy, annotation.areas or (), strict=True
    ):
        rows, columns = np.nonzero(ids == id)
        extent = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        assert (box, area) == (tuple(map(float, extent)), float(len(rows)))


def test_the_layouts_of_coco_are_found(tmp_path: Path) -> None:
    path = write_panoptic(tmp_path, 1)
    (tmp_path / "images").mkdir()
    (tmp_path / "train2017").rename(tmp_path / "images" / "train2017")
    (tmp_path / "panoptic_train2017").rename(tmp_path / "annotations" / "panoptic_train2017")
    (item,) = list_panoptic(open_folder(str(path))).items
    assert (tmp_path / item.name).is_file()
    assert (tmp_path / str(item.segments)).is_file()
    (tmp_path / "images").rename(tmp_path / "elsewhere")
    with pytest.raises(SourceError, match="its pictures are neither in"):
        list_panoptic(open_folder(str(path)))
    pictures = open_folder(f"{tmp_path}/elsewhere/train2017")
    elsewhere = list_panoptic(open_folder(str(path)), pictures)
    assert (Path(elsewhere.folder.path) / elsewhere.items[0].name).is_file()


def test_pictures_and_segments_may_lie_on_two_disks(tmp_path: Path) -> None:
    """Nothing is above both but the root: all of them were missing."""
    place = open_folder(str(write_panoptic(tmp_path, 1)))
    pictures, segments = open_folder("/mnt/pictures"), open_folder("/data/segments")
    listing = list_panoptic(place, pictures, segments)
    (item,) = listing.items
    assert listing.folder.at(item.name) == "/mnt/pictures/000000000000.jpg"
    assert item.segments is not None
    assert listing.folder.at(item.segments) == "/data/segments/000000000000.png"
    index, _ = pack_files(listing.folder, listing.items)
    assert (index.url, url_for_processes(index, {}, 1)) == ("/", "/")


def test_the_check_looks_at_the_segments_of_each_picture_too(tmp_path: Path) -> None:
    place = write_panoptic(tmp_path, 2)
    first, second = sorted((tmp_path / "panoptic_train2017").iterdir())
    first.unlink()
    second.write_bytes(encode_segment_ids(np.zeros((3, 5), np.int32)))
    found = check_detection_set(str(place)).errors
    assert [(fault.kind, fault.file.rpartition("/")[2]) for fault in found] == [
        ("missing picture", first.name),
        ("other size", second.name),
    ]


def test_faults_are_named_by_file_and_segment_and_their_pictures_left_out(tmp_path: Path) -> None:
    path = write_panoptic(tmp_path, 4)
    data = json.loads(path.read_text())
    data["annotations"][0]["segments_info"][1]["category_id"] = 3
    data["annotations"][1]["segments_info"][2]["id"] = 1_000_001
    data["annotations"][2]["segments_info"][3]["bbox"] = [80, 2, 5, 5]
    del data["annotations"][3]
    path.write_text(json.dumps(data))
    listing = list_panoptic(open_folder(str(path)))
    assert listing.items == ()
    assert [str(fault) for fault in listing.faults] == [
        "000000000000.jpg, segment 70000: category_id 3 is none of the 4 there",
        "000000000001.jpg, segment 1000001: its id must come once, and be from 1 to 2^24 - 1",
        "000000000002.jpg, segment 301: box (80, 2, 85, 7) lies wholly outside the picture of "
        "64 x 48 pixels",
        "000000000003.jpg: image 3 has no segments in the json; it is left out",
    ]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("{", "is no JSON"),
        ('{"images": [], "annotations": [{"bbox": 1}]}', "no segments_info"),
        ('{"images": [], "annotations": [{"image_id": 1, "segments_info": []}]}', "KeyError"),
    ],
)
def test_another_json_is_an_error_in_one_line(tmp_path: Path, content: str, complaint: str) -> None:
    path = write_panoptic(tmp_path, 1)
    path.write_text(content)
    with pytest.raises(SourceError, match=complaint) as raised:
        list_panoptic(open_folder(str(path)))
    assert "\n" not in str(raised.value)


def test_a_target_is_the_segment_of_its_number_and_crowds_are_none(tmp_path: Path) -> None:
    data = panoptic_set(tmp_path, 3)
    boxed = segmented_picture(sample_of(data, 2), data.classes)
    assert boxed.segments is not None
    # The crowd of dogs is dropped: its pixels belong to no target.
    assert sorted(boxed.labels.tolist()) == [1, 2, 3]
    assert (boxed.segments == 0).sum() == 16 * 20
    check_boxes_frame_segments(boxed.boxes_xyxy, boxed.segments)


@pytest.mark.parametrize("kind", ["none", "flip", "detr"])
def test_segments_follow_their_boxes_through_every_augmentation(tmp_path: Path, kind: str) -> None:
    """Peers' bug 14: nothing that is mirrored or cut loses its label or its mask."""
    data = panoptic_set(tmp_path, 6)
    batch = first_batch(data, kind)
    assert batch.segments is not None
    checked = 0
    for row in range(len(batch.keys)):
        height, width = batch.images.sizes[row].tolist()
        boxes, labels = batch.targets.boxes_cxcywh[row], batch.targets.labels[row]
        segments = batch.segments[row]
        assert not segments[height:].any()
        assert not segments[:, width:].any()
        assert int(segments.max()) == len(labels)
        for number, (box, label) in enumerate(zip(boxes.tolist(), labels.tolist(), strict=True)):
            mask = segments == number + 1
            columns = mask.nonzero()[:, 1]
            left, right = (box[0] - box[2] / 2) * width, (box[0] + box[2] / 2) * width
            assert abs(left - int(columns.min())) <= 2
            assert abs(right - int(columns.max()) - 1) <= 2
            assert colour_class(batch, row, mask) == label
            checked += 1
    assert checked >= 8


def test_a_png_of_another_size_skips_its_picture(tmp_path: Path) -> None:
    data = panoptic_set(tmp_path, 1)
    sample = sample_of(data, 0)
    png = encode_segment_ids(np.zeros((3, 5), np.int32))
    wrong = replace(sample, parts={**sample.parts, SEGMENTS_PART: png})
    with pytest.raises(BrokenPicture, match="64 x 48 pixels, and its segments 5 x 3"):
        segmented_picture(wrong, data.classes)


def test_boxes_without_segments_are_an_error_that_names_the_way_out(tmp_path: Path) -> None:
    data = panoptic_set(tmp_path, 1)
    sample = sample_of(data, 0)
    parts = {name: part for name, part in sample.parts.items() if name != SEGMENTS_PART}
    with pytest.raises(AnnotationError, match="kind=coco_panoptic"):
        segmented_picture(replace(sample, parts=parts), data.classes)


def colour_class(batch: DetectionBatch, row: int, mask: torch.Tensor) -> int:
    """The label that the colour in the middle of the mask's pixels tells."""
    mean = torch.tensor([0.485, 0.456, 0.406])
    std = torch.tensor([0.229, 0.224, 0.225])
    levels = batch.images.pixels[row].permute(1, 2, 0)[mask].median(0).values * std + mean
    colours = torch.tensor([(240, 220, 30), (230, 40, 40), (150, 220, 250), (20, 60, 200)]) / 255
    return int((colours - levels).abs().sum(1).argmin())


def check_boxes_frame_segments(boxes: np.ndarray, segments: np.ndarray) -> None:
    for number, box in enumerate(boxes.tolist()):
        rows, columns = np.nonzero(segments == number + 1)
        extent = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        assert box == extent
