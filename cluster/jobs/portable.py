"""A recipe for machines elsewhere: what it says as one file, without paths of this machine.

It holds no secret either, since no recipe may: a manifest is shown, stored and committed.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from cluster.stages import Recipe, StageName, found_recipe, parsed_recipe
from training.recipe import RecipeError, override, parse_recipe
from training.strict_yaml import dump_yaml


@dataclass(frozen=True)
class PortableRecipe:
    """What a cluster is given of a recipe."""

    stage: StageName
    text: str
    """What the recipe and its overrides say, as YAML."""
    recipe: Recipe
    """All its values."""

    @property
    def name(self) -> str:
        """Of Kubernetes' kind, made of the last part of the run's URL: small letters, digits, -."""
        last = self.recipe.run.rstrip("/").rpartition("/")[2].lower()
        words = "".join(sign if sign.isascii() and sign.isalnum() else " " for sign in last).split()
        name = "-".join(words)
        return (name if name[:1].isalpha() else f"run-{name}")[:47].rstrip("-")


def portable_recipe(
    name: str, overrides: Sequence[str], folders: Sequence[str] = ()
) -> PortableRecipe:
    """The recipe that `recipe show` would show, for machines that see URLs and `folders`.

    Raises RecipeError: as `parsed_recipe`, credentials in a URL among it; a path outside `folders`;
    or resources.device=auto, which a cluster that is still to be made cannot answer.
    """
    stage, source = found_recipe(name)
    values = {"stage": stage, **override(parse_recipe(source), overrides)}
    recipe = parsed_recipe(values, (), stage)
    if mistakes := list(_mistakes(recipe, folders)):
        raise RecipeError("\n".join(mistakes))
    return PortableRecipe(stage, dump_yaml(values), recipe)


def _mistakes(recipe: Recipe, folders: Sequence[str]) -> Iterator[str]:
    for key, value in _texts(recipe.model_dump(mode="json")):
        if value.startswith("/") and not value.startswith(tuple(f"{each}/" for each in folders)):
            yield (
                f"{key}={value} is a path of this machine, which the cluster does not see; give a "
                f"URL{''.join(f', or a path under {each}' for each in folders)}"
            )
    if recipe.resources.device == "auto":
        yield "resources.device=auto: the machines follow from it; say cuda or cpu"


def _texts(values: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Every string of a recipe by its dotted key."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _texts(value, f"{prefix}{key}.")
        elif isinstance(value, str):
            yield prefix + key, value
        elif isinstance(value, list):
            yield from ((prefix + key, each) for each in value if isinstance(each, str))
