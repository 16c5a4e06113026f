"""CPU milliseconds per picture of the stream, beside the public UP-DETR loader.

    python -m benchmarks.loader --pictures DIR --reference DIR_OF_A_CLONE

Both with --processes loader processes and --batch pictures a batch, until the batch lies in the
main process: the reference's as normalised floats, ours packed as bytes, once with the colour
changes made, once with them left to the training device, and once with the first normalised to
floats here as well (a training device does that otherwise). Each measurement is a fresh process,
which counts the CPU time of itself and its loader processes once it is warm. The ways take turns,
so that other load on the machine falls on all of them.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal, get_args

import torch
from torch.utils.data import DataLoader, RandomSampler

from data.batches import to_device
from data.index import read_index
from data.loader import StreamSettings, StreamSource
from data.patch_content import PatchContent
from data.shards import write_shards
from data.sources import list_source
from data.stream import ExactStream

Way = Literal["reference", "ours", "ours, colours left to the device", "ours, normalised here too"]

TARGETS: dict[Way, float] = {"ours": 4.0, "ours, colours left to the device": 5.5}
"""How many times cheaper than the reference each way has to be."""

NUM_PATCHES = 10


@dataclass(frozen=True)
class Conditions:
    """What is alike for all ways, as it travels to the measuring process."""

    shards: str
    pictures: str
    reference: str | None
    batch: int
    processes: int


def main() -> None:
    """Reads the arguments and prints the table, or measures once."""
    if sys.argv[1:2] == ["--measure"]:
        way, warm, measured, conditions = json.loads(sys.argv[2])
        print(cpu_seconds(way, warm, measured, Conditions(**conditions)))
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pictures", type=Path, required=True, help="folder of pictures")
    parser.add_argument("--reference", type=Path, help="clone of github.com/dddzg/up-detr")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=4, help="over the pictures, the long run")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as shards:
        report = write_shards(list_source(str(arguments.pictures.resolve())), shards)
        conditions = Conditions(
            shards=shards,
            pictures=str(arguments.pictures.resolve()),
            reference=str(arguments.reference.resolve()) if arguments.reference else None,
            batch=arguments.batch,
            processes=arguments.processes,
        )
        print(f"{report.num_samples} pictures, {conditions.processes} processes, "
              f"batches of {conditions.batch}, torch {torch.__version__}")  # fmt: skip
        per_epoch = report.num_samples // conditions.batch
        print_table(conditions, per_epoch, arguments.epochs, arguments.repeat)


def print_table(conditions: Conditions, per_epoch: int, epochs: int, repeat: int) -> None:
    """Measures every way in turn, `repeat` times, and prints medians and ratios."""
    ways = [way for way in get_args(Way) if way != "reference" or conditions.reference]
    costs: dict[Way, list[float]] = {way: [] for way in ways}
    for _ in range(repeat):
        for way in ways:
            costs[way].append(milliseconds_per_picture(way, per_epoch, epochs, conditions))
            print(f"{way}: {costs[way][-1]:.2f} ms", file=sys.stderr, flush=True)
    reference = statistics.median(costs.get("reference", [float("nan")]))
    for way in ways:
        median = statistics.median(costs[way])
        verdict = ""
        if way in TARGETS and conditions.reference:
            reached = "reached" if reference / median >= TARGETS[way] else "MISSED"
            verdict = f"  (at least {TARGETS[way]}: {reached})"
        print(
            f"{way:34s} {median:6.2f} ms CPU a picture ({min(costs[way]):.2f} to "
            f"{max(costs[way]):.2f}), 1/{reference / median:.1f} of the reference{verdict}"
        )


def milliseconds_per_picture(
    way: Way, per_epoch: int, epochs: int, conditions: Conditions
) -> float:
    """CPU time per picture of a fresh process, its loader processes included, once warm.

    The stream reads an epoch's bytes in blocks, so it runs whole epochs; the reference costs so
    much more that two thirds of one are enough.
    """
    warm, measured = per_epoch, per_epoch * epochs
    if way == "reference":
        warm, measured = max(2, per_epoch // 10), max(2, per_epoch * 2 // 3)
    job = json.dumps([way, warm, measured, vars(conditions)])
    command = [sys.executable, "-m", "benchmarks.loader", "--measure", job]
    answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return 1e3 * float(answer.split()[-1]) / (measured * conditions.batch)


def cpu_seconds(way: Way, warm: int, measured: int, conditions: Conditions) -> float:
    """CPU time of this process and those below it while `measured` batches come, after `warm`."""
    torch.set_num_threads(1)
    if way == "reference":
        # More than is measured, so that it is as busy at the end as at the beginning.
        source = _reference(warm + 2 * measured, conditions)
    else:
        source = _ours(way, conditions)
    with closing(source):
        for _ in islice(source, warm):
            pass
        before = _tree_seconds()
        loaded = sum(1 for _ in islice(source, measured))
        after = _tree_seconds()
    if loaded != measured:
        raise SystemExit(f"{way}: {loaded} of {measured} batches came")
    return after - before


def _tree_seconds() -> float:
    """CPU time so far of this process and all below it (Linux: /proc).

    A fork server's loader processes are nobody's waited-for children while they live, so
    `getrusage` would not see them.
    """
    parents, ticks = {}, {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended while being looked at
        pid = int(stat.parent.name)
        parents[pid], ticks[pid] = int(fields[1]), int(fields[11]) + int(fields[12])
    tree = {os.getpid()}
    while grown := {pid for pid, parent in parents.items() if parent in tree} - tree:
        tree |= grown
    return sum(ticks[pid] for pid in tree) / os.sysconf("SC_CLK_TCK")


def _ours(way: Way, conditions: Conditions) -> Iterator[object]:
    source = StreamSource(
        index=read_index(conditions.shards),
        seed=0,
        global_batch=conditions.batch,
        content=PatchContent(
            NUM_PATCHES,
            colour_on="device" if way == "ours, colours left to the device" else "cpu",
        ),
    )
    stream = ExactStream(source, StreamSettings(processes=conditions.processes))
    with closing(stream.from_step(0)) as batches:
        for packed in batches:
            if way == "ours, normalised here too":
                to_device(packed, torch.device("cpu"))
            yield packed


def _reference(batches: int, conditions: Conditions) -> Iterator[object]:
    """The public classes as they are, put together as by its main.py."""
    sys.path.insert(0, str(conditions.reference))
    from datasets.selfdet import SelfDet, get_query_transforms, make_self_det_transforms
    from util.misc import updetr_collate_fn

    pictures = SelfDet(
        conditions.pictures,
        make_self_det_transforms("train"),
        get_query_transforms("train"),
        num_patches=NUM_PATCHES,
    )
    sampler = RandomSampler(pictures, num_samples=batches * conditions.batch)
    yield from DataLoader(
        pictures,
        batch_size=conditions.batch,
        sampler=sampler,
        num_workers=conditions.processes,
        collate_fn=updetr_collate_fn,
    )


if __name__ == "__main__":
    main()
