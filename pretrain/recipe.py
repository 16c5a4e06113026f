"""The recipe of a pretraining run: everything that decides its result, and where it runs."""

from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from data.loader import StreamSettings
from data.order import OrderSettings
from data.patches import PatchSettings
from models.detector import DetectorSettings
from models.interop.backbones import RANDOM_WEIGHTS
from models.losses import LossWeights
from models.matching import MatchingCosts
from models.patch_queries import QueryPatches, queries_per_patch
from models.settings import Settings
from training.ema import EmaSettings
from training.job import LoopSettings
from training.optimiser import OptimiserSettings
from training.recipe import RecipeError, load_recipe, override, parse_recipe, recipe_yaml
from training.resources import Resources
from training.retention import RetentionSettings
from training.schedule import ScheduleSettings

FREE_KEYS = (
    "run",
    "resources.",
    "data.stream.",
    "loop.log_every",
    "loop.checkpoint_every_steps",
    "loop.checkpoint_every_minutes",
    "loop.max_bad_steps",
    "checkpoints.",
)
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


class PretrainRecipe(Settings):
    """One pretraining run."""

    stage: Literal["pretrain"] = "pretrain"
    """The kind of run that this recipe is of."""
    run: str
    """Folder of the run: a path or any fsspec URL."""
    seed: int = Field(default=42, ge=0)
    """Decides weights, order, patches and dropout."""
    global_batch: int = Field(default=256, ge=1)
    """Pictures in one batch of all workers together."""
    init: str | None = None
    """Weights to start from instead of random ones: a file, an exported or a running run's folder;
    weights only, never the state of a run.
    """
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
    optimiser: OptimiserSettings = OptimiserSettings()
    """AdamW."""
    schedule: ScheduleSettings = ScheduleSettings()
    """The learning rate over the run."""
    loop: LoopSettings
    """Length, precision and rhythm of the run."""
    ema: EmaSettings | None = None
    """A moving average of the weights, evaluated in place of the live ones; null for none."""
    checkpoints: RetentionSettings = RetentionSettings()
    """Which checkpoints stay."""
    resources: Resources = Resources()
    """Workers and devices."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        queries_per_patch(self.model.num_queries, self.queries.num_patches)
        if self.model.num_classes is None or self.model.num_classes < 2:
            raise ValueError(
                f"model.num_classes={self.model.num_classes} has no class 1, "
                '"matches a patch"; use 2, as the public code does'
            )
        if self.resources.workers > self.global_batch:
            raise ValueError(
                f"resources.workers={self.resources.workers} are more than the pictures of a "
                f"batch, global_batch={self.global_batch}; use fewer workers"
            )
        return self


def shipped_recipes() -> dict[str, str]:
    """The YAML text of every recipe that comes with querypatch, by name."""
    folder = files("pretrain.recipes")
    return {
        entry.name.removesuffix(".yaml"): entry.read_text(encoding="utf-8")
        for entry in sorted(folder.iterdir(), key=lambda entry: entry.name)
        if entry.name.endswith(".yaml")
    }


def recipe_of(name: str, overrides: Sequence[str] = ()) -> PretrainRecipe:
    """A shipped recipe by its name, or the recipe of a YAML file, with overrides `a.b=c`.

    Raises RecipeError: no such recipe, or one line per mistake in it.
    """
    return with_absolute_paths(load_recipe(PretrainRecipe, recipe_source(name), overrides))


def with_absolute_paths(recipe: PretrainRecipe) -> PretrainRecipe:
    """The same recipe for processes with other working directories; URLs stay as they are."""
    data = recipe.data.model_copy(
        update={
            "shards": _absolute(recipe.data.shards),
            "held_out": _absolute(recipe.data.held_out),
        }
    )
    backbone = recipe.model.backbone
    if backbone.weights != RANDOM_WEIGHTS:
        backbone = backbone.model_copy(update={"weights": _absolute(backbone.weights)})
    return recipe.model_copy(
        update={
            "run": _absolute(recipe.run),
            "init": _absolute(recipe.init),
            "data": data,
            "model": recipe.model.model_copy(update={"backbone": backbone}),
        }
    )


def shown_recipe(name: str, overrides: Sequence[str] = ()) -> str:
    """The resolved recipe as YAML; null stands for what it leaves for its user to say."""
    values = override(parse_recipe(recipe_source(name)), overrides)
    said = {key: _said(values, key) for key in USERS_KEYS}
    stand_ins = [f"{key}=TO_BE_SAID" for key, is_said in said.items() if not is_said]
    text = recipe_yaml(load_recipe(PretrainRecipe, values, stand_ins))
    return text.replace("TO_BE_SAID", "null")


def recipe_source(name: str) -> str | Path:
    """The text of a shipped recipe, or the path of a YAML file; RecipeError where it is neither."""
    recipes = shipped_recipes()
    if name in recipes:
        return recipes[name]
    if Path(name).is_file():
        return Path(name)
    raise RecipeError(
        f"recipe {name!r} is neither a file nor one of {', '.join(recipes)}; "
        "see `querypatch recipe list`"
    )


def _said(values: Mapping[str, object], key: str) -> bool:
    inner: object = values
    for part in key.split("."):
        inner = inner.get(part) if isinstance(inner, Mapping) else None
    return inner is not None


def _absolute(path: str | None) -> str | None:
    if path is None or "://" in path:
        return path
    return str(Path(path).expanduser().absolute())
