"""Classification: what is learned from, mixed targets, shares, resume, top-k, and using it."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from cluster.preflight.pictures import label_checks
from data.annotations import AnnotationError
from data.class_labels import class_label
from data.classification_content import (
    ClassAugmentSettings,
    ClassSizes,
    changed_picture,
    judged_picture,
)
from data.detection_set import open_detection_set
from data.randomness import sample_generator
from data.samples import Sample
from data.shards import ShardSettings, write_shards
from data.sources import SourceError, list_source
from finetune.artefacts import build_detector, open_weights
from finetune.classification import ClassificationObjective, mixed, smoothed
from finetune.classifier_evaluation import ranks
from finetune.classifier_weights import initial_classifier
from finetune.classify import MixSettings
from finetune.evaluate_weights import judge_weights
from finetune.recipe import FinetuneRecipe
from finetune.run import checked_recipe
from models.backbone import Backbone, BackboneSettings
from models.interop.backbones import load_backbone
from models.interop.checkpoint_files import WeightsError
from models.shares import Share
from models.structures import Classes, DetectionBatch, Images, Targets, padding_of
from querypatch import app
from tests.finetune.small_run import lines, run_until, run_whole, weights
from training.recipe import load_recipe

CPU = torch.device("cpu")
NAMES = ("spots", "stripes", "waves")
CLASSES = Classes(NAMES, (0, 1, 2))
RECIPE = """
stage: finetune
task: classify
global_batch: 4
from_scratch: true
model:
  backbone: {name: resnet18, weights: random, train: true}
classify:
  augment: {side: 32, rand_augment: null, min_area: 0.7, erase: 0.0}
  mix: {mixup: 0, cutmix: 0, smoothing: 0}
  sizes: {resize: 36, crop: 32}
data: {stream: {processes: 0}}
evaluation: {batch_size: 4, processes: 0}
optimiser: {lr: 2e-3, decay: matrices}
loop:
  steps: 4
  log_every: 1
  checkpoint_every_steps: 2
  checkpoint_every_minutes: null
best_metric: eval/top1
resources: {device: cpu}
"""


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of four drawn pictures each, of a colour of their own, in shards."""
    place = tmp_path_factory.mktemp("classes")
    generator = np.random.default_rng(0)
    for number, name in enumerate(NAMES):
        for picture in range(4):
            levels = generator.integers(0, 90, (40, 48, 3), np.uint8)
            levels[..., number] += 150
            (place / "tree" / name).mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(place / "tree" / name / f"{picture}.png"), levels)
    source = list_source(str(place / "tree"))
    write_shards(source, str(place / "shards"), ShardSettings(samples_per_shard=5))
    return place / "shards"


def recipe_on(shards: Path, run: Path, *overrides: str) -> FinetuneRecipe:
    told = [f"data.train={shards}", "data.validation=same", f"run={run}", *overrides]
    return checked_recipe(load_recipe(FinetuneRecipe, RECIPE, told))[0]


def batch(count: int, *, blank: bool = False) -> DetectionBatch:
    generator = torch.Generator().manual_seed(1)
    sizes = torch.tensor([[32, 32]] * count)
    labels = [torch.tensor([n % 3] if not blank else [], dtype=torch.int64) for n in range(count)]
    boxes = [torch.tensor([[0.5, 0.5, 1, 1]] if not blank else []).view(-1, 4) for _ in labels]
    return DetectionBatch(
        images=Images(
            torch.randn(count, 3, 32, 32, generator=generator), padding_of(sizes, 32, 32), sizes
        ),
        targets=Targets(tuple(boxes), tuple(labels)),
        keys=tuple(map(str, range(count))),
        sample_ids=torch.arange(count),
        blank=blank,
    )


def test_three_classes_are_learned_resumed_to_the_last_bit_judged_and_used(
    shards: Path, tmp_path: Path
) -> None:
    told = ("loop.steps=16", "loop.evaluate_every=8")
    run_whole(recipe_on(shards, tmp_path / "run", *told))
    found = lines(tmp_path / "run", "evaluation")[-1]
    assert (found["eval/top1"], found["eval/top5"]) == (1.0, 1.0)
    run_until(recipe_on(shards, tmp_path / "cut", *told), 5)
    run_whole(recipe_on(shards, tmp_path / "cut", *told))
    one, other = weights(tmp_path / "run"), weights(tmp_path / "cut")
    assert all(torch.equal(one[name], other[name]) for name in one)

    artefact = open_weights(str(tmp_path / "run"))
    assert (artefact.kind, artefact.classes) == ("classifier", CLASSES)
    assert (artefact.input.resize, artefact.input.short_side) == (36, 32)
    judged = judge_weights(str(tmp_path / "run"), str(shards), ["processes=0"], CPU)
    assert judged.content["top1"] == 1.0
    assert "top-1 100.00 %" in judged.text

    done = CliRunner().invoke(app, ["export", str(tmp_path / "run"), str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    card = (tmp_path / "out" / "README.md").read_text()
    assert "pipeline_tag: image-classification" in card
    assert "resnet18 (layer4) with a linear head, 3 classes" in card
    picture = shards.parent / "tree" / "spots" / "1.png"
    out = tmp_path / "said"
    done = CliRunner().invoke(app, ["predict", str(tmp_path / "out"), str(picture), "-o", str(out)])
    assert done.exit_code == 0, done.output
    (said,) = json.loads((out / "classes.json").read_text())["pictures"]
    assert said["classes"][0]["name"] == "spots"
    assert (out / said["drawn"]).is_file()

    body = BackboneSettings(name="resnet18", weights=str(tmp_path / "out" / "model.safetensors"))
    backbone = Backbone(body)
    load_backbone(backbone)
    assert torch.equal(
        backbone.body.state_dict()["conv1.weight"], artefact.tensors["backbone.body.conv1.weight"]
    )


def test_a_head_goes_over_where_the_classes_are_the_same(shards: Path, tmp_path: Path) -> None:
    run_whole(recipe_on(shards, tmp_path / "run", "loop.steps=2"))
    settings = recipe_on(shards, tmp_path / "run").model.backbone
    same, report = initial_classifier(settings, str(tmp_path / "run"), CLASSES, 5)
    assert torch.equal(same.head.weight, weights(tmp_path / "run")["head.weight"])
    assert "head: that of init" in report.notes
    others = Classes(("a", "b"), (0, 1))
    other, report = initial_classifier(settings, str(tmp_path / "run"), others, 5)
    assert other.head.out_features == 2
    assert "head: new, init has other classes" in report.notes
    artefact = open_weights(str(tmp_path / "run"))
    with pytest.raises(WeightsError, match="is a classifier"):
        build_detector(artefact)


def test_the_losses_of_parts_add_up_to_those_of_the_batch() -> None:
    plain = MixSettings(mixup=0, cutmix=0)
    objective = ClassificationObjective(plain, 3)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 3))
    whole = batch(5)
    share = Share(objective.counts(whole), workers=2)
    parts = [
        objective(model, whole.part(rows), share, torch.Generator()).total
        for rows in (slice(0, 2), slice(2, 5))
    ]
    alone = objective(model, whole, Share(objective.counts(whole)), torch.Generator()).total
    torch.testing.assert_close(sum(parts) / 2, alone)
    labels = torch.tensor([0, 1, 2, 0, 1])
    expected = torch.nn.functional.cross_entropy(
        model(whole.images.pixels), labels, label_smoothing=0.1
    )
    torch.testing.assert_close(alone, expected)
    blank = batch(1, blank=True)
    assert objective.counts(blank).tolist() == [0, 0, 0]
    assert float(objective(model, blank, share, torch.Generator()).total.detach()) == 0


def test_targets_are_mixed_in_the_shares_of_the_pictures() -> None:
    pixels = torch.stack([torch.full((3, 8, 6), float(n)) for n in range(4)])
    wanted = smoothed(torch.arange(4), 4, 0.0)
    for settings in (MixSettings(cutmix=0), MixSettings(mixup=0), MixSettings()):
        for seed in range(6):
            made, targets = mixed(pixels, wanted, settings, torch.Generator().manual_seed(seed))
            again, _ = mixed(pixels, wanted, settings, torch.Generator().manual_seed(seed))
            assert torch.equal(made, again)
            shares = made.mean((1, 2, 3))
            torch.testing.assert_close(targets @ torch.arange(4.0), shares)
            torch.testing.assert_close(targets.sum(1), torch.ones(4))
    cut, _ = mixed(pixels, wanted, MixSettings(mixup=0), torch.Generator().manual_seed(1))
    assert {float(level) for level in cut[0].unique()} <= {0.0, 3.0}
    unchanged, _ = mixed(pixels, wanted, MixSettings(mixup=0, cutmix=0), torch.Generator())
    assert unchanged is pixels


def test_ranks_are_those_of_a_sort() -> None:
    logits = torch.randn(20, 7, generator=torch.Generator().manual_seed(0)).round(decimals=1)
    labels = torch.arange(20) % 7
    for row, label in enumerate(labels.tolist()):
        order = sorted(range(7), key=lambda number: (-float(logits[row, number]), number))
        assert int(ranks(logits, labels)[row]) == order.index(label)
    broken = torch.full((1, 3), torch.nan)
    assert int(ranks(broken, torch.tensor([0]))) == 5


def test_a_pictures_changes_hang_on_its_generator_and_leave_torchs_state_alone() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8)
    settings = ClassAugmentSettings(side=32, erase=1.0)
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    one, same, other = (
        changed_picture(picture, settings, sample_generator(1, epoch, 5, "classification"))
        for epoch in (0, 0, 1)
    )
    assert torch.equal(before, torch.random.get_rng_state())
    assert one.shape == (32, 32, 3)
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)


def test_pictures_are_judged_squashed_or_in_their_shape() -> None:
    picture = np.zeros((40, 80, 3), np.uint8)
    picture[:, 20:60] = 255
    squashed = judged_picture(picture, ClassSizes(resize=36, crop=32))
    shaped = judged_picture(picture, ClassSizes(resize=36, crop=32, keep_aspect=True))
    assert squashed.shape == shaped.shape == (32, 32, 3)
    assert shaped.mean() == 255
    assert 100 < squashed.mean() < 160
    with pytest.raises(ValueError, match="crop=64 is more than resize=40"):
        ClassSizes(resize=40, crop=64)


@pytest.mark.parametrize(
    ("parts", "complaint"),
    [
        ({}, "has no class .* --kind classes"),
        ({"cls": b"7"}, "has the class '7', which is none of the ids 0 to 2"),
        ({"cls": b"cat"}, "has the class 'cat'"),
        ({"json": b'{"class_name": "cow"}'}, "is of the class 'cow'"),
        ({"json": b"{"}, "has a json that is none"),
    ],
)
def test_a_class_that_is_none_is_told_with_its_picture(
    parts: dict[str, bytes], complaint: str
) -> None:
    with pytest.raises(AnnotationError, match=complaint):
        class_label(Sample(3, "n01/4", "a.tar", parts), CLASSES)


def test_shards_of_others_name_their_classes_in_the_recipe(shards: Path, tmp_path: Path) -> None:
    assert class_label(Sample(3, "a", "a.tar", {"cls": b"1\n"}), CLASSES) == 1
    with pytest.raises(SourceError, match="do not name their classes"):
        open_detection_set(str(shards))
    (shards / "report.json").rename(tmp_path / "report.json")
    try:
        named = open_detection_set(str(shards), kind="classes", classes=list(NAMES))
    finally:
        (tmp_path / "report.json").rename(shards / "report.json")
    assert named.classes == CLASSES


def test_preflight_looks_at_the_classes(shards: Path, tmp_path: Path) -> None:
    recipe = recipe_on(shards, tmp_path / "run")
    (well,) = label_checks(recipe, "data.train", str(shards), None)
    assert (well.state, well.facts["classes"]) == ("well", 3)
    data = recipe.data.model_copy(update={"classes": ("x", "y", "z")})
    wrong = recipe.model_copy(update={"data": data})
    (fault,) = label_checks(wrong, "data.train", str(shards), None)
    assert fault.state == "fault"
    assert "which is none of the 3 that were learned" in fault.said
