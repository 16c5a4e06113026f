"""Ranged reads: retried, counted, never short, cached; on disks, in memory and on S3."""

import os
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data.index import Shard
from data.ranges import SampleRange, sample_ranges
from data.reading import (
    CHUNK_BYTES,
    CacheSettings,
    RangeReader,
    ReadCounters,
    ReadingSettings,
    ShardReadError,
)
from data.samples import DamagedShardError, picture_bytes
from data.storage import StorageOptions, StorageUnreachable
from tests.data.faulty import FaultyFileSystem, cut_off, faulty, forbidden, timed_out
from tests.data.tars import plain_index, upload, write_shards
from tests.servers import S3Store

__all__ = ["faulty"]

NO_OPTIONS: StorageOptions = {}


def test_neighbours_are_one_range_and_strangers_are_not() -> None:
    index = plain_index((5, 4))
    ranges = sample_ranges(index, [8, 1, 2, 4, 5, 2], 16)
    assert [(r.shard.name, r.first_id, r.first, r.count) for r in ranges] == [
        ("shard-000.tar", 1, 1, 2),
        ("shard-000.tar", 4, 4, 1),
        ("shard-001.tar", 5, 0, 1),
        ("shard-001.tar", 8, 3, 1),
    ]


def test_a_range_keeps_to_its_limit_but_a_single_large_sample_is_read() -> None:
    index = plain_index((6,))
    offsets = np.array([0, 400_000, 800_000, 3_000_000, 3_400_000, 3_900_000, 4_000_000], np.int64)
    index = replace(index, shards=(replace(index.shards[0], offsets=offsets, size=4_000_000),))
    assert [(r.first, r.count) for r in sample_ranges(index, range(6), 1)] == [
        (0, 2),
        (2, 1),
        (3, 3),
    ]


def test_an_id_outside_the_index_is_named() -> None:
    with pytest.raises(
        ValueError, match="samples 3 to 9 are not all in memory://none, which holds 9"
    ):
        sample_ranges(plain_index((5, 4)), [3, 9], 1)
    assert sample_ranges(plain_index((5, 4)), [], 1) == ()


def test_samples_of_a_range_are_those_of_the_index(tmp_path: Path) -> None:
    index = write_shards(tmp_path, (4, 3))
    reader = RangeReader(index.url, NO_OPTIONS, ReadingSettings())
    samples = reader.samples(sample_ranges(index, [5, 6], 1)[0])
    assert [(sample.id, sample.key, sample.shard) for sample in samples] == [
        (5, "picture00005", "shard-001.tar"),
        (6, "picture00006", "shard-001.tar"),
    ]
    assert sorted(samples[0].parts) == ["jpg", "json"]
    assert picture_bytes(samples[0]) == samples[0].parts["jpg"]
    shard = index.shards[1]
    wanted = int(shard.offsets[3] - shard.offsets[1])
    assert reader.take_counters() == ReadCounters(bytes_read=wanted, reads=1)
    assert reader.take_counters() == ReadCounters()


@pytest.mark.parametrize("cut", [1, 300, 512, 1024, 1025, 1536, 4000])
def test_a_read_that_is_cut_anywhere_is_never_a_shorter_shard(
    tmp_path: Path, faulty: type[FaultyFileSystem], cut: int
) -> None:
    """After a part, after a sample or within: webdataset itself raises at some of them only."""
    index = write_shards(tmp_path, (3,))
    faulty.faults = [lambda data: data[:-cut]]
    samples = faulty_reader(tmp_path, []).samples(sample_ranges(index, range(3), 16)[0])
    assert [sorted(sample.parts) for sample in samples] == [["jpg", "json"]] * 3
    assert len(faulty.reads) == 2


def test_a_range_of_another_shard_is_named_as_damage(tmp_path: Path) -> None:
    index = write_shards(tmp_path, (3, 3))
    reader = RangeReader(index.url, NO_OPTIONS, ReadingSettings())
    moved = replace(index.shards[0], offsets=index.shards[0].offsets + 512)
    with pytest.raises(DamagedShardError, match=r"shard shard-000.tar: samples 0 to 1"):
        reader.samples(SampleRange(moved, 0, 0, 2))


def test_connections_that_end_silently_are_read_again(
    tmp_path: Path, faulty: type[FaultyFileSystem]
) -> None:
    index = write_shards(tmp_path, (6,))
    faulty.faults = [cut_off, cut_off, cut_off]
    delays: list[float] = []
    reader = faulty_reader(tmp_path, delays)
    samples = reader.samples(sample_ranges(index, range(6), 16)[0])
    assert [sample.id for sample in samples] == list(range(6))
    assert reader.take_counters().retries == 3
    assert len(set(faulty.reads)) == 1
    assert len(faulty.reads) == 4


def test_waits_double_up_to_the_longest_and_scatter_below(
    tmp_path: Path, faulty: type[FaultyFileSystem]
) -> None:
    shard = write_shards(tmp_path, (2,)).shards[0]
    faulty.faults = [timed_out] * 6
    delays: list[float] = []
    settings = ReadingSettings(first_delay_s=1.0, longest_delay_s=5.0)
    faulty_reader(tmp_path, delays, settings).read(shard, 0, 512)
    for delay, longest in zip(delays, (1, 2, 4, 5, 5, 5), strict=True):
        assert longest / 2 <= delay <= longest


def test_a_storage_that_does_not_come_back_is_given_up_in_one_line(
    tmp_path: Path, faulty: type[FaultyFileSystem]
) -> None:
    shard = write_shards(tmp_path, (2,)).shards[0]
    faulty.faults = [timed_out] * 3
    reader = faulty_reader(tmp_path, [], ReadingSettings(attempts=3))
    with pytest.raises(StorageUnreachable) as error:
        reader.read(shard, 0, 512)
    assert str(error.value) == (
        f"faulty:/{tmp_path}/shard-000.tar: failed 3 times, last with TimeoutError: no answer; "
        "check the storage and the network, then resume"
    )
    assert reader.take_counters().retries == 2


def test_what_cannot_pass_fails_at_once(tmp_path: Path, faulty: type[FaultyFileSystem]) -> None:
    shard = write_shards(tmp_path, (2,)).shards[0]
    delays: list[float] = []
    reader = faulty_reader(tmp_path, delays)
    faulty.faults = [forbidden]
    with pytest.raises(ShardReadError, match=r"no permission \(.*Access Denied\); check the cred"):
        reader.read(shard, 0, 512)
    (tmp_path / shard.name).unlink()
    with pytest.raises(ShardReadError, match=r"no such shard; run `querypatch shards check faulty"):
        reader.read(shard, 0, 512)
    assert delays == []


def test_credentials_that_change_in_the_middle_are_waited_for(
    tmp_path: Path, faulty: type[FaultyFileSystem]
) -> None:
    shard = write_shards(tmp_path, (2,)).shards[0]
    delays: list[float] = []
    reader = faulty_reader(tmp_path, delays)
    faulty.faults = [bytes, forbidden, forbidden]
    first = reader.read(shard, 0, 512)
    assert reader.read(shard, 0, 512) == first
    assert len(delays) == 2


@pytest.mark.parametrize(("status", "tries"), [(400, 1), (411, 1), (429, 2), (503, 2)])
def test_a_store_that_says_no_is_asked_once_and_a_busy_one_again(
    tmp_path: Path, faulty: type[FaultyFileSystem], status: int, tries: int
) -> None:
    def answer(data: bytes) -> bytes:
        error = OSError(5, "answer")
        vars(error)["status"] = status
        raise error

    shard = write_shards(tmp_path, (2,)).shards[0]
    reader = faulty_reader(tmp_path, [])
    faulty.faults = [answer]
    if tries == 1:
        with pytest.raises(ShardReadError, match="answer; run `querypatch shards check"):
            reader.read(shard, 0, 512)
    else:
        assert len(reader.read(shard, 0, 512)) == 512
    assert len(faulty.reads) == tries


def test_a_long_wait_for_the_store_is_told(
    tmp_path: Path, faulty: type[FaultyFileSystem], caplog: pytest.LogCaptureFixture
) -> None:
    shard = write_shards(tmp_path, (2,)).shards[0]
    delays: list[float] = []
    settings = ReadingSettings(first_delay_s=1)
    reader = RangeReader(f"faulty://{tmp_path}", NO_OPTIONS, settings, delays.append)
    faulty.faults = [timed_out] * 4
    reader.read(shard, 0, 512)
    (third, fourth) = caplog.messages
    assert f"{shard.name}: failed 3 times, last with TimeoutError: no answer; trying again" in third
    assert "failed 4 times" in fourth


def test_a_run_waits_for_its_store_for_about_ten_minutes(
    tmp_path: Path, faulty: type[FaultyFileSystem]
) -> None:
    shard = write_shards(tmp_path, (2,)).shards[0]
    delays: list[float] = []
    reader = RangeReader(f"faulty://{tmp_path}", NO_OPTIONS, ReadingSettings(), delays.append)
    faulty.faults = [timed_out] * 100
    with pytest.raises(StorageUnreachable):
        reader.read(shard, 0, 512)
    assert 480 < sum(delays) < 720


def test_a_shard_shorter_than_its_index_fails_at_once_with_both_sizes(
    tmp_path: Path, faulty: type[FaultyFileSystem]
) -> None:
    shard = write_shards(tmp_path, (2,)).shards[0]
    os.truncate(tmp_path / shard.name, 700)
    delays: list[float] = []
    with pytest.raises(
        ShardReadError, match=rf"700 bytes are there, the index says {shard.size}; run `querypatch"
    ):
        faulty_reader(tmp_path, delays).read(shard, 512, 1024)
    assert delays == []


def test_the_cache_gives_the_same_bytes_and_asks_the_storage_once(
    tmp_path: Path, faulty: type[FaultyFileSystem]
) -> None:
    shard, data = large_shard(tmp_path, 3 * CHUNK_BYTES + 1000)
    settings = ReadingSettings(cache=CacheSettings(folder=str(tmp_path / "cache")))
    reader = faulty_reader(tmp_path, [], settings)
    for start, end in ((10, 20), (CHUNK_BYTES - 5, 3 * CHUNK_BYTES + 7), (5, len(data))):
        assert reader.read(shard, start, end) == data[start:end]
    assert [(start, end) for _, start, end in faulty.reads] == [
        (0, CHUNK_BYTES),
        (CHUNK_BYTES, len(data)),
    ]
    again = faulty_reader(tmp_path, [], settings)
    assert again.read(shard, 0, len(data)) == data
    assert again.take_counters() == ReadCounters(cache_hits=4)


def test_shards_of_one_name_do_not_meet_in_the_cache(tmp_path: Path) -> None:
    settings = ReadingSettings(cache=CacheSettings(folder=str(tmp_path / "cache")))
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        shard, data = large_shard(tmp_path / name, 2000)
        reader = RangeReader(str(tmp_path / name), NO_OPTIONS, settings)
        assert reader.read(shard, 0, 2000) == data


def test_a_damaged_piece_of_the_cache_is_read_again(tmp_path: Path) -> None:
    shard, data = large_shard(tmp_path, 2000)
    settings = ReadingSettings(cache=CacheSettings(folder=str(tmp_path / "cache")))
    RangeReader(str(tmp_path), NO_OPTIONS, settings).read(shard, 0, 10)
    (piece,) = (path for path in (tmp_path / "cache").rglob("*") if path.is_file())
    piece.write_bytes(b"x" + piece.read_bytes()[1:])
    reader = RangeReader(str(tmp_path), NO_OPTIONS, settings)
    assert reader.read(shard, 0, 2000) == data
    assert reader.take_counters().cache_hits == 0
    assert reader.read(shard, 0, 2000) == data
    assert reader.take_counters().cache_hits == 1


def test_the_cache_keeps_its_limit_and_the_pieces_used_last(tmp_path: Path) -> None:
    shard, data = large_shard(tmp_path, 8 * CHUNK_BYTES)
    limit_gb = 3.5 * CHUNK_BYTES / 1e9
    settings = ReadingSettings(cache=CacheSettings(folder=str(tmp_path / "c"), limit_gb=limit_gb))
    reader = RangeReader(str(tmp_path), NO_OPTIONS, settings)
    for piece in (0, 1, 2, 0, 3, 4, 0, 5):
        reader.read(shard, piece * CHUNK_BYTES, piece * CHUNK_BYTES + 1)
    files = [path for path in (tmp_path / "c").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= limit_gb * 1e9
    reader.take_counters()
    reader.read(shard, 0, 1)
    assert reader.take_counters() == ReadCounters(cache_hits=1)
    reader.read(shard, CHUNK_BYTES, CHUNK_BYTES + 1)
    assert reader.take_counters().cache_hits == 0
    assert len(data) == 8 * CHUNK_BYTES


def test_readers_at_once_share_a_cache(tmp_path: Path) -> None:
    shard, data = large_shard(tmp_path, 4 * CHUNK_BYTES)
    limit_gb = 2.5 * CHUNK_BYTES / 1e9
    settings = ReadingSettings(cache=CacheSettings(folder=str(tmp_path / "c"), limit_gb=limit_gb))
    wrong: list[int] = []

    def read_all(first: int) -> None:
        reader = RangeReader(str(tmp_path), NO_OPTIONS, settings)
        for number in range(12):
            start = (first + number) % 4 * CHUNK_BYTES
            if reader.read(shard, start, start + 9000) != data[start : start + 9000]:
                wrong.append(start)

    threads = [threading.Thread(target=read_all, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert not list((tmp_path / "c").rglob(".part-*"))


def test_a_cache_that_cannot_be_written_is_counted_and_reading_goes_on(tmp_path: Path) -> None:
    shard, data = large_shard(tmp_path, 2000)
    settings = ReadingSettings(cache=CacheSettings(folder=str(tmp_path / "cache")))
    reader = RangeReader(str(tmp_path), NO_OPTIONS, settings)
    # A file where the cache wants a folder, whatever the key: root may write anywhere else.
    for group in range(256):
        (tmp_path / "cache" / f"{group:02x}").write_bytes(b"")
    assert reader.read(shard, 0, 2000) == data
    assert reader.take_counters().cache_faults == 2


def test_shards_are_read_from_s3(tmp_path: Path, s3_store: S3Store) -> None:
    index = upload(write_shards(tmp_path, (3, 4)), s3_store.url, s3_store.storage_options)
    reader = RangeReader(s3_store.url, s3_store.storage_options, ReadingSettings(attempts=2))
    samples = reader.samples(sample_ranges(index, [4, 5, 6], 16)[0])
    assert [sample.id for sample in samples] == [4, 5, 6]
    missing = replace(index.shards[0], name="shard-999.tar")
    with pytest.raises(ShardReadError, match=r"s3://.*/shard-999.tar: no such shard"):
        reader.read(missing, 0, 512)


def faulty_reader(
    folder: Path, delays: list[float], settings: ReadingSettings | None = None
) -> RangeReader:
    return RangeReader(
        f"faulty:/{folder}", NO_OPTIONS, settings or ReadingSettings(), sleep=delays.append
    )


def large_shard(folder: Path, size: int) -> tuple[Shard, bytes]:
    """A shard of random bytes, for what looks at bytes only."""
    data = np.random.default_rng(len(str(folder))).bytes(size)
    (folder / "large.tar").write_bytes(data)
    shard = plain_index((1,)).shards[0]
    return replace(shard, name="large.tar", size=size, sha256=f"{hash(data):064x}"), data
