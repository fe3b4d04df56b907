from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from toy import SHAPE, make_case, save_nifti, write_spec

from data_shards import convert
from data_shards.convert import Conversion
from data_shards.errors import UserError
from data_shards.preprocessing import slices_of
from data_shards.sources import find_sources
from data_shards.spec import Spec, load_spec
from data_shards.triplet import Triplet


def one_case(folder: Path, labels: np.ndarray | None = None, **changes: object) -> tuple[Spec, Conversion]:
    """Write a case and its spec; return the spec and the case, ready to be converted."""
    image, usual = make_case(0)
    save_nifti(folder / "a.nii.gz", image)
    save_nifti(folder / "m.nii.gz", usual if labels is None else labels)
    cases = [{"image": "a.nii.gz", "mask": "m.nii.gz", "patient": "p", "split": "train"}]
    path = write_spec(folder / "s.yaml", **{"cases": cases, "split": {"kind": "explicit"}, **changes})
    return opened(path)


def opened(path: Path) -> tuple[Spec, Conversion]:
    spec = load_spec(path)
    sources = find_sources(spec, path)
    rules = spec.split.assign(sources)
    return spec, Conversion.of(sources[0], rules[0], spec.hasher())


def samples(spec: Spec, case: Conversion) -> list[Triplet]:
    return [triplet for _, triplet in case.samples(spec) if triplet is not None]


def test_neighbours_are_those_that_are_stored(tmp_path: Path) -> None:
    labels = np.zeros(SHAPE, np.uint8)
    labels[[2, 3, 5], 5:9, 5:9] = 1
    found = samples(*one_case(tmp_path, labels))
    assert [triplet.provenance.slice_index for triplet in found] == [2, 3, 5]
    keys = [triplet.key for triplet in found]
    assert [(t.provenance.previous, t.provenance.next) for t in found] == [
        (None, keys[1]),
        (keys[0], None),  # slice 4 is not stored
        (None, None),
    ]
    stepped = samples(*one_case(tmp_path, slices={"keep": "all", "step": 2}))
    assert stepped[1].provenance.previous == stepped[0].key and stepped[1].provenance.next == stepped[2].key


def test_small_volumes_are_dropped_from_every_slice_and_are_no_negatives(tmp_path: Path) -> None:
    spec, case = one_case(tmp_path, slices={"min_voxels": 2, "keep": "all"})
    found = samples(spec, case)
    assert {target.term for triplet in found for target in triplet.targets} == {"left kidney"}
    assert case.dropped["kidney cyst"] == 1
    for triplet in found:
        assert ("kidney cyst" in triplet.looked_for) == (triplet.provenance.slice_index != 4)


def test_targets_at_the_border_are_dropped_on_request(tmp_path: Path) -> None:
    labels = np.zeros(SHAPE, np.uint8)
    labels[1:3, 5:9, 5:9] = 1
    labels[2, 0:3, 5:9] = 2
    spec, case = one_case(tmp_path, labels, slices={"border": "drop", "keep": "all"})
    found = samples(spec, case)
    assert {target.term for triplet in found for target in triplet.targets} == {"left kidney"}
    assert "kidney cyst" not in found[2].looked_for and "kidney cyst" in found[1].looked_for


def test_windows_tile_an_image_and_move_inwards_at_its_edge(tmp_path: Path) -> None:
    spec, case = one_case(tmp_path, patches={"size": 16, "stride": 8}, slices={"keep": "all"})
    found = [triplet for triplet in samples(spec, case) if triplet.provenance.slice_index == 4]
    places = [triplet.provenance.patch for triplet in found]
    assert places == [(0, 0), (0, 4), (8, 0), (8, 4)]  # 24 x 20 pixels
    _, whole_case = one_case(tmp_path / "whole", slices={"keep": "all"})
    whole = samples(spec=load_spec(tmp_path / "whole" / "s.yaml"), case=whole_case)[4]
    kidney = next(target.mask() for target in whole.targets if target.term == "left kidney")
    for (top, left), triplet in zip(places, found, strict=True):
        np.testing.assert_array_equal(triplet.image, whole.image[top : top + 16, left : left + 16])
        cut = kidney[top : top + 16, left : left + 16]
        got = [target.mask() for target in triplet.targets if target.term == "left kidney"]
        assert len(got) == bool(cut.any())
        for mask in got:
            np.testing.assert_array_equal(mask, cut)
    assert len({triplet.key for triplet in samples(spec, case)}) == 4 * SHAPE[0] == case.expected


def test_a_large_window_is_the_image(tmp_path: Path) -> None:
    spec, case = one_case(tmp_path, patches={"size": 1024})
    assert {triplet.image.shape for triplet in samples(spec, case)} == {SHAPE[1:]}


def test_values_without_a_target_are_told(tmp_path: Path) -> None:
    spec, case = one_case(tmp_path, targets=[{"term": "left kidney", "value": 1}])
    samples(spec, case)
    assert case.left_out["masks with the value 2, which no target takes"] == 1
    assert case.left_out["slices without a target"] == SHAPE[0] - 6


def test_only_terms_that_were_looked_for_count(tmp_path: Path) -> None:
    cases = [{"image": "a.nii.gz", "mask": "m.nii.gz", "patient": "p", "split": "train", "looked_for": ["left kidney"]}]
    found = samples(*one_case(tmp_path, cases=cases, slices={"keep": "all"}))
    assert {term for triplet in found for term in triplet.looked_for} == {"left kidney"}
    assert {target.term for triplet in found for target in triplet.targets} == {"left kidney"}


def test_a_volume_that_holds_nothing_is_a_mistake_unless_it_may_be_a_negative(tmp_path: Path) -> None:
    labels = np.zeros(SHAPE, np.uint8)
    with pytest.raises(
        UserError, match=r"m\.nii\.gz: the mask holds none of 'left kidney', 'kidney cyst' \(it is empty\)"
    ):
        samples(*one_case(tmp_path, labels))
    labels[1, 1, 1:3] = 7, 8
    with pytest.raises(UserError, match=r"its values: 7, 8\): correct the targets"):
        samples(*one_case(tmp_path, labels))
    case = {"image": "a.nii.gz", "mask": "m.nii.gz", "patient": "p", "split": "train", "no_target": "skip"}
    spec, conversion = one_case(tmp_path, labels, cases=[case])
    assert samples(spec, conversion) == [] and conversion.left_out["cases without any of the targets"] == 1
    found = samples(*one_case(tmp_path, labels, slices={"keep": "all"}))
    assert len(found) == SHAPE[0] and not any(triplet.targets for triplet in found)


def picture_spec(folder: Path, **changes: object) -> Path:
    targets = [{"term": "polyp", "above": 127}]
    base = {"targets": targets, "intensity": {"kind": "rgb"}, "split": {"kind": "explicit"}, "modality": "endoscopy"}
    return write_spec(folder / "s.yaml", **{**base, **changes})


def test_a_picture_has_no_plane_and_no_neighbours(tmp_path: Path) -> None:
    pytest.importorskip("data_shards.readers.images")
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 3)).astype(np.uint8)
    mask = np.zeros((6, 8), np.uint8)
    mask[2:4, 3:6] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    Image.fromarray(mask).save(tmp_path / "m.png")
    case = {"image": "a.png", "mask": "m.png", "split": "train"}
    (found,) = samples(*opened(picture_spec(tmp_path, cases=[case])))
    origin = found.provenance
    assert (origin.axis, origin.slice_index, origin.previous, origin.next) == ("", None, None, None)
    assert origin.split_unit == "image" and found.key.endswith("-i00000")
    np.testing.assert_array_equal(found.image, pixels)
    np.testing.assert_array_equal(found.targets[0].mask() * 255, mask)
    Image.fromarray(mask * 0).save(tmp_path / "m.png")  # nothing found is a negative, not a mistake
    spec, conversion = opened(picture_spec(tmp_path, cases=[case], slices={"keep": "all"}))
    (negative,) = samples(spec, conversion)
    assert negative.targets == () and negative.looked_for == ("polyp",)


def test_a_missing_mask_means_what_the_spec_says(tmp_path: Path) -> None:
    pytest.importorskip("data_shards.readers.images")
    for name in ("a", "b"):
        Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / f"{name}.png")
    (tmp_path / "gt").mkdir()
    Image.fromarray(np.full((4, 4), 255, np.uint8)).save(tmp_path / "gt" / "a_1.png")
    case = {"image": "{id}.png", "mask": "gt/{id}_*.png", "split": "train"}
    path = picture_spec(tmp_path, cases=[case])
    with pytest.raises(UserError, match=r"gt/b_\*\.png: no such file, the mask of .*b\.png"):
        find_sources(load_spec(path), path)
    path = picture_spec(tmp_path, cases=[{**case, "no_mask": "skip"}])
    skipped: list[str] = []
    assert [source.id for source in find_sources(load_spec(path), path, skipped=skipped)] == ["a"]
    assert skipped == ["b"]
    path = picture_spec(tmp_path, cases=[{**case, "no_mask": "empty"}], slices={"keep": "all"})
    spec = load_spec(path)
    sources = find_sources(spec, path)
    rules = spec.split.assign(sources)
    cases = [Conversion.of(source, rule, spec.hasher()) for source, rule in zip(sources, rules, strict=True)]
    assert [len(samples(spec, item)[0].targets) for item in cases] == [1, 0]
    assert cases[1].mask_sha256 == ""


def test_a_case_can_go_to_another_process_and_tells_nothing_private(tmp_path: Path) -> None:
    spec, case = one_case(tmp_path)
    copy = pickle.loads(pickle.dumps(case))
    assert [triplet.encode() for triplet in samples(spec, copy)] == [
        triplet.encode() for triplet in samples(spec, case)
    ]
    record = str(copy.record())
    assert "a.nii.gz" not in record and str(tmp_path) not in record
    before = case.stamp()
    save_nifti(tmp_path / "a.nii.gz", np.zeros(SHAPE, np.int16))
    assert case.stamp() != before and case.size() == (tmp_path / "a.nii.gz").stat().st_size


def test_the_hash_of_a_header_covers_its_data(tmp_path: Path) -> None:
    import SimpleITK

    image, labels = make_case(0)
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(image), tmp_path / "a.mhd")
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(labels), tmp_path / "m.mha")
    cases = [{"image": "a.mhd", "mask": "m.mha", "patient": "p", "split": "train"}]
    _, case = opened(write_spec(tmp_path / "s.yaml", cases=cases, split={"kind": "explicit"}))
    assert [path.name for path in case.source.image_files] == ["a.mhd", "a.raw"]
    case.hash_files()
    before = case.image_sha256
    data = bytearray((tmp_path / "a.raw").read_bytes())
    data[0] ^= 1
    (tmp_path / "a.raw").write_bytes(data)
    case.hash_files()
    assert case.image_sha256 != before


def test_masks_of_fractions_are_named(tmp_path: Path) -> None:
    labels = make_case(0)[1].astype(np.float32)
    labels[4, 6, 6] = 0.5
    with pytest.raises(UserError, match=r"m\.nii\.gz: its values are no labels"):
        samples(*one_case(tmp_path, labels))


def test_an_atlas_in_many_files_is_not_held_whole(tmp_path: Path) -> None:
    image = make_case(0)[0]
    save_nifti(tmp_path / "a.nii.gz", image)
    for number in range(3):
        mask = np.zeros(SHAPE, np.uint8)
        mask[number + 1, 2:4, 5:8] = 1
        save_nifti(tmp_path / f"m{number}.nii.gz", mask)
    targets = [{"term": "liver", "name": "m0"}, {"term": "spleen", "name": "m2"}]
    cases = [{"image": "a.nii.gz", "mask": "m*.nii.gz", "split": "train"}]
    spec, case = opened(write_spec(tmp_path / "s.yaml", cases=cases, targets=targets, split={"kind": "explicit"}))
    read = convert._Case(spec, case)
    assert [sheet.layer.values.size for sheet in read.drawings._sheets[""]] == [6, 6, 6]
    found = samples(spec, case)
    assert [(item.provenance.slice_index, item.targets[0].term, item.targets[0].box) for item in found] == [
        (1, "liver", (5, 2, 7, 3)),
        (3, "spleen", (5, 2, 7, 3)),
    ]
    assert all(item.looked_for == ("liver", "spleen") for item in found)


@pytest.mark.parametrize("second", ["ct", "1.2.840.113", "b.dcm"])
def test_identifiers_of_dicom_need_a_salt_whatever_comes_first(tmp_path: Path, second: str) -> None:
    (tmp_path / "ct").mkdir()
    for name in ("a.png", "b.dcm", "1.2.840.113", "c.jpg", "m.png"):
        (tmp_path / name).touch()
    cases = [{"image": name, "mask": "m.png"} for name in ("a.png", second, "c.jpg")]
    changes = {"cases": cases, "split": {"kind": "external"}}
    path = write_spec(tmp_path / "s.yaml", **changes)
    with pytest.raises(UserError, match="hashed with a private key: add 'salt_env"):
        find_sources(load_spec(path), path)
    path = write_spec(tmp_path / "s.yaml", **changes, salt="public")
    assert len(find_sources(load_spec(path), path)) == 3


def random_recipe(rng: np.random.Generator) -> dict:
    """Slices, windows, split and targets in any combination."""
    slices = {"axis": str(rng.choice(["axial", "coronal", "sagittal"])), "keep": str(rng.choice(["all", "nonempty"]))}
    numbers = {"start": rng.integers(2), "step": rng.integers(1, 3), "min_area": rng.integers(1, 4)}
    border = {"border": str(rng.choice(["keep", "drop"])), "min_voxels": int(rng.choice([1, 1, 10]))}
    size = int(rng.integers(2, 7))
    slabs = {"kind": "slabs", "thickness": 3, "guard": int(rng.integers(2))}
    return {
        "slices": {**slices, **border, **{name: int(number) for name, number in numbers.items()}},
        "patches": {"size": size, "stride": int(rng.integers(1, size + 1))} if rng.random() < 0.5 else None,
        "split": slabs if rng.random() < 0.5 else {"kind": "external"},
        "intensity": {"kind": "none"},
        "targets": [
            {"term": "left kidney", "values": [1, -3]},
            {"term": "kidney cyst", "value": 2},
            {"term": "kidney", "instances": "values"},
        ],
    }


@pytest.mark.parametrize("seed", range(12))
def test_any_recipe_gives_what_was_drawn(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels = np.zeros(SHAPE, np.int16)
    for value in (1, 2, -3):
        z, y, x = (int(rng.integers(side)) for side in SHAPE)
        labels[z : z + 4, y : y + 5, x : x + 3] = value
    recipe = random_recipe(rng)
    cases = [{"image": "a.nii.gz", "mask": "m.nii.gz"}]
    spec, case = one_case(tmp_path, labels, **recipe, cases=cases)
    images, drawn = (slices_of(array, spec.slices.axis) for array in (make_case(0)[0], labels))
    found = [(split, sample) for split, sample in case.samples(spec) if sample is not None]
    by_key = {sample.key: (split, sample) for split, sample in found}
    assert len(by_key) == len(found)
    for split, sample in found:
        origin, (height, width) = sample.provenance, sample.image.shape
        top, left = origin.patch or (0, 0)
        assert origin.slice_index is not None
        place = np.s_[origin.slice_index, top : top + height, left : left + width]
        np.testing.assert_array_equal(sample.image, images[place])
        for target in spec.targets:
            rules = [target.labels() or [1, 2, -3], *([[value] for value in (-3, 1, 2)] * (target.term == "kidney"))]
            masks = [np.isin(drawn[place], rule) for rule in rules]
            kept = [mask for mask, rule in zip(masks, rules, strict=True) if is_kept(mask, labels, rule, spec)]
            mine = [item.mask() for item in sample.targets if item.term == target.term]
            assert [mask.tolist() for mask in mine] == [mask.astype(int).tolist() for mask in kept]
            assert (target.term in sample.looked_for) == bool(kept or not masks[0].any())
        for step, key in ((-1, origin.previous), (1, origin.next)):
            beside = (split, origin.slice_index + step * spec.slices.step, origin.patch)
            there = [name for name, (part, other) in by_key.items()
                     if (part, other.provenance.slice_index, other.provenance.patch) == beside]  # fmt: skip
            assert there == ([] if key is None else [key])


def is_kept(mask: np.ndarray, labels: np.ndarray, rule: list[int], spec: Spec) -> bool:
    inner = np.zeros_like(mask)
    inner[1:-1, 1:-1] = True
    large = mask.sum() >= spec.slices.min_area and np.isin(labels, rule).sum() >= spec.slices.min_voxels
    return bool(mask.any() and large and not (spec.slices.border == "drop" and mask[~inner].any()))


@pytest.mark.parametrize("no_mask", ["error", "empty"])
def test_a_mask_is_never_taken_for_an_image(tmp_path: Path, no_mask: str) -> None:
    for name in ("a", "b", "a_mask", "b_mask"):
        Image.new("L", (4, 4)).save(tmp_path / f"{name}.png")
    case = {"image": "{id}.png", "mask": "{id}_mask.png", "no_mask": no_mask}
    path = picture_spec(tmp_path, cases=[{**case, "only": "^.$"}])
    assert [source.id for source in find_sources(load_spec(path), path)] == ["a", "b"]
    path = picture_spec(tmp_path, cases=[case])
    with pytest.raises(UserError, match="a_mask.png is taken for an image, and is the mask of 'a'" if no_mask == "empty"
                       else "no such file, the mask of"):  # fmt: skip
        find_sources(load_spec(path), path)


def test_one_patient_is_one_whether_cases_are_listed_or_found(tmp_path: Path) -> None:
    for name in ("P1_a", "P1_b"):
        Image.new("L", (4, 4)).save(tmp_path / f"{name}.png")
    cases = [
        {"image": "P1_a.png", "mask": "P1_a.png", "patient": "=P1"},
        {"image": "{id}.png", "mask": "{id}.png", "only": "_b", "patient": "^(P.)_"},
    ]
    path = picture_spec(tmp_path, cases=cases)
    assert {source.patient for source in find_sources(load_spec(path), path)} == {"P1"}
