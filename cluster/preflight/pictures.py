"""Pictures and labels before a job: a sample is decoded, and the labels are held to rules."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from cluster.preflight.checks import Check, listed
from cluster.stages import Recipe
from data.annotations import AnnotationError
from data.class_labels import class_label
from data.detection_set import open_detection_set
from data.held_out import read_samples
from data.index import ShardIndex
from data.picture_files import PictureFiles
from data.picture_headers import parse_header
from data.pictures import BrokenPicture, decode_picture
from data.reading import ReadingSettings
from data.samples import Sample, picture_bytes, why_no_picture
from data.set_check import SetReport, check_detection_set, head_faults
from data.storage import StorageOptions
from finetune.recipe import FinetuneRecipe
from models.urls import public_url

SAMPLED = 64
"""Pictures of a set that are read and decoded."""


@dataclass(frozen=True)
class PictureSet:
    """Pictures that a run reads."""

    key: str
    """Of the recipe."""
    index: ShardIndex
    files: PictureFiles | None
    """Where the pictures lie in files of their own; None for shards."""
    storage_options: StorageOptions


def quick_reading(recipe: Recipe) -> ReadingSettings:
    """The run's way of reading with less patience and without its cache: somebody waits here."""
    quick = {"attempts": 2, "cache": None}
    return recipe.data.stream.reading.model_copy(update=quick)


def picture_checks(recipe: Recipe, pictures: PictureSet) -> Iterator[Check]:
    """Reads and decodes a sample, evenly spread over the set.

    Raises what reading raises: a shard that is not the one that was indexed, or no answer.
    """
    index, began = pictures.index, time.monotonic()
    count = min(SAMPLED, index.num_samples)
    ids = [index.num_samples * place // count for place in range(count)]
    problems, num_bytes = list[str](), 0
    reading = quick_reading(recipe)
    for sample in read_samples(index, ids, pictures.storage_options, reading, pictures.files):
        num_bytes += len(picture_bytes(sample) or b"")
        problem = _problem(sample)
        if problem is not None:
            problems.append(problem)
    seconds = time.monotonic() - began
    said = f"{count} of {index.num_samples} read and decoded in {seconds:.1f} s"
    facts = {"sampled": count, "broken": len(problems), "mean_bytes": num_bytes / max(count, 1)}
    yield _judged(recipe, f"{pictures.key}: pictures", said, problems, facts)


def label_checks(
    recipe: FinetuneRecipe, key: str, url: str, pictures: str | None
) -> Iterator[Check]:
    """Every fault of a labelled set's annotations; of shards those of a sample of 64.

    Raises SourceError or ShardIndexError where there is no such set at all.
    """
    data = recipe.data
    if recipe.task == "classify":
        yield _class_check(recipe, key, url)
        return
    report = check_detection_set(
        url, kind=data.kind, pictures=pictures, classes=data.classes, depth="annotations"
    )
    errors = list(report.errors)
    if recipe.model.num_classes is not None:
        errors += head_faults(public_url(url), report.classes, recipe.model.num_classes)
    counts = report.counts
    facts = {"boxes": counts.boxes, "classes": len(report.classes.names), "errors": len(errors)}
    name = f"{key}: labels"
    if errors:
        said = f"{len(errors)} errors; `querypatch data check {public_url(url)}` names them all"
        yield Check(name, "fault", f"{listed(errors, 1)}; {said}", facts)
        return
    looked = "" if counts.pictures == report.num_samples else f" ({counts.pictures} looked at)"
    said = f"{counts.boxes} boxes of {len(report.classes.names)} classes{looked}"
    warnings = _warnings(recipe, report)
    yield Check(name, "warning" if warnings else "well", "; ".join([said, *warnings]), facts)


def _class_check(recipe: FinetuneRecipe, key: str, url: str) -> Check:
    """Whether a sample of the pictures has classes that the set names."""
    found = open_detection_set(url, kind="classes", classes=recipe.data.classes)
    count = found.index.num_samples
    ids = [number * count // min(count, SAMPLED) for number in range(min(count, SAMPLED))]
    options = found.storage_options
    errors = []
    for sample in read_samples(found.index, ids, options, quick_reading(recipe), None):
        try:
            class_label(sample, found.classes)
        except AnnotationError as error:
            errors.append(str(error))
    facts = {"classes": len(found.classes.names), "looked_at": len(ids), "errors": len(errors)}
    name = f"{key}: labels"
    if errors:
        return Check(name, "fault", f"{len(errors)} of {len(ids)}: {listed(errors, 1)}", facts)
    said = f"{len(found.classes.names)} classes, one for each picture ({len(ids)} looked at)"
    return Check(name, "well", said, facts)


def _judged(
    recipe: Recipe, name: str, said: str, problems: Sequence[str], facts: dict[str, float]
) -> Check:
    """Broken pictures are left out by the stream, up to a share at which it gives up."""
    if not problems:
        return Check(name, "well", said, facts)
    limit = recipe.data.stream.max_broken_share
    said = f"{said}, {len(problems)} cannot be used: {listed(problems)}"
    if len(problems) > limit * facts["sampled"]:
        way_out = f"write the set again without them, or say data.stream.max_broken_share ({limit})"
        return Check(name, "fault", f"{said}; the stream would give up: {way_out}", facts)
    return Check(name, "warning", f"{said}; the stream leaves them out", facts)


def _problem(sample: Sample) -> str | None:
    """What is wrong with a picture; its size is the annotation's to hold, where it has one."""
    data = picture_bytes(sample)
    if data is None:
        return f"{sample.key} in {sample.shard}: {why_no_picture(sample)}"
    try:
        parse_header(data)
        decode_picture(data)
    except BrokenPicture as error:
        return f"{sample.key} in {sample.shard}: {error}"
    return None


def _warnings(recipe: FinetuneRecipe, report: SetReport) -> list[str]:
    counts, warnings = report.counts, list[str]()
    if report.warnings:
        warnings.append(f"{len(report.warnings)} warnings, e.g. {report.warnings[0]}")
    queries = recipe.model.total_queries
    if recipe.task == "detect" and counts.most_objects > queries:
        warnings.append(
            f"{counts.most_objects_in} holds {counts.most_objects} objects and the detector has "
            f"{queries} queries: what is more cannot be found; use model.num_queries="
            f"{counts.most_objects} or more"
        )
    if counts.pictures and counts.empty == counts.pictures:
        warnings.append("no picture that was looked at has a box: nothing can be learned from it")
    return warnings
