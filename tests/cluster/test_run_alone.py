"""A run in this process, without Ray: it has a lease, a history and an end as any job."""

import threading
from functools import partial
from pathlib import Path

import pytest
from rich.console import Console

import cluster.writing
from cluster.worker import run_alone
from tests.pretrain.small_run import small_recipe, small_shards
from training.checkpoint import newest_checkpoint
from training.control import ask_to_stop, stop_asked, stop_on_request
from training.history import Event, read_history
from training.lease import LeaseHeld, read_lease, take_lease, this_process
from training.outcome import read_outcome
from training.run_folder import RunFolder, open_run_folder


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_shards(tmp_path_factory.mktemp("alone"))


def test_a_run_tells_its_start_its_first_step_and_its_end(shards: Path, tmp_path: Path) -> None:
    folder = open_run_folder(str(tmp_path / "run"))
    ask_to_stop(folder, "somebody, long ago")
    run_alone(small_recipe(shards, tmp_path / "run"), Console(quiet=True))
    assert [event.kind for event in read_history(folder)] == ["started", "first_step", "finished"]
    outcome = read_outcome(folder)
    assert outcome is not None
    assert (outcome.step, outcome.reason) == (6, "done")
    assert outcome.metrics["loss"] > 0
    assert stop_asked(folder) is None
    lease = read_lease(folder)
    assert lease is not None
    assert lease.is_released


def test_a_run_that_is_asked_through_its_folder_stops_with_a_checkpoint_and_goes_on_later(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster.writing, "stop_on_request", partial(stop_on_request, every_s=0.05))
    folder = open_run_folder(str(tmp_path / "run"))
    recipe = small_recipe(shards, tmp_path / "run", "loop.steps=100000")
    asking = threading.Timer(0.0, _ask_after_first_step, [folder])
    asking.start()
    position = run_alone(recipe, Console(quiet=True))
    asking.join()
    newest = newest_checkpoint(folder)
    assert newest is not None
    assert newest.step == position.step < 100000
    assert read_outcome(folder) is None
    *_, asked, stopped = read_history(folder)
    assert (asked.kind, asked.facts) == ("stop_asked", {"by": "a test"})
    assert (stopped.kind, stopped.step) == ("stopped", position.step)
    more = position.step + 2
    run_alone(small_recipe(shards, tmp_path / "run", f"loop.steps={more}"), Console(quiet=True))
    again = _last(folder, "first_step")
    assert again.facts["start_step"] == position.step


def test_a_run_that_another_job_writes_is_not_begun(shards: Path, tmp_path: Path) -> None:
    folder = open_run_folder(str(tmp_path / "run"))
    with (
        take_lease(folder, this_process("the-first")),
        pytest.raises(LeaseHeld, match="is being written by job the-first on"),
    ):
        run_alone(small_recipe(shards, tmp_path / "run"), Console(quiet=True))
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["lease"]


def test_what_ends_a_run_is_the_last_word_of_its_history(shards: Path, tmp_path: Path) -> None:
    recipe = small_recipe(shards, tmp_path / "run", "model.backbone.weights=/nowhere/r18.pth")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        run_alone(recipe, Console(quiet=True))
    failed = _last(open_run_folder(str(tmp_path / "run")), "failed")
    assert "/nowhere/r18.pth" in failed.text


def _ask_after_first_step(folder: RunFolder) -> None:
    waiting = threading.Event()
    while not any(event.kind == "first_step" for event in read_history(folder)):
        waiting.wait(0.1)
    ask_to_stop(folder, "a test")


def _last(folder: RunFolder, kind: str) -> Event:
    return [event for event in read_history(folder) if event.kind == kind][-1]
