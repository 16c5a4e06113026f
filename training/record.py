"""What a run's folder says of the run itself: `recipe.yaml` and `environment.json`.

The environment names versions, hardware and the commit of every start of the run; no host names,
no environment variables, no secrets.
"""

import json
import os
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from models.settings import Settings
from training.recipe import (
    RecipeError,
    load_recipe,
    parse_recipe,
    recipe_differences,
    recipe_yaml,
)
from training.run_folder import RunFolder
from training.world import World

RECIPE = "recipe.yaml"
ENVIRONMENT = "environment.json"
COMMIT = "QUERYPATCH_COMMIT"
"""Variable that tells code which was sent elsewhere without its repository where it is from."""

_PACKAGES = ("querypatch", "torch", "torchvision", "numpy", "ray", "webdataset", "fsspec")


@dataclass(frozen=True)
class Environment:
    """What one start of a run ran on."""

    start_step: int
    workers: int
    device: str
    cpus: int
    python: str
    system: str
    packages: dict[str, str]
    """Versions; what is not installed is left out."""
    commit: str | None
    """Of the checkout that the code is from, with + where files were changed; null without."""


def begin_record(folder: RunFolder, recipe: Settings, start_step: int, world: World) -> None:
    """Stores the resolved recipe and adds this start to the environment's list.

    Called on the first worker only, before anything else is written: what a killed start left
    half-prepared is cleared away.

    Raises:
        StoreError: the store refused it.
    """
    folder.clear_spool()
    folder.write(RECIPE, recipe_yaml(recipe).encode())
    starts = [*_earlier_starts(folder), asdict(current_environment(start_step, world))]
    folder.write(ENVIRONMENT, json.dumps({"starts": starts}, indent=1).encode())


def check_same_recipe(folder: RunFolder, recipe: Settings, may_differ: Sequence[str] = ()) -> None:
    """Holds a resumed run to the recipe stored with it.

    `may_differ` are keys, or sections ending in a dot, that change nothing of what is learned. A
    key that the run's version did not know yet counts at its default, which is what it did then.

    Raises:
        RecipeError: it differs; one line per key, with both values. Or the stored recipe is none of
            this version.
    """
    values = read_recipe_values(folder)
    if values is None:
        return
    stored = load_recipe(type(recipe), values).model_dump(mode="json")
    allowed = tuple(may_differ)
    differences = [
        line
        for line in recipe_differences(stored, recipe)
        if not _is_allowed(line.partition(":")[0], allowed)
    ]
    if differences:
        raise RecipeError(
            f"{folder.url} is a run of another recipe; resume it with its own, or take its weights "
            "into a new run with init=. These differ:\n  " + "\n  ".join(differences)
        )


def read_recipe_values(folder: RunFolder) -> dict[str, object] | None:
    """The plain values of the recipe stored with a run; None where the folder holds no run."""
    try:
        return parse_recipe(folder.read(RECIPE).decode())
    except FileNotFoundError:
        return None


def current_environment(start_step: int, world: World) -> Environment:
    """The machine and the versions that this process runs on."""
    is_gpu = world.device.type == "cuda"
    return Environment(
        start_step=start_step,
        workers=world.size,
        device=torch.cuda.get_device_name(world.device) if is_gpu else platform.machine(),
        cpus=os.cpu_count() or 1,
        python=platform.python_version(),
        system=f"{platform.system()} {platform.release()}",
        packages={name: found for name in _PACKAGES if (found := _version(name))},
        commit=code_commit(),
    )


def code_commit() -> str | None:
    """Of the checkout that this code runs from, or that it was sent from (`QUERYPATCH_COMMIT`)."""
    return os.environ.get(COMMIT) or _commit(Path(__file__).parent)


def _earlier_starts(folder: RunFolder) -> list[object]:
    try:
        content = json.loads(folder.read(ENVIRONMENT))
    except (FileNotFoundError, json.JSONDecodeError):
        return []
    starts = content.get("starts", []) if isinstance(content, dict) else []
    return list(starts)


def _is_allowed(key: str, allowed: tuple[str, ...]) -> bool:
    return any(key == name or (name.endswith(".") and key.startswith(name)) for name in allowed)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit(folder: Path) -> str | None:
    is_ours = _git(folder, "ls-files", "--error-unmatch", Path(__file__).name)
    head = _git(folder, "rev-parse", "HEAD")
    if not is_ours or not head:
        return None
    return head + ("+" if _git(folder, "status", "--porcelain", "--untracked-files=no") else "")


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
