"""The stages of the service, by the word that their recipes carry."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, assert_never, get_args

import finetune.recipe
import pretrain.recipe
from finetune.recipe import FinetuneRecipe
from finetune.run import finetune as run_finetuning
from pretrain.recipe import PretrainRecipe
from pretrain.run import pretrain as run_pretraining
from training.recipe import RecipeError, load_recipe, override, parse_recipe
from training.shipped_recipes import recipe_source, shipped_recipes, shown_recipe
from training.snapshot import Position
from training.stage import Host

StageName = Literal["pretrain", "finetune"]
Recipe = PretrainRecipe | FinetuneRecipe

STAGES: tuple[StageName, ...] = get_args(StageName)


def stage_of(values: Mapping[str, object]) -> StageName:
    """The stage that the plain values of a recipe are of; runs of old say none and pretrain."""
    match values.get("stage", "pretrain"):
        case "pretrain":
            return "pretrain"
        case "finetune":
            return "finetune"
        case other:
            raise RecipeError(f"stage: {other!r} is none of {', '.join(STAGES)}")


def recipe_kind(stage: StageName) -> type[Recipe]:
    """The settings class of a stage's recipes."""
    match stage:
        case "pretrain":
            return PretrainRecipe
        case "finetune":
            return FinetuneRecipe
        case _:
            assert_never(stage)


def recipe_of(stage: StageName, name: str, overrides: Sequence[str] = ()) -> Recipe:
    """A shipped recipe of a stage by its name, or that of a YAML file, with overrides `a.b=c`.

    Raises RecipeError: no such recipe, or one line per mistake in it.
    """
    return parsed_recipe(recipe_values(stage, name, overrides), (), stage)


def recipe_values(
    stage: StageName, name: str | Mapping[str, object], overrides: Sequence[str] = ()
) -> dict[str, object]:
    """What a recipe, by its name or itself, and its overrides say, unchecked.

    Raises RecipeError as `recipe_of`.
    """
    source = recipe_source(name, _package(stage)) if isinstance(name, str) else name
    return override(parse_recipe(source), overrides)


def parsed_recipe(
    values: Mapping[str, object] | str,
    overrides: Sequence[str] = (),
    stage: StageName | None = None,
) -> Recipe:
    """The recipe of plain values or of YAML text; paths are made absolute.

    Raises RecipeError: one line per mistake, or it is of another stage than `stage`.
    """
    values = parse_recipe(values)
    said = stage_of(values) if "stage" in values or stage is None else stage
    if stage is not None and said != stage:
        raise RecipeError(f"this recipe is for `querypatch {said}`, not for `querypatch {stage}`")
    match said:
        case "pretrain":
            return pretrain.recipe.with_absolute_paths(
                load_recipe(PretrainRecipe, values, overrides)
            )
        case "finetune":
            return finetune.recipe.with_absolute_paths(
                load_recipe(FinetuneRecipe, values, overrides)
            )
        case _:
            assert_never(said)


def free_keys(recipe: Recipe) -> tuple[str, ...]:
    """Keys that a resumed run may change."""
    match recipe:
        case PretrainRecipe():
            return pretrain.recipe.FREE_KEYS
        case FinetuneRecipe():
            return finetune.recipe.FREE_KEYS
        case _:
            assert_never(recipe)


def run_stage(recipe: Recipe, host: Host) -> Position:
    """The stage's run on this worker, from its newest checkpoint; returns how far it came."""
    match recipe:
        case PretrainRecipe():
            return run_pretraining(recipe, host)
        case FinetuneRecipe():
            return run_finetuning(recipe, host)
        case _:
            assert_never(recipe)


def list_recipes() -> dict[str, str]:
    """The first line of every shipped recipe by `stage/name`."""
    return {
        f"{stage}/{name}": text.splitlines()[0].removeprefix("# ")
        for stage in STAGES
        for name, text in shipped_recipes(_package(stage)).items()
    }


def show_recipe(name: str, overrides: Sequence[str] = ()) -> str:
    """A recipe with every value resolved, as YAML; null for what only its user can say.

    `name` is `stage/name`, a name alone where one stage has it, or a YAML file that says its stage.
    """
    stage, source = found_recipe(name)
    return shown_recipe(
        recipe_kind(stage), source, overrides, _users_keys(stage, source, overrides)
    )


def found_recipe(name: str) -> tuple[StageName, str | Path]:
    """Stage and source of what `recipe show NAME` shows; RecipeError where it is of none."""
    for stage in STAGES:
        if name.startswith(f"{stage}/") and not Path(name).is_file():
            return stage, recipe_source(name.removeprefix(f"{stage}/"), _package(stage))
    having = [stage for stage in STAGES if name in shipped_recipes(_package(stage))]
    if len(having) > 1:
        choices = " or ".join(f"{stage}/{name}" for stage in having)
        raise RecipeError(f"recipe {name!r} is one of several stages; say {choices}")
    if having:
        return having[0], recipe_source(name, _package(having[0]))
    source = recipe_source(name, _package("pretrain"))
    return stage_of(parse_recipe(source)), source


def _users_keys(stage: StageName, source: str | Path, overrides: Sequence[str]) -> tuple[str, ...]:
    match stage:
        case "pretrain":
            return pretrain.recipe.USERS_KEYS
        case "finetune":
            return finetune.recipe.users_keys(override(parse_recipe(source), overrides))
        case _:
            assert_never(stage)


def _package(stage: StageName) -> str:
    match stage:
        case "pretrain":
            return pretrain.recipe.RECIPES
        case "finetune":
            return finetune.recipe.RECIPES
        case _:
            assert_never(stage)
