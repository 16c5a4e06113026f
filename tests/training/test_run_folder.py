"""The run folder on disk and in stores, uploads, the record of starts, the stop flag."""

import importlib.util
import json
import os
import signal
import threading
from pathlib import Path

import pytest
import torch

from models.settings import Settings
from tests.servers import S3Store
from tests.training.small import CPU, small_state
from tests.training.stumbling_store import Moods, stumbling_folder
from training.checkpoint import list_checkpoints, resume
from training.checkpoint_writer import CheckpointWriter
from training.ema import EmaSettings
from training.metrics import Journal, read_metrics
from training.recipe import RecipeError
from training.record import begin_record, check_same_recipe, current_environment
from training.retention import RetentionSettings
from training.run_folder import Patience, StoreError, open_run_folder
from training.snapshot import Position
from training.stopping import StopFlag, stop_on_signals
from training.uploads import Uploads
from training.world import World

ALONE = World.alone(CPU)


class Optimiser(Settings):
    lr: float = 1e-4
    """Rate."""


class Recipe(Settings):
    optimiser: Optimiser = Optimiser()
    """Section."""
    workers: int = 1
    """Count."""


def test_a_relative_path_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = open_run_folder("runs/a/")
    monkeypatch.chdir("/")
    folder.write("x/y.txt", b"1")
    assert folder.url == str(tmp_path / "runs/a")
    assert (tmp_path / "runs/a/x/y.txt").read_bytes() == b"1"
    assert open_run_folder(f"file://{tmp_path}/runs/a").read("x/y.txt") == b"1"


def test_a_url_without_its_package_or_protocol_is_refused() -> None:
    with pytest.raises(ValueError, match="run= is empty"):
        open_run_folder("")
    with pytest.raises(ValueError, match="Protocol not known: nonsense"):
        open_run_folder("nonsense://a/b")
    if importlib.util.find_spec("gcsfs") is None:
        with pytest.raises(ValueError, match=r"run=gs://a/b needs a package .*gcsfs"):
            open_run_folder("gs://a/b")


def test_files_come_and_go() -> None:
    folder = stumbling_folder(Moods())
    folder.write("a/x", b"123")
    folder.write("a/x", b"4567")
    folder.write("a/y", b"")
    assert folder.read("a/x") == b"4567"
    assert (folder.size("a/x"), folder.size("a/y"), folder.size("a/z")) == (4, 0, None)
    assert folder.names("a") == ["x", "y"]
    assert folder.names("nowhere") == []
    folder.delete("a/x")
    folder.delete("a/x")
    assert folder.names("a") == ["y"]
    with pytest.raises(FileNotFoundError):
        folder.read("a/x")


def test_a_local_file_is_replaced_in_one_move(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = open_run_folder(str(tmp_path), patience=Patience(attempts=2, backoff_s=0.0))
    folder.write("x", b"old")
    held = (tmp_path / "x").open("rb")
    folder.write("x", b"newer")
    assert held.read() == b"old"  # the old file was unlinked, not written over
    held.close()

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(StoreError, match=r"could not write .*/x in 2 attempts: .*No space left"):
        folder.write("x", b"newest")
    assert (tmp_path / "x").read_bytes() == b"newer"
    assert os.listdir(tmp_path) == ["x"]  # noqa: PTH208


def test_waiting_between_attempts_doubles(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr("training.run_folder.time.sleep", slept.append)
    folder = stumbling_folder(Moods(fail_puts=5))
    patient = type(folder)(folder.url, folder.root, folder.filesystem, Patience())
    patient.write("x", b"1")
    assert slept == [0.5, 1.0, 2.0, 4.0, 8.0]


def test_errors_of_the_store_libraries_count_as_stumbling() -> None:
    exceptions = pytest.importorskip("botocore.exceptions")
    error = exceptions.EndpointConnectionError(endpoint_url="http://store")
    folder = stumbling_folder(Moods(fail_puts=1, error=error))
    folder.write("x", b"1")
    assert folder.read("x") == b"1"


def test_a_bug_is_not_taken_for_a_stumbling_store() -> None:
    moods = Moods(fail_puts=1, error=KeyError("bug"))
    with pytest.raises(KeyError):
        stumbling_folder(moods).write("x", b"1")


def test_uploads_run_in_order_and_wait_when_too_many_wait() -> None:
    uploads = Uploads(max_waiting=1)
    gate, done = threading.Event(), []
    uploads.submit("first", lambda: gate.wait(10) and done.append(1))
    uploads.submit("second", lambda: done.append(2))
    threading.Timer(0.05, gate.set).start()
    uploads.submit("third", lambda: done.append(3))
    assert done[:1] == [1]
    uploads.close()
    assert done == [1, 2, 3]


def test_a_failed_upload_is_counted_whatever_it_raised() -> None:
    uploads = Uploads()
    uploads.submit("odd", lambda: [][0])
    uploads.flush()
    assert (uploads.failures, uploads.failures_in_a_row) == (1, 1)
    uploads.close()


def test_the_record_keeps_recipe_and_every_start(tmp_path: Path) -> None:
    folder = open_run_folder(str(tmp_path))
    begin_record(folder, Recipe(), 0, ALONE)
    begin_record(folder, Recipe(), 40, World(0, 3, CPU))
    assert folder.read("recipe.yaml") == b"optimiser:\n  lr: 0.0001\nworkers: 1\n"
    starts = json.loads(folder.read("environment.json"))["starts"]
    assert [(start["start_step"], start["workers"]) for start in starts] == [(0, 1), (40, 3)]
    assert set(starts[0]) == {
        "start_step",
        "workers",
        "device",
        "cpus",
        "python",
        "system",
        "packages",
        "commit",
    }


def test_a_new_start_clears_what_a_killed_one_left_half_prepared(tmp_path: Path) -> None:
    folder = open_run_folder(str(tmp_path))
    (tmp_path / ".writing-1").mkdir(parents=True)
    (tmp_path / ".writing-1/state.pt").write_bytes(b"half")
    begin_record(folder, Recipe(), 0, ALONE)
    assert folder.names("") == ["environment.json", "recipe.yaml"]


def test_the_commit_is_of_our_own_checkout() -> None:
    commit = current_environment(0, ALONE).commit
    assert commit is None or len(commit.rstrip("+")) == 40


def test_a_resume_with_another_recipe_is_refused_with_the_keys(tmp_path: Path) -> None:
    folder = open_run_folder(str(tmp_path))
    check_same_recipe(folder, Recipe())  # a new run
    begin_record(folder, Recipe(), 0, ALONE)
    check_same_recipe(folder, Recipe())
    other = Recipe(optimiser=Optimiser(lr=2e-4), workers=2)
    check_same_recipe(folder, other, may_differ=("optimiser.", "workers"))
    with pytest.raises(RecipeError) as caught:
        check_same_recipe(folder, other, may_differ=("workers",))
    assert str(caught.value) == (
        f"{tmp_path} is a run of another recipe; resume it with its own, or take its weights into "
        "a new run with init=. These differ:\n  optimiser.lr: 0.0001 -> 0.0002"
    )


def test_a_run_from_before_a_key_resumes_with_its_default_and_no_other(tmp_path: Path) -> None:
    """Every pretraining run of the version before finetuning was refused: it had no `stage`."""
    folder = open_run_folder(str(tmp_path))
    begin_record(folder, Recipe(), 0, ALONE)
    lines = (tmp_path / "recipe.yaml").read_text().splitlines(keepends=True)
    kept = [line for line in lines if not line.startswith("workers:")]
    assert len(kept) == len(lines) - 1
    (tmp_path / "recipe.yaml").write_text("".join(kept))
    check_same_recipe(folder, Recipe())
    with pytest.raises(RecipeError, match=r"differ:\n  workers: 1 -> 2$"):
        check_same_recipe(folder, Recipe(workers=2))


def test_the_first_signal_asks_to_stop_and_the_second_does_what_it_did() -> None:
    flag = StopFlag()
    heard: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    on_interrupt = signal.getsignal(signal.SIGINT)
    try:
        with stop_on_signals(flag):
            assert not flag()
            os.kill(os.getpid(), signal.SIGTERM)
            assert flag()
            assert heard == []
            os.kill(os.getpid(), signal.SIGTERM)
            assert heard == [signal.SIGTERM]
        assert signal.getsignal(signal.SIGINT) is on_interrupt
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_run_on_s3(s3_store: S3Store) -> None:
    folder = open_run_folder(s3_store.url, s3_store.storage_options)
    uploads = Uploads()
    begin_record(folder, Recipe(), 0, ALONE)
    check_same_recipe(folder, Recipe())
    journal = Journal(folder, uploads, 0, clock=lambda: 0.0)
    state = small_state(EmaSettings())
    writer = CheckpointWriter(folder, uploads, RetentionSettings(keep_last=2), ALONE, "digest")
    for step in (1, 2, 3):
        journal.write_evaluation(step, {"eval/ap": 0.1 * step})
        journal.publish()
        writer.save(state, Position(step=step), {"eval/ap": 0.1 * step})
    journal.close()
    assert uploads.failures == 0
    assert [manifest.step for manifest in list_checkpoints(folder)] == [3, 2]
    assert len(read_metrics(folder)) == 3

    other = small_state(EmaSettings())
    with torch.no_grad():
        other.model.head.weight.zero_()
    again = open_run_folder(s3_store.url, s3_store.storage_options)
    assert resume(again, other, ALONE) == Position(step=3)
    assert torch.equal(other.model.head.weight, state.model.head.weight)
    on_disk = s3_store.folder / "checkpoints/step_000003/model.safetensors"
    on_disk.write_bytes(on_disk.read_bytes()[:-7])
    assert resume(again, other, ALONE) == Position(step=2)
    Journal(again, uploads, 2, clock=lambda: 0.0).close()
    assert [line["step"] for line in read_metrics(again)] == [1, 2]
    uploads.close()
