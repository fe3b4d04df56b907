from __future__ import annotations

import itertools

import numpy as np
import pytest

from data_shards.errors import UserError
from data_shards.sampler import Draw, EvenSampler, GlobalOrderSampler, epoch_order

Steps = list[set[Draw]]


def steps(world: int, micro: int, count: int = 50, batch: int = 8, epoch: int = 3, start: int = 0) -> Steps:
    """The samples of each optimiser step, over all ranks and accumulation steps."""
    ranks = []
    for rank in range(world):
        sampler = GlobalOrderSampler(count, batch, micro, rank, world, seed=11)
        sampler.set_epoch(epoch)
        sampler.start = start
        ranks.append(list(sampler))
    assert len({len(batches) for batches in ranks}) == 1
    assert all(len(items) == micro for batches in ranks for items in batches)
    passes = batch // (micro * world)
    result = []
    for begin in range(0, len(ranks[0]), passes):
        items = [item for batches in ranks for micro_batch in batches[begin : begin + passes] for item in micro_batch]
        assert len(items) == len(set(items))
        result.append(set(items))
    return result


def test_an_order_is_a_permutation_that_depends_on_seed_and_epoch_alone() -> None:
    orders = {}
    for seed, epoch in itertools.product((0, 1, 7), (0, 1, 7)):
        order = epoch_order(1000, seed, epoch)
        assert order.dtype == np.int64 and sorted(order.tolist()) == list(range(1000))
        np.random.seed(seed * 31 + epoch)  # the global state must not matter
        np.testing.assert_array_equal(epoch_order(1000, seed, epoch), order)
        orders[seed, epoch] = tuple(order.tolist())
    assert len(set(orders.values())) == 9
    # runs that are resumed in years to come need the same order
    assert epoch_order(10, 0, 0).tolist() == [4, 6, 2, 7, 3, 5, 9, 0, 8, 1]


@pytest.mark.parametrize(("world", "micro"), [(1, 8), (1, 2), (2, 4), (2, 1), (4, 2), (4, 1), (8, 1)])
def test_a_step_holds_the_same_samples_whatever_the_ranks(world: int, micro: int) -> None:
    expected = steps(1, 1)
    assert len(expected) == 6 and all(len(step) == 8 for step in expected)
    assert steps(world, micro) == expected
    order = epoch_order(50, 11, 3)
    assert expected == [{Draw(3, int(i)) for i in order[n * 8 : n * 8 + 8]} for n in range(6)]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_a_start_leaves_out_what_was_seen(world: int) -> None:
    assert steps(world, 2, start=16) == steps(1, 1)[2:]
    assert steps(world, 2, start=48) == []


def test_an_epoch_repeats_no_sample_and_leaves_out_less_than_a_step() -> None:
    found = set.union(*steps(2, 2))
    assert len(found) == 48
    other = {position for _, position, _ in set.union(*steps(2, 2, epoch=4))}
    assert other != {position for _, position, _ in found}


def test_length_is_that_of_a_whole_epoch() -> None:
    for world, micro in [(1, 8), (2, 2), (4, 1)]:
        sampler = GlobalOrderSampler(50, 8, micro, 0, world, seed=0)
        assert len(sampler) == len(list(sampler)) == 48 // (micro * world)


def test_what_counts_in_a_step_is_shared_by_its_passes() -> None:
    counted = np.arange(50) % 3 == 0
    order = epoch_order(50, 11, 3)
    for world, micro in [(1, 8), (1, 2), (2, 2), (4, 1), (8, 1)]:
        passes = 8 // (micro * world)
        expected = [sum(counted[order[n * 8 : n * 8 + 8]]) / (passes * world) for n in range(6) for _ in range(passes)]
        for rank in range(world):
            sampler = GlobalOrderSampler(50, 8, micro, rank, world, 11, counted)
            sampler.set_epoch(3)
            sampler.start = 16  # a resumed epoch is a whole one here
            assert sampler.counted_per_pass().tolist() == expected
        everything = GlobalOrderSampler(50, 8, micro, 0, world, seed=11)
        assert everything.counted_per_pass().tolist() == [micro] * len(everything)
    assert len(set(expected)) > 1


def test_batches_that_do_not_divide() -> None:
    with pytest.raises(UserError, match=r"batch_size 8 is not a multiple of micro_batch_size 3 × 1 rank\(s\): .* of 3"):
        GlobalOrderSampler(50, 8, 3, 0, 1, 0)
    with pytest.raises(UserError, match=r"batch_size 8 is not a multiple of micro_batch_size 4 × 4 rank\(s\)"):
        GlobalOrderSampler(50, 8, 4, 0, 4, 0)
    with pytest.raises(UserError, match="7 training samples are fewer than one batch_size of 8: lower batch_size"):
        GlobalOrderSampler(7, 8, 1, 0, 1, 0)


@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("micro", [1, 2, 5])
@pytest.mark.parametrize("count", [1, 7, 8, 23])
def test_evaluation_covers_every_sample_with_equal_batches(count: int, micro: int, world: int) -> None:
    ranks = [list(EvenSampler(count, micro, rank, world)) for rank in range(world)]
    assert {len(batches) for batches in ranks} == {len(EvenSampler(count, micro, 0, world))}
    assert len({tuple(map(len, batches)) for batches in ranks}) == 1
    seen = [position for batches in ranks for batch in batches for _, position, _ in batch]
    assert set(seen) == set(range(count))
    assert len(seen) - count < world  # no more is repeated than needed
    assert {epoch for batches in ranks for batch in batches for epoch, _, _ in batch} == {0}
    if world == 1:
        assert seen == list(range(count))
