"""The proof: a run that is killed again and again sees what an uninterrupted one sees."""

import random
import subprocess
from pathlib import Path

import pytest
import torch

from data.shards import ShardSettings, write_shards
from data.sources import list_source
from data.synthetic import write_scenes
from tests.cluster.killing import (
    begin_job,
    finish,
    ids_of,
    kill_when,
    last_step,
    losses_of,
    pixels_of,
    weights_of,
)

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
    finish(_begin(place, "uninterrupted"))
    return "uninterrupted"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_three_times_and_resumed_with_2_1_and_2_workers_every_batch_is_the_same(
    place: Path, uninterrupted: str
) -> None:
    draw = random.Random(7)
    first, second, third = sorted(draw.sample(range(6, STEPS - 4), 3))
    kill_when(_begin(place, "killed"), lambda: last_step(place, "killed") >= first)
    kill_when(_resume(place, "killed", workers=2), lambda: _is_half_written(place, second))
    kill_when(_resume(place, "killed", workers=1), lambda: last_step(place, "killed") >= third)
    finish(_resume(place, "killed", workers=2))
    expected, found = ids_of(place, uninterrupted, STEPS), ids_of(place, "killed", STEPS)
    assert sorted(expected) == list(range(STEPS))
    assert found == expected


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_with_the_same_workers_losses_and_weights_are_equal_to_the_last_bit(
    place: Path, uninterrupted: str
) -> None:
    kill_when(_begin(place, "twice"), lambda: last_step(place, "twice") >= 13)
    finish(_resume(place, "twice", workers=2))
    assert losses_of(place, "twice") == losses_of(place, uninterrupted)
    ours, theirs = weights_of(place, "twice", STEPS), weights_of(place, uninterrupted, STEPS)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert pixels_of(place, "twice", STEPS) == pixels_of(place, uninterrupted, STEPS)


def _begin(place: Path, run: str) -> subprocess.Popen[bytes]:
    told = (f"run={place / run}", f"data.shards={place / 'shards'}")
    return begin_job(place, run, "pretrain", place / "recipe.yaml", *told)


def _resume(place: Path, run: str, workers: int) -> subprocess.Popen[bytes]:
    return begin_job(place, run, "resume", place / run, f"resources.workers={workers}")


def _is_half_written(place: Path, after: int) -> bool:
    """True while a checkpoint of a step after `after` has files and no manifest."""
    newest = max((place / "killed" / "checkpoints").glob("step_*"))
    has_files = any(newest.iterdir()) and not (newest / "manifest.json").exists()
    return has_files and int(newest.name.removeprefix("step_")) > after - 4
