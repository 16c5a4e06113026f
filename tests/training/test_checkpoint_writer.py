"""Checkpoints in the background: in order, bounded, kept here while the store is away."""

import logging
import tempfile
import threading
from pathlib import Path

import pytest

from tests.training.small import CPU, small_state
from tests.training.stumbling_store import Moods, stumbling_folder
from training.checkpoint import list_checkpoints, newest_checkpoint, resume
from training.checkpoint_writer import CheckpointWriter
from training.kept import find_kept, kept_folder
from training.lease import LeaseLost
from training.retention import RetentionSettings
from training.run_folder import RunFolder, StoreError, open_run_folder
from training.snapshot import Position
from training.uploads import Uploads
from training.world import World

ALONE = World.alone(CPU)
KEEP = RetentionSettings(keep_last=5, wait_for_store_minutes=1)


@pytest.fixture(autouse=True)
def _own_temporary_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))


def writer_to(
    folder: RunFolder, uploads: Uploads, settings: RetentionSettings = KEEP
) -> CheckpointWriter:
    return CheckpointWriter(folder, uploads, settings, ALONE, "digest")


def save(writer: CheckpointWriter, *steps: int) -> None:
    for step in steps:
        writer.save(small_state(), Position(step=step), {})


def steps(folder: RunFolder) -> list[int]:
    return [manifest.step for manifest in list_checkpoints(folder)]


def test_the_writer_stores_in_order_in_the_background_and_outlives_failures(
    caplog: pytest.LogCaptureFixture,
) -> None:
    gate = threading.Event()
    moods = Moods(before_put=lambda: gate.wait(10) and None)
    folder = stumbling_folder(moods)
    uploads = Uploads(loud_after=2)
    writer = writer_to(folder, uploads)
    save(writer, 1, 2)
    assert newest_checkpoint(folder) is None  # the training thread did not wait
    gate.set()
    writer.flush()
    assert steps(folder) == [2, 1]

    moods.fail_puts = 6
    save(writer, 3, 4)
    writer.flush()
    assert (uploads.failures, uploads.failures_in_a_row) == (2, 2)
    levels = [r.levelno for r in caplog.records if "was not stored" in r.getMessage()]
    assert levels == [logging.WARNING, logging.ERROR]
    save(writer, 5)
    uploads.close()
    assert (uploads.failures, uploads.failures_in_a_row) == (2, 0)
    assert steps(folder) == [5, 2, 1]


def test_a_store_that_allows_no_deletes_keeps_all_checkpoints_and_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = stumbling_folder(Moods(may_delete=False))
    uploads = Uploads()
    writer = writer_to(folder, uploads, RetentionSettings(keep_last=1))
    save(writer, 1, 2)
    uploads.close()
    assert (uploads.failures, steps(folder)) == (0, [2, 1])
    (warning,) = caplog.messages
    assert warning.startswith("older checkpoints stay: may not delete stumbling://run/checkpoints/")


def test_only_the_first_worker_writes() -> None:
    moods = Moods()
    uploads = Uploads()
    writer = CheckpointWriter(
        stumbling_folder(moods), uploads, RetentionSettings(), World(1, 2, CPU), "digest"
    )
    writer.save(small_state(), Position(step=1), {})
    uploads.close()
    assert moods.writes == 0


def test_a_slow_store_costs_checkpoints_and_never_the_time_of_training(
    caplog: pytest.LogCaptureFixture,
) -> None:
    gate = threading.Event()
    folder = stumbling_folder(Moods(before_put=lambda: gate.wait(10) and None))
    uploads = Uploads()
    settings = RetentionSettings(keep_last=1, keep_every_steps=2)
    writer = writer_to(folder, uploads, settings)
    save(writer, 1)
    while writer._waiting:
        gate.wait(0.01)
    save(writer, 2, 3, 5, 7)  # 1 is on its way, 2 shall be kept for good
    assert writer.overtaken == 2
    assert "step_000003, which waited, makes room for step_000005" in caplog.text
    gate.set()
    writer.finish()
    uploads.close()
    assert (steps(folder), uploads.failures) == ([7, 2], 0)


def test_two_that_shall_be_kept_are_waited_for() -> None:
    gate = threading.Event()
    folder = stumbling_folder(Moods(before_put=lambda: gate.wait(10) and None))
    uploads = Uploads()
    writer = writer_to(folder, uploads)
    save(writer, 1)
    while writer._waiting:
        gate.wait(0.01)
    threading.Timer(0.1, gate.set).start()
    for step in (2, 3, 4):
        writer.save(small_state(), Position(step=step), {"eval/ap": 0.1})
    writer.finish()
    uploads.close()
    assert (steps(folder), writer.overtaken) == ([4, 3, 2, 1], 0)


def test_the_last_one_waits_for_the_store_and_is_then_left_here() -> None:
    moods = Moods()
    folder = stumbling_folder(moods)
    uploads = Uploads()
    writer = writer_to(folder, uploads)
    save(writer, 1)
    writer.flush()
    moods.fail_puts = 10**6
    save(writer, 2)
    slept: list[float] = []
    message = r"step 2 was not stored, which lies in .*querypatch-kept.*resume stumbling://run` on"
    with pytest.raises(StoreError, match=message):
        writer.finish(clock=lambda: sum(slept), sleep=slept.append)
    assert sum(slept) == 60
    assert steps(folder) == [1]
    kept = find_kept(folder)
    assert kept is not None
    assert (kept.manifest.step, kept_folder(folder).stat().st_mode & 0o777) == (2, 0o700)
    moods.fail_puts = 0
    writer.finish()
    uploads.close()
    assert (steps(folder), find_kept(folder)) == ([2, 1], None)


def kept_at_step_2(folder: RunFolder, moods: Moods, stored: tuple[int, ...]) -> None:
    """A start whose checkpoint of step 2 the store did not take."""
    uploads = Uploads()
    writer = writer_to(folder, uploads)
    save(writer, *stored)
    writer.flush()
    moods.fail_puts = 3
    save(writer, 2)
    uploads.close()
    assert uploads.failures == 1
    assert find_kept(folder) is not None


def test_the_next_start_here_stores_what_was_kept_first() -> None:
    moods = Moods()
    folder = stumbling_folder(moods)
    kept_at_step_2(folder, moods, stored=(1,))
    assert resume(folder, small_state(), ALONE) == Position(step=2)
    assert (steps(folder), find_kept(folder)) == ([2, 1], None)


def test_what_was_kept_does_not_come_back_into_another_story(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The run went on elsewhere, or was deleted and begun anew under its old name."""
    moods = Moods()
    folder = stumbling_folder(moods)
    kept_at_step_2(folder, moods, stored=(1,))
    uploads = Uploads()
    elsewhere = World(0, 2, CPU)
    other = CheckpointWriter(folder, uploads, KEEP, elsewhere, "digest")
    other.save(small_state(), Position(step=1), {})
    uploads.close()
    assert find_kept(folder) is None  # a stored one takes its place
    for stored in ((1,), ()):
        moods = Moods()
        folder = stumbling_folder(moods)
        kept_at_step_2(folder, moods, stored)
        fresh = stumbling_folder(Moods())
        assert resume(fresh, small_state(), ALONE) == Position()
        assert "the run went another way since, so it stays there" in caplog.text
        assert steps(fresh) == []


def test_a_kept_checkpoint_that_was_cut_counts_as_none() -> None:
    moods = Moods()
    folder = stumbling_folder(moods)
    kept_at_step_2(folder, moods, stored=(1,))
    with (kept_folder(folder) / "state.pt").open("r+b") as file:
        file.truncate(10)
    assert find_kept(folder) is None
    assert resume(folder, small_state(), ALONE) == Position(step=1)


def test_a_full_disk_of_a_local_run_is_named_at_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = open_run_folder(str(tmp_path / "run"))
    uploads = Uploads()
    writer = writer_to(folder, uploads)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("training.checkpoint_writer.write_files", full)
    save(writer, 1)
    with pytest.raises(StoreError, match=r"step 1 was not stored; see the warnings above"):
        writer.finish()
    monkeypatch.undo()
    save(writer, 2)
    writer.finish()
    uploads.close()
    assert steps(folder) == [2]


def test_nothing_is_written_once_the_lease_is_lost() -> None:
    moods = Moods()
    folder = stumbling_folder(moods)
    lost: list[str] = []

    def may_write() -> None:
        if lost:
            raise LeaseLost(lost[0])

    uploads = Uploads(may_write=may_write)
    writer = writer_to(folder, uploads)
    save(writer, 1)
    writer.flush()
    before = moods.writes
    lost.append("taken over by job b")
    save(writer, 2)
    writer.flush()
    assert (moods.writes, uploads.failures) == (before, 0)
    with pytest.raises(LeaseLost, match="job b"):
        save(writer, 3)
    with pytest.raises(LeaseLost, match="job b"):
        writer.finish()
    uploads.close()


def test_a_store_that_cannot_be_asked_for_the_lease_costs_no_checkpoint() -> None:
    folder = stumbling_folder(Moods())
    away: list[StoreError] = []

    def may_write() -> None:
        if away:
            raise away[0]

    uploads = Uploads(may_write=may_write)
    writer = writer_to(folder, uploads)
    save(writer, 1)
    writer.flush()
    away.append(StoreError("could not list run/lease"))
    save(writer, 2, 3)
    writer.flush()
    assert (uploads.failures, steps(folder)) == (2, [1])
    kept = find_kept(folder)
    assert kept is not None
    assert kept.manifest.step == 3
    away.clear()
    save(writer, 4)
    writer.finish()
    uploads.close()
    assert (steps(folder), find_kept(folder)) == ([4, 1], None)


def test_a_lease_that_is_lost_during_an_upload_leaves_no_manifest() -> None:
    lost: list[str] = []
    moods = Moods(before_put=lambda: lost.append("taken over by job b"))
    folder = stumbling_folder(moods)

    def may_write() -> None:
        if lost:
            raise LeaseLost(lost[0])

    uploads = Uploads(may_write=may_write)
    writer = writer_to(folder, uploads)
    save(writer, 1)
    with pytest.raises(LeaseLost, match="job b"):
        writer.finish()
    uploads.close()
    assert folder.names("checkpoints/step_000001") == ["model.safetensors", "state.pt"]
