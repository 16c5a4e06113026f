"""A seeded part of a labelled set: 1, 2, 5 or 10 % of its pictures, or k pictures of each class.

Pictures are ranked by the sha256 of seed and key, and the first of them are taken: 1 % lies inside
2 %, and k pictures of each class inside k + 1. A manifest holds the choice itself, so that it can
be published with a result and used again; with another set than its own it is refused.
"""

import hashlib
import json
import logging
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Self

from pydantic import Field, model_validator

from data.annotations import BoxAnnotation
from data.detection_set import DetectionSet
from data.index import index_digest
from data.picture_files import restricted
from data.reading import ReadingSettings
from data.set_annotations import set_annotations
from data.source_items import SourceError
from data.storage import StorageOptions, open_folder, put_bytes
from models.settings import Settings
from models.urls import public_url

logger = logging.getLogger(__name__)

_FORMAT = "querypatch subset"
_VERSION = 1


class SubsetSettings(Settings):
    """Which part of a labelled set is learned from; just one of share, per_class and manifest."""

    share: float | None = Field(default=None, gt=0, le=1)
    """Share of the pictures (0 to 1), e.g. 0.01 for 1 %; one picture at least."""
    per_class: int | None = Field(default=None, ge=1)
    """Pictures of each class, at least; a picture counts for all classes that it shows."""
    seed: int = Field(default=0, ge=0)
    """Of the choice."""
    manifest: str | None = None
    """Path or URL of a manifest that names the pictures."""

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        given = [
            key for key in ("share", "per_class", "manifest") if self.model_dump()[key] is not None
        ]
        if len(given) != 1:
            raise ValueError(
                f"{' and '.join(given) or 'none of share, per_class and manifest'} is given; a "
                "subset is chosen by just one of share, per_class and manifest"
            )
        return self


def subset_of(data: DetectionSet, ids: Sequence[int]) -> DetectionSet:
    """The set of the samples with these ids alone, in this order."""
    index, files = restricted(data.index, data.files, ids)
    logger.info(
        "%s: %d of %d pictures are learned from", data.url, len(ids), data.index.num_samples
    )
    return replace(data, index=index, files=files)


def subset_ids(
    data: DetectionSet, settings: SubsetSettings, reading: ReadingSettings | None = None
) -> tuple[int, ...]:
    """Ids of the chosen samples, rising.

    `per_class` reads the annotations, and with them all of a set of shards; `share` and a manifest
    read nothing. Raises SourceError where the manifest is of another set, or nothing is chosen;
    AnnotationError where a sample has no boxes to choose by.
    """
    if settings.manifest is not None:
        return read_manifest(settings.manifest, data)
    ranked = _ranked(data, settings.seed)
    if settings.share is not None:
        return tuple(sorted(ranked[: max(1, round(settings.share * len(ranked)))]))
    assert settings.per_class is not None
    return _of_each_class(data, ranked, settings.per_class, reading or ReadingSettings())


def write_manifest(
    url: str,
    data: DetectionSet,
    ids: Sequence[int],
    settings: SubsetSettings,
    storage_options: StorageOptions | None = None,
) -> None:
    """Put the choice of `ids` of the whole set into a JSON file, whole or not at all."""
    names = sample_names(data)
    manifest = {
        "format": _FORMAT,
        "version": _VERSION,
        "set": public_url(data.url),
        "digest": index_digest(data.index),
        "settings": settings.model_dump(),
        "ids": list(ids),
        "pictures": [names[id] for id in ids],
    }
    parent, _, name = url.rpartition("/")
    text = json.dumps(manifest, indent=1) + "\n"
    put_bytes(open_folder(parent or ".", storage_options), name, text.encode())


def read_manifest(
    url: str, data: DetectionSet, storage_options: StorageOptions | None = None
) -> tuple[int, ...]:
    """Ids of the pictures that a manifest names.

    Raises SourceError where it is not there, is no manifest, or was made of another set: other
    pictures, or the same with other annotations.
    """
    place = open_folder(url, storage_options)
    try:
        manifest = json.loads(place.filesystem.cat_file(place.path))
        if (manifest["format"], manifest["version"]) != (_FORMAT, _VERSION):
            raise ValueError(f"format {manifest['format']!r}, version {manifest['version']!r}")
        digest, ids = manifest["digest"], tuple(int(id) for id in manifest["ids"])
    except FileNotFoundError as error:
        raise SourceError(f"no manifest at {url}: check the path") from error
    except (KeyError, TypeError, ValueError) as error:
        raise SourceError(
            f"{url} is no manifest of a subset ({type(error).__name__}: {error})"
        ) from error
    if digest != index_digest(data.index):
        raise SourceError(
            f"{url} was made of {manifest.get('set')}, and {data.url} holds other pictures or "
            "annotations: use the set it was made of, or choose anew by share or per_class"
        )
    return ids


def sample_names(data: DetectionSet) -> tuple[str, ...]:
    """What tells each picture from the others: its key; of shards the shard and its place there."""
    if data.files is not None:
        return tuple(data.files.item(id).key for id in range(data.files.num_pictures))
    return tuple(
        f"{shard.name}/{number}"
        for shard in data.index.shards
        for number in range(shard.num_samples)
    )


def _ranked(data: DetectionSet, seed: int) -> list[int]:
    """All ids in an order that depends on seed and names alone."""
    names = sample_names(data)
    ranks = [hashlib.sha256(f"{seed} {name}".encode()).digest() for name in names]
    return sorted(range(len(names)), key=ranks.__getitem__)


def _of_each_class(
    data: DetectionSet, ranked: Sequence[int], per_class: int, reading: ReadingSettings
) -> tuple[int, ...]:
    place = {id: number for number, id in enumerate(ranked)}
    holders = defaultdict[str, list[int]](list)
    for id, annotation in set_annotations(data, reading):
        for name in _learnable(annotation):
            holders[name].append(id)
    chosen = set[int]()
    for name in data.classes.names:
        best = sorted(holders[name], key=place.__getitem__)[:per_class]
        if len(best) < per_class:
            logger.warning(
                "%s: class %s has %d pictures where per_class=%d; all of them are taken",
                data.url,
                name,
                len(best),
                per_class,
            )
        chosen.update(best)
    if not chosen:
        raise SourceError(f"{data.url} has no box of any class: nothing to choose per_class from")
    return tuple(sorted(chosen))


def _learnable(annotation: BoxAnnotation) -> set[str]:
    """Classes that the picture shows with a box of its own: no crowd, nothing difficult."""
    marks = zip(
        annotation.names, annotation.boxes_xyxy, annotation.crowd, annotation.difficult, strict=True
    )
    return {
        name
        for name, (x0, y0, x1, y1), crowd, difficult in marks
        if not crowd and not difficult and x1 > x0 and y1 > y0
    }
