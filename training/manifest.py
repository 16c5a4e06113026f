"""The manifest of a checkpoint: the file that is written last and makes the others count."""

import json
from typing import Literal

from pydantic import Field, ValidationError

from models.settings import Settings


class FileRecord(Settings):
    """What one file of a checkpoint must be."""

    size: int = Field(ge=0)
    """Bytes."""
    sha256: str
    """In hex."""


class Manifest(Settings):
    """A whole checkpoint, as it tells of itself."""

    format: Literal[1] = 1
    """Layout of the checkpoint's files; raised when an older program could not read them."""
    step: int = Field(ge=0)
    """Updates done."""
    files: dict[str, FileRecord]
    """Every other file of the checkpoint by its name."""
    metrics: dict[str, float] = Field(default_factory=dict)
    """Of the evaluation at this very step; empty where there was none."""
    recipe_digest: str = ""
    """`training.recipe.recipe_digest` of the run's recipe."""

    @property
    def name(self) -> str:
        """Folder of this checkpoint inside the run's `checkpoints`."""
        return checkpoint_name(self.step)


def checkpoint_name(step: int) -> str:
    """E.g. step_000123."""
    return f"step_{step:06d}"


def parse_manifest(data: bytes) -> Manifest:
    """The manifest in `data`.

    Raises:
        ValueError: it is cut, foreign, or of a newer format; one line.
    """
    try:
        return Manifest.model_validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise ValueError(f"{key or 'the file'}: {first['msg']}") from None


def is_cut(data: bytes) -> bool:
    """Whether it is no JSON at all: the beginning of a file, or nothing of it."""
    try:
        json.loads(data)
    except ValueError:
        return True
    return False
