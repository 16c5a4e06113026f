"""What a run that met faults must be equal to, and where it is not.

A run is held to a calm one with the same number of workers at every update: the same pictures in
every global batch, and weights, optimiser, moving average and record equal to the last bit. With
another number of workers sums are added in another order; then the weights are close.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from cluster.chaos.group import Ended, Note
from training.checkpoint import list_checkpoints, load_newest
from training.metrics import read_metrics
from training.record import ENVIRONMENT, RECIPE
from training.run_folder import RunFolder
from training.snapshot import CheckpointError, Snapshot

K = TypeVar("K")

Batch = tuple[tuple[str, ...], tuple[int, ...]]
"""Keys of the pictures of a global batch, and ids of those that could not be used; both sorted."""


@dataclass(frozen=True)
class Course:
    """What a run did, and what it left."""

    batches: Mapping[int, Batch]
    """By step."""
    workers: tuple[int, ...]
    """At every update."""
    snapshot: Snapshot
    """Of its last checkpoint."""
    record: tuple[tuple[object, ...], ...]
    """Kind, step and numbers of every line of its record."""


class Differs(ValueError):  # noqa: N818
    """A run that is not what it should be; the message says where."""


def course_of(folder: RunFolder, attempts: Sequence[Ended]) -> Course:
    """What a run did that is over.

    Raises Differs where its own attempts contradict each other, or it left no whole checkpoint.
    """
    batches, workers = _joined(attempts)
    try:
        snapshot = load_newest(folder)
    except CheckpointError as error:
        raise Differs(str(error)) from error
    if snapshot is None:
        raise Differs("the run is over and has no checkpoint")
    return Course(batches, workers, snapshot, tuple(_record(folder)))


def check_equal(found: Course, expected: Course, may_lack: bool) -> None:
    """Raises Differs where a run is not the calm one with the same workers, to the last bit.

    Its record `may_lack` lines where a store did not take it before the process that held it died.
    """
    check_same_batches(found, expected)
    _check("position", vars(found.snapshot.position), vars(expected.snapshot.position))
    _check("weights", _bits(found.snapshot.model), _bits(expected.snapshot.model))
    _check("optimiser", _bits(found.snapshot.optimiser), _bits(expected.snapshot.optimiser))
    _check("moving average", _bits(found.snapshot.ema or {}), _bits(expected.snapshot.ema or {}))
    _check_record(found.record, expected.record, may_lack)


def check_same_batches(found: Course, expected: Course) -> None:
    """Raises Differs where a global batch holds other pictures than that of the calm run."""
    _check("batches", found.batches, expected.batches)


def distance(found: Course, expected: Course, begin: Mapping[str, Tensor]) -> float:
    """How far two runs' weights ended from each other, as a share of the way they came."""
    way = apart = 0.0
    for name, there in expected.snapshot.model.items():
        if there.is_floating_point():
            way += float((there.double() - begin[name].double()).square().sum())
            apart += float((there.double() - found.snapshot.model[name].double()).square().sum())
    return math.sqrt(apart / way)


def check_tidy(folder: RunFolder, processes: Sequence[int]) -> None:
    """Raises Differs where a run that is over left half-made things or processes behind."""
    alive = [pid for pid in processes if Path(f"/proc/{pid}").exists()]
    if alive:
        raise Differs(f"processes still run: {alive}")
    left = [name for name in folder.names("") if name.startswith(".")]
    steps = folder.names("checkpoints")
    whole = {manifest.name for manifest in list_checkpoints(folder)}
    half = [name for name in steps if name.startswith("step_") and name not in whole]
    if left or half:
        raise Differs(f"left behind: {', '.join([*left, *half])}")
    for name in (RECIPE, ENVIRONMENT):
        if not folder.size(name):
            raise Differs(f"{name} is missing")


def _check_record(
    found: tuple[tuple[object, ...], ...], expected: tuple[tuple[object, ...], ...], may_lack: bool
) -> None:
    rest = iter(expected)
    strange = next((line for line in found if line not in rest), None)
    if strange is not None:
        raise Differs(f"record: {strange} is not a line of the run without faults, or comes twice")
    missing = [line for line in expected if line not in found]
    if missing and not may_lack:
        raise Differs(f"record: {len(missing)} lines are missing, first {missing[0]}")


def _lineage(attempts: Sequence[Ended]) -> list[tuple[Ended, int]]:
    """The attempts that the last one's weights come from, each with its first update; last first.

    Raises Differs where an attempt began with weights that no earlier one had saved.
    """
    number, line = len(attempts) - 1, list[tuple[Ended, int]]()
    while True:
        attempt = attempts[number]
        if attempt.begins is None:
            # It found the run at its end.
            number -= 1
            continue
        step, weights = attempt.begins
        line.append((attempt, step))
        if step == 0:
            return line
        earlier = [n for n in range(number) if (step, weights) in attempts[n].saves]
        if not earlier:
            raise Differs(f"start {number + 1} began at step {step} with weights of no checkpoint")
        number = earlier[-1]


def _joined(attempts: Sequence[Ended]) -> tuple[dict[int, Batch], tuple[int, ...]]:
    """The global batches, which must be the same whenever one comes again, and who made them."""
    seen: dict[int, Batch] = {}
    for number, attempt in enumerate(attempts, start=1):
        for step, parts in sorted(_by_step(attempt).items()):
            whole = _batch(parts)
            if len(parts) == attempt.workers and seen.setdefault(step, whole) != whole:
                raise Differs(f"start {number}, batch {step}: {whole} and not {seen[step]}")
    if sorted(seen) != list(range(len(seen))):
        raise Differs(f"batches without a gap are not {sorted(seen)}")
    workers: list[int] = [0] * len(seen)
    for attempt, first in reversed(_lineage(attempts)):
        workers[first:] = [attempt.workers] * (len(seen) - first)
    return seen, tuple(workers)


def _by_step(attempt: Ended) -> dict[int, list[Note]]:
    parts: dict[int, list[Note]] = {}
    for notes in attempt.notes:
        for note in notes:
            parts.setdefault(note.step, []).append(note)
    return parts


def _batch(parts: Sequence[Note]) -> Batch:
    keys = sorted(key for part in parts for key in part.keys)
    return tuple(keys), tuple(sorted(id for part in parts for id in part.skipped))


def _record(folder: RunFolder) -> Iterator[tuple[object, ...]]:
    for line in read_metrics(folder):
        names: tuple[str, ...]
        match line["kind"]:
            case "train":
                names = ("loss", "grad_norm", "pictures", "skipped", "bad_steps")
            case "bad_step":
                names = ("losses", "keys")
            case _:
                names = ()
        yield line["kind"], line["step"], *(str(line[name]) for name in names)


def _bits(value: object, prefix: str = "") -> dict[str, object]:
    """Every tensor and number in nested values, by its path; tensors as their bytes."""
    match value:
        case Tensor():
            return {prefix: value.contiguous().view(-1).view(torch.uint8).numpy().tobytes()}
        case Mapping():
            pairs = [(str(key), item) for key, item in value.items()]
        case list() | tuple():
            pairs = [(str(place), item) for place, item in enumerate(value)]
        case _:
            return {prefix: value}
    inner = [_bits(item, f"{prefix}/{key}") for key, item in pairs]
    return {path: bits for part in inner for path, bits in part.items()}


def _check(what: str, found: Mapping[K, object], expected: Mapping[K, object]) -> None:
    if found.keys() != expected.keys():
        only = sorted(map(str, found.keys() ^ expected.keys()))
        raise Differs(f"{what}: only one of them has {', '.join(only[:5])}")
    other = [key for key in found if found[key] != expected[key]]
    if other:
        raise Differs(f"{what}: {len(other)} of {len(found)} differ, first {other[0]}")
