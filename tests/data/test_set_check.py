"""The check of a labelled set: each fault by file and object, and what was found."""

import json
from pathlib import Path

import pytest
from fsspec.implementations.local import LocalFileSystem
from PIL import Image

from data.annotation_faults import AnnotationFault
from data.detection_set import open_detection_set
from data.index import write_index
from data.indexing import index_shards
from data.set_check import SetReport, check_detection_set, head_faults
from data.set_counts import SetCounts
from data.shards import write_shards
from data.source_items import SourceError
from data.sources import list_source
from models.structures import Classes
from tests.data.labelled_files import (
    Entry,
    box,
    image,
    voc_xml,
    write_devkit,
    write_json,
    write_yolo,
)
from tests.data.small_sources import jpeg, write_coco, write_tar
from tests.servers import S3Store

CLASSES = {1: "ant", 4: "bee"}


def _check_boxes(folder: Path, *sides: list[object]) -> tuple[AnnotationFault, ...]:
    entries = [box(10 + number, 1, 4, one) for number, one in enumerate(sides)]
    path = write_json(folder / "a.json", [image(1, "a.jpg", 9, 7)], entries, CLASSES)
    return check_detection_set(str(path)).faults


def _told(report: SetReport) -> list[tuple[str, str, str, str | None]]:
    return [(one.severity, one.kind, one.file, one.object) for one in report.faults]


def test_a_whole_set_has_no_fault_and_is_described(tmp_path: Path) -> None:
    images = [image(1, "a.jpg", 99, 98), image(2, "b.jpg", 40, 41), image(3, "c.jpg", 40, 50)]
    entries = [
        box(1, 1, 4, (0, 0, 96, 96)),
        box(2, 2, 4, (1, 2, 32, 32)),
        {**box(3, 2, 1, (0, 0, 40, 41)), "iscrowd": 1},
        box(4, 2, 1, (1, 2, 31, 32)),
    ]
    report = check_detection_set(str(write_json(tmp_path / "a.json", images, entries, CLASSES)))
    assert report.faults == ()
    assert (report.kind, report.num_samples, report.classes.ids) == ("coco", 3, (1, 4))
    assert report.counts == SetCounts(
        pictures=3,
        empty=1,
        boxes=4,
        crowds=1,
        difficult=0,
        small=1,
        medium=2,
        large=1,
        most_objects=2,
        most_objects_in="b.jpg",
        widths=(40, 99),
        heights=(41, 98),
        boxes_per_class=(1, 2),
    )


@pytest.mark.parametrize(
    ("sides", "severity", "kind", "problem"),
    [
        ([4, 1, 6.5, 2], "warning", "box outside", "reaches 1.5 px out of the picture of 9 x 7"),
        ([-2, 1, 4, 2], "warning", "box outside", "reaches 2 px out"),
        ([10, 1, 4, 2], "error", "box outside", "lies wholly outside the picture of 9 x 7 pixels"),
        ([1, 1, 0, 2], "warning", "box without area", "has no area"),
        ([9, 1, 4, 2], "warning", "box without area", "has no area in the picture"),
        ([3, 1, -1, 2], "error", "negative size", "ends before it begins"),
        ([1, float("nan"), 2, 2], "error", "not a number", "is not finite"),
        ([1, 1, float("inf"), 2], "error", "not a number", "is not finite"),
        ([1, 1, "2", 2], "error", "not a number", "holds what is not a number"),
        ([1, 1, None, 2], "error", "not a number", "holds what is not a number"),
        ([1, 1, 2], "error", "unreadable annotation", "not .x, y, width, height."),
    ],
)
def test_a_wrong_box_is_named_with_file_object_and_what_becomes_of_it(
    tmp_path: Path, sides: list[object], severity: str, kind: str, problem: str
) -> None:
    whole: list[object] = [0, 0, 9, 7]
    (fault,) = _check_boxes(tmp_path, whole, sides)
    assert (fault.severity, fault.kind, fault.file) == (severity, kind, "a.jpg")
    assert str(fault).startswith("a.jpg, annotation 11")
    assert problem.replace(".x", "[x").replace("height.", "height]") in fault.problem


def test_ids_that_come_twice_or_lead_nowhere_are_named(tmp_path: Path) -> None:
    images = [image(1, "a.jpg"), image(1, "b.jpg"), image(2, "c.jpg"), image(3, "c.jpg")]
    entries = [
        box(7, 2, 4, (1, 1, 2, 2)),
        box(7, 3, 4, (1, 1, 2, 2)),
        box(8, 9, 4, (1, 1, 2, 2)),
        box(9, 3, 5, (1, 1, 2, 2)),
    ]
    path = write_json(tmp_path / "a.json", [*images, image(4, "d.jpg")], entries, CLASSES)
    report = check_detection_set(str(path))
    assert _told(report) == [
        ("error", "duplicate id", "a.jpg", "image 1"),
        ("error", "duplicate id", "b.jpg", "image 1"),
        ("error", "duplicate id", "c.jpg", "image 2"),
        ("error", "duplicate id", "c.jpg", "image 3"),
        ("error", "duplicate id", "c.jpg", "annotation 7"),
        ("error", "no such image", "a.json", "annotation 8"),
        ("error", "unknown class", "c.jpg", "annotation 9"),
    ]
    assert report.counts.pictures == 1


def test_entries_without_what_they_are_of_are_named(tmp_path: Path) -> None:
    """One such entry among thousands made the whole file "no COCO json", for a missing key."""
    entries = [box(number, 1, 4, (1, 1, 2, 2)) for number in (7, 8, 9)]
    del entries[0]["image_id"]
    entries[1]["category_id"] = [4]
    path = write_json(tmp_path / "a.json", [image(1, "a.jpg"), image(2, "b.jpg")], entries, CLASSES)
    assert _told(check_detection_set(str(path), depth="annotations")) == [
        ("error", "no such image", "a.json", "annotation 7"),
        ("error", "unknown class", "a.jpg", "annotation 8"),
    ]


def test_an_image_without_its_size_is_named(tmp_path: Path) -> None:
    path = write_json(tmp_path / "a.json", [image(1, "a.jpg"), image(2, "b.jpg")], [], CLASSES)
    content = json.loads(path.read_text())
    del content["images"][1]["width"]
    path.write_text(json.dumps(content))
    with pytest.raises(SourceError, match=r"image b\.jpg has width None and height \d+; give both"):
        check_detection_set(str(path))


def test_the_entry_of_an_export_that_heads_all_classes_is_told(tmp_path: Path) -> None:
    """Roboflow's id 0 is the data set's own name: learned, it is one class too many."""
    categories: list[Entry] = [
        {"id": 0, "name": "cells", "supercategory": "none"},
        {"id": 1, "name": "red", "supercategory": "cells"},
        {"id": 2, "name": "white", "supercategory": "cells"},
    ]
    path = write_json(
        tmp_path / "a.json", [image(1, "a.jpg")], [box(1, 1, 1, (1, 1, 2, 2))], categories
    )
    (fault,) = check_detection_set(str(path)).warnings
    assert (fault.kind, fault.object) == ("unused class", "category 0 (cells)")
    assert open_detection_set(str(path)).classes.ids == (0, 1, 2)


def test_pictures_are_held_to_their_annotations(tmp_path: Path) -> None:
    names = [f"{letter}.jpg" for letter in "abcdef"]
    images = [image(number, name, 9, 7) for number, name in enumerate(names)]
    path = write_json(tmp_path / "a.json", images, [], CLASSES)
    (tmp_path / "b.jpg").unlink()
    (tmp_path / "c.jpg").write_bytes(jpeg(1, 14, 18))
    (tmp_path / "d.jpg").write_bytes(b"no picture")
    for name, orientation, size in (("e.jpg", 6, (7, 9)), ("f.jpg", 3, (9, 7))):
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.new("RGB", size).save(tmp_path / name, exif=exif)
    assert _told(check_detection_set(str(path))) == [
        ("error", "missing picture", "b.jpg", None),
        ("error", "other size", "c.jpg", None),
        ("error", "unreadable picture", "d.jpg", None),
        ("error", "turned picture", "e.jpg", None),
        ("warning", "turned picture", "f.jpg", None),
    ]
    assert check_detection_set(str(path), depth="annotations").faults == ()


def test_a_file_that_the_storage_refuses_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """S3 answers "forbidden" for what is not there, where the bucket may not be listed."""
    path = write_coco(tmp_path, ["a.jpg", "b.jpg"])
    whole = LocalFileSystem.cat_file

    def refused(self: LocalFileSystem, place: str, **part: int) -> bytes:
        if place.endswith("b.jpg"):
            raise PermissionError("Forbidden")
        data: bytes = whole(self, place, **part)
        return data

    monkeypatch.setattr(LocalFileSystem, "cat_file", refused)
    (fault,) = check_detection_set(str(path)).errors
    assert (fault.kind, fault.file) == ("missing picture", "b.jpg")
    assert fault.problem.endswith("where its folder may not be listed (Forbidden)")


def test_a_cut_picture_is_found_only_by_its_pixels(tmp_path: Path) -> None:
    path = write_json(tmp_path / "a.json", [image(1, "a.jpg", 90, 70)], [], CLASSES)
    whole = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(whole[: len(whole) // 2])
    assert check_detection_set(str(path)).faults == ()
    (fault,) = check_detection_set(str(path), depth="pixels").faults
    assert fault.kind == "unreadable picture"


def test_voc_files_are_named_with_the_number_of_the_object(tmp_path: Path) -> None:
    root = write_devkit(tmp_path, {"VOC2012": {"val": ["1", "2", "3", "4"]}})
    annotations = root / "VOC2012/Annotations"
    (annotations / "1.xml").write_text(voc_xml("cow", (3, 3, 1, 5)))
    (annotations / "2.xml").write_text(voc_xml("cow", (3, "x", 4, 5)))
    (annotations / "3.xml").unlink()
    (root / "VOC2012/JPEGImages/4.jpg").unlink()
    report = check_detection_set(f"{root}#12-val")
    assert _told(report) == [
        ("error", "missing picture", "VOC2012/JPEGImages/4.jpg", None),
        ("error", "negative size", "VOC2012/Annotations/1.xml", "object 1 (cow)"),
        ("error", "unreadable annotation", "VOC2012/Annotations/2.xml", None),
        ("error", "missing annotation", "VOC2012/JPEGImages/3.jpg", None),
    ]


def test_shards_are_checked_sample_by_sample(tmp_path: Path) -> None:
    write_shards(list_source(str(write_coco(tmp_path, ["5.jpg", "6.jpg"]))), str(tmp_path / "s"))
    report = check_detection_set(str(tmp_path / "s"))
    assert (report.faults, report.counts.pictures, report.counts.boxes) == ((), 2, 1)
    assert check_detection_set(str(tmp_path / "s"), depth="annotations").counts.pictures == 2
    told = check_detection_set(str(tmp_path / "s"), classes=["person"])
    assert _told(told) == [("error", "unknown class", "shard-000000.tar/6", "box 1")]


def test_a_sample_without_boxes_of_its_own_is_named(tmp_path: Path) -> None:
    write_tar(
        tmp_path / "s" / "a.tar",
        {"1.jpg": jpeg(1), "2.jpg": jpeg(2), "2.json": b'{"class_id": 3}', "3.jpg": jpeg(3)},
    )
    write_index(index_shards(str(tmp_path / "s")))
    assert _told(check_detection_set(str(tmp_path / "s"), classes=["ant"])) == [
        ("error", "missing annotation", "a.tar/1", None),
        ("error", "unreadable annotation", "a.tar/2", None),
        ("error", "missing annotation", "a.tar/3", None),
    ]


def test_labels_that_a_head_takes_for_background_are_named() -> None:
    """label == num_classes is learned as no object by the public code (VOC's tvmonitor)."""
    classes = Classes(("ant", "bee", "cat"), (1, 4, 17))
    assert head_faults("x", classes, 3) == ()
    (fault,) = head_faults("x", classes, 2)
    assert (fault.severity, fault.object) == ("error", "class cat (label 2)")
    assert "leave num_classes out, or say 3" in fault.problem


def test_sets_in_object_storage_are_checked_by_the_heads_of_their_files(
    tmp_path: Path, s3_store: S3Store
) -> None:
    write_json(tmp_path / "coco/a.json", [image(1, "a.jpg"), image(2, "b.jpg")], [], CLASSES)
    (tmp_path / "coco/b.jpg").write_bytes(b"")
    write_devkit(tmp_path / "voc", {"VOC2007": {"test": ["1", "2"]}})
    write_yolo(
        tmp_path / "yolo", {"1": "0 .5 .5 .1 .1", "2": None}, "train: images\nnames: [ant]\n"
    )
    s3_store.upload(tmp_path)
    told = {
        url: [str(fault) for fault in _at(s3_store, url).faults]
        for url in ("coco/a.json", "voc#07-test", "yolo/data.yaml")
    }
    assert told == {
        "coco/a.json": ["b.jpg: the file is empty"],
        "voc#07-test": [],
        "yolo/data.yaml": [],
    }
    assert _at(s3_store, "voc#07-test").counts.pictures == 2
    assert _at(s3_store, "yolo/data.yaml").counts.boxes == 1


def _at(store: S3Store, url: str) -> SetReport:
    return check_detection_set(f"{store.url}/{url}", storage_options=store.storage_options)


def test_progress_counts_every_picture(tmp_path: Path) -> None:
    heard = list[tuple[int, int]]()
    path = write_json(tmp_path / "a.json", [image(1, "a.jpg"), image(2, "b.jpg")], [], CLASSES)
    check_detection_set(str(path), progress=lambda done, total: heard.append((done, total)))
    assert heard == [(1, 2), (2, 2)]


def test_a_json_without_pictures_is_described_not_hidden(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(
        json.dumps({"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}]})
    )
    with pytest.raises(ValueError, match=r"no picture"):
        check_detection_set(str(path), pictures=str(tmp_path))
