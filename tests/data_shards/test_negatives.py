"""Terms that were looked for and are not there, and batches with each term once."""

from __future__ import annotations

import json
import pickle
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from test_triplet import make
from toy import write_spec

from data_shards.batch import Sample, TripletBatch, collate
from data_shards.build import build
from data_shards.datamodule import TripletDataModule
from data_shards.dataset import ShardDataset
from data_shards.errors import UserError
from data_shards.scan import write_index
from data_shards.seed import stream
from data_shards.triplet import Provenance, Target, Triplet
from data_shards.views import ClipView, SampleView, terms_shown
from data_shards.writer import ShardWriter

LOOKED_FOR = ("rare", "liver", "never", "spleen", "lesion", "brain", "unseen")
"""The order of the terms in the samples."""
THERE = {
    "CT": [("liver",), ("spleen",), ("liver", "lesion"), ()],
    "MR": [("brain",), ("liver", "brain"), ()],
    "US": [()],
}
"""The terms of the images of each modality."""


def triplet(modality: str, number: int, terms: tuple[str, ...], looked_for: tuple[str, ...] = LOOKED_FOR) -> Triplet:
    mask = np.ones((3, 4), np.uint8)
    kinds = ("instance" if term == "lesion" else "semantic" for term in terms)
    targets = tuple(Target.from_mask(mask, term, (), kind) for term, kind in zip(terms, kinds, strict=True))
    stem = f"toy-{modality}-"
    origin = Provenance("toy", "p", modality, modality, "0" * 64, "axial", number, next=f"{stem}{number + 1}")
    return Triplet(f"{stem}{number}", np.zeros((3, 4), np.uint8), targets, looked_for, origin)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of three modalities, in disorder."""
    folder = tmp_path_factory.mktemp("negatives") / "train"
    items = [
        triplet(modality, number, terms) for modality, images in THERE.items() for number, terms in enumerate(images)
    ]
    with ShardWriter(folder, 3, 2**20) as writer:
        for place in np.random.default_rng(1).permutation(len(items)):
            writer.write(items[place].key, items[place].encode())
    write_index(folder)
    return folder


def absent(view: SampleView, epoch: int, place: int) -> tuple[str, ...]:
    item = view[epoch, place]
    assert isinstance(item, Sample)
    return item.absent


def place_of(shards: ShardDataset, key: str) -> int:
    place: int = shards.index.keys.tolist().index(key)
    return place


def hard_of(sample: Triplet) -> set[str]:
    """What other images of its modality have and it has not, by hand."""
    shown = {term for terms in THERE[sample.provenance.modality] for term in terms}
    return shown - {target.term for target in sample.targets}


# --- hard negatives


def test_the_terms_that_a_modality_shows(folder: Path) -> None:
    index = ShardDataset(folder).index
    shown = dict(zip(index.modalities.tolist(), terms_shown(index), strict=True))
    assert shown == {"CT": {"liver", "spleen", "lesion"}, "MR": {"brain", "liver"}, "US": frozenset()}


@pytest.mark.parametrize("count", [1, 2, 3, 5, 9])
def test_hard_negatives_come_first(folder: Path, count: int) -> None:
    shards = ShardDataset(folder)
    view = SampleView(shards, seed=5, negatives_per_image=count, hard_negatives=True)
    for place, sample in enumerate(shards):
        hard, looked_for = hard_of(sample), set(LOOKED_FOR) - {target.term for target in sample.targets}
        drawn = set()
        for epoch in range(20):
            found = absent(view, epoch, place)
            assert set(found) <= looked_for and len(found) == len(set(found)) == min(count, len(looked_for))
            assert len(hard & set(found)) == min(count, len(hard))
            assert list(found) == sorted(found, key=LOOKED_FOR.index)
            assert found == absent(view, epoch, place)
            drawn |= set(found)
        assert drawn == (hard if count <= len(hard) else looked_for)  # any of them, in the end


def test_a_term_of_its_own_image_alone_is_not_hard(folder: Path) -> None:
    """`brain` is shown by MR only, `spleen` by CT only: an image of the other modality asks for it last."""
    shards = ShardDataset(folder)
    view = SampleView(shards, negatives_per_image=1, hard_negatives=True)
    place = place_of(shards, "toy-MR-0")
    assert {absent(view, epoch, place) for epoch in range(30)} == {("liver",)}
    assert {absent(SampleView(shards, negatives_per_image=1), epoch, place) for epoch in range(60)} == {
        (term,) for term in LOOKED_FOR if term != "brain"
    }


def test_other_draws_stay_what_they_were(folder: Path) -> None:
    shards = ShardDataset(folder)
    view = SampleView(shards, seed=2, negatives_per_image=3)
    for place, sample in enumerate(shards):
        terms = [term for term in LOOKED_FOR if term not in {target.term for target in sample.targets}]
        for epoch in range(5):
            chosen = stream(2, "negatives", epoch, place, 0).choice(len(terms), size=3, replace=False)
            assert absent(view, epoch, place) == tuple(terms[number] for number in sorted(chosen.tolist()))


def test_clips_draw_hard_negatives_too(folder: Path) -> None:
    shards = ShardDataset(folder)
    place = place_of(shards, "toy-MR-0")
    view = ClipView(shards, 2, negatives_per_image=2, hard_negatives=True)
    for epoch in range(30):
        frames = view[epoch, place]  # the second shows the liver too: nothing hard is left
        assert isinstance(frames, tuple) and [frame.triplet.key for frame in frames] == ["toy-MR-0", "toy-MR-1"]
        assert not {"brain", "liver"} & set(frames[0].absent) and len(frames[0].absent) == 2
    place = place_of(shards, "toy-CT-0")
    drawn = {absent for epoch in range(30) for absent in [view[epoch, place][0].absent]}  # type: ignore[index]
    assert len(drawn) == 4 and all("lesion" in terms for terms in drawn)  # liver and spleen are in the frames


def test_a_view_goes_to_a_worker(folder: Path) -> None:
    view = SampleView(ShardDataset(folder), negatives_per_image=2, hard_negatives=True)
    other = pickle.loads(pickle.dumps(view))
    assert [absent(other, 3, place) for place in range(8)] == [absent(view, 3, place) for place in range(8)]


def test_a_million_samples_take_no_time(folder: Path) -> None:
    rng = np.random.default_rng(0)
    index = replace(
        ShardDataset(folder).index,
        modality=rng.integers(0, 9, 10**6, dtype=np.int32),
        modalities=np.array(list("abcdefghi")),
        target_start=np.arange(10**6 + 1, dtype=np.int64) * 3,
        target_term=rng.integers(0, 400, 3 * 10**6, dtype=np.int32),
        terms=np.array([f"t{number}" for number in range(400)]),
    )
    start = time.perf_counter()
    assert all(len(terms) == 400 for terms in terms_shown(index))
    assert time.perf_counter() - start < 2


# --- the data module


def module(folder: Path, **options: Any) -> TripletDataModule:
    found = TripletDataModule(**{"train": str(folder), "val": str(folder), "test": str(folder), "seed": 4, **options})
    found.setup("fit")
    found.setup("test")
    return found


def test_every_evaluation_asks_for_the_same_absent_terms(folder: Path) -> None:
    data = module(folder, evaluated_negatives=2, micro_batch_size=4)
    first = [batch.absent_terms for batch in data.val_dataloader()]
    assert [batch.absent_terms for batch in data.val_dataloader()] == first
    assert [batch.absent_terms for batch in data.test_dataloader()] == first
    assert [batch.absent_terms for batch in data.predict_dataloader()] == first
    assert sum(map(len, first)) == 2 * 8
    shards = ShardDataset(folder)
    view = SampleView(shards, seed=4, negatives_per_image=2)
    assert [term for terms in first for term in terms] == [
        term for place in range(8) for term in absent(view, 0, place)
    ]
    assert not any(batch.absent_terms for batch in data.train_dataloader())
    other = module(folder, evaluated_negatives=2, seed=9).val_dataloader()
    assert [batch.absent_terms for batch in other] != first


def test_hard_ones_are_evaluated_and_trained_on(folder: Path) -> None:
    data = module(folder, evaluated_negatives=1, negatives_per_image=1, hard_negatives=True)
    for loader in (data.train_dataloader(), data.val_dataloader()):
        for batch in loader:
            hard = hard_of(ShardDataset(folder)[batch.positions[0]])
            assert len(batch.absent_terms) == 1 and (not hard or batch.absent_terms[0] in hard)
    clips = module(folder, clip_length=2, negatives_per_image=1, hard_negatives=True, batch_size=2)
    assert [len(batch.absent_terms) for batch in clips.train_dataloader()] == [2, 2, 2, 2]


def test_nothing_is_asked_for_in_an_evaluation_by_default(folder: Path) -> None:
    data = module(folder, negatives_per_image=3)
    assert not any(batch.absent_terms for batch in data.val_dataloader())


def test_what_says_nothing_is_refused() -> None:
    with pytest.raises(UserError, match="evaluated_negatives -1: 0 or more"):
        TripletDataModule(evaluated_negatives=-1)
    with pytest.raises(UserError, match="hard_negatives says which are drawn: set negatives_per_image or evaluated_"):
        TripletDataModule(hard_negatives=True)


# --- what a build leaves out is no negative


def test_a_term_with_something_left_out_is_never_a_negative(tmp_path: Path) -> None:
    """One of two instances is too small, and in another image the only one; at the border as well."""
    labels = np.zeros((3, 12, 12), np.uint8)
    labels[0, 2:6, 2:6], labels[0, 9, 9] = 1, 2  # a large one and a dot
    labels[1, 9, 9] = 2  # the dot alone
    (tmp_path / "i").mkdir()
    for number in range(3):
        Image.fromarray(np.full((12, 12), 50 + number, np.uint8)).save(tmp_path / "i" / f"{number}.png")
        Image.fromarray(labels[number]).save(tmp_path / "i" / f"{number}_m.png")
    spec = write_spec(
        tmp_path / "s.yaml",
        cases=[{"image": f"i/{n}.png", "mask": f"i/{n}_m.png", "split": "train", "patient": f"={n}"} for n in range(3)],
        targets=[{"term": "cell nucleus", "instances": "values"}],
        slices={"min_area": 2, "keep": "all"},
        split={"kind": "explicit"},
        intensity={"kind": "none"},
    )
    build(spec, tmp_path / "out")
    shards = ShardDataset(tmp_path / "out" / "train")
    for kinds in ("all", "instance", "semantic"):
        view = SampleView(shards, targets_per_image=1, kinds=kinds, negatives_per_image=5)  # type: ignore[arg-type]
        found = {int(shards[place].image[0, 0]) - 50: absent(view, 0, place) for place in range(3)}
        assert found == {0: (), 1: (), 2: ("cell nucleus",)}


@pytest.mark.parametrize("crowd", ["keep", "drop"])
def test_an_image_with_only_a_crowd_left_out_is_no_negative(tmp_path: Path, crowd: str) -> None:
    square = [2.0, 2.0, 8.0, 2.0, 8.0, 8.0, 2.0, 8.0]
    names = ("crowd", "both", "none")
    for number, name in enumerate(names):
        Image.fromarray(np.full((12, 12, 3), 50 + number, np.uint8)).save(tmp_path / f"{name}.png")
    notes = [
        {"id": number, "image_id": image, "category_id": 3, "segmentation": [square], "iscrowd": crowded}
        for number, (image, crowded) in enumerate([(0, 1), (1, 1), (1, 0)])
    ]
    images = [{"id": n, "file_name": f"{name}.png", "height": 12, "width": 12} for n, name in enumerate(names)]
    categories = [{"id": 3, "name": "polyp"}, {"id": 4, "name": "tool"}]
    (tmp_path / "notes.json").write_text(json.dumps({"images": images, "annotations": notes, "categories": categories}))
    spec = write_spec(
        tmp_path / "s.yaml",
        cases=[{"image": f"{n}.png", "mask": "notes.json", "split": "train", "patient": f"={n}"} for n in names],
        targets=[{"term": "polyp", "name": "polyp"}, {"term": "surgical instrument", "number": 4}],
        reader={"crowd": crowd},
        slices={"keep": "all"},
        split={"kind": "explicit"},
        intensity={"kind": "rgb"},
    )
    assert yaml.safe_load(spec.read_text())["reader"] == {"crowd": crowd}
    build(spec, tmp_path / "out")
    samples = {names[int(item.image[0, 0, 0]) - 50]: item for item in ShardDataset(tmp_path / "out" / "train")}
    both = ("polyp", "surgical instrument")
    assert {name: item.looked_for for name, item in samples.items()} == {
        "crowd": both if crowd == "keep" else ("surgical instrument",),
        "both": both,
        "none": both,
    }
    assert len(samples["crowd"].targets) == (crowd == "keep") and len(samples["both"].targets) == 1


# --- each term once


def batch_of(rows: list[tuple[int, str, str, tuple[slice, slice]]], images: int = 2, frames: int = 1) -> TripletBatch:
    """A batch by hand: (image, term, kind, place of the mask)."""
    masks = [np.zeros((6, 8), np.uint8) for _ in rows]
    for mask, (*_, place) in zip(masks, rows, strict=True):
        mask[place] = 1
    targets = [
        Target.from_mask(mask, term, (f"{term}'",), kind) for mask, (_, term, kind, _) in zip(masks, rows, strict=True)
    ]
    base = make(np.zeros((6, 8), np.uint8), masks=0)
    samples = []
    for image in range(images):
        mine = tuple(target for target, row in zip(targets, rows, strict=True) if row[0] == image)
        things = [*dict.fromkeys(row[1] for row in rows)]
        numbers = tuple(things.index(target.term) for target in mine) if frames > 1 else None
        item = replace(base, key=f"k{image}", targets=mine)
        samples.append(Sample(image, item, tuple(range(len(mine))), 0, numbers, ("absent",)))
    return collate([tuple(samples)] if frames > 1 else samples, frames)


def test_a_term_is_its_only_semantic_mask_or_all_its_masks() -> None:
    batch = batch_of(
        [
            (0, "nucleus", "instance", np.s_[0:1, 0:2]),
            (0, "gland", "semantic", np.s_[3:5, 3:5]),
            (0, "nucleus", "instance", np.s_[4:6, 6:8]),
            (0, "polyp", "semantic", np.s_[1:2, 1:2]),
            (0, "polyp", "semantic", np.s_[2:3, 4:6]),
            (1, "nucleus", "instance", np.s_[0:2, 0:2]),
            (1, "nucleus", "semantic", np.s_[0:4, 0:3]),
            (1, "polyp", "instance", np.s_[5:6, 7:8]),
        ]
    )
    found = batch.by_term()
    assert found.terms == ["nucleus", "gland", "polyp", "nucleus", "polyp"]
    assert found.image_index.tolist() == [0, 0, 0, 1, 1] and found.image_index.dtype == torch.int64
    assert found.kinds == ["semantic"] * 5
    assert found.target_index == [0, 1, 3, 0, 2]
    assert found.objects == [0, 1, 2, 0, 1]
    assert found.synonyms == [("nucleus'",), ("gland'",), ("polyp'",), ("nucleus'",), ("polyp'",)]
    expected = [
        batch.masks[0] | batch.masks[2],
        batch.masks[1],
        batch.masks[3] | batch.masks[4],
        batch.masks[6],
        batch.masks[7],
    ]
    assert all(
        torch.equal(one, two) and one.dtype == torch.uint8 for one, two in zip(found.masks, expected, strict=True)
    )
    assert found.boxes.tolist() == [[0, 0, 7, 5], [3, 3, 4, 4], [1, 1, 5, 2], [0, 0, 2, 3], [7, 5, 7, 5]]
    for mask, box in zip(found.masks, found.boxes.tolist(), strict=True):
        assert box == list(Target.from_mask(mask.numpy(), "x").box)
    # nothing that need not be is copied, and nothing given is changed
    assert found.masks[3] is batch.masks[6] and found.masks[1] is batch.masks[1] and found.images is batch.images
    assert [int(mask.sum()) for mask in batch.masks] == [2, 4, 4, 1, 2, 4, 12, 1]
    assert (found.absent_terms, found.keys, found.positions) == (batch.absent_terms, batch.keys, batch.positions)
    assert found.identities == [(0, 0), (0, 1), (0, 3), (1, 0), (1, 2)]
    assert found.by_term() is found


def test_a_batch_of_terms_is_given_back() -> None:
    whole = batch_of(
        [(0, "a", "semantic", np.s_[0:1, 0:1]), (0, "b", "semantic", np.s_[:, :]), (1, "a", "semantic", np.s_[1:2, :])]
    )
    assert whole.by_term() is whole
    empty = batch_of([])
    assert empty.by_term() is empty and empty.absent_terms == ["absent"] * 2
    single = batch_of([(0, "a", "instance", np.s_[0:1, 0:1])]).by_term()
    assert single.kinds == ["semantic"]
    kindless = replace(whole, kinds=[], synonyms=[], terms=["a", "a", "a"]).by_term()
    assert kindless.terms == ["a", "a"] and kindless.synonyms == [] and int(kindless.masks[0].sum()) == 48


def test_terms_of_images_in_disorder_are_put_in_order() -> None:
    batch = batch_of([(0, "a", "semantic", np.s_[0:1, 0:1]), (1, "b", "semantic", np.s_[1:2, 1:2])])
    turned = replace(
        batch,
        image_index=batch.image_index.flip(0),
        terms=["b", "a"],
        masks=batch.masks[::-1],
        boxes=batch.boxes.flip(0),
    ).by_term()
    assert turned.terms == ["a", "b"] and turned.image_index.tolist() == [0, 1]
    assert turned.boxes.tolist() == batch.boxes.tolist()
    assert all(torch.equal(one, two) for one, two in zip(turned.masks, batch.masks, strict=True))


def test_a_term_is_one_thing_through_a_clip() -> None:
    rows = [
        (0, "b", "semantic", np.s_[0:1, 0:1]),
        (0, "a", "semantic", np.s_[1:2, :]),
        (0, "b", "instance", np.s_[3:4, :]),
        (1, "a", "semantic", np.s_[0:2, 0:2]),
        (1, "c", "instance", np.s_[5:6, :]),
    ]
    found = batch_of(rows, frames=2).by_term()
    assert found.frames == 2
    assert list(zip(found.image_index.tolist(), found.terms, found.objects, strict=True)) == [
        (0, "b", 0), (0, "a", 1), (1, "a", 1), (1, "c", 2)
    ]  # fmt: skip
