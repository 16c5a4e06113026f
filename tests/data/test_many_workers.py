"""Sixty-four workers and 1.28 million pictures: each comes once, and the shares are even.

Made sizes, no reading: the order is a pure function, so a whole epoch of a cluster fits in here.
"""

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest

from benchmarks.many_workers import Told, made_index, one_process
from data.index import ShardIndex
from data.order import (
    EpochPlan,
    OrderSettings,
    batch_ids,
    block_at,
    block_bounds,
    block_ids,
    plan_epoch,
    rank_streams,
)
from data.ranges import sample_ranges

SAMPLES = 1_281_167
"""Pictures of ImageNet-1k."""


@pytest.fixture(scope="module")
def index() -> ShardIndex:
    return made_index(SAMPLES, shard_samples=1000)


@pytest.fixture(scope="module")
def plan(index: ShardIndex) -> EpochPlan:
    return plan_epoch(index, seed=3, epoch=2, global_batch=256, settings=OrderSettings())


def test_64_workers_see_each_of_1_28_million_pictures_once_and_four_of_every_batch(
    index: ShardIndex, plan: EpochPlan
) -> None:
    seen = np.zeros(index.num_samples, int)
    shares = []
    for rank in range(64):
        ids = _worker_epoch(plan, rank, world=64)
        shares.append(ids.shape)
        np.add.at(seen, ids.ravel(), 1)
    assert shares == [(SAMPLES // 256, 4)] * 64
    assert np.bincount(seen).tolist() == [SAMPLES % 256, SAMPLES // 256 * 256]


def test_an_epoch_shared_by_64_then_48_then_7_then_61_workers_is_the_same_epoch(
    index: ShardIndex, plan: EpochPlan
) -> None:
    stops = (0, 1234, 1235, 4001, plan.num_batches)
    seen = np.zeros(index.num_samples, int)
    for (first, end), world in zip(pairwise(stops), (64, 48, 7, 61), strict=True):
        parts = [_worker_batches(plan, rank, world, first, end) for rank in range(world)]
        sizes = {part.shape[1] for part in parts}
        assert max(sizes) - min(sizes) <= 1
        together = np.concatenate(parts, axis=1)
        assert sorted(together[-1]) == sorted(batch_ids(plan, end - 1))
        np.add.at(seen, together.ravel(), 1)
    assert np.bincount(seen).tolist() == [SAMPLES % 256, SAMPLES // 256 * 256]


def test_the_first_and_the_last_worker_read_as_much_and_as_often_as_each_other(
    index: ShardIndex, plan: EpochPlan
) -> None:
    read = []
    for rank in (0, 31, 63):
        ranges = [
            piece
            for block in range(plan.num_blocks)
            for piece in sample_ranges(
                index, block_ids(plan, block, rank_streams(256, rank, 64)).ravel().tolist(), 16
            )
        ]
        sizes = [
            piece.shard.offsets[piece.first + piece.count] - piece.shard.offsets[piece.first]
            for piece in ranges
        ]
        read.append((len(ranges), int(sum(sizes))))
    requests, sizes = np.array(read).T
    assert np.ptp(requests) / requests.mean() < 0.02
    assert np.ptp(sizes) / sizes.mean() < 0.03
    assert 20_016 / requests.mean() > 13, "a request should bring nearly a run of 16 pictures"


def test_the_loader_processes_of_24_workers_hand_out_just_the_batches_of_the_plan() -> None:
    index = made_index(2000, shard_samples=100)
    plan = plan_epoch(index, 0, 1, 75, OrderSettings())
    told = _through_the_stream(index, plan, world=24, processes=2)
    together = np.concatenate([part.ids for part in told], axis=1)
    expected = np.stack([batch_ids(plan, batch) for batch in range(plan.num_batches)])
    assert np.array_equal(np.sort(together, axis=1), np.sort(expected, axis=1))
    assert {part.ids.shape[1] for part in told} == {1, 2}


def _through_the_stream(
    index: ShardIndex, plan: EpochPlan, world: int, processes: int
) -> list[Told]:
    return [
        one_process(index, plan, rank, world, number, processes)
        for rank in range(world)
        for number in range(processes)
    ]


def _worker_epoch(plan: EpochPlan, rank: int, world: int) -> np.ndarray:
    return _worker_batches(plan, rank, world, 0, plan.num_batches)


def _worker_batches(plan: EpochPlan, rank: int, world: int, first: int, end: int) -> np.ndarray:
    """One worker's ids of batches `first` to `end`, which is not included, by batch and stream."""
    return np.concatenate(list(_blocks(plan, rank, world, first, end)))


def _blocks(plan: EpochPlan, rank: int, world: int, first: int, end: int) -> Iterator[np.ndarray]:
    streams = rank_streams(plan.global_batch, rank, world)
    for block in range(block_at(plan, first), block_at(plan, end - 1) + 1):
        begins, ends = block_bounds(plan, block)
        yield block_ids(plan, block, streams).T[
            max(first, begins) - begins : min(end, ends) - begins
        ]
