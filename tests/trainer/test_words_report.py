"""What a report says of terms, wordings and boxes, and of sets that no training took."""

from __future__ import annotations

import json
import re
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from data_shards.errors import run_command
from trainer.presence import TermAnswer, record_answers
from trainer.report import write_report
from trainer.report.cli import report_command
from trainer.run import Run
from trainer.scores import CaseScore, write_scores


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A run that was evaluated before and after on one slice of each of two data sets."""
    made = Run(tmp_path / "run")
    made.root.mkdir()
    made.recipe.write_text("# Does it?\nmodel: {}\n")
    evaluate(made, "untouched", (0.2, 0.4), "shards/test")
    evaluate(made, "tuned", (0.6, 0.5), "shards/test")
    return made


def evaluate(run: Run, name: str, dsc: tuple[float, ...], folder: str, dataset: str = "set") -> None:
    rows = [
        CaseScore(f"{dataset}-{n}", 0, "liver", "CT", 9, value, value / 2, f"{dataset} {n}", value)
        for n, value in enumerate(dsc)
    ]
    write_scores(run.evaluation(name) / "per_case.csv", rows)
    record = {"data": {"test": {"folder": folder, "index_sha256": "ab" * 32, "samples": len(dsc)}}}
    (run.evaluation(name) / "evaluation.json").write_text(json.dumps(record))


def part(run: Run, title: str) -> str:
    page = write_report(run).read_text()
    return page.partition(f"<h2>{title}</h2>")[2].partition("</section>")[0]


def cells(part: str, which: int = 0) -> list[list[str]]:
    """Rows of a table, headings first."""
    found = re.findall(r"<table>.*?</table>", part, re.S)[which]
    rows = re.findall(r"<tr>(.*?)</tr>", found, re.S)
    return [[unescape(re.sub("<[^>]*>", "", cell)) for cell in re.findall(r"<t[hd].*?</t[hd]>", row)] for row in rows]


def test_a_run_that_was_not_asked_in_words_says_nothing_of_them(run: Run) -> None:
    page = write_report(run).read_text()
    for title in ("Terms that are there", "Other words", "Text against box", "Internal and external"):
        assert title not in page


def answers(right: float, wrong: float) -> list[TermAnswer]:
    rows = [("set 0", True, right), ("set 1", True, 0.9), ("set 0", False, wrong), ("set 1", False, 0.1)]
    return [TermAnswer("k", f"t{n}", "CT", row[0], row[1], row[2], 0) for n, row in enumerate(rows)]


def test_found_and_falsely_found_terms(run: Run) -> None:
    record_answers(run.evaluation("untouched"), answers(0.4, 0.8), 0.5)
    record_answers(run.evaluation("tuned"), answers(0.7, 0.2), 0.5)
    rows = cells(part(run, "Terms that are there, and that are not"))
    assert rows[0][4:] == [
        f"{name} {side}" for name in ("Found", "Found where absent", "AUROC") for side in ("before", "after")
    ]
    assert rows[1] == ["all", "all", "2", "2", "0.500", "1.000", "0.500", "0.000", "0.750", "1.000"]
    assert rows[2] == ["set 0", "data set", "1", "1", "0.000", "1.000", "1.000", "0.000", "0.000", "1.000"]
    assert len(rows) == 4, "one modality is no group"


def test_one_evaluation_alone(run: Run) -> None:
    record_answers(run.evaluation("tuned"), [one for one in answers(0.7, 0.2) if one.present], 0.25)
    shown = part(run, "Terms that are there, and that are not")
    assert cells(shown)[1] == ["all", "all", "2", "0", "1.000", "–", "–"] and "0.25 after tuning" in shown


SYNONYMS: dict[str, Any] = {
    "samples": 2, "concepts": 2, "wordings": 4, "worse": 0.05, "dsc": {"canonical": 0.75, "others": 0.5},
    "drop": 0.25, "share_worse": 0.5, "worst": [{"term": "liver", "wording": "<hepar>", "n": 2, "drop": 0.5}],
}  # fmt: skip


def test_other_words(run: Run) -> None:
    (run.evaluation("untouched") / "synonyms.json").write_text(json.dumps(SYNONYMS))
    after = {**SYNONYMS, "dsc": {"canonical": 0.8, "others": 0.8}, "share_worse": 0, "worst": []}
    (run.evaluation("tuned") / "synonyms.json").write_text(json.dumps(after))
    shown = part(run, "Other words for the same")
    assert cells(shown)[1:] == [
        ["before tuning", "4", "0.750", "0.500", "−0.250", "50.0\u00a0%"],
        ["after tuning", "4", "0.800", "0.800", "±0.000", "0.0\u00a0%"],
    ]
    assert shown.count("<table>") == 1
    (run.evaluation("tuned") / "synonyms.json").write_text(json.dumps({**SYNONYMS, "wordings": 0}))
    shown = part(run, "Other words for the same")
    assert cells(shown, 1)[1] == ["liver", "<hepar>", "2", "−0.500"] and "most before tuning" in shown


BOXES: dict[str, Any] = {
    "samples": 2, "concepts": 3, "dsc": {"text": 0.3, "text_and_box": 0.6, "box": 0.7},
    "datasets": {
        "set 0": {"concepts": 2, "dsc": {"text": 0.1, "text_and_box": 0.5, "box": 0.7}},
        "set 1": {"concepts": 1, "dsc": {"text": 0.7, "text_and_box": 0.8, "box": 0.7}},
    },
}  # fmt: skip


def test_text_against_box(run: Run) -> None:
    (run.evaluation("untouched") / "boxes_given.json").write_text(json.dumps({**BOXES, "datasets": {}}))
    assert cells(part(run, "Text against box"))[1:] == [["all", "3", "0.300", "0.600", "0.700"]]
    (run.evaluation("tuned") / "boxes_given.json").write_text(json.dumps(BOXES))
    rows = cells(part(run, "Text against box"))
    assert rows[0] == [
        "Data set",
        "n",
        *(f"{way} {s}" for way in ("Text", "Text and box", "Box") for s in ("before", "after")),
    ]
    assert rows[1] == ["set 0", "2", "–", "0.100", "–", "0.500", "–", "0.700"]
    assert rows[-1] == ["all", "3", "0.300", "0.300", "0.600", "0.600", "0.700", "0.700"]


def test_internal_and_external_sets_stand_side_by_side(run: Run) -> None:
    evaluate(run, "untouched-external-x", (0.1,), "shards/external-x", "far")
    evaluate(run, "tuned-external-x", (0.4,), "shards/external-x", "far")
    evaluate(run, "tuned-external-y", (0.3,), "shards/external-y", "near")
    rows = cells(part(run, "Internal and external"))
    assert rows[0][:6] == ["Data set", "Where", "n", "DSC untouched", "DSC tuned", "DSC gain"]
    assert rows[1:] == [
        ["set 0", "internal", "1", "0.200", "0.600", "+0.400", "0.100", "0.300", "+0.200"],
        ["set 1", "internal", "1", "0.400", "0.500", "+0.100", "0.200", "0.250", "+0.050"],
        ["far 0", "external", "1", "0.100", "0.400", "+0.300", "0.050", "0.200", "+0.150"],
        ["near 0", "external", "1", "–", "0.300", "–", "–", "0.150", "–"],
    ]


@pytest.mark.parametrize(
    ("file", "content", "what"),
    [
        ("presence.json", {"threshold": 0.5}, "groups should be a list"),
        ("presence.json", {"threshold": 0.5, "groups": [{"kind": "all"}]}, "groups should hold objects"),
        ("presence.json", {"threshold": "high", "groups": []}, "threshold should be a number"),
        ("synonyms.json", {"wordings": "many"}, "wordings should be a number"),
        ("synonyms.json", {**SYNONYMS, "worst": ["liver"]}, "worst should hold objects"),
        ("synonyms.json", {**SYNONYMS, "dsc": {"canonical": 1}}, "others should be a number"),
        ("boxes_given.json", {**BOXES, "dsc": {"text": 1}}, "text_and_box should be a number"),
        ("boxes_given.json", {**BOXES, "datasets": {"a": 3}}, "datasets.a should be an object"),
    ],
)
def test_damage_is_one_line(run: Run, file: str, content: Any, what: str, capsys: pytest.CaptureFixture[str]) -> None:
    (run.evaluation("tuned") / file).write_text(json.dumps(content))
    assert run_command(lambda: report_command([str(run.root)]), "trainer") == 2
    shown = capsys.readouterr().err
    assert f"tuned/{file}: {what}" in shown and shown.count("\n") == 1
