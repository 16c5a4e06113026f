"""The status of a run is told by its folder alone; stop is heard through it."""

import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
from typer.testing import CliRunner

import cluster.jobs.stopping
import querypatch
from cluster.jobs.status import NoRun, read_status, status_text
from training.checkpoint import FOLDER, MANIFEST
from training.control import ask_to_stop, clear_stop, stop_asked
from training.history import History, read_history
from training.lease import Holder, take_lease
from training.manifest import Manifest
from training.outcome import write_outcome
from training.run_folder import RunFolder, open_run_folder

RECIPE = """
stage: pretrain
global_batch: 8
loop: {epochs: 10, steps: null, accumulate: 2}
"""
LINES = (
    {"kind": "evaluation", "step": 0, "eval/ap": 0.125},
    {"kind": "train", "step": 10, "epoch": 0.5, "loss": 9.0, "pictures_per_s": 1.0},
    {
        "kind": "train", "step": 50, "epoch": 2.5, "loss": 4.25, "pictures_per_s": 32.0,
        "wait_share": 0.25, "skipped": 3, "bad_steps": 1,
    },
)  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """A run of 200 updates that is at the 50th, with a checkpoint of the 40th."""
    folder = open_run_folder(str(tmp_path / "a"))
    folder.write("recipe.yaml", RECIPE.encode())
    folder.write("metrics.jsonl", "".join(json.dumps(line) + "\n" for line in LINES).encode())
    manifest = f"{FOLDER}/step_000040/{MANIFEST}"
    folder.write(manifest, Manifest(step=40, files={}).model_dump_json().encode())
    written = datetime(2026, 11, 26, 3, 0, tzinfo=UTC).timestamp()
    os.utime(folder.path(manifest), (written, written))
    return folder


@contextmanager
def held(folder: RunFolder) -> Iterator[None]:
    """A job writes the run: it came back once with fewer workers."""
    with take_lease(folder, Holder("a-2", "node-7", 1, "")), History(folder) as history:
        history.add("started", "pretrain, job a-2", job="a-2", workers="1..4")
        history.add("workers", "4 workers", 0, workers=4)
        history.add("worker_lost", "a worker on node-3 is gone", 44)
        history.add("restarting", "started again from step 40", 40)
        history.add("workers", "3 workers", 40, workers=3)
        # It is written by a thread of its own.
        while [event.text for event in read_history(folder)][-1:] != ["3 workers"]:
            time.sleep(0.01)
        yield


def test_a_run_that_goes_on_tells_how_far_how_fast_and_by_whom(folder: RunFolder) -> None:
    with held(folder):
        status = read_status(folder, now="2026-11-26T03:02:05.000Z")
    assert (status.state, status.step, status.total_steps) == ("running", 50, 200)
    assert status.seconds_left == 150 * 8 * 2 / 32
    assert (status.checkpoint_step, status.checkpoint_age_s) == (40, 125)
    assert (status.workers, status.starts, status.restarts) == (3, 1, 1)
    said = status_text(status).splitlines()
    assert said[0] == f"{folder.url}: running (pretrain)"
    assert "  step        50 of 200, epoch 2.50, 00:01:15 left" in said
    assert "  speed       32.0 pictures/s, 25% of the time without data" in said
    assert "  checkpoint  step 40, 00:02:05 old" in said
    assert "  workers     3, 1 starts, 1 restarts" in said
    assert "  left out    3 broken pictures, 1 updates that were not finite" in said
    assert any(line.startswith("  writer      job a-2 on node-7, heard of 00:00:") for line in said)
    assert said[-3].endswith("  worker lost: a worker on node-3 is gone")


def test_the_state_follows_the_lease_and_what_was_told_last(folder: RunFolder) -> None:
    assert read_status(folder).state == "stopped"
    with held(folder):
        assert read_status(folder).state == "running"
        ask_to_stop(folder, by="me")
        assert (read_status(folder).state, read_status(folder).stop_asked_by) == ("stopping", "me")
    assert read_status(folder).state == "stopped"
    with History(folder) as history:
        history.add("failed", "no such shard", 50)
    assert read_status(folder).state == "failed"
    write_outcome(folder, 200, 200)
    status = read_status(folder)
    assert (status.state, status.step, status.metrics["eval/ap"]) == ("finished", 200, 0.125)
    assert "eval/ap 0.125" in status_text(status)


def test_a_writer_that_went_without_a_word_is_silent(folder: RunFolder) -> None:
    with held(folder):
        (name,) = folder.names("lease")
        old = json.loads(folder.read(f"lease/{name}"))
    old |= {"released": False, "renewed_at": "2026-11-26T03:00:00+00:00"}
    folder.write(f"lease/{name}", json.dumps(old).encode())
    assert read_status(folder).state == "silent"


def test_a_run_that_has_only_begun_has_a_status_and_an_empty_folder_has_none(
    tmp_path: Path,
) -> None:
    folder = open_run_folder(str(tmp_path / "b"))
    with pytest.raises(NoRun, match=r"b holds no run: no recipe\.yaml and no lease"):
        read_status(folder)
    with held(folder):
        status = read_status(folder)
    assert (status.state, status.step, status.checkpoint_step) == ("running", 0, None)
    assert "  checkpoint  none yet" in status_text(status).splitlines()


def test_the_commands_json_says_the_same(folder: RunFolder) -> None:
    told = json.loads(call("status", folder.url, "--json"))
    assert (told["state"], told["step"], told["checkpoint_step"]) == ("stopped", 50, 40)
    assert told["events"] == []


def test_credentials_in_a_url_are_not_shown(folder: RunFolder) -> None:
    status = read_status(replace(folder, url="s3://me:word@bucket/runs/a"))
    assert status.run == "s3://bucket/runs/a"


def test_stop_waits_until_the_run_has_ended_and_says_its_checkpoint(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster.jobs.stopping, "LOOK_EVERY_S", 0.02)
    begun = threading.Event()

    def run() -> None:
        clear_stop(folder)
        with held(folder):
            begun.set()
            while (request := stop_asked(folder)) is None:
                time.sleep(0.02)
            assert " on " in request.by
            time.sleep(0.1)
            manifest = Manifest(step=51, files={}).model_dump_json().encode()
            folder.write(f"{FOLDER}/step_000051/{MANIFEST}", manifest)

    thread = threading.Thread(target=run)
    thread.start()
    assert begun.wait(10)
    said = call("stop", folder.url).splitlines()
    thread.join()
    assert said[0] == f"asked {folder.url} to write a checkpoint and end"
    assert said[1] == f"{folder.url}: stopped at step 50, newest checkpoint: step 51"


def test_stop_says_when_nobody_runs_and_when_nobody_listens(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster.jobs.stopping, "LOOK_EVERY_S", 0.02)
    assert "is not running: stopped at step 50" in call("stop", folder.url)
    assert stop_asked(folder) is None
    with held(folder):
        said = call("stop", folder.url, "--wait", 0.1, status=1)
    assert "has not ended 0 s after it was asked; see `querypatch status" in said


def call(*words: object, status: int = 0) -> str:
    """What a command says, on both streams."""
    done = CliRunner().invoke(querypatch.app, [str(word) for word in words])
    assert done.exit_code == status, done.output
    return done.output
