"""Classes by name: which class of one data set is which of another.

COCO and VOC call six of their common classes differently. DETR's published class heads have a row
for each number up to COCO's last id, 90, ten of which no category has, and 0.
"""

from collections.abc import Sequence

from models.structures import Classes

ALIASES = (
    frozenset({"aeroplane", "airplane"}),
    frozenset({"motorbike", "motorcycle"}),
    frozenset({"sofa", "couch"}),
    frozenset({"tvmonitor", "tv"}),
    frozenset({"diningtable", "dining table"}),
    frozenset({"pottedplant", "potted plant"}),
)
"""Names of the same thing: VOC's, COCO's."""

_COCO = """
person bicycle car motorcycle airplane bus train truck boat traffic_light fire_hydrant -
stop_sign parking_meter bench bird cat dog horse sheep cow elephant bear zebra giraffe - backpack
umbrella - - handbag tie suitcase frisbee skis snowboard sports_ball kite baseball_bat
baseball_glove skateboard surfboard tennis_racket bottle - wine_glass cup fork knife spoon bowl
banana apple sandwich orange broccoli carrot hot_dog pizza donut cake chair couch potted_plant bed
- dining_table - - toilet - tv laptop mouse remote keyboard cell_phone microwave oven toaster sink
refrigerator - book clock vase scissors teddy_bear hair_drier toothbrush
"""
"""COCO's categories from id 1 on; a dash where there is none."""


def match_names(wanted: Classes, given: Classes) -> tuple[int | None, ...]:
    """For each wanted class the label of the given class of the same name, or None.

    Upper and lower case do not matter; a name that is not there itself is looked for by its alias.
    """
    names = [name.casefold() for name in given.names]
    return tuple(_label(name.casefold(), names) for name in wanted.names)


def coco_91() -> Classes:
    """The classes of DETR's published COCO heads: label n is COCO's id n, 0 to 90.

    Numbers without a category are named `N/A (n)`.
    """
    names = ["-", *_COCO.split()]
    return Classes(distinct_names([_spelt(name) for name in names]), tuple(range(len(names))))


def distinct_names(names: Sequence[str]) -> tuple[str, ...]:
    """The names, with its label behind each one that comes more than once: `N/A (12)`."""
    return tuple(
        f"{name} ({label})" if names.count(name) > 1 else name for label, name in enumerate(names)
    )


def _spelt(name: str) -> str:
    return "N/A" if name == "-" else name.replace("_", " ")


def _label(name: str, names: Sequence[str]) -> int | None:
    others = [other for pair in ALIASES if name in pair for other in sorted(pair - {name})]
    return next((names.index(one) for one in (name, *others) if one in names), None)
