"""A pretraining run so small that it trains in a second, on pictures drawn for it."""

from pathlib import Path

from data.shards import ShardSettings, write_shards
from data.sources import list_source
from data.synthetic import write_scenes
from pretrain.recipe import PretrainRecipe
from training.recipe import load_recipe

RECIPE = """
global_batch: 3
model:
  backbone: {name: resnet18, output: layer3, weights: random, frozen_precision: float32}
  hidden_dim: 16
  num_heads: 2
  encoder_layers: 1
  decoder_layers: 2
  feedforward_dim: 24
  pre_norm: true
  num_queries: 6
  num_classes: 2
queries: {num_patches: 2}
data:
  held_out_pictures: 4
  patches: {patch_size: 32, short_sides: [40, 48], max_size: 64, held_out_short_side: 40}
  stream: {processes: 0}
optimiser: {lr: 1e-3}
loop:
  steps: 6
  log_every: 1
  checkpoint_every_steps: 2
  checkpoint_every_minutes: null
resources: {device: cpu}
"""

DEFORMABLE = (
    "model.encoder_attention=deformable", "model.decoder_attention=deformable",
    "model.feature_levels=2", "model.box_refinement=true", "model.class_scores=sigmoid",
    "model.pre_norm=false", "model.hidden_dim=32", "model.encoder_layers=2",
    "optimiser.sampling_lr=1e-4",
)  # fmt: skip
"""Overrides that make it a Deformable DETR."""
SPARSE = (*DEFORMABLE, "model.rho=0.4", "model.selection={encoder_auxiliary: false}")
"""Overrides that make it a Sparse DETR."""


def small_shards(place: Path, count: int = 10) -> Path:
    """A folder with `count` drawn pictures in shards."""
    write_scenes(place / "pictures", seed=2, count=count)
    settings = ShardSettings(samples_per_shard=4)
    write_shards(list_source(str(place / "pictures")), str(place / "shards"), settings)
    return place / "shards"


def small_recipe(shards: Path, run: Path, *overrides: str) -> PretrainRecipe:
    """The small recipe on these shards."""
    told = [f"data.shards={shards}", f"run={run}"]
    return load_recipe(PretrainRecipe, RECIPE, [*told, *overrides])
