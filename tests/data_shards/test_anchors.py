"""Which slice of a clip says what is followed, and the clips that an evaluation takes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data_shards.batch import collate
from data_shards.datamodule import TripletDataModule
from data_shards.dataset import ShardDataset
from data_shards.errors import UserError
from data_shards.scan import write_index
from data_shards.triplet import Provenance, Target, Triplet
from data_shards.views import ClipView, clip_starts, clips_end_to_end
from data_shards.writer import ShardWriter

SHOWN = {0: "", 1: "liver", 2: "liver", 3: "", 4: "spleen", 5: "liver", 6: "", 7: "liver"}
"""What the slices of the first volume show; the second has the first five of them."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("anchors") / "train"
    slices = []
    for volume, length in enumerate((8, 5)):
        for number in range(length):
            mask = np.zeros((6, 5), np.uint8)
            mask[1:4, 1:3] = 1
            targets = (Target.from_mask(mask, SHOWN[number]),) if SHOWN[number] else ()
            near = {
                "previous": f"v{volume}-{number - 1}" if number else None,
                "next": f"v{volume}-{number + 1}" if number + 1 < length else None,
            }
            origin = Provenance(
                "toy", f"p{volume}", f"v{volume}", "CT", "0" * 64, "axial", number, (1.0, 1.0), 2.0, {}, **near
            )
            slices.append(
                Triplet(f"v{volume}-{number}", np.zeros((6, 5), np.uint8), targets, ("liver", "spleen"), origin)
            )
    with ShardWriter(path, 4, 2**20) as writer:
        for place in np.random.default_rng(1).permutation(len(slices)):
            writer.write(slices[place].key, slices[place].encode())
    write_index(path)
    return path


def starts(folder: Path, frames: int, step: int, anchor: str) -> set[str]:
    index = ShardDataset(folder).index
    return {index.key(place) for place in np.flatnonzero(clip_starts(index, frames, step, anchor))}  # type: ignore[arg-type]


@pytest.mark.parametrize("step", [1, 2])
@pytest.mark.parametrize(("anchor", "frames_of"), [("first", [0]), ("middle", [1]), ("last", [2]), ("ends", [0, 2])])
def test_a_clip_begins_where_its_anchor_shows_something(
    folder: Path, anchor: str, frames_of: list[int], step: int
) -> None:
    expected = {
        f"v{volume}-{first}"
        for volume, length in enumerate((8, 5))
        for first in range(length - 2 * step)
        if any(SHOWN[first + frame * step] for frame in frames_of)
    }
    assert starts(folder, 3, step, anchor) == expected


def test_the_targets_of_the_anchor_are_followed(folder: Path) -> None:
    shards = ShardDataset(folder)
    keys = shards.index.keys.tolist()
    for anchor, frame, terms in (("first", 0, ["liver"] * 2), ("middle", 2, ["spleen"]), ("last", 4, ["liver"] * 2)):
        first = "v0-2" if anchor == "middle" else "v0-1"
        batch = collate([ClipView(shards, 5, anchor=anchor)[0, keys.index(first)]], 5)  # type: ignore[arg-type]
        assert batch.anchors == [frame] and batch.frames == 5
        expected = ["liver", "liver", "liver"] if anchor != "middle" else terms
        assert batch.terms == expected


def test_either_end_is_drawn_and_always_one_that_shows_something(folder: Path) -> None:
    shards = ShardDataset(folder)
    keys = shards.index.keys.tolist()
    view = ClipView(shards, 2, anchor="ends")
    both = [collate([view[epoch, keys.index("v0-1")]], 2).anchors[0] for epoch in range(30)]
    assert set(both) == {0, 1} and both == [collate([view[e, keys.index("v0-1")]], 2).anchors[0] for e in range(30)]
    assert {collate([view[epoch, keys.index("v0-0")]], 2).anchors[0] for epoch in range(9)} == {1}
    assert {collate([view[epoch, keys.index("v0-2")]], 2).anchors[0] for epoch in range(9)} == {0}


@pytest.mark.parametrize("anchor", ["first", "middle", "ends"])
@pytest.mark.parametrize(("frames", "step"), [(2, 1), (3, 1), (2, 2), (3, 2)])
def test_an_evaluation_shows_no_slice_twice(folder: Path, frames: int, step: int, anchor: str) -> None:
    module = TripletDataModule(
        test=str(folder),
        clip_length=frames,
        clip_step=step,
        clip_anchor=anchor,
        micro_batch_size=2,  # type: ignore[arg-type]
    )
    module.setup("test")
    batches = list(module.test_dataloader())
    keys = [key for batch in batches for key in batch.keys]
    assert len(keys) == len(set(keys)) and len(keys) % frames == 0
    numbers = [number for batch in batches for number in batch.numbers]
    assert numbers == [clip for clip in range(len(keys) // frames) for _ in range(frames)]
    for batch in batches:
        for clip, frame in enumerate(batch.anchors):
            shown = [image for image in batch.image_index.tolist() if image // frames == clip]
            assert clip * frames + frame in shown, "the anchor shows what is followed"
    again = [key for batch in module.test_dataloader() for key in batch.keys]
    assert again == keys, "nothing about an evaluation is random"


def test_clips_end_to_end_begin_at_the_first_slice_that_can(folder: Path) -> None:
    index = ShardDataset(folder).index
    chosen = clips_end_to_end(index, clip_starts(index, 2, 1), 2, 1)
    assert sorted(index.key(place) for place in chosen) == ["v0-1", "v0-4", "v1-1"]
    everywhere = clips_end_to_end(index, np.ones(len(index), bool) & (index.following >= 0), 2, 1)
    assert sorted(index.key(place) for place in everywhere) == ["v0-0", "v0-2", "v0-4", "v0-6", "v1-0", "v1-2"]


def test_single_images_are_numbered_by_their_position(folder: Path) -> None:
    module = TripletDataModule(test=str(folder), micro_batch_size=4)
    module.setup("test")
    for batch in module.test_dataloader():
        assert batch.numbers == batch.positions and batch.anchors == [0] * len(batch)


@pytest.mark.parametrize(("anchor", "which"), [("first", "first"), ("ends", "first or last"), ("middle", "middle")])
def test_a_split_without_a_clip_is_refused(folder: Path, anchor: str, which: str) -> None:
    module = TripletDataModule(train=str(folder), test=str(folder), clip_length=9, clip_anchor=anchor)  # type: ignore[arg-type]
    message = f"has no clip of 9 slices whose {which} has a semantic target"
    module.setup("test")
    with pytest.raises(UserError, match=f"data.init_args.test: .*{message}"):
        module.test_dataloader()
    module.setup("fit")
    with pytest.raises(UserError, match=f"data.init_args.train: .*{message}"):
        module.train_dataloader()


def test_an_anchor_survives_the_way_out_of_a_worker(folder: Path) -> None:
    import pickle

    shards = ShardDataset(folder)
    batch = collate([ClipView(shards, 3, anchor="middle")[0, shards.index.keys.tolist().index("v0-0")]], 3)
    copied = pickle.loads(pickle.dumps(batch))
    assert (copied.anchors, copied.numbers) == (batch.anchors, batch.numbers) and copied.anchors == [1]
    assert replace(copied).frames == 3


@pytest.mark.parametrize("anchor", ["first", "middle", "last", "ends"])
def test_what_an_evaluation_scores_is_told_before_it_is_read(folder: Path, anchor: str) -> None:
    """Pictures are chosen from it: from all clips, and none of what is prompted."""
    module = TripletDataModule(test=str(folder), clip_length=3, clip_anchor=anchor, micro_batch_size=1)  # type: ignore[arg-type]
    module.setup("test")
    loader = module.test_dataloader()
    for draws in (1, len(loader)):
        expected = set()
        for batch in list(loader)[:draws]:
            shown = {(image, term) for image, term in zip(batch.image_index.tolist(), batch.terms, strict=True)}
            terms = {term for image, term in shown if image == batch.anchors[0]}
            expected |= {batch.positions[i] for i, term in shown if i != batch.anchors[0] and term in terms}
        assert loader.dataset.scored(draws).tolist() == sorted(expected)
    single = TripletDataModule(test=str(folder))
    single.setup("test")
    view = single.test_dataloader().dataset
    assert view.scored(5).tolist() == [place for place in view.scored(13).tolist() if place < 5]
