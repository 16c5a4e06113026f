"""Recipes: strict YAML, overrides, and the exact text of every mistake."""

import math
from pathlib import Path
from typing import Literal, Self

import pytest
from pydantic import Field, model_validator

from models.settings import Settings
from training.recipe import (
    RecipeError,
    load_recipe,
    parse_recipe,
    recipe_differences,
    recipe_digest,
    recipe_schema,
    recipe_yaml,
)
from training.strict_yaml import dump_yaml, parse_yaml


class Optimiser(Settings):
    lr: float = Field(default=1e-4, gt=0)
    """Learning rate."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Two decays."""
    drop_at: tuple[int, ...] = ()
    """Steps."""


class Data(Settings):
    shards: str
    """Folder of the shards."""
    kind: Literal["tar", "tree"] = "tar"
    """What lies there."""


class Average(Settings):
    decay: float = 0.9
    """Share that stays."""


class Recipe(Settings):
    seed: int = 0
    """Of everything."""
    optimiser: Optimiser = Optimiser()
    """The optimiser."""
    data: Data
    """The data."""
    average: Average | None = None
    """Optional."""

    @model_validator(mode="after")
    def _seeded(self) -> Self:
        if self.seed == 13:
            raise ValueError("seed=13 brings bad luck; use another, e.g. seed=14")
        return self


def mistakes(source: object, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(Recipe, source, overrides)
    return str(caught.value).splitlines()


def test_yaml_text_with_overrides_becomes_settings() -> None:
    text = "seed: 3\noptimiser: {lr: 1e-4, betas: [0, 1]}\ndata:\n  shards: a\n"
    recipe = load_recipe(
        Recipe, text, ["data.shards=s3://b/c", "optimiser.lr=2e-5", "optimiser.drop_at=[4, 7]"]
    )
    optimiser = Optimiser(lr=2e-5, betas=(0.0, 1.0), drop_at=(4, 7))
    assert recipe == Recipe(seed=3, optimiser=optimiser, data=Data(shards="s3://b/c"))


def test_an_override_opens_an_optional_section_and_null_closes_it() -> None:
    source = {"data": {"shards": "a"}, "average": None}
    assert load_recipe(Recipe, source, ["average.decay=0.5"]).average == Average(decay=0.5)
    opened = {"data": {"shards": "a"}, "average": {"decay": 0.5}}
    assert load_recipe(Recipe, opened, ["average=null"]).average is None


def test_a_file_is_read_and_named_in_its_errors(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("data: {shards: a}\n")
    assert load_recipe(Recipe, path).data.shards == "a"
    path.write_text("data: {shards: a}\nseed: [1\n")
    with pytest.raises(RecipeError, match=r"r\.yaml line 3, column 1: expected ',' or ']'"):
        load_recipe(Recipe, path)


@pytest.mark.parametrize(
    ("source", "overrides", "expected"),
    [
        (
            {"data": {"shards": "a"}, "optimizer": {}},
            (),
            "optimizer: unknown key; did you mean optimiser?",
        ),
        (
            {"data": {"shards": "a"}, "optimiser": {"lrr": 1}},
            (),
            "optimiser.lrr: unknown key; did you mean optimiser.lr?",
        ),
        ({"data": {"shards": "a"}}, ("lr=1",), "lr: unknown key; did you mean optimiser.lr?"),
        (
            {"data": {"shards": "a"}},
            ("data.xyzzy=1",),
            "data.xyzzy: unknown key; data has shards, kind",
        ),
        ({}, (), "data: missing; give it in the recipe or as data=VALUE"),
        ({"data": {}}, (), "data.shards: missing; give it in the recipe or as data.shards=VALUE"),
        (
            {"data": {"shards": "a"}},
            ("optimiser.lr=fast",),
            'optimiser.lr="fast": should be a valid number',
        ),
        (
            {"data": {"shards": "a"}},
            ("optimiser.lr=-1",),
            "optimiser.lr=-1: should be greater than 0",
        ),
        (
            {"data": {"shards": "a"}},
            ("optimiser.drop_at=[4, x]",),
            'optimiser.drop_at.1="x": should be a valid integer',
        ),
        ({"data": {"shards": "a"}}, ("seed=1.5",), "seed=1.5: should be a valid integer"),
        (
            {"data": {"shards": "a"}},
            ("data.kind=zip",),
            "data.kind=\"zip\": should be 'tar' or 'tree'",
        ),
        ({"data": {"shards": 3}}, (), "data.shards=3: should be a valid string"),
        (
            {"data": {"shards": "a"}},
            ("average.decya=1",),
            "average.decya: unknown key; did you mean average.decay?",
        ),
        (
            {"data": {"shards": "a"}},
            ("seed=13",),
            "seed=13 brings bad luck; use another, e.g. seed=14",
        ),
        (
            {"data": {"shards": "a"}},
            ("seed",),
            "override 'seed' is not key=value, e.g. optimiser.lr=1e-4",
        ),
        (
            {"data": {"shards": "a"}},
            ("a..b=1",),
            "override 'a..b=1' is not key=value, e.g. optimiser.lr=1e-4",
        ),
        (
            {"data": {"shards": "a"}},
            ("seed=",),
            "override 'seed=' has no value; write seed=null for none",
        ),
        (
            {"data": {"shards": "a"}},
            ("data.shards.x=1",),
            "override 'data.shards.x': data.shards is \"a\", not a section",
        ),
        ("- 1\n- 2\n", (), "recipe: holds [1, 2]; a recipe is lines of `key: value`"),
        (
            "seed: 1\nseed: 2\n",
            (),
            "recipe line 2, column 1: the key 'seed' is given twice; keep one of them",
        ),
        (
            "1: 2\n",
            (),
            "recipe line 1, column 1: the key 1 must be a word; quote it to make it one",
        ),
    ],
)
def test_a_mistake_is_one_line_with_key_value_and_way_out(
    source: object, overrides: tuple[str, ...], expected: str
) -> None:
    assert mistakes(source, *overrides) == [expected]


def test_all_mistakes_are_told_at_once() -> None:
    assert mistakes({"seed": "x", "data": {"shard": "a"}}) == [
        'seed="x": should be a valid integer',
        "data.shards: missing; give it in the recipe or as data.shards=VALUE",
        "data.shard: unknown key; did you mean data.shards?",
    ]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E5", 1e5),
        (".5", 0.5),
        ("-2.", -2.0),
        ("-.inf", -math.inf),
        ("010", 10),
        ("-7", -7),
        ("0x1F", "0x1F"),
        ("1_000", "1_000"),
        ("1:30", "1:30"),
        ("no", "no"),
        ("on", "on"),
        ("true", True),
        ("2026-01-02", "2026-01-02"),
        ("~", None),
        ("s3://bucket/a", "s3://bucket/a"),
        ("'1e-4'", "1e-4"),
        ("<<", "<<"),
    ],
)
def test_scalars_are_those_of_yaml_1_2(text: str, value: object) -> None:
    found = parse_yaml(text)
    assert found == value
    assert type(found) is type(value)
    assert parse_yaml(dump_yaml(value)) == value


def test_the_rest_of_the_process_keeps_its_own_yaml() -> None:
    import yaml

    assert yaml.safe_load("a: 1e-4\nb: no\nc: 1.5") == {"a": "1e-4", "b": False, "c": 1.5}


def test_the_resolved_recipe_reads_back_as_itself() -> None:
    recipe = Recipe(
        optimiser=Optimiser(lr=1e-7, drop_at=(3,)), data=Data(shards="1e-4"), average=Average()
    )
    text = recipe_yaml(recipe)
    assert load_recipe(Recipe, text) == recipe
    assert recipe_yaml(load_recipe(Recipe, text)) == text
    assert recipe_digest(recipe) == recipe_digest(load_recipe(Recipe, text))
    assert text.startswith("seed: 0\noptimiser:\n  lr: 1.0e-07\n  betas:\n  - 0.9\n")


def test_differences_name_key_and_both_values() -> None:
    old = parse_recipe(recipe_yaml(Recipe(data=Data(shards="a"), average=Average())))
    old["gone"] = 1
    new = Recipe(data=Data(shards="b"), optimiser=Optimiser(lr=2e-4, drop_at=(1,)))
    assert recipe_differences(old, new) == (
        "optimiser.lr: 0.0001 -> 0.0002",
        "optimiser.drop_at: [] -> [1]",
        'data.shards: "a" -> "b"',
        "average.decay: 0.9 -> absent",
        "gone: 1 -> absent",
        "average: absent -> null",
    )
    assert recipe_differences(parse_recipe(recipe_yaml(new)), new) == ()


def test_the_schema_describes_every_key_for_editors() -> None:
    schema = recipe_schema(Recipe)
    assert schema["properties"]["seed"]["description"] == "Of everything."
    assert schema["$defs"]["Optimiser"]["properties"]["lr"]["exclusiveMinimum"] == 0
    assert schema["additionalProperties"] is False
