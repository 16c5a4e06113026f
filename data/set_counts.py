"""What a labelled set holds, counted picture by picture."""

from collections import Counter
from dataclasses import dataclass

from data.annotations import BoxAnnotation
from models.structures import Classes

# COCO's bounds between small, medium and large objects, in square pixels.
_MEDIUM, _LARGE = 32.0**2, 96.0**2


@dataclass(frozen=True)
class SetCounts:
    """Pictures, objects, and the extremes among them."""

    pictures: int
    empty: int
    """Pictures without any box: learned from as background."""
    boxes: int
    """All of them, crowds and difficult ones included."""
    crowds: int
    """COCO's groups: not learned, and ignored in the evaluation."""
    difficult: int
    small: int
    """Boxes below 32 x 32 pixels, by their area (the mask's where it is given)."""
    medium: int
    large: int
    """Boxes of 96 x 96 pixels and more."""
    most_objects: int
    """Objects to be found in one picture, without crowds: a detector needs as many queries."""
    most_objects_in: str
    """That picture."""
    widths: tuple[int, int]
    """Least and greatest width of a picture in pixels, as annotated."""
    heights: tuple[int, int]
    boxes_per_class: tuple[int, ...]
    """By label, without crowds."""


class SetTally:
    """Counts annotations one by one."""

    def __init__(self, classes: Classes) -> None:
        self._classes = classes
        self._totals = Counter[str]()
        self._per_class = Counter[str]()
        self._most = (0, "")
        self._widths: tuple[int, int] | None = None
        self._heights: tuple[int, int] | None = None

    def add(self, name: str, annotation: BoxAnnotation) -> None:
        """One more picture, called `name` in messages."""
        boxes, crowds = len(annotation.names), sum(annotation.crowd)
        self._totals.update(pictures=1, boxes=boxes, crowds=crowds, empty=int(boxes == 0))
        self._totals.update(difficult=sum(annotation.difficult))
        self._totals.update(map(_size_of, _areas(annotation)))
        self._per_class.update(
            name
            for name, crowd in zip(annotation.names, annotation.crowd, strict=True)
            if not crowd
        )
        self._most = max(self._most, (boxes - crowds, name), key=lambda most: most[0])
        self._widths = _widened(self._widths, annotation.width)
        self._heights = _widened(self._heights, annotation.height)

    def counts(self) -> SetCounts:
        """What was counted so far."""
        totals = self._totals
        return SetCounts(
            pictures=totals["pictures"],
            empty=totals["empty"],
            boxes=totals["boxes"],
            crowds=totals["crowds"],
            difficult=totals["difficult"],
            small=totals["small"],
            medium=totals["medium"],
            large=totals["large"],
            most_objects=self._most[0],
            most_objects_in=self._most[1],
            widths=self._widths or (0, 0),
            heights=self._heights or (0, 0),
            boxes_per_class=tuple(self._per_class[name] for name in self._classes.names),
        )


def _areas(annotation: BoxAnnotation) -> tuple[float, ...]:
    if annotation.areas is not None:
        return annotation.areas
    return tuple((x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in annotation.boxes_xyxy)


def _size_of(area: float) -> str:
    if area < _MEDIUM:
        return "small"
    return "medium" if area < _LARGE else "large"


def _widened(bounds: tuple[int, int] | None, value: int) -> tuple[int, int]:
    return (value, value) if bounds is None else (min(bounds[0], value), max(bounds[1], value))
