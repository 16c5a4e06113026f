"""YOLO's data.yaml: where its pictures and labels are, and what a line of a label file means."""

from pathlib import Path

import pytest
from PIL import Image

from data.annotations import BoxAnnotation, parse_annotation
from data.source_items import PictureFile, Source, SourceError
from data.storage import open_folder
from data.yolo_source import label_path, list_yolo
from tests.data.labelled_files import write_yolo
from tests.data.small_sources import write_pictures

NAMES = "names: {0: ant, 1: bee, 2: cat}\n"


def _list(path: Path, split: str | None = None) -> Source:
    return list_yolo(open_folder(str(path)), split)


def _annotation(source: Source, number: int) -> BoxAnnotation:
    item = source.items[number]
    assert isinstance(item, PictureFile)
    return parse_annotation(dict(item.parts)["json"])


def _names(source: Source) -> list[str]:
    return [item.name for item in source.items]


def test_a_line_is_a_box_in_shares_or_a_polygon(tmp_path: Path) -> None:
    text = "2 0.5 0.25 0.2 0.1\n\n0 .1 .2 .5 .3 .3 .6\n"
    path = write_yolo(tmp_path, {"train/a": text}, f"train: images/train\n{NAMES}")
    assert _annotation(_list(path), 0) == BoxAnnotation(
        image_id="a",
        width=10,
        height=20,
        boxes_xyxy=((4.0, 4.0, 6.0, 6.0), (1.0, 4.0, 5.0, 12.0)),
        names=("cat", "ant"),
        labels=(2, 0),
        areas=None,
        crowd=(False, False),
        difficult=(False, False),
    )


def test_a_picture_without_labels_is_background(tmp_path: Path) -> None:
    labels = {"a": None, "b": "", "c": "1 .5 .5 .1 .1"}
    source = _list(write_yolo(tmp_path, labels, f"train: images\n{NAMES}"))
    assert source.faults == ()
    assert [_annotation(source, number).names for number in range(3)] == [(), (), ("bee",)]


def test_labels_that_are_nowhere_to_be_found_are_a_fault_that_says_where(tmp_path: Path) -> None:
    """All pictures would be background, without a word."""
    write_pictures(tmp_path / "pictures", ["1.jpg", "2.jpg"])
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "1.txt").write_text("1 .5 .5 .1 .1")
    (tmp_path / "data.yaml").write_text(f"train: pictures\n{NAMES}")
    (fault,) = _list(tmp_path / "data.yaml").faults
    assert (fault.severity, fault.kind) == ("error", "missing annotation")
    assert fault.problem == (
        f"none of 2 pictures has a box; the label file of {tmp_path}/pictures/1.jpg is looked for "
        f"at {tmp_path}/pictures/1.txt: put the labels there"
    )


def test_splits_are_folders_lists_or_several_of_them(tmp_path: Path) -> None:
    line = "1 .5 .5 .1 .1\n"
    yaml = "path: .\ntrain: [images/x, lists/some.txt]\nval: images/y\nnames: [ant, bee]\nnc: 2\n"
    labels = {"x/1": line, "y/2": line, "z/3": line, "z/4": line}
    path = write_yolo(tmp_path, labels, yaml)
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "some.txt").write_text(
        f"../images/z/3.jpg\n{tmp_path}/images/x/1.jpg\n\n./../images/z/3.jpg\n"
    )
    assert _names(_list(path)) == ["x/1.jpg", "z/3.jpg"]
    assert _names(_list(path, "train")) == ["x/1.jpg", "z/3.jpg"]
    assert _names(_list(path, "val")) == ["2.jpg"]
    assert _list(path).classes == {0: "ant", 1: "bee"}
    with pytest.raises(SourceError, match=r"has no split 'test'; those it has: #train, #val"):
        _list(path, "test")


def test_path_may_be_absolute_or_count_from_the_yaml(tmp_path: Path) -> None:
    for path in (f"{tmp_path}/store", "../store"):
        place = tmp_path / "yamls"
        write_yolo(place, {}, "") if place.exists() else place.mkdir()
        (place / "data.yaml").write_text(f"path: {path}\ntrain: images\n{NAMES}")
        write_pictures(tmp_path / "store" / "images", ["1.jpg"])
        assert _names(_list(place / "data.yaml")) == ["1.jpg"]


def test_roboflows_step_too_high_is_taken_as_it_is_meant(tmp_path: Path) -> None:
    path = write_yolo(tmp_path / "set", {"1": "0 .5 .5 .1 .1"}, f"train: ../images\n{NAMES}")
    assert _annotation(_list(path), 0).names == ("ant",)


@pytest.mark.parametrize(
    ("picture", "label"),
    [
        ("a/images/train/1.jpg", "a/labels/train/1.txt"),
        ("a/images/images/1.b.png", "a/images/labels/1.b.txt"),
        ("a/pictures/1.jpg", "a/pictures/1.txt"),
    ],
)
def test_labels_lie_where_the_last_images_of_the_path_is(picture: str, label: str) -> None:
    assert label_path(picture) == label


@pytest.mark.parametrize(
    ("line", "kind", "problem"),
    [
        ("3 .5 .5 .1 .1", "unknown class", "class 3 is not among the names of the data.yaml"),
        ("0.5 .5 .5 .1 .1", "unknown class", "class 0.5 is not among"),
        ("0 320 240 50 60", "unreadable annotation", "320 is no share of the picture: 0 to 1"),
        ("0 .5 nan .1 .1", "unreadable annotation", "nan is no share of the picture"),
        ("0 .5 .5 .1", "unreadable annotation", "3 numbers behind the class; 4 are a box"),
        ("0 .5 .5 .1 .1 .9", "unreadable annotation", "5 numbers behind the class"),
        ("ant .5 .5 .1 .1", "unreadable annotation", "could not convert string to float: 'ant'"),
        ("0 .5 .5 -.1 .1", "negative size", "ends before it begins"),
        ("0 1.3 .5 .1 .1", "box outside", "lies wholly outside the picture of 10 x 20 pixels"),
    ],
)
def test_a_wrong_line_is_named_by_file_and_number(
    tmp_path: Path, line: str, kind: str, problem: str
) -> None:
    labels = {"1": f"\n1 .5 .5 .1 .1\n{line}\n", "2": "1 .5 .5 .1 .1"}
    source = _list(write_yolo(tmp_path, labels, f"train: images\n{NAMES}"))
    assert _names(source) == ["2.jpg"]
    (fault,) = source.faults
    assert (fault.severity, fault.kind) == ("error", kind)
    assert fault.file == f"{tmp_path}/labels/1.txt"
    assert fault.object is not None
    assert fault.object.startswith("line 3")
    assert problem in fault.problem
    assert source.left_out[0].name == "1.jpg"


def test_a_turned_picture_with_more_pictures_behind_it_is_named_too(tmp_path: Path) -> None:
    """MPO, as phones write it: its orientation was not read."""
    turned = Image.Exif()
    turned[0x0112] = 6
    (tmp_path / "images").mkdir()
    picture = Image.new("RGB", (6, 4))
    picture.save(
        tmp_path / "images/1.jpg", "MPO", save_all=True, append_images=[picture], exif=turned
    )
    (tmp_path / "data.yaml").write_text(NAMES + "train: images\n")
    assert [fault.kind for fault in _list(tmp_path / "data.yaml").faults] == ["turned picture"]


def test_a_picture_that_is_gone_broken_or_turned_is_named(tmp_path: Path) -> None:
    path = write_yolo(
        tmp_path, {"1": "", "2": "", "3": "0 .5 .5 .1 .1"}, f"train: all.txt\n{NAMES}"
    )
    (tmp_path / "all.txt").write_text("".join(f"images/{n}.jpg\n" for n in (1, 2, 3, 4)))
    (tmp_path / "images/1.jpg").write_bytes(b"no picture")
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.new("RGB", (6, 4)).save(tmp_path / "images/2.jpg", exif=turned)
    source = _list(path)
    assert _names(source) == ["3.jpg"]
    told = {fault.file: fault.kind for fault in source.faults}
    assert told == {
        "1.jpg": "unreadable picture",
        "2.jpg": "turned picture",
        "4.jpg": "missing picture",
    }


@pytest.mark.parametrize(
    ("yaml", "complaint"),
    [
        ("train: [", "is no YAML"),
        ("train: images\n", "has no names of classes"),
        ("train: images\nnames: 3\n", "names is 3; it is a list"),
        ("train: images\nnames: {a: b}\n", "class 'b' has number 'a'"),
        ("train: images\nnames: [a]\nnc: 2\n", "nc is 2, but names has 1"),
        ("train: elsewhere\nnames: [a]\n", "nothing at .*/elsewhere; path counts from"),
        ("train: labels\nnames: [a]\n", "train='labels' holds no picture"),
        ("val: images\nnames: [a]\n", "no split 'train'; those it has: #val"),
    ],
)
def test_a_yaml_that_is_none_of_yolos_is_refused_in_one_line(
    tmp_path: Path, yaml: str, complaint: str
) -> None:
    path = write_yolo(tmp_path, {"1": ""}, yaml)
    with pytest.raises(SourceError, match=complaint) as refusal:
        _list(path)
    assert "\n" not in str(refusal.value)
