"""A pretraining run may begin with the weights of a published Deformable DETR."""

from pathlib import Path

import pytest
import torch

from models.detector import Detector
from models.interop.checkpoint_files import WeightsError
from models.interop.deformable import to_deformable_names
from pretrain.recipe import PretrainRecipe
from pretrain.weights import blank_model, take_weights
from tests.pretrain.small_run import DEFORMABLE, RECIPE
from training.recipe import load_recipe


def recipe_of(*told: str) -> PretrainRecipe:
    return load_recipe(PretrainRecipe, RECIPE, ["run=r", "data.shards=s", *DEFORMABLE, *told])


def test_a_public_file_of_the_task_fills_every_tensor(tmp_path: Path) -> None:
    given, model = blank_model(recipe_of("seed=3")), blank_model(recipe_of("seed=4"))
    named = {name.removeprefix("detector."): t for name, t in given.state_dict().items()}
    public = to_deformable_names(named, given.detector.settings)
    torch.save({"model": public}, tmp_path / "public.pth")
    take_weights(model, str(tmp_path / "public.pth"))
    ours, theirs = model.state_dict(), given.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_public_detector_fills_all_but_the_class_heads_and_what_patches_need(
    tmp_path: Path,
) -> None:
    model = blank_model(recipe_of("seed=4"))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    settings = recipe_of("model.num_classes=5").model
    detector = Detector(settings, torch.Generator().manual_seed(3))
    public = to_deformable_names(detector.state_dict(), settings)
    torch.save({"model": public}, tmp_path / "public.pth")
    take_weights(model, str(tmp_path / "public.pth"))
    own = ("patch_projection.", "reconstruction.", "detector.class_head.")
    theirs = detector.state_dict()
    for name, tensor in model.state_dict().items():
        begun = before[name] if name.startswith(own) else theirs[name.removeprefix("detector.")]
        assert torch.equal(tensor, begun), name


def test_a_two_stage_file_has_no_queries_for_patches_and_is_refused(tmp_path: Path) -> None:
    asked = {"two_stage": True, "box_refinement": True, "num_classes": 5}
    settings = recipe_of().model.model_copy(update=asked)
    detector = Detector(settings, torch.Generator().manual_seed(3))
    public = to_deformable_names(detector.state_dict(), settings)
    torch.save({"model": public}, tmp_path / "public.pth")
    with pytest.raises(WeightsError, match="two-stage detector, whose queries are proposals"):
        take_weights(blank_model(recipe_of()), str(tmp_path / "public.pth"))
