"""The labelled pictures of a run: opened, and cut down to a subset if the recipe asks for one."""

from data.detection_set import DetectionSet, open_detection_set
from data.reading import ReadingSettings
from data.subsets import SubsetSettings, subset_ids, subset_of, write_manifest
from finetune.recipe import SAME, DetectionData, FinetuneRecipe
from finetune.task import TaskSets

SUBSET = "subset.json"
"""Manifest of the pictures that a run learns from, in its folder."""


def open_sets(recipe: FinetuneRecipe, manifest: str | None = None) -> TaskSets:
    """What is learned from, the subset alone where one is asked for, and what is evaluated on.

    Of a classifier pictures that have a class each.

    `manifest` is the URL at which the choice of a subset is left. Raises SourceError, ValueError: a
    set or the subset is not what it is said to be.
    """
    data = recipe.data
    if recipe.task == "classify":
        data = data.model_copy(update={"kind": "classes"})
    train = _whole_train_set(data)
    if data.subset is not None:
        train = _chosen(train, data.subset, data.stream.reading, manifest)
    return TaskSets(train, train if data.validation == SAME else _validation_set(data))


def _chosen(
    whole: DetectionSet, subset: SubsetSettings, reading: ReadingSettings, manifest: str | None
) -> DetectionSet:
    ids = subset_ids(whole, subset, reading)
    if manifest is not None:
        write_manifest(manifest, whole, ids, subset)
    return subset_of(whole, ids)


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
