"""Which pictures of a VOCdevkit are meant: `VOCdevkit#07+12-trainval`, `VOCdevkit/VOC2012#val`.

A split is named by its list, ImageSets/Main/NAME.txt, with the years before it where the folder
holds several. The paper trains on 07+12-trainval and tests on 07-test (UP-DETR, section 4.1).
"""

import posixpath
import re
from collections.abc import Sequence
from dataclasses import dataclass

from data.source_items import SourceError
from data.storage import Folder
from data.trees import names_in

_SPLIT = re.compile(r"(?:(?P<years>\d\d(?:\+\d\d)*)-)?(?P<list>[A-Za-z]\w*)")


@dataclass(frozen=True)
class VocPart:
    """The pictures of one year."""

    year: str
    """Folder of the year with a slash at its end; "" where the root is a year itself."""
    stems: tuple[str, ...] | None
    """Names of the pictures without extension; None for all."""


def voc_parts(place: Folder, split: str | None) -> tuple[Folder, tuple[VocPart, ...]]:
    """The root and its years: of a VOCdevkit, of one year in it, or of a list in ImageSets/Main.

    Raises SourceError where that is no VOC root, or has no such split; then it names those it has.
    """
    if place.path.endswith(".txt"):
        if split is not None:
            raise SourceError(
                f"{place.url} is one split already; give the folder above with #{split}"
            )
        root = Folder(_above(place.url, 3), place.filesystem, _above(place.path, 3))
        return root, (VocPart("", _stems(place)),)
    years = _years(place)
    if split is None:
        return place, tuple(VocPart(year, None) for year in years)
    return place, _chosen(place, years, split)


def _years(place: Folder) -> tuple[str, ...]:
    if place.filesystem.exists(place.at("JPEGImages")):
        return ("",)
    paths = sorted(place.filesystem.ls(place.path, detail=False))
    names = [path.rstrip("/").rpartition("/")[2] for path in paths]
    years = tuple(
        f"{name}/" for name in names if place.filesystem.exists(place.at(f"{name}/JPEGImages"))
    )
    if not years:
        raise SourceError(f"{place.url} has no JPEGImages, nor has a folder in it: no VOC root")
    return years


def _chosen(place: Folder, years: Sequence[str], split: str) -> tuple[VocPart, ...]:
    lists = {year: _lists(place, year) for year in years}
    named = _SPLIT.fullmatch(split)
    wanted = _wanted_years(place, years, named["years"]) if named else []
    name = f"{named['list']}.txt" if named else ""
    if named and named["years"] is None:
        wanted = [year for year in years if name in lists[year]]
    missing = [year for year in wanted if name not in lists.get(year, ())]
    if missing or not wanted:
        raise SourceError(
            f"{place.url} has no split {split!r}{_where(missing)}; it has {_shown(place, lists)}"
        )
    return tuple(
        VocPart(year, _stems(place.inside(f"{year}ImageSets/Main/{name}"))) for year in wanted
    )


def _wanted_years(place: Folder, years: Sequence[str], told: str | None) -> list[str]:
    """Folders of the years that are told by two digits each; one year may be the root itself."""
    folders = [f"VOC20{digits}" for digits in told.split("+")] if told else []
    if list(years) == [""] and folders == [posixpath.basename(place.path)]:
        return [""]
    return [f"{folder}/" for folder in folders]


def _lists(place: Folder, year: str) -> list[str]:
    """Lists of the whole split; the lists of one class (cow_val.txt) are for classification."""
    return [name for name in names_in(place, f"{year}ImageSets/Main") if "_" not in name]


def _where(missing: Sequence[str]) -> str:
    years = ", ".join(year.rstrip("/") for year in missing if year)
    return f" in {years}" if years else ""


def _shown(place: Folder, lists: dict[str, list[str]]) -> str:
    told = [
        f"{_digits(year)}{posixpath.splitext(name)[0]}"
        for year, names in lists.items()
        for name in names
    ]
    return ", ".join(told) or f"no ImageSets/Main/*.txt in {place.url}"


def _digits(year: str) -> str:
    return f"{year.rstrip('/')[-2:]}-" if year else ""


def _stems(place: Folder) -> tuple[str, ...]:
    lines = place.filesystem.cat_file(place.path).decode().splitlines()
    words = [line.split() for line in lines if line.strip()]
    if any(len(line) != 1 for line in words):
        raise SourceError(
            f"{place.url} is the list of one class; use train.txt, val.txt or the like"
        )
    return tuple(dict.fromkeys(line[0] for line in words))


def _above(path: str, levels: int) -> str:
    for _ in range(levels):
        path = posixpath.dirname(path)
    return path
