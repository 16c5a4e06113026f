"""Recipes: every shipped one loads, says what it is for, and has its twin from scratch."""

from pathlib import Path
from typing import Any

import pytest

from cluster.stages import list_recipes, recipe_of, show_recipe
from finetune.recipe import FREE_KEYS, RECIPES, FinetuneRecipe, with_absolute_paths
from training.recipe import RecipeError, recipe_schema
from training.schedule import learning_rate, schedule_in_steps
from training.shipped_recipes import shipped_recipes

NAMES = (
    "coco_low_label", "coco_panoptic_r50", "coco_r50", "coco_r50_150ep", "one_shot_tiny_cpu",
    "one_shot_voc_r50", "own_data", "tiny_cpu", "voc_few", "voc_r50", "voc_r50_150ep",
)  # fmt: skip
"""Of DETR, each with a twin from scratch."""
DEFORMABLE = (
    "coco_deformable_r50", "coco_deformable_r50_refine", "coco_deformable_r50_two_stage",
    "voc_deformable_r50", "deformable_tiny_cpu", "coco_sparse_r50", "coco_sparse_swin_t",
    "coco_deformable_dat_t", "coco_sparse_dat_t",
    "voc_sparse_r50", "sparse_tiny_cpu",
)  # fmt: skip
"""Of Deformable and Sparse DETR, the same."""
CONDITIONAL = (
    "coco_conditional_r50", "coco_conditional_r50_12ep", "voc_conditional_r50",
    "conditional_tiny_cpu", "coco_dab_r50", "coco_dab_r50_12ep", "voc_dab_r50", "dab_tiny_cpu",
    "d3etr_tiny_cpu",
)  # fmt: skip
"""Of Conditional DETR and DAB-DETR, the same."""
WITHOUT_TWIN = (
    "coco_panoptic_masks",
    "coco_deformable_r50_dc5_scratch",
    "coco_deformable_r50_single_scale_scratch",
    *("imagenet_dat_t_scratch", "classify_tiny_cpu_scratch", "retinanet_tiny_cpu_scratch"),
    *("coco_retinanet_dat_t_scratch", "coco_mask_rcnn_dat_t_scratch"),
    *("coco_d3etr_r50_scratch", "coco_d3etr_r50_12ep_scratch", "coco_d3etr_r18_12ep_scratch"),
)
"""A mask head is never trained on anything but a finished detector; how many maps a pretrained
transformer reads is its own affair; any recipe takes a teacher; a classifier and
torchvision's heads have no transformer.
"""
ASKED = {
    *("encoder_attention", "decoder_attention", "class_scores", "box_refinement", "two_stage"),
    *("num_queries", "query_kind", "proposal_content", "proposal_classes", "rho", "selection"),
}
"""How a pretrained transformer is asked."""
LOW_LABEL = ("coco_low_label", "voc_few")
SAID = ("run=r", "data.train=t")


def pretrained(name: str, *overrides: str) -> FinetuneRecipe:
    return loaded(name, *SAID, "init=w", *overrides)


def from_scratch(name: str, *overrides: str) -> FinetuneRecipe:
    return loaded(f"{name}_scratch", *SAID, "model.backbone.weights=w", *overrides)


def loaded(name: str, *overrides: str) -> FinetuneRecipe:
    if "d3etr" in name:
        overrides = ("distill.teacher=t", *overrides)
    recipe = recipe_of("finetune", name, overrides)
    assert isinstance(recipe, FinetuneRecipe)
    return recipe


def test_these_recipes_are_shipped() -> None:
    pairs = (*NAMES, *DEFORMABLE, *CONDITIONAL)
    twins = sorted([*pairs, *WITHOUT_TWIN, *(f"{name}_scratch" for name in pairs)])
    assert sorted(shipped_recipes(RECIPES)) == twins
    assert {f"finetune/{name}" for name in twins} <= list_recipes().keys()


@pytest.mark.parametrize("name", sorted(shipped_recipes(RECIPES)))
def test_the_header_of_a_recipe_says_hardware_time_result_and_command(name: str) -> None:
    text = shipped_recipes(RECIPES)[name]
    header = "\n".join(line for line in text.splitlines() if line.startswith("#"))
    command = f"querypatch finetune {name} run="
    for word in ("Hardware:", "Time:", "Result:", command, "data.train=", "data.validation="):
        assert word in header
    assert ("init=" in header) != name.endswith("_scratch")


@pytest.mark.parametrize("name", [*NAMES, *DEFORMABLE, *CONDITIONAL])
def test_a_twin_from_scratch_differs_in_weights_and_architecture_alone(name: str) -> None:
    ours, theirs = pretrained(name).model_dump(), from_scratch(name).model_dump()
    differing = {key for key in ours if ours[key] != theirs[key]}
    assert {"init", "from_scratch"} <= differing <= {"init", "from_scratch", "model"}
    assert ours["model"]["backbone"]["train"] == theirs["model"]["backbone"]["train"]
    assert ours["model"]["dropout"] == theirs["model"]["dropout"]


@pytest.mark.parametrize("name", NAMES)
def test_the_architecture_of_a_pretrained_one_is_left_to_its_weights(name: str) -> None:
    model = pretrained(name).model
    assert model.model_fields_set <= {"backbone", "dropout"}
    assert model.backbone.model_fields_set <= {"train", "weights"}
    assert model.backbone.weights is None


@pytest.mark.parametrize("name", [*DEFORMABLE, *CONDITIONAL])
def test_a_recipe_of_its_descendants_says_how_the_transformer_is_asked_and_not_what_it_is(
    name: str,
) -> None:
    model, twin = pretrained(name).model, from_scratch(name).model
    assert model.model_fields_set <= {"backbone", "dropout", *ASKED}
    assert model.backbone.model_fields_set <= {"train", "weights"}
    assert (model.decoder_attention != "dense", model.class_scores) == (True, "sigmoid")
    for key in model.model_fields_set - {"backbone"}:
        assert getattr(model, key) == getattr(twin, key)


def test_recipes_of_deformable_and_sparse_detr_are_those_of_the_public_code() -> None:
    for name in DEFORMABLE:
        recipe = from_scratch(name)
        assert (recipe.costs.classes, recipe.losses.classes) == (2, 2)
        if name.endswith("tiny_cpu"):
            continue
        rates = recipe.optimiser
        assert (rates.lr, rates.backbone_lr, rates.sampling_lr) == (2e-4, 2e-5, 2e-5)
        assert (rates.weight_decay, rates.clip_norm) == (1e-4, 0.1)
        assert (recipe.loop.epochs, recipe.schedule.drop_at) == (50, (40,))
        assert recipe.global_batch == (32 if name.startswith("coco_deformable") else 16)
        model = recipe.model
        assert (model.feature_levels, model.encoder_points, model.decoder_points) == (4, 4, 4)
        assert (model.num_queries, model.feedforward_dim, model.dropout) == (300, 1024, 0.1)
        is_sparse = "sparse" in name
        assert model.rho == (0.3 if is_sparse else None)
        if is_sparse:
            assert (model.proposal_content, model.proposal_classes) == ("memory", "all")
            assert (model.two_stage, model.selection.encoder_auxiliary) == (True, True)
    dc5 = loaded("coco_deformable_r50_dc5_scratch", *SAID, "model.backbone.weights=w").model
    assert (dc5.feature_levels, dc5.backbone.dilation) == (1, True)


@pytest.mark.parametrize("name", CONDITIONAL)
def test_recipes_of_conditional_and_dab_detr_are_those_of_the_public_code(name: str) -> None:
    recipe, anchors = from_scratch(name), "dab" in name
    model, losses = recipe.model, recipe.losses
    assert (losses.classes, losses.boxes_l1, losses.giou) == (1 if anchors else 2, 5, 2)
    assert (recipe.costs.classes, recipe.costs.boxes_l1, recipe.costs.giou) == (2, 5, 2)
    assert (model.query_kind == "anchor", model.activation == "prelu") == (anchors, anchors)
    assert (model.position_temperature == 20, model.scale_positions) == (anchors, anchors)
    if name.endswith("tiny_cpu"):
        return
    assert (model.dropout, model.num_queries) == (0.0 if anchors else 0.1, 300)
    rates = recipe.optimiser
    assert (rates.lr, rates.backbone_lr, rates.weight_decay) == (1e-4, 1e-5, 1e-4)
    assert (rates.clip_norm, recipe.global_batch) == (0.1, 16)
    length = (12, (11,)) if name.endswith("12ep") else (50, (40,))
    assert (recipe.loop.epochs, recipe.schedule.drop_at) == length


@pytest.mark.parametrize("name", [*LOW_LABEL, *(f"{name}_scratch" for name in LOW_LABEL)])
def test_the_rate_of_a_low_label_recipe_never_drops(name: str) -> None:
    """Peers' bug 12."""
    extra = "model.backbone.weights=w" if name.endswith("_scratch") else "init=w"
    recipe = loaded(name, *SAID, extra)
    schedule = schedule_in_steps(recipe.schedule, 10_000, 7.0)
    rates = {learning_rate(schedule, 1e-4, step) for step in range(0, 10_000, 50)}
    assert rates == {1e-4}
    assert recipe.data.subset is not None


def test_the_recipes_of_the_paper_are_those_of_the_paper() -> None:
    for name, epochs, drop in (("r50", 300, 200), ("r50_150ep", 150, 100)):
        for data in ("coco", "voc"):
            recipe = from_scratch(f"{data}_{name}")
            assert (recipe.loop.epochs, recipe.schedule.drop_at) == (epochs, (drop,))
            assert (recipe.optimiser.lr, recipe.optimiser.backbone_lr) == (1e-4, 5e-5)
            assert (recipe.optimiser.clip_norm, recipe.global_batch) == (0.1, 16)
            assert (recipe.model.num_queries, recipe.model.pre_norm) == (100, True)
    assert from_scratch("voc_r50").evaluation.protocols == ("coco", "voc07")


def test_weights_or_from_scratch_must_be_said_and_not_both() -> None:
    for told in ((), ("init=w", "from_scratch=true")):
        with pytest.raises(RecipeError, match="name the weights to start from with init=, or say"):
            loaded("tiny_cpu", *SAID, *told)
    with pytest.raises(RecipeError, match=r"model\.backbone\.weights is not said"):
        loaded("voc_r50_scratch", *SAID)


def test_what_waits_for_evaluations_cannot_score_in_the_background() -> None:
    for told in ("early_stop={patience: 2}", "checkpoints.best_metric=eval/ap"):
        with pytest.raises(RecipeError, match=r"use them with loop\.score_in_background=false"):
            pretrained("voc_r50", told)


def test_a_mask_head_needs_a_finished_detector() -> None:
    with pytest.raises(RecipeError, match="task=panoptic trains a mask head on a finished"):
        from_scratch("tiny_cpu", "task=panoptic")


def test_a_recipe_of_another_command_is_refused_with_the_right_one(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("stage: finetune\n")
    with pytest.raises(RecipeError, match="this recipe is for `querypatch finetune`, not for"):
        recipe_of("pretrain", str(tmp_path / "own.yaml"))
    (tmp_path / "own.yaml").write_text("stage: finetun\n")
    with pytest.raises(RecipeError, match="stage: 'finetun' is none of pretrain, finetune"):
        show_recipe(str(tmp_path / "own.yaml"))


@pytest.mark.parametrize("name", sorted(shipped_recipes(RECIPES)))
def test_every_recipe_is_shown_with_null_for_what_only_its_user_knows(name: str) -> None:
    shown = show_recipe(f"finetune/{name}").splitlines()
    assert {"run: null", "init: null", "  train: null"} <= set(shown)
    assert ("from_scratch: true" in shown) == name.endswith("_scratch")


def test_a_recipe_name_of_two_stages_must_say_which() -> None:
    with pytest.raises(RecipeError, match="say pretrain/tiny_cpu or finetune/tiny_cpu"):
        show_recipe("tiny_cpu")
    assert show_recipe("finetune/tiny_cpu_scratch").startswith("stage: finetune\n")
    assert "share: 0.05" in show_recipe("coco_low_label", ["init=w", "data.subset.share=0.05"])


def test_local_paths_become_absolute_and_urls_splits_and_words_stay() -> None:
    told = (
        "data.train=VOCdevkit#07+12-trainval", "data.validation=same", "data.train_pictures=p",
        "data.subset={manifest: m.json}", "run=s3://b/r",
    )  # fmt: skip
    recipe = with_absolute_paths(pretrained("tiny_cpu", *told))
    data = recipe.data
    assert recipe.run == "s3://b/r"
    assert data.train.endswith("/VOCdevkit#07+12-trainval")
    assert data.validation == "same"
    assert data.subset is not None
    for place in (data.train, data.train_pictures, data.subset.manifest, recipe.init):
        assert place is not None
        assert place.startswith("/")


def test_every_free_key_is_a_key_of_the_recipe() -> None:
    known = recipe_schema(FinetuneRecipe)
    for key in FREE_KEYS:
        inner: dict[str, Any] = known
        for part in key.rstrip(".").split("."):
            entry = inner["properties"][part]
            inner = known["$defs"].get(entry.get("$ref", "").rpartition("/")[2], entry)


def test_a_refused_value_is_named_with_its_key() -> None:
    with pytest.raises(RecipeError, match=r"^data\.difficult=\"ignore\": should be 'keep' or"):
        pretrained("voc_r50", "data.difficult=ignore")


def test_a_teacher_is_the_users_to_name_and_of_detectors_alone() -> None:
    with pytest.raises(RecipeError, match=r"distill\.teacher: missing"):
        recipe_of("finetune", "d3etr_tiny_cpu", (*SAID, "init=w"))
    taught = pretrained("voc_r50", "distill.teacher=runs/t")
    assert taught.distill is not None
    assert with_absolute_paths(taught).distill.teacher.endswith("/runs/t")  # type: ignore[union-attr]
    with pytest.raises(RecipeError, match=r"task=panoptic: only detectors of all classes learn"):
        pretrained("coco_panoptic_masks", "distill.teacher=runs/t")
    with pytest.raises(RecipeError, match="learn nothing from the teacher"):
        pretrained("d3etr_tiny_cpu", "distill.adaptive=false", "distill.fixed=false")


def test_recipes_of_d3etr_are_conditional_detrs_with_the_authors_schedules() -> None:
    for name, epochs, drop in (
        ("coco_d3etr_r50_12ep", 12, 11),
        ("coco_d3etr_r18_12ep", 12, 11),
        ("coco_d3etr_r50", 50, 40),
    ):  # fmt: skip
        recipe = from_scratch(name)
        assert (recipe.loop.epochs, recipe.schedule.drop_at) == (epochs, (drop,))
        assert recipe.model.decoder_attention == "conditional"
        assert recipe.distill is not None
        assert (recipe.distill.of_self, recipe.distill.of_cross) == (33, 1)


def test_the_recipe_of_dat_has_the_published_settings() -> None:
    recipe = loaded("imagenet_dat_t_scratch", *SAID)
    rates, mix = recipe.optimiser, recipe.classify.mix
    # 5e-4 for each 512 pictures of a batch.
    assert rates.lr == 5e-4 * recipe.global_batch / 512
    assert (rates.weight_decay, rates.decay, rates.clip_norm) == (0.05, "matrices", 5.0)
    assert (recipe.loop.epochs, recipe.schedule.kind, recipe.schedule.warmup) == (300, "cosine", 20)
    # The authors' code scales the last rate, 5e-6, as it does the first.
    assert rates.lr * recipe.schedule.final_share == 5e-6 * recipe.global_batch / 512
    assert (mix.mixup, mix.cutmix, mix.smoothing) == (0.8, 1.0, 0.1)
    changes = recipe.classify.augment
    assert (changes.rand_augment, changes.rand_augment_deviation, changes.erase) == (9, 0.5, 0.25)
    assert recipe.model.backbone.drop_path == 0.2
    sizes = recipe.classify.sizes
    assert (sizes.resize, sizes.crop, sizes.keep_aspect) == (256, 224, False)
