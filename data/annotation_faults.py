"""What is wrong with the annotations of a labelled set: each fault by file and object.

An error would be learned from or lose an object without a word; a warning loses nothing that could
be learned: a box that reaches out of its picture is cut there, one without area is left out, as the
public code does (DETR, datasets/coco.py). COCO's own train2017 has boxes of both kinds.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from data.annotations import BoxAnnotation

Severity = Literal["error", "warning"]
FaultKind = Literal[
    "box outside",
    "box without area",
    "negative size",
    "not a number",
    "unknown class",
    "missing picture",
    "missing annotation",
    "unreadable annotation",
    "unreadable picture",
    "duplicate id",
    "no such image",
    "other size",
    "turned picture",
    "unused class",
    "label is background",
]


@dataclass(frozen=True, slots=True)
class AnnotationFault:
    """One thing that is wrong with a labelled set."""

    severity: Severity
    kind: FaultKind
    file: str
    """Picture or annotation file."""
    object: str | None
    """Which of its objects, e.g. `annotation 17 (dog)`; None where the whole file is meant."""
    problem: str
    """What is wrong and, where it is not plain, the way out."""

    def __str__(self) -> str:
        place = self.file if self.object is None else f"{self.file}, {self.object}"
        return f"{place}: {self.problem}"


@dataclass(frozen=True)
class CheckedAnnotation:
    """What the annotation file of a picture says, and whether that can be used."""

    annotation: BoxAnnotation | None
    """None where there is none, or it cannot be read."""
    faults: tuple[AnnotationFault, ...] = ()
    spoilt: str | None = None
    """Why the picture cannot be used: its first error."""


def checked(file: str, annotation: BoxAnnotation, told: Callable[[int], str]) -> CheckedAnnotation:
    """An annotation with the faults of its boxes; `file` is where it was read."""
    faults = box_faults(file, annotation, told)
    wrong = [str(fault) for fault in faults if fault.severity == "error"]
    return CheckedAnnotation(annotation, faults, wrong[0] if wrong else None)


def unusable(
    kind: FaultKind, file: str, problem: str, told: str | None = None
) -> CheckedAnnotation:
    """No annotation, for this reason."""
    fault = AnnotationFault("error", kind, file, told, problem)
    return CheckedAnnotation(None, (fault,), str(fault))


def no_permission(error: PermissionError) -> str:
    """Why a file cannot be had; S3 says the same of one that is not there."""
    told = " ".join(str(error).split())
    return f"no permission, or no such file where its folder may not be listed ({told})"


def box_faults(
    file: str, annotation: BoxAnnotation, told: Callable[[int], str]
) -> tuple[AnnotationFault, ...]:
    """The faults of a picture's boxes; `told` gives the name of a box by its place."""
    if _all_inside(annotation):
        return ()
    faults = list[AnnotationFault]()
    for number, box in enumerate(annotation.boxes_xyxy):
        found = _box_fault(box, annotation.width, annotation.height)
        if found is not None:
            severity, kind, problem = found
            faults.append(AnnotationFault(severity, kind, file, told(number), problem))
    return tuple(faults)


def first_error_by_file(faults: Iterable[AnnotationFault]) -> dict[str, str]:
    """The reason why a file cannot be used, for each that has an error."""
    reasons = dict[str, str]()
    for fault in faults:
        if fault.severity == "error":
            problem = fault.problem if fault.object is None else f"{fault.object}: {fault.problem}"
            reasons.setdefault(fault.file, problem)
    return reasons


def _all_inside(annotation: BoxAnnotation) -> bool:
    """True where no box has a fault; not-a-number fails every comparison."""
    width, height = annotation.width, annotation.height
    return all(
        0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height for x0, y0, x1, y1 in annotation.boxes_xyxy
    )


def _box_fault(
    box: tuple[float, float, float, float], width: int, height: int
) -> tuple[Severity, FaultKind, str] | None:
    x0, y0, x1, y1 = box
    told = f"box ({x0:g}, {y0:g}, {x1:g}, {y1:g})"
    size = f"the picture of {width} x {height} pixels"
    if not all(map(math.isfinite, box)):
        return "error", "not a number", f"{told} is not finite"
    if x1 < x0 or y1 < y0:
        return "error", "negative size", f"{told} ends before it begins: x0 <= x1 and y0 <= y1"
    if x1 < 0 or y1 < 0 or x0 > width or y0 > height:
        return "error", "box outside", f"{told} lies wholly outside {size}"
    beyond = max(-x0, -y0, x1 - width, y1 - height)
    if min(x1, width) <= max(x0, 0) or min(y1, height) <= max(y0, 0):
        return "warning", "box without area", f"{told} has no area in {size}: it is left out"
    if beyond > 0:
        return "warning", "box outside", f"{told} reaches {beyond:.3g} px out of {size}: cut there"
    return None
