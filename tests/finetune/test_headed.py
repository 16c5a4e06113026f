"""RetinaNet and Mask R-CNN on our backbones: targets, shares, masks, a whole run, its use."""

from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from finetune.artefacts import open_weights
from finetune.evaluate_weights import judge_weights
from finetune.headed import HeadedObjective, build_headed, headed_task
from finetune.mask_ap import PictureMasks, encoded, score_masks
from finetune.recipe import FinetuneRecipe
from finetune.run import checked_recipe
from finetune.sets import open_sets
from models.backbone import Backbone, BackboneSettings
from models.interop.backbones import load_backbone
from models.other_heads import HeadedDetector, torchvision_targets
from models.shares import Share
from models.structures import DetectionBatch, Images, Targets, padding_of
from querypatch import app
from tests.data.panoptic_sets import write_panoptic
from tests.finetune.small_run import lines, run_until, run_whole, sets_of, small_sets, weights
from training.recipe import load_recipe
from training.world import World

CPU = torch.device("cpu")
BACKBONE = BackboneSettings(name="resnet18", weights="random", train=True)
RECIPE = """
stage: finetune
task: retinanet
global_batch: 2
from_scratch: true
model:
  backbone: {name: resnet18, weights: random, train: true}
data:
  augment: {kind: none, short_sides: [64], max_size: 96}
  stream: {processes: 0}
evaluation: {batch_size: 4, processes: 0, max_pictures: 4, sizes: {short_side: 64, max_size: 96}}
optimiser: {lr: 1e-3, decay: matrices}
loop:
  steps: 4
  log_every: 1
  checkpoint_every_steps: 2
  checkpoint_every_minutes: null
resources: {device: cpu}
"""


def batch(*, blank: bool = False) -> DetectionBatch:
    """Pictures of 64 x 96 and 96 x 48 pixels, with two objects and none."""
    generator = torch.Generator().manual_seed(3)
    sizes = torch.tensor([[64, 96], [96, 48]])
    pixels = torch.randn(2, 3, 96, 96, generator=generator)
    boxes = torch.tensor([[0.5, 0.5, 0.5, 0.25], [0.25, 0.5, 0.25, 0.5]])
    segments = torch.zeros(2, 96, 96, dtype=torch.int16)
    segments[0, 24:40, 24:72], segments[0, 16:24, 12:36] = 1, 2
    return DetectionBatch(
        images=Images(pixels, padding_of(sizes, 96, 96), sizes),
        targets=Targets((boxes, boxes[:0]), (torch.tensor([2, 0]), torch.zeros(0).long())),
        keys=("a", "b"),
        sample_ids=torch.tensor([0, 1]),
        segments=segments,
        blank=blank,
    )


def headed(head: str) -> HeadedDetector:
    assert head in ("retinanet", "mask_rcnn")
    return HeadedDetector(BACKBONE, head, 3, torch.Generator().manual_seed(0))  # type: ignore[arg-type]


def test_targets_are_corners_in_pixels_and_labels_leave_room_for_the_background() -> None:
    given = batch()
    told = torchvision_targets(
        given.images, given.targets.boxes_cxcywh, given.targets.labels, "retinanet"
    )
    assert told[0]["boxes"].tolist() == [[24, 24, 72, 40], [12, 16, 36, 48]]
    assert told[0]["labels"].tolist() == [2, 0]
    assert told[1]["boxes"].shape == (0, 4)
    masked = HeadedObjective("mask_rcnn", (True, True, False)).targets(given)
    assert masked[0]["labels"].tolist() == [1]
    assert masked[0]["masks"].shape == (1, 64, 96)
    assert masked[0]["masks"].sum() == 8 * 24


def test_retinanets_losses_of_parts_add_up_to_those_of_the_batch() -> None:
    model, objective, whole = (
        headed("retinanet").train(),
        HeadedObjective("retinanet", None),
        batch(),
    )
    share = Share(objective.counts(whole), workers=2)
    parts = [
        objective(model, whole.part(slice(n, n + 1)), share, torch.Generator()) for n in (0, 1)
    ]
    alone = objective(model, whole, Share(objective.counts(whole)), torch.Generator())
    torch.testing.assert_close(
        (parts[0].total + parts[1].total) / 2, alone.total, rtol=1e-4, atol=0
    )
    blank = objective(model, batch(blank=True), share, torch.Generator())
    assert float(blank.total.detach()) == 0


@pytest.mark.parametrize("head", ["retinanet", "mask_rcnn"])
def test_every_trained_parameter_learns_and_answers_are_in_the_sizes_asked_for(head: str) -> None:
    model = headed(head).train()
    things = (True, True, True) if head == "mask_rcnn" else None
    given = batch()
    assert head in ("retinanet", "mask_rcnn")
    objective = HeadedObjective(head, things)  # type: ignore[arg-type]
    losses = objective(model, given, Share(objective.counts(given)), torch.Generator())
    losses.total.backward()
    without = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("cls_logits.bias", "cls_score.bias")):
                parameter.fill_(1.0)
    found = model.eval().find(given.images, torch.tensor([[128, 192], [96, 48]]))
    assert len(found[0].scores) > 0
    assert found[0].boxes_xyxy[:, 2].max() <= 192
    assert found[0].boxes_xyxy[:, 2].max() > 96
    assert found[0].labels.min() >= 0
    if head == "mask_rcnn":
        assert found[0].masks is not None
        assert found[0].masks.shape[1:] == (128, 192)


def test_mask_ap_of_a_hand_made_case() -> None:
    true = np.zeros((2, 10, 10), bool)
    true[0, :5, :5], true[1, 5:, 5:] = True, True
    half = np.zeros((1, 10, 10), bool)
    half[0, :5, :4] = True
    truth = PictureMasks(encoded(true), np.array([0, 1]), crowd=np.array([False, False]))
    found = PictureMasks(
        encoded(np.concatenate((half, true[1:]))),
        np.array([0, 1]),
        np.array([0.9, 0.8], np.float32),
    )
    scores = score_masks([truth], [found], 2)
    # The first overlaps by 20 / 25 = 0.8: right at 7 of the 10 thresholds.
    assert scores.ap == pytest.approx((0.7 + 1) / 2, abs=1e-6)
    assert (scores.ap50, scores.ap75) == (1.0, 1.0)
    nothing = PictureMasks((), np.zeros(0, np.int64), np.zeros(0, np.float32))
    assert score_masks([truth], [nothing], 2).ap == 0
    assert np.isnan(score_masks([nothing], [nothing], 2).ap)


def test_a_retinanet_is_trained_resumed_judged_and_exported(tmp_path: Path) -> None:
    sets = small_sets(tmp_path / "sets", count=4)
    told = (*sets_of(sets), "loop.evaluate_every=4")

    def recipe(name: str) -> FinetuneRecipe:
        run = f"run={tmp_path / name}"
        return checked_recipe(load_recipe(FinetuneRecipe, RECIPE, [*told, run]))[0]

    run_whole(recipe("whole"))
    run_until(recipe("cut"), 3)
    run_whole(recipe("cut"))
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert "eval/ap" in lines(tmp_path / "whole", "evaluation")[-1]
    artefact = open_weights(str(tmp_path / "whole"))
    assert artefact.kind == "retinanet"
    data = str(sets / "annotations" / "instances_val.json")
    judged = judge_weights(str(tmp_path / "whole"), data, ["processes=0"], CPU)
    assert "numbers" in judged.content
    out = tmp_path / "out"
    done = CliRunner().invoke(app, ["export", str(tmp_path / "whole"), str(out)])
    assert done.exit_code == 0, done.output
    assert build_headed(open_weights(str(out))).head_name == "retinanet"
    body = Backbone(BackboneSettings(name="resnet18", weights=str(out / "model.safetensors")))
    load_backbone(body)
    refused = CliRunner().invoke(app, ["predict", str(out), str(sets), "-o", str(tmp_path / "p")])
    assert "is a retinanet" in refused.output
    nowhere = load_recipe(
        FinetuneRecipe, RECIPE, [*sets_of(sets), f"run={tmp_path}", "task=mask_rcnn"]
    )
    with pytest.raises(ValueError, match="has no segments, from which task=mask_rcnn learns"):
        headed_task(nowhere, "mask_rcnn", open_sets(nowhere), World.alone(CPU), is_fresh=True)


def test_a_mask_rcnn_learns_the_things_of_a_panoptic_set(tmp_path: Path) -> None:
    for split in ("train2017", "val2017"):
        write_panoptic(tmp_path, 4, split)
    place = tmp_path / "annotations"
    told = (
        f"data.train={place / 'panoptic_train2017.json'}",
        f"data.validation={place / 'panoptic_val2017.json'}",
        *(f"run={tmp_path / 'run'}", "task=mask_rcnn", "loop.steps=2", "loop.evaluate_every=2"),
        "model.backbone={name: dat_t, weights: random, train: true}",
    )
    run_whole(checked_recipe(load_recipe(FinetuneRecipe, RECIPE, told))[0])
    found = lines(tmp_path / "run", "evaluation")[-1]
    assert {"eval/mask_ap", "eval/ap"} <= found.keys()
    train = lines(tmp_path / "run", "train")[-1]
    assert train["loss/loss_mask"] > 0
    assert open_weights(str(tmp_path / "run")).kind == "mask_rcnn"
