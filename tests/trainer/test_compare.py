"""`trainer compare`: figures recomputed by numpy and scipy, marks, both kinds of tables, and mistakes in one line."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from one_line import message
from scipy.stats import wilcoxon

from trainer.cli import main
from trainer.evaluation.columns import read_columns
from trainer.evaluation.compare_cli import compare_command
from trainer.evaluation.comparing import compare_columns
from trainer.evaluation.paired import differences, interval, rank_biserial, spread
from trainer.evaluation.paper_table import latex, markdown, note
from trainer.evaluation.rows import COLUMNS, Row
from trainer.report.statistics import bootstrap_ci95, holm
from trainer.scores import CaseScore, write_scores, write_table

COUNT = 60
GENERATOR = np.random.default_rng(11)
BASE = GENERATOR.beta(5, 3, COUNT)
SHIFTS = {"SAM": -0.1, "MedSAM": 0.0, "tuned": 0.05}
DSC = {name: np.clip(BASE + shift + GENERATOR.normal(0, 0.04, COUNT), 0, 1).round(6) for name, shift in SHIFTS.items()}


def score(number: int, dsc: float, **changes: Any) -> CaseScore:
    """Object 0, 1, ... of ten volumes with six slices each; CT and MR by turns."""
    modality, term = ("CT", "MR")[number % 2], ("liver", "kidney", "spleen")[number % 3]
    made = CaseScore(f"v{number // 6}-a{number % 6:05d}", 0, term, modality, 100 + number, dsc, dsc / (2 - dsc))
    return replace(made, dataset="amos", nsd=min(1.0, dsc + 0.05), tolerance="2 mm", **changes)


@pytest.fixture
def scored(tmp_path: Path) -> dict[str, Path]:
    """Tables of `trainer test`; the first model did not answer five of the objects."""
    for name, values in DSC.items():
        rows = [score(number, float(value)) for number, value in enumerate(values)]
        write_scores(tmp_path / name / "per_case.csv", rows[5:] if name == "SAM" else rows)
    return {name: tmp_path / name for name in DSC}


def columns_of(tables: dict[str, Path]) -> list[str]:
    return [f"{name}={path}" for name, path in tables.items()]


def row(model: str, case: str, dsc: float, **changes: Any) -> Row:
    made = Row(
        model=model, initial="", set="test", kind="2d", prompt="box", dataset="amos", modality="CT", case=case,
        term="liver", target=0, shown=-1, first=-1, slices=1, dsc=dsc, iou=dsc / (2 - dsc), nsd=dsc, hd95=1.0,
        dsc_unprompted=None, tolerance="2 px", seconds=0.1, made_by="x",
    )  # fmt: skip
    return replace(made, **changes)


def write_rows(path: Path, rows: list[Row]) -> Path:
    write_table(path / "per_case.csv", COLUMNS, map(astuple, rows))
    return path


# --- figures


def test_medians_quartiles_and_tests_are_those_of_numpy_and_scipy(scored):
    (table,) = compare_columns(read_columns(columns_of(scored)), metrics=["dsc"])
    common = np.arange(5, COUNT)
    groups = {("CT",): common[common % 2 == 0], ("MR",): common[common % 2 == 1], ("all",): common}
    assert [line.group for line in table.lines] == list(groups)
    raw = []
    for line in table.lines:
        places = groups[line.group]
        assert (line.objects, line.cases, line.volumes) == (len(places), len(places), len({*places // 6}))
        for name, cell in line.cells.items():
            quartiles = np.percentile(DSC[name][places], [25, 50, 75])
            assert [cell.q1, cell.median, cell.q3] == pytest.approx(quartiles)
            assert cell.mean == pytest.approx(DSC[name][places].mean())
        pairs = [(test.column, test.against) for test in line.tests]
        assert pairs == [("MedSAM", "SAM"), ("tuned", "SAM"), ("tuned", "MedSAM")]
        for test in line.tests:
            gains = (DSC[test.column] - DSC[test.against])[places]
            assert test.p_value == pytest.approx(wilcoxon(gains.round(9)).pvalue)
            assert test.difference == pytest.approx(gains.mean())
            assert test.ci95 == pytest.approx(bootstrap_ci95(gains))
            raw.append(test.p_value)
    assert [test.p_holm for line in table.lines for test in line.tests] == holm(raw), "all tests of the table together"
    assert table.tests == len(raw) == 9
    assert (table.objects, table.left_out, table.lacking) == (55, 5, {"SAM": 5})


def test_marks_say_what_the_adjusted_tests_say(scored):
    (table,) = compare_columns(read_columns(columns_of(scored)))
    last = table.lines[2]
    assert (last.metric, last.group) == ("dsc", ("all",))
    assert {name: (cell.star, cell.dagger) for name, cell in last.cells.items()} == {
        "SAM": (False, False),
        "MedSAM": (True, False),
        "tuned": (True, True),
    }
    (other,) = compare_columns(read_columns(columns_of(scored)), reference="tuned")
    stars = [name for line in other.lines for name, cell in line.cells.items() if cell.star]
    assert not stars and other.lines[2].cells["tuned"].dagger, "the reference can be the best, and gets no star"
    for line in other.lines:
        for name, cell in line.cells.items():
            beaten = set()
            for test in line.tests:
                better = test.column if test.effect > 0 else test.against
                if test.p_holm < 0.05 and better == name:
                    beaten |= {test.column, test.against} - {name}
            assert cell.dagger == (len(beaten) == 2)


def test_correction_takes_marks_away(tmp_path):
    """One test with p = 0.03125 is significant; the same beside another group's is not."""
    for name, gain in (("A", 0.0), ("B", 0.1)):
        rows = [score(2 * number, 0.5 + gain * (number + 1) / 6) for number in range(6)]  # all CT
        write_scores(tmp_path / name / "per_case.csv", rows)
    arguments = [str(tmp_path / "A"), str(tmp_path / "B")]
    (alone,) = compare_columns(read_columns(arguments), metrics=["dsc"])
    assert alone.lines[0].tests[0].p_value == 0.03125 and alone.lines[0].cells["B"].star
    (both,) = compare_columns(read_columns(arguments), metrics=["dsc", "iou"])
    assert both.lines[0].tests[0].p_holm == 0.0625 and not both.lines[0].cells["B"].star


def test_volumes_count_once_where_that_is_asked(scored):
    (table,) = compare_columns(read_columns(columns_of(scored)), metrics=["dsc"], each="volume")
    volumes = np.arange(COUNT) // 6
    means = {n: [values[5:][volumes[5:] == v].mean() for v in range(10)] for n, values in DSC.items()}
    last = table.lines[-1]
    assert last.cells["tuned"].median == pytest.approx(np.median(means["tuned"]))
    gains = np.array(means["tuned"]) - np.array(means["SAM"])
    assert last.tests[1].p_value == pytest.approx(wilcoxon(gains).pvalue)
    assert "means of 10 volumes (55 objects in 55 images of 10 volumes" in note(table, True)[0]
    assert not any("not independent: p seems surer" in part for part in note(table, True))


def test_distances_are_better_when_lower_and_may_be_infinite(tmp_path):
    rows = []
    for number in range(12):
        rows.append(row("A", f"c{number:02d}", 0.5, hd95=5.0 + number))
        rows.append(row("B", f"c{number:02d}", 0.5, hd95=2.0 + 0.5 * number))
    rows[0] = replace(rows[0], hd95=float("inf"))
    path = write_rows(tmp_path / "eval", rows)
    (table,) = compare_columns(read_columns([str(path)]), metrics=["hd95"])
    (line,) = table.lines
    (test,) = line.tests
    assert line.cells["B"].star and line.cells["B"].dagger and not line.cells["A"].dagger
    assert test.effect == -1 and test.difference is None and test.ci95 is None
    assert test.p_value == pytest.approx(2 / 2**12), "twelve of twelve fell: the infinite one is a rank, not a gap"
    assert "Lower is better for HD95." in note(table, True)
    assert "| 11.5 (8.8, 14.2) |" in markdown([table], True)
    assert compare_command([str(path), "--metric", "hd95", "--out", str(tmp_path / "out")]) == 0
    content = json.loads((tmp_path / "out/comparison.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert content["tables"][0]["lines"][0]["cells"]["A"]["mean"] is None


def test_quartiles_beside_infinite_ones():
    found = spread(np.array([1.0, 2.0, np.inf, np.inf]))
    assert (found.q1, found.median, found.q3) == (1.75, np.inf, np.inf)
    assert spread(np.array([1.0, 2.0, 3.0, 4.0, np.inf])).q3 == 4.0


def test_differences_tie_and_rank():
    gains = differences(np.array([0.3, 0.2, 0.5, np.inf, np.inf]), np.array([0.1, 0.0, 0.5, np.inf, 3.0]))
    assert gains[0] == gains[1] and gains[2] == gains[3] == 0, "0.3 − 0.1 is 0.2 here"
    assert gains[4] > 1
    assert rank_biserial(np.array([1.0, 2.0, -3.0, 0.0])) == pytest.approx((1 + 2 - 3) / 6)
    assert rank_biserial(np.array([1.0, 2.0, -4.0, 3.0])) == pytest.approx((1 + 2 + 3 - 4) / 10)
    assert rank_biserial(np.zeros(3)) == 0


def test_the_normal_interval_is_the_bootstrap_one_of_many():
    gains = np.random.default_rng(0).beta(1, 6, 2001) - 0.1
    resampled, ours = bootstrap_ci95(gains), interval(gains)
    assert ours == pytest.approx(resampled, abs=0.03 * (resampled[1] - resampled[0]))
    assert interval(gains[:50]) == bootstrap_ci95(gains[:50])


# --- tables of evaluations


def test_an_evaluation_gives_all_its_models_and_a_table_for_each_way_of_asking(tmp_path):
    rows = []
    for number in range(8):
        for model in ("SAM", "Mine"):
            dsc = 0.5 + 0.02 * number + 0.1 * (model == "Mine")
            rows.append(row(model, f"i{number}", dsc))
            rows.append(row(model, f"v{number}", dsc, initial=model, set="ct", kind="3d", target=-1, slices=9))
        rows.append(row("copy", f"v{number}", 0.3, initial="SAM", set="ct", kind="3d", target=-1, slices=9))
    path = write_rows(tmp_path / "eval", rows)
    images, volumes = compare_columns(read_columns([str(path)]), metrics=["dsc"])
    assert images.columns == ("SAM", "Mine") and images.absent == ("first mask repeated (SAM)",)
    assert volumes.columns == ("SAM", "Mine", "first mask repeated (SAM)")
    text = markdown([images, volumes], True)
    assert "## Images by box: test" in text and "## Volumes by box: ct" in text
    assert "| CT | 8 | 57.0 (53.5, 60.5) | 67.0 (63.5, 70.5)\\*† |" in text
    assert "Without answers of this kind: first mask repeated (SAM)." in text
    named = read_columns([f"Mine={path}", f"SAM={path}"])
    assert [column.name for column in named] == ["Mine", "SAM"]
    assert compare_command([str(path), "--models", "Mine", "SAM", "--metric", "dsc"]) == 0


def test_two_evaluations_of_one_model_each(tmp_path):
    for name, gain in (("a", 0.0), ("b", 0.1)):
        rows = [row("tuned", f"v{n}", 0.5 + gain, initial="tuned", kind="3d", target=-1) for n in range(3)]
        write_rows(tmp_path / name, [*rows, row("copy", "v0", 0.1, initial="tuned", kind="3d", target=-1)])
    (table,) = compare_columns(read_columns([f"{n}={tmp_path / n}" for n in "ab"]))
    assert table.columns == ("a", "b") and table.objects == 3, "the repeated first masks are no columns of theirs"
    assert "No test" not in " ".join(note(table, True)) and table.tests == 2


def test_a_run_stands_for_its_tuned_model_or_for_all_its_evaluations(tmp_path, scored):
    run = tmp_path / "run"
    for name, source in (("tuned", "tuned"), ("untouched", "SAM")):
        (run / "evaluation" / name).mkdir(parents=True)
        (run / "evaluation" / name / "per_case.csv").write_bytes((scored[source] / "per_case.csv").read_bytes())
    assert [column.name for column in read_columns([str(run)])] == ["untouched", "tuned"]
    (named,) = read_columns([f"lora={run}"])
    assert (named.name, named.path) == ("lora", run / "evaluation/tuned/per_case.csv")
    assert len(read_columns([f"first={run / 'evaluation/untouched'}"])[0].answers) == 55


# --- what is written


def test_everything_is_written(scored, tmp_path, capsys):
    out = tmp_path / "tables"
    arguments = [*columns_of(scored), "--by", "modality", "term", "--out", str(out)]
    assert main(["compare", *arguments]) == 0
    shown = capsys.readouterr().out
    text = (out / "comparison.md").read_text()
    assert "| modality · term | objects | volumes | SAM | MedSAM | tuned |" in text
    assert "5 objects left out that not all columns answered: SAM lacks 5." in text
    assert "NSD: share of both surfaces that is within 2 mm of the other." in text
    rows = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("| all")]
    assert len(rows) == 2 and all(cell.strip().replace("\\", "") in shown for cells in rows for cell in cells)
    with (out / "comparison.csv").open(newline="") as handle:
        table = list(csv.DictReader(handle))
    whole = next(line for line in table if (line["group"], line["model"], line["metric"]) == ("all", "tuned", "dsc"))
    gains = (DSC["tuned"] - DSC["SAM"])[5:]
    assert float(whole["median"]) == pytest.approx(np.median(DSC["tuned"][5:]), abs=1e-6)
    assert float(whole["difference"]) == pytest.approx(gains.mean(), abs=1e-6)
    assert float(whole["p"]) == pytest.approx(wilcoxon(gains.round(9)).pvalue, rel=1e-5)
    assert (whole["star"], whole["dagger"], whole["objects"], whole["volumes"]) == ("1", "1", "55", "10")
    content = json.loads((out / "comparison.json").read_text())
    assert content["columns"]["tuned"] == str(scored["tuned"] / "per_case.csv")
    assert len(content["tables"][0]["lines"][0]["tests"]) == 3
    assert content["tables"][0]["tests"] == text.count("the 42 tests") * 42


def test_latex_has_booktabs_and_escapes(tmp_path):
    for name, gain in (("A_1", 0.0), ("B&C", 0.1)):
        rows = [score(n, 0.5 + gain + 0.002 * n, term="100 % {fat}_$") for n in range(9)]
        write_scores(tmp_path / name / "per_case.csv", rows)
    tables = compare_columns(read_columns([str(tmp_path / "A_1"), str(tmp_path / "B&C")]), by=["term"], metrics=["dsc"])
    text = latex(tables, percent=False)
    assert r"term & objects & volumes & A\_1 & B\&C \\" in text
    assert r"100 \% \{fat\}\_\$ & 9 & 2 & 0.508 (0.504, 0.512) & 0.608 (0.604, 0.612)$^{*}$$^{\dagger}$ \\" in text
    body = text.partition(r"\begin{tabular}{lrrll}")[2].partition(r"\end{tabular}")[0]
    assert [body.count(rule) for rule in (r"\toprule", r"\midrule", r"\bottomrule")] == [1, 1, 1]
    assert text.count("{") - text.count(r"\{") == text.count("}") - text.count(r"\}")


def test_what_a_terminal_must_not_see_is_not_shown(tmp_path, capsys):
    for name in "AB":
        write_scores(tmp_path / name / "per_case.csv", [score(n, 0.5, term="a\x1b[31m[bold]b") for n in range(3)])
    assert main(["compare", str(tmp_path / "A"), str(tmp_path / "B"), "--by", "term", "--metric", "dsc"]) == 0
    shown = capsys.readouterr().out
    assert "a?[31m[bold]b" in shown and "\x1b" not in shown
    assert "No test: there is no pair of objects that differ." in shown


def test_nothing_heavy_is_imported(scored):
    code = (
        "import sys; from trainer.cli import main; code = main(sys.argv[1:]); "
        "sys.exit(code or 3 * bool({'torch', 'lightning', 'transformers'} & sys.modules.keys()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "compare", *columns_of(scored)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "55 objects" in done.stdout


# --- mistakes


def test_names_and_options(scored, tmp_path):
    tables = columns_of(scored)
    assert "'--referense'; did you mean '--reference'?" in message(
        lambda: compare_command([*tables, "--referense", "x"])
    )
    assert "--reference: there is no column 'MedSam'; did you mean 'MedSAM'?" in message(
        lambda: compare_command([*tables, "--reference", "MedSam"])
    )
    assert "--models: there is no column 'tunt'; did you mean 'tuned'?" in message(
        lambda: compare_command([*tables, "--models", "SAM", "tunt"])
    )
    assert "--by: there is no 'modalty'; did you mean 'modality'?" in message(
        lambda: compare_command([*tables, "--by", "modalty"])
    )
    assert "--metric: there is no 'dice'" in message(lambda: compare_command([*tables, "--metric", "dice"]))
    assert "--by set" in message(lambda: compare_command([*tables, "--by", "set"]))
    assert "one model alone (SAM)" in message(lambda: compare_command(tables[:1]))
    assert "--metric hd95: no table has it" in message(lambda: compare_command([*tables, "--metric", "hd95"]))
    twice = message(lambda: compare_command([tables[0], f"SAM={scored['tuned']}"]))
    assert "two columns are called 'SAM'" in twice and "first=" in twice
    (tmp_path / "taken").write_text("")
    assert "is a file" in message(lambda: compare_command([*tables, "--out", str(tmp_path / "taken")]))


def test_paths_and_tables(scored, tmp_path):
    def said(*arguments: str) -> str:
        return message(lambda: read_columns(arguments))

    assert "there is no such file or folder" in said(f"A={tmp_path / 'nowhere'}")
    assert "expected NAME=PATH" in said("=x")
    (tmp_path / "empty").mkdir()
    assert "it has no per_case.csv" in said(str(tmp_path / "empty"))
    other = tmp_path / "other.csv"
    other.write_text("a,b\n1,2\n")
    assert "it has no column 'key'" in said(str(other))
    other.write_bytes(b"\xff\xfe\x00")
    assert "cannot be read" in said(str(other))
    write_scores(tmp_path / "bare.csv", [])
    assert "it has no rows" in said(str(tmp_path / "bare.csv"))
    for name in ("one", "two"):
        write_scores(tmp_path / f"run/evaluation/{name}/per_case.csv", [score(0, 0.5)])
    assert "it has the evaluations one, two" in said(f"A={tmp_path / 'run'}")
    evaluated = write_rows(tmp_path / "eval", [row("X", "c", 0.5), row("Y", "c", 0.6)])
    assert "and none is called 'Z'" in said(f"Z={evaluated}")
    assert "they do not compare" in said(str(evaluated), f"A={scored['SAM']}")
    write_rows(tmp_path / "eval", [row("X", "c", float("nan"))])
    assert "dsc of liver in c is nan" in said(str(evaluated))


def test_cases_that_are_not_the_same(tmp_path):
    def said(*pair: CaseScore, **options: Any) -> str:
        for name, one in zip("AB", pair, strict=True):
            write_scores(tmp_path / name / "per_case.csv", [one])
        return message(lambda: compare_columns(read_columns([str(tmp_path / name) for name in "AB"]), **options))

    first = score(0, 0.5)
    assert "no object was answered by all: A has 1 object; B has 1 object" in said(first, score(1, 0.5))
    assert "'liver' of 100 px in A, and 'liver' of 99 px in B" in said(first, replace(first, area_px=99))
    assert "'spleen' of 100 px in B" in said(first, replace(first, term="spleen"))
    assert "NSD of A forgives 2 mm, that of B 1 px" in said(first, replace(first, tolerance="1 px"))
    older = replace(first, nsd=None, tolerance="", dataset="")
    assert "--metric nsd: B has no such score" in said(first, older, metrics=["dsc", "nsd"])
    (table,) = compare_columns(read_columns([str(tmp_path / name) for name in "AB"]), by=["dataset"])
    assert table.metrics == ["dsc"] and table.lines[0].group == ("amos",), "the table that knows the data set says it"
    assert "NSD is left out: not every column has it." in note(table, True)
