"""Sources: what is found, in which order, under which keys, and what is left out."""

import json
import os
from pathlib import Path

import fsspec
import pytest

from data.annotations import BoxAnnotation, parse_annotation
from data.source_items import BadItemError, LeftOut, Source, SourceError, unique_keys
from data.sources import list_source, read_item
from data.storage import StorageError
from tests.data.small_sources import jpeg, png, write_coco, write_pictures, write_tar, write_voc


def _keys(source: Source) -> list[str]:
    return [item.key for item in source.items]


def _annotation(source: Source, number: int) -> BoxAnnotation:
    return parse_annotation(read_item(source, source.items[number])["json"])


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("n01440764/n01440764_10026.JPEG", "n01440764_10026"),
        ("a/ab.jpg", "a_ab"),
        ("train/a.b c/x.y.png", "train_a-b-c_x-y"),
        ("../up/./1.jpg", "up_1"),
        ("__meta__.jpg", "meta"),
        ("-/.-.jpg", "picture"),
        ("狐/狸.jpg", "狐_狸"),
        ("/data/b\udcff.jpg", "data_b"),
    ],
)
def test_a_key_is_readable_and_has_no_dot(name: str, key: str) -> None:
    assert unique_keys([name]) == [key]


def test_keys_are_unique_also_where_case_does_not_count() -> None:
    names = ["a.b.jpg", "a-b.jpg", "A-B.jpg", "a-b-2.jpg", "a/b.jpg"]
    assert unique_keys(names) == ["a-b", "a-b-2", "A-B-3", "a-b-2-2", "a_b"]


def test_a_long_key_is_shortened_and_stays_unique() -> None:
    one, other = unique_keys(["ü" * 90 + "1.jpg", "ü" * 90 + "2.jpg"])
    assert one != other
    assert len(one.encode()) <= 80
    assert one.startswith("ü" * 35)


def test_a_folder_tree_is_listed_by_path_and_others_are_left_out(tmp_path: Path) -> None:
    write_pictures(tmp_path, ["b/2.JPEG", "b/1.png", "a/c/3.jpg", "0.webp"])
    (tmp_path / "b" / "notes.txt").write_text("x")
    (tmp_path / "README").write_text("x")
    source = list_source(str(tmp_path))
    assert source.kind == "folder"
    assert [item.name for item in source.items] == ["0.webp", "a/c/3.jpg", "b/1.png", "b/2.JPEG"]
    assert source.left_out == (
        LeftOut("README", "not a picture (no extension)"),
        LeftOut("b/notes.txt", "not a picture (.txt)"),
    )
    assert list_source(str(tmp_path), ignore=["*.txt"]).left_out == source.left_out[:1]


def test_a_jpeg_is_read_unchanged_as_jpg(tmp_path: Path) -> None:
    write_pictures(tmp_path, ["x.JPEG", "y.PNG"])
    source = list_source(str(tmp_path))
    assert read_item(source, source.items[0]) == {"jpg": jpeg(0)}
    assert list(read_item(source, source.items[1])) == ["png"]


def test_a_class_tree_gives_each_picture_its_class(tmp_path: Path) -> None:
    write_pictures(tmp_path, ["n02/n02_1.JPEG", "n01/n01_5.JPEG", "n01/n01_4.JPEG"])
    source = list_source(str(tmp_path))
    assert source.kind == "classes"
    assert source.classes == {0: "n01", 1: "n02"}
    assert _keys(source) == ["n01_4", "n01_5", "n02_1"]
    parts = read_item(source, source.items[2])
    assert list(parts) == ["jpg", "cls", "json"]
    assert parts["cls"] == b"1"
    assert json.loads(parts["json"]) == {"class_id": 1, "class_name": "n02"}
    assert list_source(str(tmp_path), kind="folder").kind == "folder"


def test_a_tree_that_is_no_class_tree_is_refused_as_one(tmp_path: Path) -> None:
    write_pictures(tmp_path, ["a/1.jpg", "2.jpg"])
    with pytest.raises(SourceError, match=r"no class tree .* use kind=folder"):
        list_source(str(tmp_path), kind="classes")


def test_a_loop_of_links_is_walked_once(tmp_path: Path) -> None:
    write_pictures(tmp_path, ["a/1.jpg"])
    (tmp_path / "a" / "again").symlink_to(tmp_path)
    (tmp_path / "b").symlink_to(tmp_path / "a")
    names = [item.name for item in list_source(str(tmp_path)).items]
    assert names == ["a/1.jpg"]


def test_linked_folders_and_files_are_followed(tmp_path: Path) -> None:
    write_pictures(tmp_path / "store", ["x/1.jpg", "2.jpg"])
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "x").symlink_to(tmp_path / "store" / "x")
    (tmp_path / "tree" / "3.jpg").symlink_to(tmp_path / "store" / "2.jpg")
    assert _keys(list_source(str(tmp_path / "tree"))) == ["3", "x_1"]


def test_a_local_tree_is_listed_without_asking_files_for_their_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_pictures(tmp_path, ["a/1.jpg", "a/2.jpg", "b/3.jpg"])
    asked = list[str]()
    stat = os.stat

    def counting(path: str, **options: object) -> os.stat_result:
        asked.append(str(path))
        return stat(path, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "stat", counting)
    list_source(str(tmp_path))
    assert not [path for path in asked if path.endswith(".jpg")]


def test_a_list_keeps_its_order_and_resolves_paths_from_its_folder(tmp_path: Path) -> None:
    write_pictures(tmp_path / "far", ["7/1.jpg", "8/1.jpg"])
    write_pictures(tmp_path / "lists" / "near", ["1.jpg"])
    lines = [
        "# ours",
        f"{tmp_path}/far/8/1.jpg",
        "",
        "near/1.jpg",
        "../far/7/1.jpg",
        f"file://{tmp_path}/far/7/1.jpg",
        "near/1.jpg",
        "notes.md",
    ]
    path = tmp_path / "lists" / "all.txt"
    path.write_text("\n".join(lines))
    source = list_source(str(path))
    assert source.kind == "list"
    assert _keys(source) == ["8_1", "near_1", "7_1", "7_1-2"]
    pictures = [read_item(source, item)["jpg"] for item in source.items]
    assert pictures == [jpeg(1, width=10), jpeg(0), jpeg(0), jpeg(0)]
    assert source.left_out == (
        LeftOut("notes.md", "not a picture (.md)"),
        LeftOut("near/1.jpg", "listed twice"),
    )


def test_a_listed_picture_that_is_gone_is_a_bad_item(tmp_path: Path) -> None:
    (tmp_path / "all.txt").write_text("gone.jpg\n")
    source = list_source(str(tmp_path / "all.txt"))
    with pytest.raises(BadItemError, match="no such file"):
        read_item(source, source.items[0])


def test_a_tree_in_memory_is_listed_like_a_local_one() -> None:
    filesystem = fsspec.filesystem("memory")
    for name in ("b/2.jpg", "a/1.jpg", "a/x.md"):
        filesystem.pipe_file(f"/tree-{__name__}/{name}", jpeg(0))
    source = list_source(f"memory://tree-{__name__}")
    assert source.kind == "classes"
    assert _keys(source) == ["a_1", "b_2"]
    assert source.left_out == (LeftOut("a/x.md", "not a picture (.md)"),)
    assert read_item(source, source.items[0])["jpg"] == jpeg(0)


def test_tars_keep_all_parts_of_a_sample_the_picture_first(tmp_path: Path) -> None:
    write_tar(tmp_path / "b.tar", {"z.cls": b"3", "z.jpg": jpeg(1), "z.mask.png": png()})
    write_tar(tmp_path / "a.tar", {"q.txt": b"no picture", "dir/z.jpeg": jpeg(2)})
    source = list_source(str(tmp_path))
    assert source.kind == "tars"
    assert _keys(source) == ["dir_z", "z"]
    assert read_item(source, source.items[0]) == {"jpeg": jpeg(2)}
    parts = read_item(source, source.items[1])
    assert list(parts) == ["jpg", "cls", "mask.png"]
    assert parts == {"jpg": jpeg(1), "cls": b"3", "mask.png": png()}
    assert source.left_out == (LeftOut("a.tar/q", "the sample holds no picture"),)


def test_pictures_that_dots_would_merge_become_samples_of_their_own(tmp_path: Path) -> None:
    tar = write_tar(
        tmp_path / "a.tar", {"n.v1.jpg": jpeg(1), "n.v1.cls": b"4", "n.v2.jpg": jpeg(2)}
    )
    source = list_source(str(tar))
    assert _keys(source) == ["n-v1", "n-v2"]
    assert read_item(source, source.items[0]) == {"jpg": jpeg(1), "cls": b"4"}
    assert read_item(source, source.items[1]) == {"jpg": jpeg(2)}


def test_a_glob_picks_some_tars_and_equal_keys_stay_apart(tmp_path: Path) -> None:
    for name in ("train-0", "train-1", "val-0"):
        write_tar(tmp_path / f"{name}.tar", {"000.jpg": jpeg(1)})
    assert _keys(list_source(f"{tmp_path}/train-*.tar")) == ["000", "000-2"]
    with pytest.raises(SourceError, match="nothing at"):
        list_source(f"{tmp_path}/test-*.tar")


def test_coco_carries_its_boxes_in_pixels_with_ids_and_names(tmp_path: Path) -> None:
    source = list_source(str(write_coco(tmp_path, ["7.jpg", "5.jpg", "6.jpg"])))
    assert source.kind == "coco"
    assert _keys(source) == ["5", "6", "7"]
    assert source.classes == {90: "toothbrush", 1: "person"}
    assert _annotation(source, 0) == BoxAnnotation(
        image_id=101,
        width=10,
        height=7,
        boxes_xyxy=((1.1, 2.0, 4.3, 6.0),),
        names=("toothbrush",),
        labels=(90,),
        areas=(11.5,),
        crowd=(True,),
        difficult=(False,),
    )
    assert _annotation(source, 2).boxes_xyxy == ()


def test_cocos_pictures_may_be_named_and_are_looked_for_otherwise(tmp_path: Path) -> None:
    path = write_coco(tmp_path, ["5.jpg"])
    (tmp_path / "train").rename(tmp_path / "elsewhere")
    with pytest.raises(SourceError, match=r"no folder train/ beside .* name it with pictures=URL"):
        list_source(str(path))
    source = list_source(str(path), pictures=str(tmp_path / "elsewhere"))
    assert read_item(source, source.items[0])["jpg"] == jpeg(0)


@pytest.mark.parametrize("text", ["{", "[]", '{"boxes": 1}', '{"images": [{"id": 1}]}'])
def test_a_json_that_is_not_cocos_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "x_train.json").write_text(text)
    with pytest.raises(SourceError, match="is no"):
        list_source(str(tmp_path / "x_train.json"))


def test_voc_boxes_move_into_the_frame_that_begins_at_0(tmp_path: Path) -> None:
    source = list_source(str(write_voc(tmp_path, ["2008_1", "2008_2", "2008_3"])))
    assert source.kind == "voc"
    assert _keys(source) == ["2008_1", "2008_2", "2008_3"]
    assert _annotation(source, 1) == BoxAnnotation(
        image_id="2008_2",
        width=9,
        height=7,
        boxes_xyxy=((1.0, 2.0, 9.0, 7.0), (0.0, 0.0, 4.0, 5.5)),
        names=("cow", "dog"),
        labels=None,
        areas=None,
        crowd=(False, False),
        difficult=(True, False),
    )
    assert list(read_item(source, source.items[2])) == ["jpg"]


def test_voc_takes_one_split_or_several_years(tmp_path: Path) -> None:
    year = write_voc(tmp_path / "VOC2007", ["1", "2", "3"])
    write_voc(tmp_path / "VOC2012", ["1", "4"])
    assert _keys(list_source(str(year / "ImageSets/Main/val.txt"))) == ["1", "2"]
    keys = ["VOC2007_1", "VOC2007_2", "VOC2007_3", "VOC2012_1", "VOC2012_4"]
    source = list_source(str(tmp_path))
    assert source.kind == "voc"
    assert _keys(source) == keys
    assert _annotation(source, 3).names == ("cow", "dog")
    with pytest.raises(SourceError, match="list of one class"):
        list_source(str(year / "ImageSets/Main/cow_val.txt"))


def test_a_voc_picture_that_its_split_names_and_is_gone_is_left_out(tmp_path: Path) -> None:
    year = write_voc(tmp_path, ["1", "2", "3"])
    (year / "JPEGImages" / "2.jpg").unlink()
    source = list_source(str(year / "ImageSets/Main/val.txt"))
    assert _keys(source) == ["1"]
    assert source.left_out == (LeftOut("JPEGImages/2.jpg", "no such file"),)


def test_a_picture_with_a_damaged_voc_annotation_is_left_out(tmp_path: Path) -> None:
    year = write_voc(tmp_path, ["1", "2", "3"])
    (year / "Annotations" / "1.xml").write_text("<annotation><object></object></annotation>")
    (year / "Annotations" / "2.xml").write_text("<annotation>")
    source = list_source(str(year))
    assert _keys(source) == ["3"]
    assert [bad.name for bad in source.left_out] == ["JPEGImages/1.jpg", "JPEGImages/2.jpg"]
    assert source.left_out[0].reason == "Annotations/1.xml: <annotation> has no size/width"
    assert source.left_out[1].reason.startswith("Annotations/2.xml: no element found")


def test_the_real_coco_and_voc_are_read_whole(shared_data: Path) -> None:
    coco = list_source(str(shared_data / "coco" / "annotations" / "instances_train2017.json"))
    assert len(coco.items) == 170
    assert len(coco.classes) == 80
    assert sum(len(_annotation(coco, number).boxes_xyxy) for number in range(170)) > 170
    voc = list_source(str(shared_data / "VOCdevkit" / "VOC2012" / "ImageSets/Main/val.txt"))
    assert len(voc.items) == 250
    cows = _annotation(list_source(str(shared_data / "VOCdevkit" / "VOC2012")), 0)
    assert cows.names == ("cow", "cow")
    assert cows.boxes_xyxy[0] == (216, 160, 294, 221)


def test_nothing_there_and_no_picture_there_are_errors_that_say_so(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"nothing at .*gone: check the path"):
        list_source(str(tmp_path / "gone"))
    (tmp_path / "a.md").write_text("x")
    with pytest.raises(SourceError, match=r"no picture in .*1 other files, e.g. a.md"):
        list_source(str(tmp_path))
    with pytest.raises(StorageError, match="cannot open nowhere://x"):
        list_source("nowhere://x")
