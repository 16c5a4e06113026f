"""A finetuning run so small that it trains in a second, on labelled pictures drawn for it."""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console

from cluster.worker import run_alone, run_worker
from data.synthetic import write_labelled_scenes
from finetune.recipe import FinetuneRecipe
from finetune.run import checked_recipe
from training.checkpoint import load_newest
from training.checkpoint_writer import CheckpointWriter
from training.progress import open_display
from training.recipe import load_recipe
from training.run_folder import open_run_folder
from training.snapshot import Position
from training.world import World

# The architecture is that of tests.pretrain.small_run, so that its weights fit. Some pictures hold
# more objects than there are object queries.
RECIPE = """
stage: finetune
global_batch: 3
from_scratch: true
model:
  backbone: {name: resnet18, output: layer3, weights: random, frozen_precision: float32}
  hidden_dim: 16
  num_heads: 2
  encoder_layers: 1
  decoder_layers: 2
  feedforward_dim: 24
  pre_norm: true
  num_queries: 6
data:
  augment: {short_sides: [40, 48], max_size: 64, crop_short_sides: [40, 50], crop_sides: [32, 48]}
  stream: {processes: 0}
evaluation: {batch_size: 4, processes: 0, sizes: {short_side: 40, max_size: 64}}
optimiser: {lr: 1e-3}
loop:
  steps: 6
  log_every: 1
  checkpoint_every_steps: 2
  checkpoint_every_minutes: null
resources: {device: cpu}
"""
QUIET = Console(quiet=True)

Box = tuple[int, int, int, int]
"""Left, top, width and height, as COCO has them."""


def small_sets(place: Path, count: int = 10) -> Path:
    """A folder with `count` drawn pictures to learn from, half as many to judge on, as COCO."""
    write_labelled_scenes(place, "train", seed=2, count=count)
    write_labelled_scenes(place, "val", seed=3, count=count // 2)
    return place


def sets_of(sets: Path) -> tuple[str, str]:
    """What a recipe says of these sets."""
    annotations = sets / "annotations"
    return (
        f"data.train={annotations / 'instances_train.json'}",
        f"data.validation={annotations / 'instances_val.json'}",
    )


def small_recipe(sets: Path, run: Path, *overrides: str) -> FinetuneRecipe:
    """The small recipe on these sets, with what they and its weights tell of the detector."""
    told = [*sets_of(sets), f"run={run}", *overrides]
    return checked_recipe(load_recipe(FinetuneRecipe, RECIPE, told))[0]


def run_whole(recipe: FinetuneRecipe) -> Position:
    """From the newest checkpoint to the end."""
    return run_alone(recipe, QUIET)


def run_until(recipe: FinetuneRecipe, step: int) -> Position:
    """The first start of a run, which is asked to stop after `step` updates."""
    asked = itertools.count(1)
    return run_worker(
        recipe,
        World.alone(torch.device("cpu")),
        lambda: next(asked) >= step,
        lambda start, total: open_display(QUIET, start, total),
        unannounced,
    )


def unannounced(writer: CheckpointWriter, _: World) -> CheckpointWriter:
    """Checkpoints that nobody is told of."""
    return writer


def weights(run: Path) -> dict[str, torch.Tensor]:
    """Of the newest checkpoint."""
    snapshot = load_newest(open_run_folder(str(run)))
    assert snapshot is not None
    return dict(snapshot.model)


def lines(run: Path, kind: str) -> list[dict[str, Any]]:
    """The records of a kind: `train` or `evaluation`."""
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if line["kind"] == kind]


def losses(run: Path) -> list[tuple[int, float, float]]:
    """Step, loss and gradient norm of each update."""
    return [(line["step"], line["loss"], line["grad_norm"]) for line in lines(run, "train")]


def write_boxes(
    place: Path, boxes: Sequence[Sequence[Box]], categories: dict[int, str], size: tuple[int, int]
) -> Path:
    """A COCO json of noise pictures of `size` (height, width), one for each list of boxes.

    The n-th box of a picture is of the n-th category, and so round.
    """
    place.mkdir(parents=True, exist_ok=True)
    height, width = size
    images, annotations = list[dict[str, Any]](), list[dict[str, Any]]()
    for number, found in enumerate(boxes):
        noise = np.random.default_rng(number).integers(0, 256, (height, width, 3), np.uint8)
        Image.fromarray(noise).save(place / f"{number}.png")
        images.append(
            {"id": number, "file_name": f"{number}.png", "height": height, "width": width}
        )
        for box, category in zip(found, itertools.cycle(categories), strict=False):
            id = len(annotations)
            annotations.append(
                {"id": id, "image_id": number, "category_id": category, "bbox": list(box)}
            )
    named = [{"id": id, "name": name} for id, name in categories.items()]
    content = {"images": images, "annotations": annotations, "categories": named}
    (place / "instances.json").write_text(json.dumps(content))
    return place / "instances.json"
