"""What the recipe of every stage says: where the run lies, how it learns, and on what machines."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from models.ops.deformable import OpsSettings
from models.settings import Settings
from models.urls import holds_credentials, public_url
from training.ema import EmaSettings
from training.job import LoopSettings
from training.optimiser import OptimiserSettings
from training.resources import Resources
from training.retention import RetentionSettings
from training.schedule import ScheduleSettings
from training.storage_settings import StorageSettings

FREE_KEYS = (
    "run",
    "resources.",
    "storage.",
    "ops.",
    "data.stream.",
    "loop.log_every",
    "loop.checkpoint_every_steps",
    "loop.checkpoint_every_minutes",
    "loop.max_bad_steps",
    "loop.score_in_background",
    "checkpoints.",
)
"""Keys, and sections with a dot, that a resumed run may change: they change nothing it learns."""


class RunRecipe(Settings):
    """The part of a recipe that all stages share."""

    stage: str
    """The kind of run that this recipe is of."""
    run: str
    """Folder of the run: a path or any fsspec URL."""
    seed: int = Field(default=42, ge=0)
    """Decides weights, order, augmentation and dropout."""
    global_batch: int = Field(default=256, ge=1)
    """Pictures in one batch of all workers together."""
    init: str | None = None
    """Weights to start from instead of random ones: a file, an exported or a running run's folder;
    weights only, never the state of a run.
    """
    optimiser: OptimiserSettings = OptimiserSettings()
    """AdamW."""
    schedule: ScheduleSettings = ScheduleSettings()
    """The learning rate over the run."""
    loop: LoopSettings
    """Length, precision and rhythm of the run."""
    ema: EmaSettings | None = None
    """A moving average of the weights, evaluated in place of the live ones; null for none."""
    checkpoints: RetentionSettings = RetentionSettings()
    """Which checkpoints stay."""
    resources: Resources = Resources()
    """Workers and devices."""
    storage: StorageSettings = StorageSettings()
    """How object stores are reached."""
    ops: OpsSettings = OpsSettings()
    """How operators are computed."""

    @model_validator(mode="after")
    def _without_credentials(self) -> Self:
        for key, value in _texts(self.model_dump(mode="json"), ""):
            if holds_credentials(value):
                raise ValueError(
                    f"{key}={public_url(value)} was given with a password or a signature, and "
                    "recipes are stored and shown; leave it out and give it by the environment "
                    "(e.g. AWS_ACCESS_KEY_ID, FSSPEC_SFTP_PASSWORD) or by a profile"
                )
        return self

    @property
    def pictures_per_pass(self) -> int | None:
        """Pictures that a worker computes at once; None for its whole part of a batch."""
        resources = self.resources
        if resources.max_pictures_per_pass is None and resources.is_elastic:
            return -(-self.global_batch // resources.max_workers)
        return resources.max_pictures_per_pass

    def check_workers(self) -> None:
        """Raises ValueError where workers would be without a picture."""
        if self.resources.max_workers > self.global_batch:
            raise ValueError(
                f"resources.workers={self.resources.workers} are more than the pictures of a "
                f"batch, global_batch={self.global_batch}; use fewer workers"
            )


def _texts(values: object, place: str) -> Iterator[tuple[str, str]]:
    """(dotted key, value) of every text of a recipe."""
    match values:
        case str():
            yield place, values
        case Mapping():
            for key, value in values.items():
                yield from _texts(value, f"{place}.{key}" if place else key)
        case list():
            for value in values:
                yield from _texts(value, place)


def absolute(path: str | None) -> str | None:
    """A path for processes with other working directories; URLs stay as they are."""
    if path is None or "://" in path:
        return path
    return str(Path(path).expanduser().absolute())
