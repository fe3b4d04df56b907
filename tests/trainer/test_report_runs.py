"""The page of several runs: its figures against references, its words against the data."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from browser import browsed, needs_browser, too_wide
from scipy.stats import wilcoxon

from data_shards.errors import run_command
from trainer.report.cli import report_command
from trainer.report.data import read_run
from trainer.report.runs import ABSENT, Runs, gather, labels
from trainer.report.runs_page import render_runs, verdict
from trainer.report.statistics import holm
from trainer.run import Run
from trainer.scores import CaseScore, write_scores

LEVELS = {"full": 0.80, "lora": 0.74, "prompt": 0.795}
COUNT = 40


def write_run(root: Path, name: str, *, level: float, targets: int = COUNT) -> Run:
    """A run whose targets are in two modalities; before tuning all runs are the same model."""
    run = Run(root / name)
    run.root.mkdir(parents=True)
    run.recipe.write_text(f"# Is {name} <good>?\ntrainer: {{default_root_dir: {name}}}\nmodel: {{method: {name}}}\n")
    model = {"parameters": 2_000_000, "trainable": 1000}
    run.record.write_text(json.dumps({"model": model, "tuning": name, "world_size": 1, "hardware": "CPU, 2 threads"}))
    run.stages.write_text('{"fit": 7200}')
    for when, middle, seed in (("untouched", 0.5, 0), ("tuned", level, len(name))):
        shifts = np.random.default_rng(seed).normal(0, 0.02, COUNT)
        rows = [
            CaseScore(f"k{n}-a{n:05d}", 0, "x", "CT" if n % 2 else "MR", 9, middle + shifts[n], 0.5)
            for n in range(targets)
        ]
        write_scores(run.evaluation(when) / "per_case.csv", rows)
    logs = run.root / "logs" / "version_0"
    logs.mkdir(parents=True)
    lines = [f"{step},{level / (step + 1)},{3.5}" for step in range(20)]
    (logs / "metrics.csv").write_text("\n".join(["step,train/loss,train/images_per_second", *lines]) + "\n")
    return run


@pytest.fixture
def three(tmp_path: Path) -> list[Run]:
    return [write_run(tmp_path, name, level=level) for name, level in LEVELS.items()]


def gathered(runs: list[Run]) -> Runs:
    return gather([(run.root, read_run(run)) for run in runs])


def dsc(run: Run, name: str = "tuned") -> np.ndarray:
    return np.array([row.dsc for row in getattr(read_run(run), "after" if name == "tuned" else "before").scores])


def test_runs_are_compared_with_the_first_and_corrected(three: list[Run]) -> None:
    found = gathered(three).differences()
    p_values = [float(wilcoxon(dsc(run) - dsc(three[0])).pvalue) for run in three[1:]]
    assert list(found) == ["lora", "prompt"]
    assert [one.p_value for one, _ in found.values()] == pytest.approx(p_values)
    assert [p for _, p in found.values()] == pytest.approx(holm(p_values))
    assert found["lora"][0].gain == pytest.approx((dsc(three[1]) - dsc(three[0])).mean())
    said = verdict(gathered(three))
    best = max(LEVELS, key=lambda name: dsc(three[list(LEVELS).index(name)]).mean())
    assert f"On 40 targets that all of them scored, {best} has the highest mean DSC" in said


def test_an_order_is_stated_only_where_it_is_clear(three: list[Run]) -> None:
    assert verdict(gathered(three)).endswith("That is no clear difference: the interval includes 0.")
    clear = verdict(gathered([three[1], three[0]]))
    assert "full differs from lora by +0.06" in clear and "no clear" not in clear


def test_the_page_has_runs_boxes_curves_cost_and_recipes(three: list[Run], tmp_path: Path) -> None:
    page = render_runs(gathered(three), tmp_path / "elsewhere")
    titles = re.findall(r"<h2>(.*?)</h2>", page)
    assert titles == [
        *("Runs", "By modality", "Training", "Cost", "What differs between the recipes"),
        "What differs in their records",
    ]
    assert re.findall(r'href="([^"#]+)"', page) == [f"../{name}/report.html" for name in LEVELS]
    assert "<script" not in page and "<good>" not in page and "&lt;good&gt;" in page
    for name, series in (("MR", slice(0, None, 2)), ("CT", slice(1, None, 2))):
        for who, values in [("untouched", dsc(three[0], "untouched")), *zip(LEVELS, map(dsc, three), strict=True)]:
            assert f"{name}, {who}: median {np.median(values[series]):.3f}" in page
    assert page.count('class="line dist ') == 3
    assert "<code>model.method</code>" in page and "default_root_dir</code>" not in page
    assert page.count('<td class="number">2</td>') == 3, "processor-hours: 7200 s of one process"


def test_only_what_all_scored_is_compared(tmp_path: Path) -> None:
    runs = [write_run(tmp_path, "a", level=0.7), write_run(tmp_path, "bb", level=0.8, targets=10)]
    both = gathered(runs)
    assert len(both.common) == 10 == len(both.rows("a"))
    assert "Targets left out, since not every run has scored them: a 30." in render_runs(both, tmp_path)


def test_untouched_is_one_series_only_where_it_is_one_model(three: list[Run]) -> None:
    assert len(gathered(three).untouched) == COUNT
    table = three[1].evaluation("untouched") / "per_case.csv"
    write_scores(table, read_run(three[0]).after.scores)  # type: ignore[union-attr]
    assert gathered(three).untouched == []


def test_recipes_differ_where_a_key_is_absent_or_null(three: list[Run]) -> None:
    three[0].recipe.write_text("model: {a: null, same: 1}\n")
    three[1].recipe.write_text("model: {same: 1, only: 2}\n")
    found = gathered(three[:2]).recipe_differences()
    assert found == {"model.a": [None, ABSENT], "model.only": [ABSENT, 2]}


def test_labels_tell_runs_apart() -> None:
    paths = [Path("/x/full/seed-0"), Path("/x/lora/seed-0")]
    assert labels(["seed-0", "seed-0"], paths) == ["full", "lora"]
    assert labels(["one", "two"], paths) == ["one", "two"]
    assert labels(["r", "r"], [Path("/x/r"), Path("/y/r")]) == ["x", "y"]


def test_runs_without_scores_still_have_a_page(three: list[Run], tmp_path: Path) -> None:
    for run in three[:2]:
        for name in ("untouched", "tuned"):
            (run.evaluation(name) / "per_case.csv").unlink()
    both = gathered(three[:2])
    assert "none of these runs has been evaluated" in verdict(both)
    assert "<h2>Cost</h2>" in render_runs(both, tmp_path)
    assert "Only prompt has been evaluated" in verdict(gathered(three))


def test_the_command_writes_every_page(
    three: list[Run], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_command(lambda: report_command(["full", "lora"]), "trainer") == 0
    assert "comparison: comparison.html" in capsys.readouterr().out
    assert (tmp_path / "comparison.html").is_file() and (tmp_path / "lora" / "report.html").is_file()
    assert not (tmp_path / "prompt" / "report.html").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["full", "full"], "full is there twice"),
        (["full", "--out", "x.html"], "give another RUN, or leave it out"),
        (["full", "lora", "--out", "x.pdf"], "its name ends in .html"),
        (["full", "lora", "--out", "no/x.html"], "there is no such folder"),
        (["full", "lora", "--out", "full/report.html"], "this is the page of full itself"),
        (["full", "nowhere"], "is no run"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str],
    said: str,
    three: list[Run],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_command(lambda: report_command(arguments), "trainer") == 2
    shown = capsys.readouterr()
    assert said in shown.err and shown.err.count("\n") == 1
    assert not shown.out
    assert not list(tmp_path.rglob("*.html"))


@needs_browser
@pytest.mark.parametrize(("width", "scheme"), [(390, "dark"), (1280, "light")])
def test_the_page_in_a_browser(three: list[Run], tmp_path: Path, width: int, scheme: str) -> None:
    assert report_command([*(str(run.root) for run in three), "--out", str(tmp_path / "all.html")]) == 0
    asked: list[str] = []
    with browsed(tmp_path / "all.html", width=width, scheme=scheme, requests=asked) as tab:  # type: ignore[arg-type]
        assert too_wide(tab) == 0
        assert asked == [(tmp_path / "all.html").resolve().as_uri()], "nothing else is asked for"
        assert tab.locator("svg.chart g.line").count() == 3
        tab.get_by_text("What each run asks").focus()
        tab.keyboard.press("Enter")
        assert tab.get_by_text("Is lora <good>?").is_visible()
        tab.get_by_role("link", name="lora", exact=True).press("Enter")
        tab.wait_for_url("**/lora/report.html")
        assert tab.locator("h1").inner_text() == "lora", "the run's own page is there"
