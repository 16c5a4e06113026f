"""Interrupted writing: whatever stops it, the next call continues and the bytes are the same."""

import hashlib
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from data import shard_group, shards
from data.shards import ShardSettings, WriteProgress, write_shards
from data.source_items import Source, SourceItem
from data.sources import list_source, read_item
from data.storage import Folder
from data.write_records import ShardWriteError
from tests.data.small_sources import jpeg, write_pictures
from tests.servers import S3Store


class NetworkDownError(OSError):
    """What a storage raises when the network is gone."""


@pytest.fixture
def source(tmp_path: Path) -> Source:
    write_pictures(tmp_path / "tree", (f"{number:02d}.jpg" for number in range(14)))
    (tmp_path / "tree" / "05.jpg").write_bytes(jpeg(5)[:150])
    return list_source(str(tmp_path / "tree"))


LENIENT = ShardSettings(samples_per_shard=3, max_bad_share=0.1)


def _files(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def _fail_from(monkeypatch: pytest.MonkeyPatch, picture: int) -> None:
    """Reading fails from the picture of that number on, in the order of writing."""
    count = [0]

    def failing(source: Source, item: SourceItem) -> dict[str, bytes]:
        count[0] += 1
        if count[0] > picture:
            raise NetworkDownError("no route to host")
        return read_item(source, item)

    monkeypatch.setattr(shard_group, "read_item", failing)


@pytest.mark.parametrize("picture", [0, 1, 3, 4, 11, 13])
def test_after_a_failure_at_any_picture_the_next_call_continues(
    tmp_path: Path, source: Source, monkeypatch: pytest.MonkeyPatch, picture: int
) -> None:
    out, whole = tmp_path / "out", tmp_path / "whole"
    with monkeypatch.context() as patch:
        _fail_from(patch, picture)
        with pytest.raises(NetworkDownError):
            write_shards(source, str(out), LENIENT, workers=1)
    assert not (out / "index.json").exists()
    heard = list[WriteProgress]()
    write_shards(source, str(out), LENIENT, workers=1, progress=heard.append)
    assert heard[-1].done_before == 3 * (picture // 3)
    assert heard[-1].done == 14
    write_shards(source, str(whole), LENIENT, workers=2)
    assert _files(out) == _files(whole)


def test_a_killed_process_leaves_what_the_next_call_completes(
    tmp_path: Path, source: Source
) -> None:
    out, whole = tmp_path / "out", tmp_path / "whole"
    program = (
        "import time; from data import shard_group, shards; from data.sources import *\n"
        "def slow(source, item): time.sleep(0.1); return read_item(source, item)\n"
        "shard_group.read_item = slow\n"
        "settings = shards.ShardSettings(samples_per_shard=3, max_bad_share=0.1)\n"
        f"source = list_source({str(tmp_path / 'tree')!r})\n"
        f"shards.write_shards(source, {str(out)!r}, settings, workers=2)"
    )
    writer = subprocess.Popen([sys.executable, "-c", program], cwd=Path(__file__).parents[2])
    deadline = time.monotonic() + 60
    while not list(out.glob("writing/000*.json")) and time.monotonic() < deadline:
        time.sleep(0.02)
    writer.send_signal(signal.SIGKILL)
    assert writer.wait() == -signal.SIGKILL
    assert not (out / "index.json").exists()
    assert list(out.glob("writing/unfinished-*"))
    heard = list[WriteProgress]()
    write_shards(source, str(out), LENIENT, progress=heard.append)
    assert heard[-1].done_before >= 3
    write_shards(source, str(whole), LENIENT)
    assert _files(out) == _files(whole)


def test_a_shard_without_a_record_or_that_shrank_is_written_again(
    tmp_path: Path, source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, whole = tmp_path / "out", tmp_path / "whole"
    with monkeypatch.context() as patch:
        _fail_from(patch, 13)
        with pytest.raises(NetworkDownError):
            write_shards(source, str(out), LENIENT, workers=1)
    (out / "writing" / "000000.json").write_text('{"shards": [')
    (out / "writing" / "000001.json").unlink()
    (out / "shard-000002.tar").write_bytes(b"x" * 512)
    (out / "shard-000003.tar").unlink()
    heard = list[WriteProgress]()
    write_shards(source, str(out), LENIENT, progress=heard.append)
    assert heard[-1].done_before == 0
    write_shards(source, str(whole), LENIENT)
    assert _files(out) == _files(whole)


def test_an_unfinished_writing_of_something_else_is_not_continued(
    tmp_path: Path, source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        _fail_from(patch, 5)
        with pytest.raises(NetworkDownError):
            write_shards(source, str(tmp_path / "out"), LENIENT, workers=1)
    with pytest.raises(ShardWriteError, match="unfinished writing of another source"):
        write_shards(source, str(tmp_path / "out"), ShardSettings(samples_per_shard=4))


def test_ctrl_c_stops_all_threads_and_the_next_call_continues(
    tmp_path: Path, source: Source
) -> None:
    def interrupt(progress: WriteProgress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shards(source, str(tmp_path / "out"), LENIENT, workers=2, progress=interrupt)
    assert not [thread for thread in threading.enumerate() if "ThreadPool" in thread.name]
    assert not list((tmp_path / "out").glob("writing/unfinished-*"))
    assert write_shards(source, str(tmp_path / "out"), LENIENT).num_samples == 13


def test_bad_pictures_of_the_first_attempt_count_in_the_second(
    tmp_path: Path, source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        _fail_from(patch, 13)
        with pytest.raises(NetworkDownError):
            write_shards(source, str(tmp_path / "out"), LENIENT, workers=1)
    report = write_shards(source, str(tmp_path / "out"), LENIENT)
    assert [bad.name for bad in report.left_out] == ["05.jpg"]


def test_a_finished_writing_whose_records_stayed_is_tidied(tmp_path: Path, source: Source) -> None:
    report = write_shards(source, str(tmp_path / "out"), LENIENT)
    (tmp_path / "out" / "writing").mkdir()
    (tmp_path / "out" / "writing" / "plan.json").write_text("{}")
    assert write_shards(source, str(tmp_path / "out"), LENIENT) == report
    assert not (tmp_path / "out" / "writing").exists()


def test_a_failure_between_storing_and_recording_on_s3_is_made_good(
    tmp_path: Path, source: Source, s3_store: S3Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    options, moved = s3_store.storage_options, list[str]()

    def cut_off(folder: Folder, number: int, group: shard_group.Group) -> None:
        moved.append(group.shards[0].name)
        raise NetworkDownError("no route to host")

    with monkeypatch.context() as patch:
        patch.setattr(shards, "record_group", cut_off)
        with pytest.raises(NetworkDownError):
            write_shards(source, s3_store.url, LENIENT, options, workers=1)
    assert moved[0] == "shard-000000.tar"
    assert (s3_store.folder / "shard-000000.tar").exists()
    write_shards(source, s3_store.url, LENIENT, options)
    write_shards(source, str(tmp_path / "whole"), LENIENT)
    assert _files(s3_store.folder) == _files(tmp_path / "whole")
