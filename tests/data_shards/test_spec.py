from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from toy import base_spec, make_inputs, write_spec

import data_shards
from data_shards.errors import UserError
from data_shards.preprocessing import Percentiles, Window
from data_shards.sources import find_sources
from data_shards.spec import load_spec
from data_shards.splits import Explicit, Slabs
from data_shards.vocabulary import normalise, synonyms

CATALOGUE = sorted((Path(data_shards.__file__).parent / "catalogue").glob("*.yaml"))


def test_every_catalogue_spec_is_parsed() -> None:
    assert {"icbm152_white_matter", "ct_lesion_recist"} <= {path.stem for path in CATALOGUE}
    for path in CATALOGUE:
        spec = load_spec(path)
        assert spec.licence and spec.cite, path
        text = path.read_text()
        assert text.startswith("# ") and f"data-shards build data_shards/catalogue/{path.name}" in text


def test_fields_arrive(tmp_path: Path) -> None:
    spec = load_spec(
        write_spec(
            tmp_path / "s.yaml",
            intensity={"kind": "percentiles", "low": 1},
            split={"kind": "slabs", "start": 3, "names": ["a", "b"]},
            slices={"axis": "coronal", "min_area": 5},
        )
    )
    assert spec.intensity == Percentiles(low=1.0)
    assert spec.split == Slabs(start=3, names=["a", "b"])
    assert (spec.slices.axis, spec.slices.min_area, spec.slices.keep) == ("coronal", 5, "nonempty")
    assert spec.targets[0].labels() == [1] and spec.targets[0].synonyms == ["kidney, left", "kidney left"]
    assert isinstance(load_spec(write_spec(tmp_path / "t.yaml", split={"kind": "explicit"})).split, Explicit)


def test_a_number_like_1e_minus_3_is_a_number(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    text = yaml.safe_dump({**base_spec(), "intensity": None})
    path.write_text(text.replace("intensity: null", "intensity: {kind: window, level: 1e-3, width: 2e3}"))
    assert load_spec(path).intensity == Window(level=0.001, width=2000.0)


def target(**changes: object) -> list[dict]:
    return [{"term": "liver", **changes}]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modalty": "CT"}, "unknown key 'modalty'; did you mean 'modality'?"),
        ({"modality": None}, "the key 'modality' is missing"),
        ({"dataset": 7}, "dataset: expected text (quote it), got 7"),
        ({"dataset": "a b"}, "dataset 'a b': use at most 48 letters"),
        ({"targets": target(valeu=1)}, "targets[0]: unknown key 'valeu'; did you mean 'value'?"),
        ({"targets": target(value="one")}, "targets[0].value: expected a whole number, got 'one'"),
        ({"targets": target(value="1")}, "targets[0].value: expected a whole number, got '1'"),
        ({"targets": target(value=True)}, "targets[0].value: expected a whole number, got True"),
        ({"targets": target(values=[1, "x"])}, "targets[0].values: expected a list, each a whole number"),
        (
            {"targets": target()},
            "targets[0]: term 'liver' does not say where it is: give it a value, above, colour or a name",
        ),
        (
            {"targets": target(value=1, above=2)},
            "needs one of value, values, above, below, colour, got value and above",
        ),
        ({"targets": target(value=0)}, "0 is background"),
        ({"targets": target(value=1, synonyms="hepar")}, "targets[0].synonyms: expected a list, each text"),
        ({"targets": target(value=1) * 2}, "term 'liver' is listed twice"),
        ({"targets": {"term": "x"}}, "targets: expected a list, got {'term': 'x'}"),
        ({"targets": target(term="  ", value=1)}, "a term is empty"),
        ({"cases": []}, "cases, targets and modality must not be empty"),
        ({"cases": [{"image": "a.nii"}]}, "cases[0]: the key 'mask' is missing"),
        ({"cases": [{"image": "a", "mask": 3}]}, "cases[0].mask: expected text (quote it) or a mapping of names to"),
        ({"targets": target(colour=[1, 2])}, "colour needs red, green and blue, each 0 to 255, got [1, 2]"),
        ({"targets": target(value=1, instances="values")}, "instances: values takes every value but 0: drop 'value'"),
        ({"targets": target(value=1, instances="each")}, "instances: expected one of none, layers, values, components"),
        (
            {"patches": {"size": 4, "stride": 5}},
            "patches: size must be at least 1 and stride from 1 to size, got 4 and 5",
        ),
        ({"targets": target(value=1, tolerance=3)}, "tolerance goes with a colour, from 0 to 255, got 3"),
        ({"cases": [{"image": "a", "mask": "b", "looked_for": []}]}, "cases[0]: looked_for is empty"),
        ({"cases": [{"image": "a", "mask": {}}]}, "cases[0]: mask names no file"),
        ({"cases": [{"image": "a", "mask": None}]}, "cases[0].mask: expected text (quote it) or a mapping"),
        ({"salt": ""}, "the salt is empty"),
        ({"patches": 512}, "patches: expected a mapping of keys to values, got 512"),
        ({"expected": {"images": "many"}}, "expected.images: expected a whole number, got 'many'"),
        ({"intensity": {"kind": "window", "name": "lung", "level": 3}}, "has its own level and width"),
        ({"intensity": {"kind": "window", "name": "liver"}}, "intensity.name: expected"),
        ({"split": {"kind": "external", "name": "train"}}, "starts with 'external', got 'train'"),
        ({"cases": [{"image": "a", "mask": "b", "patient": 7}]}, "cases[0].patient: expected text (quote it), got 7"),
        ({"intensity": {"kind": "windw"}}, "intensity.kind: unknown kind 'windw'; did you mean 'window'?"),
        ({"intensity": {"level": 3}}, "intensity: expected a mapping with a 'kind'"),
        (
            {"intensity": {"kind": "window", "level": 3}},
            "intensity: a window needs level and width, or a name: soft_tissue, lung",
        ),
        ({"intensity": {"kind": "window", "level": 3, "width": -1}}, "intensity: width must be above 0"),
        ({"intensity": {"kind": "minmax", "width": 1}}, "intensity: unknown key 'width'"),
        ({"slices": {"axis": "axail"}}, "slices.axis: expected one of axial, coronal, sagittal, got 'axail'"),
        ({"slices": {"start": 5, "stop": 5}}, "slices: stop (5) must be above start (5)"),
        ({"split": {"kind": "patient"}}, "split.kind: unknown kind 'patient'; did you mean 'patients'?"),
        ({"split": {"kind": "patients", "fractions": {"a": 0.1}}}, "split: the fractions must add up to 1"),
        (
            {"split": {"kind": "patients", "fractions": {"a": float("nan")}}},
            "split: the fraction of 'a' must be above 0",
        ),
        ({"split": {"kind": "patients", "fractions": {"a": "x"}}}, "split.fractions: expected a mapping of names"),
        ({"shards": {"max_samples": 0}}, "shards: max_samples and max_bytes must be at least 1"),
        ({"salt": "a", "salt_env": "B"}, "salt and salt_env exclude each other"),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, changes: dict, message: str) -> None:
    path = write_spec(tmp_path / "bad.yaml", **changes)
    with pytest.raises(UserError) as caught:
        load_spec(path)
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"{path}: ")


def test_files_that_are_no_spec(tmp_path: Path) -> None:
    for content, message in [
        ("a: [1", "not valid YAML"),
        ("a: 1\nb:\n  c: 1\n  c: 2\n", r"the key 'c' is given twice \(line 3 and below\): merge the two"),
        ("- 1", "expected a mapping"),
        ("", "expected a mapping"),
    ]:
        (tmp_path / "s.yaml").write_text(content)
        with pytest.raises(UserError, match=message):
            load_spec(tmp_path / "s.yaml")
    with pytest.raises(UserError, match="no such spec file"):
        load_spec(tmp_path / "none.yaml")


def test_pattern_finds_cases_and_patients(tmp_path: Path) -> None:
    path = make_inputs(tmp_path, cases=3)
    sources = find_sources(load_spec(path), path)
    assert [(source.id, source.patient) for source in sources] == [(f"PAT{n}_scan", f"PAT{n}") for n in range(3)]
    assert sources[1].masks == {"": (tmp_path / "gts" / "PAT1_scan_seg.nii.gz",)}
    cases = [{"image": "imgs/{id}_scan.nii.gz", "mask": "gts/{id}_scan_seg.nii.gz", "patient": "hospital-{id}"}]
    template = write_spec(tmp_path / "b.yaml", cases=cases)
    assert find_sources(load_spec(template), template)[0].patient == "hospital-PAT0"


def test_pattern_with_a_folder_per_case(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}_ct.nii.gz").touch()
        (tmp_path / name / "seg.nii.gz").touch()
    (tmp_path / "a" / "b_ct.nii.gz").touch()  # not of this folder: both {id} are the same text
    cases = [{"image": "{id}/{id}_ct.nii.gz", "mask": "{id}/seg.nii.gz", "patient": "{id}"}]
    path = write_spec(tmp_path / "s.yaml", cases=cases)
    assert [source.id for source in find_sources(load_spec(path), path)] == ["a", "b"]


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ({"image": "nope/{id}.nii", "mask": "m/{id}.nii"}, "no file fits 'nope/{id}.nii'; "),
        ({"image": "imgs/{id}.nii.gz", "mask": "mask.nii"}, "its mask 'mask.nii' needs its placeholders too"),
        (
            {"image": "imgs/{di}.nii.gz", "mask": "gts/{id}_seg.nii.gz"},
            "'{id}' in 'gts/{id}_seg.nii.gz' stands for nothing",
        ),
        (
            {"image": "imgs/{id}.nii.gz", "mask": "gts/{id}_seg.nii.gz", "only": "CASE"},
            "only 'CASE' fits none of 1 ids",
        ),
        (
            {"image": "imgs/{id}.nii.gz", "mask": "gts/{id}_x*.nii.gz"},
            "gts/PAT0_scan_x*.nii.gz: no such file, the mask of",
        ),
        ({"image": "imgs/{id}.nii.gz", "mask": "gts/{id}.nii.gz"}, "PAT0_scan.nii.gz: no such file"),
        ({"image": "imgs/{id}.nii.gz", "mask": "gts/{id}_seg.nii.gz", "patient": "Q(.)"}, "finds nothing in the id"),
        ({"image": "imgs/{id}.nii.gz", "mask": "gts/{id}_seg.nii.gz", "patient": "("}, "not a regular expression"),
        ({"image": "package://no_such_package/a.nii", "mask": "a.nii"}, "pip install no_such_package"),
        ({"image": "package://nilearn/none.nii", "mask": "toy.yaml"}, "none.nii: no such file"),
        (
            {"image": "toy.yaml", "mask": "toy.yaml", "patient": "{id}"},
            "'{id}' in '{id}' stands for nothing: 'toy.yaml' has no such placeholder",
        ),
        ({"image": "toy.yaml", "mask": "toy.yaml"}, "no reader for '.yaml' files"),
    ],
)
def test_cases_that_lead_nowhere(tmp_path: Path, case: dict, message: str) -> None:
    make_inputs(tmp_path, cases=1)
    path = write_spec(tmp_path / "s.yaml", cases=[{"patient": "{id}" if "{id}" in case["image"] else "p", **case}])
    with pytest.raises(UserError) as caught:
        find_sources(load_spec(path), path)
    assert message in str(caught.value)


def test_ids_must_differ_and_roots_exist(tmp_path: Path) -> None:
    make_inputs(tmp_path, cases=1)
    case = {"image": "imgs/PAT0_scan.nii.gz", "mask": "gts/PAT0_scan_seg.nii.gz", "patient": "p"}
    path = write_spec(tmp_path / "s.yaml", cases=[case, case])
    with pytest.raises(UserError, match=r"two cases have the id 'imgs/PAT0_scan\.nii\.gz'"):
        find_sources(load_spec(path), path)
    path = write_spec(tmp_path / "t.yaml", cases=[case], root="elsewhere")
    with pytest.raises(UserError, match="elsewhere: no such folder"):
        find_sources(load_spec(path), path)
    assert len(find_sources(load_spec(path), path, root=tmp_path)) == 1


def test_hashes_depend_on_the_salt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = load_spec(write_spec(tmp_path / "a.yaml")).hasher()
    assert plain("patient", "p1") == load_spec(write_spec(tmp_path / "b.yaml", salt="toy")).hasher()("patient", "p1")
    secret = load_spec(write_spec(tmp_path / "c.yaml", salt_env="TOY_SALT"))
    with pytest.raises(UserError, match="the environment variable TOY_SALT is not set"):
        secret.hasher()
    monkeypatch.setenv("TOY_SALT", "s" * 200)
    found = {hasher(kind, "p1") for hasher in (plain, secret.hasher()) for kind in ("patient", "volume")}
    assert len(found) == 4 and all(len(text) == 16 for text in found)


def test_vocabulary() -> None:
    assert normalise("  left \n kidney ") == "left kidney"
    assert synonyms("Left kidney", ["left  Kidney", "ren sinister", " Ren sinister"]) == ("ren sinister", "kidney left")
    with pytest.raises(UserError, match="a term is empty"):
        normalise(" ")
