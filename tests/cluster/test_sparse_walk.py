"""Sparse DETR's whole walk: pretrained through Ray, killed, resumed, finetuned, judged.

The transformer is pretrained with learned queries and finetuned with the best of what tokens
propose; the scoring network goes along.
"""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import querypatch
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
from tests.finetune.small_run import sets_of, small_sets

STEPS = 12
PRETRAINING = f"""
global_batch: 3
model:
  backbone: {{name: resnet18, output: layer3, weights: random}}
  encoder_attention: deformable
  decoder_attention: deformable
  feature_levels: 2
  box_refinement: true
  class_scores: sigmoid
  rho: 0.4
  selection: {{encoder_auxiliary: false}}
  hidden_dim: 32
  num_heads: 2
  encoder_layers: 2
  decoder_layers: 2
  feedforward_dim: 24
  num_queries: 6
  num_classes: 2
queries: {{num_patches: 2, shuffle: true}}
data:
  patches: {{patch_size: 32, short_sides: [48, 64], max_size: 96}}
  stream: {{processes: 1}}
optimiser: {{lr: 1e-3, sampling_lr: 1e-4}}
ema: {{decay: 0.9}}
loop:
  steps: {STEPS}
  log_every: 1
  checkpoint_every_steps: 3
  checkpoint_every_minutes: null
resources: {{workers: 2, device: cpu, max_restarts: 0}}
"""
FINETUNING = """
stage: finetune
global_batch: 3
model:
  backbone: {train: false}
  encoder_attention: deformable
  decoder_attention: deformable
  two_stage: true
  box_refinement: true
  class_scores: sigmoid
  num_queries: 7
  proposal_content: memory
  proposal_classes: all
  rho: 0.3
  selection: {encoder_auxiliary: true}
data:
  augment: {short_sides: [48, 64], max_size: 96, crop_short_sides: [40, 50], crop_sides: [32, 48]}
  stream: {processes: 0}
evaluation: {batch_size: 4, processes: 0, sizes: {short_side: 48, max_size: 96}}
optimiser: {lr: 1e-3, sampling_lr: 1e-4}
loop: {steps: 4, log_every: 1, evaluate_every: 4, checkpoint_every_minutes: null}
resources: {device: cpu}
"""


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_sparse_detector_is_pretrained_killed_resumed_to_the_bit_finetuned_and_judged(
    tmp_path: Path,
) -> None:
    write_scenes(tmp_path / "pictures", seed=5, count=11)
    settings = ShardSettings(samples_per_shard=4)
    write_shards(list_source(str(tmp_path / "pictures")), str(tmp_path / "shards"), settings)
    (tmp_path / "sparse.yaml").write_text(PRETRAINING)
    begun = ("pretrain", tmp_path / "sparse.yaml", f"data.shards={tmp_path / 'shards'}")
    finish(begin_job(tmp_path, "whole", *begun, f"run={tmp_path / 'whole'}"))
    job = begin_job(tmp_path, "killed", *begun, f"run={tmp_path / 'killed'}")
    kill_when(job, lambda: last_step(tmp_path, "killed") >= 7)
    finish(begin_job(tmp_path, "killed", "resume", tmp_path / "killed"))

    assert sorted(ids_of(tmp_path, "whole", STEPS)) == list(range(STEPS))
    assert ids_of(tmp_path, "killed", STEPS) == ids_of(tmp_path, "whole", STEPS)
    assert pixels_of(tmp_path, "killed", STEPS) == pixels_of(tmp_path, "whole", STEPS)
    assert losses_of(tmp_path, "killed") == losses_of(tmp_path, "whole")
    ours, theirs = (weights_of(tmp_path, run, STEPS) for run in ("killed", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert any("scorer" in name for name in theirs)
    _finetune_and_judge(tmp_path)


def _finetune_and_judge(place: Path) -> None:
    sets = sets_of(small_sets(place / "sets", count=6))
    (place / "finetune.yaml").write_text(FINETUNING)
    run = place / "finetuned"
    told = (*sets, f"run={run}", f"init={place / 'killed'}")
    _call("finetune", place / "finetune.yaml", *told, "--local")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if line["kind"] == "train"]
    asked = {"loss/loss_ce_enc", "loss/loss_ce_enc_0", "loss/loss_mask_prediction"}
    assert asked <= trained[0].keys()
    validation = sets[1].partition("=")[2]
    _call("evaluate", run, validation, "processes=0", "-o", place / "judged.json")
    judged = json.loads((place / "judged.json").read_text())
    assert judged["pictures"] == 3
    assert 0 <= judged["numbers"]["ap"] <= 1


def _call(*arguments: object) -> None:
    done = CliRunner().invoke(querypatch.app, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output
