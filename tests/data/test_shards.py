"""Writing shards: what is in them, that they are the same every time, and what stops it."""

import gc
import hashlib
import json
import tarfile
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import webdataset

from data.index import index_digest, read_index
from data.samples import Sample, parse_samples, picture_bytes
from data.shards import ShardSettings, WriteProgress, write_shards
from data.source_items import LeftOut, Source
from data.sources import list_source
from data.write_records import ShardWriteError
from tests.data.small_sources import jpeg, write_coco, write_pictures, write_tar
from tests.servers import S3Store

SMALL = ShardSettings(samples_per_shard=4)


def _tree(root: Path, per_class: int = 5) -> Source:
    names = (f"n{kind}/n{kind}_{number}.JPEG" for kind in range(3) for number in range(per_class))
    return list_source(str(write_pictures(root, names)))


def _files(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
        if path.name != "report.json"
    }


def _samples(folder: Path) -> list[Sample]:
    index, samples = read_index(str(folder)), list[Sample]()
    for shard in index.shards:
        data = (folder / shard.name).read_bytes()[: shard.offsets[-1]]
        samples += parse_samples(data, shard.name, len(samples), shard.num_samples)
    return samples


def test_every_picture_is_in_the_shards_once_and_unchanged(tmp_path: Path) -> None:
    report = write_shards(_tree(tmp_path / "tree"), str(tmp_path / "out"), SMALL)
    assert (report.num_samples, report.num_shards, report.complete) == (15, 4, True)
    samples = _samples(tmp_path / "out")
    keys = [f"n{kind}_{number}" for kind in range(3) for number in range(5)]
    assert sorted(sample.key for sample in samples) == keys
    for sample in samples:
        number = keys.index(sample.key)
        assert picture_bytes(sample) == jpeg(number, width=9 + number % 5)
        assert sample.parts["cls"] == sample.key[1].encode()


# webdataset leaves its files to the garbage collector.
@pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)
def test_webdataset_reads_the_shards_as_its_own(tmp_path: Path) -> None:
    write_shards(_tree(tmp_path / "tree"), str(tmp_path / "out"), SMALL)
    urls = sorted(str(path) for path in (tmp_path / "out").glob("*.tar"))
    dataset = webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8")
    pictures = {sample["__key__"]: sample for sample in dataset}
    del dataset
    gc.collect()
    assert len(pictures) == 15
    assert pictures["n2_1"]["cls"] == 2
    assert pictures["n2_1"]["json"]["class_name"] == "n2"
    assert pictures["n2_1"]["jpg"].shape == (7, 10, 3)


def test_the_index_knows_sizes_hashes_and_where_each_sample_stands(tmp_path: Path) -> None:
    write_shards(_tree(tmp_path / "tree"), str(tmp_path / "out"), SMALL)
    index = read_index(str(tmp_path / "out"))
    assert [shard.num_samples for shard in index.shards] == [4, 4, 4, 3]
    assert [shard.name for shard in index.shards] == [f"shard-00000{n}.tar" for n in range(4)]
    for shard in index.shards:
        data = (tmp_path / "out" / shard.name).read_bytes()
        assert shard.size == len(data)
        assert shard.sha256 == hashlib.sha256(data).hexdigest()
        assert shard.heights.tolist() == [7] * shard.num_samples
        with tarfile.open(tmp_path / "out" / shard.name) as tar:
            starts = [member.offset for member in tar if member.name.endswith(".jpg")]
        assert shard.offsets[:-1].tolist() == starts


def test_a_shard_of_a_sorted_class_tree_holds_several_classes(tmp_path: Path) -> None:
    write_shards(
        _tree(tmp_path / "tree", 20), str(tmp_path / "out"), ShardSettings(samples_per_shard=15)
    )
    classes = [sample.parts["cls"] for sample in _samples(tmp_path / "out")]
    for shard in range(4):
        assert len(set(classes[15 * shard : 15 * shard + 15])) == 3


def test_the_order_is_the_seeds_and_pinned(tmp_path: Path) -> None:
    source = _tree(tmp_path / "tree", 2)
    orders = []
    for seed in (0, 1):
        settings = ShardSettings(seed=seed, samples_per_shard=9)
        write_shards(source, str(tmp_path / f"out{seed}"), settings)
        orders.append([sample.key for sample in _samples(tmp_path / f"out{seed}")])
    assert orders[0] == ["n0_0", "n1_0", "n0_1", "n2_1", "n2_0", "n1_1"]
    assert sorted(orders[0]) == sorted(orders[1])
    assert orders[0] != orders[1]


@pytest.mark.parametrize("workers", [1, 3, 8])
def test_the_same_input_gives_the_same_bytes_for_any_number_of_workers(
    tmp_path: Path, workers: int
) -> None:
    _tree(tmp_path / "tree")
    (tmp_path / "elsewhere").mkdir()
    moved = (tmp_path / "tree").rename(tmp_path / "elsewhere" / "tree")
    write_shards(list_source(str(moved)), str(tmp_path / "out"), SMALL, workers=workers)
    write_shards(_tree(tmp_path / "tree"), str(tmp_path / "again"), SMALL, workers=2)
    assert _files(tmp_path / "out") == _files(tmp_path / "again")
    assert len(_files(tmp_path / "out")) == 5


def test_a_tar_has_no_trace_of_time_or_machine(tmp_path: Path) -> None:
    write_shards(_tree(tmp_path / "tree"), str(tmp_path / "out"), SMALL)
    with tarfile.open(tmp_path / "out" / "shard-000000.tar") as tar:
        entries = {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in tar}
    assert entries == {(0, 0, 0, "", "", 0o644)}


def test_a_shard_stays_below_the_largest_size(tmp_path: Path) -> None:
    names = [f"{number}.jpg" for number in range(7)]
    source = list_source(str(write_pictures(tmp_path / "tree", names)))
    for name in names:
        (tmp_path / "tree" / name).write_bytes(jpeg(int(name[0]), 120, 150 + int(name[0])))
    settings = ShardSettings(samples_per_shard=4, max_shard_bytes=2**16)
    write_shards(source, str(tmp_path / "out"), settings)
    index = read_index(str(tmp_path / "out"))
    assert [shard.name for shard in index.shards] == sorted(shard.name for shard in index.shards)
    assert "shard-000000_001.tar" in [shard.name for shard in index.shards]
    assert max(shard.size for shard in index.shards) <= 2**16
    assert index.num_samples == 7


def test_a_picture_larger_than_the_largest_size_gets_a_shard_of_its_own(tmp_path: Path) -> None:
    source = list_source(str(write_pictures(tmp_path / "tree", ["a.jpg", "b.jpg", "c.jpg"])))
    (tmp_path / "tree" / "b.jpg").write_bytes(jpeg(1, 250, 300))
    settings = ShardSettings(max_shard_bytes=2**16)
    write_shards(source, str(tmp_path / "out"), settings)
    assert sorted(sample.key for sample in _samples(tmp_path / "out")) == ["a", "b", "c"]


def test_bad_files_are_left_out_and_named_with_their_reason(tmp_path: Path) -> None:
    _tree(tmp_path / "tree")
    (tmp_path / "tree" / "n0" / "n0_2.JPEG").write_bytes(jpeg(1)[:200])
    (tmp_path / "tree" / "n1" / "n1_1.JPEG").write_bytes(b"")
    (tmp_path / "tree" / "n1" / "notes.txt").write_text("x")
    source = list_source(str(tmp_path / "tree"))
    settings = ShardSettings(samples_per_shard=4, max_bad_share=0.2)
    report = write_shards(source, str(tmp_path / "out"), settings)
    assert report.num_samples == 13
    assert [bad.name for bad in report.left_out] == ["n0/n0_2.JPEG", "n1/n1_1.JPEG", "n1/notes.txt"]
    assert report.left_out[1:] == (
        LeftOut("n1/n1_1.JPEG", "the file is empty"),
        LeftOut("n1/notes.txt", "not a picture (.txt)"),
    )
    written = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [bad["name"] for bad in written["left_out"]] == [bad.name for bad in report.left_out]
    assert len(_samples(tmp_path / "out")) == 13


def test_too_many_bad_pictures_stop_it_and_leave_nothing_to_be_taken_for_finished(
    tmp_path: Path,
) -> None:
    source = _tree(tmp_path / "tree")
    for number in range(3):
        (tmp_path / "tree" / "n0" / f"n0_{number}.JPEG").write_bytes(b"x")
    message = r"of 15 files are no pictures or broken, more than max_bad_share=0.01: n0/n0_\d"
    with pytest.raises(ShardWriteError, match=message):
        write_shards(source, str(tmp_path / "out"), SMALL)
    assert not (tmp_path / "out" / "index.json").exists()
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert not report["complete"]
    assert report["left_out"][0]["name"].startswith("n0/n0_")
    with pytest.raises(ShardWriteError, match="no pictures or broken"):
        write_shards(source, str(tmp_path / "out"), SMALL)
    lenient = ShardSettings(samples_per_shard=4, max_bad_share=0.2)
    assert write_shards(source, str(tmp_path / "out"), lenient).num_samples == 12


def test_one_bad_picture_of_a_hundred_is_within_the_limit_and_two_are_not(tmp_path: Path) -> None:
    _tree(tmp_path / "tree", 33)
    write_pictures(tmp_path / "tree", ["n0/one_more.jpg"])
    (tmp_path / "tree" / "n0" / "n0_0.JPEG").write_bytes(b"x")
    source = list_source(str(tmp_path / "tree"))
    assert write_shards(source, str(tmp_path / "out"), SMALL).num_samples == 99
    (tmp_path / "tree" / "n0" / "n0_1.JPEG").write_bytes(b"x")
    with pytest.raises(ShardWriteError, match="2 of 100 files"):
        write_shards(source, str(tmp_path / "other"), SMALL)


def test_finished_shards_are_not_written_again_and_others_not_overwritten(tmp_path: Path) -> None:
    source = _tree(tmp_path / "tree")
    out = tmp_path / "out"
    first = write_shards(source, str(out), SMALL)
    (tmp_path / "tree" / "n0" / "n0_0.JPEG").unlink()
    assert write_shards(source, str(out), SMALL) == first
    with pytest.raises(ShardWriteError, match="already holds shards of another source"):
        write_shards(source, str(out), ShardSettings(samples_per_shard=5))
    write_tar(tmp_path / "foreign" / "a.tar", {"1.jpg": jpeg(1)})
    with pytest.raises(ShardWriteError, match="already holds tars: choose an empty folder"):
        write_shards(source, str(tmp_path / "foreign"), SMALL)


def test_shards_are_not_written_among_their_own_pictures(tmp_path: Path) -> None:
    source = _tree(tmp_path / "tree")
    with pytest.raises(ShardWriteError, match=r"lies in the source .*: choose a folder beside it"):
        write_shards(source, str(tmp_path / "tree" / "shards"), SMALL)
    assert write_shards(source, str(tmp_path / "tree-shards"), SMALL).num_samples == 15


def test_progress_counts_every_picture(tmp_path: Path) -> None:
    heard = list[WriteProgress]()
    source = _tree(tmp_path / "tree")
    write_shards(source, str(tmp_path / "out"), SMALL, workers=1, progress=heard.append)
    last = heard[-1]
    assert (last.done, last.total, last.done_before, last.num_bad) == (15, 15, 0, 0)
    assert last.num_bytes > sum(path.stat().st_size for path in tmp_path.glob("tree/*/*"))
    assert [seen.done for seen in heard] == sorted(seen.done for seen in heard)


def test_boxes_travel_in_the_sample(tmp_path: Path) -> None:
    source = list_source(str(write_coco(tmp_path / "coco", ["5.jpg", "6.jpg"])))
    report = write_shards(source, str(tmp_path / "out"))
    assert report.classes == {90: "toothbrush", 1: "person"}
    boxes: dict[str, Any] = {
        sample.key: json.loads(sample.parts["json"])["boxes_xyxy"]
        for sample in _samples(tmp_path / "out")
    }
    assert boxes == {"5": [], "6": [[1.1, 2.0, 4.3, 6.0]]}


def test_shards_go_to_a_filesystem_in_memory_and_come_from_one(tmp_path: Path) -> None:
    write_shards(_tree(tmp_path / "tree"), str(tmp_path / "out"), SMALL)
    filesystem = fsspec.filesystem("memory")
    filesystem.put(str(tmp_path / "tree"), f"/{__name__}/tree", recursive=True)
    write_shards(list_source(f"memory://{__name__}/tree"), f"memory://{__name__}/out", SMALL)
    there = read_index(f"memory://{__name__}/out")
    assert index_digest(there) == index_digest(read_index(str(tmp_path / "out")))
    assert sorted(filesystem.ls(f"/{__name__}/out", detail=False))[0].endswith("out/index.json")
    assert not filesystem.exists(f"/{__name__}/out/writing")


def test_shards_on_s3_are_those_of_a_local_disk(tmp_path: Path, s3_store: S3Store) -> None:
    options = s3_store.storage_options
    write_shards(_tree(tmp_path / "tree"), str(tmp_path / "out"), SMALL)
    s3_store.upload(tmp_path / "tree", "tree")
    source = list_source(f"{s3_store.url}/tree", storage_options=options)
    write_shards(source, f"{s3_store.url}/out", SMALL, options)
    assert _files(s3_store.folder / "out") == _files(tmp_path / "out")
    there = read_index(f"{s3_store.url}/out", options)
    assert index_digest(there) == index_digest(read_index(str(tmp_path / "out")))
    again = list_source(f"{s3_store.url}/out", storage_options=options)
    assert again.kind == "tars"
    assert write_shards(again, f"{s3_store.url}/twice", SMALL, options).num_samples == 15


def test_real_pictures_grey_and_cmyk_among_them_all_become_samples(
    tmp_path: Path, shared_data: Path
) -> None:
    folder = shared_data / "imagenet-sample"
    names = sorted(path.name for path in folder.iterdir())[::10]
    (tmp_path / "list.txt").write_text("\n".join(f"{folder}/{name}" for name in names))
    report = write_shards(list_source(str(tmp_path / "list.txt")), str(tmp_path / "out"))
    assert (report.num_samples, report.left_out) == (50, ())
    index = read_index(str(tmp_path / "out"))
    assert np.all(index.shards[0].widths > 0)
