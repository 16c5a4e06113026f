"""The one-shot task: its first weights, its losses, a whole run."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from cluster.stages import recipe_of
from cluster.worker import run_alone
from data.voc_source import VOC_CLASSES
from finetune.artefacts import open_weights
from finetune.one_shot import VOC_UNSEEN, OneShotSettings
from finetune.one_shot_predict import load_one_shot
from finetune.one_shot_task import OneShotObjective
from finetune.one_shot_weights import initial_one_shot, resolve_one_shot_model
from finetune.recipe import FinetuneRecipe
from finetune.run import checked_recipe
from models.boxes import cxcywh_to_xyxy, generalized_iou_pairs
from models.detector_settings import DetectorSettings
from models.losses import LossWeights
from models.matching import MatchingCosts
from models.one_shot import MATCHES, one_shot_detector
from models.structures import DetectionBatch, Images, Targets
from tests.data.one_shot_sets import SCENES, write_coco
from tests.finetune.public_files import patch_detector, pretraining_file
from tests.finetune.small_detector import CLASSES, SETTINGS, write_weights
from tests.models.test_detector import images
from tests.training.small import losses_alone
from training.recipe import RecipeError, load_recipe
from training.world import World

ALONE = World.alone(torch.device("cpu"))
RECIPE = """
task: one_shot
from_scratch: true
global_batch: 4
model:
  backbone: {name: resnet18, output: layer3, weights: random, frozen_precision: float32}
  hidden_dim: 16
  num_heads: 2
  encoder_layers: 1
  decoder_layers: 2
  feedforward_dim: 24
  num_queries: 6
one_shot: {unseen: [emu], references: 2, crops: {side: 32, min_side: 8.0}}
data:
  augment: {kind: flip, short_sides: [44, 48], max_size: 64}
  stream: {processes: 0}
evaluation: {protocols: [voc07], sizes: {short_side: 44, max_size: 64}, processes: 0}
best_metric: eval/voc07_seen_ap50
optimiser: {lr: 1e-3}
loop: {steps: 4, log_every: 1, evaluate_every: 2, checkpoint_every_steps: 2}
resources: {device: cpu}
"""


def recipe(backbone: dict[str, object] | None = None, **given: object) -> DetectorSettings:
    """What a recipe says of the detector, and nothing else."""
    return DetectorSettings.model_validate({"backbone": backbone or {}, **given})


def batch(*counts: int) -> DetectionBatch:
    """Noise with query crops; picture n has `counts[n]` boxes."""
    pictures = images(*[(64, 96)] * len(counts))
    generator = torch.Generator().manual_seed(4)
    return DetectionBatch(
        images=pictures,
        targets=Targets(
            tuple(torch.full((count, 4), 0.5) for count in counts),
            tuple(torch.full((count,), MATCHES) for count in counts),
        ),
        keys=tuple(map(str, range(len(counts)))),
        sample_ids=torch.arange(len(counts)),
        query_patches=torch.randn(len(counts), 1, 3, 32, 32, generator=generator),
    )


def _twice(pictures: Images) -> Images:
    return Images(*(torch.cat([part, part]) for part in vars(pictures).values()))


def test_weights_of_pretraining_go_over_with_class_head_and_patch_projection(
    tmp_path: Path,
) -> None:
    model, report = initial_one_shot(recipe(num_heads=2), pretraining_file(tmp_path), seed=5)
    theirs = patch_detector().state_dict()
    assert report.new == ()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in model.state_dict().items())
    assert {name.partition(".")[0] for name in report.left_out} == {"reconstruction"}
    assert "class_head: carried over" in report.notes
    assert model.detector.settings.num_classes == 2


def test_of_a_detector_of_other_classes_what_is_asked_with_is_new_and_the_rest_goes_over(
    tmp_path: Path,
) -> None:
    source = str(tmp_path / "model.safetensors")
    write_weights(tmp_path / "model.safetensors")
    model, report = initial_one_shot(recipe(), source, seed=5)
    new = {name.removeprefix("detector.").partition(".")[0] for name in report.new}
    assert new == {"class_head", "patch_projection"}
    artefact = open_weights(source)
    assert torch.equal(model.detector.queries.weight, artefact.tensors["queries.weight"])


def test_a_class_count_that_is_said_must_be_that_of_one_shot_detection(tmp_path: Path) -> None:
    """A number of classes never changes in silence (peers' bug 7)."""
    source = pretraining_file(tmp_path)
    assert resolve_one_shot_model(recipe(num_heads=2), source).num_classes == 2
    with pytest.raises(ValueError, match=r"num_classes=20: .* leave num_classes out"):
        resolve_one_shot_model(recipe(num_heads=2, num_classes=20), source)


def test_one_picture_asked_with_two_crops_learns_two_answers() -> None:
    """What a crop shows reaches the boxes; others who rebuilt it from the paper tell otherwise."""
    settings = SETTINGS.model_copy(update={"num_classes": None, "dropout": 0.0})
    model = one_shot_detector(settings, torch.Generator().manual_seed(0)).train()
    objective = OneShotObjective(MatchingCosts(), LossWeights(), SETTINGS.num_queries)
    wanted = torch.tensor([[[0.25, 0.5, 0.4, 0.6]], [[0.75, 0.5, 0.4, 0.6]]])
    asked = replace(
        batch(1, 1),
        images=_twice(images((32, 64))),
        targets=Targets(tuple(wanted), (torch.tensor([MATCHES]),) * 2),
        query_patches=torch.tensor([-2.0, 2.0]).view(2, 1, 1, 1, 1).expand(-1, -1, 3, 16, 16),
    )
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    for _ in range(120):
        losses_alone(objective, model, asked).total.backward()
        optimiser.step()
        optimiser.zero_grad()
    assert asked.query_patches is not None
    last = model(asked.images, asked.query_patches).detection.groups[0].layers[-1]
    surest = last.logits.softmax(-1)[..., MATCHES].argmax(1)
    found = last.boxes[torch.arange(2), surest].detach()
    overlap = generalized_iou_pairs(cxcywh_to_xyxy(found), cxcywh_to_xyxy(wanted[:, 0]))
    assert (overlap > 0.5).all(), overlap


def test_empty_and_blank_batches_have_finite_losses_and_whole_graphs() -> None:
    """An empty worker neither hangs nor breaks the others (peers' bug 5)."""
    settings = SETTINGS.model_copy(update={"num_classes": None})
    model = one_shot_detector(settings, torch.Generator().manual_seed(0)).train()
    objective = OneShotObjective(MatchingCosts(), LossWeights(), SETTINGS.num_queries)
    found = losses_alone(objective, model, batch(0, 0))
    assert found.total.isfinite()
    found.total.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_predictions_that_are_not_finite_give_a_total_of_nan() -> None:
    settings = SETTINGS.model_copy(update={"num_classes": None})
    model = one_shot_detector(settings, torch.Generator().manual_seed(0)).train()
    with torch.no_grad():
        model.detector.box_head.layers[-1].bias.fill_(torch.nan)
    objective = OneShotObjective(MatchingCosts(), LossWeights(), SETTINGS.num_queries)
    assert losses_alone(objective, model, batch(1)).total.isnan()


def test_a_whole_run_trains_judges_and_leaves_weights_that_can_be_asked(tmp_path: Path) -> None:
    train, pictures = write_coco(tmp_path, SCENES * 2)
    told = [
        f"run={tmp_path / 'run'}",
        f"data.train={train}",
        f"data.train_pictures={pictures}",
        f"data.validation={train}",
        f"data.validation_pictures={pictures}",
    ]
    checked, _ = checked_recipe(load_recipe(FinetuneRecipe, RECIPE, told))
    run_alone(checked, Console(quiet=True))
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    judged = [line for line in lines if line["kind"] == "evaluation"]
    assert [line["step"] for line in judged] == [0, 2, 4]
    assert {"eval/voc07_seen_ap50", "eval/voc07_unseen_ap50"} <= judged[0].keys()
    artefact = open_weights(str(tmp_path / "run"))
    assert (artefact.kind, artefact.classes) == ("one_shot", None)
    assert (artefact.detector.num_classes, artefact.input.query_side) == (2, 32)
    asked = load_one_shot(str(tmp_path / "run"), [f"{pictures}/001.png"], device="cpu")
    (found,) = asked.predict(f"{pictures}/000.png", threshold=0.0)
    assert found.names == ("001",) * 6


def test_a_class_is_not_named_twice_among_the_unseen() -> None:
    with pytest.raises(ValueError, match="names a class twice"):
        OneShotSettings(unseen=("cat", "cat"))
    assert set(OneShotSettings().unseen).isdisjoint(CLASSES.names)


def test_the_unseen_classes_are_coaes_four_of_the_twenty() -> None:
    numbers = [number for number, name in enumerate(VOC_CLASSES, start=1) if name in VOC_UNSEEN]
    assert numbers == [1, 8, 10, 17]


@pytest.mark.parametrize("name", ["one_shot_voc_r50", "one_shot_tiny_cpu"])
def test_the_shipped_recipes_have_twins_from_scratch(name: str) -> None:
    told = ["run=r", "data.train=t"]
    pretrained = recipe_of("finetune", name, [*told, "init=w"])
    scratch = recipe_of("finetune", f"{name}_scratch", [*told, "model.backbone.weights=w"])
    assert isinstance(pretrained, FinetuneRecipe)
    assert isinstance(scratch, FinetuneRecipe)
    for part in ("task", "one_shot", "data", "evaluation", "optimiser", "schedule", "loop"):
        assert pretrained.model_dump()[part] == scratch.model_dump()[part]
    protocol = pretrained.evaluation.protocols[0]
    prefix = "" if protocol == "coco" else f"{protocol}_"
    assert pretrained.best_metric == f"eval/{prefix}seen_ap50"


def test_what_cannot_work_is_said_before_anything_is_spent(tmp_path: Path) -> None:
    train, pictures = write_coco(tmp_path)
    told = ["run=r", f"data.train={train}", f"data.train_pictures={pictures}"]
    of_voc = load_recipe(FinetuneRecipe, RECIPE, [*told, "one_shot.unseen=[cow]"])
    with pytest.raises(ValueError, match=r"one_shot\.unseen names 'cow', which is no class of"):
        checked_recipe(of_voc)
    with pytest.raises(RecipeError, match="best_metric=eval/ap is no number of task=one_shot"):
        load_recipe(FinetuneRecipe, RECIPE, [*told, "best_metric=eval/ap"])
