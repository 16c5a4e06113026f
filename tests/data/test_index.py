"""The index: what it keeps, how it is found damaged, and tars that others made."""

import json
import tarfile
from io import BytesIO
from pathlib import Path

import fsspec
import numpy as np
import pytest
from fsspec.implementations.local import LocalFileSystem
from webdataset.tariterators import group_by_keys, tar_file_iterator

from data.index import (
    Shard,
    ShardIndex,
    ShardIndexError,
    index_digest,
    read_index,
    write_index,
)
from data.indexing import index_shards
from data.samples import DamagedShardError
from data.shards import ShardSettings, write_shards
from data.sources import list_source
from data.storage import StorageUnreachable
from tests.data.small_sources import jpeg, png, write_pictures, write_tar
from tests.servers import S3Store


def _shard(name: str, offsets: list[int], sha256: str = "ab") -> Shard:
    sizes = np.arange(len(offsets) - 1, dtype=np.int32)
    return Shard(name, sha256, np.array(offsets), sizes + 300, sizes + 200, offsets[-1] + 1024)


def test_an_index_comes_back_as_it_was_written(tmp_path: Path) -> None:
    shards = (_shard("a.tar", [512, 2048, 10240]), _shard("b.tar", [0, 1024]))
    write_index(ShardIndex(str(tmp_path), shards))
    index = read_index(f"{tmp_path}/")
    assert index.url == str(tmp_path)
    assert index.num_samples == 3
    assert index.shards[0].offsets.tolist() == [512, 2048, 10240]
    assert index.shards[0].widths.tolist() == [300, 301]
    assert index.shards[0].heights.tolist() == [200, 201]
    assert [(shard.name, shard.size) for shard in index.shards] == [
        ("a.tar", 11264),
        ("b.tar", 2048),
    ]
    assert index.shards[0].offsets.dtype == np.int64
    assert index.shards[0].widths.dtype == np.int32


def test_the_text_of_an_index_is_pinned(tmp_path: Path) -> None:
    write_index(ShardIndex(str(tmp_path), (_shard("a.tar", [512, 2048, 10240]),)))
    assert (tmp_path / "index.json").read_text() == (
        '{"format": "querypatch shards", "version": 1, "shards": [\n'
        '{"name":"a.tar","size":11264,"sha256":"ab","blocks":[1,3,16],'
        '"widths":[300,301],"heights":[200,201]}\n]}\n'
    )


def test_the_digest_is_of_names_hashes_and_counts_alone() -> None:
    def digest(url: str, shard: Shard) -> str:
        return index_digest(ShardIndex(url, (shard,)))

    one = digest("x", _shard("a.tar", [0, 512]))
    assert digest("y", _shard("a.tar", [512, 1024])) == one
    others = [
        _shard("b.tar", [0, 512]),
        _shard("a.tar", [0, 512], "cd"),
        _shard("a.tar", [0, 512, 1024]),
    ]
    assert len({one, *(digest("x", other) for other in others)}) == 4


def test_a_missing_index_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(
        ShardIndexError, match=rf"run `querypatch shards index {tmp_path}`"
    ) as error:
        read_index(str(tmp_path))
    assert "\n" not in str(error.value)
    with pytest.raises(ShardIndexError, match=r"has no index\.json"):
        read_index("memory://nowhere/at/all")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "is damaged"),
        ('{"format": "querypatch shards", "version": 1, "shards": [', "is damaged"),
        ("[]", "is damaged"),
        ('{"shards": []}', "is damaged"),
        (
            '{"format": "querypatch shards", "version": 2, "shards": []}',
            "version 2; this querypatch",
        ),
        ('{"format": "querypatch shards", "version": 1, "shards": [{"name": "a"}]}', "is damaged"),
    ],
)
def test_a_damaged_index_is_an_error_of_one_line(tmp_path: Path, text: str, complaint: str) -> None:
    (tmp_path / "index.json").write_text(text)
    with pytest.raises(ShardIndexError, match=complaint) as error:
        read_index(str(tmp_path))
    assert "run `querypatch shards index" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("key", "value"), [("widths", [1]), ("blocks", [1, 300]), ("blocks", []), ("size", 100)]
)
def test_an_index_whose_numbers_contradict_each_other_is_damaged(
    tmp_path: Path, key: str, value: object
) -> None:
    write_index(ShardIndex(str(tmp_path), (_shard("a.tar", [512, 2048, 10240]),)))
    data = json.loads((tmp_path / "index.json").read_text())
    data["shards"][0][key] = value
    (tmp_path / "index.json").write_text(json.dumps(data))
    with pytest.raises(ShardIndexError, match="is damaged"):
        read_index(str(tmp_path))


@pytest.mark.parametrize(
    ("fault", "kind", "complaint"),
    [
        (PermissionError("denied"), ShardIndexError, "may not read .* check the URL and the cred"),
        (TimeoutError("no answer"), StorageUnreachable, "cannot read .* check the URL and the net"),
    ],
)
def test_an_index_that_cannot_be_had_tells_whether_a_later_start_may_help(
    monkeypatch: pytest.MonkeyPatch, fault: OSError, kind: type[Exception], complaint: str
) -> None:
    def fail(filesystem: LocalFileSystem, path: str) -> bytes:
        raise fault

    monkeypatch.setattr(LocalFileSystem, "cat_file", fail)
    monkeypatch.setattr("data.index._PAUSES_S", (0.0, 0.0))
    with pytest.raises(kind, match=complaint):
        read_index("/shards")


def test_an_endpoint_that_nobody_answers_at_is_a_store_that_is_away(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("data.index._PAUSES_S", ())
    options = {
        "key": "k",
        "secret": "s",
        "endpoint_url": "http://127.0.0.1:9",
        "config_kwargs": {"retries": {"max_attempts": 0}},
    }
    with pytest.raises(StorageUnreachable, match=r"cannot read s3://bucket/shards/index\.json"):
        read_index("s3://bucket/shards", options)


def test_an_index_is_asked_for_again_where_the_store_stumbles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_index(ShardIndex(str(tmp_path), (_shard("a.tar", [512, 2048, 10240]),)))
    faults: list[OSError] = [TimeoutError("no answer"), ConnectionResetError("reset")]
    cat_file = LocalFileSystem.cat_file

    def stumble(filesystem: LocalFileSystem, path: str) -> bytes:
        if faults:
            raise faults.pop()
        data: bytes = cat_file(filesystem, path)
        return data

    monkeypatch.setattr(LocalFileSystem, "cat_file", stumble)
    monkeypatch.setattr("data.index._PAUSES_S", (0.0, 0.0))
    assert read_index(str(tmp_path)).num_samples == 2


def test_two_shards_of_one_name_are_refused(tmp_path: Path) -> None:
    write_index(ShardIndex(str(tmp_path), (_shard("a.tar", [0, 512]), _shard("a.tar", [0, 512]))))
    with pytest.raises(ShardIndexError, match=r"a\.tar is there twice"):
        read_index(str(tmp_path))


def test_indexing_our_own_shards_gives_the_index_they_came_with(tmp_path: Path) -> None:
    write_pictures(tmp_path / "tree", (f"{kind}/{n}.jpg" for kind in "ab" for n in range(4)))
    source = list_source(str(tmp_path / "tree"))
    write_shards(source, str(tmp_path / "out"), ShardSettings(samples_per_shard=3))
    text = (tmp_path / "out" / "index.json").read_bytes()
    write_index(index_shards(str(tmp_path / "out"), workers=2))
    assert (tmp_path / "out" / "index.json").read_bytes() == text


def _others_tar(path: Path) -> Path:
    """What tars of others may hold: folders, long names, several parts, metadata, no picture."""
    long = "d/" + "long" * 40
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "x"}) as tar:
        folder = tarfile.TarInfo("d")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        files = {
            "d/one.cls": b"1",
            "d/one.JPG": jpeg(1, 7, 11),
            "d/one.mask.png": png(),
            "__meta__": b"left out",
            f"{long}.jpg": jpeg(2, 8, 12),
            "README": b"no extension, so no sample",
            "d.v1/two.v2.jpg": jpeg(3, 9, 13),
            "d/three.txt": b"no picture",
            "d/four.jpg": b"no JPEG",
        }
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.mtime = len(data), 1_700_000_000.25
            tar.addfile(entry, BytesIO(data))
    return path


def _by_webdataset(data: bytes) -> list[str]:
    files = ({**file, "__url__": ""} for file in tar_file_iterator(BytesIO(data)))
    return [sample["__key__"] for sample in group_by_keys(files)]


def test_tars_of_others_are_indexed_as_webdataset_reads_them(tmp_path: Path) -> None:
    data = _others_tar(tmp_path / "a.tar").read_bytes()
    shard = index_shards(str(tmp_path)).shards[0]
    keys = ["d/one", "d/" + "long" * 40, "d.v1/two", "d/three", "d/four"]
    assert _by_webdataset(data) == keys
    assert shard.widths.tolist() == [11, 12, 13, 0, 0]
    assert shard.heights.tolist() == [7, 8, 9, 0, 0]
    ranges = zip(shard.offsets, shard.offsets[1:], strict=False)
    assert [_by_webdataset(data[start:end]) for start, end in ranges] == [[key] for key in keys]


def test_no_tars_is_an_error_that_says_where_it_looked(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    write_tar(tmp_path / "below" / "a.tar", {"1.jpg": jpeg(1)})
    with pytest.raises(ShardIndexError, match=rf"no tars in {tmp_path}: check the URL"):
        index_shards(str(tmp_path))


@pytest.mark.parametrize("kept", [0, 100, 512, 700, 1024, 2048, 2600, 3072])
def test_a_tar_cut_anywhere_is_an_error(tmp_path: Path, kept: int) -> None:
    data = write_tar(tmp_path / "a.tar", {f"{n}.jpg": b"x" * 500 for n in range(3)}).read_bytes()
    (tmp_path / "a.tar").write_bytes(data[:kept])
    with pytest.raises(DamagedShardError, match=r"a\.tar is cut off.*; copy it again") as error:
        index_shards(str(tmp_path))
    assert "\n" not in str(error.value)


def test_a_damaged_header_inside_a_tar_is_an_error(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", {f"{n}.jpg": b"x" * 500 for n in range(3)})
    data = bytearray(path.read_bytes())
    data[1024 + 148 : 1024 + 156] = b"\xff" * 8
    path.write_bytes(data)
    with pytest.raises(DamagedShardError, match=r"a.tar has a damaged header at byte 1024"):
        index_shards(str(tmp_path))


def test_a_compressed_tar_is_an_error_that_says_so(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("1.jpg"))
    with pytest.raises(DamagedShardError, match=r"a.tar is compressed \(gzip\)"):
        index_shards(str(tmp_path))


@pytest.mark.parametrize(
    "names", [["a.jpg", "b.jpg", "a.jpg"], ["a.jpg", "a.jpg"], ["a.jpg", "b.jpg", "a.cls"]]
)
def test_a_key_that_comes_twice_is_an_error(tmp_path: Path, names: list[str]) -> None:
    write_tar(tmp_path / "a.tar", [(name, jpeg(1)) for name in names])
    with pytest.raises(DamagedShardError, match=r"a.tar holds the key 'a' twice"):
        index_shards(str(tmp_path))


def test_pictures_that_dots_merge_are_an_error_that_names_them(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {"n01.v1.jpg": jpeg(1), "n01.v2.jpg": jpeg(2)})
    with pytest.raises(DamagedShardError, match=r"holds n01.v1.jpg and n01.v2.jpg, one sample"):
        index_shards(str(tmp_path))


def test_tars_on_s3_and_in_memory_are_indexed(tmp_path: Path, s3_store: S3Store) -> None:
    data = _others_tar(tmp_path / "a.tar").read_bytes()
    here = index_shards(str(tmp_path))
    s3_store.upload(tmp_path)
    heard = list[tuple[int, int]]()
    there = index_shards(
        s3_store.url, s3_store.storage_options, progress=lambda *numbers: heard.append(numbers)
    )
    assert heard == [(1, 1)]
    write_index(there, s3_store.storage_options)
    again = read_index(s3_store.url, s3_store.storage_options)
    assert again.shards[0].offsets.tolist() == here.shards[0].offsets.tolist()
    fsspec.filesystem("memory").pipe_file(f"/{__name__}/a.tar", data)
    digests = {index_digest(index) for index in (here, again, index_shards(f"memory://{__name__}"))}
    assert len(digests) == 1
