from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from data_shards.errors import UserError
from trainer.scores import CaseScore, grouped, pair, read_scores, spreads, volume_of, write_scores, write_spreads


def score(key: str, dsc: float, target: int = 0) -> CaseScore:
    return CaseScore(key, target, 'left "kidney", upper', "CT", 321, dsc, dsc / (2 - dsc))


def test_what_is_written_is_read(tmp_path: Path) -> None:
    rows = [score("liver-v1-a00001", 0.912345), score("liver-v1-a00001", 0.5, target=1), score("liver-v2-a00001", 1.0)]
    write_scores(tmp_path / "per_case.csv", rows)
    read = read_scores(tmp_path / "per_case.csv")
    assert [(row.key, row.target, row.term, row.area_px) for row in read] == [
        (row.key, row.target, row.term, row.area_px) for row in rows
    ]
    assert [row.dsc for row in read] == pytest.approx([row.dsc for row in rows], abs=1e-6)
    assert not list(tmp_path.glob("*.tmp"))


def test_nsd_and_data_set_are_kept(tmp_path: Path) -> None:
    rows = [CaseScore("a", 0, "x", "CT", 9, 0.5, 0.25, "amos, 2022", 0.125, "2 mm"), score("b", 0.5)]
    write_scores(tmp_path / "per_case.csv", rows)
    first, second = read_scores(tmp_path / "per_case.csv")
    assert (first.dataset, first.nsd, first.tolerance) == ("amos, 2022", 0.125, "2 mm")
    assert (second.dataset, second.nsd, second.tolerance) == ("", None, "")


def test_a_table_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    text = "key,target,term,modality,area_px,dsc,iou\nliver-v1-a00001,0,liver,CT,321,0.900000,0.818182\n"
    (tmp_path / "per_case.csv").write_text(text)
    (row,) = read_scores(tmp_path / "per_case.csv")
    assert row == CaseScore("liver-v1-a00001", 0, "liver", "CT", 321, 0.9, 0.818182)
    assert {kind for kind, _ in grouped([row])} == {"all", "modality", "term"}
    assert {spread.metric for spread in spreads([row])} == {"dsc", "iou"}


def test_an_nsd_that_is_no_number_is_refused(tmp_path: Path) -> None:
    write_scores(tmp_path / "per_case.csv", [CaseScore("a", 0, "x", "CT", 9, 0.5, 0.25, "d", float("inf"), "2 px")])
    with pytest.raises(UserError, match="a has a score that is no finite number"):
        read_scores(tmp_path / "per_case.csv")


def test_spreads_by_hand(tmp_path: Path) -> None:
    def row(number: int, modality: str, dsc: float, nsd: float | None) -> CaseScore:
        return CaseScore(f"k{number}", 0, "x", modality, 9, dsc, dsc / 2, "", nsd, "2 px" if nsd else "")

    rows = [row(0, "MR", 0.1, 1.0), row(1, "CT", 0.2, None), row(2, "MR", 0.4, 0.5), row(3, "", 0.9, None)]
    found = {(spread.kind, spread.group, spread.metric): spread for spread in spreads(rows)}
    whole = found["all", "all", "dsc"]
    assert (whole.n, whole.mean, whole.median) == (4, pytest.approx(0.4), pytest.approx(0.3))
    assert (whole.q1, whole.q3) == (pytest.approx(0.175), pytest.approx(0.525)), "three quarters from 0.1 to 0.2"
    assert found["all", "all", "nsd"].n == 2 and found["all", "all", "nsd"].mean == 0.75
    assert found["modality", "MR", "dsc"].mean == pytest.approx(0.25)
    assert found["modality", "unknown", "iou"].mean == 0.45
    assert ("modality", "CT", "nsd") not in found and not [place for place in found if place[0] == "dataset"]
    write_spreads(tmp_path / "summary.csv", rows)
    with (tmp_path / "summary.csv").open(newline="") as handle:
        written = list(csv.DictReader(handle))
    assert list(written[0]) == ["kind", "group", "metric", "n", "mean", "q1", "median", "q3"]
    assert [(row["kind"], row["group"], row["metric"]) for row in written] == list(found)
    assert [float(row["mean"]) for row in written] == pytest.approx([s.mean for s in found.values()], abs=1e-6)
    assert np.isfinite([float(row["q3"]) for row in written]).all()


def test_targets_are_paired_by_key_and_number() -> None:
    before, after = [score("a", 0.1), score("a", 0.2, 1), score("b", 0.3)], [score("b", 0.6), score("a", 0.5, 1)]
    assert [(one.dsc, other.dsc) for one, other in pair(before, after)] == [(0.3, 0.6), (0.2, 0.5)]


def test_an_evaluation_without_targets_is_a_table_without_rows(tmp_path: Path) -> None:
    write_scores(tmp_path / "per_case.csv", [])
    assert read_scores(tmp_path / "per_case.csv") == ()


def test_scores_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    write_scores(tmp_path / "per_case.csv", [score("a", float("nan"))])
    with pytest.raises(UserError, match="a has a score that is no finite number"):
        read_scores(tmp_path / "per_case.csv")


def test_a_table_that_csv_refuses_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "per_case.csv").write_text("key,target\n" + "a" * 200_000 + ",0\n")
    with pytest.raises(UserError, match=r"per_case\.csv: cannot be read"):
        read_scores(tmp_path / "per_case.csv")


def test_the_volume_of_a_key() -> None:
    assert volume_of("liver-v1-a00001") == "liver-v1"
    assert volume_of("other") == "other"
