from __future__ import annotations

import importlib.util
from pathlib import Path

import nibabel
import numpy as np
import pytest
from toy import write_spec

import data_shards
from data_shards.build import build
from data_shards.dataset import ShardDataset
from data_shards.verify import verify

CATALOGUE = Path(data_shards.__file__).parent / "catalogue"


@pytest.mark.skipif(importlib.util.find_spec("nilearn") is None, reason="nilearn is not installed")
def test_white_matter_of_the_template(tmp_path: Path) -> None:
    result = build(CATALOGUE / "icbm152_white_matter.yaml", tmp_path / "out")
    assert {name: split["slices"] for name, split in result.manifest["splits"].items()} == {"train": 50, "test": 43}
    assert verify(tmp_path / "out").problems == []
    train, test = (ShardDataset(tmp_path / "out" / name) for name in ("train", "test"))
    places = [{t.provenance.slice_index for t in dataset} for dataset in (train, test)]
    assert min(abs(a - b) for a in places[0] for b in places[1]) == 3  # two guard slices lie between
    for triplet in train:
        assert triplet.image.shape == (233, 197) and triplet.image.dtype == np.uint8
        assert triplet.provenance.spacing == (1.0, 1.0) and triplet.provenance.modality == "MR"
        (target,) = triplet.targets
        assert target.term == "cerebral white matter"
        # white matter is bright in T1: the mask lies on the image, not beside it
        inside = target.mask() == 1
        assert triplet.image[inside].mean() > 1.2 * triplet.image[~inside & (triplet.image > 0)].mean()


def test_lesions_of_recist(test_data: Path, tmp_path: Path) -> None:
    root = test_data / "ct_lesion_recist_npz"
    result = build(CATALOGUE / "ct_lesion_recist.yaml", tmp_path / "out", root=root)
    assert verify(tmp_path / "out").problems == []
    expected = {"train": "CT_Lesion_000001_02_01_008-023.npz", "test": "CT_Lesion_000009_03_01_036-048.npz"}
    for split, name in expected.items():
        with np.load(root / name) as content:
            images, masks, spacing = content["imgs"], content["gts"], content["spacing"]
        dataset = ShardDataset(tmp_path / "out" / split)
        assert len(dataset) == int((masks == 1).any(axis=(1, 2)).sum()) == result.manifest["splits"][split]["slices"]
        for triplet in dataset:
            number = triplet.provenance.slice_index
            np.testing.assert_array_equal(triplet.image, images[number])
            np.testing.assert_array_equal(triplet.targets[0].mask(), masks[number] == 1)
            assert triplet.provenance.spacing == (spacing[1], spacing[0])


def test_organs_in_a_real_abdomen(test_data: Path, tmp_path: Path) -> None:
    root = test_data / "ct_abdomen_totalseg_nifti"
    case = {"image": "example_ct_sm.nii.gz", "mask": "example_seg.nii.gz", "patient": "example"}
    targets = [
        {"term": "spleen", "value": 1},
        {"term": "right kidney", "value": 2},
        {"term": "left kidney", "value": 3},
        {"term": "liver", "value": 5},
        {"term": "lung", "values": [10, 11, 13, 14]},
    ]
    split = {"kind": "slabs", "thickness": 10, "guard": 2}
    spec = write_spec(tmp_path / "spec.yaml", cases=[case], targets=targets, split=split, modality="CT")
    result = build(spec, tmp_path / "out", root=root)
    assert verify(tmp_path / "out").problems == []
    labels = np.asarray(nibabel.load(root / "example_seg.nii.gz").dataobj)
    used = [number for number in range(labels.shape[2]) if number % 10 < 8]
    for target in targets:
        wanted = target.get("values", [target.get("value")])
        slices = int(np.isin(labels[:, :, used], wanted).any(axis=(0, 1)).sum())
        counts = [info["targets"].get(target["term"], 0) for info in result.manifest["splits"].values()]
        assert sum(counts) == slices > 0
    spacing = set()
    for name in ("train", "test"):
        for triplet in ShardDataset(tmp_path / "out" / name):
            spacing.add((triplet.provenance.spacing, triplet.provenance.slice_spacing))
            middle = {t.term: np.mean([t.box[0], t.box[2]]) / triplet.image.shape[1] for t in triplet.targets}
            # the patient's right is on the left of the picture
            if {"left kidney", "right kidney"} <= middle.keys():
                assert middle["right kidney"] < 0.5 < middle["left kidney"]
            if {"liver", "spleen"} <= middle.keys():
                assert middle["liver"] < middle["spleen"]
    zooms = nibabel.load(root / "example_ct_sm.nii.gz").header.get_zooms()
    ((in_plane, between),) = spacing
    assert (*in_plane, between) == pytest.approx((zooms[1], zooms[0], zooms[2]))
