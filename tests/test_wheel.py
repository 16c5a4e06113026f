"""The wheel holds what the checkout holds, and works from an empty environment in another folder.

The wheel is built with the setuptools at hand, and the environment borrows the dependencies of
this one, so that the test needs no network.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

from tests.dockerfile import (
    copies,
    home_of_user,
    run_step,
    said_to_user,
    stages,
    without_downloads,
)

PROJECT = Path(__file__).parents[1]
SETUPTOOLS = tomllib.loads((PROJECT / "pyproject.toml").read_text())["tool"]["setuptools"]
RECIPES = sorted(
    f"{stage}/{path.stem}"
    for stage in ("pretrain", "finetune")
    for path in (PROJECT / stage / "recipes").glob("*.yaml")
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of a copy of the project, so that building leaves nothing in the checkout."""
    source = tmp_path_factory.mktemp("source")
    _copy_project(source)
    out = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out)]
    # Without --wheel or --sdist: the wheel is built from the sdist, which must hold all it needs.
    _run([*build, str(source)], cwd=source, QUERYPATCH_CUDA_ARCHS="off")
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scripts folder of an empty environment with the wheel in it."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=True)
    scripts = folder / "bin"
    install = [str(scripts / "python"), "-m", "pip", "install", "--no-deps", "--no-index"]
    _run([*install, str(wheel)], cwd=folder)
    _lend_dependencies(folder)
    return scripts


def test_every_package_of_the_checkout_is_named_for_the_wheel() -> None:
    """A new folder that pyproject.toml does not list would be missing from the wheel alone."""
    found = {
        init.parent.relative_to(PROJECT).as_posix().replace("/", ".")
        for floor in {package.partition(".")[0] for package in SETUPTOOLS["packages"]}
        for init in (PROJECT / floor).rglob("__init__.py")
    }
    assert found <= set(SETUPTOOLS["packages"])


def test_the_wheel_holds_every_module_marker_and_recipe_of_the_checkout(wheel: Path) -> None:
    expected = {f"{module}.py" for module in SETUPTOOLS["py-modules"]}
    for package in SETUPTOOLS["packages"]:
        folder = PROJECT / package.replace(".", "/")
        for pattern in ("*.py", "*.yaml", "py.typed"):
            expected |= {file.relative_to(PROJECT).as_posix() for file in folder.glob(pattern)}
    held = set(zipfile.ZipFile(wheel).namelist())
    assert expected <= held, f"not in the wheel: {sorted(expected - held)}"
    assert not {name for name in held if name.startswith(("tests/", "benchmarks/", "docs/"))}


def test_the_wheel_holds_the_operator_library_for_every_python_of_the_platform(
    wheel: Path,
) -> None:
    assert wheel.name.split("-", 2)[2].startswith("py3-none-")
    assert not wheel.name.endswith("-any.whl")
    held = zipfile.ZipFile(wheel).namelist()
    assert "querypatch_ops.so" in held
    assert not [name for name in held if "csrc" in name]


def test_the_installed_library_computes_beside_a_checkout_that_has_none(
    installed: Path, tmp_path: Path
) -> None:
    """As on a cluster: the checkout is the working directory, the image has the wheel."""
    _copy_project(tmp_path)
    look = (
        "import torch, models.ops.deformable as d; "
        "print(d.__file__); print(d.describe(torch.device('cpu')))"
    )
    module, described = _run([str(installed / "python"), "-c", look], cwd=tmp_path).splitlines()
    assert tmp_path in Path(module).parents
    assert described.startswith("compiled, ")
    assert str(installed.parent) in described


def test_without_a_compiler_the_package_installs_and_says_what_it_lacks(tmp_path: Path) -> None:
    """And the plain operator does the work: a wheel for any platform."""
    source, out = tmp_path / "source", tmp_path / "dist"
    source.mkdir()
    _copy_project(source)
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out)]
    nothing = tmp_path / "nothing"
    nothing.mkdir()
    said = _run([*build, str(source)], cwd=source, PATH=str(nothing), CXX="")
    assert "no C++ compiler ($CXX, g++, clang++): no operator library" in said
    (built,) = out.glob("*.whl")
    assert built.name.endswith("-py3-none-any.whl")


def test_the_installed_command_runs_in_another_folder(installed: Path, tmp_path: Path) -> None:
    shown = _run([str(installed / "querypatch"), "--help"], cwd=tmp_path)
    assert "pretrain" in shown


def test_the_installed_command_lists_and_shows_every_recipe(
    installed: Path, tmp_path: Path
) -> None:
    listed = _run([str(installed / "querypatch"), "recipe", "list"], cwd=tmp_path)
    assert RECIPES
    assert [name for name in RECIPES if name not in listed] == []
    shown = _run([str(installed / "querypatch"), "recipe", "show", RECIPES[0]], cwd=tmp_path)
    assert shown.strip()


def test_the_installed_packages_are_the_wheels_not_the_checkouts(
    installed: Path, tmp_path: Path
) -> None:
    look = "import models.settings; print(models.settings.__file__)"
    found = Path(_run([str(installed / "python"), "-c", look], cwd=tmp_path).strip())
    assert installed.parent in found.parents


def test_the_steps_of_the_image_s_builder_end_well(
    wheel: Path, installed: Path, tmp_path: Path
) -> None:
    """All but what a container alone can do (apt-get) and what is lent here (the dependencies)."""
    (tmp_path / "dist").mkdir()
    shutil.copy(wheel, tmp_path / "dist")
    for sources, target in copies():
        if target == "./":
            for source in sources:
                shutil.copy(PROJECT / source, tmp_path)
    ran = [step for step in stages()["builder"] if step.word == "RUN"]
    for step in ran:
        run_step(without_downloads(step.rest), tmp_path, installed)
    written = (tmp_path / "requirements.txt").read_text().splitlines()
    assert {line.partition(">")[0] for line in written} >= {"torch", "s3fs", "gcsfs"}
    assert "querypatch doctor" in ran[-1].rest, "the image is refused that lacks compiled kernels"


def test_another_user_runs_the_installation_and_cannot_change_it(
    installed: Path, tmp_path: Path
) -> None:
    look = (
        "import os, querypatch; from pathlib import Path; file = Path(querypatch.__file__); "
        "print(os.geteuid(), os.access(file, os.W_OK), file.parent)"
    )
    home = home_of_user(tmp_path)
    user, may_write, place = said_to_user([str(installed / "python"), "-c", look], home).split()
    assert int(user) != 0
    assert may_write == str(os.geteuid() != 0), "where the tests are not root's, it is theirs"
    assert installed.parent in Path(place).parents
    assert "nothing is broken" in said_to_user([str(installed / "querypatch"), "doctor"], home)


def _copy_project(target: Path) -> None:
    ignore = shutil.ignore_patterns("__pycache__")
    for folder in {package.partition(".")[0] for package in SETUPTOOLS["packages"]}:
        shutil.copytree(PROJECT / folder, target / folder, ignore=ignore)
    for module in SETUPTOOLS["py-modules"]:
        shutil.copy(PROJECT / f"{module}.py", target)
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(PROJECT / name, target)


def _lend_dependencies(environment: Path) -> None:
    """Put this environment's packages on the other's path, behind its own, without the checkout.

    A plain path in a .pth file appends to sys.path and does not run the .pth files found there;
    the editable install of the checkout is such a file.
    """
    (site_packages,) = environment.glob("lib/python*/site-packages")
    (site_packages / "lent.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")


def _run(command: list[str], cwd: Path, **environment: str) -> str:
    """What the command said, warnings included."""
    done = subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT if environment else subprocess.PIPE,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout
