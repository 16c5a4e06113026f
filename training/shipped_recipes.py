"""Recipes that come with querypatch: YAML files in a package, found by name."""

from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import TypeVar

from models.settings import Settings
from training.recipe import RecipeError, load_recipe, override, parse_recipe, recipe_yaml

R = TypeVar("R", bound=Settings)

_STAND_IN = "TO_BE_SAID"


def shipped_recipes(package: str) -> dict[str, str]:
    """The YAML text of every recipe in a package, e.g. `pretrain.recipes`, by name."""
    folder = files(package)
    return {
        entry.name.removesuffix(".yaml"): entry.read_text(encoding="utf-8")
        for entry in sorted(folder.iterdir(), key=lambda entry: entry.name)
        if entry.name.endswith(".yaml")
    }


def recipe_source(name: str, package: str) -> str | Path:
    """The text of a shipped recipe, or the path of a YAML file; RecipeError where it is neither."""
    recipes = shipped_recipes(package)
    if name in recipes:
        return recipes[name]
    if Path(name).is_file():
        return Path(name)
    raise RecipeError(
        f"recipe {name!r} is neither a file nor one of {', '.join(recipes)}; "
        "see `querypatch recipe list`"
    )


def shown_recipe(
    kind: type[R], source: str | Path, overrides: Sequence[str], users_keys: Sequence[str]
) -> str:
    """The resolved recipe as YAML; null stands for what it leaves for its user to say.

    `users_keys` are the keys that no recipe can know.
    """
    values = override(parse_recipe(source), overrides)
    stand_ins = [f"{key}={_STAND_IN}" for key in users_keys if not _says(values, key)]
    text = recipe_yaml(load_recipe(kind, values, stand_ins))
    return text.replace(_STAND_IN, "null")


def _says(values: Mapping[str, object], key: str) -> bool:
    inner: object = values
    for part in key.split("."):
        inner = inner.get(part) if isinstance(inner, Mapping) else None
    return inner is not None
