"""What `querypatch data` does, with a bar for the person who waits."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from cluster.commands.bars import open_bar, say
from data.annotation_faults import AnnotationFault
from data.detection_set import SetKind
from data.set_check import Depth, SetReport, check_detection_set, head_faults

_SHOWN = 10
"""Faults of one kind that are told; all are in the file that `--out` names."""


def check_data(
    url: str,
    kind: SetKind | None,
    pictures: str | None,
    console: Console,
    depth: Depth = "headers",
    num_classes: int | None = None,
    out: Path | None = None,
) -> bool:
    """Prints what the labelled set is and every kind of fault; true where none is an error.

    With `num_classes` a label that such a head would learn as background is a fault. `out` takes
    all faults, one a line. Errors of `check_detection_set` pass through.
    """
    with open_bar(console, "pictures") as advance:
        report = check_detection_set(
            url, kind=kind, pictures=pictures, depth=depth, progress=advance
        )
    if num_classes is not None:
        faults = head_faults(url, report.classes, num_classes)
        report = replace(report, faults=(*report.faults, *faults))
    for line in report_lines(report):
        say(console, line)
    if out is not None:
        out.write_text("".join(f"{fault.severity}: {fault}\n" for fault in report.faults))
        say(console, f"all {len(report.faults)} faults: {out}")
    return not report.errors


def report_lines(report: SetReport) -> Iterator[str]:
    """The report as lines: what was found, then the faults by kind, errors first."""
    counts, names = report.counts, report.classes.names
    looked = "" if counts.pictures == report.num_samples else f", {counts.pictures} of them counted"
    yield f"{report.url}: {report.num_samples} pictures{looked}, read as {report.kind}"
    yield (
        f"  {counts.boxes} boxes of {len(names)} classes: {counts.small} small, {counts.medium} "
        f"medium, {counts.large} large; {counts.crowds} crowds, {counts.difficult} difficult"
    )
    yield (
        f"  {counts.empty} pictures without boxes; at most {counts.most_objects} objects in one "
        f"({counts.most_objects_in})"
    )
    yield (
        f"  pictures are {counts.widths[0]} to {counts.widths[1]} wide and {counts.heights[0]} to "
        f"{counts.heights[1]} high"
    )
    yield f"  {_per_class(report)}"
    for severity, faults in (("error", report.errors), ("warning", report.warnings)):
        yield from _fault_lines(severity, faults)
    yield (
        f"{report.url}: {len(report.errors)} errors, {len(report.warnings)} warnings"
        if report.faults
        else f"{report.url}: no fault"
    )


def _per_class(report: SetReport) -> str:
    """Boxes of the classes that have the most and the fewest."""
    counted = Counter(
        dict(zip(report.classes.names, report.counts.boxes_per_class, strict=True))
    ).most_common()
    shown = [f"{name} {count}" for name, count in counted]
    if len(shown) > _SHOWN:
        shown = [*shown[: _SHOWN // 2], "...", *shown[-_SHOWN // 2 :]]
    return f"boxes per class: {', '.join(shown)}"


def _fault_lines(severity: str, faults: Sequence[AnnotationFault]) -> Iterator[str]:
    by_kind = defaultdict[str, list[AnnotationFault]](list)
    for fault in faults:
        by_kind[fault.kind].append(fault)
    for kind, found in by_kind.items():
        yield f"{severity}, {kind}: {len(found)}"
        yield from (f"  {fault}" for fault in found[:_SHOWN])
        if len(found) > _SHOWN:
            yield f"  ... and {len(found) - _SHOWN} more"
