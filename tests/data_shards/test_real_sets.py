"""Real images in every format: the areas per target are those that were measured with other tools."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from data_shards.build import build
from data_shards.dataset import ShardDataset
from data_shards.verify import verify
from data_shards.vocabulary import canonical

SPECS = Path(__file__).parent / "specs"
LEVELS = {2: "C2", 3: "C3", 4: "C4", 5: "C5"}


def _areas(corpus: Path) -> tuple[Counter[str], Counter[str]]:
    """Return pixels by term: of whole targets, and of instances."""
    whole, instances = Counter[str](), Counter[str]()
    for folder in sorted(path for path in corpus.iterdir() if path.is_dir()):
        for triplet in ShardDataset(folder):
            for target in triplet.targets:
                (whole if target.kind == "semantic" else instances)[target.term] += target.area
    return whole, instances


def _expected(name: str, record: dict[str, Any]) -> Counter[str]:
    """Return the pixels that the manifest of the test data states, by term."""
    terms = {label.get("value"): label["term"] for label in record["labels"]}
    found = Counter[str]()
    for pair in record["pairs"]:
        found.update({term.partition(" (")[0]: area for term, area in pair.get("area_px", {}).items()})
        found["cell membrane"] += pair.get("area_px_value0_membrane", 0)
        for mask in pair.get("masks", []):
            for value, voxels in mask["label_voxels"].items():
                found[_term(name, mask, int(value), terms)] += voxels
        for mask in pair.get("seg", []):
            for number, voxels in mask["segment_voxels"].items():
                label = mask["segments"][number]
                found[label.lower() if label == "Liver" else f"{label.lower().replace('_', ' ')} shape"] += voxels
        if "rasterised_here" in pair.get("label_voxels", {}):
            found["soft tissue sarcoma"] += pair["label_voxels"]["rasterised_here"]
        elif "label_voxels" in pair:
            found["lesion"] += pair["label_voxels"]["1"]
    return Counter({canonical(term): area for term, area in found.items() if area})


def _term(name: str, mask: dict[str, Any], value: int, terms: dict[Any, str]) -> str:
    if name == "mr_spinal_cord_nifti":
        level = f" at vertebral level {LEVELS[value]}" if "labeled" in mask["file"] else ""
        return f"spinal cord{level}" if mask["describes"] != "spinal cord gray matter" else mask["describes"]
    if name == "microscopy_nuclei_stardist_tif":
        return "cell nucleus"
    if name == "ct_liver_nrrd":
        term = {1: "liver", 2: "spine", 5: "spine"}[value]
        return f"gapped {term}" if "gapped" in mask["file"] else term
    return terms[value]


@pytest.mark.parametrize("name", sorted(path.stem for path in SPECS.glob("*.yaml")))
def test_areas_are_those_of_the_manifest(name: str, test_data: Path, tmp_path: Path) -> None:
    sets = {record["name"]: record for record in json.loads((test_data / "MANIFEST.json").read_text())["sets"]}
    folder = "ct_liver_dicom_seg" if name == "ct_liver_nrrd" else name
    record = sets[folder]
    if name == "ct_liver_nrrd":
        pair = record["pairs"][0]
        wanted = [mask for mask in pair["masks"] if "liver_spine" in mask["file"]]
        record = {**record, "pairs": [{"masks": wanted}]}
    elif name == "ct_liver_dicom_seg":
        record = {**record, "pairs": [{"seg": record["pairs"][0]["seg"]}]}
    build(SPECS / f"{name}.yaml", tmp_path / "out", root=test_data / folder)
    assert verify(tmp_path / "out").problems == []
    whole, instances = _areas(tmp_path / "out")
    assert whole == _expected(name, record)
    if "nuclei" in name:
        overlap = sum(pair.get("overlap_px", 0) for pair in record["pairs"])
        assert instances == Counter({canonical("cell nucleus"): whole.total() + overlap})
    else:
        assert not instances


def test_there_is_a_spec_for_every_set(test_data: Path) -> None:
    names = {path.name for path in test_data.iterdir() if path.is_dir()}
    assert names <= {path.stem for path in SPECS.glob("*.yaml")}
