"""Recipes: every shipped one loads, says what it is for, and keeps to the published numbers."""

import pytest

from cluster.stages import show_recipe
from pretrain.recipe import (
    FREE_KEYS,
    RECIPES,
    PretrainRecipe,
    recipe_of,
    with_absolute_paths,
)
from training.recipe import RecipeError, recipe_schema
from training.shipped_recipes import shipped_recipes

SAID = ["run=r", "data.shards=s", "model.backbone.weights=w"]
NAMES = (
    "chaos_cpu", "conditional_tiny_cpu", "dab_tiny_cpu", "deformable_tiny_cpu", "folder_r18",
    "imagenet_conditional_r50", "imagenet_dab_r50", "imagenet_deformable_r50", "imagenet_r50",
    "imagenet_r50_15ep", "imagenet_sparse_r50", "single_query", "sparse_tiny_cpu", "tiny_cpu",
)  # fmt: skip


def test_these_recipes_are_shipped() -> None:
    assert tuple(shipped_recipes(RECIPES)) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_recipe_loads_and_its_header_says_hardware_time_result_and_command(
    name: str,
) -> None:
    recipe_of(name, SAID)
    header = [line for line in shipped_recipes(RECIPES)[name].splitlines() if line.startswith("#")]
    text = "\n".join(header)
    for word in ("Hardware:", "Time:", "Result:", f"querypatch pretrain {name} "):
        assert word in text


def test_imagenet_r50_is_the_public_command() -> None:
    recipe = recipe_of("imagenet_r50", SAID)
    assert (recipe.global_batch, recipe.loop.epochs, recipe.schedule.drop_at) == (256, 60, (40,))
    assert (recipe.optimiser.lr, recipe.optimiser.weight_decay) == (1e-4, 1e-4)
    assert recipe.optimiser.clip_norm == 0.1
    assert (recipe.model.num_queries, recipe.queries.num_patches) == (100, 10)
    assert recipe.model.pre_norm
    assert not recipe.model.backbone.train
    assert (recipe.queries.mask_ratio, recipe.queries.mask_unit) == (0.1, "per_query")
    assert not recipe.queries.shuffle
    assert recipe.losses.no_object == 0.1


@pytest.mark.parametrize("name", ["imagenet_deformable_r50", "imagenet_sparse_r50"])
def test_the_imagenet_recipes_of_deformable_detectors_keep_to_their_published_numbers(
    name: str,
) -> None:
    recipe = recipe_of(name, SAID)
    assert (recipe.optimiser.lr, recipe.optimiser.sampling_lr) == (2e-4, 2e-5)
    assert (recipe.costs.classes, recipe.costs.boxes_l1, recipe.costs.giou) == (2, 5, 2)
    assert (recipe.losses.classes, recipe.losses.boxes_l1, recipe.losses.giou) == (2, 5, 2)
    model = recipe.model
    assert (model.feature_levels, model.num_queries, model.feedforward_dim) == (4, 300, 1024)
    assert (model.encoder_points, model.decoder_points) == (4, 4)
    assert model.rho == (0.3 if name == "imagenet_sparse_r50" else None)


@pytest.mark.parametrize("name", ["conditional", "dab"])
def test_the_imagenet_recipes_of_conditional_detectors_keep_to_their_published_numbers(
    name: str,
) -> None:
    recipe = recipe_of(f"imagenet_{name}_r50", SAID)
    model, anchors = recipe.model, name == "dab"
    assert (recipe.optimiser.lr, recipe.costs.classes) == (1e-4, 2)
    assert recipe.losses.classes == (1 if anchors else 2)
    assert (model.num_queries, model.feedforward_dim, model.class_scores) == (300, 2048, "sigmoid")
    assert (model.query_kind, model.dropout) == (("anchor", 0.0) if anchors else ("position", 0.1))
    assert model.position_temperature == (20 if anchors else 10000)


@pytest.mark.parametrize(
    ("name", "told", "complaint"),
    [
        (
            "imagenet_deformable_r50",
            "model.two_stage=true",
            r"tokens do not know the patches; pretrain with model\.two_stage=false",
        ),
        (
            "imagenet_sparse_r50",
            "model.selection.encoder_auxiliary=true",
            r"pretrain with model\.selection\.encoder_auxiliary=false",
        ),
        (
            "imagenet_sparse_r50",
            "model.selection.criterion=objectness",
            r"criterion=objectness learns nothing here.*with model\.selection\.criterion=dam",
        ),
        (
            "imagenet_sparse_r50",
            "model.selection.criterion=random",
            r"criterion=random learns nothing here",
        ),
        ("imagenet_deformable_r50", "model.num_classes=1", r"num_classes=1 has no class 1"),
        ("imagenet_dab_r50", "model.num_patterns=3", r"num_patterns=3 .*use num_patterns=0 here"),
    ],
)
def test_what_asks_tokens_for_patches_is_refused_with_the_way_out(
    name: str, told: str, complaint: str
) -> None:
    with pytest.raises(RecipeError, match=complaint):
        recipe_of(name, [*SAID, told])


def test_a_recipe_without_run_and_shards_names_both_and_then_the_weights() -> None:
    with pytest.raises(RecipeError) as caught:
        recipe_of("imagenet_r50")
    named = [line.partition(":")[0] for line in str(caught.value).splitlines()]
    assert named == ["run", "data.shards"]
    with pytest.raises(RecipeError, match=r"^model\.backbone\.weights is not said; give the path"):
        recipe_of("imagenet_r50", ["run=r", "data.shards=s"])


def test_an_unknown_recipe_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(
        RecipeError,
        match=r"'imagnet' is neither a file nor one of chaos_cpu, conditional_tiny_cpu, ",
    ):
        recipe_of("imagnet", SAID)


def test_queries_that_patches_cannot_share_evenly_are_refused() -> None:
    with pytest.raises(RecipeError, match="num_queries=100 cannot be shared evenly"):
        recipe_of("imagenet_r50", [*SAID, "queries.num_patches=7"])


@pytest.mark.parametrize("workers", ["17", "2..17"])
def test_more_workers_than_pictures_in_a_batch_are_refused(workers: str) -> None:
    with pytest.raises(RecipeError, match=f"resources.workers={workers} are more"):
        recipe_of("tiny_cpu", [*SAID, f"resources.workers={workers}"])


@pytest.mark.parametrize(
    ("told", "pictures"),
    [
        ("resources.workers=3", None),
        ("resources.workers=2..3", 6),
        ("resources={workers: 2..3, max_pictures_per_pass: 4}", 4),
        ("resources={workers: 3, max_pictures_per_pass: 4}", 4),
    ],
)
def test_fewer_workers_of_a_range_need_no_more_memory(told: str, pictures: int | None) -> None:
    assert recipe_of("tiny_cpu", [*SAID, "global_batch=16", told]).pictures_per_pass == pictures


def test_workers_that_are_neither_number_nor_range_are_named_with_their_key() -> None:
    with pytest.raises(RecipeError, match=r"resources.workers: .*say e\.g\. 4 or 2\.\.8"):
        recipe_of("tiny_cpu", [*SAID, "resources.workers=2-8"])


def test_a_recipe_is_shown_with_null_for_what_only_its_user_knows() -> None:
    text = show_recipe("imagenet_r50", ["seed=7"])
    assert text.startswith("stage: pretrain\nrun: null\nseed: 7\n")
    assert "weights: random" in show_recipe("pretrain/tiny_cpu")


def test_local_paths_become_absolute_and_urls_stay() -> None:
    recipe = with_absolute_paths(
        recipe_of("tiny_cpu", ["run=s3://b/r", "data.shards=shards", "init=w.pth"])
    )
    assert recipe.run == "s3://b/r"
    assert recipe.data.shards.startswith("/")
    assert recipe.data.held_out is None
    assert recipe.init is not None
    assert recipe.init.endswith("/w.pth")
    assert recipe.model.backbone.weights == "random"


def test_every_free_key_is_a_key_of_the_recipe() -> None:
    known = recipe_schema(PretrainRecipe)
    definitions = known["$defs"]
    assert isinstance(definitions, dict)
    for key in FREE_KEYS:
        inner: dict[str, object] = known
        for part in key.rstrip(".").split("."):
            properties = inner["properties"]
            assert isinstance(properties, dict)
            entry = properties[part]
            inner = definitions.get(str(entry.get("$ref", "")).rpartition("/")[2], entry)
