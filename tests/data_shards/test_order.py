from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from test_triplet import make, values

from data_shards.errors import UserError
from data_shards.index import Index
from data_shards.order import EpochOrder, Sampling, epoch_order, make_order
from data_shards.sampler import Draw, GlobalOrderSampler
from data_shards.scan import write_index
from data_shards.writer import ShardWriter

GROUPS = {"CT": 40, "MR": 8, "X-ray": 3}


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    """Forty CT slices, eight MR, three X-rays, in two data sets."""
    folder = tmp_path_factory.mktemp("order")
    names = [name for name, count in GROUPS.items() for _ in range(count)]
    with ShardWriter(folder, 20, 2**20) as writer:
        for number, modality in enumerate(names):
            triplet = make(values("uint8"), masks=number % 3)
            origin = replace(triplet.provenance, modality=modality, dataset="small" if modality == "MR" else "large")
            writer.write(f"toy-{number:03d}", replace(triplet, provenance=origin).encode())
    return write_index(folder)


def groups(index: Index, positions: np.ndarray) -> Counter[str]:
    return Counter(str(index.modalities[index.modality[position]]) for position in positions)


def test_without_weights_it_is_the_plain_order(index: Index) -> None:
    order = make_order(index)
    for seed, epoch in ((0, 0), (3, 1), (3, 2)):
        positions, repeats = order(seed, epoch)
        np.testing.assert_array_equal(positions, epoch_order(51, seed, epoch))
        assert not repeats.any()
    assert len(order) == 51 and order.name == ""


def test_samples_that_are_left_out_stay_out(index: Index) -> None:
    eligible = np.arange(51) % 4 == 1
    order = make_order(index, eligible)
    for epoch in range(3):
        positions, repeats = order(5, epoch)
        assert sorted(positions.tolist()) == np.flatnonzero(eligible).tolist() and not repeats.any()
    assert order(5, 0)[0].tolist() != order(5, 1)[0].tolist()
    assert order.name != make_order(index, ~eligible).name


@pytest.mark.parametrize(
    ("sampling", "shares"),
    [
        (Sampling(power=1), {"CT": 40, "MR": 8, "X-ray": 3}),
        (Sampling(power=0), {"CT": 17, "MR": 17, "X-ray": 17}),
        (Sampling(power=0.5), {"CT": 29, "MR": 13, "X-ray": 8}),  # of √40, √8, √3 in 51: 29.7, 13.3, 8.0
        (Sampling(weights={"CT": 1, "MR": 3, "X-ray": 0}, samples=100), {"CT": 25, "MR": 75}),
        (Sampling(by="dataset", power=0, samples=30), {"CT": 14, "X-ray": 1, "MR": 15}),
    ],
)
def test_shares_are_those_that_were_asked_for(sampling: Sampling, shares: dict[str, int], index: Index) -> None:
    order = make_order(index, sampling=sampling)
    total = sampling.samples or 51
    for epoch in range(4):
        positions, _ = order(7, epoch)
        found = groups(index, positions)
        assert found.total() == len(order) == total
        if sampling.by == "modality":
            assert (
                all(abs(found[name] - count) <= 1 for name, count in shares.items()) and found.keys() <= shares.keys()
            )
        else:
            assert found["MR"] == 15 and found["CT"] + found["X-ray"] == 15


def test_of_a_group_every_sample_is_seen_before_one_is_seen_again(index: Index) -> None:
    """Over epochs too: seven of forty an epoch reach all forty in six."""
    order = make_order(index, sampling=Sampling(weights={"CT": 7, "MR": 20, "X-ray": 3}, samples=30))
    seen: Counter[int] = Counter()
    for epoch in range(40):
        positions, repeats = order(11, epoch)
        for position, repeat in zip(positions.tolist(), repeats.tolist(), strict=True):
            assert 0 <= repeat <= 2
            seen[position] += 1
        for first, stop in ((0, 40), (40, 48), (48, 51)):
            counts = [seen[position] for position in range(first, stop)]
            assert max(counts) - min(counts) <= 1, (epoch, counts)
        # every appearance in one epoch has its own number
        pairs = list(zip(positions.tolist(), repeats.tolist(), strict=True))
        assert len(set(pairs)) == len(pairs)
        for position, count in Counter(positions.tolist()).items():
            assert {repeat for place, repeat in pairs if place == position} == set(range(count))


def test_what_a_last_incomplete_batch_leaves_out_does_not_count_as_seen(index: Index) -> None:
    order = make_order(index, sampling=Sampling(power=0.5), batch=16)
    assert len(order) == 48 and order.name != make_order(index, sampling=Sampling(power=0.5)).name
    seen: Counter[int] = Counter()
    for epoch in range(30):
        sampler = GlobalOrderSampler(order, 16, 4, 0, 1, seed=2)
        sampler.set_epoch(epoch)
        seen.update(draw.position for batch in sampler for draw in batch)
        for first, stop in ((0, 40), (40, 48), (48, 51)):
            counts = [seen[position] for position in range(first, stop)]
            assert max(counts) - min(counts) <= 1


def test_a_weighted_order_depends_on_seed_and_epoch_alone(index: Index) -> None:
    sampling = Sampling(power=0.3, samples=64)
    orders = {}
    for seed in (0, 1):
        for epoch in (5, 0, 3):
            np.random.seed(seed + epoch)
            orders[seed, epoch] = make_order(index, sampling=sampling)(seed, epoch)[0].tolist()
    again = make_order(index, sampling=sampling)
    assert all(again(*place)[0].tolist() == order for place, order in orders.items())
    assert len({tuple(order) for order in orders.values()}) == 6


def test_a_step_of_a_weighted_order_does_not_depend_on_the_ranks(index: Index) -> None:
    order = make_order(index, sampling=Sampling(power=0, samples=80))

    def steps(world: int, micro: int) -> list[set[Draw]]:
        ranks = []
        for rank in range(world):
            sampler = GlobalOrderSampler(order, 16, micro, rank, world, seed=2)
            sampler.set_epoch(3)
            ranks.append(list(sampler))
        passes = 16 // (world * micro)
        return [
            {draw for batches in ranks for batch in batches[begin : begin + passes] for draw in batch}
            for begin in range(0, len(ranks[0]), passes)
        ]

    expected = steps(1, 16)
    assert [len(step) for step in expected] == [16] * 5
    assert any(draw.repeat for step in expected for draw in step)
    assert steps(2, 4) == steps(4, 1) == steps(4, 4) == expected


def test_weights_that_do_not_fit(index: Index) -> None:
    for sampling, part in (
        (Sampling(weights={"CT": 1, "MR": 1, "Xray": 1}), "no modality 'Xray'; did you mean 'X-ray'?"),
        (Sampling(weights={"CT": 1, "MR": 1}), "modality 'X-ray' has none; 0 leaves it out"),
        (Sampling(weights={"CT": 0, "MR": 0, "X-ray": 0}), "all are 0: nothing would be seen"),
        (Sampling(by="dataset", weights={"CT": 1}), "no dataset 'CT'"),
        (Sampling(weights={"CT": 1e308, "MR": 1e308, "X-ray": 1}), "they add up to infinity"),
    ):
        with pytest.raises(UserError, match=r"^sampling\.weights") as caught:
            make_order(index, sampling=sampling)
        assert part in str(caught.value)
    for wrong in (
        {"power": 2},
        {"power": -0.1},
        {"samples": 0},
        {"weights": {"CT": -1.0}},
        {"weights": {"CT": float("nan")}},
    ):
        with pytest.raises(UserError, match=r"^sampling"):
            Sampling(**wrong)  # type: ignore[arg-type]


def test_every_way_of_choosing_has_its_name(index: Index) -> None:
    """A run that is resumed with another one is refused by it."""
    ways = [
        make_order(index),
        make_order(index, np.arange(51) > 3),
        make_order(index, sampling=Sampling()),
        make_order(index, sampling=Sampling(power=0.2)),
        make_order(index, sampling=Sampling(by="dataset")),
        make_order(index, sampling=Sampling(samples=50)),
        make_order(index, np.arange(51) > 3, Sampling()),
    ]
    assert len({order.name for order in ways}) == len(ways)


def test_a_million_samples_are_ordered_in_no_time() -> None:
    order = EpochOrder(10**6)
    positions, repeats = order(0, 0)
    assert len(np.unique(positions)) == 10**6 and not repeats.any()
