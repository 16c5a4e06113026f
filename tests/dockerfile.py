"""docker/Dockerfile as a test reads and runs it, without docker."""

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from cluster.render.pods import USER

DOCKER = Path(__file__).parents[1] / "docker"


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


def copies() -> list[tuple[list[str], str]]:
    """(sources in the checkout, target) of what the builder and the stages below it copy."""
    found = [i.rest.split() for i in instructions() if i.word == "COPY" and "--from" not in i.rest]
    return [(words[:-1], words[-1]) for words in found]


def without_downloads(step: str) -> str:
    """What is left of a step where the dependencies and the wheel are there already."""
    parts = [part.strip() for part in step.split("&&")]
    return " && ".join(
        part for part in parts if "--requirement" not in part and not part.startswith("pip wheel")
    )


def run_step(step: str, build: Path, scripts: Path) -> None:
    """Runs a step in the folder `build`, with `scripts` before all else on the PATH."""
    variables = {
        **os.environ,
        "PATH": f"{scripts}:{os.environ['PATH']}",
        "QUERYPATCH_CUDA_ARCHS": "off",
        "PIP_NO_INDEX": "1",
    }
    shell = ["bash", "-o", "pipefail", "-c", step]
    done = subprocess.run(
        shell, cwd=build, env=variables, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{step}\n{done.stdout}\n{done.stderr}"


def home_of_user(folder: Path) -> Path:
    """A home for `said_to_user` in `folder`."""
    home = folder / "home"
    home.mkdir()
    os.chown(home, USER if os.geteuid() == 0 else -1, -1)
    return home


def said_to_user(command: list[str], home: Path) -> str:
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
