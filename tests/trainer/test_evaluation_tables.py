"""What an evaluation says beyond scores, each figure computed again from ``per_case.csv`` by numpy."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from evaluations import IMAGES, NODE, SAM3_NODE, evaluate, nodules, refused, write_nodules
from official_sam3 import merges
from scipy.stats import pearsonr
from test_evaluation_protocol import SIDE, dump, row
from tiny_sam3 import SHAPE

from data_shards.dataset import ShardDataset
from data_shards.errors import UserError
from trainer.evaluation.columns import read_columns
from trainer.evaluation.comparing import compare_columns
from trainer.evaluation.curves import noise_curves
from trainer.evaluation.given import Asking, given_protocol
from trainer.evaluation.lesions import lesions_of
from trainer.evaluation.noise import moved
from trainer.evaluation.protocol import load_protocol
from trainer.evaluation.rows import COLUMNS, Row, read
from trainer.evaluation.sizes import sizes_of
from trainer.evaluation.subgroups import groups_of
from trainer.evaluation.tables import figures, intervals, section_of
from trainer.evaluation.text import interval_table, markdown, score_table
from trainer.evaluation.words import find
from trainer.metrics.volumes import dice
from trainer.models import SAM3
from trainer.modules.sam3 import SAM3Module
from trainer.report.statistics import ci95_of, quartiles
from trainer.volumes.asked import Asked

BOX = (10.0, 20.0, 29.0, 59.0)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_nodules(tmp_path_factory.mktemp("nodules"))


@pytest.fixture(scope="module")
def out(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models asked by box and one by text, with lesions and noise."""
    sets = [
        {
            "name": "n",
            "folder": str(shards),
            "kind": "2d",
            "objects": "term",
            "lesions": True,
            "noise": [20, 0, 5],
            "negatives": 2,
        }
    ]
    return evaluate(tmp_path_factory.mktemp("evaluated"), sets, ("Bright", "Dark", "SAM3"), pictures=2)


@pytest.fixture(scope="module")
def cells(out: Path) -> list[dict[str, str]]:
    with (out / "per_case.csv").open(newline="") as handle:
        return list(csv.DictReader(handle))


def of(cells: list[dict[str, str]], model: str, noise: float = 0.0) -> list[dict[str, str]]:
    """A model's rows of what is there."""
    there = [one for one in cells if float(one["size_true"]) > 0]
    return [one for one in there if one["model"] == model and float(one["noise"]) == noise]


def wilson(part: int, n: int) -> tuple[float, float]:
    """The 95 % confidence interval of a share (Wilson 1927)."""
    z, share = 1.959964, part / n
    middle, reach = share + z**2 / 2 / n, z * math.sqrt(share * (1 - share) / n + z**2 / 4 / n**2)
    return (middle - reach) / (1 + z**2 / n), (middle + reach) / (1 + z**2 / n)


def summary(out: Path) -> dict[str, Any]:
    (section,) = json.loads((out / "summary.json").read_text())["sections"]
    return section


def test_sizes_agree_as_numpy_says_from_the_table_alone(out, cells) -> None:
    assert {one["size_unit"] for one in cells} == {"mm2", "px"}, "a third of the images has no spacing"
    for one in of(cells, "Bright"):
        number = int(one["case"][2:])
        pixel = 1.0 if number % 3 == 2 else (0.5 + number / 4) * 0.5
        assert float(one["size_true"]) == pytest.approx(nodules(number)[1].sum() * pixel)
        assert float(one["size_predicted"]) == pytest.approx((2 * (6 + number) ** 2 + 9) * pixel)
    found = {(one["model"], one["unit"]): one for one in summary(out)["sizes"]}
    assert set(found) == {(model, unit) for model in ("Bright", "Dark", "SAM3") for unit in ("mm2", "px")}
    mine = [one for one in of(cells, "Bright") if one["size_unit"] == "mm2"]
    predicted, true = (np.array([float(one[f"size_{side}"]) for one in mine]) for side in ("predicted", "true"))
    expected = found["Bright", "mm2"]
    differences = predicted - true
    assert expected["count"] == len(mine) == 8
    assert expected["pearson_r"] == pytest.approx(np.corrcoef(predicted, true)[0, 1], abs=1e-6)
    assert expected["p_value"] == pytest.approx(pearsonr(predicted, true).pvalue, rel=1e-4)
    assert expected["bias"] == pytest.approx(differences.mean(), abs=1e-5)
    reach = 1.96 * differences.std(ddof=1)
    assert expected["limits"] == pytest.approx([differences.mean() - reach, differences.mean() + reach], abs=1e-4)
    assert expected["slope"] == pytest.approx(np.polyfit((predicted + true) / 2, differences, 1)[0], abs=1e-6)
    text = (out / "summary.md").read_text()
    assert f"| nodule | Bright | 8 | {np.median(true):.3g} | {expected['pearson_r']:.3f} (" in text
    page = (out / "report.html").read_text()
    assert page.count("Bland–Altman plot") == 2 * 3, "units, models"
    assert page.count("predicted over true size") == 2


def test_the_answer_is_said_first(out, cells) -> None:
    dsc = {model: np.array([float(one["dsc"]) for one in of(cells, model)]) for model in ("Bright", "Dark", "SAM3")}
    page = (out / "report.html").read_text()
    said = page.partition('<p class="answer">')[2].partition("</p>")[0]
    assert f"12 objects: mean DSC is {dsc['Bright'].mean():.3f} (median {np.median(dsc['Bright']):.3f}) with " in said
    gain = (dsc["Dark"] - dsc["Bright"]).mean()
    assert gain < -0.1 and f"; against it Dark −{-gain:.3f} (95 % CI −" in said
    assert "SAM3, by text ±0.000" in said, "it finds the same as Bright"
    assert said in (out / "summary.md").read_text()


def test_lesions_are_counted_from_the_table_alone(out, cells) -> None:
    for model, counts in (("Bright", (3, 2, 1)), ("SAM3", (3, 2, 1)), ("Dark", (3, 0, 0))):
        seen = {
            tuple(int(one[name]) for name in ("lesions", "lesions_found", "false_positives"))
            for one in of(cells, model)
        }
        assert seen == {counts}, "one of three cannot be seen, and a fleck is none"
    found = {one["model"]: one for one in summary(out)["lesions"]}
    mine = of(cells, "Bright")
    lesions, right, false = (sum(int(one[n]) for one in mine) for n in ("lesions", "lesions_found", "false_positives"))
    assert (lesions, right, false) == (36, 24, 12)
    bright = found["Bright"]
    assert (bright["sensitivity"], bright["precision"], bright["f1"]) == pytest.approx((24 / 36, 24 / 36, 24 / 36))
    assert bright["false_per_case"] == 1
    dice = sum(float(one["lesion_dice"]) for one in mine)
    assert dice == pytest.approx(24) and bright["lesion_wise_dice"] == pytest.approx(dice / (lesions + false))
    assert (found["Dark"]["sensitivity"], found["Dark"]["precision"]) == (0, None)
    assert bright["sensitivity_ci95"] == pytest.approx(wilson(24, 36))
    assert (
        "| nodule | Bright | 12 | 24 of 36 | 12 | 0.667 (0.503–0.798) | 0.667 | 0.667 | 1.00 |"
        in (out / "summary.md").read_text()
    )


def test_noise_has_rows_of_its_own_and_a_curve(out, cells) -> None:
    assert {float(one["noise"]) for one in cells} == {0, 5, 20}
    assert len(of(cells, "Bright")) == len(of(cells, "Bright", 20)) == IMAGES
    assert not of(cells, "SAM3", 5), "words have no noise"
    (bright, dark) = summary(out)["noise"]
    assert (bright["model"], dark["model"], bright["levels"], bright["count"]) == ("Bright", "Dark", [0, 5, 20], IMAGES)
    for level, mean, band in zip(bright["levels"], bright["means"], bright["bands"], strict=True):
        scores = np.array([float(one["dsc"]) for one in of(cells, "Bright", level)])
        assert mean == pytest.approx(scores.mean(), abs=1e-6)
        assert band == pytest.approx(ci95_of(scores, "mean"), abs=1e-5)
    assert bright["means"][2] < bright["means"][0], "sides that moved inwards cut the nodules"
    main = summary(out)["lines"][0]["scores"]["all"]["dsc"]
    assert main["n"] == IMAGES and main["mean"] == pytest.approx(bright["means"][0], abs=1e-6), "plain prompts alone"
    page = (out / "report.html").read_text()
    assert "mean DSC over the noise of the prompt: Bright from" in page
    assert "| mean DSC (95 % CI) | 0 % | 5 % | 20 % | from 0 to 20 % |" in (out / "summary.md").read_text()


def test_noise_moves_boxes_and_points_alike_for_all() -> None:
    mask = np.zeros((SIDE, SIDE), bool)
    mask[20:60, 10:30] = True
    one, about = Asked("", 0, box=BOX), ("case", "term", 3)
    small, large = (moved(one, mask, level, about).box for level in (5, 10))
    steps = [np.array(box) - np.array(BOX) for box in (small, large)]
    assert np.allclose(2 * steps[0], steps[1]), "the same way, farther"
    assert (np.abs(steps[1]) <= np.array([2, 4, 2, 4])).all() and np.abs(steps[1]).max() > 0.2, "10 % of 20 and 40 px"
    assert moved(one, mask, 5, about).box == small
    assert moved(one, mask, 5, ("case", "term", 4)).box != small
    assert moved(one, mask, 0, about) is one
    x0, y0, x1, y1 = moved(one, mask, 100, about).box
    assert 0 <= x0 <= x1 <= SIDE - 1 and 0 <= y0 <= y1 <= SIDE - 1
    point = Asked("", 0, points=((19.0, 39.0, 1),))
    x, y, sign = moved(point, mask, 10, about).points[0]
    assert (x - 19, y - 39) == pytest.approx(tuple(steps[1][:2])) and sign == 1
    drawn = np.array([np.array(moved(one, mask, 10, (str(n), "t", 0)).box) - BOX for n in range(400)])
    assert np.abs(drawn.mean(0)).max() < 0.3 and drawn.std(0) == pytest.approx(np.array([2, 4, 2, 4]) / 3**0.5, rel=0.1)


def test_text_stands_beside_boxes_on_the_same_terms(out, cells) -> None:
    (bright, reader) = (of(cells, model) for model in ("Bright", "SAM3"))
    assert {one["prompt"] for one in bright} == {"box"} and {one["prompt"] for one in reader} == {"text"}
    assert [(one["case"], one["term"], one["target"]) for one in bright] == [
        (one["case"], one["term"], one["target"]) for one in reader
    ]
    assert {one["target"] for one in reader} == {"-1"}
    assert [one["dsc"] for one in reader] == [one["dsc"] for one in bright], "both unite what is bright"
    text = (out / "summary.md").read_text()
    assert "| SAM3, by text | Bright |" in text, "compared on the same objects"
    assert "A model that is asked by text gets no more than its term in each image" in text
    (table,) = compare_columns(read_columns([str(out)]), metrics=["dsc", "hd95"])
    assert table.columns == ("Bright", "Dark", "SAM3, by text") and table.objects == IMAGES, "and no row with noise"
    assert table.asking[:2] == ("2d", "box or text")
    last = next(line for line in table.lines if line.metric == "dsc" and line.group == ("all",))
    assert last.cells["Bright"].median == pytest.approx(np.median([float(one["dsc"]) for one in bright]), abs=1e-6)


def test_absent_terms_have_rows_and_a_table_of_their_own(out, cells) -> None:
    gone = [one for one in cells if float(one["size_true"]) == 0]
    assert {one["model"] for one in gone} == {"SAM3"}, "boxes cannot be drawn around nothing"
    assert {(one["term"], float(one["size_predicted"]) > 0) for one in gone} == {("cyst", True), ("dark", False)}
    assert len(gone) == 2 * IMAGES
    (found,) = summary(out)["absent"]
    assert (found["present"], found["found"], found["absent"], found["in_vain"]) == (12, 12, 24, 12)
    areas = [float(one["size_predicted"]) for one in gone if one["term"] == "cyst" and one["size_unit"] == "px"]
    assert found["areas"]["px"] == pytest.approx(np.median(areas))
    there, vain = (
        "{:.3f} ({:.3f}–{:.3f})".format(share, *wilson(n, of)) for share, n, of in ((1, 12, 12), (0.5, 12, 24))
    )
    assert f"| SAM3, by text | 12 | {there} | 24 | {vain} |" in (out / "summary.md").read_text()
    assert summary(out)["objects"] == IMAGES, "they are no part of the scores"


def test_subgroups_are_those_of_the_table(out, cells) -> None:
    rows = [one for one in read(out / "per_case.csv") if one.model == "Bright" and not one.noise]
    assert {name: len(places) for name, places in groups_of(rows, "plane").items()} == {"axial": 4, "coronal": 8}
    spacing = groups_of(rows, "spacing")
    assert {name: len(places) for name, places in spacing.items()} == {
        "up to 1 mm": 2,
        "1 to 2.5 mm": 4,
        "2.5 to 5 mm": 2,
        "not known": 4,
    }
    sizes = groups_of(rows, "size")
    mm2 = np.array([one.size_true for one in rows if one.size_unit == "mm2"])
    low, _ = np.quantile(mm2, [1 / 3, 2 / 3])
    small = next(places for name, places in sizes.items() if name.startswith("small") and name.endswith("mm²"))
    assert sorted(rows[place].size_true for place in small) == sorted(mm2[mm2 <= low])
    assert sum(len(places) for places in sizes.values()) == IMAGES
    text = (out / "summary.md").read_text()
    for title in ("By data set", "By plane", "By spacing", "By size of the target"):
        assert f"### {title}" in text
    assert "### By term" not in text, "there is one alone"
    dsc = [float(one["dsc"]) for one in of(cells, "Bright") if one["dataset"] == "livers"]
    q1, median, q3 = np.percentile(dsc, [25, 50, 75])
    assert f"| livers | 6 | DSC | {median:.3f} ({q1:.3f}–{q3:.3f}) |" in text


def test_compare_takes_the_same_thirds(out, cells) -> None:
    (table,) = compare_columns(read_columns([str(out)]), by=("size",), metrics=["dsc"])
    mm2 = np.array([float(one["size_true"]) for one in of(cells, "Bright") if one["size_unit"] == "mm2"])
    low, high = np.quantile(mm2, [1 / 3, 2 / 3])
    counts = {line.group[0].partition(":")[0] + line.group[0][-4:]: line.objects for line in table.lines[:3]}
    third = [(mm2 <= low).sum(), ((mm2 > low) & (mm2 <= high)).sum(), (mm2 > high).sum()]
    assert counts == dict(zip(("small mm²", "medium mm²", "large mm²"), third, strict=True)), "and they rise"
    (planes,) = compare_columns(read_columns([str(out)]), by=("plane",), metrics=["dsc"])
    assert [(line.group[0], line.objects) for line in planes.lines] == [("axial", 4), ("coronal", 8), ("all", 12)]


def test_going_on_needs_no_model_and_other_subgroups_neither(out, shards, capsys) -> None:
    before = (out / "per_case.csv").read_text()
    sets = [{"name": "n", "folder": str(shards), "kind": "2d", "objects": "term", "lesions": True, "noise": [20, 0, 5]}]
    sets[0]["negatives"] = 2
    evaluate(out.parent, sets, ("Bright", "Dark", "SAM3"), "--by", "dataset", pictures=2)
    assert "0 cases computed" in capsys.readouterr().out
    assert (out / "per_case.csv").read_text() == before
    text = (out / "summary.md").read_text()
    assert "### By data set" in text and "### By size" not in text
    evaluate(out.parent, sets, ("Bright", "Dark", "SAM3"), pictures=2)
    assert "### By size" in (out / "summary.md").read_text()


def test_volumes_in_millilitres_and_text_in_slices(tmp_path, request) -> None:
    from test_evaluation_protocol import SPACING, truth_of

    squares = request.getfixturevalue("squares")
    sets = [
        {"name": "v", "folder": str(squares), "kind": "3d", "lesions": True, "terms": ["bright", "dark"], "noise": [10]}
    ]
    rows = read(evaluate(tmp_path, sets, ("Bright", "SAM3"), pictures=1) / "per_case.csv")
    true = sorted(float((truth_of(n) == 1).sum() * np.prod(SPACING) / 1000) for n in range(3))
    mine = [one for one in rows if (one.model, one.term, one.noise) == ("Bright", "bright", 0)]
    assert sorted(one.size_true for one in mine) == pytest.approx(true, abs=1e-6)
    assert {one.size_unit for one in rows} == {"ml"} and {one.spacing for one in rows} == {SPACING[0]}
    assert {one.lesions for one in rows} == {1}
    read_ones = [one for one in rows if one.model == "SAM3"]
    assert {(one.initial, one.prompt, one.noise) for one in read_ones} == {("text", "text", 0)}
    for one in read_ones:  # it takes the speck, of another term, for a part of what is bright
        voxels = one.size_true * 1000 / np.prod(SPACING)
        expected = (2 * voxels / (2 * voxels + 4), 1, 1) if one.term == "bright" else (0, 0, 0)
        assert (one.dsc, one.lesions_found, one.false_positives) == pytest.approx(expected, abs=1e-6)
    assert {(one.shown, one.first, one.slices) for one in read_ones if one.term == "bright"} == {(4, 1, 6)}
    assert {one.noise for one in rows if one.model == "copy"} == {0}
    assert len([one for one in rows if one.noise == 10]) == 6
    text = (tmp_path / "out/summary.md").read_text()
    assert "### Volumes in mL: do predicted and true sizes agree?" in text and "true, median (mL)" in text


@pytest.fixture(scope="module")
def squares(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from test_evaluation_protocol import shards

    return shards.__wrapped__(tmp_path_factory)


def test_sam3_itself_is_asked_by_text(shards, tmp_path, trainer_command) -> None:
    """A tiny SAM3 with random weights: its answers are nonsense, and the same as its instances united."""
    shape = {**asdict(SHAPE), "global_blocks": list(SHAPE.global_blocks)}
    arguments = {"weights": None, "image_size": 112, "tokenizer": merges(), "shape": shape}
    content = {
        "models": {"SAM3": {**SAM3_NODE, "init_args": arguments}},
        "sets": [{"folder": str(shards), "kind": "2d", "prompt": "text", "limit": 2}],
    }
    (tmp_path / "p.yaml").write_text("# Which?\n\n" + dump(content))
    code, _, err = trainer_command("evaluate", tmp_path / "p.yaml", "--out", tmp_path / "o", "--device", "cpu")
    assert code == 0, err
    rows = read(tmp_path / "o/per_case.csv")
    assert [(one.term, one.prompt, one.initial, one.target) for one in rows] == [("nodule", "text", "text", -1)] * 2
    torch.manual_seed(0)
    module = SAM3Module(SAM3(SHAPE, 112, weights=None, tokenizer=merges())).eval()
    data = ShardDataset(shards)
    for one in rows:
        position = data.index.keys.tolist().index(one.case)
        (mask,) = find(module, data, position, ["nodule"], "32-true")
        assert one.dsc == pytest.approx(dice(mask, data[position].targets[0].mask() != 0), abs=1e-6)
    module.threshold = 0.0
    assert find(module, data, 0, ["nodule"], "32-true").shape == (1, SIDE, SIDE)
    assert find(module, data, 0, ["nodule"], "32-true").any(), "every query counts then"


# --- figures


def section(rows: list[Row], **values: Any) -> Any:
    return section_of("2d", "box", ["s"], [("A", ""), ("B", "")], rows, **values)


def test_infinite_distances_are_counted_and_have_no_mean() -> None:
    distances = [1.0, 2.0, 3.0, math.inf, math.inf]
    rows = [row("A", str(n), 0.5, hd95=value) for n, value in enumerate(distances)]
    found = figures(rows, "hd95")
    assert (found.n, found.mean, found.q1, found.median, found.q3, found.infinite) == (5, None, 2, 3, math.inf, 2)
    assert score_table(section(rows), "hd95")[1][0][1] == "3.0 (2.0–∞), 2 ∞"
    mean, median = intervals(rows, "hd95")
    assert mean is None and median[0] in distances and median[1] == math.inf
    (line,) = [cells for cells in interval_table(section(rows))[1] if cells[0] == "HD95"]
    assert line[1:3] == ["A", "–"] and line[3].startswith("3.0 (")
    assert "HD95 in mm, infinite where a mask is empty" in markdown("p", "Why?", [section(rows)], [])
    assert quartiles(np.array([1.0, 2.0, 4.0])) == (1.5, 2.0, 3.0)


def test_intervals_of_many_scores_are_quick_and_right() -> None:
    import time

    values = np.random.default_rng(3).beta(5, 2, 76_000)
    start = time.process_time()
    mean, median = ci95_of(values, "mean"), ci95_of(values, "median")
    assert time.process_time() - start < 1
    reach = 1.96 * values.std(ddof=1) / values.size**0.5
    assert mean == pytest.approx((values.mean() - reach, values.mean() + reach), abs=1e-6)
    assert median[0] < np.median(values) < median[1] and median[1] - median[0] < 5 * reach


def test_curves_are_of_what_every_level_has() -> None:
    rows = [
        row(model, str(n), 0.9 - level / 100 - n / 10, noise=level)
        for model in "AB"
        for n in range(3)
        for level in (0.0, 10.0)
    ]
    rows = [one for one in rows if (one.model, one.case, one.noise) != ("B", "2", 10.0)]
    curves = noise_curves(section(rows))
    assert [(curve.line[0], curve.count, curve.levels) for curve in curves] == [("A", 2, (0, 10)), ("B", 2, (0, 10))]
    assert curves[0].means == pytest.approx((0.85, 0.75))
    assert len(section(rows).objects) == 3, "the scores are of plain prompts"
    assert noise_curves(section([one for one in rows if not one.noise])) == []


def test_old_tables_are_read(tmp_path) -> None:
    old = COLUMNS[: COLUMNS.index("made_by") + 1]
    rows = [row(model, str(n), 0.5 + n / 10, hd95=2.0) for model in "AB" for n in range(3)]
    with (tmp_path / "per_case.csv").open("w", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow(old)
        writer.writerows(["" if getattr(one, name) is None else getattr(one, name) for name in old] for one in rows)
    assert read(tmp_path / "per_case.csv") == rows, "what they lack is not known"
    (table,) = compare_columns(read_columns([str(tmp_path)]))
    assert table.objects == 3 and table.columns == ("A", "B")
    one = section(read(tmp_path / "per_case.csv"))
    assert sizes_of(one) == [] and lesions_of(one) == []
    assert groups_of(one.objects, "size") == {}
    assert replace(rows[0], noise=0.0) == rows[0]


# --- mistakes

TWO_D = {"kind": "2d"}
MISTAKES = {
    "words for who sees boxes": ([{**TWO_D, "prompt": "text"}], NODE, {}, "models.A: only SAM3 takes words"),
    "a box for who reads": ([TWO_D], SAM3_NODE, {}, "needs prompt text, or objects term"),
    "a mask for who reads": ([{"kind": "3d", "prompt": "mask"}], SAM3_NODE, {}, "take prompt text or box"),
    "a margin of words": ([{**TWO_D, "prompt": "text", "margin": 3}], SAM3_NODE, {}, "margin belongs to boxes"),
    "noise of words": ([{**TWO_D, "prompt": "text", "noise": [3]}], SAM3_NODE, {}, "noise belongs to boxes"),
    "terms of volumes": ([{"kind": "3d", "objects": "term"}], NODE, {}, "objects belongs to images"),
    "negatives of boxes": ([{**TWO_D, "negatives": 2}], NODE, {}, "negatives are absent terms of images"),
    "lesions of videos": ([{"kind": "video", "lesions": True}], NODE, {}, "not in videos"),
    "too much noise": ([{**TWO_D, "noise": [5, 120]}], NODE, {}, "noise is 0 to 100 percent of a box's sides, not 120"),
    "noise of the truth": ([{"kind": "3d", "initial": ["truth"], "noise": [5]}], NODE, {}, "noise moves boxes and"),
    "an unknown grouping": ([TWO_D], NODE, {"by": ["sise"]}, "by: there is no 'sise'; did you mean 'size'?"),
    "a reserved name": ([TWO_D], NODE, {"models": {"text": NODE}}, "'text' means something else here"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_line(name, shards, tmp_path, trainer_command) -> None:
    sets, node, keys, expected = MISTAKES[name]
    content = {"models": {"A": node}, "sets": [{"folder": str(shards), **one} for one in sets], **keys}
    assert expected in refused(tmp_path, content, trainer_command)


def test_subgroups_of_the_command_line(shards, tmp_path, trainer_command) -> None:
    (tmp_path / "p.yaml").write_text(
        "# Which?\n\nmodels: {A: {class_path: trainer.models.LiteMedSAM}}\nsets: [{folder: x, kind: 2d}]\n"
    )
    code, _, err = trainer_command("evaluate", tmp_path / "p.yaml", "--out", tmp_path / "o", "--by", "sise")
    assert code == 2 and "--by: there is no 'sise'; did you mean 'size'?" in err
    code, _, err = trainer_command("evaluate", tmp_path / "p.yaml", "--out", tmp_path / "o", "--lesions")
    assert code == 2 and "--lesions belongs to --data; in a protocol it is a key of a set" in err


def test_what_the_command_line_makes_of_it(shards, tmp_path) -> None:
    recipe = str(Path(__file__).parents[2] / "recipes/quickstart.yaml")
    asking = Asking(objects="term", lesions=True, noise=(5.0, 10.0), negatives=3)
    loaded = given_protocol([f"A={recipe}"], [str(shards)], ["box", "point"], asking, ["size"])
    for one, prompt in zip(loaded.protocol.sets, ("box", "point"), strict=True):
        assert (one.prompt, one.objects, one.lesions, one.levels, one.negatives) == (prompt, "term", True, (5, 10), 3)
    (tmp_path / "again.yaml").write_text(loaded.text)
    assert load_protocol(tmp_path / "again.yaml").protocol == loaded.protocol, "what is written says all of it"
    with pytest.raises(UserError, match=r"^trainer evaluate: noise is 0 to 100 percent"):
        given_protocol([f"A={recipe}"], [str(shards)], ["box"], Asking(noise=(-1.0,)))
