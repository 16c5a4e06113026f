"""The class of a whole picture, as WebDataset shards keep it: a part `cls` or `json`.

`querypatch shards write` on a class tree (root/class/picture) writes both: the number of the class
as `cls`, its name as `class_name` of `json`. Shards of others have the one or the other.
"""

import json

from data.annotations import AnnotationError
from data.samples import Sample
from models.structures import Classes


def class_label(sample: Sample, classes: Classes) -> int:
    """The label of the sample's class among `classes`: by its name where it has one, else its id.

    AnnotationError, in one line that names the sample, where it has none or one of another set.
    """
    name = _class_name(sample)
    if name is not None:
        if name not in classes.names:
            raise AnnotationError(
                f"{sample.key} in {sample.shard} is of the class {name!r}, which is none of the "
                f"{len(classes.names)} that were learned; give data.classes, or shards of the same "
                "classes"
            )
        return classes.names.index(name)
    number = sample.parts.get("cls")
    if number is None:
        raise AnnotationError(
            f"{sample.key} in {sample.shard} has no class (no cls, no class_name in json); write "
            "the shards from a class tree: `querypatch shards write root ... --kind classes`"
        )
    text = number.decode("ascii", "replace").strip()
    if not text.isdecimal() or int(text) not in classes.ids:
        raise AnnotationError(
            f"{sample.key} in {sample.shard} has the class {text[:20]!r}, which is none of the ids "
            f"{classes.ids[0]} to {classes.ids[-1]}; give data.classes in the order of the numbers"
        )
    return classes.ids.index(int(text))


def _class_name(sample: Sample) -> str | None:
    text = sample.parts.get("json")
    if text is None:
        return None
    try:
        found = json.loads(text)
    except ValueError as error:
        raise AnnotationError(
            f"{sample.key} in {sample.shard} has a json that is none: {error}"
        ) from error
    name = found.get("class_name") if isinstance(found, dict) else None
    return name if isinstance(name, str) else None
