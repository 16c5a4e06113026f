"""The order of an epoch: exact, complete, pinned, well shuffled, the same for any ranks."""

import numpy as np
import pytest

from data.index import ShardIndex
from data.order import (
    EpochPlan,
    OrderSettings,
    batch_ids,
    batches_per_epoch,
    block_at,
    block_bounds,
    block_ids,
    plan_epoch,
    rank_streams,
    run_length_of,
)
from tests.data.tars import plain_index

ODD_SHARDS = (301, 7, 1, 190)


def epoch_ids(plan: EpochPlan) -> np.ndarray:
    """Sample ids by batch (row) and stream (column)."""
    return np.stack([batch_ids(plan, batch) for batch in range(plan.num_batches)])


@pytest.mark.parametrize("aspect_buckets", [True, False])
@pytest.mark.parametrize("global_batch", [1, 2, 7, 64])
def test_each_sample_comes_once_an_epoch_and_a_part_batch_is_dropped(
    global_batch: int, aspect_buckets: bool
) -> None:
    index = plain_index(ODD_SHARDS)
    settings = OrderSettings(block=5, pool=20, run_length=9, aspect_buckets=aspect_buckets)
    ids = epoch_ids(plan_epoch(index, 3, 1, global_batch, settings))
    assert ids.shape == (499 // global_batch, global_batch)
    assert len(np.unique(ids)) == ids.size


def test_wrapping_shows_every_sample_and_fills_up_with_the_first_of_the_epoch() -> None:
    index = plain_index((10, 7))
    settings = OrderSettings(last_batch="wrap", aspect_buckets=False, run_length=1, block=100)
    plan = plan_epoch(index, 1, 0, 5, settings)
    ids = epoch_ids(plan)
    assert ids.shape == (4, 5)
    counts = np.bincount(ids.ravel(), minlength=17)
    assert counts.tolist().count(2) == 3
    assert set(np.flatnonzero(counts == 2)) == set(plan.run_first_ids[:3].tolist())


def test_dropping_leaves_out_other_samples_in_each_epoch() -> None:
    index = plain_index((10, 7))
    left_out = [
        frozenset(range(17)) - frozenset(epoch_ids(plan).flat)
        for plan in (plan_epoch(index, 1, epoch, 5, OrderSettings()) for epoch in range(8))
    ]
    assert {len(ids) for ids in left_out} == {2}
    assert len(set(left_out)) > 4


def test_orders_differ_between_epochs_and_seeds_and_are_equal_for_equal_ones() -> None:
    index = plain_index((40, 30))
    orders = {
        (seed, epoch): epoch_ids(plan_epoch(index, seed, epoch, 4, OrderSettings())).tolist()
        for seed in (0, 1)
        for epoch in (0, 1, 2)
    }
    assert len({str(order) for order in orders.values()}) == 6
    again = epoch_ids(plan_epoch(index, 1, 2, 4, OrderSettings())).tolist()
    assert again == orders[1, 2]


def test_the_order_of_a_small_set_is_these_numbers_for_good() -> None:
    """Written out: a checkpoint of an older release, or of another numpy, must resume here."""
    plan = plan_epoch(plain_index((5, 6)), 0, 2, 3, OrderSettings())
    assert plan.run_first_ids.tolist() == [6, 10, 7, 2, 9, 1, 3, 5, 0, 4, 8]
    assert epoch_ids(plan).tolist() == [[6, 1, 0], [7, 2, 3], [10, 9, 5]]


def test_a_stream_is_the_same_whoever_asks_for_it() -> None:
    plan = plan_epoch(plain_index(ODD_SHARDS), 5, 0, 6, OrderSettings(block=16, pool=1))
    assert plan.num_blocks > 2
    for block in range(plan.num_blocks):
        together = block_ids(plan, block, range(6))
        apart = [block_ids(plan, block, [stream])[0] for stream in range(6)]
        assert together.tolist() == [row.tolist() for row in apart]


def test_blocks_cover_the_epoch_without_gap_and_differ_by_one_at_most() -> None:
    plan = plan_epoch(plain_index((1009,)), 0, 0, 3, OrderSettings(block=25, pool=1))
    bounds = [block_bounds(plan, block) for block in range(plan.num_blocks)]
    assert [first for first, _ in bounds] == [0, *(end for _, end in bounds[:-1])]
    assert bounds[-1][1] == plan.num_batches
    assert {end - first for first, end in bounds} <= {24, 25}
    for batch in range(plan.num_batches):
        first, end = bounds[block_at(plan, batch)]
        assert first <= batch < end


def test_a_batch_outside_the_epoch_is_refused() -> None:
    plan = plan_epoch(plain_index((9,)), 0, 0, 2, OrderSettings())
    with pytest.raises(ValueError, match="batch 4 is not in an epoch of 4 batches"):
        block_at(plan, 4)


def test_samples_are_read_in_runs_but_small_sets_are_permuted_fully() -> None:
    settings = OrderSettings()
    assert run_length_of(1_281_167, 256, settings) == 16
    assert run_length_of(300, 2, settings) == 9
    assert run_length_of(10, 2, settings) == 1
    plan = plan_epoch(plain_index((4096, 4096)), 0, 0, 2, settings)
    assert len(plan.run_first_ids) == 512
    assert np.diff(np.sort(plan.run_first_ids)).tolist() == [16] * 511


def test_neighbours_in_the_stream_are_strangers_in_storage() -> None:
    """Correlation of storage places of neighbours in the stream: below 0.03 (chance: 0.007)."""
    ids = epoch_ids(plan_epoch(plain_index((1024,) * 20), 4, 0, 32, OrderSettings())).ravel()
    assert abs(np.corrcoef(ids[:-1], ids[1:])[0, 1]) < 0.03


def test_neighbours_in_storage_are_almost_never_in_one_batch() -> None:
    ids = epoch_ids(plan_epoch(plain_index((1024,) * 20), 4, 0, 32, OrderSettings()))
    batch_of = np.empty(ids.size, np.int64)
    batch_of[ids.ravel()] = np.repeat(np.arange(len(ids)), 32)
    distance = np.abs(np.diff(batch_of))
    assert (distance == 0).mean() < 0.002
    assert np.median(distance) > 30


def test_pictures_of_like_aspect_meet_so_that_little_is_padding() -> None:
    index = plain_index((1024,) * 20)
    grouped, mixed = (
        padding_share(index, OrderSettings(aspect_buckets=buckets)) for buckets in (True, False)
    )
    assert grouped < 0.12
    assert mixed > 0.4


def test_batches_of_a_block_do_not_come_in_the_order_of_their_aspects() -> None:
    index = plain_index((1024,) * 8)
    plan = plan_epoch(index, 0, 0, 16, OrderSettings())
    widths = np.concatenate([shard.widths for shard in index.shards])
    heights = np.concatenate([shard.heights for shard in index.shards])
    means = np.log(widths / heights)[block_ids(plan, 0, range(16))].mean(axis=0)
    assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.3


def test_a_picture_of_unknown_size_counts_as_square_and_is_not_lost() -> None:
    index = plain_index((20,))
    index.shards[0].widths[3] = 0
    index.shards[0].heights[3] = 0
    ids = epoch_ids(plan_epoch(index, 0, 0, 4, OrderSettings()))
    assert sorted(ids.flat) == list(range(20))


def test_less_than_one_batch_is_an_error_with_the_way_out() -> None:
    with pytest.raises(ValueError, match="global_batch=11 is more than the 10 samples") as error:
        batches_per_epoch(plain_index((10,)), 11, OrderSettings())
    assert "use a batch of at most that many, or more pictures" in str(error.value)
    assert batches_per_epoch(plain_index((10,)), 10, OrderSettings()) == 1


def test_ranks_share_out_all_streams_evenly() -> None:
    parts = [rank_streams(8, rank, 3) for rank in range(3)]
    assert [list(part) for part in parts] == [[0, 3, 6], [1, 4, 7], [2, 5]]
    with pytest.raises(ValueError, match="use fewer workers or a larger batch"):
        rank_streams(2, 0, 3)
    with pytest.raises(ValueError, match="rank=3 is not one of 3 ranks"):
        rank_streams(8, 3, 3)


def padding_share(index: ShardIndex, settings: OrderSettings) -> float:
    """Share of padding in batches of pictures with the short side resized to 1."""
    widths = np.concatenate([shard.widths for shard in index.shards]).astype(float)
    heights = np.concatenate([shard.heights for shard in index.shards]).astype(float)
    short = np.minimum(widths, heights)
    ids = epoch_ids(plan_epoch(index, 0, 0, 32, settings))
    width, height = (widths / short)[ids], (heights / short)[ids]
    padded = width.max(axis=1) * height.max(axis=1) * ids.shape[1]
    return float(1 - (width * height).sum() / padded.sum())
