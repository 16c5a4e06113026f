"""The whole finetuning run in this process: resume, init, best weights, early stop, subsets."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors import safe_open

from cluster.preflight.inputs import RefusedJob, checked_new_run, resumed_recipe
from cluster.worker import run_alone
from data.sources import SourceError
from data.synthetic import SHAPES
from finetune.artefacts import open_weights
from finetune.detection import detection_task
from finetune.evaluate_weights import judge_weights
from finetune.predict import load_detector
from finetune.recipe import FinetuneRecipe
from finetune.sets import open_sets
from models.artefact import METADATA_KEY
from models.structures import Classes
from tests.finetune.small_run import (
    QUIET,
    RECIPE,
    lines,
    losses,
    run_until,
    run_whole,
    sets_of,
    small_recipe,
    small_sets,
    weights,
    write_boxes,
)
from tests.pretrain import small_run as pretraining
from training.checkpoint import load_newest
from training.recipe import RecipeError, load_recipe
from training.run_folder import open_run_folder
from training.world import World

CPU = torch.device("cpu")
EVALUATED = ("loop.evaluate_every=2", "loop.score_in_background=true")
STILL = ("optimiser.lr=1e-30", "optimiser.weight_decay=0")
"""Nothing is learned: AP stays what it is."""


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_sets(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished pretraining run."""
    place = tmp_path_factory.mktemp("pretrained")
    recipe = pretraining.small_recipe(
        pretraining.small_shards(place), place / "run", "loop.steps=2"
    )
    run_alone(recipe, QUIET)
    return place / "run"


def test_a_run_that_was_cut_goes_on_as_if_it_had_not_been(sets: Path, tmp_path: Path) -> None:
    """With a moving average, and evaluations in the background (peers' bug 1)."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    told = ("ema={decay: 0.9}", *EVALUATED)
    run_whole(small_recipe(sets, whole, *told))
    assert run_until(small_recipe(sets, cut, *told), 3).step == 3
    run_whole(small_recipe(sets, cut, *told))
    assert [step for step, _, _ in losses(whole)] == [1, 2, 3, 4, 5, 6]
    assert losses(cut) == losses(whole)
    assert [line["step"] for line in lines(whole, "evaluation")] == [0, 2, 4, 6]
    for step in (0, 2, 4, 6):
        name = f"evaluations/step_{step:06d}.json"
        assert (cut / name).read_text() == (whole / name).read_text()
    ours, theirs = (load_newest(open_run_folder(str(run))) for run in (cut, whole))
    assert ours is not None
    assert theirs is not None
    assert ours.ema is not None
    assert theirs.ema is not None
    assert all(torch.equal(ours.model[name], theirs.model[name]) for name in theirs.model)
    assert all(torch.equal(ours.ema[name], theirs.ema[name]) for name in theirs.ema)


def test_a_run_that_is_over_is_resumed_to_nothing(sets: Path, tmp_path: Path) -> None:
    """Peers' bug 4."""
    recipe = small_recipe(sets, tmp_path / "run", "loop.steps=2", *EVALUATED)
    run_whole(recipe)
    before = lines(tmp_path / "run", "evaluation")
    assert run_whole(recipe).step == 2
    assert lines(tmp_path / "run", "evaluation") == before


def test_init_carries_the_pretrained_transformer_over_exactly(
    sets: Path, pretrained: Path, tmp_path: Path
) -> None:
    recipe = small_recipe(sets, tmp_path / "run", f"init={pretrained}", "from_scratch=false")
    task = detection_task(recipe, open_sets(recipe), World.alone(CPU), is_fresh=True)
    ours, theirs = task.model.state_dict(), weights(pretrained)
    carried = {name for name in ours if not name.startswith("class_head.")}
    assert {f"detector.{name}" for name in carried} <= theirs.keys()
    for part in ("encoder.", "decoder.", "queries.", "box_head.", "input_projection."):
        assert any(name.startswith(part) for name in carried)
    assert all(torch.equal(ours[name], theirs[f"detector.{name}"]) for name in carried)
    run_until(recipe, 1)
    report = json.loads((tmp_path / "run/load_report.json").read_text())
    assert "backbone: that of init" in report["notes"]
    new = {name for part in report["parts"].values() for name in part.get("new", ())}
    loaded = {name for part in report["parts"].values() for name in part.get("loaded", ())}
    assert new == {"class_head.weight", "class_head.bias"}
    assert loaded == carried
    assert report["chain"][0].startswith(str(pretrained))


def test_a_resumed_run_needs_neither_init_nor_the_backbones_file(
    sets: Path, pretrained: Path, tmp_path: Path
) -> None:
    init, backbone, run = tmp_path / "init", tmp_path / "resnet18.pth", tmp_path / "run"
    shutil.copytree(pretrained, init)
    torch.save(torchvision.models.resnet18().state_dict(), backbone)
    told = (f"init={init}", "from_scratch=false", f"model.backbone.weights={backbone}")
    run_until(_begun(sets, run, *told), 2)
    shutil.rmtree(init)
    backbone.unlink()
    assert run_alone(resumed_recipe(str(run), []), QUIET).step == 6
    assert open_weights(str(run)).provenance.init[0].startswith(str(init))


def test_a_trained_backbone_has_its_own_rate_and_a_frozen_stem(sets: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    told = ("model.backbone.train=true", "optimiser.backbone_lr=1e-4")
    run_until(small_recipe(sets, run, *told), 1)
    first = weights(run)
    run_whole(small_recipe(sets, run, *told))
    last = weights(run)
    assert not torch.equal(
        last["backbone.body.layer3.0.conv1.weight"], first["backbone.body.layer3.0.conv1.weight"]
    )
    assert torch.equal(last["backbone.body.conv1.weight"], first["backbone.body.conv1.weight"])
    (rates,) = {
        tuple(value for name, value in sorted(line.items()) if name.startswith("lr"))
        for line in lines(run, "train")
    }
    assert sorted(rates) == [1e-4, 1e-3]


def test_the_best_weights_are_those_that_are_evaluated_and_used(sets: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run_whole(small_recipe(sets, run, "ema={decay: 0.9}", "best_metric=eval/ar100", *EVALUATED))
    judged = [(line["eval/ar100"], -line["step"]) for line in lines(run, "evaluation")[1:]]
    best, step = max(judged)
    found = open_weights(str(run))
    assert found.source.endswith("best/model.safetensors")
    assert (found.provenance.step, found.provenance.averaged) == (-step, True)
    assert found.provenance.metrics["eval/ar100"] == best
    told = ["processes=0", "batch_size=4"]
    validation = sets_of(sets)[1].partition("=")[2]
    again = judge_weights(str(run), validation, told, CPU, lambda done, total: None)
    numbers = again.content["numbers"]
    assert isinstance(numbers, dict)
    assert numbers["ar100"] == pytest.approx(best, abs=1e-6)


def test_a_run_that_stopped_early_stays_ended(sets: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    told = ("early_stop={patience: 1}", "loop.steps=20", "loop.evaluate_every=2", *STILL)
    recipe = _begun(sets, run, *told)
    # AP of step 2 is the first that counts, that of step 4 is no better.
    assert run_alone(recipe, QUIET).step == 5
    assert [line["step"] for line in lines(run, "evaluation")] == [0, 2, 4]
    written = (run / "metrics.jsonl").read_bytes()
    assert run_alone(resumed_recipe(str(run), []), QUIET).step == 5
    assert (run / "metrics.jsonl").read_bytes() == written


def test_a_subset_is_written_down_and_can_be_learned_from_again(sets: Path, tmp_path: Path) -> None:
    first, second, other = (tmp_path / name for name in ("first", "second", "other"))
    run_whole(small_recipe(sets, first, "data.subset={share: 0.4, seed: 1}", "loop.steps=3"))
    manifest = json.loads((first / "subset.json").read_text())
    assert len(manifest["ids"]) == len(manifest["pictures"]) == 4
    assert manifest["settings"]["share"] == 0.4
    told = f"data.subset={{manifest: {first / 'subset.json'}}}"
    run_whole(small_recipe(sets, second, told, "loop.steps=3"))
    assert losses(second) == losses(first)
    run_whole(small_recipe(sets, other, "data.subset={share: 0.4, seed: 2}", "loop.steps=3"))
    assert losses(other) != losses(first)


def test_validation_can_be_what_is_learned_from(
    sets: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    told = ("data.subset={share: 0.3}", "data.validation=same", "loop.evaluate_every=2")
    recipe = small_recipe(sets, tmp_path / "run", *told)
    assert "no fair measure" in caplog.text
    opened = open_sets(recipe)
    assert opened.validation is opened.train
    assert opened.train.index.num_samples == 3


def test_a_validation_class_that_is_not_learned_is_refused_before_anything_is_spent(
    sets: Path, tmp_path: Path
) -> None:
    other = write_boxes(tmp_path / "other", [[(2, 2, 20, 20)]], {1: "ellipse", 2: "cow"}, (40, 48))
    told = [*sets_of(sets), f"run={tmp_path / 'run'}", f"data.validation={other}"]
    with pytest.raises(SourceError, match="that the training data do not name: cow;"):
        checked_new_run(load_recipe(FinetuneRecipe, RECIPE, told))
    assert not (tmp_path / "run").exists()


def test_sparse_class_ids_come_back_in_predictions(tmp_path: Path) -> None:
    """Peers' bugs 7 and 8."""
    boxes = [[(2, 3, 20, 18), (24, 5, 19, 30), (5, 22, 16, 14)]] * 3
    categories = {17: "dog", 4: "car", 1: "person"}
    train = write_boxes(tmp_path / "set", boxes, categories, (40, 48))
    told = (f"data.train={train}", "data.validation=same", "loop.steps=2", "loop.evaluate_every=2")
    run_whole(small_recipe(tmp_path, tmp_path / "run", *told))
    found = open_weights(str(tmp_path / "run"))
    assert found.classes == Classes(("person", "car", "dog"), (1, 4, 17))
    assert found.detector.num_classes == 3
    assert found.tensors["class_head.bias"].shape == (4,)
    checkpoint = tmp_path / "run/checkpoints/step_000002/model.safetensors"
    with safe_open(checkpoint, "pt") as file:
        header = json.loads(file.metadata()[METADATA_KEY])
    assert (header["class_names"], header["class_ids"]) == (["person", "car", "dog"], [1, 4, 17])
    detector = load_detector(str(tmp_path / "run"), "cpu")
    (predictions,) = detector.predict(str(tmp_path / "set/0.png"), threshold=0.0)
    told_ids = {entry["category_id"] for entry in predictions.to_coco(7)}
    assert told_ids == {(1, 4, 17)[label] for label in predictions.labels}
    assert told_ids <= {1, 4, 17}


@pytest.mark.parametrize("count", [1, 2])
def test_one_picture_in_a_batch_and_pictures_smaller_than_the_stride(
    count: int, tmp_path: Path
) -> None:
    """Peers' bug 17: 2 or 3 x 32 pixels, at a stride of 16; the second picture has no box."""
    boxes = [[(3, 1, 20, 3)], []][:count]
    train = write_boxes(tmp_path / "set", boxes, {1: "ant"}, (4, 48))
    told = (
        f"data.train={train}", "data.validation=same", "global_batch=1", "loop.steps=2",
        "loop.evaluate_every=1", "evaluation.sizes={short_side: 32, max_size: 32}",
        "data.augment={kind: none, short_sides: [32], max_size: 32}",
    )  # fmt: skip
    run_whole(small_recipe(tmp_path, tmp_path / "run", *told))
    assert [line["step"] for line in lines(tmp_path / "run", "evaluation")] == [0, 1, 2]
    assert all(loss > 0 for _, loss, _ in losses(tmp_path / "run"))


def test_a_mistyped_key_is_an_error_with_the_key_that_is_meant(sets: Path, tmp_path: Path) -> None:
    """Peers' bug 9."""
    with pytest.raises(RecipeError) as caught:
        small_recipe(sets, tmp_path / "run", "data.augmnt.kind=none", "pretrained_weights=w.pth")
    said = str(caught.value)
    assert "data.augmnt: unknown key; did you mean data.augment?" in said
    assert "pretrained_weights: unknown key" in said


def test_a_resume_with_another_set_is_refused(tmp_path: Path) -> None:
    """Peers' bug 15: the order of other pictures is another one."""
    sets, run = small_sets(tmp_path, count=6), tmp_path / "run"
    run_until(_begun(sets, run), 2)
    annotations = sets / "annotations/instances_train.json"
    content = json.loads(annotations.read_text())
    content["annotations"][0]["bbox"][2] -= 1
    annotations.write_text(json.dumps(content))
    with pytest.raises(RefusedJob, match=r"data\.train holds other pictures than those that"):
        resumed_recipe(str(run), [])


def test_a_run_knows_the_classes_of_its_data(sets: Path, tmp_path: Path) -> None:
    recipe = small_recipe(sets, tmp_path / "run")
    assert recipe.model.num_classes == len(SHAPES)
    with pytest.raises(ValueError, match=r"model\.num_classes=7, but the data have 6 classes"):
        small_recipe(sets, tmp_path / "run", "model.num_classes=7")


def _begun(sets: Path, run: Path, *overrides: str) -> FinetuneRecipe:
    """As `querypatch finetune` begins a run, with what a resume is held to."""
    told = [*sets_of(sets), f"run={run}", *overrides]
    recipe = checked_new_run(load_recipe(FinetuneRecipe, RECIPE, told))
    assert isinstance(recipe, FinetuneRecipe)
    return recipe
