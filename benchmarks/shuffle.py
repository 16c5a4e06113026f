"""How well the stream shuffles, and how much of a batch is padding: `python -m benchmarks.shuffle`.

Prints, for a store of --samples samples in shards of --shard-samples and for several batch sizes:
the time of a plan and of a block, the correlation of storage places between neighbours in the
stream (chance is about 1/sqrt(samples)), how far apart neighbours in storage come, and, for the
worst store, sorted by class, how many classes a run of batches shows beside a perfect shuffle.
Then the share of padding for the picture sizes below --pictures, in the ways to form batches.
"""

import argparse
import time
from pathlib import Path

import numpy as np
from PIL import Image

from data.index import Shard, ShardIndex
from data.order import EpochPlan, OrderSettings, block_bounds, block_ids, plan_epoch
from data.patches import PatchSettings
from data.pictures import resized_size


def main() -> None:
    """Reads the arguments and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=1_281_167)
    parser.add_argument("--shard-samples", type=int, default=1000)
    parser.add_argument("--pictures", type=Path, help="folder of pictures, for the padding")
    arguments = parser.parse_args()
    sizes = np.tile([[375, 500]], (arguments.samples, 1))
    index = index_of(sizes, arguments.shard_samples)
    for global_batch in (256, 32, 2):
        print_shuffle(index, global_batch)
    if arguments.pictures:
        print_padding(arguments.pictures)


def print_shuffle(index: ShardIndex, global_batch: int) -> None:
    """The figures of one batch size."""
    settings = OrderSettings()
    start = time.perf_counter()
    plan = plan_epoch(index, 0, 0, global_batch, settings)
    planned = time.perf_counter()
    block_ids(plan, 1, range(global_batch))
    plan_ms, block_ms = 1e3 * (planned - start), 1e3 * (time.perf_counter() - planned)
    ids = epoch_ids(plan)
    stream = ids.ravel()
    neighbours = np.corrcoef(stream[:-1], stream[1:])[0, 1]
    followers = np.corrcoef(ids[:-1].ravel(), ids[1:].ravel())[0, 1]
    batch_of = np.empty(index.num_samples, np.int64)
    batch_of[stream] = np.repeat(np.arange(plan.num_batches), global_batch)
    apart = np.abs(np.diff(batch_of))
    print(
        f"batch {global_batch}: plan {plan_ms:.0f} ms, block {block_ms:.1f} ms; correlation of "
        f"storage places of neighbours {neighbours:+.4f}, of one stream's samples in consecutive "
        f"batches {followers:+.3f}; neighbours in storage: {np.median(apart):.0f} batches apart "
        f"(median), in one batch {(apart == 0).mean():.5%}"
    )
    per_class = 1300
    for batches in (1, 16, 128, 1024):
        window = ids[plan.num_batches // 2 :][:batches].ravel() // per_class
        perfect = expected_classes(index.num_samples // per_class, window.size)
        print(f"   sorted by class, {batches} batches: {len(np.unique(window))} classes, "
              f"perfect shuffle {perfect:.0f}")  # fmt: skip


def print_padding(folder: Path) -> None:
    """Share of padded pixels of the ways to form batches, on real picture sizes."""
    sizes = np.array([Image.open(path).size[::-1] for path in sorted(folder.iterdir())])
    generator = np.random.default_rng(0)
    many = sizes[generator.permutation(np.arange(40_000) % len(sizes))]
    index = index_of(many, 1000)
    for batch in (256, 32, 2):
        random = generator.permutation(len(many))[: len(many) // batch * batch].reshape(-1, batch)
        grouped = epoch_ids(plan_epoch(index, 0, 0, batch, OrderSettings()))
        plain = epoch_ids(plan_epoch(index, 0, 0, batch, OrderSettings(aspect_buckets=False)))
        rows = {
            "reference (random order, scale per picture)": (random, False),
            "stream, no buckets, scale per picture": (plain, False),
            "stream, buckets, scale per picture": (grouped, False),
            "stream, buckets, scale per batch (default)": (grouped, True),
        }
        for name, (ids, per_batch) in rows.items():
            share = padding_share(many, ids, per_batch, generator)
            print(f"batch {batch}: {name}: {share:.1%} padding")
    for batch, world in ((256, 8), (32, 8), (16, 8)):
        ids = epoch_ids(plan_epoch(index, 0, 0, batch, OrderSettings()))
        print_pad_to(many, ids, world, generator)


def print_pad_to(
    sizes: np.ndarray, ids: np.ndarray, world: int, generator: np.random.Generator
) -> None:
    """What `loop.pad_to=batch` costs; a step is as slow as the worker with the most pixels."""
    resized = resized_sizes(sizes, ids, True, generator)
    whole = resized.max(axis=1).prod(axis=1)
    parts = np.stack([resized[:, rank::world].max(axis=1).prod(axis=1) for rank in range(world)])
    true = resized.prod(axis=2).sum() / ids.shape[1]
    print(
        f"batch {ids.shape[1]} on {world} workers: padded to the part "
        f"{1 - true / parts.mean(axis=0).sum():.1%} padding, to the batch "
        f"{1 - true / whole.sum():.1%}; the slowest worker of each step gets "
        f"{whole.sum() / parts.max(axis=0).sum() - 1:.1%} more pixels"
    )


def padding_share(
    sizes: np.ndarray, ids: np.ndarray, per_batch: bool, generator: np.random.Generator
) -> float:
    """Share of the pixels of all batches (rows of `ids`) that is padding."""
    resized = resized_sizes(sizes, ids, per_batch, generator)
    padded = resized.max(axis=1).prod(axis=1).sum() * ids.shape[1]
    return float(1 - resized.prod(axis=2).sum() / padded)


def resized_sizes(
    sizes: np.ndarray, ids: np.ndarray, per_batch: bool, generator: np.random.Generator
) -> np.ndarray:
    """(height, width) of every picture of every batch as the model sees it, before padding."""
    settings = PatchSettings()
    draws = generator.choice(settings.short_sides, (len(ids), 1 if per_batch else ids.shape[1]))
    scales = np.broadcast_to(draws, ids.shape)
    return np.array([
        resized_size(int(sizes[id][0]), int(sizes[id][1]), int(scale), settings.max_size)
        for id, scale in zip(ids.ravel(), scales.ravel(), strict=True)
    ]).reshape(*ids.shape, 2)  # fmt: skip


def epoch_ids(plan: EpochPlan) -> np.ndarray:
    """Sample ids by batch (row) and stream (column)."""
    blocks = [block_ids(plan, b, range(plan.global_batch)).T for b in range(plan.num_blocks)]
    assert block_bounds(plan, plan.num_blocks - 1)[1] == plan.num_batches
    return np.concatenate(blocks)


def index_of(sizes: np.ndarray, shard_samples: int) -> ShardIndex:
    """An index of samples with these (height, width), without files."""
    shards = []
    for number, first in enumerate(range(0, len(sizes), shard_samples)):
        part = sizes[first : first + shard_samples].astype(np.int32)
        offsets = np.arange(len(part) + 1, dtype=np.int64) * 512
        name = f"{number:06}.tar"
        shards.append(Shard(name, "0" * 64, offsets, part[:, 1], part[:, 0], len(part) * 512))
    return ShardIndex("memory://none", tuple(shards))


def expected_classes(num_classes: int, draws: int) -> float:
    """How many of the classes show up in so many independent draws."""
    return num_classes * (1 - (1 - 1 / num_classes) ** draws)


if __name__ == "__main__":
    main()
