"""Recipes: one YAML file becomes one frozen, strict settings object, or one line per mistake.

A recipe is data (DESIGN.md, rule 2.1): the command line picks one and overrides `a.b=c`. The
resolved recipe is stored with its run, so that a resume can be held to it key by key.
"""

import difflib
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar, get_args

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from models.settings import Settings
from training.strict_yaml import dump_yaml, parse_yaml

R = TypeVar("R", bound=Settings)


class RecipeError(ValueError):
    """What is wrong with a recipe: one line per mistake, with key, value and way out."""


def load_recipe(
    kind: type[R], source: str | Path | Mapping[str, object], overrides: Sequence[str] = ()
) -> R:
    """The recipe of `source` (YAML text, a file, or values) with `a.b=c` overrides laid over it.

    Raises:
        RecipeError: YAML that does not parse, an override that is not `key=value`, an unknown key,
            a missing key or a refused value; all mistakes at once, one per line.
    """
    values = override(parse_recipe(source), overrides)
    try:
        # JSON mode is as strict and still lets a YAML list fill a tuple, an int a float.
        return kind.model_validate_json(json.dumps(values))
    except ValidationError as error:
        lines = [_mistake(details, kind, values) for details in error.errors()]
        raise RecipeError("\n".join(dict.fromkeys(lines))) from None


def parse_recipe(source: str | Path | Mapping[str, object]) -> dict[str, object]:
    """The plain values of a recipe (YAML text, a file, or a mapping) before they are checked.

    Raises:
        RecipeError: not YAML, a key given twice, or something other than a mapping at the top.
    """
    if isinstance(source, Mapping):
        return _copied(source)
    name = str(source) if isinstance(source, Path) else "recipe"
    text = source.read_text(encoding="utf-8") if isinstance(source, Path) else source
    values = _parsed(text, name)
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise RecipeError(f"{name}: holds {_shown(values)}; a recipe is lines of `key: value`")
    return values


def override(values: Mapping[str, object], overrides: Sequence[str]) -> dict[str, object]:
    """`values` with each `a.b=c` laid over them in turn; `c` is read as YAML.

    Raises:
        RecipeError: an override that is not `key=value` or reaches into a plain value.
    """
    merged = _copied(values)
    for text in overrides:
        path, equals, value = text.partition("=")
        if not equals or not all(part.strip() for part in path.split(".")):
            raise RecipeError(f"override {text!r} is not key=value, e.g. optimiser.lr=1e-4")
        if not value.strip():
            raise RecipeError(f"override {text!r} has no value; write {path}=null for none")
        _put(merged, path.strip(), _parsed(value, f"override {text!r}"))
    return merged


def recipe_yaml(recipe: Settings) -> str:
    """The whole recipe as YAML, every value resolved, keys in the order of their definition."""
    return dump_yaml(recipe.model_dump(mode="json"))


def recipe_digest(recipe: Settings) -> str:
    """sha256 of the resolved recipe, in hex: equal for equal recipes."""
    return hashlib.sha256(recipe_yaml(recipe).encode()).hexdigest()


def recipe_differences(old: Mapping[str, object], new: Settings) -> tuple[str, ...]:
    """One line per key whose value differs, e.g. `optimiser.lr: 0.0001 -> 0.0002`.

    `old` is what an earlier `recipe_yaml` parsed to; a key that only one of the two knows is shown
    as `absent`.
    """
    before = dict(_leaves(old))
    after = dict(_leaves(new.model_dump(mode="json")))
    return tuple(
        f"{key}: {_side(before, key)} -> {_side(after, key)}"
        for key in {**before, **after}
        if key not in before or key not in after or before[key] != after[key]
    )


def recipe_schema(kind: type[Settings]) -> dict[str, object]:
    """The JSON schema of a recipe, for editors that complete and check YAML."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **kind.model_json_schema(),
    }


def _parsed(text: str, name: str) -> object:
    try:
        return parse_yaml(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f" line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise RecipeError(f"{name}{place}: {error.problem}") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{name}: {' '.join(str(error).split())}") from None


def _copied(values: Mapping[str, object]) -> dict[str, object]:
    return {
        key: _copied(value) if isinstance(value, Mapping) else value
        for key, value in values.items()
    }


def _put(values: dict[str, object], path: str, value: object) -> None:
    *sections, name = path.split(".")
    inner = values
    for depth, section in enumerate(sections):
        child = inner.get(section)
        if child is None:
            child = inner[section] = {}
        if not isinstance(child, dict):
            reached = ".".join(sections[: depth + 1])
            raise RecipeError(f"override {path!r}: {reached} is {_shown(child)}, not a section")
        inner = child
    inner[name] = value


def _mistake(details: ErrorDetails, kind: type[Settings], values: Mapping[str, object]) -> str:
    path = _path(details["loc"], values)
    match details["type"]:
        case "extra_forbidden":
            return f"{path}: unknown key{_suggestion(path, kind)}"
        case "missing":
            return f"{path}: missing; give it in the recipe or as {path}=VALUE"
        case "value_error":
            reason = details["msg"].removeprefix("Value error, ")
            return f"{path}: {reason}" if path else reason
        case _:
            reason = details["msg"].removeprefix("Input ")
            return f"{path}={_shown(details['input'])}: {reason}"


def _path(location: Sequence[int | str], values: Mapping[str, object]) -> str:
    """The dotted key, without what pydantic adds: the names of a union's members."""
    names: list[str] = []
    inner: object = values
    for depth, part in enumerate(location):
        is_last = depth == len(location) - 1
        if isinstance(inner, Mapping) and (part in inner or is_last):
            inner = inner.get(str(part))
        elif isinstance(inner, list) and isinstance(part, int):
            inner = inner[part] if part < len(inner) else None
        else:
            continue
        names.append(str(part))
    return ".".join(names)


def _suggestion(path: str, kind: type[Settings]) -> str:
    section, _, name = path.rpartition(".")
    known = list(_known_keys(kind))
    siblings = [key for key in known if key.rpartition(".")[0] == section]
    elsewhere = [key for key in known if key.rpartition(".")[2] == name]
    near = difflib.get_close_matches(path, siblings, n=1) or elsewhere[:1]
    near = near or difflib.get_close_matches(path, known, n=1)
    if near:
        return f"; did you mean {near[0]}?"
    names = ", ".join(key.rpartition(".")[2] for key in siblings)
    return f"; {section or 'the recipe'} has {names}" if names else ""


def _known_keys(kind: type[Settings], prefix: str = "") -> Iterator[str]:
    for name, definition in kind.model_fields.items():
        yield prefix + name
        for section in _sections(definition.annotation):
            yield from _known_keys(section, f"{prefix}{name}.")


def _sections(annotation: object) -> Iterator[type[Settings]]:
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        yield annotation
    for part in get_args(annotation):
        yield from _sections(part)


def _leaves(values: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _side(values: Mapping[str, object], key: str) -> str:
    return _shown(values[key]) if key in values else "absent"


def _shown(value: object) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
