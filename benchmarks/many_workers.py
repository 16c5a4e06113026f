"""An epoch of many workers, simulated: `python -m benchmarks.many_workers`.

Nothing is read and nothing is trained. An index of --samples made pictures (sizes and bytes drawn
like ImageNet's) is written, read back and planned; then each loader process of each worker goes
through a whole epoch by the code that a run uses (`data.blocks.stream_samples`) with a reader that
reads nothing; requests and bytes are those of its ranges. Prints what docs/scale.md is made of:
size and time of the index and of a plan, that every picture comes once, how even the workers'
pictures, bytes, requests and padded pixels are, and what a loader process holds in memory. All
processes take their turn in this one.
"""

import argparse
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice, pairwise
from pathlib import Path

import numpy as np

from benchmarks.shuffle import epoch_ids
from data.blocks import stream_samples
from data.index import Shard, ShardIndex, read_index, write_index
from data.order import EpochPlan, OrderSettings, block_ids, plan_epoch, rank_streams
from data.patches import PatchSettings
from data.pictures import resized_size
from data.ranges import SampleRange, sample_ranges
from data.reading import ReadCounters, ReadingSettings
from data.samples import Sample

MEAN_BYTES = 109_600
"""Of 1000 ImageNet pictures (measured)."""


@dataclass(frozen=True)
class Told:
    """What one loader process did in an epoch."""

    ids: np.ndarray
    """Sample ids by batch (row) and own stream (column)."""
    reads: int
    bytes_read: int
    most_held: int
    """Most bytes that are asked for and not yet handed out: a block and a quarter of the next."""


class SilentReader:
    """Hands out samples without parts, in no time."""

    def samples(self, wanted: SampleRange) -> tuple[Sample, ...]:
        """As many samples as are wanted."""
        ids = range(wanted.first_id, wanted.first_id + wanted.count)
        return tuple(Sample(id, "", wanted.shard.name, {}) for id in ids)

    def take_counters(self) -> ReadCounters:
        """Nothing was read."""
        return ReadCounters()


def main() -> None:
    """Reads the arguments and prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=1_281_167)
    parser.add_argument("--shard-samples", type=int, default=1000)
    parser.add_argument("--workers", type=int, default=64)
    parser.add_argument("--processes", type=int, default=2, help="loader processes of each worker")
    parser.add_argument("--global-batch", type=int, default=256)
    parser.add_argument("--epoch", type=int, default=0)
    arguments = parser.parse_args()
    index = print_index(made_index(arguments.samples, arguments.shard_samples))
    plan = print_plan(index, arguments.epoch, arguments.global_batch)
    workers = print_epoch(
        index, plan, arguments.workers, arguments.processes, arguments.global_batch
    )
    print_padding(index, workers)


def print_index(made: ShardIndex) -> ShardIndex:
    """Size and time of the index file; the index as it is read back."""
    with tempfile.TemporaryDirectory(prefix="querypatch-") as folder:
        write_index(replace(made, url=folder))
        size = (Path(folder) / "index.json").stat().st_size
        start = time.perf_counter()
        index = read_index(folder)
        seconds = time.perf_counter() - start
    held = sum(s.offsets.nbytes + s.widths.nbytes + s.heights.nbytes for s in index.shards)
    total = sum(shard.size for shard in index.shards)
    print(
        f"index: {index.num_samples} samples in {len(index.shards)} shards, {total / 1e9:.0f} GB; "
        f"index.json {size / 1e6:.1f} MB, read in {seconds:.2f} s, {held / 1e6:.1f} MB in memory"
    )
    return index


def print_plan(index: ShardIndex, epoch: int, global_batch: int) -> EpochPlan:
    """Time and size of an epoch's plan."""
    start = time.perf_counter()
    plan = plan_epoch(index, 0, epoch, global_batch, OrderSettings())
    seconds = time.perf_counter() - start
    held = plan.run_first_ids.nbytes + plan.run_bounds.nbytes
    held += 0 if plan.aspect_codes is None else plan.aspect_codes.nbytes
    print(
        f"plan of epoch {epoch}: {plan.num_batches} batches of {global_batch} in "
        f"{plan.num_blocks} blocks, {len(plan.run_first_ids)} runs; {1e3 * seconds:.0f} ms, "
        f"{held / 1e6:.1f} MB"
    )
    return plan


def print_epoch(
    index: ShardIndex, plan: EpochPlan, world: int, processes: int, global_batch: int
) -> list[np.ndarray]:
    """Sends every loader process through the epoch; each worker's ids by batch and stream."""
    start = time.perf_counter()
    told = [
        [one_process(index, plan, rank, world, number, processes) for number in range(processes)]
        for rank in range(world)
    ]
    seconds = time.perf_counter() - start
    workers = [np.concatenate([part.ids for part in parts], axis=1) for parts in told]
    counts = np.bincount(np.concatenate([ids.ravel() for ids in workers]),
                         minlength=index.num_samples)  # fmt: skip
    same = all(
        np.array_equal(np.sort(np.concatenate([ids[batch] for ids in workers])),
                       np.sort(row)) for batch, row in enumerate(epoch_ids(plan))
    )  # fmt: skip
    print(
        f"epoch of {world} workers x {processes} loader processes, batch {global_batch}, simulated "
        f"in {seconds:.0f} s: seen once {(counts == 1).sum()}, more than once "
        f"{(counts > 1).sum()}, left out {(counts == 0).sum()}; every global batch is the plan's: "
        f"{same}"
    )
    for name, numbers in {
        "pictures": [ids.size for ids in workers],
        "requests": [sum(part.reads for part in parts) for parts in told],
        "MB read": [sum(part.bytes_read for part in parts) / 1e6 for parts in told],
        "MB held by a loader process at most": [p.most_held / 1e6 for parts in told for p in parts],
    }.items():
        print(f"   {name}: {spread(numbers)}")
    reads = sum(part.reads for parts in told for part in parts)
    read = sum(part.bytes_read for parts in told for part in parts)
    print(
        f"   all together: {reads} requests, {counts.sum() / reads:.1f} pictures each, "
        f"{read / reads / 1e6:.2f} MB each; {read / 1e9:.1f} GB read, "
        f"{read / sum(s.size for s in index.shards):.3f} of the store"
    )
    return workers


def one_process(
    index: ShardIndex, plan: EpochPlan, rank: int, world: int, number: int, processes: int
) -> Told:
    """One loader process through the plan's epoch, as `data.loader.loader_parts` goes."""
    own = rank_streams(plan.global_batch, rank, world)[number::processes]
    steps = stream_samples(
        index, plan.seed, plan.global_batch, OrderSettings(), own,
        plan.epoch * plan.num_batches, SilentReader(), ReadingSettings(),
    )  # fmt: skip
    with closing(steps):
        ids = np.array([[s.id for s in samples] for samples in islice(steps, plan.num_batches)])
    ranges = [
        sample_ranges(index, block_ids(plan, block, own).ravel().tolist(),
                      ReadingSettings().max_range_mb) for block in range(plan.num_blocks)
    ]  # fmt: skip
    sizes = [sum(map(bytes_of, block)) for block in ranges]
    return Told(
        ids=ids,
        reads=sum(map(len, ranges)),
        bytes_read=sum(sizes),
        most_held=max(int(one + next_one / 4) for one, next_one in pairwise([*sizes, sizes[0]])),
    )


def bytes_of(wanted: SampleRange) -> int:
    """Bytes of a range."""
    offsets = wanted.shard.offsets
    return int(offsets[wanted.first + wanted.count] - offsets[wanted.first])


def print_padding(index: ShardIndex, workers: Sequence[np.ndarray]) -> None:
    """How much more a step's slowest worker has to do than the mean: its padded pixels."""
    settings = PatchSettings()
    sizes = np.stack([
        np.concatenate([shard.heights for shard in index.shards]),
        np.concatenate([shard.widths for shard in index.shards]),
    ], axis=1)  # fmt: skip
    generator = np.random.default_rng(0)
    worst = []
    for batch in range(0, len(workers[0]), 50):
        short = int(generator.choice(settings.short_sides))
        areas = []
        for ids in workers:
            resized = [resized_size(int(h), int(w), short, settings.max_size)
                       for h, w in sizes[ids[batch]]]  # fmt: skip
            areas.append(max(h for h, _ in resized) * max(w for _, w in resized) * len(resized))
        worst.append(max(areas) / np.mean(areas))
    print(
        f"padded pixels of a step's slowest worker over the mean worker: {np.mean(worst):.3f} on "
        f"average, {np.max(worst):.3f} at most (every 50th step)"
    )


def spread(numbers: Sequence[float]) -> str:
    """Least, mean and most, and the spread relative to the mean."""
    values = np.asarray(numbers, float)
    return (
        f"{values.min():.1f} to {values.max():.1f}, mean {values.mean():.1f}, standard deviation "
        f"{values.std() / values.mean():.2%}"
    )


def made_index(num_samples: int, shard_samples: int, seed: int = 0) -> ShardIndex:
    """An index without files: sizes and bytes spread like ImageNet's, drawn from the seed."""
    generator = np.random.default_rng(seed)
    # Most photographs are 500 wide and 4:3 or 3:2, a quarter stand upright, the rest is anything.
    aspects = np.exp(generator.normal(0.26, 0.12, num_samples))
    aspects = np.where(generator.random(num_samples) < 0.25, 1 / aspects, aspects)
    long_sides = np.where(
        generator.random(num_samples) < 0.75, 500, generator.integers(150, 1200, num_samples)
    )
    widths = np.where(aspects >= 1, long_sides, long_sides * aspects).astype(np.int32)
    heights = np.where(aspects >= 1, long_sides / aspects, long_sides).astype(np.int32)
    spread_ln = 0.6
    sizes = MEAN_BYTES * np.exp(generator.normal(-(spread_ln**2) / 2, spread_ln, num_samples))
    blocks = 1 + -(-sizes.astype(np.int64) // 512)
    shards = []
    for number, first in enumerate(range(0, num_samples, shard_samples)):
        part = slice(first, first + shard_samples)
        offsets = np.concatenate([[0], np.cumsum(blocks[part])]) * 512
        shards.append(Shard(
            f"{number:06}.tar", f"{number:064x}", offsets, widths[part], heights[part],
            int(offsets[-1]) + 1024,
        ))  # fmt: skip
    return ShardIndex("memory://none", tuple(shards))


if __name__ == "__main__":
    main()
