"""Every fault that is planted is found, with its code, severity and place, and nothing else is."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from lint_corpus import SIDE, SLICES, Splits, clean, disc, picture, with_mask, with_origin, with_target, write
from PIL import Image
from pycocotools import mask as coco_mask
from toy import make_inputs

from data_shards.build import build
from data_shards.dataset import ShardDataset
from data_shards.errors import UserError
from data_shards.index import Index
from data_shards.lint import Finding, lint
from data_shards.lint.likeness import correlations, fingerprint
from data_shards.lint.page import render
from data_shards.lint.record import record
from data_shards.lint.survey import more
from data_shards.lint.table import CHECKS
from data_shards.triplet import Target, Triplet

Found = set[tuple[str, str, str, str, str]]
AT = 19  # a sample of the training split that has both targets
KEY = "toy-train-6-1"


def found(findings: list[Finding]) -> Found:
    """What was found: (severity, code, split, key, term)."""
    result = {(item.severity, item.code, item.split, item.key, item.term) for item in findings}
    assert len(result) == len(findings), "something is reported twice"
    return result


def test_a_clean_corpus_has_no_finding(tmp_path: Path) -> None:
    report = lint(write(tmp_path, clean()))
    assert (found(report.findings), report.counts.total(), report.worst) == (set(), 0, None)
    assert {name: (facts.samples, facts.linted) for name, facts in report.splits.items()} == {
        "test": (12, 12),
        "train": (36, 36),
    }
    assert report.summary() == "Nothing here speaks against training: nothing found in 48 samples of 2 splits."


def change(how: Callable[[Triplet], Triplet], at: int = AT) -> Callable[[Splits], None]:
    def plant(splits: Splits) -> None:
        splits["train"][at] = how(splits["train"][at])

    return plant


def of_volume(patient: int, how: Callable[[Triplet], Triplet]) -> Callable[[Splits], None]:
    def plant(splits: Splits) -> None:
        for at in range(SLICES * patient, SLICES * (patient + 1)):
            splits["train"][at] = how(splits["train"][at])

    return plant


def everywhere(how: Callable[[Triplet], Triplet]) -> Callable[[Splits], None]:
    def plant(splits: Splits) -> None:
        for triplets in splits.values():
            triplets[:] = map(how, triplets)

    return plant


def painted(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Triplet], Triplet]:
    return lambda triplet: replace(triplet, image=change(triplet.image.copy()))


def renamed(old: str, new: str) -> Callable[[Triplet], Triplet]:
    def how(triplet: Triplet) -> Triplet:
        targets = tuple(replace(t, term=new) if t.term == old else t for t in triplet.targets)
        return replace(triplet, targets=targets, looked_for=(*triplet.looked_for, new))

    return how


def bare(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Triplet], Triplet]:
    """As `painted`, without targets: what was painted over would lie on nothing."""
    return lambda triplet: replace(painted(change)(triplet), targets=())


def empty(triplet: Triplet) -> Triplet:
    counts = coco_mask.encode(np.zeros((SIDE, SIDE), np.uint8, order="F"))["counts"].decode()
    return with_target(triplet, counts=counts, box=(0, 0, 0, 0), area=0)


def poke(value: float, dtype: str) -> Callable[[np.ndarray], np.ndarray]:
    def how(image: np.ndarray) -> np.ndarray:
        result = image.astype(dtype)
        result[5, 7] = value
        return result

    return how


def square(first: int, last: int, down: int = 0) -> np.ndarray:
    mask = np.zeros((SIDE, SIDE), bool)
    mask[30 : 31 + down, first : last + 1] = True
    return mask


FAULTS: dict[str, tuple[Callable[[Splits], None], Found]] = {
    "a mask without a pixel": (change(empty), {("error", "empty-mask", "train", KEY, "liver")}),
    "run lengths that do not fill the image": (
        change(lambda t: with_target(t, counts="0")),
        {("error", "damaged-mask", "train", KEY, "liver")},
    ),
    "a box that is half-open": (
        change(lambda t: with_target(t, box=(*t.targets[0].box[:2], t.targets[0].box[2] + 1, t.targets[0].box[3]))),
        {("error", "wrong-box", "train", KEY, "liver")},
    ),
    "an area that is not the mask's": (
        change(lambda t: with_target(t, 1, area=t.targets[1].area - 1)),
        {("error", "wrong-area", "train", KEY, "spleen")},
    ),
    "a mask that is a line": (
        change(lambda t: with_mask(t, square(40, 60))),
        {("warning", "degenerate-box", "train", KEY, "liver")},
    ),
    "a mask of few pixels": (
        change(lambda t: with_mask(t, square(40, 42, 1))),
        {("note", "tiny-target", "train", KEY, "liver")},
    ),
    "a mask of everything": (
        change(lambda t: with_mask(t, np.ones((SIDE, SIDE), bool))),
        {("warning", "whole-image-mask", "train", KEY, "liver")},
    ),
    "a mask in the air": (
        change(lambda t: with_mask(t, disc(10, 9, 4))),
        {("warning", "mask-on-nothing", "train", KEY, "liver")},
    ),
    "two semantic targets of a term": (
        change(lambda t: replace(t, targets=(*t.targets, Target.from_mask(disc(70, 30, 5), "liver")))),
        {("error", "repeated-term", "train", KEY, "liver")},
    ),
    "a term that nobody looked for": (
        change(lambda t: replace(t, looked_for=("liver",))),
        {("error", "not-looked-for", "train", KEY, "spleen")},
    ),
    "an image of one value": (
        change(painted(lambda image: np.full_like(image, 7))),
        {("error", "constant-image", "train", KEY, "")},
    ),
    "an image of one value without targets": (
        change(lambda t: replace(t, image=np.zeros_like(t.image), targets=())),
        {("note", "blank-image", "train", KEY, "")},
    ),
    "NaN": (change(painted(poke(np.nan, "float32"))), {("error", "not-finite", "train", KEY, "")}),
    "infinity": (change(painted(poke(-np.inf, "float64"))), {("error", "not-finite", "train", KEY, "")}),
    "a mask in the place of an image": (
        change(bare(lambda image: (image > 100) * np.uint8(255))),
        {("warning", "few-levels", "train", KEY, "")},
    ),
    "another unit of intensity": (
        lambda splits: (
            everywhere(painted(lambda image: image.astype(np.float32)))(splits),
            of_volume(5, painted(lambda image: image * np.float32(1e4)))(splits),
        )[0],
        {("warning", "intensity-outlier", "train", "toy-train-5-0", "")},
    ),
    "an image that is burnt out": (
        change(bare(lambda image: np.where(image > 60, 250, image))),
        {("warning", "saturated", "train", KEY, "")},
    ),
    "bytes in 16 bits": (
        everywhere(painted(lambda image: image.astype(np.uint16) * 257)),
        {("note", "unused-bits", "train", "toy-train-0-0", "")},
    ),
    "pixels as large as a room": (
        of_volume(5, lambda t: with_origin(t, spacing=(750.0, 750.0))),
        {
            ("error", "pixel-spacing", "train", "toy-train-5-0", ""),
            ("warning", "spacing-outlier", "train", "toy-train-5-0", ""),
        },
    ),
    "pixels of a micrometre in CT": (
        everywhere(lambda t: with_origin(t, spacing=(0.0001, 0.0001))),
        {
            ("error", "pixel-spacing", split, f"toy-{split}-{patient}-0", "")
            for split, count in (("train", 12), ("test", 4))
            for patient in range(count)
        },
    ),
    "slices half a metre apart": (
        of_volume(5, lambda t: with_origin(t, slice_spacing=500.0)),
        {("error", "slice-spacing", "train", "toy-train-5-0", "")},
    ),
    "no slice spacing": (
        of_volume(5, lambda t: with_origin(t, slice_spacing=None)),
        {("note", "no-slice-spacing", "train", "toy-train-5-0", "")},
    ),
    "another spacing inside of a volume": (
        change(lambda t: with_origin(t, spacing=(0.8, 0.8))),
        {("error", "volume-changes", "train", KEY, "")},
    ),
    "another size inside of a volume": (
        change(lambda t: replace(t, image=picture(3, side=64), targets=())),
        {("error", "volume-changes", "train", KEY, "")},
    ),
    "a thumbnail among images": (
        of_volume(5, lambda t: replace(t, image=t.image[::4, ::4], targets=())),
        {("warning", "size-outlier", "train", "toy-train-5-0", "")},
    ),
    "another spacing than all others": (
        of_volume(5, lambda t: with_origin(t, spacing=(7.5, 7.5))),
        {("warning", "spacing-outlier", "train", "toy-train-5-0", "")},
    ),
    "a term that names nothing": (
        lambda splits: splits.update(
            train=[renamed("spleen", "label 1")(t) for t in splits["train"]],
            test=[renamed("spleen", "label 1")(t) for t in splits["test"]],
        ),
        {("error", "placeholder-term", split, "", "label 1") for split in ("train", "test")},
    ),
    "a term that is misspelt": (
        everywhere(renamed("spleen", "spleeen")),
        {("warning", "unknown-term", split, "", "spleeen") for split in ("train", "test")},
    ),
    "two spellings of a concept": (
        lambda splits: splits["train"].__setitem__(
            slice(18, None), [renamed("liver", "Liver")(t) for t in splits["train"][18:]]
        ),
        {("warning", "several-spellings", "", "", "liver")},
    ),
    "a term that is tested and not learnt": (
        lambda splits: splits["test"].__setitem__(1, renamed("spleen", "pancreas")(splits["test"][1])),
        {("warning", "term-not-in-train", "test", "", "pancreas")},
    ),
    "a term of three images": (
        of_volume(6, renamed("liver", "pancreas")),
        {("note", "rare-term", "train", "", "pancreas"), ("note", "never-absent", "train", "", "pancreas")},
    ),
    "a patient in two splits": (
        lambda splits: splits["test"].__setitem__(0, with_origin(splits["test"][0], patient="p-train-3")),
        {("error", "patient-in-splits", "test", "", "")},
    ),
    "a volume in two splits": (
        lambda splits: splits["test"].__setitem__(0, with_origin(splits["test"][0], volume="v-train-3")),
        {("error", "volume-in-splits", "test", "", "")},
    ),
    "images whose patients are not known": (
        everywhere(lambda t: with_origin(t, split_unit="image")),
        {("note", "unknown-patients", split, "", "") for split in ("train", "test")},
    ),
    "the same pixels in two splits": (
        lambda splits: splits["train"].__setitem__(AT, replace(splits["train"][AT], image=splits["test"][4].image)),
        {("error", "duplicate-across-splits", "test", "toy-test-1-1", "")},
    ),
    "the same pixels in another type": (
        lambda splits: splits["train"].__setitem__(
            AT, replace(splits["train"][AT], image=np.repeat(splits["test"][4].image[..., None], 3, axis=2))
        ),
        {("error", "duplicate-across-splits", "test", "toy-test-1-1", "")},
    ),
    "the same pixels of two patients": (
        lambda splits: splits["train"].__setitem__(AT, replace(splits["train"][AT], image=splits["train"][4].image)),
        {("warning", "duplicate-across-patients", "train", KEY, "")},
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found_and_nothing_else(fault: str, tmp_path: Path) -> None:
    plant, expected = FAULTS[fault]
    splits = clean()
    plant(splits)
    report = lint(write(tmp_path, splits))
    assert found(report.findings) == expected
    assert report.counts.total() == len(expected)
    for finding in report.findings:
        assert finding.message and "\n" not in finding.message
        if finding.key:
            dataset = ShardDataset(tmp_path / finding.split)
            assert dataset.index.key(finding.number) == finding.key
            if finding.target >= 0:
                assert dataset[finding.number].targets[finding.target].term == finding.term


def jpeg(image: np.ndarray, quality: int = 75) -> np.ndarray:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality)
    return np.asarray(Image.open(buffer))


def resized(image: np.ndarray, width: int, height: int) -> np.ndarray:
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))


COPIES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "packed as JPEG": jpeg,
    "packed as poor JPEG": lambda image: jpeg(image, 40),
    "half as large": lambda image: resized(image, SIDE // 2, SIDE // 2),
    "twice as large": lambda image: resized(image, 2 * SIDE, 2 * SIDE),
    "squeezed": lambda image: resized(image, SIDE, 70),
    "paler": lambda image: (image * 0.6 + 30).astype(np.uint8),
    "brighter": lambda image: (image * 1.1 + 20).clip(0, 255).astype(np.uint8),
    "darker in the middle": lambda image: ((image / 255) ** 1.4 * 255).astype(np.uint8),
    "in 16 bits": lambda image: image.astype(np.uint16) * 200 + 13,
    "mirrored": lambda image: image[:, ::-1],
    "mirrored and packed": lambda image: jpeg(np.ascontiguousarray(image[:, ::-1])),
    "changed in one pixel": lambda image: np.where(np.arange(image.size).reshape(image.shape) == 4000, 255, image),
}


@pytest.mark.parametrize("copy", COPIES)
def test_a_copy_in_another_split_is_found(copy: str, tmp_path: Path) -> None:
    splits = clean()
    # one slice each: the copy may have another size than its volume
    splits = {name: triplets[1::SLICES] for name, triplets in splits.items()}
    image = COPIES[copy](splits["test"][2].image).astype(np.uint16 if copy == "in 16 bits" else np.uint8)
    splits["train"][7] = replace(splits["train"][7], image=image, targets=())
    report = lint(write(tmp_path, splits))
    near = [finding for finding in report.findings if finding.code == "near-duplicate"]
    assert [(item.severity, item.split, item.key) for item in near] == [("warning", "test", "toy-test-2-1")]
    assert near[0].other is not None and near[0].other[:2] == ("train", "toy-train-7-1")
    assert near[0].value is not None and 0.75 <= near[0].value <= 1
    assert ("mirrored, it is nearly" in near[0].message) == ("mirrored" in copy)


def test_each_slice_of_a_copied_volume_is_said_to_be_a_copy_of_its_own(tmp_path: Path) -> None:
    splits = clean()
    for number in range(SLICES):
        original = splits["train"][SLICES * 4 + number]
        splits["test"][SLICES + number] = replace(splits["test"][SLICES + number], image=jpeg(original.image))
    report = lint(write(tmp_path, splits))
    assert {(item.code, item.key, item.other and item.other.key) for item in report.findings} == {
        ("near-duplicate", f"toy-test-1-{number}", f"toy-train-4-{number}") for number in range(SLICES)
    }


def test_bodies_that_look_alike_are_no_copies(tmp_path: Path) -> None:
    """Coarse shape and brightness are one patient's, the detail is another's: as of two brains in one frame."""
    splits = {name: triplets[1::SLICES] for name, triplets in clean().items()}
    for number, triplet in enumerate(splits["train"]):
        other = splits["test"][number % 4].image.astype(float)
        shape = np.asarray(Image.fromarray(other).resize((8, 8), Image.Resampling.BOX).resize((SIDE, SIDE)))
        rough = np.random.default_rng(number).normal(0, 25, (SIDE // 4, SIDE // 4)).repeat(4, 0).repeat(4, 1)
        splits["train"][number] = replace(triplet, image=(shape + rough).clip(0, 255).astype(np.uint8))
    _, thumbnails = zip(*(fingerprint(splits[name][0].image) for name in ("train", "test")), strict=True)
    assert correlations(*(thumbnail[None] for thumbnail in thumbnails))[0] > 0.85
    assert "near-duplicate" not in {item.code for item in lint(write(tmp_path, splits)).findings}


def test_neighbours_of_one_patient_are_no_duplicates(tmp_path: Path) -> None:
    """A patient in two splits is one finding; that neighbouring slices look alike is none."""
    splits = clean()
    moved = splits["train"].pop(4)
    splits["test"].append(moved)
    report = lint(write(tmp_path, splits))
    assert found(report.findings) == {
        ("error", "patient-in-splits", "test", "", ""),
        ("error", "volume-in-splits", "test", "", ""),
    }


def test_slabs_share_their_patients_by_design(tmp_path: Path) -> None:
    splits = clean()
    splits["test"].append(splits["train"].pop(4))
    report = lint(write(tmp_path, splits, "slabs"))
    assert found(report.findings) == {("note", "patients-shared", "", "", "")}
    assert report.findings[0].message.startswith("1 patient is in several splits, by design")


def test_a_sample_that_cannot_be_read_is_a_finding_and_the_rest_goes_on(tmp_path: Path) -> None:
    splits = clean()
    splits["train"][33] = empty(splits["train"][33])
    write(tmp_path, splits)
    index = ShardDataset(tmp_path / "train").index
    offset, size = index.members(10)["image.png"]
    with (tmp_path / "train" / str(index.shard_names[index.shard[10]])).open("r+b") as file:
        file.seek(offset + size // 2)
        file.write(b"damage")
    (tmp_path / "train" / "shard-000002.tar").unlink()
    report = lint(tmp_path)
    assert found(report.findings) == {
        ("error", "unreadable-sample", "train", "toy-train-3-1", ""),
        ("error", "missing-shard", "train", "", ""),
        ("error", "empty-mask", "train", "toy-train-11-0", "liver"),
    }
    assert [item.value for item in report.findings if item.code == "missing-shard"] == [8]


def test_a_shard_that_was_cut_off_loses_what_lay_behind(tmp_path: Path) -> None:
    write(tmp_path, clean())
    index = ShardDataset(tmp_path / "test").index
    path = tmp_path / "test" / "shard-000001.tar"
    path.write_bytes(path.read_bytes()[: index.members(9)["image.png"][0] + 100])
    before, after = int(index.shard_sizes[1]), path.stat().st_size
    lost = {("error", "unreadable-sample", "test", index.key(number), "") for number in range(9, 12)}
    report = lint(tmp_path)
    assert found(report.findings) == lost | {("error", "damaged-shard", "test", "", "")}
    cut = next(item for item in report.findings if item.code == "damaged-shard")
    assert cut.message.startswith(f"shard-000001.tar: the shard has {after} bytes instead of {before}: copy it again")
    assert cut.value == after
    # what nobody could read was not looked at
    assert {name: (facts.samples, facts.linted) for name, facts in report.splits.items()} == {
        "test": (12, 9),
        "train": (36, 36),
    }
    assert report.remarks == ["3 samples could not be read, and were not looked at."]
    assert report.summary().endswith("4 errors found in 45 of 48 samples of 2 splits.")


def test_one_of_a_kind_is_no_plural(tmp_path: Path) -> None:
    report = lint(write(tmp_path, {"train": clean()["train"][4:5]}))
    assert report.summary().endswith(" found in 1 sample of 1 split.")
    assert [item.message for item in report.findings if item.code == "never-absent"]
    assert (more(0), more(1), more(2)) == (
        "", " (and 1 more slice of its volume)", " (and 2 more slices of its volume)"
    )  # fmt: skip
    splits = clean()
    splits["test"][1] = renamed("spleen", "pancreas")(splits["test"][1])
    write(tmp_path / "b", splits)
    assert "'pancreas' has 1 target here and none in train" in str(lint(tmp_path / "b").findings)


@pytest.mark.parametrize("damage", ["gone", "no index at all"])
def test_a_split_without_an_index_is_a_finding(damage: str, tmp_path: Path) -> None:
    write(tmp_path, clean(), "patients")
    path = tmp_path / "test" / "index.npz"
    path.unlink() if damage == "gone" else path.write_bytes(b"PK nonsense")
    report = lint(tmp_path)
    assert found(report.findings) == {("error", "unreadable-index", "test", "", "")}
    assert report.splits["train"].linted == 36 and report.splits["test"].samples == 0


def test_an_old_index_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, clean())
    monkeypatch.setattr(Index, "is_old", property(lambda self: True))
    report = lint(tmp_path)
    assert found(report.findings) == {("note", "old-index", split, "", "") for split in ("train", "test")}
    assert f"data-shards index {tmp_path / 'train'}" in report.findings[0].message


HOSTILE: dict[str, Callable[[Triplet], Triplet]] = {
    "spacings beyond float32": lambda t: with_origin(t, spacing=(1e300, 5e-324), slice_spacing=1e308),
    "a slice index beyond int32": lambda t: with_origin(t, slice_index=2**40),
    "one pixel": lambda t: replace(t, image=np.full((1, 1), 3, np.uint8), targets=()),
    "one row": lambda t: replace(t, image=np.arange(500, dtype=np.int64)[None], targets=()),
    "NaN only": lambda t: replace(t, image=np.full((9, 9), np.nan, np.float32), targets=()),
    "the largest floats": lambda t: replace(t, image=t.image.astype(np.float64) * 7e305),
    "the largest integers": lambda t: replace(t, image=t.image.astype(np.uint64) << np.uint64(56)),
    "black and white": lambda t: replace(t, image=t.image > 100),
    "half floats in colours": lambda t: replace(t, image=np.repeat(t.image[..., None], 3, 2).astype(np.float16) * 200),
    "a target of every term": lambda t: replace(t, targets=t.targets * 200, looked_for=tuple(map(str, range(999)))),
}


@pytest.mark.parametrize("hostile", HOSTILE)
@pytest.mark.filterwarnings("error::RuntimeWarning:data_shards.lint")
def test_whatever_a_shard_may_hold_ends_in_a_report(hostile: str, tmp_path: Path) -> None:
    splits = clean()
    everywhere(HOSTILE[hostile])(splits)
    report = lint(write(tmp_path, splits))
    assert report.linted == 48 and not report.counts["unreadable-sample", "train"]
    json.dumps(record(report), allow_nan=False)
    assert render(report).endswith("</html>\n")


def test_a_modality_that_is_rare(tmp_path: Path) -> None:
    tiny = Target.from_mask(disc()[::4, ::4], "liver")
    many = [
        replace(clean_one, key=f"toy-{n}", image=picture(n, side=24), targets=(replace(tiny),) if n % 2 else ())
        for n, clean_one in enumerate([clean()["train"][0]] * 101)
    ]
    many = [with_origin(t, patient=f"p{n}", volume=f"v{n}", slice_index=None) for n, t in enumerate(many)]
    many[50] = with_origin(many[50], modality="MR")
    report = lint(write(tmp_path, {"train": many}))
    assert {(item.code, item.term) for item in report.findings} == {("rare-modality", "MR")}


def test_terms_out_of_balance(tmp_path: Path) -> None:
    triplets = []
    for number in range(120):
        one = clean_one(number)
        name = "spleen" if number == 60 else "liver"
        targets = (Target.from_mask(disc()[::4, ::4], name),) if number else ()
        triplets.append(replace(one, image=picture(number, side=24), targets=targets))
    report = lint(write(tmp_path, {"train": triplets}))
    imbalance = [item for item in report.findings if item.code == "imbalance"]
    assert [(item.term, item.value, item.severity) for item in imbalance] == [("spleen", 118, "note")]
    assert {item.code for item in report.findings} == {"imbalance", "rare-term"}


def clean_one(number: int) -> Triplet:
    one = clean_one.__dict__.setdefault("base", clean()["train"][0])
    one = replace(one, key=f"toy-{number}")
    return with_origin(one, patient=f"p{number}", volume=f"v{number}", slice_index=None)


def test_a_built_corpus_reports_what_is_true_of_it(built: Path) -> None:
    """The toy volumes have a cyst of one pixel in one slice each, and nothing else is wrong."""
    report = lint(built)
    codes = {(item.code, item.term) for item in report.findings}
    assert codes == {("degenerate-box", "kidney cyst"), ("rare-term", "kidney cyst")}
    assert [item.severity for item in report.findings] == ["warning"] * 4 + ["note"]
    alone = lint(built / "test")
    assert {item.code for item in alone.findings} == {"degenerate-box"} and list(alone.splits) == ["test"]


def test_a_sliced_specimen_is_noted_once(tmp_path: Path) -> None:
    split = {"kind": "slabs", "start": 0, "stop": 10, "thickness": 3, "guard": 1, "names": ["train", "test"]}
    cases = [{"image": "imgs/{id}.nii.gz", "mask": "gts/{id}_seg.nii.gz", "patient": "^(PAT[0-9]+)_"}]
    build(make_inputs(tmp_path / "in", cases=3, split=split, slices={"keep": "all"}), tmp_path / "out")
    report = lint(tmp_path / "out")
    assert cases and report.total("error") == 0
    assert [item.value for item in report.findings if item.code == "patients-shared"] == [3]


def test_a_part_of_the_samples_is_spread_and_said(tmp_path: Path) -> None:
    splits = clean()
    splits["train"][0] = empty(splits["train"][1])
    splits["train"][0] = replace(splits["train"][0], key="toy-first")
    splits["train"] = [with_origin(t, slice_index=n) for n, t in enumerate(splits["train"])]
    report = lint(write(tmp_path, splits), sample=6)
    assert {name: facts.linted for name, facts in report.splits.items()} == {"test": 2, "train": 4}
    assert report.remarks == [
        "Only 6 of 48 samples, evenly spread, were looked at; what the index tells was checked for all."
    ]
    assert "in 6 of 48 samples of 2 splits" in report.summary()
    everything = lint(tmp_path, sample=1000)
    assert everything.linted == 48 and not everything.remarks


def test_workers_find_the_same(tmp_path: Path) -> None:
    splits = clean()
    splits["train"][AT] = empty(splits["train"][AT])
    splits["train"][3] = replace(splits["train"][3], image=jpeg(splits["test"][0].image))
    write(tmp_path, splits)
    one, two = lint(tmp_path), lint(tmp_path, workers=2)
    assert one.findings == two.findings and len(one.findings) == 2
    assert (one.counts, one.splits, one.remarks) == (two.counts, two.splits, two.remarks)


def test_what_is_ignored_is_not_reported(tmp_path: Path) -> None:
    splits = clean()
    splits["train"][AT] = with_target(empty(splits["train"][AT]), 1, area=3)
    write(tmp_path, splits)
    report = lint(tmp_path, ignore=["empty-mask", "empty-mask"])
    assert {item.code for item in report.findings} == {"wrong-area"}
    assert report.ignored == ("empty-mask",)
    with pytest.raises(UserError, match=r"^no check is called 'empty-masks'; did you mean 'empty-mask'\?$"):
        lint(tmp_path, ignore=["empty-masks"])
    with pytest.raises(UserError, match=r"^0 samples cannot be looked at"):
        lint(tmp_path, sample=0)


def test_every_check_is_planted_somewhere() -> None:
    planted = {code for _, expected in FAULTS.values() for _, code, *_ in expected}
    elsewhere = {"near-duplicate", "patients-shared", "unreadable-sample", "missing-shard", "unreadable-index"}
    elsewhere |= {"rare-modality", "imbalance", "old-index", "damaged-shard"}
    assert planted | elsewhere == set(CHECKS)
    for check in CHECKS.values():
        assert check.about.endswith(".") and check.about.count(". ") == 0
        assert (check.find is None) == (check.scope == "reading")


@pytest.mark.parametrize(
    "term", ["label 1", "mask", "Object", "unknown", "class_3", "7", "ROI 2", "?", "Label_12", "x"]
)
def test_placeholders(term: str) -> None:
    from data_shards.lint.terms import is_placeholder

    assert is_placeholder(term)


def test_no_term_of_the_vocabulary_is_a_placeholder() -> None:
    from data_shards.lint.terms import is_placeholder
    from data_shards.vocabulary import vocabulary

    assert not [name for name in vocabulary().concepts if is_placeholder(name)]
