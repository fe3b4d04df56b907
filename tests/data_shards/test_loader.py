from __future__ import annotations

import gc
import json
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_triplet import make, values

from data_shards.batch import Sample, TripletBatch, collate
from data_shards.dataset import ShardDataset
from data_shards.errors import UserError
from data_shards.loader import SampleView, TripletLoader
from data_shards.order import epoch_order
from data_shards.sampler import Draw, EvenSampler, GlobalOrderSampler
from data_shards.scan import write_index
from data_shards.views import with_target
from data_shards.writer import ShardWriter

COUNT = 26


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("loader") / "train"
    with ShardWriter(path, 7, 2**20) as writer:
        for number in range(COUNT):
            writer.write(f"toy-{number:03d}", make(np.roll(values("uint8"), number), masks=number % 4).encode())
    write_index(path)
    return path


def loader(
    folder: Path,
    workers: int = 0,
    rank: int = 0,
    world: int = 1,
    micro: int = 2,
    seed: int = 5,
    epoch: int = 0,
    targets: int | None = None,
) -> TripletLoader:
    shards = ShardDataset(folder)
    sampler = GlobalOrderSampler(len(shards), 8, micro, rank, world, seed)
    sampler.set_epoch(epoch)
    return TripletLoader(SampleView(shards, targets, seed), sampler, workers, data_hash=shards.index.sha256)


def what(batch: TripletBatch) -> tuple:
    """All that tells batches apart."""
    return batch.positions, batch.target_index, batch.keys, [int(image.long().sum()) for image in batch.images]


def take(source: TripletLoader, count: int) -> list[tuple]:
    iterator = iter(source)
    return [what(next(iterator)) for _ in range(count)]


def saved(source: TripletLoader) -> dict:
    """The state as it comes back from a file."""
    return json.loads(json.dumps(source.state_dict()))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_batch_knows_how_many_samples_of_its_step_have_targets(folder: Path, workers: int) -> None:
    order = epoch_order(COUNT, 5, 1)
    expected = [sum(int(position) % 4 > 0 for position in order[n * 8 : n * 8 + 8]) for n in range(3)]
    assert len(set(expected)) > 1, "as many in every step show nothing"
    sampler = GlobalOrderSampler(COUNT, 8, 2, 1, 2, 5, with_target(ShardDataset(folder).index, "all"))
    source = TripletLoader(SampleView(ShardDataset(folder), None, 5), sampler, workers)
    for epoch, seen in ((1, 0), (0, 0), (1, 3)):
        sampler.set_epoch(epoch)
        if seen:  # it goes on behind the first pass of the second step
            source.load_state_dict({**source.state_dict(), "epoch": epoch, "samples": seen * 4})
        found = [batch.counted for batch in source]
        if epoch:
            assert found == [count / 4 for count in expected for _ in range(2)][seen:]
    source.close()
    assert {batch.counted for batch in TripletLoader(SampleView(ShardDataset(folder)), EvenSampler(COUNT, 4))} == {None}


@pytest.mark.parametrize("workers", [0, 2])
def test_it_yields_the_order_of_the_sampler(folder: Path, workers: int) -> None:
    source = loader(folder, workers, epoch=4)
    batches = list(source)
    assert len(batches) == len(source) == 12
    assert [[Draw(4, position) for position in batch.positions] for batch in batches] == list(source.sampler)
    shards = ShardDataset(folder)
    for batch in batches:
        for position, key, image in zip(batch.positions, batch.keys, batch.images, strict=True):
            assert key == shards[position].key
            np.testing.assert_array_equal(image[0].numpy(), shards[position].image)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("count", [1, 5, 11])
def test_a_loaded_state_goes_on_with_exactly_the_rest(folder: Path, workers: int, count: int) -> None:
    everything = [what(batch) for batch in loader(folder, epoch=2, targets=1)]
    first = loader(folder, workers, epoch=2, targets=1)
    assert take(first, count) == everything[:count]
    second = loader(folder, workers, epoch=2, targets=1)
    second.load_state_dict(saved(first))
    assert [what(batch) for batch in second] == everything[count:]
    assert second.state_dict()["samples"] == 24
    # the next epoch is a whole one
    second.sampler.set_epoch(3)
    assert [what(batch) for batch in second] == [what(batch) for batch in loader(folder, epoch=3, targets=1)]


def test_it_can_be_interrupted_twice(folder: Path) -> None:
    everything = [what(batch) for batch in loader(folder)]
    found: list[tuple] = []
    state = None
    for count in (3, 4, 5):
        source = loader(folder)
        if state is not None:
            source.load_state_dict(state)
        found += take(source, count)
        state = saved(source)
    assert found == everything and state["samples"] == 24


def test_a_state_of_another_epoch_starts_this_one_from_the_beginning(folder: Path) -> None:
    first = loader(folder, epoch=0)
    take(first, 5)
    second = loader(folder, epoch=1)
    second.load_state_dict(saved(first))
    assert len(list(second)) == 12


def global_steps(folder: Path, world: int, micro: int, state: dict | None) -> list[set[int]]:
    """Positions of each optimiser step over all ranks, from a state on."""
    ranks = []
    for rank in range(world):
        source = loader(folder, rank=rank, world=world, micro=micro)
        if state is not None:
            source.load_state_dict(state)
        ranks.append([batch.positions for batch in source])
    passes = 8 // (micro * world)
    return [
        {position for batches in ranks for positions in batches[begin : begin + passes] for position in positions}
        for begin in range(0, len(ranks[0]), passes)
    ]


@pytest.mark.parametrize(("before", "after"), [((1, 2), (2, 4)), ((2, 4), (1, 8)), ((4, 1), (2, 1)), ((2, 1), (4, 2))])
def test_another_number_of_ranks_goes_on_with_the_same_steps(
    folder: Path, before: tuple[int, int], after: tuple[int, int]
) -> None:
    everything = global_steps(folder, 1, 1, None)
    world, micro = before
    states = []
    for rank in range(world):
        source = loader(folder, rank=rank, world=world, micro=micro)
        take(source, 8 // (micro * world))  # one optimiser step
        states.append(saved(source))
    assert all(state == states[0] for state in states)
    assert global_steps(folder, *after, states[0]) == everything[1:]


def test_a_position_that_the_new_batches_cannot_reach_is_refused(folder: Path) -> None:
    first = loader(folder, micro=1)
    take(first, 3)
    second = loader(folder, micro=2)
    second.load_state_dict(saved(first))
    with pytest.raises(UserError, match="cannot resume: 3 samples were used, which 2 samples at a time cannot reach"):
        next(iter(second))


def test_other_data_or_another_seed_is_refused(folder: Path) -> None:
    first = loader(folder)
    take(first, 2)
    state = saved(first)
    with pytest.raises(UserError, match="cannot resume: the checkpoint was made on other training shards"):
        loader(folder).load_state_dict({**state, "data_hash": "0" * 64})
    with pytest.raises(UserError, match="cannot resume: data seed was 5, now 6; set it back"):
        loader(folder, seed=6).load_state_dict(state)


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_has_no_state_and_reads_everything_twice(folder: Path, workers: int) -> None:
    shards = ShardDataset(folder)
    source = TripletLoader(SampleView(shards), EvenSampler(COUNT, 4), workers)
    assert source.state_dict() == {}
    source.load_state_dict({"samples": 8})
    for _ in range(2):
        assert [position for batch in source for position in batch.positions] == list(range(COUNT))


def test_targets_are_drawn_anew_in_every_epoch_but_never_by_chance(folder: Path) -> None:
    view = SampleView(ShardDataset(folder), targets_per_image=1, seed=3)
    three = [position for position in range(COUNT) if position % 4 == 3]
    drawn = {epoch: [view[epoch, position].chosen for position in three] for epoch in range(8)}
    assert drawn == {epoch: [view[epoch, position].chosen for position in three] for epoch in range(8)}
    assert all(len(chosen) == 1 for choices in drawn.values() for chosen in choices)
    assert len({tuple(choices) for choices in drawn.values()}) > 4
    assert {chosen for choices in drawn.values() for chosen in choices} == {(0,), (1,), (2,)}
    assert [len(view[0, position].chosen) for position in range(4)] == [0, 1, 1, 1]
    two = SampleView(ShardDataset(folder), targets_per_image=2)
    assert two[0, 3].chosen in [(0, 1), (0, 2), (1, 2)] and two[0, 1].chosen == (0,)
    assert SampleView(ShardDataset(folder))[0, 3].chosen == (0, 1, 2)


def test_collate_flattens_the_targets_and_points_at_their_images() -> None:
    grey, colour = make(values("uint8"), masks=3), make(values("uint8", 3), masks=1)
    colour = replace(colour, key="other")
    batch = collate([Sample(7, grey, (0, 2)), Sample(9, make(values("uint16"), masks=0), ()), Sample(4, colour, (0,))])
    assert len(batch) == 3
    assert [tuple(image.shape) for image in batch.images] == [(1, 11, 7), (1, 11, 7), (3, 11, 7)]
    assert [image.dtype for image in batch.images] == [torch.uint8, torch.uint16, torch.uint8]
    np.testing.assert_array_equal(batch.images[2].permute(1, 2, 0).numpy(), colour.image)
    assert batch.image_index.tolist() == [0, 0, 2] and batch.target_index == [0, 2, 0]
    targets = [grey.targets[0], grey.targets[2], colour.targets[0]]
    for mask, target in zip(batch.masks, targets, strict=True):
        np.testing.assert_array_equal(mask.numpy(), target.mask())
    assert batch.boxes.tolist() == [list(target.box) for target in targets]
    assert batch.terms == [target.term for target in targets]
    assert (batch.positions, batch.keys) == ([7, 9, 4], ["toy-v-a00004", "toy-v-a00004", "other"])
    assert batch.identities == [(7, 0), (7, 2), (4, 0)]
    assert batch.sizes.tolist() == [[11, 7]] * 3
    assert [origin.slice_index for origin in batch.provenances] == [4, 4, 4]


def test_a_batch_without_targets_keeps_its_shapes() -> None:
    batch = collate([Sample(0, make(values("uint8"), masks=0), ())])
    assert (batch.masks, batch.boxes.shape, batch.sizes.shape) == ([], (0, 4), (0, 2))
    moved = batch.to("cpu")
    assert moved.keys == batch.keys and torch.equal(moved.images[0], batch.images[0])


def test_damage_is_one_line_from_the_loader_too(folder: Path, tmp_path: Path) -> None:
    shards = ShardDataset(folder)
    copy = tmp_path / "train"
    copy.mkdir()
    for path in folder.iterdir():
        data = bytearray(path.read_bytes())
        if path.suffix == ".tar":
            data[shards.index.members(0)["json"][0] + 2] ^= 1
        (copy / path.name).write_bytes(data)
    source = loader(copy, workers=2)
    with pytest.raises(UserError) as caught:
        list(source)
    if source._loader._iterator is not None:  # left to the garbage collector, its workers would be waited for
        source._loader._iterator._shutdown_workers()
    assert str(caught.value).startswith(f"{copy}/shard-00000") and "is damaged" in str(caught.value)


def test_a_loaded_state_is_kept_until_it_is_gone_on_from(folder):
    first, second = loader(folder), loader(folder)
    take(first, 2)
    second.load_state_dict(saved(first))
    assert second.state_dict() == first.state_dict()
    assert second.state_dict()["samples"] == 4


def test_a_damaged_sample_in_a_worker_does_not_make_the_process_wait(folder, tmp_path):
    damaged = Path(shutil.copytree(folder, tmp_path / "damaged"))
    index = ShardDataset(damaged).index
    for shard, name in enumerate(index.shard_names):
        data = bytearray((damaged / str(name)).read_bytes())
        for number in np.flatnonzero(index.shard == shard):
            data[index.members(number)["image.png"][0]] ^= 0xFF
        (damaged / str(name)).write_bytes(bytes(data))
    loading = loader(damaged, workers=2)
    started = time.monotonic()
    with pytest.raises(UserError, match="is damaged"):
        list(loading)
    del loading
    gc.collect()
    assert time.monotonic() - started < 4, "it waits 5 s for each worker that was not told to stop"
