"""The order of an epoch: a pure function of (index, seed, epoch, global batch), of nothing else.

Which pictures form global batch k does not depend on ranks, loader processes, timing or restarts:

1. Every shard is cut into runs of up to `run_length` samples that lie one after the other in it.
2. The runs are permuted, keyed by (seed, epoch). One after the other they are positions 0..N-1.
3. The positions are dealt to C = `global_batch` streams: stream c has positions [c*L, (c+1)*L).
   Batch k holds one sample of every stream. Ranks and loader processes share out whole streams.
4. A stream is re-ordered in blocks of about `block` samples: by aspect (width / height), so that
   the i-th of every stream have like aspects and a batch needs little padding. One permutation per
   block, the same in all streams, then shuffles the batches.

Reads are therefore sequential (a run is one ranged read of some 2 MB), memory is bounded (the own
streams' blocks), and seeking to batch k needs nothing but the reads of its own block.

Random numbers are raw 64-bit words of Philox keyed by (seed, epoch, purpose, place), ordered by a
stable sort: numpy fixes the words of a bit generator for good (NEP 19), but not what the methods
of its Generator make of them, so `permutation` could change an order with a numpy release.

Measured (benchmarks/shuffle.py): on 1.28 M samples at batch 256 a plan takes 30 to 160 ms, a block
of 128 batches 5 ms; neighbours in the stream have storage places correlated by 0.004 at most; in
a store sorted by class (the worst; `querypatch shards write` mixes) 16 batches show 847 classes, a
perfect shuffle 970. On ImageNet's picture sizes 6.7 % of a batch of 32 is padding, 0.9 % at batch
2; in random order with a scale per picture, as in the reference, 41.9 % and 18.2 %.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Literal

import numpy as np
from jaxtyping import Int64, UInt64
from pydantic import Field

from data.index import ShardIndex
from models.settings import Settings

_ASPECT_STEPS = 32
"""Aspects are told apart by 1/32 octave (2.2 %, some 12 pixels of 600); below, chance decides."""

_ASPECT_OFFSET = 1 << 15
"""Makes every aspect code a positive 16-bit number; aspects reach from 2^-1000 to 2^1000."""


class OrderSettings(Settings):
    """How an epoch is shuffled and cut into batches."""

    run_length: int = Field(default=16, ge=1)
    """Samples that are read in one piece, at most; small sets use less, see `run_length_of`."""
    block: int = Field(default=128, ge=1)
    """Samples of one stream that are shuffled and grouped by aspect together, about."""
    pool: int = Field(default=2048, ge=1)
    """Samples of all streams that are shuffled together, about: small batches use longer blocks."""
    aspect_buckets: bool = True
    """Whether pictures of like aspect (width / height) are batched together."""
    last_batch: Literal["drop", "wrap"] = "drop"
    """What becomes of the samples that do not fill a batch at the end of an epoch.

    `drop` leaves them out, other ones in each epoch. `wrap` fills the batch with the epoch's first
    samples (those of the first runs), which are then seen twice in it.
    """
    scale_per: Literal["batch", "picture"] = "batch"
    """Whether pictures' short side is drawn once per global batch or for each picture.

    Per batch little is padding; a single picture's scale has the same distribution either way.
    """


@dataclass(frozen=True)
class EpochPlan:
    """The order of one epoch; `block_ids` and `batch_ids` read it."""

    seed: int
    epoch: int
    global_batch: int
    num_batches: int
    """Batches of the epoch, which is also the length of every stream."""
    num_blocks: int
    run_first_ids: Int64[np.ndarray, " runs"]
    """Id of each run's first sample, in the order of the epoch."""
    run_bounds: Int64[np.ndarray, " runs_and_end"]
    """Position at which each run begins, and last the number of samples."""
    aspect_codes: Int64[np.ndarray, " samples"] | None
    """Aspect of each sample in steps, by id; None where batches are not grouped by aspect."""


class _Purpose(IntEnum):
    """What random words are for; each purpose has words of its own."""

    RUNS = 0
    PLACES = 1
    BATCHES = 2


def plan_epoch(
    index: ShardIndex, seed: int, epoch: int, global_batch: int, settings: OrderSettings
) -> EpochPlan:
    """The order of epoch `epoch` (0 first).

    Raises ValueError where the index holds less than one batch or nothing at all.
    """
    num_batches = batches_per_epoch(index, global_batch, settings)
    length = run_length_of(index.num_samples, global_batch, settings)
    first_ids, lengths = _runs(index, length)
    order = _shuffled(len(first_ids), seed, epoch, _Purpose.RUNS, 0, 0)
    block = max(settings.block, settings.pool // global_batch)
    return EpochPlan(
        seed=seed,
        epoch=epoch,
        global_batch=global_batch,
        num_batches=num_batches,
        num_blocks=-(-num_batches // block),
        run_first_ids=first_ids[order],
        run_bounds=np.concatenate([[0], np.cumsum(lengths[order])]),
        aspect_codes=_aspect_codes(index) if settings.aspect_buckets else None,
    )


def batches_per_epoch(index: ShardIndex, global_batch: int, settings: OrderSettings) -> int:
    """Global batches of an epoch, the same number in all; raises ValueError where there is none."""
    if global_batch < 1:
        raise ValueError(f"global_batch={global_batch} is not a batch; use 1 or more")
    if index.num_samples < global_batch:
        raise ValueError(
            f"global_batch={global_batch} is more than the {index.num_samples} samples of "
            f"{index.url}; use a batch of at most that many, or more pictures"
        )
    if settings.last_batch == "wrap":
        return -(-index.num_samples // global_batch)
    return index.num_samples // global_batch


def run_length_of(num_samples: int, global_batch: int, settings: OrderSettings) -> int:
    """Samples per run: `settings.run_length`, or less so that every stream has some 16 runs.

    A set of a few hundred pictures so gets a full permutation; its reads are short either way.
    """
    return min(settings.run_length, max(1, num_samples // (16 * global_batch)))


def block_bounds(plan: EpochPlan, block: int) -> tuple[int, int]:
    """First batch of a block and the first after it; the blocks' lengths differ by one at most."""
    first = block * plan.num_batches // plan.num_blocks
    return first, (block + 1) * plan.num_batches // plan.num_blocks


def block_at(plan: EpochPlan, batch: int) -> int:
    """The block that holds global batch `batch` of the epoch."""
    if not 0 <= batch < plan.num_batches:
        raise ValueError(f"batch {batch} is not in an epoch of {plan.num_batches} batches")
    return ((batch + 1) * plan.num_blocks - 1) // plan.num_batches


def block_ids(
    plan: EpochPlan, block: int, streams: Sequence[int]
) -> Int64[np.ndarray, "streams batches"]:
    """Sample ids of a block: row s is stream `streams[s]`, column i the block's i-th batch."""
    first, end = block_bounds(plan, block)
    starts = np.asarray(streams, np.int64) * plan.num_batches
    ids = _ids_at(plan, starts[:, None] + np.arange(first, end)[None, :])
    words = np.stack([_words(plan, _Purpose.PLACES, s, block, end - first) for s in streams])
    if plan.aspect_codes is None:
        return np.take_along_axis(ids, np.argsort(words, axis=1, kind="stable"), axis=1)
    codes = plan.aspect_codes[ids].astype(np.uint64)
    by_aspect = np.argsort(codes << np.uint64(48) | words >> np.uint64(16), axis=1, kind="stable")
    batches = _shuffled(end - first, plan.seed, plan.epoch, _Purpose.BATCHES, 0, block)
    return np.take_along_axis(ids, by_aspect[:, batches], axis=1)


def batch_ids(plan: EpochPlan, batch: int) -> Int64[np.ndarray, " global_batch"]:
    """Sample ids of one global batch, stream 0 first."""
    block = block_at(plan, batch)
    ids = block_ids(plan, block, range(plan.global_batch))
    return ids[:, batch - block_bounds(plan, block)[0]]


def rank_streams(global_batch: int, rank: int, world: int) -> range:
    """The streams of one rank: every `world`-th, so that counts differ by one at most."""
    if not 0 <= rank < world:
        raise ValueError(f"rank={rank} is not one of {world} ranks")
    if world > global_batch:
        raise ValueError(
            f"global_batch={global_batch} leaves ranks idle among {world}; "
            "use fewer workers or a larger batch"
        )
    return range(rank, global_batch, world)


def _runs(
    index: ShardIndex, length: int
) -> tuple[Int64[np.ndarray, " runs"], Int64[np.ndarray, " runs"]]:
    """Id of the first sample and length of every run; a run never crosses into another shard."""
    firsts: list[np.ndarray] = []
    lengths: list[np.ndarray] = []
    first_id = 0
    for shard in index.shards:
        starts = np.arange(0, shard.num_samples, length, dtype=np.int64)
        firsts.append(first_id + starts)
        lengths.append(np.minimum(length, shard.num_samples - starts))
        first_id += shard.num_samples
    return np.concatenate(firsts), np.concatenate(lengths)


def _aspect_codes(index: ShardIndex) -> Int64[np.ndarray, " samples"]:
    """log2(width / height) in steps; a picture of unknown size counts as square."""
    widths = np.concatenate([shard.widths for shard in index.shards])
    heights = np.concatenate([shard.heights for shard in index.shards])
    known = (widths > 0) & (heights > 0)
    aspects = np.where(known, widths, 1) / np.where(known, heights, 1)
    steps: np.ndarray = np.rint(np.log2(aspects) * _ASPECT_STEPS).astype(np.int64)
    return steps + _ASPECT_OFFSET


def _ids_at(
    plan: EpochPlan, positions: Int64[np.ndarray, "streams batches"]
) -> Int64[np.ndarray, "streams batches"]:
    """The samples at positions of the epoch; past its end (`last_batch: wrap`) it begins again."""
    positions = positions % plan.run_bounds[-1]
    run = np.searchsorted(plan.run_bounds, positions, side="right") - 1
    ids: np.ndarray = plan.run_first_ids[run] + positions - plan.run_bounds[run]
    return ids


def _shuffled(
    count: int, seed: int, epoch: int, purpose: _Purpose, stream: int, block: int
) -> Int64[np.ndarray, " count"]:
    order: np.ndarray = np.argsort(
        _raw_words(seed, epoch, purpose, stream, block, count), kind="stable"
    )
    return order


def _words(
    plan: EpochPlan, purpose: _Purpose, stream: int, block: int, count: int
) -> UInt64[np.ndarray, " count"]:
    return _raw_words(plan.seed, plan.epoch, purpose, stream, block, count)


def _raw_words(
    seed: int, epoch: int, purpose: _Purpose, place: int, block: int, count: int
) -> UInt64[np.ndarray, " count"]:
    """Random words of their own for every place; 2^64 of them before two places would meet."""
    key = np.array([seed, epoch], np.uint64)
    counter = np.array([0, block, place, purpose], np.uint64)
    words: np.ndarray = np.random.Philox(key=key, counter=counter).random_raw(count)
    return words
