"""The exact stream: equal bits for any workers and after any restart, whatever breaks."""

import logging
import multiprocessing
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from data.batches import views_of
from data.held_out import held_out_batches, read_samples
from data.index import ShardIndex
from data.loader import StreamSettings
from data.loader_processes import StreamError
from data.order import OrderSettings, batch_ids, plan_epoch
from data.patch_content import PatchContent
from data.patches import ColourOn
from data.reading import ReadingSettings
from data.storage import StorageUnreachable
from data.stream import ExactStream
from tests.data.faulty import FaultyFileSystem, cut_off, faulty, timed_out
from tests.data.streams import (
    SMALL_CONTENT,
    SMALL_PATCHES,
    Pictures,
    global_batches,
    pictures_of,
    source_of,
    taken,
)
from tests.data.tars import jpeg, upload, write_shard, write_shards
from tests.servers import S3Store

__all__ = ["faulty"]

COLOUR_PLACES: tuple[ColourOn, ...] = ("cpu", "none")

STEPS = 12
"""Two epochs and two batches of the 41 samples below in batches of 8."""


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    return write_shards(tmp_path_factory.mktemp("shards"), (17, 3, 21))


@pytest.fixture(scope="module")
def reference(index: ShardIndex) -> Pictures:
    """All pictures of the first steps, made by one rank in this process."""
    return global_batches(source_of(index), 0, STEPS)


@pytest.fixture(autouse=True)
def _no_process_is_left() -> Iterator[None]:
    yield
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize(
    ("world", "processes"),
    # 8 ranks have one stream each, so at most one process to share it.
    [(w, p) for w in (1, 2, 3, 8) for p in (0, 1, 2, 3) if w * p <= 9],
)
def test_global_batches_are_the_same_bits_for_any_ranks_and_loader_processes(
    index: ShardIndex, reference: Pictures, world: int, processes: int
) -> None:
    assert global_batches(source_of(index), 0, STEPS, world, processes) == reference


@pytest.mark.parametrize(
    ("step", "world", "processes"), [(1, 3, 0), (4, 2, 2), (7, 1, 1), (11, 8, 0)]
)
def test_a_restart_at_any_step_continues_with_the_very_same_pixels(
    index: ShardIndex, reference: Pictures, step: int, world: int, processes: int
) -> None:
    resumed = global_batches(source_of(index), step, STEPS - step, world, processes)
    assert resumed == {place: value for place, value in reference.items() if place[0] >= step}


def test_the_stream_follows_the_plan_over_epochs(index: ShardIndex, reference: Pictures) -> None:
    source = source_of(index)
    ids = [
        batch_ids(plan_epoch(index, 5, epoch, 8, source.order), batch).tolist()
        for epoch in range(3)
        for batch in range(5)
    ]
    seen = [[reference[step, stream][0] for stream in range(8)] for step in range(STEPS)]
    assert seen == ids[:STEPS]
    assert all(key == f"picture{id:05}" for id, key, _ in reference.values())


def test_one_picture_looks_different_in_every_epoch(reference: Pictures) -> None:
    looks: dict[int, set[str]] = {}
    for id, _, look in reference.values():
        looks.setdefault(id, set()).add(look)
    visits = [id for id, _, _ in reference.values()]
    assert all(len(looks[id]) == visits.count(id) for id in looks)


def test_a_start_at_an_epochs_end_is_the_first_batch_of_the_next(
    index: ShardIndex, reference: Pictures
) -> None:
    stream = ExactStream(source_of(index), StreamSettings(processes=0))
    assert stream.batches_per_epoch == 5
    (batch,) = taken(stream, 5, 1)
    assert batch.step == 5
    assert pictures_of([batch]) == {k: v for k, v in reference.items() if k[0] == 5}


@pytest.mark.parametrize("count", [5, 10])
def test_a_handful_of_pictures_is_a_data_set(tmp_path: Path, count: int) -> None:
    source = source_of(write_shards(tmp_path, (count,)), global_batch=2)
    pictures = global_batches(source, 0, 3 * (count // 2), world=2)
    for epoch in range(3):
        steps = range(epoch * (count // 2), (epoch + 1) * (count // 2))
        ids = [id for (step, _), (id, _, _) in pictures.items() if step in steps]
        assert len(set(ids)) == len(ids) == count // 2 * 2


def test_wrapped_samples_are_read_once_and_seen_twice(tmp_path: Path) -> None:
    order = OrderSettings(last_batch="wrap")
    source = source_of(write_shards(tmp_path, (5,)), global_batch=2, order=order)
    ids = [id for id, _, _ in global_batches(source, 0, 3).values()]
    assert sorted(set(ids)) == [0, 1, 2, 3, 4]
    assert len(ids) == 6


def test_more_ranks_than_pictures_in_a_batch_are_refused(index: ShardIndex) -> None:
    with pytest.raises(ValueError, match="global_batch=2 leaves ranks idle among 3"):
        ExactStream(source_of(index, global_batch=2), StreamSettings(), rank=0, world=3)
    with pytest.raises(ValueError, match="step=-1 is before the beginning"):
        next(ExactStream(source_of(index), StreamSettings()).from_step(-1))


def test_seeking_reads_no_more_than_starting(tmp_path: Path) -> None:
    """Of 25 blocks, the first batch needs its own block and the lead into the next one."""
    order = OrderSettings(block=4, pool=1)
    source = source_of(write_shards(tmp_path, (200,)), global_batch=2, order=order)
    read = []
    for step in (0, 48, 98):
        stream = ExactStream(source, StreamSettings(processes=0))
        taken(stream, step, 1)
        read.append(stream.counters.reading.bytes_read)
    whole = sum(shard.size for shard in source.index.shards)
    assert max(read) < whole / 25 * 2.2


@pytest.mark.parametrize("colour_on", ["device", "none"])
def test_colour_elsewhere_leaves_order_and_boxes_alone(
    index: ShardIndex, reference: Pictures, colour_on: ColourOn
) -> None:
    pictures = global_batches(
        source_of(index, content=replace(SMALL_CONTENT, colour_on=colour_on)), 0, STEPS, world=2
    )
    assert {k: v[:2] for k, v in pictures.items()} == {k: v[:2] for k, v in reference.items()}


def test_a_batch_has_one_scale_by_default_and_pictures_their_own_on_request(
    index: ShardIndex,
) -> None:
    def scales(order: OrderSettings) -> list[set[int]]:
        stream = ExactStream(source_of(index, order=order), StreamSettings(processes=0))
        batches = [views_of(batch).sizes for batch in taken(stream, 0, 10)]
        return [set(sizes.min(dim=1).values.tolist()) & {32, 36, 44} for sizes in batches]

    per_batch = scales(OrderSettings())
    assert all(len(found) == 1 for found in per_batch)
    assert set().union(*per_batch) == {32, 36, 44}
    assert any(len(found) > 1 for found in scales(OrderSettings(scale_per="picture")))


def test_cut_connections_change_nothing_but_the_count_of_retries(
    index: ShardIndex, reference: Pictures, faulty: type[FaultyFileSystem]
) -> None:
    source = source_of(replace(index, url=f"faulty:/{index.url}"))
    faulty.faults = [cut_off, timed_out, cut_off, cut_off, timed_out]
    reading = ReadingSettings(first_delay_s=0.001)
    stream = ExactStream(source, StreamSettings(processes=0, reading=reading))
    assert pictures_of(taken(stream, 0, STEPS)) == reference
    assert stream.counters.reading.retries == 5


def test_a_shard_that_is_gone_stops_the_stream_with_one_line(tmp_path: Path) -> None:
    index = write_shards(tmp_path, (9, 9))
    (tmp_path / "shard-001.tar").unlink()
    for processes in (0, 2):
        stream = ExactStream(source_of(index), StreamSettings(processes=processes))
        with pytest.raises(StreamError) as error:
            taken(stream, 0, 3)
        assert str(error.value) == (
            f"{tmp_path}/shard-001.tar: no such shard; run `querypatch shards check {tmp_path}`"
        )


def test_a_storage_that_stays_away_is_an_error_that_a_later_start_may_not_meet(
    index: ShardIndex, faulty: type[FaultyFileSystem]
) -> None:
    source = source_of(replace(index, url=f"faulty:/{index.url}"))
    faulty.faults = [timed_out] * 99
    reading = ReadingSettings(first_delay_s=0.0, attempts=2)
    with pytest.raises(
        StorageUnreachable, match=r"failed 2 times, last with TimeoutError"
    ) as error:
        taken(ExactStream(source, StreamSettings(processes=0, reading=reading)), 0, 1)
    assert not isinstance(error.value, ValueError)


def test_shards_in_memory_are_for_this_process_only(index: ShardIndex, reference: Pictures) -> None:
    source = source_of(upload(index, "memory://stream", {}))
    assert global_batches(source, 0, STEPS) == reference
    with pytest.raises(ValueError, match="loader processes cannot read it; use processes=0"):
        ExactStream(source, StreamSettings(processes=1))


def test_the_stream_reads_s3_as_it_reads_files(
    index: ShardIndex, reference: Pictures, s3_store: S3Store
) -> None:
    on_s3 = upload(index, s3_store.url, s3_store.storage_options)
    source = source_of(on_s3, storage_options=s3_store.storage_options)
    assert global_batches(source, 0, STEPS, processes=2) == reference


def test_a_broken_picture_is_skipped_and_named_and_nothing_moves_up(
    tmp_path: Path, reference: Pictures, caplog: pytest.LogCaptureFixture
) -> None:
    source = source_of(write_shards(tmp_path, (17, 3, 21), broken=(4, 30)))
    stream = ExactStream(source, StreamSettings(processes=2))
    batches = taken(stream, 0, STEPS)
    assert pictures_of(batches) == {k: v for k, v in reference.items() if v[0] not in (4, 30)}
    skipped = [picture for batch in batches for picture in batch.skipped]
    places = [place for place, value in reference.items() if value[0] in (4, 30)]
    assert len(skipped) == len(places) == stream.counters.skipped
    assert {(picture.key, picture.shard) for picture in skipped} == {
        ("picture00004", "shard-000.tar"),
        ("picture00030", "shard-002.tar"),
    }
    warned = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warned) == 2
    assert all(line.startswith("skipped picture000") for line in warned)


def test_a_rank_whose_pictures_are_all_broken_gets_a_blank_batch(tmp_path: Path) -> None:
    source = source_of(write_shards(tmp_path, (8,), broken=(3,)))
    batches = [
        taken(ExactStream(source, StreamSettings(processes=0), rank, 8), 0, 1)[0]
        for rank in range(8)
    ]
    (blank,) = (batch for batch in batches if batch.blank)
    assert blank.keys == ()
    assert [picture.key for picture in blank.skipped] == ["picture00003"]


def test_a_sample_that_is_too_small_or_has_no_picture_is_skipped_with_its_reason(
    tmp_path: Path,
) -> None:
    pictures = [
        ("p0.jpg", jpeg(40, 30, 0), 40, 30),
        ("p1.jpg", jpeg(40, 16, 1), 40, 16),
        ("p2.txt", b"a word", 0, 0),
    ]
    shard = write_shard(tmp_path / "a.tar", pictures)
    source = source_of(ShardIndex(str(tmp_path), (shard,)), global_batch=3)
    (batch,) = taken(ExactStream(source, StreamSettings(processes=0)), 0, 1)
    reasons = {picture.key: picture.reason for picture in batch.skipped}
    assert batch.keys == ("p0",)
    assert sorted(reasons) == ["p1", "p2"]
    assert "40 x 16 pixels are too few" in reasons["p1"]
    assert reasons["p2"] == "no picture among its parts (txt, json)"


def test_too_many_broken_pictures_stop_the_stream_and_name_the_first(tmp_path: Path) -> None:
    source = source_of(write_shards(tmp_path, (8,), broken=range(4)))
    settings = StreamSettings(processes=0, max_broken_share=0.01)
    with pytest.raises(StreamError, match="12 of the last 24 pictures are broken") as error:
        taken(ExactStream(source, settings), 0, 100)
    assert "max_broken_share=0.01 of 1000" in str(error.value)
    assert "picture0000" in str(error.value)
    assert f"run `querypatch shards check {tmp_path}`" in str(error.value)


def test_samples_are_read_by_id_in_the_order_asked_for(index: ShardIndex) -> None:
    ids = [18, 19, 20, 2, 40, 2]
    assert [sample.id for sample in read_samples(index, ids)] == ids
    assert [sample.key for sample in read_samples(index, [5])] == ["picture00005"]
    assert list(read_samples(index, [])) == []


def test_held_out_batches_are_always_the_same_and_have_no_colour_changes(
    index: ShardIndex,
) -> None:
    patches = SMALL_PATCHES.model_copy(update={"held_out_short_side": 40, "max_size": 200})
    content = PatchContent(3, patches)
    runs = [
        list(held_out_batches(index, content, 5, [3, 4, 30, 7, 8], 2, ReadingSettings()))
        for _ in range(2)
    ]
    assert pictures_of(runs[0]) == pictures_of(runs[1])
    assert [views_of(batch).ids.tolist() for batch in runs[0]] == [[3, 4], [30, 7], [8]]
    assert {min(size) for batch in runs[0] for size in views_of(batch).sizes.tolist()} == {40}
    first, again = (
        next(held_out_batches(index, replace(content, colour_on=on), 5, [3], 1, ReadingSettings()))
        for on in COLOUR_PLACES
    )
    assert pictures_of([first]) == pictures_of([again])
