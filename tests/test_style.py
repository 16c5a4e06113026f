"""House rules that a program can check, read from the syntax trees; each is shown a breach."""

import ast
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[1]
SETUPTOOLS = tomllib.loads((PROJECT / "pyproject.toml").read_text())["tool"]["setuptools"]
JUNK_DRAWERS = {"utils", "util", "common", "misc", "helpers", "helper"}
MAX_LINES = 400


@dataclass(frozen=True)
class Source:
    """One Python file of the project."""

    path: str
    """Relative to the project, with forward slashes."""
    text: str

    @property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @property
    def floor(self) -> str:
        """First folder of the path, or the file's own name."""
        return self.path.partition("/")[0]


Rule = Callable[[Source], list[str]]
Function = ast.FunctionDef | ast.AsyncFunctionDef


def no_junk_drawer(source: Source) -> list[str]:
    """Files and folders are named for what they hold."""
    words = set(Path(source.path).with_suffix("").parts) & JUNK_DRAWERS
    return [f"{source.path}: '{word}' says nothing; name it for what it holds" for word in words]


def no_catch_all(source: Source) -> list[str]:
    """An error that nobody foresaw is never swallowed."""
    return [
        f"{source.path}:{handler.lineno}: catches everything; name the exceptions it can answer"
        for handler in ast.walk(source.tree)
        if isinstance(handler, ast.ExceptHandler) and _catches_everything(handler)
    ]


def says_what_it_is(source: Source) -> list[str]:
    """A module opens with a docstring; an `__init__.py` is empty."""
    if Path(source.path).name == "__init__.py":
        return [f"{source.path}: must be empty"] if source.text.strip() else []
    if ast.get_docstring(source.tree) is None:
        return [f"{source.path}: opens without a docstring that says what it is"]
    return []


def not_too_long(source: Source) -> list[str]:
    """A file is read in one sitting."""
    lines = source.text.count("\n")
    if lines <= MAX_LINES:
        return []
    return [f"{source.path}: {lines} lines, more than {MAX_LINES}; part it by what it does"]


def no_print(source: Source) -> list[str]:
    """Below the front door one logs, so that a cluster's workers do not write over each other."""
    if source.floor in {"tests", "benchmarks", "querypatch.py"}:
        return []
    return [
        f"{source.path}:{call.lineno}: print(); use logging.getLogger(__name__)"
        for call in ast.walk(source.tree)
        if isinstance(call, ast.Call) and _is_named(call.func, "print")
    ]


def fully_annotated(source: Source) -> list[str]:
    """Every public function and method gives the types of its arguments and of what comes back."""
    return [
        f"{source.path}:{function.lineno}: {function.name}() lacks a type for {', '.join(missing)}"
        for function in _public_functions(source.tree)
        if (missing := _unannotated(function))
    ]


RULES: tuple[Rule, ...] = (
    no_junk_drawer,
    no_catch_all,
    says_what_it_is,
    not_too_long,
    no_print,
    fully_annotated,
)
BREACHES: tuple[tuple[Rule, str, str, str], ...] = (
    (no_junk_drawer, "data/utils.py", "", "'utils' says nothing"),
    (no_junk_drawer, "models/common/boxes.py", "", "'common' says nothing"),
    (no_catch_all, "data/x.py", "try: f()\nexcept: g()\n", "data/x.py:2: catches everything"),
    (no_catch_all, "data/x.py", "try: f()\nexcept Exception: g()\n", ":2: catches everything"),
    (no_catch_all, "data/x.py", "try: f()\nexcept (OSError, BaseException): g()\n", ":2: catches"),
    (says_what_it_is, "data/x.py", "import os\n", "without a docstring"),
    (says_what_it_is, "data/__init__.py", "import os\n", "must be empty"),
    (not_too_long, "data/x.py", "\n" * 401, "401 lines"),
    (no_print, "data/x.py", "print('x')\n", "data/x.py:1: print()"),
    (fully_annotated, "data/x.py", "def f(a, *, b: int) -> int: ...\n", "f() lacks a type for a"),
    (fully_annotated, "data/x.py", "class A:\n  def f(self): ...\n", "f() lacks a type for return"),
)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_every_file_keeps_the_rule(rule: Rule) -> None:
    breaches = [breach for source in _sources() for breach in rule(source)]
    assert not breaches, "\n" + "\n".join(breaches)


@pytest.mark.parametrize(("rule", "path", "text", "complaint"), BREACHES)
def test_the_rule_sees_a_breach(rule: Rule, path: str, text: str, complaint: str) -> None:
    assert complaint in "\n".join(rule(Source(path, text)))


def test_the_rules_read_the_whole_house() -> None:
    assert {source.floor for source in _sources()} >= {*_floors(), "querypatch.py", "tests"}


def _sources() -> Iterator[Source]:
    files = [PROJECT / f"{module}.py" for module in SETUPTOOLS["py-modules"]]
    for folder in (*_floors(), "benchmarks", "tests"):
        files += sorted((PROJECT / folder).rglob("*.py"))
    for file in files:
        yield Source(file.relative_to(PROJECT).as_posix(), file.read_text(encoding="utf-8"))


def _floors() -> list[str]:
    """Top-level folders of the shipped packages."""
    return sorted({package.partition(".")[0] for package in SETUPTOOLS["packages"]})


def _catches_everything(handler: ast.ExceptHandler) -> bool:
    if handler.type is None:
        return True
    caught = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    return any(_is_named(kind, "Exception") or _is_named(kind, "BaseException") for kind in caught)


def _is_named(node: ast.expr, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name


def _public_functions(tree: ast.Module) -> Iterator[Function]:
    """Functions of the module and methods of its classes, without the private ones."""
    bodies = [tree.body] + [node.body for node in tree.body if isinstance(node, ast.ClassDef)]
    for body in bodies:
        for node in body:
            if isinstance(node, Function) and not node.name.startswith("_"):
                yield node


def _unannotated(function: Function) -> list[str]:
    spec = function.args
    arguments = [*spec.posonlyargs, *spec.args, *spec.kwonlyargs]
    arguments += [argument for argument in (spec.vararg, spec.kwarg) if argument is not None]
    missing = [
        argument.arg
        for argument in arguments
        if argument.annotation is None and argument.arg not in {"self", "cls"}
    ]
    return missing + (["return"] if function.returns is None else [])
