from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

import data_shards
from data_shards.sources import find_sources
from data_shards.spec import load_spec
from data_shards.splits import External
from data_shards.vocabulary import canonical, known

FOLDER = Path(data_shards.__file__).parent / "catalogue"
SPECS = {path.stem: load_spec(path) for path in sorted(FOLDER.glob("*.yaml"))}
RUN_ON_REAL_FILES = {"icbm152_white_matter", "ct_lesion_recist"}

# Table 1 of Medical SAM3 (arXiv:2601.10880): images and annotations.
MEDICAL_SAM3 = {
    "COVID-QU-Ex": (33920, 67839),
    "Chest Xray Masks and Labels": (704, 1415),
    "Chest X-Ray Pneumothorax": (290, 370),
    "BTXRD": (3746, 2273),
    "ARCADE": (1500, 2316),
    "BUSI": (647, 647),
    "BUS-UCLM": (264, 281),
    "US-Nerve": (2323, 2323),
    "ACOUSLIC": (300, 300),
    "PS-FH-AOP 2023": (4000, 3999),
    "CT2USforKidneySeg": (4586, 4601),
    "SegThy": (59, 130),
    "CholecSeg8k": (8080, 112521),
    "m2caiSeg": (614, 804),
    "PolypGen": (1710, 2003),
    "BKAI-IGH NeoPolyp": (1000, 1117),
    "Kvasir-SEG": (1000, 1060),
    "PanNuke": (2540, 21978),
    "MoNuSeg": (82, 2887),
    "Breast Cancer Segmentation": (151, 3495),
    "GlaS@MICCAI'2015": (165, 1538),
    "MUCIC Colon Tissue": (60, 12396),
    "MUCIC HL60 Granulocytes": (240, 3987),
    "NucMM-Z": (62, 581),
    "UroCell": (5, 163),
    "PCMMD": (3517, 3519),
    "Intraretinal Cystoid Fluid": (1459, 4601),
    "PAPILA": (488, 488),
    "COph100": (324, 324),
    "RAVIR": (23, 141),
    "DRIVE": (20, 20),
    "ISIC 2018": (2594, 2594),
    "FetoPlac": (483, 994),
}
MEDICAL_SAM3_EXTERNAL = {"TN3K", "HC18", "CVC-ClinicDB", "ETIS-Larib", "PH2", "CHASE_DB1", "STARE"}


@pytest.mark.parametrize("name", SPECS)
def test_an_entry_says_what_it_is(name: str) -> None:
    spec, text = SPECS[name], (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")
    assert name == name.lower() and "-" not in name and spec.dataset == name.replace("_", "-")
    assert spec.title and spec.licence and spec.cite and spec.homepage.startswith("http")
    assert spec.papers or name == "icbm152_white_matter"
    assert "verified: " in text and spec.verified == (name in RUN_ON_REAL_FILES)
    for target in yaml.safe_load(text)["targets"]:
        assert known(target["term"]) and canonical(target["term"]) == target["term"], target["term"]
    assert len({spec.title for spec in SPECS.values()}) == len(SPECS)


def test_the_sets_of_medical_sam3() -> None:
    found = {spec.title: spec for spec in SPECS.values() if "Medical SAM3" in spec.papers}
    assert found.keys() == MEDICAL_SAM3.keys()
    for title, counts in MEDICAL_SAM3.items():
        expected = found[title].expected
        assert expected is not None and (expected.images, expected.masks) == counts, title
        assert found[title].split.kind == "medical_sam3"
    images, masks = (sum(numbers) for numbers in zip(*MEDICAL_SAM3.values(), strict=True))
    assert (len(found), images, masks) == (33, 76_956, 263_705)


def test_the_external_sets_of_medical_sam3() -> None:
    found = {spec.title: spec for spec in SPECS.values() if "Medical SAM3, external" in spec.papers}
    assert found.keys() == MEDICAL_SAM3_EXTERNAL
    assert all(spec.split == External() for spec in found.values())


def test_the_sets_of_medsam() -> None:
    for spec in SPECS.values():
        if "Medical SAM3" not in spec.papers and "Medical SAM3, external" not in spec.papers:
            kinds = {"MedSAM": "medsam", "MedSAM, external": "external"}
            assert all(spec.split.kind == kinds[paper] for paper in spec.papers if paper in kinds), spec.title
    flare = SPECS["flare22"]
    assert {target.term: target.value for target in flare.targets} == {
        "liver": 1,
        "right kidney": 2,
        "spleen": 3,
        "pancreas": 4,
        "aorta": 5,
        "inferior vena cava": 6,
        "right adrenal gland": 7,
        "left adrenal gland": 8,
        "gallbladder": 9,
        "esophagus": 10,
        "stomach": 11,
        "duodenum": 12,
        "left kidney": 13,
    }


# What the placeholders of those entries stand for that say more of them than their place.
EXAMPLES = {
    "acdc": {"patient": "patient001", "frame": "01"},
    "amos_ct": {"part": "Tr", "id": "0001"},
    "amos_mr": {"part": "Va", "id": "0507"},
    "brats2023_gli": {"id": "BraTS-GLI-00000-000"},
    "breast_cancer_segmentation": {"id": "TCGA-A1-A0SK-DX1_xmin45749_ymin25055_MPP-0.2500"},
    "btxrd": {"*": "e"},
    "bus_uclm": {"id": "ALWI_000"},
    "busi": {"kind": "benign", "id": "benign (1)"},
    "chase_db1": {"id": "Image_01L"},
    "chest_xray_pneumothorax": {"id": "7_test_1_"},
    "coph100": {"eye": "001_left", "id": "001_F_GA41_S01_1"},
    "ct_lymph_nodes": {"id": "MED_LYMPH_001"},
    "glas": {"id": "testA_1"},
    "hc18": {"id": "010_2"},
    "intraretinal_cystoid_fluid": {"*": "scan.png"},
    "m2caiseg": {"part": "trainval", "id": "1_125"},
    "mms2": {"patient": "001", "view": "SA", "phase": "ED"},
    "monuseg": {"id": "TCGA-A7-A13E-01Z-00-DX1"},
    "papila": {"id": "RET002OD"},
    "promise12": {"id": "00"},
    "segthy": {"id": "001_P1_1_left"},
    "us_nerve": {"patient": "1", "number": "1"},
}
ELSEWHERE = {*RUN_ON_REAL_FILES, "chest_xray_masks_and_labels"}  # single files, and two patterns that differ in the id


@pytest.mark.parametrize("name", sorted(SPECS.keys() - ELSEWHERE))
def test_an_entry_finds_the_files_of_its_own_layout(name: str, tmp_path: Path) -> None:
    spec, example = SPECS[name], EXAMPLES.get(name, {})

    def touch(text: str) -> None:
        filled = re.sub(r"\{(\w+)\}", lambda match: example.get(match[1], "a1"), text).replace(
            "*", example.get("*", "x")
        )
        path = tmp_path / filled
        if not path.suffix:  # the folder of a DICOM series
            path /= "1-01.dcm"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()

    for case in spec.cases:
        for text in (case.image, *(case.mask.values() if isinstance(case.mask, dict) else [case.mask])):
            touch(text)
    skipped: list[str] = []
    sources = find_sources(spec, FOLDER / f"{name}.yaml", tmp_path, skipped)
    assert len(sources) == len(spec.cases) and not skipped
    for source, case in zip(sources, spec.cases, strict=True):
        assert all(source.masks.values()) and source.patient_known == (case.patient is not None)
