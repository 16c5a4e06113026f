"""The proof: a run that is killed again and again sees what an uninterrupted one sees."""

import json
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cluster.processes import kill_tree
from data.shards import ShardSettings, write_shards
from data.sources import list_source
from data.synthetic import write_scenes

STEPS = 30
RECIPE = """
global_batch: 5
model:
  backbone: {name: resnet18, output: layer3, weights: random}
  hidden_dim: 16
  num_heads: 2
  encoder_layers: 1
  decoder_layers: 2
  feedforward_dim: 24
  dropout: 0.1
  pre_norm: true
  num_queries: 6
  num_classes: 2
queries: {num_patches: 2, shuffle: true}
data:
  patches: {patch_size: 32, short_sides: [48, 64], max_size: 96}
  stream: {processes: 1}
optimiser: {lr: 1e-3}
loop:
  steps: STEPS
  log_every: 1
  checkpoint_every_steps: 4
  checkpoint_every_minutes: null
resources: {workers: 2, device: cpu, max_restarts: 0}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 23 pictures in shards and a recipe; 23 is no multiple of the batch of 5."""
    place = tmp_path_factory.mktemp("killed")
    write_scenes(place / "pictures", seed=5, count=23)
    settings = ShardSettings(samples_per_shard=8)
    write_shards(list_source(str(place / "pictures")), str(place / "shards"), settings)
    (place / "recipe.yaml").write_text(RECIPE.replace("STEPS", str(STEPS)))
    return place


@pytest.fixture(scope="module")
def uninterrupted(place: Path) -> str:
    """Name of a run of two workers that nothing happened to."""
    _finish(_begin(place, "uninterrupted"))
    return "uninterrupted"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_three_times_and_resumed_with_2_1_and_2_workers_every_batch_is_the_same(
    place: Path, uninterrupted: str
) -> None:
    draw = random.Random(7)
    first, second, third = sorted(draw.sample(range(6, STEPS - 4), 3))
    _kill(_begin(place, "killed"), lambda: _last_step(place, "killed") >= first)
    _kill(_resume(place, "killed", workers=2), lambda: _is_half_written(place, second))
    _kill(_resume(place, "killed", workers=1), lambda: _last_step(place, "killed") >= third)
    _finish(_resume(place, "killed", workers=2))
    expected, found = _ids(place, uninterrupted), _ids(place, "killed")
    assert sorted(expected) == list(range(STEPS))
    assert found == expected


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_with_the_same_workers_losses_and_weights_are_equal_to_the_last_bit(
    place: Path, uninterrupted: str
) -> None:
    _kill(_begin(place, "twice"), lambda: _last_step(place, "twice") >= 13)
    _finish(_resume(place, "twice", workers=2))
    assert _losses(place, "twice") == _losses(place, uninterrupted)
    ours, theirs = _weights(place, "twice"), _weights(place, uninterrupted)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert _pixels(place, "twice") == _pixels(place, uninterrupted)


def _begin(place: Path, run: str) -> subprocess.Popen[bytes]:
    return _job(place, run, "pretrain", str(place / "recipe.yaml"), f"run={place / run}",
                f"data.shards={place / 'shards'}")  # fmt: skip


def _resume(place: Path, run: str, workers: int) -> subprocess.Popen[bytes]:
    return _job(place, run, "resume", str(place / run), f"resources.workers={workers}")


def _job(place: Path, run: str, *arguments: str) -> subprocess.Popen[bytes]:
    log = (place / f"{run}.log").open("ab")
    with log:
        return subprocess.Popen(
            [
                sys.executable,
                "-m",
                "tests.cluster.recorded_job",
                str(place / f"{run}.notes"),
                *arguments,
            ],
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def _finish(job: subprocess.Popen[bytes]) -> None:
    assert job.wait(timeout=300) == 0


def _kill(job: subprocess.Popen[bytes], is_time: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 300
    while not is_time():
        assert job.poll() is None, f"the job ended early with status {job.returncode}"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    kill_tree(job.pid)
    job.wait()


def _is_half_written(place: Path, after: int) -> bool:
    """True while a checkpoint of a step after `after` has files and no manifest."""
    newest = max((place / "killed" / "checkpoints").glob("step_*"))
    has_files = any(newest.iterdir()) and not (newest / "manifest.json").exists()
    return has_files and int(newest.name.removeprefix("step_")) > after - 4


def _notes(place: Path, run: str) -> list[dict[str, object]]:
    files = sorted((place / f"{run}.notes").glob("*/*.jsonl"))
    lines = [line for file in files for line in file.read_text().splitlines()]
    return [json.loads(line) for line in lines if line.endswith("}")]


def _last_step(place: Path, run: str) -> int:
    return max((int(str(note["step"])) for note in _notes(place, run)), default=-1)


def _ids(place: Path, run: str) -> dict[int, list[int]]:
    """The ids of each global batch, joined over workers; a batch seen twice must be the same."""
    parts: dict[int, dict[str, set[int]]] = {}
    for file in sorted((place / f"{run}.notes").glob("*/*.jsonl")):
        start = file.parent.name
        for line in file.read_text().splitlines():
            note = json.loads(line) if line.endswith("}") else {"step": -1, "ids": []}
            parts.setdefault(note["step"], {}).setdefault(start, set()).update(note["ids"])
    joined: dict[int, list[int]] = {}
    for step, starts in sorted(parts.items()):
        whole = max(starts.values(), key=len)
        assert all(seen <= whole for seen in starts.values()), f"step {step}: {starts}"
        joined[step] = sorted(whole)
    joined.pop(-1, None)
    return {step: ids for step, ids in joined.items() if step < STEPS}


def _pixels(place: Path, run: str) -> set[tuple[object, object]]:
    return {
        (note["step"], note["pixels"])
        for note in _notes(place, run)
        if int(str(note["step"])) < STEPS
    }


def _losses(place: Path, run: str) -> list[tuple[object, object, object]]:
    lines = [json.loads(line) for line in (place / run / "metrics.jsonl").read_text().splitlines()]
    return [
        (line["step"], line["loss"], line["grad_norm"]) for line in lines if line["kind"] == "train"
    ]


def _weights(place: Path, run: str) -> dict[str, torch.Tensor]:
    last = place / run / "checkpoints" / f"step_{STEPS:06d}" / "model.safetensors"
    return load_file(last)
