from __future__ import annotations

import pickle
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from test_triplet import make, values

from data_shards.ahead import OneAhead
from data_shards.batch import Sample, Skipped, collate
from data_shards.datamodule import TripletDataModule
from data_shards.dataset import ShardDataset
from data_shards.errors import UserError
from data_shards.index import Index
from data_shards.loader import TripletLoader
from data_shards.order import Sampling, make_order
from data_shards.sampler import Draw, EvenSampler, GlobalOrderSampler
from data_shards.scan import write_index
from data_shards.triplet import Provenance, Target, Triplet
from data_shards.views import ClipView, SampleView, clip, clip_starts, with_target
from data_shards.writer import ShardWriter

LENGTHS = (7, 2, 5)
"""Slices of each volume."""
TERMS = ("liver", "spleen", "left kidney", "stomach")


def slice_of(volume: int, number: int) -> Triplet:
    """A slice with the liver in all but the first, the spleen in every other, and instances of a lesion."""
    mask = np.zeros((12, 9), np.uint8)
    mask[2:5, 1 : 3 + number % 4] = 1
    targets = []
    if number > 0:
        targets.append(Target.from_mask(mask, "liver"))
    targets += [Target.from_mask(np.roll(mask, shift, 0), "lesion", kind="instance") for shift in range(volume)]
    if number % 2 == 0:
        targets.append(Target.from_mask(np.roll(mask, 3, 0), "spleen"))
    key = f"toy-v{volume}-{number:02d}"
    side = {
        "previous": f"toy-v{volume}-{number - 1:02d}" if number else None,
        "next": f"toy-v{volume}-{number + 1:02d}" if number + 1 < LENGTHS[volume] else None,
    }
    origin = Provenance("toy", f"p{volume}", f"v{volume}", "CT", "0" * 64, "axial", number, (1.0, 1.0), 2.0, {}, **side)
    image = np.full((12, 9), 10 * volume + number, np.uint8)
    return Triplet(key, image, tuple(targets), (*TERMS, "lesion"), origin)


@pytest.fixture(scope="module")
def volumes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three volumes, whose slices are stored in disorder."""
    folder = tmp_path_factory.mktemp("views") / "train"
    slices = [slice_of(volume, number) for volume, length in enumerate(LENGTHS) for number in range(length)]
    with ShardWriter(folder, 4, 2**20) as writer:
        for place in np.random.default_rng(0).permutation(len(slices)):
            writer.write(slices[place].key, slices[place].encode())
    write_index(folder)
    return folder


def position(index: Index, key: str) -> int:
    return index.keys.tolist().index(key)


# --- kinds


def test_kinds_choose_among_targets(volumes: Path) -> None:
    shards = ShardDataset(volumes)
    place = position(shards.index, "toy-v2-02")
    terms = {kind: [] for kind in ("all", "semantic", "instance")}
    for kind in terms:
        item = SampleView(shards, kinds=kind)[0, place]  # type: ignore[arg-type]
        assert isinstance(item, Sample)
        terms[kind] = [target.term for _, target in item.targets]
    assert terms == {
        "all": ["liver", "lesion", "lesion", "spleen"],
        "semantic": ["liver", "spleen"],
        "instance": ["lesion", "lesion"],
    }
    drawn = {SampleView(shards, 1, seed, "instance")[0, place].chosen for seed in range(20)}  # type: ignore[union-attr]
    assert drawn == {(1,), (2,)}


def test_which_samples_have_a_target(volumes: Path) -> None:
    shards = ShardDataset(volumes)
    for kinds in ("all", "semantic", "instance"):
        found = with_target(shards.index, kinds)  # type: ignore[arg-type]
        for number, triplet in enumerate(shards):
            assert found[number] == any(kinds in ("all", target.kind) for target in triplet.targets)


def test_a_repeat_draws_other_targets(volumes: Path) -> None:
    shards = ShardDataset(volumes)
    place = position(shards.index, "toy-v2-04")
    view = SampleView(shards, targets_per_image=1, seed=4)
    chosen = [view[Draw(0, place, repeat)].chosen for repeat in range(12)]  # type: ignore[union-attr]
    assert chosen[0] == view[0, place].chosen  # type: ignore[union-attr]
    assert chosen == [view[Draw(0, place, repeat)].chosen for repeat in range(12)]  # type: ignore[union-attr]
    assert len(set(chosen)) == 4


# --- negatives


def test_negatives_were_looked_for_and_are_not_there(volumes: Path) -> None:
    shards = ShardDataset(volumes)
    view = SampleView(shards, seed=1, negatives_per_image=2)
    drawn = set()
    for place in range(len(shards)):
        for epoch in range(6):
            item = view[epoch, place]
            assert isinstance(item, Sample)
            there = {target.term for target in item.triplet.targets}
            absent = {*item.triplet.looked_for} - there
            assert len(item.absent) == min(2, len(absent)) == len(set(item.absent)) and {*item.absent} <= absent
            assert item.absent == view[epoch, place].absent  # type: ignore[union-attr]
            drawn.add(item.absent)
    assert len(drawn) > 4
    assert SampleView(shards)[0, 0].absent == ()  # type: ignore[union-attr]


def test_negatives_point_at_their_images(volumes: Path) -> None:
    view = SampleView(ShardDataset(volumes), negatives_per_image=9)
    samples = [view[0, place] for place in (3, 5)]
    batch = collate(samples)
    pairs = list(zip(batch.absent_index.tolist(), batch.absent_terms, strict=True))
    assert pairs == [(image, term) for image, sample in enumerate(samples) for term in sample.absent]  # type: ignore[union-attr]
    assert len(pairs) >= 4


# --- clips


@pytest.mark.parametrize(("frames", "step"), [(2, 1), (3, 1), (2, 3), (5, 1), (3, 2)])
def test_clips_begin_where_a_whole_one_fits_with_something_to_follow(volumes: Path, frames: int, step: int) -> None:
    index = Index.load(volumes)
    starts = {index.key(place) for place in np.flatnonzero(clip_starts(index, frames, step))}
    reach = (frames - 1) * step
    expected = {
        f"toy-v{volume}-{number:02d}"
        for volume, length in enumerate(LENGTHS)
        for number in range(length)
        if number + reach < length and (number > 0 or number % 2 == 0)
    }
    assert starts == expected
    for key in starts:
        places = clip(index, position(index, key), frames, step)
        volume, first = key.split("-")[1], int(key[-2:])
        assert [index.key(place) for place in places] == [f"toy-{volume}-{first + n * step:02d}" for n in range(frames)]


def test_a_clip_follows_what_its_first_slice_shows(volumes: Path) -> None:
    shards = ShardDataset(volumes)
    place = position(shards.index, "toy-v2-02")
    view = ClipView(shards, frames=3, negatives_per_image=9)
    batch = collate([view[0, place]], frames=3)
    assert batch.frames == 3 and batch.keys == ["toy-v2-02", "toy-v2-03", "toy-v2-04"]
    found = list(zip(batch.image_index.tolist(), batch.terms, batch.objects, strict=True))
    assert found == [(0, "liver", 0), (0, "spleen", 1), (1, "liver", 0), (2, "liver", 0), (2, "spleen", 1)]
    for mask, image, target in zip(batch.masks, batch.image_index.tolist(), batch.target_index, strict=True):
        np.testing.assert_array_equal(mask.numpy(), shards[batch.positions[image]].targets[target].mask())
    assert set(batch.absent_terms) == {"left kidney", "stomach"} and len(batch.absent_terms) == 2 * 3
    one = {tuple(collate([ClipView(shards, 3, 1, 1, seed)[0, place]]).terms) for seed in range(9)}
    assert one == {("liver", "liver", "liver"), ("spleen", "spleen")}
    with pytest.raises(UserError, match="no clip of 4 slices begins at sample 'toy-v2-02'"):
        ClipView(shards, frames=4)[0, place]


def test_a_loader_of_clips_resumes(volumes: Path) -> None:
    shards = ShardDataset(volumes)
    order = make_order(shards.index, clip_starts(shards.index, 2, 1))

    def loader(workers: int = 0) -> TripletLoader:
        sampler = GlobalOrderSampler(order, 4, 2, 0, 1, 3)
        return TripletLoader(ClipView(shards, 2), sampler, workers)

    whole = [batch.keys for batch in loader()]
    assert len(whole) == len(order) // 4 * 2 and all(len(keys) == 4 for keys in whole)
    first = loader(2)
    iterator = iter(first)
    assert next(iterator).keys == whole[0]
    second = loader(2)
    second.load_state_dict(first.state_dict())
    assert [batch.keys for batch in second] == whole[1:]
    first.close()
    second.close()


def test_a_clip_stays_in_its_volume(tmp_path: Path) -> None:
    """Whatever a foreign tool wrote into the neighbours."""
    chain = {"a": "b", "b": "c", "c": None, "self": "self", "lost": "nowhere"}
    with ShardWriter(tmp_path, 10, 2**20) as writer:
        for key, following in chain.items():
            origin = replace(
                slice_of(0, 2).provenance, volume="v1" if key == "c" else "v0", previous=None, next=following
            )
            writer.write(key, replace(slice_of(0, 2), provenance=origin).encode())
    index = write_index(tmp_path)
    assert index.following.tolist() == [1, -1, -1, -1, -1]
    assert clip_starts(index, 2, 1).tolist() == [True, False, False, False, False]
    crossing = replace(index, following=np.array([1, 2, -1, -1, -1], np.int32))  # of an index made elsewhere
    assert clip_starts(crossing, 2, 1).tolist() == [True, False, False, False, False]
    assert not clip_starts(crossing, 3, 1).any()


# --- damage


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """Thirty samples in three shards; three samples of the first are damaged, the last shard is missing."""
    folder = tmp_path / "train"
    with ShardWriter(folder, 10, 2**20) as writer:
        for number in range(30):
            writer.write(f"toy-{number:02d}", make(np.roll(values("uint8"), number), masks=1 + number % 2).encode())
    index = write_index(folder)
    path = folder / str(index.shard_names[0])
    data = bytearray(path.read_bytes())
    for number in (1, 4, 7):
        data[index.members(number)["image.png"][0] + 20] ^= 1
    path.write_bytes(data)
    (folder / str(index.shard_names[2])).unlink()
    return folder


@pytest.mark.parametrize("workers", [0, 2])
def test_damaged_samples_are_skipped_and_named(damaged: Path, workers: int) -> None:
    shards = ShardDataset(damaged, check=False)
    sampler = GlobalOrderSampler(30, 5, 5, 0, 1, 0)
    loader = TripletLoader(SampleView(shards, on_damage="skip"), sampler, workers, max_damaged=0.5)
    batches = list(loader)
    loader.close()
    skipped = {item.key: item for batch in batches for item in batch.skipped}
    assert sorted(skipped) == ["toy-01", "toy-04", "toy-07", *(f"toy-{number}" for number in range(20, 30))]
    assert "shard-000000.tar: sample 'toy-04' is damaged, its bytes changed since the build" in skipped["toy-04"].reason
    assert "shard-000002.tar: sample 'toy-22' is damaged, it cannot be read (No such file" in skipped["toy-22"].reason
    assert all(shards.index.key(item.position) == key for key, item in skipped.items())
    # nothing takes their places: the others are where they would have been
    expected = [[shards.index.key(draw.position) for draw in draws] for draws in sampler]
    for batch, keys in zip(batches, expected, strict=True):
        assert batch.keys == [key for key in keys if key not in skipped]
        assert [item.key for item in batch.skipped] == [key for key in keys if key in skipped]


def test_too_much_damage_ends_the_epoch(damaged: Path) -> None:
    shards = ShardDataset(damaged, check=False)
    view = SampleView(shards, on_damage="skip")
    loader = TripletLoader(view, GlobalOrderSampler(30, 5, 5, 0, 1, 0), max_damaged=0.1)
    with pytest.raises(
        UserError, match=r"^[45] damaged samples in one epoch on one rank: .*max_damaged \(0\.1\) allows fewer"
    ):
        list(loader)
    assert len(list(TripletLoader(view, EvenSampler(20, 5), max_damaged=0.15))) == 4  # three of twenty
    for share, allowed in ((0.14, 3), (0.1, 2), (0.01, 1), (0.0, 0)):
        loader = TripletLoader(view, EvenSampler(20, 1), max_damaged=share)
        if allowed < 3:
            with pytest.raises(UserError, match=f"^{allowed + 1} damaged sample"):
                list(loader)
        else:
            assert len(list(loader)) == 20


def test_a_place_that_cannot_be_read_is_no_damage(damaged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = ShardDataset(damaged, check=False)

    def refuse(*arguments: object) -> bytes:
        raise UserError("s3://bucket: access denied")

    monkeypatch.setattr(shards._store, "read", refuse)
    with pytest.raises(UserError, match="access denied"):
        SampleView(shards, on_damage="skip")[0, 0]


def test_a_clip_with_a_damaged_slice_is_skipped(volumes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = ShardDataset(volumes)
    bad = position(shards.index, "toy-v2-03")
    real = shards.read

    def read(number: int) -> dict[str, bytes]:
        if number == bad:
            raise shards._damage(number, "it is bad")
        return real(number)

    monkeypatch.setattr(shards, "read", read)
    item = ClipView(shards, frames=3, on_damage="skip")[0, position(shards.index, "toy-v2-02")]
    assert isinstance(item, Skipped) and item.key == "toy-v2-02" and "sample 'toy-v2-03' is damaged" in item.reason


# --- the data module


def module(folder: Path, **options: Any) -> TripletDataModule:
    found = TripletDataModule(train=str(folder), batch_size=2, seed=0, **options)
    found.setup("fit")
    return found


def test_the_data_module_trains_on_what_is_chosen(volumes: Path) -> None:
    index = Index.load(volumes)
    assert module(volumes).steps_per_epoch == 14 // 2
    only = module(volumes, only_with_targets=True, kinds="instance")
    keys = {key for batch in only.train_dataloader() for key in batch.keys}
    having = {key for key in index.keys.tolist() if "-v0-" not in key}
    assert len(having) == 7 and keys < having and len(keys) == 6  # batches of two
    assert only.without_targets("train") == 0
    assert module(volumes, kinds="instance").without_targets("train") == 7
    clips = module(volumes, clip_length=3)
    batches = list(clips.train_dataloader())
    assert clips.steps_per_epoch == len(batches) // 2 and {batch.frames for batch in batches} == {3}
    weighted = module(volumes, sampling=Sampling(power=0, samples=40))
    assert weighted.steps_per_epoch == 20 and len(list(weighted.train_dataloader())) == 40
    assert any(repeat for batch in weighted.train_dataloader() for repeat in batch.repeats)
    absent = module(volumes, negatives_per_image=1)
    assert sum(len(batch.absent_terms) for batch in absent.train_dataloader()) == 14


def test_what_is_left_out_of_a_training_is_said(volumes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options, line in (
        ({}, ""),
        ({"only_with_targets": True, "kinds": "instance"}, "7 of 14 samples have no target of kind 'instance'"),
        ({"clip_length": 3}, "6 of 14 samples do not begin a whole clip"),
    ):
        found = TripletDataModule(train=str(volumes), batch_size=2, seed=0, **options)
        found.trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
        found.setup("fit")
        said = capsys.readouterr().err.splitlines()
        expected = [f"data.init_args.train: {line}: they are left out"] if line else []
        assert [text for text in said if text.startswith("data.")] == expected


def test_the_data_module_refuses_what_cannot_be(volumes: Path) -> None:
    for options, part in (
        ({"clip_length": 8}, "has no clip of 8 slices whose first has a semantic target"),
        ({"clip_length": 2, "kinds": "instance"}, "clips follow semantic targets"),
        ({"negatives_per_image": -1}, "negatives_per_image -1 is 0 or more"),
        ({"max_damaged": 2.0}, "max_damaged 2.0: a share from 0 to 1"),
        ({"sampling": Sampling(weights={"MR": 1.0})}, "no modality 'MR'"),
    ):
        with pytest.raises(UserError, match=part):
            module(volumes, **options).train_dataloader()


def test_an_order_of_another_choice_is_not_resumed(volumes: Path) -> None:
    first = module(volumes, sampling=Sampling(power=0.5)).train_dataloader()
    next(iter(first))
    for options in ({}, {"sampling": Sampling(power=0.4)}, {"only_with_targets": True, "kinds": "instance"}):
        other = module(volumes, **options).train_dataloader()
        with pytest.raises(UserError, match="cannot resume: the samples were chosen or weighted in another way"):
            other.load_state_dict(first.state_dict())


def test_missing_shards_are_named_before_they_are_skipped(damaged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=r"shard-000002\.tar: the shard is missing"):
        module(damaged)
    module(damaged, on_damage="skip")
    line = capsys.readouterr().err
    assert (
        "data.init_args.train: " in line and "shard-000002.tar: the shard is missing" in line and line.count("\n") == 1
    )


# --- on the way to the training


def test_a_batch_arrives_from_a_worker_as_it_left(volumes: Path) -> None:
    images = [np.full((5, 4), 300, np.uint16), np.ones((3, 2, 3), np.uint8), np.linspace(-1, 1, 6).reshape(2, 3)]
    samples = []
    for number, image in enumerate(images):
        mask = np.zeros(image.shape[:2], np.uint8)
        mask[0, : 1 + number % 2] = 1
        target = Target.from_mask(mask, f"t{number}")
        triplet = replace(make(values("uint8")), key=f"k{number}", image=image, targets=(target,) * number)
        samples.append(Sample(number, triplet, tuple(range(number)), number, None, ("a",) * number))
    for chosen in (samples, samples[:1], [Skipped(3, "k", "bad")]):
        batch = collate(chosen)
        copy = pickle.loads(pickle.dumps(batch))
        for name, value in vars(batch).items():
            other = getattr(copy, name)
            if name in ("images", "masks"):
                assert [one.dtype for one in value] == [one.dtype for one in other]
                assert all(torch.equal(one, two) for one, two in zip(value, other, strict=True))
            elif isinstance(value, torch.Tensor):
                assert value.dtype == other.dtype and torch.equal(value, other)
            else:
                assert value == other


def test_one_is_fetched_ahead_and_no_more() -> None:
    fetched: list[int] = []

    def source() -> Iterator[int]:
        for number in range(6):
            fetched.append(number)
            yield number

    ahead = OneAhead(source())
    seen = []
    for number in ahead:
        seen.append(number)
        time.sleep(0.05)
        assert number <= len(fetched) - 1 <= number + 2
    assert seen == list(range(6))
    ahead.stop()


def test_what_is_raised_while_fetching_is_raised_where_it_is_used() -> None:
    def source() -> Iterator[int]:
        yield 1
        raise UserError("bad")

    ahead = OneAhead(source())
    iterator = iter(ahead)
    assert next(iterator) == 1
    with pytest.raises(UserError, match="bad"):
        next(iterator)


def test_an_iteration_that_was_left_does_not_wait_for_ever(volumes: Path) -> None:
    source = module(volumes, num_workers=1).train_dataloader()
    first = iter(source)
    next(first)
    second = iter(source)
    next(second)
    with pytest.raises(RuntimeError, match="this iteration was left"):
        for _ in range(4):
            next(first)
    source.close()
    with pytest.raises(RuntimeError, match="this iteration was left"):
        for _ in range(4):
            next(second)


def test_fetching_stops_when_it_is_told() -> None:
    fetched: list[int] = []

    def source() -> Iterator[int]:
        for number in range(10**6):
            fetched.append(number)
            yield number

    ahead = OneAhead(source())
    assert next(iter(ahead)) == 0
    ahead.stop()
    count = len(fetched)
    time.sleep(0.05)
    assert len(fetched) == count <= 3 and not ahead._thread.is_alive()


def test_an_epoch_that_is_left_can_be_begun_again(volumes: Path) -> None:
    source = module(volumes, num_workers=2).train_dataloader()
    first = [batch.keys for batch in source]
    iterator = iter(source)
    assert [next(iterator).keys for _ in range(3)] == first[:3]
    assert [batch.keys for batch in source] == first
    before = time.monotonic()
    source.close()
    assert time.monotonic() - before < 3 and source.waited > 0
