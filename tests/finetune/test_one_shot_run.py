"""One-shot detection as a run: cut, resumed, judged on seen and unseen classes."""

from pathlib import Path

import torch

from finetune.artefacts import open_weights
from finetune.recipe import FinetuneRecipe
from finetune.run import checked_recipe
from tests.data.one_shot_sets import write_coco
from tests.finetune.small_run import lines, losses, run_until, run_whole, weights
from training.recipe import load_recipe

RECIPE = """
task: one_shot
from_scratch: true
global_batch: 3
model:
  backbone: {name: resnet18, output: layer3, weights: random, frozen_precision: float32}
  hidden_dim: 16
  num_heads: 2
  encoder_layers: 1
  decoder_layers: 2
  feedforward_dim: 24
  num_queries: 6
one_shot: {unseen: [emu], references: 1, crops: {side: 32, min_side: 8.0}}
data:
  augment: {kind: flip, short_sides: [44, 48], max_size: 64}
  validation: same
  stream: {processes: 0}
evaluation: {sizes: {short_side: 44, max_size: 64}, processes: 0}
best_metric: eval/seen_ap50
loop: {steps: 4, log_every: 1, evaluate_every: 2, checkpoint_every_steps: 2}
resources: {device: cpu}
"""


def test_a_one_shot_run_goes_on_as_if_it_had_not_been_cut(tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train, pictures = write_coco(tmp_path / "set")
    told = (f"data.train={train}", f"data.train_pictures={pictures}")
    run_whole(small_recipe(whole, *told))
    run_until(small_recipe(cut, *told), 3)
    run_whole(small_recipe(cut, *told))
    assert [step for step, _, _ in losses(whole)] == [1, 2, 3, 4]
    assert losses(cut) == losses(whole)
    ours, theirs = weights(cut), weights(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    judged = lines(whole, "evaluation")
    assert [line["step"] for line in judged] == [0, 2, 4]
    assert all(0 <= judged[-1][f"eval/{part}_ap50"] <= 1 for part in ("seen", "unseen"))
    found = open_weights(str(cut))
    assert found.kind == "one_shot"
    assert found.source.endswith("best/model.safetensors")


def small_recipe(run: Path, *overrides: str) -> FinetuneRecipe:
    recipe = load_recipe(FinetuneRecipe, RECIPE, [*overrides, f"run={run}"])
    return checked_recipe(recipe)[0]
