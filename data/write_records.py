"""What an unfinished writing of shards leaves behind, so that it can be continued, and its report.

DST/writing/plan.json says what is being written; DST/writing/000012.json that group 12 is finished,
with the entries of its shards for the index. A record is believed only where its shards are there
with their sizes. At the end come DST/report.json, then DST/index.json, then the records go.
"""

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from data.index import INDEX_NAME, shard_entry, shard_of
from data.shard_group import Group
from data.source_items import ANNOTATED_KINDS, LeftOut, SourceKind
from data.storage import Folder, file_sizes, put_bytes

REPORT_NAME = "report.json"
WRITING = "writing"
_PLAN_NAME = "plan.json"


class ShardWriteError(ValueError):
    """Shards that cannot be written here, or a source with too many bad pictures."""


@dataclass(frozen=True)
class ShardReport:
    """What was written and what was left out: `report.json`."""

    plan: str
    """sha256 of the pictures' names and the settings: the same again has nothing to do."""
    complete: bool
    source: str
    kind: SourceKind
    num_samples: int
    num_shards: int
    num_bytes: int
    classes: Mapping[int, str]
    """Name of each class by its number; empty where the source has none."""
    left_out: tuple[LeftOut, ...]
    """Files that are no pictures, or broken, in the order of their names."""


def finished_report(folder: Folder, plan: str) -> ShardReport | None:
    """The report of an earlier, finished writing of the same; None where there is still work.

    Raises ShardWriteError where the folder holds other shards.
    """
    files = file_sizes(folder)
    if INDEX_NAME not in files:
        return None
    report = _read_json(folder, REPORT_NAME)
    if report is None or report.get("plan") != plan or not report.get("complete"):
        raise ShardWriteError(
            f"{folder.url} already holds shards of another source or of other settings: choose an "
            "empty folder"
        )
    return ShardReport(
        **{
            **report,
            "classes": {int(number): name for number, name in report["classes"].items()},
            "left_out": tuple(LeftOut(**bad) for bad in report["left_out"]),
        }
    )


def begin(folder: Folder, plan: str) -> None:
    """Note what is to be written; ShardWriteError where something else is there already."""
    noted = _read_json(folder.inside(WRITING), _PLAN_NAME)
    if noted is None and any(name.endswith(".tar") for name in file_sizes(folder)):
        raise ShardWriteError(
            f"{folder.url} already holds tars: choose an empty folder, or make them usable as they "
            f"are with `querypatch shards index {folder.url}`"
        )
    if noted is not None and noted != {"plan": plan}:
        raise ShardWriteError(
            f"{folder.url} holds an unfinished writing of another source or of other settings: "
            f"repeat that command, or remove {folder.url}, or choose an empty folder"
        )
    put_bytes(folder.inside(WRITING), _PLAN_NAME, json.dumps({"plan": plan}).encode())


def record_group(folder: Folder, number: int, group: Group) -> None:
    """Note that a group is finished; its shards must be in the folder already."""
    record = {
        "shards": [shard_entry(shard) for shard in group.shards],
        "left_out": [asdict(bad) for bad in group.left_out],
    }
    put_bytes(folder.inside(WRITING), _name(number), json.dumps(record).encode())


def read_groups(folder: Folder, count: int) -> dict[int, Group]:
    """The finished groups among `count`, by number; one whose shards are not whole is none."""
    sizes = file_sizes(folder)
    there = file_sizes(folder.inside(WRITING))
    numbers = [number for number in range(count) if _name(number) in there]
    with ThreadPoolExecutor(16) as pool:
        groups = pool.map(lambda number: _group(folder, number), numbers)
    return {
        number: group
        for number, group in zip(numbers, groups, strict=True)
        if group and all(sizes.get(shard.name) == shard.size for shard in group.shards)
    }


def write_report(folder: Folder, report: ShardReport) -> None:
    """Put `report.json` into the folder."""
    put_bytes(folder, REPORT_NAME, (json.dumps(asdict(report), indent=1) + "\n").encode())


def read_classes(folder: Folder, *, of_pictures: bool = False) -> dict[int, str]:
    """Name of each class of the annotations in the shards; empty where their report names none.

    With `of_pictures` of those that whole pictures are of, in the shards of a class tree.
    """
    report = _read_json(folder, REPORT_NAME) or {}
    if report.get("kind") not in (("classes",) if of_pictures else ANNOTATED_KINDS):
        return {}
    return {int(number): name for number, name in report["classes"].items()}


def announced_samples(folder: Folder) -> int | None:
    """Samples that the writing of the shards reported; None where others wrote them."""
    count = (_read_json(folder, REPORT_NAME) or {}).get("num_samples")
    return count if isinstance(count, int) else None


def remove_records(folder: Folder) -> None:
    """Take the records away: the index stands for them now."""
    if file_sizes(folder.inside(WRITING)):
        folder.filesystem.rm(folder.at(WRITING), recursive=True)


def _name(number: int) -> str:
    return f"{number:06d}.json"


def _group(folder: Folder, number: int) -> Group | None:
    record = _read_json(folder.inside(WRITING), _name(number))
    if record is None:
        return None
    shards = tuple(shard_of(entry) for entry in record["shards"])
    return Group(shards, tuple(LeftOut(**bad) for bad in record["left_out"]))


def _read_json(folder: Folder, name: str) -> dict[str, Any] | None:
    """None where the file is not there, or was cut off in the middle of writing."""
    try:
        data = json.loads(folder.filesystem.cat_file(folder.at(name)))
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return data if isinstance(data, dict) else None
