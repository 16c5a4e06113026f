"""What is sent to a cluster: our code, and nothing that lies beside it."""

import subprocess
import sys
import tomllib
from pathlib import Path

from cluster.jobs.packaging import FLOORS, MODULES, code_files, shipped_code

PROJECT = Path(__file__).parents[2]
SETUPTOOLS = tomllib.loads((PROJECT / "pyproject.toml").read_text())["tool"]["setuptools"]


def test_every_file_of_every_package_of_the_project_is_shipped() -> None:
    assert [f"{module}.py" for module in SETUPTOOLS["py-modules"]] == list(MODULES)
    assert {package.partition(".")[0] for package in SETUPTOOLS["packages"]} == set(FLOORS)
    expected = {Path(module) for module in MODULES}
    for package in SETUPTOOLS["packages"]:
        folder = PROJECT / package.replace(".", "/")
        for pattern in ("*.py", "*.yaml", "py.typed"):
            expected |= {file.relative_to(PROJECT) for file in folder.glob(pattern)}
    assert set(code_files(PROJECT)) == expected


def test_what_lies_beside_the_code_stays_at_home(tmp_path: Path) -> None:
    for floor in FLOORS:
        (tmp_path / floor).mkdir()
        (tmp_path / floor / "__init__.py").touch()
    (tmp_path / "querypatch.py").touch()
    planted = (
        *(".env", "querypatch_ops.so", "notes.yaml", "secret.py", ".git/config", "runs/a/x.py"),
        *("data/shard-0.tar", "data/key.pem", "data/pictures/a.py", "models/.env"),
        *("cluster/credentials", "cluster/__pycache__/jobs.py", "models/w.safetensors"),
    )
    for name in planted:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    shipped = {file.as_posix() for file in code_files(tmp_path)}
    assert shipped == {"querypatch.py", *(f"{floor}/__init__.py" for floor in FLOORS)}


def test_the_shipped_folder_works_alone_and_holds_the_extras() -> None:
    folder = shipped_code({"recipe.yaml": b"run: /r\n"})
    assert (folder / "submitted/recipe.yaml").read_bytes() == b"run: /r\n"
    assert not list(folder.rglob("*.so"))
    look = "import querypatch; print(querypatch.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", look], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == str(folder / "querypatch.py"), done.stderr


def test_equal_code_gives_equal_folders_and_packages_for_ray() -> None:
    first, second = shipped_code({"a": b"1"}), shipped_code({"a": b"1"})
    assert first != second
    assert _content(first) == _content(second)


def _content(folder: Path) -> dict[str, bytes]:
    files = (file for file in folder.rglob("*") if file.is_file())
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}
