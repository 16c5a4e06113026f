"""The one-shot task: find everything of the class of one query crop (UP-DETR, 4.4; CoAE)."""

from typing import Self

from pydantic import Field, model_validator

from data.query_crops import CropSettings
from models.artefact import PictureInput
from models.settings import Settings

VOC_UNSEEN = ("aeroplane", "cat", "cow", "sheep")
"""CoAE's four unseen classes of VOC, its numbers 1, 8, 10 and 17; the other sixteen are seen."""


class OneShotSettings(Settings):
    """Which classes are kept for testing, and how references are chosen."""

    unseen: tuple[str, ...] = VOC_UNSEEN
    """Names of the classes that training never sees, neither as targets nor as query crops."""
    references: int = Field(default=5, ge=1)
    """Query crops that every class of every picture is tested with, one at a time."""
    crops: CropSettings = CropSettings()
    """Which objects may be query crops, and how they are shown."""

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        if len(set(self.unseen)) < len(self.unseen):
            raise ValueError(f"unseen={list(self.unseen)} names a class twice; name it once")
        return self


def shown_as_trained(settings: OneShotSettings, size: PictureInput) -> OneShotSettings:
    """The settings with query crops of the size that weights were made for, unless they say one."""
    crops = settings.crops
    if size.query_side is None or "side" in crops.model_fields_set:
        return settings
    return settings.model_copy(update={"crops": crops.model_copy(update={"side": size.query_side})})
