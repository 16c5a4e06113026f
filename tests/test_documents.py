"""The documents name only what exists: files they link to, keys of the recipe, texts of errors."""

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest

from models.settings import Settings
from pretrain.recipe import PretrainRecipe

PROJECT = Path(__file__).parents[1]
DOCUMENTS = [PROJECT / "README.md", PROJECT / "CONTRIBUTING.md", *sorted(PROJECT.glob("docs/*.md"))]
PACKAGES = tomllib.loads((PROJECT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
SECTIONS = "|".join(PretrainRecipe.model_fields)
FILES = (".json", ".md", ".py", ".safetensors", ".yaml")
UNKNOWN = "\0"
"""Stands in an error text for what is filled in when it is raised."""


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_relative_link_leads_somewhere(document: Path) -> None:
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", document.read_text())
    assert [link for link in links if not (document.parent / link).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_recipe_key_that_is_named_exists(document: Path) -> None:
    code = " ".join(re.findall(r"```.*?```|`[^`]+`", document.read_text(), re.DOTALL))
    keys = re.findall(rf"(?<![\w./])((?:{SECTIONS})(?:\.[a-z]\w*)+)(?![\w/])", code)
    keys = [key for key in keys if not key.endswith(FILES)]
    assert [key for key in keys if not _is_key(PretrainRecipe, key.split("."))] == []


def test_every_error_text_in_the_troubleshooting_is_one_of_the_code() -> None:
    document = (PROJECT / "docs" / "troubleshooting.md").read_text()
    headings = re.findall(r"\*\*`([^`]+)`\*\*", document)
    texts = [*_texts(), (PROJECT / "Makefile").read_text()]
    fragments = [part for heading in headings for part in _fixed_parts(heading)]
    assert len(fragments) > 10
    assert [part for part in fragments if not any(part in text for text in texts)] == []


def _is_key(annotation: object, path: list[str]) -> bool:
    """Whether a dotted path leads to a field, through sections that may be optional."""
    if not path:
        return True
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        field = annotation.model_fields.get(path[0])
        return field is not None and _is_key(field.annotation, path[1:])
    return any(_is_key(part, path) for part in get_args(annotation))


def _fixed_parts(heading: str) -> list[str]:
    """The text of a heading between its placeholders (WORDS IN CAPITALS and ...)."""
    parts = re.split(r"\.\.\.|\b[A-Z]+\b", " ".join(heading.split()))
    return [part.strip() for part in parts if len(part.strip()) >= 8]


def _texts() -> Iterator[str]:
    """Every string of the shipped code, with module constants filled in."""
    files = [f for package in PACKAGES for f in (PROJECT / package.replace(".", "/")).glob("*.py")]
    trees = [ast.parse(file.read_text()) for file in files]
    constants = {name: value for tree in trees for name, value in _module_constants(tree)}
    for tree in trees:
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value
            elif isinstance(node, ast.JoinedStr):
                yield "".join(_rendered(part, constants) for part in node.values)


def _module_constants(tree: ast.Module) -> Iterator[tuple[str, str]]:
    for node in tree.body:
        match node:
            case ast.Assign(targets=[ast.Name(id=name)], value=ast.Constant(value=str(value))):
                yield name, value


def _rendered(part: ast.expr, constants: dict[str, str]) -> str:
    match part:
        case ast.Constant(value=str(text)):
            return text
        case ast.FormattedValue(value=ast.Name(id=name)):
            return constants.get(name, UNKNOWN)
        case _:
            return UNKNOWN
