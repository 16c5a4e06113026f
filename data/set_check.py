"""Is a labelled set whole? Every fault by file and object, and what was found, before a job starts.

Annotations alone cost little more than opening the set: 21 s CPU at the size of COCO's train2017.
Headers hold the size of every picture against its annotation, many at a time: 0.15 ms CPU each
(both measured). Pixels are decoded only where that is asked for.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Literal

from data.annotation_faults import AnnotationFault, FaultKind, box_faults, no_permission
from data.annotations import BoxAnnotation, parse_annotation
from data.detection_set import (
    DetectionSet,
    SetKind,
    detect_set_kind,
    list_detection_set,
    open_detection_set,
)
from data.picture_files import FileItem
from data.picture_headers import PictureHeader, parse_header, read_header
from data.pictures import BrokenPicture, decode_picture
from data.ranges import SampleRange, sample_ranges
from data.reading import RangeReader, ReadingSettings
from data.samples import Sample, picture_bytes
from data.set_counts import SetCounts, SetTally
from data.storage import Folder, StorageOptions
from models.structures import Classes

Depth = Literal["annotations", "headers", "pixels"]

_THREADS = 32
_SAMPLED = 64
"""Samples of shards that are looked at where annotations alone are asked for."""


@dataclass(frozen=True)
class SetReport:
    """What a labelled set is, and what is wrong with it."""

    url: str
    kind: SetKind
    depth: Depth
    num_samples: int
    """Pictures of the set, without those of picture files whose annotation cannot be used."""
    classes: Classes
    counts: SetCounts
    """Of the pictures that were looked at and can be used."""
    faults: tuple[AnnotationFault, ...]

    @property
    def errors(self) -> tuple[AnnotationFault, ...]:
        """Faults that must be repaired."""
        return tuple(fault for fault in self.faults if fault.severity == "error")

    @property
    def warnings(self) -> tuple[AnnotationFault, ...]:
        """Faults that lose nothing that could be learned."""
        return tuple(fault for fault in self.faults if fault.severity == "warning")


def check_detection_set(
    url: str,
    *,
    kind: SetKind | None = None,
    pictures: str | None = None,
    classes: Sequence[str] | None = None,
    storage_options: StorageOptions | None = None,
    depth: Depth = "headers",
    progress: Callable[[int, int], None] | None = None,
) -> SetReport:
    """All faults of a labelled set; the arguments are those of `open_detection_set`.

    Of shards, `annotations` looks at a sample of 64, and the other depths read them whole; whether
    their files are those of the index is asked by `check_shards`. `progress` hears (pictures done,
    of how many). Raises SourceError or ShardIndexError where there is no such set at all.
    """
    options = dict(storage_options or {})
    chosen = kind or detect_set_kind(url, options)
    if chosen == "shards":
        data = open_detection_set(url, kind=chosen, classes=classes, storage_options=options)
        return _check_shards(data, depth, progress)
    if chosen == "classes":
        raise SourceError(
            f"{url}: kind=classes has no boxes to check; `querypatch shards check {url}` looks at "
            "the shards"
        )
    listing = list_detection_set(url, chosen, pictures, classes, options)
    usable = [item for item in listing.items if item.annotation]
    tally = SetTally(listing.classes)
    for item in usable:
        tally.add(item.name, parse_annotation(item.annotation))
    faults = list(listing.faults)
    if depth != "annotations":
        faults += _picture_faults(listing.folder, usable, depth, progress)
    counts, told = tally.counts(), tuple(faults)
    return SetReport(url, chosen, depth, len(usable), listing.classes, counts, told)


def head_faults(url: str, classes: Classes, num_classes: int) -> tuple[AnnotationFault, ...]:
    """Labels that a head of `num_classes` would take for "no object" (its last output), by name.

    The public code learns label == num_classes as background without a word.
    """
    problem = (
        f"a head of num_classes={num_classes} has no output for it, and would learn it as "
        f"background: leave num_classes out, or say {len(classes.names)}"
    )
    return tuple(
        AnnotationFault(
            "error", "label is background", url, f"class {name} (label {label})", problem
        )
        for label, name in enumerate(classes.names)
        if label >= num_classes
    )


def _picture_faults(
    folder: Folder,
    items: Sequence[FileItem],
    depth: Depth,
    progress: Callable[[int, int], None] | None,
) -> Iterator[AnnotationFault]:
    with ThreadPoolExecutor(_THREADS) as pool:
        found = pool.map(partial(_file_faults, folder, depth), items)
        for number, faults in enumerate(found, start=1):
            yield from faults
            if progress is not None:
                progress(number, len(items))


def _file_faults(folder: Folder, depth: Depth, item: FileItem) -> tuple[AnnotationFault, ...]:
    """Of the picture, and of the PNG of its segments where it has one."""
    names = [item.name] if item.segments is None else [item.name, item.segments]
    found = [_faults_of_file(folder, depth, name, item.width, item.height) for name in names]
    return tuple(fault for faults in found for fault in faults)


def _faults_of_file(
    folder: Folder, depth: Depth, name: str, width: int, height: int
) -> tuple[AnnotationFault, ...]:
    try:
        if depth == "headers":
            return _size_faults(name, read_header(folder, name), width, height)
        data = folder.filesystem.cat_file(folder.at(name))
        return _data_faults(name, data, depth, width, height)
    except FileNotFoundError:
        return (_error("missing picture", name, "no such file"),)
    except PermissionError as error:
        return (_error("missing picture", name, no_permission(error)),)
    except BrokenPicture as error:
        return (_error("unreadable picture", name, str(error)),)


def _data_faults(
    name: str, data: bytes, depth: Depth, width: int, height: int
) -> tuple[AnnotationFault, ...]:
    if depth == "pixels":
        decode_picture(data)
    return _size_faults(name, parse_header(data), width, height)


def _size_faults(
    name: str, header: PictureHeader, width: int, height: int
) -> tuple[AnnotationFault, ...]:
    """`width` and `height` are those of the annotation."""
    found = (header.width, header.height)
    if found == (height, width) != (width, height) and header.orientation > 4:
        problem = (
            "its boxes are of the picture as EXIF turns it, and it is read as it is stored: turn "
            "the file itself (exiftran -ai, jpegtran) so that it needs no tag"
        )
        return (_error("turned picture", name, problem),)
    if found != (width, height):
        problem = (
            f"the picture is {found[0]} x {found[1]} pixels, its annotation says {width} x "
            f"{height}: the boxes are of another picture or of another scale"
        )
        return (_error("other size", name, problem),)
    if header.orientation in (2, 3, 4):
        problem = "EXIF asks to flip it, and nothing does: its boxes are taken as of what is stored"
        return (AnnotationFault("warning", "turned picture", name, None, problem),)
    return ()


def _check_shards(
    data: DetectionSet, depth: Depth, progress: Callable[[int, int], None] | None
) -> SetReport:
    ids: Sequence[int] = range(data.index.num_samples)
    if depth == "annotations":
        ids = sorted({len(ids) * place // _SAMPLED for place in range(_SAMPLED)} if ids else ())
    reading = ReadingSettings()
    reader = RangeReader(data.index.url, data.storage_options, reading)
    ranges = sample_ranges(data.index, ids, reading.max_range_mb)
    tally, faults, done = SetTally(data.classes), list[AnnotationFault](), 0
    known = frozenset(data.classes.names)
    with ThreadPoolExecutor(_THREADS) as pool:
        for samples in pool.map(partial(_checked_range, reader, known, depth), ranges):
            for sample in samples:
                faults += sample.faults
                if sample.annotation is not None:
                    tally.add(sample.name, sample.annotation)
            done += len(samples)
            if progress is not None:
                progress(done, len(ids))
    return SetReport(
        data.url,
        "shards",
        depth,
        data.index.num_samples,
        data.classes,
        tally.counts(),
        tuple(faults),
    )


@dataclass(frozen=True)
class _CheckedSample:
    name: str
    annotation: BoxAnnotation | None
    faults: tuple[AnnotationFault, ...]


def _checked_range(
    reader: RangeReader, known: frozenset[str], depth: Depth, wanted: SampleRange
) -> list[_CheckedSample]:
    return [_checked_sample(sample, known, depth) for sample in reader.samples(wanted)]


def _checked_sample(sample: Sample, known: frozenset[str], depth: Depth) -> _CheckedSample:
    name, data = f"{sample.shard}/{sample.key}", picture_bytes(sample)
    text = sample.parts.get("json")
    if text is None:
        problem = "the sample has no json part with its boxes: write the shards from a labelled set"
        return _CheckedSample(name, None, (_error("missing annotation", name, problem),))
    try:
        annotation = parse_annotation(text)
    except ValueError as error:
        return _CheckedSample(name, None, (_error("unreadable annotation", name, str(error)),))
    faults = _box_faults(name, annotation, known)
    size = annotation.width, annotation.height
    try:
        if data is None:
            faults += (_error("missing picture", name, "the sample holds no picture"),)
        else:
            faults += _data_faults(name, data, depth, *size)
    except BrokenPicture as error:
        faults += (_error("unreadable picture", name, str(error)),)
    return _CheckedSample(name, annotation, faults)


def _box_faults(
    name: str, annotation: BoxAnnotation, known: frozenset[str]
) -> tuple[AnnotationFault, ...]:
    names = annotation.names
    unknown = tuple(
        AnnotationFault(
            "error", "unknown class", name, f"box {place + 1}", f"class {named!r}: {_KNOW}"
        )
        for place, named in enumerate(names)
        if named not in known
    )
    return unknown + box_faults(name, annotation, lambda place: f"box {place + 1} ({names[place]})")


_KNOW = "it is none of the classes of the set (report.json, or classes=)"


def _error(kind: FaultKind, file: str, problem: str) -> AnnotationFault:
    return AnnotationFault("error", kind, file, None, problem)
