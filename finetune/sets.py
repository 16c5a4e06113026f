"""The labelled pictures of a run: opened, held to each other, and cut down to a subset if asked."""

import logging

from data.subsets import choose_subset

from data.detection_set import DetectionSet, open_detection_set
from finetune.recipe import DetectionData

logger = logging.getLogger(__name__)


def open_train_set(data: DetectionData) -> DetectionSet:
    """What is learned from, the subset alone where one is asked for.

    Raises SourceError, ValueError: the set or the subset is not what it is said to be.
    """
    whole = open_detection_set(
        data.train, kind=data.kind, pictures=data.train_pictures, classes=data.classes
    )
    return whole if data.subset is None else choose_subset(whole, data.subset)


def open_validation_set(data: DetectionData) -> DetectionSet | None:
    """What is evaluated on; None where there is nothing."""
    if data.validation is None:
        return None
    return open_detection_set(
        data.validation, kind=data.kind, pictures=data.validation_pictures, classes=data.classes
    )
