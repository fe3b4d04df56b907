"""Pictures of a report say which place their targets have among all that were scored."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from trainer.report.data import read_run
from trainer.report.panels import Panel, save_panels
from trainer.report.pictures import Choice, choose, label_of, ordinal
from trainer.run import Run
from trainer.scores import CaseScore, write_scores


def panel(number: int, overlap: int) -> Panel:
    """A target of 20 pixels of which so many are found, and as many others are taken for it."""
    truth, prediction = np.zeros((8, 10), np.uint8), np.zeros((8, 10), np.uint8)
    truth[:2], prediction[:2].flat[:overlap] = 1, 1
    prediction[4:].flat[: 20 - overlap] = 1
    return Panel(f"k{number}", "t", truth, truth, prediction, np.zeros(4, np.float32), target=0)


def run_with(root: Path, numbers: list[int]) -> Run:
    """A run of 21 targets, whose DSC is number/20, with pictures of some; before tuning all but the best were kept."""
    run = Run(root)
    run.root.mkdir()
    run.recipe.write_text("seed_everything: 0\n")
    for name in ("untouched", "tuned"):
        rows = [CaseScore(f"k{n}", 0, "t", "CT", 20, n / 20, 0.5) for n in range(21)]
        write_scores(run.evaluation(name) / "per_case.csv", rows)
        shown = numbers if name == "tuned" else [n for n in numbers if n != 20]
        save_panels(run.evaluation(name) / "panels.npz", [panel(n, n) for n in shown])
    return run


def test_pictures_name_their_place_among_all_targets(tmp_path: Path) -> None:
    choices = choose(read_run(run_with(tmp_path / "all", [0, 3, 9, 10, 12, 20])))
    labels = [label_of(choice) for choice in choices]
    assert labels[0] == "Worst, 21st of 21"
    assert "Median, 11th of 21" in labels
    assert labels[-1] == "Best, 1st of 21"
    assert choices[-1].before is None, "it is shown although it was not kept before tuning"


def test_the_worst_of_those_kept_is_not_called_the_worst(tmp_path: Path) -> None:
    labels = [label_of(choice) for choice in choose(read_run(run_with(tmp_path / "some", [3, 9, 12])))]
    assert labels[0] == "Worst of those kept, 18th of 21"
    assert labels[-1] == "Best of those kept, 9th of 21"


def test_pictures_of_another_evaluation_have_no_place(tmp_path: Path) -> None:
    run = run_with(tmp_path / "other", [3, 9])
    save_panels(run.evaluation("tuned") / "panels.npz", [replace(panel(3, 8)), panel(9, 9)])
    assert [choice.rank for choice in choose(read_run(run)) if choice.panel.key == "k3"] == [None]


def test_words() -> None:
    assert [ordinal(n) for n in (1, 2, 3, 4, 11, 12, 13, 21, 112, 1002)] == [
        *("1st", "2nd", "3rd", "4th", "11th", "12th", "13th", "21st", "112th", "1,002nd"),
    ]
    one = panel(3, 3)
    assert label_of(Choice("Worst", None, one)) == "Worst"
    assert label_of(Choice("The only one", None, one, (1, 1))) == "The only one"
