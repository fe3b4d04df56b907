from __future__ import annotations

from pathlib import Path

import pytest

from data_shards.errors import UserError
from trainer.scores import CaseScore, read_scores, volume_of, write_scores


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
