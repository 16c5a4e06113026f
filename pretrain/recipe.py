"""The recipe of a pretraining run: everything that decides its result, and where it runs."""

from collections.abc import Sequence
from typing import Literal, Self

from pydantic import Field, model_validator

from data.loader import StreamSettings
from data.order import OrderSettings
from data.patches import PatchSettings
from models.detector_settings import DetectorSettings
from models.interop.backbones import RANDOM_WEIGHTS
from models.losses import LossWeights
from models.matching import MatchingCosts
from models.patch_queries import QueryPatches, check_patterns, queries_per_patch
from models.settings import Settings
from training import run_recipe
from training.recipe import load_recipe
from training.run_recipe import RunRecipe, absolute
from training.shipped_recipes import recipe_source

RECIPES = "pretrain.recipes"
"""The package of the recipes that come with querypatch."""

FREE_KEYS = run_recipe.FREE_KEYS
"""Keys, and sections with a dot, that a resumed run may change: they change nothing it learns."""

USERS_KEYS = ("run", "data.shards", "model.backbone.weights")
"""Keys that no recipe can know."""


class PretrainingData(Settings):
    """The pictures, and how query patches are cut from them."""

    shards: str
    """Folder of the shards to learn from: a path or any fsspec URL; their labels are not used."""
    held_out: str | None = None
    """Folder of shards to evaluate on, never learned from; null evaluates nothing."""
    held_out_pictures: int = Field(default=512, ge=1)
    """Pictures of `held_out` that an evaluation uses, the first ones."""
    order: OrderSettings = OrderSettings()
    """The order of the pictures."""
    patches: PatchSettings = PatchSettings()
    """Sizes of pictures and patches, and the colour changes."""
    stream: StreamSettings = StreamSettings()
    """How the pictures are brought in; nothing here changes what is learned."""
    colour_on: Literal["auto", "cpu", "device"] = "auto"
    """Where the patches' colours change; `auto`: on the device where that is a GPU."""


class PretrainRecipe(RunRecipe):
    """One pretraining run."""

    stage: Literal["pretrain"] = "pretrain"
    """The kind of run that this recipe is of."""
    model: DetectorSettings
    """The detector whose transformer is pretrained."""
    queries: QueryPatches = QueryPatches()
    """How patches are given to the object queries."""
    costs: MatchingCosts = MatchingCosts()
    """What the matching weighs."""
    losses: LossWeights = LossWeights()
    """What the loss weighs."""
    data: PretrainingData
    """The pictures."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        check_patterns(self.model, self.queries)
        queries_per_patch(self.model.num_queries, self.queries.num_patches)
        if self.model.num_classes is None or self.model.num_classes < 2:
            raise ValueError(
                f"model.num_classes={self.model.num_classes} has no class 1, "
                '"matches a patch"; use 2, as the public code does'
            )
        if self.model.backbone.weights is None:
            raise ValueError(
                "model.backbone.weights is not said; give the path or URL of a checkpoint, or "
                "random"
            )
        _check_tokens(self.model)
        self.check_workers()
        return self


def recipe_of(name: str, overrides: Sequence[str] = ()) -> PretrainRecipe:
    """A shipped recipe by its name, or the recipe of a YAML file, with overrides `a.b=c`.

    Raises RecipeError: no such recipe, or one line per mistake in it.
    """
    source = recipe_source(name, RECIPES)
    return with_absolute_paths(load_recipe(PretrainRecipe, source, overrides))


def with_absolute_paths(recipe: PretrainRecipe) -> PretrainRecipe:
    """The same recipe for processes with other working directories; URLs stay as they are."""
    data = recipe.data.model_copy(
        update={
            "shards": absolute(recipe.data.shards),
            "held_out": absolute(recipe.data.held_out),
        }
    )
    backbone = recipe.model.backbone
    if backbone.weights != RANDOM_WEIGHTS:
        backbone = backbone.model_copy(update={"weights": absolute(backbone.weights)})
    return recipe.model_copy(
        update={
            "run": absolute(recipe.run),
            "init": absolute(recipe.init),
            "data": data,
            "model": recipe.model.model_copy(update={"backbone": backbone}),
        }
    )


def _check_tokens(model: DetectorSettings) -> None:
    """Tokens are the picture's alone: no loss may ask of them which patches were cut from it."""
    if model.two_stage:
        raise ValueError(
            "model.two_stage=true makes queries of the boxes that tokens propose, and tokens do "
            "not know the patches; pretrain with model.two_stage=false, and say true when the "
            "transformer is finetuned"
        )
    if model.rho is None:
        return
    if model.selection.criterion != "dam":
        raise ValueError(
            f"model.selection.criterion={model.selection.criterion} learns nothing here, as tokens "
            "do not know the patches; pretrain with model.selection.criterion=dam, which learns "
            "from the decoder, and finetune with any"
        )
    if model.selection.encoder_auxiliary:
        raise ValueError(
            "model.selection.encoder_auxiliary=true asks tokens for the boxes of patches, which "
            "they do not know; pretrain with model.selection.encoder_auxiliary=false, and say true "
            "when the transformer is finetuned"
        )
