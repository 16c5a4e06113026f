"""Both stages of panoptic segmentation as whole runs: boxes, then the mask head on them."""

from pathlib import Path

import pytest
import torch

from cluster.worker import run_alone
from finetune.artefacts import open_weights
from finetune.panoptic_weights import build_panoptic
from finetune.recipe import FinetuneRecipe
from finetune.run import checked_recipe
from tests.data.panoptic_sets import write_panoptic
from tests.finetune.small_run import QUIET, RECIPE, lines, losses, run_until, weights
from training.recipe import load_recipe

WIDER = ("model.hidden_dim=128", "model.num_heads=8", "model.pre_norm=false")
SECOND = ("task=panoptic", "from_scratch=false", "best_metric=eval/pq", "loop.evaluate_every=3")


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    place = tmp_path_factory.mktemp("panoptic")
    return write_panoptic(place, 6), write_panoptic(place, 3, "val2017")


@pytest.fixture(scope="module")
def boxes(sets: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the first stage."""
    run = tmp_path_factory.mktemp("stage1") / "run"
    run_alone(recipe_of(sets, run, *WIDER, "loop.steps=2"), QUIET)
    return run


def test_the_second_stage_goes_on_where_it_was_cut_and_is_judged_by_pq(
    sets: tuple[Path, Path], boxes: Path, tmp_path: Path
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    told = (*SECOND, f"init={boxes}", *backbone_of_init())
    run_alone(recipe_of(sets, whole, *told), QUIET)
    assert run_until(recipe_of(sets, cut, *told), 3).step == 3
    run_alone(recipe_of(sets, cut, *told), QUIET)
    assert [step for step, _, _ in losses(whole)] == [1, 2, 3, 4, 5, 6]
    assert losses(cut) == losses(whole)

    judged = lines(whole, "evaluation")
    assert [line["step"] for line in judged] == [0, 3, 6]
    detector, head = split(weights(whole))
    first_stage = weights(boxes)
    assert all(torch.equal(detector[name], tensor) for name, tensor in first_stage.items())
    assert head

    artefact = open_weights(str(whole))
    assert artefact.kind == "panoptic"
    assert artefact.masks is not None
    assert artefact.masks.softmax_over == "positions"
    assert artefact.classes is not None
    assert artefact.classes.ids == (4, 17, 180, 200)
    assert artefact.classes.things == (True, True, False, False)
    assert build_panoptic(artefact).settings.softmax_over == "positions"


def test_a_mask_head_goes_on_from_another_run(
    sets: tuple[Path, Path], boxes: Path, tmp_path: Path
) -> None:
    first = (*SECOND, f"init={boxes}", *backbone_of_init(), "loop.steps=2")
    run_alone(recipe_of(sets, tmp_path / "first", *first), QUIET)
    again = (*SECOND, f"init={tmp_path / 'first'}", *backbone_of_init(), "optimiser.lr=1e-30")
    still = ("optimiser.weight_decay=0", "loop.steps=1")
    run_alone(recipe_of(sets, tmp_path / "again", *again, *still), QUIET)
    before, after = weights(tmp_path / "first"), weights(tmp_path / "again")
    assert before.keys() == after.keys()
    assert all(torch.allclose(after[name], tensor, atol=1e-6) for name, tensor in before.items())


def recipe_of(sets: tuple[Path, Path], run: Path, *overrides: str) -> FinetuneRecipe:
    """The small recipe on panoptic sets."""
    told = (f"data.train={sets[0]}", f"data.validation={sets[1]}", f"run={run}", *overrides)
    return checked_recipe(load_recipe(FinetuneRecipe, RECIPE, told))[0]


def backbone_of_init() -> tuple[str, ...]:
    """The small recipe says random ones, and another width than that of the first stage."""
    return (*WIDER, "model.backbone.weights=null")


def split(
    tensors: dict[str, torch.Tensor],
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The detector's tensors by their names there, and the others."""
    inside = {
        name.removeprefix("detector."): tensor
        for name, tensor in tensors.items()
        if name.startswith("detector.")
    }
    return inside, {n: t for n, t in tensors.items() if not n.startswith("detector.")}
