"""The labelled pictures of a run: opened, and cut down to a subset if the recipe asks for one."""

from data.detection_set import DetectionSet, open_detection_set
from data.subsets import choose_subset, subset_ids, write_manifest
from finetune.recipe import SAME, DetectionData, FinetuneRecipe
from finetune.task import TaskSets

SUBSET = "subset.json"
"""Manifest of the pictures that a run learns from, in its folder."""


def open_sets(data: DetectionData) -> TaskSets:
    """What is learned from, the subset alone where one is asked for, and what is evaluated on.

    Raises SourceError, ValueError: a set or the subset is not what it is said to be.
    """
    train = _whole_train_set(data)
    if data.subset is not None:
        train = choose_subset(train, data.subset, data.stream.reading)
    return TaskSets(train, train if data.validation == SAME else _validation_set(data))


def store_subset(recipe: FinetuneRecipe) -> None:
    """Leaves in the run's folder which pictures it learns from, where they are a subset."""
    data = recipe.data
    if data.subset is None:
        return
    whole = _whole_train_set(data)
    ids = subset_ids(whole, data.subset, data.stream.reading)
    write_manifest(f"{recipe.run}/{SUBSET}", whole, ids, data.subset)


def _whole_train_set(data: DetectionData) -> DetectionSet:
    return open_detection_set(
        data.train, kind=data.kind, pictures=data.train_pictures, classes=data.classes
    )


def _validation_set(data: DetectionData) -> DetectionSet | None:
    if data.validation is None:
        return None
    return open_detection_set(
        data.validation, kind=data.kind, pictures=data.validation_pictures, classes=data.classes
    )
