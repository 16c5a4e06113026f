"""Checks before a job: what is wrong is said at once, in one line, and nothing is lost."""

import logging
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console

from cluster.launch import run_with_ray
from cluster.preflight.inputs import RefusedJob, checked_inputs, checked_new_run, resumed_recipe
from cluster.worker import run_alone
from data.index import ShardIndexError
from data.shards import ShardSettings, write_shards
from data.sources import list_source
from tests.pretrain.small_run import small_recipe, small_shards
from training.recipe import RecipeError


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_shards(tmp_path_factory.mktemp("preflight"))


@pytest.fixture(scope="module")
def run(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    run = tmp_path_factory.mktemp("preflight") / "run"
    recipe = small_recipe(shards, run, "loop.steps=2")
    checked_new_run(recipe)
    run_alone(recipe, Console(quiet=True))
    return run


def test_a_folder_that_holds_a_run_is_refused_for_a_new_one(shards: Path, run: Path) -> None:
    with pytest.raises(RefusedJob, match="holds a run already; continue it with `querypatch resum"):
        checked_new_run(small_recipe(shards, run))


def test_a_folder_without_a_run_cannot_be_resumed(tmp_path: Path) -> None:
    with pytest.raises(RefusedJob, match=r"holds no run \(no recipe.yaml\); start one with"):
        resumed_recipe(str(tmp_path), [])


def test_a_resumed_run_may_change_its_workers_and_loader_processes(run: Path) -> None:
    overrides = ["resources.workers=2", "data.stream.processes=1", "loop.log_every=9"]
    recipe = resumed_recipe(str(run), overrides)
    assert (recipe.resources.workers, recipe.data.stream.processes) == (2, 1)


def test_a_run_of_the_version_before_finetuning_resumes(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    place = tmp_path / "run/recipe.yaml"
    new = ("stage:", "  evaluate_every_epochs:", "  score_in_background:")
    lines = place.read_text().splitlines(keepends=True)
    kept = [line for line in lines if not line.startswith(new)]
    assert len(kept) == len(lines) - len(new)
    place.write_text("".join(kept).replace(f"run: {run}", f"run: {tmp_path / 'run'}"))
    assert resumed_recipe(str(tmp_path / "run"), []).stage == "pretrain"


def test_another_recipe_is_refused_with_the_differing_keys(run: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        resumed_recipe(str(run), ["optimiser.lr=0.01", "queries.mask_ratio=0.5"])
    assert "optimiser.lr: 0.001 -> 0.01" in str(caught.value)
    assert "queries.mask_ratio: 0.1 -> 0.5" in str(caught.value)
    assert "resources" not in str(caught.value)


def test_other_shards_under_the_same_name_are_refused(tmp_path: Path) -> None:
    shards = small_shards(tmp_path)
    recipe = small_recipe(shards, tmp_path / "run", "loop.steps=2")
    checked_new_run(recipe)
    run_alone(recipe, Console(quiet=True))
    for file in shards.iterdir():
        file.unlink()
    settings = ShardSettings(samples_per_shard=4, seed=1)
    write_shards(list_source(str(tmp_path / "pictures")), str(shards), settings)
    with pytest.raises(RefusedJob, match=r"data\.shards holds other pictures than those that"):
        resumed_recipe(str(tmp_path / "run"), [])


def test_missing_shards_weights_and_init_are_named(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(ShardIndexError, match=r"has no index.json: run `querypatch shards index"):
        checked_inputs(small_recipe(tmp_path, tmp_path / "run"))
    with pytest.raises(RefusedJob, match=r"model.backbone.weights=/none.pth does not exist"):
        checked_inputs(small_recipe(shards, tmp_path / "run", "model.backbone.weights=/none.pth"))
    with pytest.raises(RefusedJob, match=r"init=/none does not exist"):
        checked_inputs(small_recipe(shards, tmp_path / "run", "init=/none"))


def test_a_batch_larger_than_the_data_is_refused(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="global_batch=11 is more than the 10 samples"):
        checked_inputs(small_recipe(shards, tmp_path / "run", "global_batch=11"))


def test_evaluating_on_the_training_shards_is_said(
    shards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        checked_inputs(small_recipe(shards, tmp_path / "run", f"data.held_out={shards}"))
    assert "no fair measure" in caplog.text


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there_is_refused_before_anything_starts(
    shards: Path, tmp_path: Path
) -> None:
    recipe = small_recipe(shards, tmp_path / "run", "resources.device=cuda")
    with pytest.raises(ValueError, match=r"resources\.device=cuda: this machine has no usable GPU"):
        run_with_ray(recipe, None, Console(quiet=True))
