from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import nibabel
import numpy as np
import pytest
from toy import LPS_AFFINE, SHAPE, make_case, make_inputs, save_nifti, write_spec

from data_shards.build import build, prepare
from data_shards.dataset import ShardDataset
from data_shards.errors import UserError
from data_shards.preprocessing import Window
from data_shards.stage import locked, work_folder
from data_shards.triplet import Triplet
from data_shards.verify import verify


def samples(folder: Path, split: str) -> list[Triplet]:
    return list(ShardDataset(folder / split))


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    """Every path, files with their inode and time: what a build left alone keeps both."""
    found = {path: path.stat() for path in sorted(folder.rglob("*"))}
    return {
        str(path.relative_to(folder)): (stat.st_ino, stat.st_mtime_ns) if path.is_file() else (0, 0)
        for path, stat in found.items()
    }


def test_samples_hold_the_slices_of_the_volume(tmp_path: Path) -> None:
    build(make_inputs(tmp_path, cases=1, split={"kind": "patients", "fractions": {"all": 1.0}}), tmp_path / "out")
    image, labels = make_case(0)
    found = samples(tmp_path / "out", "all")
    assert [triplet.provenance.slice_index for triplet in found] == [2, 3, 4, 5, 6, 7]
    window = Window(level=40, width=400)
    for triplet in found:
        number = triplet.provenance.slice_index
        assert number is not None and triplet.key.endswith(f"-a{number:05d}")
        np.testing.assert_array_equal(triplet.image, window.apply(image)[number])
        assert [target.term for target in triplet.targets] == ["left kidney", "kidney cyst"][: 1 + (number == 4)]
        for target, value in zip(triplet.targets, (1, 2), strict=False):
            np.testing.assert_array_equal(target.mask(), labels[number] == value)
        assert triplet.looked_for == ("left kidney", "kidney cyst")
        assert triplet.targets[0].synonyms[0] == "kidney, left"


def test_provenance_says_where_and_how_but_not_who(tmp_path: Path) -> None:
    build(make_inputs(tmp_path), tmp_path / "out")
    origin = samples(tmp_path / "out", "train")[0].provenance
    assert (origin.dataset, origin.modality, origin.axis) == ("toy", "CT", "axial")
    assert (origin.spacing, origin.slice_spacing) == ((0.75, 0.5), 2.0)
    assert origin.intensity == {"kind": "window", "low": -160.0, "high": 240.0, "range": [0, 255]}
    assert len(origin.source_sha256) == 64
    for path in (tmp_path / "out").rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            assert b"PAT" not in data and str(tmp_path).encode() not in data, path


@pytest.mark.parametrize(
    ("axis", "spacing", "slice_spacing", "count"),
    [("axial", (0.75, 0.5), 2.0, 6), ("coronal", (2.0, 0.5), 0.75, 11), ("sagittal", (2.0, 0.75), 0.5, 4)],
)
def test_physical_spacing_follows_the_axis(
    tmp_path: Path, axis: str, spacing: tuple, slice_spacing: float, count: int
) -> None:
    path = make_inputs(tmp_path, cases=1, slices={"axis": axis}, split={"kind": "patients", "fractions": {"all": 1.0}})
    build(path, tmp_path / "out")
    found = samples(tmp_path / "out", "all")
    assert len(found) == count
    assert {(t.provenance.spacing, t.provenance.slice_spacing) for t in found} == {(spacing, slice_spacing)}


@pytest.mark.parametrize("codes", ["RAS", "LAS", "LPI", "SPR", "AIL"])
def test_any_orientation_gives_the_same_triplets(tmp_path: Path, codes: str) -> None:
    orientations = nibabel.orientations
    split = {"kind": "patients", "fractions": {"all": 1.0}}
    reference = make_inputs(tmp_path / "lps", cases=1, split=split)
    build(reference, tmp_path / "expected")
    for path in (tmp_path / "lps").rglob("*.nii.gz"):
        image = nibabel.load(path)
        turn = orientations.ornt_transform(orientations.io_orientation(image.affine), orientations.axcodes2ornt(codes))
        turned = image.as_reoriented(turn)
        assert "".join(nibabel.aff2axcodes(turned.affine)) == codes
        target = tmp_path / "turned" / path.relative_to(tmp_path / "lps")
        target.parent.mkdir(parents=True, exist_ok=True)
        nibabel.save(turned, target)
    build(reference, tmp_path / "out", root=tmp_path / "turned")
    for expected, found in zip(samples(tmp_path / "expected", "all"), samples(tmp_path / "out", "all"), strict=True):
        np.testing.assert_array_equal(found.image, expected.image)
        assert (found.key, found.targets) == (expected.key, expected.targets)
        assert found.provenance.spacing == expected.provenance.spacing
        assert found.provenance.slice_spacing == expected.provenance.slice_spacing


def test_no_patient_is_in_two_splits(tmp_path: Path) -> None:
    for patient in range(10):
        for scan in ("a", "b"):
            image, labels = make_case(patient)
            save_nifti(tmp_path / "imgs" / f"PAT{patient}_{scan}.nii.gz", image)
            save_nifti(tmp_path / "gts" / f"PAT{patient}_{scan}_seg.nii.gz", labels)
    split = {"kind": "patients", "fractions": {"train": 0.6, "val": 0.2, "test": 0.2}}
    result = build(write_spec(tmp_path / "s.yaml", split=split), tmp_path / "out")
    owners = {name: {t.provenance.patient for t in samples(tmp_path / "out", name)} for name in split["fractions"]}
    assert {name: len(patients) for name, patients in owners.items()} == {"train": 6, "val": 2, "test": 2}
    assert len(set.union(*owners.values())) == 10
    recorded = {name: (info["patients"], info["slices"]) for name, info in result.manifest["splits"].items()}
    assert recorded == {"train": (6, 72), "val": (2, 24), "test": (2, 24)}
    assert verify(tmp_path / "out").problems == []


def test_slabs_keep_their_guard_in_every_volume(tmp_path: Path) -> None:
    split = {"kind": "slabs", "start": 1, "stop": 9, "thickness": 3, "guard": 1}
    build(make_inputs(tmp_path, cases=2, slices={"keep": "all"}, split=split), tmp_path / "out")
    places = {name: {} for name in ("train", "test")}
    for name, found in places.items():
        for triplet in samples(tmp_path / "out", name):
            found.setdefault(triplet.provenance.volume, []).append(triplet.provenance.slice_index)
    assert list(places["train"].values()) == [[1, 2, 7, 8]] * 2
    assert list(places["test"].values()) == [[4, 5]] * 2


def explicit_cases(patients: list[str | None]) -> list[dict]:
    """A case of each patient in turn; the first half of them to train on."""
    return [
        {
            "image": f"imgs/PAT{n}_scan.nii.gz",
            "mask": f"gts/PAT{n}_scan_seg.nii.gz",
            "patient": patient,
            "split": "train" if n < len(patients) / 2 else "test",
        }
        for n, patient in enumerate(patients)
    ]


def test_a_patient_in_two_splits_is_refused_and_named(tmp_path: Path) -> None:
    make_inputs(tmp_path, cases=8)
    names = ["Ann", "Bob", "Cem", "Dan"]
    path = write_spec(tmp_path / "s.yaml", cases=explicit_cases([*names, *names[::-1]]), split={"kind": "explicit"})
    with pytest.raises(UserError) as caught:
        build(path, tmp_path / "out")
    assert str(caught.value) == (
        f"{path}: split: patients in more than one split, which would flatter every score: 'Ann' (test, train), "
        "'Bob' (test, train), 'Cem' (test, train) and 1 more: give all cases of a patient one split"
    )
    assert not (tmp_path / "out").exists()
    path = write_spec(path, cases=explicit_cases(["a", "a", "b", "b"]), split={"kind": "explicit"})
    result = build(path, tmp_path / "out")
    assert {name: split["patients"] for name, split in result.manifest["splits"].items()} == {"train": 1, "test": 1}
    assert result.manifest["notes"] == []


def test_where_no_patient_is_known_the_manifest_says_so(tmp_path: Path) -> None:
    make_inputs(tmp_path, cases=4)
    for patients, note in [
        ([None] * 4, "no patient is known"),
        ([None, "a", "b", "b"], "the patient of 1 case is not known"),
    ]:
        path = write_spec(tmp_path / "s.yaml", cases=explicit_cases(patients), split={"kind": "explicit"})
        manifest = build(path, tmp_path / "out", overwrite=True).manifest
        told = "split by image or series, and those of one patient may be in several splits"
        assert manifest["notes"] == [f"{note}: {told}"]
        unknown = [source for source in manifest["sources"] if not source.get("patient_known", True)]
        assert len(unknown) == patients.count(None)


def test_small_targets_are_dropped_counted_and_not_negatives(tmp_path: Path) -> None:
    result = build(make_inputs(tmp_path, slices={"min_area": 2}), tmp_path / "out")
    assert result.manifest["dropped_targets"] == {"kidney cyst": 4}
    found = [*samples(tmp_path / "out", "train"), *samples(tmp_path / "out", "test")]
    assert all(target.term == "left kidney" for triplet in found for target in triplet.targets)
    for triplet in found:
        both = triplet.provenance.slice_index != 4
        assert triplet.looked_for == (("left kidney", "kidney cyst") if both else ("left kidney",))


def test_slices_start_stop_step_and_negatives(tmp_path: Path) -> None:
    slices = {"start": 1, "stop": 10, "step": 3, "keep": "all"}
    build(make_inputs(tmp_path, cases=2, slices=slices), tmp_path / "out")
    found = samples(tmp_path / "out", "test")
    assert [(t.provenance.slice_index, len(t.targets)) for t in found] == [(1, 0), (4, 2), (7, 1)]
    assert found[0].looked_for == ("left kidney", "kidney cyst")


@pytest.mark.parametrize("dtype", ["int16", "uint64", "float32", "bool"])
def test_npz_with_labels_of_any_type(tmp_path: Path, dtype: str) -> None:
    image, labels = make_case(0)
    labels = (labels == 1).astype(dtype)
    np.savez(tmp_path / "a.npz", imgs=image.astype(">i2"), gts=labels, spacing=[0.5, 0.75, 2.0])
    case = {"image": "a.npz", "mask": "a.npz", "patient": "p"}
    targets = [{"term": "left kidney", "values": [1, 5]}]
    split = {"kind": "slabs", "thickness": 5, "guard": 1}
    path = write_spec(tmp_path / "s.yaml", cases=[case], targets=targets, intensity=None, split=split)
    build(path, tmp_path / "out")
    triplet = samples(tmp_path / "out", "train")[0]
    assert triplet.image.dtype == np.dtype("int16")
    np.testing.assert_array_equal(triplet.image, image[2])
    np.testing.assert_array_equal(triplet.targets[0].mask(), labels[2].astype(np.uint8))


def test_a_probability_map_is_cut_above(tmp_path: Path) -> None:
    image, _ = make_case(0)
    chance = np.random.default_rng(0).random(SHAPE).astype(np.float32)
    save_nifti(tmp_path / "i.nii", image)
    save_nifti(tmp_path / "m.nii", chance)
    case = {"image": "i.nii", "mask": "m.nii", "patient": "p"}
    targets = [{"term": "white matter", "above": 0.5}]
    path = write_spec(tmp_path / "s.yaml", cases=[case], targets=targets, split={"kind": "slabs"})
    with pytest.raises(UserError, match="split 'test' got no slice: widen"):
        build(path, tmp_path / "out")
    build(
        write_spec(tmp_path / "s.yaml", cases=[case], targets=targets, split={"kind": "slabs", "thickness": 5}),
        tmp_path / "out",
    )
    np.testing.assert_array_equal(samples(tmp_path / "out", "train")[1].targets[0].mask(), chance[1] > 0.5)


def test_the_order_of_the_cases_does_not_matter(tmp_path: Path) -> None:
    make_inputs(tmp_path / "in")
    cases = [
        {"image": f"imgs/PAT{n}_scan.nii.gz", "mask": f"gts/PAT{n}_scan_seg.nii.gz", "patient": f"{n}"}
        for n in range(4)
    ]
    for name, some in (("one", cases), ("two", cases[::-1])):
        build(write_spec(tmp_path / "in" / f"{name}.yaml", cases=some), tmp_path / name)
    for path in (tmp_path / "one").rglob("*.*"):
        assert path.read_bytes() == (tmp_path / "two" / path.relative_to(tmp_path / "one")).read_bytes()
    keys = [triplet.key for triplet in samples(tmp_path / "one", "train")]
    assert keys == sorted(keys)


def test_second_build_reuses(tmp_path: Path) -> None:
    path = make_inputs(tmp_path / "in")
    first = build(path, tmp_path / "out")
    before = tree(tmp_path / "out")
    for overwrite in (False, True):
        again = build(path, tmp_path / "out", overwrite=overwrite)
        assert (first.reused, again.reused) == (False, True)
        assert again.manifest == first.manifest and tree(tmp_path / "out") == before


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"slices": {"min_area": 2}}, "'slices' in the spec"),
        ({"targets": [{"term": "left kidney", "value": 1}]}, "'targets' in the spec"),
        ({"salt": "secret"}, "the salt"),
        ({"cases": [{"image": "imgs/{id}_scan.nii.gz", "mask": "gts/{id}_scan_seg.nii.gz", "patient": "{id}"}]},
         "4 cases added, 4 cases gone"),
        ({"cases": [{"image": "imgs/{id}.nii.gz", "mask": "gts/{id}_seg.nii.gz", "patient": "{id}"}]},
         "4 cases changed"),
    ],
)  # fmt: skip
def test_another_corpus_is_not_overwritten_by_accident(tmp_path: Path, changes: dict, difference: str) -> None:
    build(make_inputs(tmp_path / "in"), tmp_path / "out")
    before = tree(tmp_path / "out")
    path = write_spec(tmp_path / "in" / "toy.yaml", **changes)
    with pytest.raises(UserError) as caught:
        build(path, tmp_path / "out")
    assert f"out: holds another corpus; what differs: {difference}: pass --overwrite" in str(caught.value)
    assert tree(tmp_path / "out") == before
    assert build(path, tmp_path / "out", overwrite=True).reused is False
    assert verify(tmp_path / "out").problems == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


def test_a_changed_file_and_a_damaged_corpus_are_rebuilt_on_request(tmp_path: Path) -> None:
    path = make_inputs(tmp_path / "in")
    build(path, tmp_path / "out")
    save_nifti(tmp_path / "in" / "imgs" / "PAT1_scan.nii.gz", make_case(9)[0])
    with pytest.raises(UserError, match="what differs: 1 case changed: pass --overwrite"):
        build(path, tmp_path / "out")
    build(path, tmp_path / "out", overwrite=True)
    (tmp_path / "out" / "train" / "shard-000000.tar").unlink()
    with pytest.raises(UserError, match=r"damage \(.*shard is missing.*pass --overwrite"):
        build(path, tmp_path / "out")
    build(path, tmp_path / "out", overwrite=True)
    (tmp_path / "out" / "manifest.json").write_text('{"splits": {}')
    with pytest.raises(UserError, match=r"manifest\.json: damaged manifest.*--overwrite"):
        build(path, tmp_path / "out")
    build(path, tmp_path / "out", overwrite=True)
    assert verify(tmp_path / "out").problems == []


def test_what_is_no_corpus_is_never_overwritten(tmp_path: Path) -> None:
    path = make_inputs(tmp_path / "in")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").touch()
    (tmp_path / "file").touch()
    for name in ("out", "file"):
        with pytest.raises(UserError, match=f"{name}: exists and is no corpus: choose another --out"):
            build(path, tmp_path / name, overwrite=True)
    assert (tmp_path / "out" / "thesis.tex").exists()
    (tmp_path / "empty").mkdir()
    assert not build(path, tmp_path / "empty").reused


def test_the_corpus_lies_where_a_link_points(tmp_path: Path) -> None:
    path = make_inputs(tmp_path / "in")
    (tmp_path / "disk" / "corpus").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "corpus")
    build(path, tmp_path / "link")
    path = write_spec(path, slices={"step": 2})
    build(path, tmp_path / "link", overwrite=True)
    assert (tmp_path / "link").is_symlink() and verify(tmp_path / "link").problems == []
    assert [entry.name for entry in (tmp_path / "disk").iterdir()] == ["corpus"]


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    path = make_inputs(tmp_path / "in")
    (tmp_path / "file").touch()
    with pytest.raises(UserError) as caught:
        build(path, tmp_path / "file" / "deep" / "out")
    assert str(caught.value) == (f"{tmp_path}/file/deep/out: cannot be written (Not a directory): choose another --out")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file", "in"]


def fail_after(calls: int, error: BaseException) -> object:
    count = 0

    def write(*_: object, **__: object) -> None:
        nonlocal count
        count += 1
        if count > calls:
            raise error

    return write


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), RuntimeError("bug")])
@pytest.mark.parametrize("place", ["tarfile.TarFile.addfile", "os.fsync", "data_shards.manifest.write"])
@pytest.mark.parametrize("before", [False, True])
def test_a_failed_build_leaves_nothing_but_finished_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, error: BaseException, before: bool
) -> None:
    path = make_inputs(tmp_path / "in")
    out = tmp_path / "made" / "deep" / "out"
    if before:
        build(path, out)
        write_spec(path, slices={"step": 2})
    state = tree(tmp_path)
    error = type(error)(*error.args)  # with no notes of another test
    monkeypatch.setattr(place, fail_after(3 if "addfile" in place else 0, error))
    with pytest.raises(UserError if isinstance(error, OSError) else type(error)) as caught:
        build(path, out, overwrite=True)
    if isinstance(error, OSError):
        assert str(caught.value) == f"{out}: cannot be written (No space left on device): choose another --out"
    kept = 2 if "manifest" in place else 0
    work = out.with_name(".out.partial")
    told = f"2 of 2 blocks are finished and kept in {work}: the same command goes on from there"
    assert getattr(caught.value, "__notes__", []) == ([told] if kept else [])
    left = {name: value for name, value in tree(tmp_path).items() if ".out.partial" not in name}
    if kept and not before:
        assert left.keys() - state.keys() == {"made", "made/deep"}
    else:
        assert left == state and (tmp_path / "made").exists() == before
    assert work.exists() == bool(kept)
    monkeypatch.undo()
    again = build(path, out, overwrite=True)
    assert not again.reused and again.effort.resumed == kept
    assert [entry.name for entry in out.parent.iterdir()] == ["out"]


def test_a_failed_swap_puts_the_old_corpus_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_inputs(tmp_path / "in")
    build(path, tmp_path / "out")
    write_spec(path, slices={"step": 2})
    state = tree(tmp_path)
    rename = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if self.name == "corpus" and Path(target).name == "out":
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(UserError, match=r"cannot be written \(Input/output error\)"):
        build(path, tmp_path / "out", overwrite=True)
    assert {name: value for name, value in tree(tmp_path).items() if ".out.partial" not in name} == state


WAITING = """
import sys, time
from pathlib import Path
import data_shards.build
from data_shards.cli import main

def wait(*_, **__):
    Path(sys.argv[1]).touch()
    time.sleep(60)

setattr(sys.modules[sys.argv[2].rpartition(".")[0]], sys.argv[2].rpartition(".")[2], wait)
sys.exit(main(["build", *sys.argv[3:]]))
"""


def start_and_signal(tmp_path: Path, path: Path, number: int, place: str) -> subprocess.Popen[str]:
    """Start a build, send it a signal when it comes to a function, and wait for its end."""
    begun = tmp_path / "in" / f"begun{number}"
    command = [sys.executable, "-c", WAITING, str(begun), place, str(path), "--out", str(tmp_path / "new" / "out")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    limit = time.monotonic() + 30
    while not begun.exists() and time.monotonic() < limit:
        time.sleep(0.02)
    assert begun.exists() and (tmp_path / "new" / ".out.partial").exists()
    process.send_signal(number)
    process.wait(30)
    return process


def test_a_build_terminated_before_its_first_block_leaves_nothing(tmp_path: Path) -> None:
    process = start_and_signal(tmp_path, make_inputs(tmp_path / "in"), signal.SIGTERM, "data_shards.blocks.write_index")
    assert process.returncode == 128 + signal.SIGTERM and process.communicate()[1] == ""
    assert [entry.name for entry in tmp_path.iterdir()] == ["in"]


def test_a_terminated_build_goes_on_from_its_blocks(tmp_path: Path) -> None:
    path, out = make_inputs(tmp_path / "in"), tmp_path / "new" / "out"
    process = start_and_signal(tmp_path, path, signal.SIGTERM, "data_shards.build.join")
    assert process.returncode == 128 + signal.SIGTERM
    work = out.with_name(".out.partial")
    assert process.communicate()[1] == (
        f"data-shards: 2 of 2 blocks are finished and kept in {work}: the same command goes on from there\n"
    )
    assert [entry.name for entry in out.parent.iterdir()] == [".out.partial"]
    assert build(path, out).effort.resumed == 2
    assert [entry.name for entry in out.parent.iterdir()] == ["out"]


def test_what_a_killed_build_left_serves_only_the_same_spec(tmp_path: Path) -> None:
    path = make_inputs(tmp_path / "in")
    process = start_and_signal(tmp_path, path, signal.SIGKILL, "data_shards.build.join")
    assert process.returncode == -signal.SIGKILL
    assert process.communicate()[1] == "" and not (tmp_path / "new" / "out").exists()
    (tmp_path / "new" / ".other.partial").mkdir()
    other = write_spec(path.with_name("other.yaml"), slices={"step": 2})
    result = build(other, tmp_path / "new" / "out")
    assert result.effort.resumed == 0 and verify(tmp_path / "new" / "out").problems == []
    assert sorted(entry.name for entry in (tmp_path / "new").iterdir()) == [".other.partial", "out"]


def test_two_builds_of_one_corpus_at_once_are_refused(tmp_path: Path) -> None:
    path, out = make_inputs(tmp_path / "in"), tmp_path / "out"
    with locked(work_folder(out), ""):
        state = tree(tmp_path)
        with pytest.raises(UserError, match="out: another build of it is running: wait for it"):
            build(path, out)
        assert tree(tmp_path) == state
        assert build(path, tmp_path / "other").out.exists()
    assert build(path, out).effort.resumed == 0


def test_a_corpus_taken_away_by_a_killed_swap_comes_back(tmp_path: Path) -> None:
    path, out = make_inputs(tmp_path / "in"), tmp_path / "out"
    build(path, out)
    state = tree(out)
    work_folder(out).mkdir()
    out.rename(work_folder(out) / "old")
    assert build(path, out).reused and tree(out) == state
    assert not work_folder(out).exists()


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    path = make_inputs(tmp_path / "in", split={"kind": "external"})  # one block
    broken = tmp_path / "in" / "imgs" / "PAT3_scan.nii.gz"
    os.truncate(broken, broken.stat().st_size // 2)
    with pytest.raises(UserError, match=r"PAT3_scan\.nii\.gz: cannot be read, is it complete"):
        build(path, tmp_path / "out")
    assert [entry.name for entry in tmp_path.iterdir()] == ["in"]


def test_manifest_is_readable_and_complete(tmp_path: Path) -> None:
    result = build(make_inputs(tmp_path / "in"), tmp_path / "out")
    content = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert content == result.manifest
    assert content["splits"]["train"]["targets"] == {"left kidney": 12, "kidney cyst": 2}
    assert (content["licence"], content["cite"]) == ("test", "nobody")
    assert {"numpy", "nibabel"} <= content["versions"].keys() and len(content["sources"]) == 4
    for name, info in content["splits"].items():
        assert ShardDataset(tmp_path / "out" / name).index.sha256 == info["index_sha256"]


def test_an_oblique_affine_keeps_its_spacing(tmp_path: Path) -> None:
    angle = np.deg2rad(10)
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    affine = LPS_AFFINE.copy()
    affine[:3, :3] = turn @ affine[:3, :3]
    image, labels = make_case(0)
    save_nifti(tmp_path / "imgs" / "PAT1_x.nii.gz", image, affine)
    save_nifti(tmp_path / "gts" / "PAT1_x_seg.nii.gz", labels, affine)
    build(write_spec(tmp_path / "s.yaml", split={"kind": "patients", "fractions": {"all": 1.0}}), tmp_path / "out")
    origin = samples(tmp_path / "out", "all")[0].provenance
    assert origin.spacing == pytest.approx((0.75, 0.5)) and origin.slice_spacing == pytest.approx(2.0)


def mask_with(folder: Path, affine: np.ndarray) -> Path:
    """A spec of one case whose mask has another affine than its image."""
    spec = make_inputs(folder, cases=1, split={"kind": "patients", "fractions": {"all": 1.0}})
    save_nifti(folder / "gts/PAT0_scan_seg.nii.gz", make_case(0)[1], affine)
    return spec


@pytest.mark.parametrize(
    ("wrong", "apart"),
    [
        (LPS_AFFINE + np.array([[0, 0, 0, 12.5]] + [[0] * 4] * 3), "12.5 mm"),  # moved
        (LPS_AFFINE @ np.diag([1, -1, 1, 1]), "17.2 mm"),  # mirrored: the header says front where the image says back
        (np.eye(4), "mm"),  # lost
    ],
)
def test_a_mask_that_lies_elsewhere_is_refused(tmp_path: Path, wrong: np.ndarray, apart: str) -> None:
    spec = mask_with(tmp_path, wrong)
    with pytest.raises(UserError, match="lies elsewhere than its image") as error:
        build(spec, tmp_path / "out")
    assert "PAT0_scan_seg.nii.gz" in str(error.value)
    assert apart in str(error.value)
    assert not (tmp_path / "out").exists()


def test_headers_may_differ_by_rounding(tmp_path: Path) -> None:
    rounded = LPS_AFFINE + np.random.default_rng(0).normal(0, 1e-4, (4, 4)) * [[1], [1], [1], [0]]
    build(mask_with(tmp_path / "a", rounded), tmp_path / "a/out")
    build(mask_with(tmp_path / "b", LPS_AFFINE), tmp_path / "b/out")
    ones, others = samples(tmp_path / "a/out", "all"), samples(tmp_path / "b/out", "all")
    assert len(ones) == len(others) > 0
    for one, other in zip(ones, others, strict=True):
        assert np.array_equal(one.targets[0].mask(), other.targets[0].mask())


def test_image_and_mask_may_be_stored_in_different_orders(tmp_path: Path) -> None:
    """The same place in other axes is the same place."""
    spec = make_inputs(tmp_path, cases=1, split={"kind": "patients", "fractions": {"all": 1.0}})
    build(spec, tmp_path / "plain")
    path = tmp_path / "gts/PAT0_scan_seg.nii.gz"
    mask = nibabel.load(path)
    turn = nibabel.orientations.ornt_transform(
        nibabel.orientations.io_orientation(mask.affine), nibabel.orientations.axcodes2ornt("PIR")
    )
    nibabel.save(mask.as_reoriented(turn), path)
    build(spec, tmp_path / "turned")
    for one, other in zip(samples(tmp_path / "plain", "all"), samples(tmp_path / "turned", "all"), strict=True):
        assert one.targets == other.targets


def test_a_mask_under_another_name_is_another_corpus(tmp_path: Path) -> None:
    for number in range(3):
        image, labels = make_case(number)
        save_nifti(tmp_path / f"i{number}.nii.gz", image)
        save_nifti(tmp_path / f"m{number}.nii.gz", labels)
    targets = [
        {"term": "left kidney", "mask": "left", "value": 1},
        {"term": "right kidney", "mask": "right", "value": 1},
    ]

    def spec(*names: str) -> Path:
        cases = [
            {"image": f"i{n}.nii.gz", "mask": {name: f"m{n}.nii.gz"}, "id": str(n)} for n, name in enumerate(names)
        ]
        return write_spec(tmp_path / "s.yaml", cases=cases, targets=targets, split={"kind": "external"})

    out = tmp_path / "out"
    first = build(spec("left", "right", "left"), out).manifest
    # A stopped build must not go on from blocks of the other.
    names = [[block.name for block in prepare(spec("left", "right", last)).plan.blocks] for last in ("left", "right")]
    assert names[0] != names[1]
    with pytest.raises(UserError, match="1 case changed"):
        build(spec("left", "right", "right"), out)
    second = build(spec("left", "right", "right"), out, overwrite=True).manifest
    count = len(samples(out, "external")) // 3
    assert first["splits"]["external"]["targets"] == {"left kidney": 2 * count, "right kidney": count}
    assert second["splits"]["external"]["targets"] == {"left kidney": count, "right kidney": 2 * count}


def test_what_looks_like_a_mistake_is_told(tmp_path: Path) -> None:
    targets = [{"term": "left kidny", "value": 1}, {"term": "liver", "value": 9}]
    result = build(make_inputs(tmp_path / "in", targets=targets), tmp_path / "out")
    assert result.warnings == (
        "no sample has a target 'liver': is its name or value in the spec right?",
        "term 'left kidny' is not in the vocabulary, and has no synonyms from there; did you mean 'left kidney'?",
    )


def test_other_versions_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, out = make_inputs(tmp_path / "in"), tmp_path / "out"
    build(spec, out)
    assert build(spec, out).warnings == ()
    monkeypatch.setattr("data_shards.manifest._version", lambda name: "99" if name == "pillow" else version(name))
    (warning,) = build(spec, out).warnings
    assert re.search(r"out was built with pillow [\d.]+ \(now 99\): if that matters, remove it", warning)


def test_a_mask_file_under_another_name_is_another_corpus(tmp_path: Path) -> None:
    image, labels = make_case(0)
    save_nifti(tmp_path / "i.nii.gz", image)
    save_nifti(tmp_path / "seg" / "kidney_left.nii.gz", labels)
    targets = [{"term": "left kidney", "name": "kidney_left"}, {"term": "right kidney", "name": "kidney_right"}]
    cases = [{"image": "i.nii.gz", "mask": "seg/*.nii.gz"}]
    spec, out = tmp_path / "s.yaml", tmp_path / "out"
    write_spec(spec, cases=cases, targets=targets, split={"kind": "external"})
    assert build(spec, out).manifest["splits"]["external"]["targets"] == {"left kidney": 6, "right kidney": 0}
    (tmp_path / "seg" / "kidney_left.nii.gz").rename(tmp_path / "seg" / "kidney_right.nii.gz")
    with pytest.raises(UserError, match="1 case changed"):
        build(spec, out)
    found = build(spec, out, overwrite=True).manifest["splits"]["external"]["targets"]
    assert found == {"left kidney": 0, "right kidney": 6}


def test_an_image_in_two_splits_is_refused_and_named(tmp_path: Path) -> None:
    make_inputs(tmp_path, cases=1)
    case = {"image": "imgs/PAT0_scan.nii.gz", "mask": "gts/PAT0_scan_seg.nii.gz"}
    cases = [{**case, "id": name, "split": name} for name in ("train", "test")]
    with pytest.raises(UserError, match=r"PAT0_scan\.nii\.gz is there twice, with the same mask: drop one case"):
        build(write_spec(tmp_path / "s.yaml", cases=cases, split={"kind": "explicit"}), tmp_path / "out")
    shutil.copy(tmp_path / case["mask"], tmp_path / "other.nii.gz")
    cases[1]["mask"] = "other.nii.gz"
    with pytest.raises(UserError, match=r"PAT0_scan\.nii\.gz is the image of cases in test and train"):
        build(write_spec(tmp_path / "s.yaml", cases=cases, split={"kind": "explicit"}), tmp_path / "out")


def test_a_copy_of_an_image_in_another_split_is_told(tmp_path: Path) -> None:
    path = make_inputs(tmp_path, cases=2, split={"kind": "explicit"})
    shutil.copy(tmp_path / "imgs" / "PAT0_scan.nii.gz", tmp_path / "imgs" / "PAT1_scan.nii.gz")
    cases = [
        {"image": f"imgs/PAT{n}_scan.nii.gz", "mask": f"gts/PAT{n}_scan_seg.nii.gz", "patient": f"p{n}", "split": name}
        for n, name in enumerate(("train", "test"))
    ]
    result = build(write_spec(path, cases=cases, split={"kind": "explicit"}), tmp_path / "out")
    assert result.manifest["repeated_images"] == {"in_several_splits": 1, "in_one_split": 0}
    assert any("1 images are in several splits" in warning for warning in result.warnings)


def test_targets_that_fit_nothing_are_named_as_such(tmp_path: Path) -> None:
    targets = [{"term": "spleen", "value": 7}]
    cases = [{"image": "imgs/{id}.nii.gz", "mask": "gts/{id}_seg.nii.gz", "patient": "^(PAT[0-9]+)_"}]
    path = write_spec(make_inputs(tmp_path, cases=2), targets=targets, cases=[{**cases[0], "no_target": "empty"}])
    with pytest.raises(UserError, match="no sample has a target: 20 slices were read: correct 'targets' or 'slices'"):
        build(path, tmp_path / "out")
