"""The documents name only what exists: files, keys of recipes, commands, texts of errors."""

import ast
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import get_args, get_origin

import pytest
import typer
from typer.core import TyperGroup

import querypatch
from finetune.recipe import RECIPES, FinetuneRecipe
from models.settings import Settings
from pretrain.recipe import PretrainRecipe
from training.shipped_recipes import shipped_recipes

PROJECT = Path(__file__).parents[1]
DOCUMENTS = [PROJECT / "README.md", PROJECT / "CONTRIBUTING.md", *sorted(PROJECT.glob("docs/*.md"))]
PACKAGES = tomllib.loads((PROJECT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
STAGES = (PretrainRecipe, FinetuneRecipe)
SECTIONS = "|".join({name: None for stage in STAGES for name in stage.model_fields})
FILES = (".json", ".md", ".png", ".py", ".safetensors", ".yaml")
UNKNOWN = "\0"
"""Stands in an error text for what is filled in when it is raised."""


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_relative_link_leads_somewhere(document: Path) -> None:
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", document.read_text())
    assert [link for link in links if not (document.parent / link).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_link_into_a_document_meets_one_of_its_headings(document: Path) -> None:
    links = re.findall(r"\]\(([^)#:]*\.md)?#([^)]*)\)", document.read_text())
    lost = [
        (file, place)
        for file, place in links
        if place not in _headings(document.parent / file if file else document)
    ]
    assert lost == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_recipe_key_that_is_named_exists(document: Path) -> None:
    code = " ".join(re.findall(r"```.*?```|`[^`]+`", document.read_text(), re.DOTALL))
    keys = re.findall(rf"(?<![\w./])((?:{SECTIONS})(?:\.[a-z]\w*)+)(?![\w/])", code)
    keys = [key for key in keys if not key.endswith(FILES)]
    assert [key for key in keys if not any(_is_key(kind, key.split(".")) for kind in STAGES)] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_command_that_is_shown_exists_with_its_options(document: Path) -> None:
    lines = _command_lines(document.read_text())
    assert [line for line in lines if not _is_command(shlex.split(line)[1:])] == []


def test_the_table_of_finetuning_recipes_names_all_of_them() -> None:
    table = (PROJECT / "docs" / "finetuning.md").read_text().partition("## The task")[0]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    shipped = {name.removesuffix("_scratch") for name in shipped_recipes(RECIPES)}
    assert named == shipped


def test_every_error_text_in_the_troubleshooting_is_one_of_the_code() -> None:
    document = (PROJECT / "docs" / "troubleshooting.md").read_text()
    headings = re.findall(r"\*\*`([^`]+)`\*\*", document)
    texts = [*_texts(), (PROJECT / "Makefile").read_text()]
    fragments = [part for heading in headings for part in _fixed_parts(heading)]
    assert len(fragments) > 10
    assert [part for part in fragments if not any(part in text for text in texts)] == []


def _headings(document: Path) -> set[str]:
    """As links name them: small letters, hyphens for spaces, no other signs."""
    titles = re.findall(r"^#+ (.+)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def _command_lines(document: str) -> list[str]:
    """What begins with `querypatch` in blocks of code; brackets around what is optional are cut."""
    blocks = re.findall(
        r"^ *```\n(.*?)```", document.replace("\\\n", " "), re.DOTALL | re.MULTILINE
    )
    lines = [line.partition("  #")[0] for block in blocks for line in block.splitlines()]
    commands = [line.rpartition("| ")[2].strip() for line in lines if "querypatch " in line]
    return [
        re.sub(r"[\[\]]|\.\.\.", " ", line) for line in commands if line.startswith("querypatch ")
    ]


def _is_command(words: list[str]) -> bool:
    """Whether the words lead to a command of the front door that has all their options."""
    command = typer.main.get_command(querypatch.app)
    while isinstance(command, TyperGroup):
        if not words or words[0] not in command.commands:
            return False
        command, words = command.commands[words[0]], words[1:]
    known = {option for parameter in command.params for option in parameter.opts}
    return {word for word in words if word.startswith("-") and word != "-"} <= known


def _is_key(annotation: object, path: list[str]) -> bool:
    """Whether a dotted path leads to a field, through sections that may be optional."""
    if not path:
        return True
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        field = annotation.model_fields.get(path[0])
        return field is not None and _is_key(field.annotation, path[1:])
    if get_origin(annotation) is dict:
        # Its user names what is in it.
        return True
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
