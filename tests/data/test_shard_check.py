"""Checking shards: each kind of damage is found and named, and sound shards have none."""

import json
import shutil
from pathlib import Path

import pytest

from data.index import ShardIndexError, write_index
from data.indexing import index_shards
from data.shard_check import Fault, check_shards
from data.shards import ShardSettings, write_shards
from data.sources import list_source
from tests.data.small_sources import jpeg, write_pictures, write_tar
from tests.servers import S3Store


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three shards of 3, 3 and 2 samples."""
    write_pictures(tmp_path / "tree", (f"{number}.jpg" for number in range(8)))
    source = list_source(str(tmp_path / "tree"))
    write_shards(source, str(tmp_path / "out"), ShardSettings(samples_per_shard=3))
    return tmp_path / "out"


def _only(faults: tuple[Fault, ...]) -> Fault:
    assert len(faults) == 1, faults
    assert "\n" not in str(faults[0])
    assert faults[0].remedy
    return faults[0]


def test_sound_shards_have_no_fault(folder: Path) -> None:
    heard = list[tuple[int, int]]()
    assert check_shards(str(folder), progress=lambda *numbers: heard.append(numbers)) == ()
    assert heard == [(1, 3), (2, 3), (3, 3)]


def test_a_missing_shard_is_named(folder: Path) -> None:
    (folder / "shard-000001.tar").unlink()
    fault = _only(check_shards(str(folder)))
    assert str(fault).startswith("shard-000001.tar: is in the index, but not in the folder; copy")


@pytest.mark.parametrize("kept", [0, 1000, 1024, 5000])
def test_a_truncated_shard_is_named(folder: Path, kept: int) -> None:
    path = folder / "shard-000000.tar"
    path.write_bytes(path.read_bytes()[:kept])
    faults = check_shards(str(folder))
    assert {fault.shard for fault in faults} == {"shard-000000.tar"}
    assert f"holds {kept} bytes where the index says" in faults[0].problem
    assert "cut off" in faults[0].problem


def test_a_changed_byte_is_found_by_the_hash(folder: Path) -> None:
    path = folder / "shard-000002.tar"
    data = bytearray(path.read_bytes())
    data[512 + 50] ^= 1
    path.write_bytes(data)
    faults = check_shards(str(folder))
    assert faults[0].shard == "shard-000002.tar"
    assert "has sha256" in faults[0].problem


def test_a_wrong_count_is_named(folder: Path) -> None:
    write_tar(folder / "shard-000001.tar", {"a.jpg": jpeg(1), "b.jpg": jpeg(2)})
    problems = [fault.problem for fault in check_shards(str(folder))]
    assert "holds 2 samples where the index says 3" in problems


def test_a_key_twice_in_a_shard_is_named(folder: Path) -> None:
    entries = [("a.jpg", jpeg(1)), ("b.jpg", jpeg(2)), ("a.jpg", jpeg(3))]
    write_tar(folder / "shard-000001.tar", entries)
    faults = check_shards(str(folder))
    assert ("a", "the key comes twice in this shard") in [(f.sample, f.problem) for f in faults]


def test_a_shard_copied_under_another_name_repeats_its_keys(folder: Path) -> None:
    shutil.copy(folder / "shard-000000.tar", folder / "shard-000009.tar")
    fault = _only(check_shards(str(folder)))
    assert (fault.shard, fault.problem) == (
        "shard-000009.tar",
        "is in the folder, but not in the index",
    )
    write_index(index_shards(str(folder)))
    fault = _only(check_shards(str(folder)))
    assert fault.shard == "shard-000009.tar"
    assert fault.problem == "the key is in shard-000000.tar too (3 such keys)"


def test_an_undecodable_picture_is_named(folder: Path) -> None:
    write_tar(folder / "x.tar", {"good.jpg": jpeg(1), "bad.jpg": jpeg(2)[:200], "none.txt": b""})
    write_index(index_shards(str(folder)))
    faults = check_shards(str(folder))
    assert [(fault.shard, fault.sample) for fault in faults] == [
        ("x.tar", "bad"),
        ("x.tar", "none"),
    ]
    assert faults[0].problem.startswith("the picture cannot be decoded (")
    assert faults[1].problem == "holds no picture"


def test_an_index_that_does_not_fit_the_shards_is_found(folder: Path) -> None:
    text = (folder / "index.json").read_text()
    (folder / "index.json").write_text(text.replace('"heights":[7', '"heights":[8'))
    problems = [fault.problem for fault in check_shards(str(folder))]
    assert len(problems) == 3
    assert all("x 7 where the index says" in problem for problem in problems)
    data = json.loads(text)
    data["shards"][1]["blocks"][0] += 1
    data["shards"][1]["blocks"][1] -= 1
    (folder / "index.json").write_text(json.dumps(data))
    fault = _only(check_shards(str(folder)))
    assert fault.shard == "shard-000001.tar"
    assert fault.problem == "its samples do not stand where the index says"


def test_all_faults_of_a_folder_come_at_once(folder: Path) -> None:
    (folder / "shard-000000.tar").unlink()
    shutil.copy(folder / "shard-000001.tar", folder / "copy.tar")
    path = folder / "shard-000002.tar"
    path.write_bytes(path.read_bytes()[:-512])
    shards = [fault.shard for fault in check_shards(str(folder), workers=2)]
    assert shards == ["shard-000000.tar", "shard-000002.tar", "copy.tar"]


def test_without_an_index_there_is_nothing_to_check_against(tmp_path: Path) -> None:
    with pytest.raises(ShardIndexError, match="querypatch shards index"):
        check_shards(str(tmp_path))


def test_shards_on_s3_are_checked(folder: Path, s3_store: S3Store) -> None:
    s3_store.upload(folder)
    assert check_shards(s3_store.url, s3_store.storage_options) == ()
    path = folder / "shard-000001.tar"
    path.write_bytes(path.read_bytes()[:2048])
    s3_store.upload(folder)
    faults = check_shards(s3_store.url, s3_store.storage_options)
    assert faults[0].problem.startswith("holds 2048 bytes")
