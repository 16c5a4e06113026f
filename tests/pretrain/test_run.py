"""The whole pretraining run in this process: resume, init, evaluation, pictures of it."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console

from cluster.worker import run_alone
from pretrain.gallery import draw_patches
from tests.pretrain.small_run import DEFORMABLE, SPARSE, small_recipe, small_shards
from training.checkpoint import load_newest
from training.run_folder import open_run_folder

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_shards(tmp_path_factory.mktemp("small"))


def weights(run: Path) -> dict[str, torch.Tensor]:
    snapshot = load_newest(open_run_folder(str(run)))
    assert snapshot is not None
    return dict(snapshot.model)


def losses(run: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines if line["kind"] == "train"]


def test_a_run_that_was_cut_goes_on_as_if_it_had_not_been(shards: Path, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run_alone(small_recipe(shards, whole), QUIET)
    # The schedule is of constant rate, so a shorter run is the beginning of the longer one.
    run_alone(small_recipe(shards, cut, "loop.steps=4"), QUIET)
    run_alone(small_recipe(shards, cut), QUIET)
    assert losses(cut) == losses(whole)
    ours, theirs = weights(cut), weights(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_sparse_detector_is_pretrained_in_bf16_evaluated_averaged_and_goes_on_to_the_bit(
    shards: Path, tmp_path: Path
) -> None:
    told = (
        *SPARSE, f"data.held_out={shards}", "loop.evaluate_every=4", "ema={decay: 0.9}",
        "loop.precision=bf16", "queries.shuffle=true",
    )  # fmt: skip
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run_alone(small_recipe(shards, whole, *told), QUIET)
    run_alone(small_recipe(shards, cut, *told, "loop.steps=4"), QUIET)
    run_alone(small_recipe(shards, cut, *told), QUIET)
    assert losses(cut) == losses(whole)
    ours, theirs = weights(cut), weights(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    lines = [json.loads(line) for line in (cut / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if line["kind"] == "train"]
    assert all(0 < line["loss/loss_mask_prediction"] < 2 for line in trained)
    assert all(0 < line["loss/corr_mask_attn_map_dec_all"] < 1 for line in trained)
    assert {"lr/rest", "lr/sampling"} <= trained[0].keys()
    evaluated = [line for line in lines if line["kind"] == "evaluation"]
    assert [line["step"] for line in evaluated] == [0, 4, 6]
    assert {"eval/ap50", "eval/own_patch", "eval/loss_feature"} <= evaluated[0].keys()
    draw_patches(str(cut), tmp_path / "found.png", count=2)
    with Image.open(tmp_path / "found.png") as drawn:
        assert drawn.width > 800


def test_init_takes_the_weights_of_a_deformable_run(shards: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    run_alone(small_recipe(shards, first, *DEFORMABLE, "loop.steps=2"), QUIET)
    recipe = small_recipe(
        shards, second, *DEFORMABLE, f"init={first}", "optimiser.lr=1e-30",
        "optimiser.sampling_lr=1e-30", "optimiser.weight_decay=0", "loop.steps=2",
    )  # fmt: skip
    run_alone(recipe, QUIET)
    ours, theirs = weights(second), weights(first)
    # What is zero at first, as a box head's last layer, moves by the rate.
    assert all(torch.allclose(ours[name], theirs[name], rtol=0, atol=1e-20) for name in theirs)


def test_training_with_the_moving_average_evaluates_and_keeps_it(
    shards: Path, tmp_path: Path
) -> None:
    recipe = small_recipe(
        shards, tmp_path / "run", f"data.held_out={shards}", "loop.evaluate_every=3",
        "ema={decay: 0.9}", "checkpoints.best_metric=eval/ap50",
    )  # fmt: skip
    run_alone(recipe, QUIET)
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    evaluations = [line for line in lines if line["kind"] == "evaluation"]
    assert [line["step"] for line in evaluations] == [0, 3, 6]
    names = {"ap", "ap50", "ap75", "mean_iou", "recall50", "own_patch", "loss", "loss_feature"}
    assert {f"eval/{name}" for name in names} <= evaluations[0].keys()
    snapshot = load_newest(open_run_folder(recipe.run))
    assert snapshot is not None
    assert snapshot.ema


def test_init_takes_the_weights_of_a_run_and_nothing_else(shards: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    run_alone(small_recipe(shards, first), QUIET)
    recipe = small_recipe(
        shards, second, f"init={first}", "optimiser.lr=1e-30", "optimiser.weight_decay=0"
    )
    run_alone(recipe, QUIET)
    ours, theirs = weights(second), weights(first)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert losses(second)[0][0] == 1


def test_shards_and_runs_can_be_looked_at(shards: Path, tmp_path: Path) -> None:
    run_alone(small_recipe(shards, tmp_path / "run", "loop.steps=2"), QUIET)
    draw_patches(str(shards), tmp_path / "shards.png", count=2)
    draw_patches(str(tmp_path / "run"), tmp_path / "run.png", count=2)
    with Image.open(tmp_path / "shards.png") as drawn:
        assert drawn.width > 800
    with Image.open(tmp_path / "run.png") as drawn:
        assert drawn.width > 800


def test_a_frozen_backbone_is_not_trained_and_a_trained_one_is(
    shards: Path, tmp_path: Path
) -> None:
    run_alone(small_recipe(shards, tmp_path / "frozen", "loop.steps=2"), QUIET)
    run_alone(
        small_recipe(shards, tmp_path / "trained", "loop.steps=2", "model.backbone.train=true"),
        QUIET,
    )
    frozen, trained = weights(tmp_path / "frozen"), weights(tmp_path / "trained")
    name = "detector.backbone.body.layer3.0.conv1.weight"
    stem = "detector.backbone.body.conv1.weight"
    assert not torch.equal(frozen[name], trained[name])
    assert torch.equal(frozen[stem], trained[stem])
