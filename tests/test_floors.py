"""The floors: what may import what, held by import-linter (pyproject.toml) and shown to bite."""

import ast
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[1]
CONTRACTS = tomllib.loads((PROJECT / "pyproject.toml").read_text())["tool"]["importlinter"]
PLANTED = {
    "models/planted.py": "import data.index\n",
    "data/planted.py": "import ray\nimport training\nimport models.planted\n",
    "data/nouns.py": "import models.structures\nfrom models import settings\n",
    "training/planted.py": "import webdataset\nimport pycocotools.coco\n",
    "pretrain/planted.py": "import cluster\nimport querypatch\nimport finetune\n",
}
REFUSALS = (
    ("models.planted -> data.index", "an import of a higher floor"),
    ("data.planted -> ray", "ray outside cluster"),
    ("data.planted -> training", "an import of the sibling floor"),
    ("data.planted -> models.planted", "more of models than its nouns, in data"),
    ("training.planted -> webdataset", "webdataset outside data"),
    ("training.planted -> pycocotools", "pycocotools outside finetune"),
    ("pretrain.planted -> finetune", "an import of the sibling stage"),
    ("pretrain.planted -> cluster", "an import of the floor of Ray"),
    ("pretrain.planted -> querypatch", "an import of the front door"),
)


def test_no_file_imports_from_a_floor_above_its_own_or_beside_it() -> None:
    linted = _lint(PROJECT)
    assert linted.returncode == 0, linted.stdout


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What import-linter says about a house with every kind of forbidden import in it."""
    house = tmp_path_factory.mktemp("house")
    shutil.copy(PROJECT / "pyproject.toml", house)
    for package in CONTRACTS["root_packages"]:
        (house / package).mkdir()
        (house / package / "__init__.py").touch()
    for noun in ("settings", "structures", "boxes"):
        (house / "models" / f"{noun}.py").touch()
    (house / "data" / "index.py").touch()
    for path, text in PLANTED.items():
        (house / path).write_text(text)
    linted = _lint(house)
    assert linted.returncode == 1, linted.stderr
    return linted.stdout


@pytest.mark.parametrize(("chain", "violation"), REFUSALS, ids=[words for _, words in REFUSALS])
def test_import_linter_refuses(planted: str, chain: str, violation: str) -> None:
    assert chain in planted, f"{violation} went unseen:\n{planted}"


def test_data_may_import_the_nouns_of_models(planted: str) -> None:
    assert "data.nouns ->" not in planted


def test_every_package_of_the_house_is_under_the_contracts() -> None:
    packages = {init.parent.name for init in PROJECT.glob("*/__init__.py")}
    assert packages - {"tests", "benchmarks"} == set(CONTRACTS["root_packages"])


def test_the_front_door_leaves_ray_and_webdataset_to_their_floors() -> None:
    """import-linter takes no single module as a root, so its imports are read here."""
    tree = ast.parse((PROJECT / "querypatch.py").read_text())
    assert _imported(tree).isdisjoint({"ray", "webdataset", "pycocotools"})


def _lint(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def _imported(tree: ast.Module) -> set[str]:
    """First words of the modules that a file imports, anywhere in it."""
    names: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names.append(node.module or "")
    return {name.partition(".")[0] for name in names}
