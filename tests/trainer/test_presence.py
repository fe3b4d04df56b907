"""Found and falsely found terms, against counts and areas that were worked out by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data_shards.errors import UserError
from trainer.presence import (
    TermAnswer,
    auroc,
    logged_rates,
    presence_rates,
    read_answers,
    record_answers,
    write_answers,
)
from trainer.run import read_json


def answer(
    present: bool, confidence: float, dataset: str = "one", modality: str = "CT", term: str = "liver"
) -> TermAnswer:
    return TermAnswer("k", term, modality, dataset, present, confidence, 7 if confidence >= 0.5 else 0)


ANSWERS = [
    answer(True, 0.9),
    answer(True, 0.5),
    answer(True, 0.4, "two", "MR"),
    answer(True, 0.7, "two", "MR"),
    answer(False, 0.6),
    answer(False, 0.1),
    answer(False, 0.5, "two", "MR"),
]


def test_rates_by_hand() -> None:
    rates = {(rate.kind, rate.group): rate for rate in presence_rates(ANSWERS, 0.5)}
    assert list(rates) == [
        ("all", "all"),
        ("dataset", "one"),
        ("dataset", "two"),
        ("modality", "CT"),
        ("modality", "MR"),
    ]
    whole = rates["all", "all"]
    assert (whole.present, whole.absent) == (4, 3)
    assert whole.found == 0.75, "0.5 reaches a threshold of 0.5"
    assert whole.false_positives == pytest.approx(2 / 3)
    # 0.9 beats three, 0.5 beats one and ties one, 0.4 beats one, 0.7 beats three, of 12 pairs
    assert whole.auroc == pytest.approx((3 + 1.5 + 1 + 3) / 12)
    assert (rates["dataset", "two"].found, rates["dataset", "two"].auroc) == (0.5, 0.5)
    assert rates["dataset", "one"] == replace(rates["modality", "CT"], kind="dataset", group="one")


def test_where_one_side_is_missing_its_rates_are_unknown() -> None:
    (whole,) = presence_rates([replace(one, dataset="", modality="") for one in ANSWERS if one.present], 0.5)
    assert (whole.absent, whole.false_positives, whole.auroc) == (0, None, None)
    assert presence_rates([], 0.5) == []
    assert logged_rates("val", [], 0.5) == {}
    assert logged_rates("val", ANSWERS[4:], 0.55) == {"val/false_positives": pytest.approx(1 / 3)}


def test_what_is_logged() -> None:
    assert logged_rates("test", ANSWERS, 0.65) == {
        "test/found": 0.5,
        "test/false_positives": 0.0,
        "test/presence_auroc": pytest.approx(8.5 / 12),
    }


def test_area_is_the_share_of_pairs_in_the_right_order() -> None:
    generator = np.random.default_rng(0)
    positive, negative = (generator.integers(0, 20, count) / 20 for count in (37, 53))
    above = (positive[:, None] > negative).mean() + (positive[:, None] == negative).mean() / 2
    assert auroc(positive, negative) == pytest.approx(above)
    assert auroc(np.array([2.0]), np.array([1.0])) == 1 and auroc(np.array([1.0]), np.array([2.0])) == 0
    assert auroc(np.array([]), negative) is None


def test_the_table_is_read_as_it_was_written(tmp_path: Path) -> None:
    odd = replace(ANSWERS[0], term='liver, "left"\nlobe', dataset="")
    write_answers(tmp_path / "presence.csv", [*ANSWERS, odd])
    assert read_answers(tmp_path / "presence.csv") == (*ANSWERS, odd)


@pytest.mark.parametrize(
    ("table", "what"),
    [
        ("key,term\nk,liver\n", "column 'modality' is missing|column 'confidence' is missing"),
        ("key,term,modality,dataset,present,confidence,area_px\nk,t,CT,d,1,nan,0\n", "no finite number"),
        ("key,term,modality,dataset,present,confidence,area_px\nk,t,CT,d,yes,0.5,0\n", "neither present nor absent"),
        ("key,term,modality,dataset,present,confidence,area_px\nk,t,CT,d,1,high,0\n", "high"),
        ("key,term,modality,dataset,present,confidence,area_px\nk,t\n", "cannot be read"),
    ],
)
def test_a_damaged_table_is_one_line(tmp_path: Path, table: str, what: str) -> None:
    (tmp_path / "presence.csv").write_text(table)
    with pytest.raises(UserError, match=what):
        read_answers(tmp_path / "presence.csv")


def test_an_evaluation_without_answers_leaves_none_of_an_earlier_one(tmp_path: Path) -> None:
    record_answers(tmp_path, ANSWERS, 0.5)
    content = read_json(tmp_path / "presence.json")
    assert content["threshold"] == 0.5
    assert content["groups"][0] == {
        "kind": "all",
        "group": "all",
        "present": 4,
        "absent": 3,
        "found": 0.75,
        "false_positives": 0.666667,
        "auroc": 0.708333,
    }
    record_answers(tmp_path, [], 0.5)
    assert list(tmp_path.iterdir()) == []
