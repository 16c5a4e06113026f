"""The classes of DETR's published panoptic heads: label n is COCO's category id n.

Ids up to 90 are things, those from 92 to 200 stuff; a head has 250 rows and "no object".
"""

from models.interop.class_names import coco_91, distinct_names
from models.structures import Classes

PANOPTIC_LABELS = 250
"""Rows of the published heads, most of them of no category."""

_STUFF = """
- banner blanket - bridge - - - - cardboard - - - - - - counter - curtain - - door-stuff - - - - -
floor-wood flower - - fruit - - gravel - - house - light - - mirror-stuff - - - - net - - pillow -
- platform playingfield - railroad river road - roof - - sand sea shelf - - snow - stairs - - - -
tent - towel - - wall-brick - - - wall-stone wall-tile wall-wood water-other - window-blind
window-other - - tree-merged fence-merged ceiling-merged sky-other-merged cabinet-merged
table-merged floor-other-merged pavement-merged mountain-merged grass-merged dirt-merged
paper-merged food-other-merged building-other-merged rock-merged wall-other-merged rug-merged
"""
"""COCO's panoptic categories from id 91 on; a dash where there is none."""


def coco_panoptic_250() -> Classes:
    """The classes of the published heads; numbers without a category are named `N/A (n)`."""
    things = coco_91()
    stuff = [_spelt(name) for name in _STUFF.split()]
    absent = ["N/A"] * (PANOPTIC_LABELS - len(things.names) - len(stuff))
    names = [name.partition(" (")[0] if name.startswith("N/A") else name for name in things.names]
    return Classes(
        names=distinct_names([*names, *stuff, *absent]),
        ids=tuple(range(PANOPTIC_LABELS)),
        things=tuple(label < len(things.names) for label in range(PANOPTIC_LABELS)),
    )


def _spelt(name: str) -> str:
    return "N/A" if name == "-" else name.replace("_", " ")
