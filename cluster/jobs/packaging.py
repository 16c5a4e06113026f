"""What goes to a cluster: the code of this checkout or installation, and nothing else.

A folder is made for it rather than a list of exceptions kept: what is not one of our files (data,
keys, notebooks, `.git`, the compiled library of this machine) cannot slip in. The image of a
cluster brings its own compiled library; see docs/cluster.md.
"""

import atexit
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from training.record import COMMIT, code_commit

FLOORS = ("models", "data", "training", "pretrain", "finetune", "cluster")
"""The packages of the house; a test holds them to pyproject.toml."""

MODULES = ("querypatch.py",)

SUFFIXES = (".py", ".yaml")
"""Of the files that are code or are read by it: modules, recipes, manifests."""

MARKER = "py.typed"

EXTRAS = "submitted"
"""Folder of what a job is given beside the code, e.g. its recipe."""


def shipped_code(extras: Mapping[str, bytes] | None = None) -> Path:
    """A fresh folder with exactly our code, gone when this process ends.

    `extras` are files by name, which go into its folder `submitted`. Equal code and extras give
    equal folders, which a cluster receives once.
    """
    folder = Path(tempfile.mkdtemp(prefix="querypatch-code-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    root = Path(__file__).parents[2]
    for file in code_files(root):
        target = folder / file
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(root / file, target)
    for name, content in (extras or {}).items():
        target = folder / EXTRAS / name
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(content)
    return folder


def shipped_environment() -> dict[str, str]:
    """Variables that go with the code: the commit that it is of, where there is one."""
    commit = code_commit()
    return {COMMIT: commit} if commit else {}


def code_files(root: Path) -> Iterator[Path]:
    """Our files under `root`, relative to it: what the wheel holds but for the compiled library."""
    yield from (Path(module) for module in MODULES)
    for floor in FLOORS:
        for folder in (root / floor, *_packages_in(root / floor)):
            for file in sorted(folder.iterdir()):
                if file.is_file() and (file.suffix in SUFFIXES or file.name == MARKER):
                    yield file.relative_to(root)


def _packages_in(floor: Path) -> list[Path]:
    return sorted(init.parent for init in floor.glob("*/**/__init__.py"))
