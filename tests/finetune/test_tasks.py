"""One-shot detection and panoptic segmentation as runs: cut, resumed, judged."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from finetune.artefacts import open_weights
from finetune.recipe import FinetuneRecipe
from finetune.run import checked_recipe
from models.artefact import PictureInput, Provenance, artefact_metadata
from models.backbone import BackboneSettings
from models.detector import Detector, DetectorSettings
from models.structures import Classes
from tests.data.one_shot_sets import write_coco
from tests.data.panoptic_sets import write_panoptic
from tests.finetune.small_run import lines, losses, run_until, run_whole, weights
from training.recipe import load_recipe

ONE_SHOT = """
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
PANOPTIC = """
task: panoptic
global_batch: 3
model: {backbone: {frozen_precision: float32}}
data:
  augment: {short_sides: [48, 56], max_size: 80, crop_short_sides: [48], crop_sides: [32, 48]}
  validation: same
  stream: {processes: 0}
evaluation: {sizes: {short_side: 48, max_size: 64}, processes: 0}
best_metric: eval/pq
loop: {steps: 4, log_every: 1, evaluate_every: 2, checkpoint_every_steps: 2}
resources: {device: cpu}
"""
OF_PANOPTIC = Classes(("dog", "cat", "sky", "sea"), (4, 17, 180, 200), (True, True, False, False))


@pytest.mark.parametrize("task", ["one_shot", "panoptic"])
def test_a_run_of_another_task_goes_on_as_if_it_had_not_been_cut(task: str, tmp_path: Path) -> None:
    begun = one_shot(tmp_path / "set") if task == "one_shot" else panoptic(tmp_path / "set")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run_whole(recipe(begun, whole))
    run_until(recipe(begun, cut), 3)
    run_whole(recipe(begun, cut))
    assert len(losses(whole)) == 4
    assert losses(cut) == losses(whole)
    ours, theirs = weights(cut), weights(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    judged = lines(whole, "evaluation")
    assert [line["step"] for line in judged] == [0, 2, 4]
    numbers = {"one_shot": ("seen_ap50", "unseen_ap50"), "panoptic": ("pq", "pq_things")}[task]
    assert all(0 <= judged[-1][f"eval/{number}"] <= 1 for number in numbers)
    found = open_weights(str(cut))
    assert found.kind == task
    assert found.source.endswith("best/model.safetensors")


def test_the_detector_under_a_mask_head_stays_as_it_is(tmp_path: Path) -> None:
    begun, run = panoptic(tmp_path / "set"), tmp_path / "run"
    run_whole(recipe(begun, run))
    ours, theirs = weights(run), detector().state_dict()
    assert all(torch.equal(ours[f"detector.{name}"], theirs[name]) for name in theirs)
    report = json.loads((run / "load_report.json").read_text())
    new = {name for part in report["parts"].values() for name in part.get("new", ())}
    assert new == {name for name in ours if not name.startswith("detector.")}
    assert open_weights(str(run)).classes == OF_PANOPTIC


def recipe(begun: tuple[str, list[str]], run: Path) -> FinetuneRecipe:
    text, told = begun
    return checked_recipe(load_recipe(FinetuneRecipe, text, [*told, f"run={run}"]))[0]


def one_shot(place: Path) -> tuple[str, list[str]]:
    train, pictures = write_coco(place)
    return ONE_SHOT, [f"data.train={train}", f"data.train_pictures={pictures}"]


def panoptic(place: Path) -> tuple[str, list[str]]:
    """With a detector of the same classes, as the first stage leaves it."""
    train = write_panoptic(place, 4)
    model = detector()
    metadata = artefact_metadata(
        "detector", model.settings, OF_PANOPTIC, PictureInput(), Provenance()
    )
    save_file(model.state_dict(), place / "detector.safetensors", metadata=metadata)
    return PANOPTIC, [f"data.train={train}", f"init={place / 'detector.safetensors'}"]


def detector() -> Detector:
    settings = DetectorSettings(
        backbone=BackboneSettings(name="resnet18", weights="random", frozen_precision="float32"),
        hidden_dim=128,
        num_heads=8,
        encoder_layers=1,
        decoder_layers=2,
        feedforward_dim=24,
        num_queries=6,
        num_classes=4,
    )
    return Detector(settings, torch.Generator().manual_seed(3))
