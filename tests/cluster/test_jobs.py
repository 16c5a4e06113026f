"""Jobs through Ray: asked to stop, robbed of a worker, given weights that do not fit."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from cluster.processes import descendants
from tests.pretrain.small_run import RECIPE, small_shards
from training.checkpoint import newest_checkpoint
from training.run_folder import open_run_folder

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

STEPS = 200


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_shards(tmp_path_factory.mktemp("jobs"))


def test_a_job_that_is_asked_to_stop_leaves_a_checkpoint_of_its_last_step(
    shards: Path, tmp_path: Path
) -> None:
    job = _begin(shards, tmp_path, "loop.steps=100000")
    _wait_for_step(job, tmp_path, 2)
    job.send_signal(signal.SIGTERM)
    said, _ = job.communicate(timeout=300)
    assert job.returncode == 0
    assert "stopping: the workers write a checkpoint first" in said
    newest = newest_checkpoint(open_run_folder(str(tmp_path / "run")))
    assert newest is not None
    assert newest.step == _lines(tmp_path)[-1]["step"]


def test_a_lost_worker_is_started_again_from_the_newest_checkpoint(
    shards: Path, tmp_path: Path
) -> None:
    job = _begin(shards, tmp_path, f"loop.steps={STEPS}", "loop.checkpoint_every_steps=20")
    _wait_for_step(job, tmp_path, 2)
    os.kill(_worker_of(job.pid), signal.SIGKILL)
    job.communicate(timeout=300)
    assert job.returncode == 0
    starts = json.loads((tmp_path / "run/environment.json").read_text())["starts"]
    assert len(starts) == 2
    assert starts[1]["start_step"] >= 2
    trained = [line["step"] for line in _lines(tmp_path) if line["kind"] == "train"]
    assert trained == list(range(1, STEPS + 1))


def test_weights_that_do_not_fit_end_the_job_at_once_with_one_line(
    shards: Path, tmp_path: Path
) -> None:
    torch.save({"conv1.weight": torch.zeros(64, 3, 7, 7)}, tmp_path / "wrong.pth")
    job = _begin(shards, tmp_path, f"model.backbone.weights={tmp_path / 'wrong.pth'}")
    said, _ = job.communicate(timeout=300)
    assert job.returncode == 1
    lines = [line for line in said.splitlines() if line.startswith("querypatch: ")]
    assert len(lines) == 1, said
    (line,) = lines
    assert "wrong.pth" in line
    assert "layer1.0.conv1.weight" in line


def _begin(shards: Path, place: Path, *overrides: str) -> "subprocess.Popen[str]":
    (place / "own.yaml").write_text(RECIPE)
    return subprocess.Popen(
        [
            sys.executable, "-m", "querypatch", "pretrain", str(place / "own.yaml"),
            f"run={place / 'run'}", f"data.shards={shards}", "resources.workers=2", *overrides,
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )  # fmt: skip


def _wait_for_step(job: "subprocess.Popen[str]", place: Path, step: int) -> None:
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline:
        newest = newest_checkpoint(open_run_folder(str(place / "run")))
        if newest is not None and newest.step >= step:
            return
        assert job.poll() is None, "the job ended early"
        time.sleep(0.2)
    pytest.fail(f"no checkpoint of step {step} in 200 s")


def _worker_of(root: int) -> int:
    """One of the job's training processes."""
    for pid in descendants(root):
        name = Path(f"/proc/{pid}/cmdline").read_bytes()
        if b"RayTrainWorker" in name:
            return pid
    pytest.fail("no worker among the job's processes")


def _lines(place: Path) -> list[dict[str, int]]:
    text = (place / "run/metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]
