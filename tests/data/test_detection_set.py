"""Labelled sets: one form for COCO, VOC, YOLO and shards; ids and names that come back."""

import json
from pathlib import Path

import fsspec
import pytest

from data.annotations import BoxAnnotation, parse_annotation
from data.coco_source import list_coco
from data.detection_set import DetectionSet, aligned, open_detection_set
from data.index import ShardIndexError, index_digest
from data.picture_files import open_reader
from data.ranges import sample_ranges
from data.reading import ReadingSettings
from data.shards import write_shards
from data.source_items import SourceError
from data.sources import list_source
from data.storage import open_folder
from models.structures import Classes
from tests.data.labelled_files import box, image, voc_xml, write_devkit, write_json, write_yolo
from tests.data.small_sources import jpeg, write_coco, write_pictures

SPARSE = {17: "cat", 1: "person", 4: "bus"}


def annotations_of(data: DetectionSet) -> list[BoxAnnotation]:
    reader = open_reader(data.index, data.files, data.storage_options, ReadingSettings())
    ranges = sample_ranges(data.index, range(data.index.num_samples), max_range_mb=1)
    return [
        parse_annotation(sample.parts["json"])
        for wanted in ranges
        for sample in reader.samples(wanted)
    ]


def test_sparse_ids_become_labels_without_gaps_and_come_back(tmp_path: Path) -> None:
    """Peers' bug 8, in: label n stands for `ids[n]`; predictions take the way back."""
    path = write_json(
        tmp_path / "a.json",
        [image(7, "a.jpg"), image(9, "b.jpg")],
        [box(1, 7, 17, (1, 2, 3, 4)), box(2, 7, 1, (0, 0, 2, 2)), box(3, 9, 4, (2, 1, 1, 3))],
        SPARSE,
    )
    data = open_detection_set(str(path))
    assert data.classes == Classes(("person", "bus", "cat"), (1, 4, 17))
    assert data.kind == "coco"
    assert [one.labels for one in annotations_of(data)] == [(17, 1), (4,)]
    labels = [
        [data.classes.names.index(name) for name in one.names] for one in annotations_of(data)
    ]
    assert labels == [[2, 0], [1]]
    assert [[data.classes.ids[label] for label in row] for row in labels] == [[17, 1], [4]]


def test_classes_without_any_box_stay_classes(tmp_path: Path) -> None:
    """Peers' bug 7's cause: COCO's official 80 are not all in every part of it."""
    path = write_json(tmp_path / "a.json", [image(1, "a.jpg")], [], SPARSE)
    assert open_detection_set(str(path)).classes.ids == (1, 4, 17)


def test_the_sizes_of_picture_files_are_in_the_index(tmp_path: Path) -> None:
    images = [image(1, "b.jpg", width=11, height=5), image(2, "a.jpg", width=3, height=8)]
    data = open_detection_set(str(write_json(tmp_path / "a.json", images, [], SPARSE)))
    assert data.index.shards[0].widths.tolist() == [3, 11]
    assert data.index.shards[0].heights.tolist() == [8, 5]


@pytest.mark.parametrize(
    ("categories", "complaint"),
    [
        ([], "has annotations but no categories"),
        ([{"id": "1", "name": "cat"}], r"category 'cat' has id '1'; ids are integers"),
        ([{"id": True, "name": "cat"}], r"category 'cat' has id True; ids are integers"),
        ([{"id": 1, "name": "cat"}, {"id": 1, "name": "dog"}], "2 categories have the id 1"),
        ([{"id": 1, "name": "cat"}, {"id": 2, "name": "cat"}], "2 categories have the name 'cat'"),
        ([{"id": 1}], "is no COCO detection json .KeyError: 'name'"),
    ],
)
def test_categories_that_cannot_be_told_apart_are_refused_in_one_line(
    tmp_path: Path, categories: list[dict[str, object]], complaint: str
) -> None:
    path = write_json(
        tmp_path / "a.json", [image(1, "a.jpg")], [box(1, 1, 1, (1, 1, 2, 2))], categories
    )
    with pytest.raises(SourceError, match=complaint) as refusal:
        open_detection_set(str(path))
    assert "\n" not in str(refusal.value)


def test_an_image_id_that_predictions_could_not_carry_is_refused(tmp_path: Path) -> None:
    path = write_json(tmp_path / "a.json", [{**image(1, "a.jpg"), "id": 1.5}], [], SPARSE)
    with pytest.raises(SourceError, match=r"image a.jpg has id 1.5; ids are integers or text"):
        open_detection_set(str(path))


def test_a_folder_whose_name_has_the_mark_of_a_split_is_a_folder(tmp_path: Path) -> None:
    root = write_devkit(tmp_path / "VOC#2", {"VOC2012": {"val": ["1"], "train": ["2"]}})
    assert open_detection_set(str(root)).index.num_samples == 2
    assert open_detection_set(f"{root}#val").index.num_samples == 1


def test_an_error_in_the_annotations_is_refused_with_file_object_and_way_out(
    tmp_path: Path,
) -> None:
    path = write_json(
        tmp_path / "a.json",
        [image(1, "a.jpg"), image(2, "b.jpg")],
        [box(5, 1, 3, (1, 1, 2, 2)), box(6, 2, 1, (3, 3, -1, 2))],
        SPARSE,
    )
    with pytest.raises(SourceError) as refusal:
        open_detection_set(str(path))
    assert str(refusal.value) == (
        f"{path}: a.jpg, annotation 5: category_id 3 is not in the list of categories (2 such "
        f"errors; `querypatch data check {path}` names them all)"
    )


def test_polygons_cut_from_the_text_change_nothing_else(tmp_path: Path) -> None:
    """The fast way equals the slow one: what the parser drops, and what stands in strings."""
    entry = {
        **box(1, 1, 1, (1.5, 2, 3, 4)),
        "segmentation": [[1, 2.5, -3e-2, 4], [5, 6]],
        "area": 4.25,
        "note": '"segmentation": [[1, 2]], "bbox": [9, 9, 9, 9]',
        "iscrowd": 0,
    }
    crowd = {
        **box(2, 1, 4, (0, 1, 2, 2)),
        "segmentation": {"counts": [1, 2], "size": [3, 4]},
        "iscrowd": 1,
    }
    path = write_json(
        tmp_path / "a.json", [image(1, '"segmentation": [1].jpg')], [entry, crowd], SPARSE
    )
    (item,) = list_coco(open_folder(str(path)), None).items
    assert parse_annotation(dict(item.parts)["json"]) == BoxAnnotation(
        image_id=1,
        width=9,
        height=7,
        boxes_xyxy=((1.5, 2.0, 4.5, 6.0), (0.0, 1.0, 2.0, 3.0)),
        names=("person", "bus"),
        labels=(1, 4),
        areas=(4.25, 4.0),
        crowd=(False, True),
        difficult=(False, False),
    )
    assert item.name == '"segmentation": [1].jpg'


def test_cocos_pictures_are_found_beside_the_json_too(tmp_path: Path) -> None:
    """Roboflow puts train/_annotations.coco.json among the pictures."""
    path = write_json(
        tmp_path / "train" / "_annotations.coco.json", [image(1, "a.jpg")], [], SPARSE
    )
    data = open_detection_set(str(path))
    reader = open_reader(data.index, data.files, {}, ReadingSettings())
    (sample,) = reader.samples(sample_ranges(data.index, [0], 1)[0])
    assert sample.parts["jpg"] == jpeg(0)


def test_voc_names_its_splits_by_year_and_list(tmp_path: Path) -> None:
    root = write_devkit(
        tmp_path / "VOCdevkit",
        {
            "VOC2007": {"trainval": ["000001", "000005"], "test": ["000002"]},
            "VOC2012": {"trainval": ["2008_3"], "train": ["2008_3"], "val": ["2009_4"]},
        },
    )
    keys = {
        "#07+12-trainval": ["VOC2007_000001", "VOC2007_000005", "VOC2012_2008_3"],
        "#07-trainval": ["VOC2007_000001", "VOC2007_000005"],
        "#12-trainval": ["VOC2012_2008_3"],
        "#07-test": ["VOC2007_000002"],
        "#val": ["VOC2012_2009_4"],
        "/VOC2012#val": ["2009_4"],
        "/VOC2012#12-val": ["2009_4"],
        "/VOC2007/ImageSets/Main/test.txt": ["000002"],
    }
    for split, expected in keys.items():
        data = open_detection_set(f"{root}{split}")
        assert data.kind == "voc"
        assert data.files is not None
        assert [data.files.item(id).key for id in range(len(expected))] == expected
        assert data.classes.names[9] == "cow"
        assert data.classes.ids == tuple(range(1, 21))


@pytest.mark.parametrize("split", ["12-test", "07+12-val", "07-", "13-trainval", "cow_val"])
def test_a_split_that_is_not_there_is_refused_with_those_that_are(
    tmp_path: Path, split: str
) -> None:
    root = write_devkit(
        tmp_path, {"VOC2007": {"test": ["1"]}, "VOC2012": {"trainval": ["2"], "val": ["3"]}}
    )
    with pytest.raises(SourceError, match=f"has no split '{split.replace('+', '.')}'") as refusal:
        open_detection_set(f"{root}#{split}")
    assert "it has 07-test, 12-trainval, 12-val" in str(refusal.value)


def test_ones_own_voc_classes_are_numbered_by_the_alphabet_or_as_said(tmp_path: Path) -> None:
    root = write_devkit(tmp_path, {"VOC2012": {"val": ["1", "2"]}})
    (root / "VOC2012/Annotations/1.xml").write_text(voc_xml("yak", (1, 1, 4, 5)))
    assert open_detection_set(str(root)).classes == Classes(("cow", "yak"), (1, 2))
    told = open_detection_set(str(root), classes=["yak", "cow", "gnu"]).classes
    assert told == Classes(("yak", "cow", "gnu"), (1, 2, 3))
    with pytest.raises(SourceError, match=r"Annotations/2.xml: class 'cow' is not one of"):
        open_detection_set(str(root), classes=["yak"])


def test_difficult_objects_keep_their_mark(tmp_path: Path) -> None:
    root = write_devkit(tmp_path, {"VOC2012": {"val": ["1"]}})
    (root / "VOC2012/Annotations/1.xml").write_text(voc_xml("cow", (1, 1, 4, 5), difficult=1))
    assert annotations_of(open_detection_set(str(root)))[0].difficult == (True,)


def test_a_voc_test_set_without_answers_is_refused(tmp_path: Path) -> None:
    root = write_devkit(tmp_path, {"VOC2012": {"test": ["1"]}})
    (root / "VOC2012/Annotations/1.xml").unlink()
    with pytest.raises(SourceError, match=r"JPEGImages/1.jpg: has no file in Annotations/"):
        open_detection_set(f"{root}#test")


@pytest.mark.parametrize("kind", ["coco", "voc", "yolo"])
def test_shards_of_a_labelled_set_name_its_classes(tmp_path: Path, kind: str) -> None:
    if kind == "coco":
        source = str(write_coco(tmp_path, ["5.jpg", "6.jpg"]))
    elif kind == "voc":
        source = f"{write_devkit(tmp_path, {'VOC2007': {'test': ['1', '2']}})}#07-test"
    else:
        yaml = "train: images\nnames: {0: ant, 1: bee}\n"
        source = str(write_yolo(tmp_path, {"1": "1 .5 .5 .5 .5\n", "2": None}, yaml))
    files = open_detection_set(source)
    shards = str(tmp_path / "shards")
    write_shards(list_source(source), shards)
    data = open_detection_set(shards)
    assert data.kind == "shards"
    assert data.files is None
    assert data.classes == files.classes

    def by_id(one: BoxAnnotation) -> str:
        return str(one.image_id)

    assert sorted(annotations_of(data), key=by_id) == sorted(annotations_of(files), key=by_id)


def test_shards_without_a_report_are_told_their_classes(tmp_path: Path) -> None:
    write_shards(list_source(str(write_coco(tmp_path, ["5.jpg", "6.jpg"]))), str(tmp_path / "s"))
    (tmp_path / "s" / "report.json").unlink()
    with pytest.raises(SourceError, match=r"do not name their classes .* say classes="):
        open_detection_set(str(tmp_path / "s"))
    told = open_detection_set(str(tmp_path / "s"), classes=["toothbrush", "person"])
    assert told.classes == Classes(("toothbrush", "person"), (1, 2))


def test_the_classes_of_a_class_tree_are_no_classes_of_boxes(tmp_path: Path) -> None:
    write_pictures(tmp_path / "tree", ["n02/1.jpg", "n01/2.jpg"])
    write_shards(list_source(str(tmp_path / "tree")), str(tmp_path / "s"))
    with pytest.raises(SourceError, match="do not name their classes"):
        open_detection_set(str(tmp_path / "s"))


def test_other_annotations_are_another_set(tmp_path: Path) -> None:
    images = [image(1, "a.jpg")]
    one, other = (
        open_detection_set(str(write_json(tmp_path / "a.json", images, [entry], SPARSE)))
        for entry in (box(1, 1, 4, (1, 1, 2, 2)), box(1, 1, 4, (1, 1, 2, 3)))
    )
    assert index_digest(one.index) != index_digest(other.index)


def test_a_set_in_object_storage_is_opened_like_a_local_one(tmp_path: Path) -> None:
    root = write_devkit(tmp_path, {"VOC2007": {"test": ["1", "2"]}})
    filesystem = fsspec.filesystem("memory")
    filesystem.put(str(root), f"/{__name__}/", recursive=True)
    place = f"memory://{__name__}/{tmp_path.name}"
    remote, local = (open_detection_set(f"{url}#07-test") for url in (place, root))
    assert index_digest(remote.index) == index_digest(local.index)
    assert annotations_of(remote) == annotations_of(local)


def test_validation_classes_are_those_of_training_by_name() -> None:
    training = Classes(("cat", "dog", "yak"), (3, 5, 9))
    assert aligned(Classes(("dog", "cat"), (1, 2)), training) == training
    with pytest.raises(SourceError, match=r"training data do not name: emu, gnu; .* cat, dog, yak"):
        aligned(Classes(("emu", "cat", "gnu"), (1, 2, 3)), training)


@pytest.mark.parametrize(
    ("url", "complaint"),
    [
        ("folder", "is no labelled set: name a COCO json, a VOC root"),
        ("gone", "nothing at"),
        ("a.json#val", "kind=coco has no splits to choose by #val"),
    ],
)
def test_what_is_no_labelled_set_is_refused(tmp_path: Path, url: str, complaint: str) -> None:
    write_pictures(tmp_path / "folder", ["1.jpg"])
    write_json(tmp_path / "a.json", [image(1, "a.jpg")], [], SPARSE)
    with pytest.raises(SourceError, match=complaint):
        open_detection_set(str(tmp_path / url))


def test_kinds_and_classes_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    path = write_json(tmp_path / "a.json", [image(1, "a.jpg")], [], SPARSE)
    with pytest.raises(SourceError, match="kind=coco names its own classes"):
        open_detection_set(str(path), classes=["cat"])
    with pytest.raises(ShardIndexError, match=r"has no index.json"):
        open_detection_set(str(tmp_path), kind="shards")
    panoptic = {"images": [], "annotations": [{"segments_info": []}], "categories": []}
    (tmp_path / "p.json").write_text(json.dumps(panoptic))
    with pytest.raises(SourceError, match="say kind=coco_panoptic"):
        open_detection_set(str(tmp_path / "p.json"))


def test_the_real_sets_are_opened_whole(shared_data: Path) -> None:
    coco = open_detection_set(str(shared_data / "coco/annotations/instances_val2017.json"))
    assert (coco.index.num_samples, len(coco.classes.ids), coco.classes.ids[-1]) == (150, 80, 90)
    voc = open_detection_set(f"{shared_data}/VOCdevkit#12-train")
    assert (voc.index.num_samples, voc.classes.names[19], voc.classes.ids[19]) == (
        550,
        "tvmonitor",
        20,
    )
    panoptic = open_detection_set(str(shared_data / "coco/annotations/panoptic_train2017.json"))
    assert (panoptic.kind, panoptic.index.num_samples) == ("coco_panoptic", 100)
    assert panoptic.classes.things is not None
