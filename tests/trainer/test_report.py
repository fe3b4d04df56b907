"""The report: its figures against references, its words against the data, its page against the outside world."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import wilcoxon

from data_shards.errors import UserError, run_command
from trainer.report import write_report, write_summary
from trainer.report.answer import answer, limits, subject
from trainer.report.charts import nice_ticks, smooth
from trainer.report.cli import report_command
from trainer.report.curves import read_curves
from trainer.report.data import read_run
from trainer.report.markup import duration, measure, p_value, signed
from trainer.report.panels import Panel, load_panels, save_panels
from trainer.report.pictures import Choice, choose, crop_of, draw
from trainer.report.sheet import TILE, draw_sheet, draw_tile
from trainer.report.statistics import bootstrap_ci95, compare
from trainer.run import Run
from trainer.scores import CaseScore, volume_of, write_scores

KEYS = [f"toy-c10868632198ea58-a{number:05d}" for number in range(12)]
TERM = "lesion <script>alert(1)</script> & co"
BEFORE = np.linspace(0.30, 0.52, 12)
AFTER = BEFORE + np.linspace(0.45, 0.34, 12) * np.where(np.arange(12) == 3, -0.1, 1)
RECIPE = (
    "# Does it <help>?\n# Caveat: one & only.\n#\n# Launch: make x\n# lightning.pytorch==2.6.6\nseed_everything: 0\n"
)


def write_evaluation(run: Run, name: str, scores: np.ndarray, keys: list[str] = KEYS, *, panels: bool = True) -> None:
    folder = run.evaluation(name)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "per_case.csv").open("w", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow(["key", "target", "term", "modality", "area_px", "dsc", "iou"])
        for number, (key, dsc) in enumerate(zip(keys, scores, strict=True)):
            writer.writerow([key, 0, TERM, "MR", 50 + number, dsc, dsc / (2 - dsc)])
    if panels:
        save_panels(folder / "panels.npz", discs(keys[::2], shift=1 if name == "tuned" else 4))


def discs(keys: list[str], shift: int) -> list[Panel]:
    """Discs whose predictions are shifted, the more the later; every third image is RGB, all sizes differ."""
    made = []
    for number, key in enumerate(keys):
        height, width = 40 + number, 60 + 2 * number
        rows, cols = np.mgrid[:height, :width]
        truth = ((rows - 20) ** 2 + (cols - 30) ** 2 < 80).astype(np.uint8)
        image = np.random.default_rng(number).integers(0, 255, (height, width), dtype=np.uint8)
        picture = np.stack([image] * 3, -1) if number % 3 == 2 else image
        box = np.array([21, 11, 39, 29], np.float32)
        made.append(Panel(key, TERM, picture, truth, np.roll(truth, shift + number, axis=1), box))
    return made


def write_log(run: Run, version: int, rows: list[dict[str, object]]) -> None:
    folder = run.root / "logs" / f"version_{version}"
    folder.mkdir(parents=True)
    names = list(dict.fromkeys(name for row in rows for name in row))
    with (folder / "metrics.csv").open("w", newline="") as handle:
        writer = csv.DictWriter(handle, names)
        writer.writeheader()
        writer.writerows(rows)


def write_export(run: Run, name: str, verified: bool | None, **more: object) -> None:
    folder = run.exports / name
    folder.mkdir(parents=True)
    (folder / "export.json").write_text(json.dumps({"format": name, "verified": verified, **more}))


@pytest.fixture
def empty(tmp_path: Path) -> Run:
    """A run of which only the recipe is there."""
    run = Run(tmp_path / "toy-run")
    run.root.mkdir()
    run.recipe.write_text(RECIPE)
    return run


@pytest.fixture
def full(empty: Run) -> Run:
    """A run with everything, whose training was resumed at step 6."""
    write_evaluation(empty, "untouched", BEFORE)
    write_evaluation(empty, "tuned", AFTER)
    rate = "train/images_per_second"
    write_log(empty, 0, [{"step": s, "train/loss": 1.0, "train/dsc": 0.5, rate: 1 if s == 0 else 8} for s in range(9)])
    write_log(empty, 1, [{"step": 0, "test/dsc": 0.4}])
    write_log(empty, 2, [{"step": s, "train/loss": 0.25, "train/dsc": 0.75, rate: 9} for s in range(6, 12)])
    empty.trace.write_text("epoch,batch,step,loss,keys\n0,0,11,1.0,toy-c10868632198ea58-a00099 other-v-a00001\n")
    empty.stages.write_text(json.dumps({"fit": 100.5, "evaluate-untouched": 10.25}))
    empty.record.write_text(
        json.dumps(
            {
                "name": "toy & run",
                "question": "Does it <help>? Caveat: one & only.",
                "caveat": "one & only.",
                "git_commit": "c0ffee",
                "git_dirty": True,
                "versions": {"torch": "2.14.1"},
                "model": {"name": "Tiny", "parameters": 2000000, "trainable": 500000, "preprocessing": {"size": 128}},
                "data": {"train": {"folder": "shards/train", "index_sha256": "ab" * 32, "samples": 50}},
            }
        )
    )
    write_export(empty, "litemedsam", True, consumer="tool", consumer_version="1.2", max_logit_difference=2e-5)
    return empty


def page_of(run: Run) -> str:
    return write_report(run).read_text()


class Outline(HTMLParser):
    """Tags, attributes and visible text of a page; complains of tags that are not closed."""

    VOID = frozenset(("meta", "br", "input"))

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(page)
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


class TestStatistics:
    def test_agrees_with_scipy(self) -> None:
        generator = np.random.default_rng(5)
        before = generator.uniform(0, 0.8, 60)
        after = np.clip(before + generator.normal(0.03, 0.1, 60), 0, 1)
        found = compare(before, after)
        assert found.p_value == wilcoxon(after, before).pvalue
        assert found.gain == pytest.approx((after - before).mean())
        assert (found.rose, found.fell) == ((after > before).sum(), (after < before).sum())

    def test_interval_is_that_of_the_mean(self) -> None:
        values = np.random.default_rng(1).normal(0.2, 0.1, 400)
        low, high = bootstrap_ci95(values) or (0, 0)
        error = 1.96 * values.std(ddof=1) / 20
        assert low == pytest.approx(values.mean() - error, abs=0.1 * error)
        assert high == pytest.approx(values.mean() + error, abs=0.1 * error)
        assert bootstrap_ci95(values) == (low, high), "the bootstrap is seeded"
        assert bootstrap_ci95(values, seed=1) != (low, high)

    def test_chunks_do_not_repeat_the_same_draws(self) -> None:
        values = np.random.default_rng(1).normal(0.2, 0.1, 2000)  # 20 chunks
        low, high = bootstrap_ci95(values) or (0, 0)
        assert high - low == pytest.approx(2 * 1.96 * values.std() / np.sqrt(2000), rel=0.05)

    def test_too_little_for_a_test(self) -> None:
        one = compare(np.array([0.5]), np.array([0.7]))
        assert one.gain_ci95 is None
        assert one.p_value is None
        assert compare(np.array([0.5, 0.6]), np.array([0.5, 0.6])).p_value is None
        with pytest.raises(ValueError, match="equally long"):
            compare(np.array([]), np.array([]))


class TestCurves:
    def test_a_resumed_run_is_one_curve(self, full: Run) -> None:
        curves = read_curves(full.root / "logs")
        assert list(curves["train/loss"].items()) == [(s, 1.0 if s < 6 else 0.25) for s in range(12)]
        assert curves["test/dsc"] == {0: 0.4}, "the version of an evaluation neither cuts nor is cut"

    def test_a_run_begun_anew_keeps_nothing_of_the_old_one(self, empty: Run) -> None:
        write_log(empty, 0, [{"step": s, "train/loss": 9.0, "val/dsc": 0.5} for s in range(20)])
        write_log(empty, 1, [{"step": s, "train/loss": 1.0} for s in range(5)])
        assert read_curves(empty.root / "logs") == {"train/loss": dict.fromkeys(range(5), 1.0)}

    def test_versions_are_in_order_of_their_numbers(self, empty: Run) -> None:
        write_log(empty, 10, [{"step": 0, "train/loss": 2.0}])
        write_log(empty, 9, [{"step": 0, "train/loss": 1.0}])
        assert read_curves(empty.root / "logs")["train/loss"] == {0: 2.0}

    def test_blank_and_infinite_cells_are_left_out(self, empty: Run) -> None:
        write_log(empty, 0, [{"step": 0, "a": ""}, {"step": 1, "a": "nan"}, {"step": 2, "a": 3.0}, {"step": 2, "b": 1}])
        assert read_curves(empty.root / "logs") == {"a": {2: 3.0}, "b": {2: 1.0}}

    def test_damage_is_one_line_with_the_file(self, empty: Run) -> None:
        write_log(empty, 0, [{"step": 0, "train/loss": "abc"}, {"step": 1, "train/loss": 1.0}])
        with pytest.raises(UserError, match=r"version_0/metrics.csv: .*abc"):
            read_curves(empty.root / "logs")

    @pytest.mark.parametrize("rest", ["", "1", "1,", "1,7,0", "1,7,0.", ",,\r\n", "1,7\r\n", "\0\0\0"])
    def test_a_last_row_that_was_cut_is_left_out(self, empty: Run, rest: str) -> None:
        folder = empty.root / "logs" / "version_0"
        folder.mkdir(parents=True)
        (folder / "metrics.csv").write_text(f"epoch,step,train/loss\r\n0,6,0.5\r\n{rest}")
        assert read_curves(empty.root / "logs") == {"train/loss": {6: 0.5}}

    @pytest.mark.parametrize("row", [",,", "1", "1,x,0.5", "1,inf,0.5", "1,7,0.5,9"])
    def test_damage_before_the_last_row_stays_an_error(self, empty: Run, row: str) -> None:
        folder = empty.root / "logs" / "version_0"
        folder.mkdir(parents=True)
        (folder / "metrics.csv").write_text(f"epoch,step,train/loss\r\n{row}\r\n0,8,0.5\r\n")
        with pytest.raises(UserError, match=r"version_0/metrics.csv: not a readable log"):
            read_curves(empty.root / "logs")

    def test_smoothing_keeps_constants_and_the_mean_level(self) -> None:
        assert smooth(np.full(50, 0.7)) == pytest.approx(np.full(50, 0.7))
        noisy = np.random.default_rng(0).normal(0.5, 0.1, 300)
        assert smooth(noisy).std() < 0.4 * noisy.std()
        assert smooth(np.array([0.4])) == pytest.approx([0.4])

    def test_ticks_are_round_and_cover(self) -> None:
        assert nice_ticks(0, 1, 4) == [0, 0.25, 0.5, 0.75, 1]
        ticks = nice_ticks(0.113, 0.94)
        assert ticks[0] <= 0.113 < ticks[1]
        assert ticks[-2] < 0.94 <= ticks[-1]
        assert len(nice_ticks(3, 3)) > 1


class TestPanels:
    def test_round_trip_of_mixed_sizes_without_pickle(self, tmp_path: Path) -> None:
        made = discs(KEYS[:4], shift=2)
        points = np.array([[3, 4, 1], [5.5, 6, 0]], np.float32)
        made[1] = replace(made[1], points=points, box=np.full(4, np.nan, np.float32))
        save_panels(tmp_path / "deep" / "panels.npz", made)
        panels = load_panels(tmp_path / "deep" / "panels.npz")
        assert [panel.key for panel in panels] == KEYS[:4]
        assert panels[2].image.shape == (42, 64, 3)
        for panel, given in zip(panels, made, strict=True):
            assert panel.term == TERM
            for name in ("image", "truth", "prediction", "box", "points"):
                stored = getattr(panel, name)
                assert stored.dtype == (np.float32 if name in ("box", "points") else np.uint8)
                np.testing.assert_array_equal(stored, getattr(given, name))
        assert [path.name for path in (tmp_path / "deep").iterdir()] == ["panels.npz"], "no temporary file is left"

    def test_sizes_must_agree(self, tmp_path: Path) -> None:
        made = discs(KEYS[:1], shift=2)
        with pytest.raises(ValueError, match="truth"):
            save_panels(tmp_path / "p.npz", [replace(made[0], truth=made[0].truth[1:])])

    @pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut", b"no npz at all"])
    def test_damage_is_one_line(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "p.npz").write_bytes(content)
        with pytest.raises(UserError, match=r"p\.npz: no readable panels"):
            load_panels(tmp_path / "p.npz")

    def test_dsc(self) -> None:
        truth, prediction = np.zeros((4, 4), np.uint8), np.zeros((4, 4), np.uint8)
        truth[:2], prediction[1:3] = 1, 1
        panel = Panel("k", "t", truth, truth, prediction, np.zeros(4, np.float32))
        assert panel.dsc == 0.5
        assert Panel("k", "t", truth, 0 * truth, 0 * truth, panel.box).dsc == 1.0

    def test_shows_worst_median_and_best_of_those_kept(self, full: Run) -> None:
        choices = choose(read_run(full))
        ranked = [choice.after.dsc for choice in choices if choice.after]
        assert len(choices) == 6
        assert ranked == sorted(ranked)
        assert (choices[0].why, choices[-1].why) == ("Worst", "Best")
        assert {"Median", "Lower quartile", "Upper quartile"} <= {choice.why for choice in choices}
        assert all(choice.before and choice.after and choice.before.key == choice.after.key for choice in choices)

    def test_outline_is_where_the_mask_is(self) -> None:
        """Area and place of the drawn polygon are those of the pixels."""
        truth = np.zeros((200, 300), np.uint8)
        truth[100:140, 200:260] = 1
        panel = Panel("k", "t", truth, truth, truth, np.array([200, 100, 259, 139], np.float32))
        drawn = draw(Choice("Best", None, panel), 0)
        found = re.search(
            r'class="truth" transform="translate\((\S+) (\S+)\) scale\((\S+)\)" d="M(\S+) (\S+)l([^z]+)z"', drawn
        )
        assert found
        dx, dy, scale, x, y = (float(number) for number in found.groups()[:5])
        moves = np.array([int(number) for number in re.findall(r"-?\d+", found.group(6))]).reshape(-1, 2)
        points = (np.cumsum(np.vstack([[x, y], moves]), axis=0)) * scale + [dx, dy]
        assert points.min(axis=0) == pytest.approx([200, 100])
        assert points.max(axis=0) == pytest.approx([260, 140])
        xs, ys = points.T
        area = abs(np.sum(xs * np.roll(ys, -1) - ys * np.roll(xs, -1))) / 2
        assert area == pytest.approx(2400, abs=1), "but for the cut corners"

    def test_a_mask_of_very_many_pieces_stays_light(self) -> None:
        noise = (np.random.default_rng(0).random((1200, 1200)) > 0.5).astype(np.uint8)
        panel = Panel("k", "t", noise * 255, noise, 1 - noise, np.array([0, 0, 1199, 1199], np.float32))
        drawn = draw(Choice("Worst", panel, panel), 0)
        assert len(drawn) < 450_000, "six of them fit a page of 3 MB"
        assert re.search(r'class="truth" transform="[^"]*" d="M', drawn)

    def test_crop_holds_the_target_within_the_image(self) -> None:
        truth = np.zeros((200, 300), np.uint8)
        truth[0:20, 290:300] = 1
        panel = Panel("k", "t", truth, truth, truth, np.array([288, 0, 299, 21], np.float32))
        crop = crop_of(Choice("Worst", None, panel))
        assert 48 <= crop.side <= 60
        assert crop.x <= 288
        assert crop.x + crop.side == 300
        assert crop.y == 0


class TestSummary:
    def test_figures(self, full: Run) -> None:
        summary = write_summary(full)
        assert summary == json.loads((full.root / "summary.json").read_text())
        assert list(summary) == [
            *("dsc_before", "dsc_after", "iou_before", "iou_after", "nsd_before", "nsd_after", "targets", "volumes"),
            *("dsc_gain_ci95", "p_value"),
            *("images_per_second", "seconds", "stages", "export_verified", "versions"),
        ]
        assert summary["dsc_before"] == pytest.approx(BEFORE.mean())
        assert summary["iou_after"] == pytest.approx((AFTER / (2 - AFTER)).mean())
        assert summary["targets"] == 12
        assert summary["volumes"] == 1
        low, high = summary["dsc_gain_ci95"]
        assert low < (AFTER - BEFORE).mean() < high
        assert summary["p_value"] == wilcoxon(AFTER, BEFORE).pvalue
        assert summary["images_per_second"] == 9.0, "the first, 1, is left out: median of five 8 and six 9"
        assert summary["seconds"] == 110.75
        assert summary["export_verified"] is True
        assert summary["versions"] == {"torch": "2.14.1"}

    def test_nothing_is_invented(self, empty: Run) -> None:
        assert set(write_summary(empty).values()) == {None}

    @pytest.mark.parametrize("second", [False, None])
    def test_one_bad_export_spoils_the_gate(self, full: Run, second: bool | None) -> None:
        write_export(full, "onnx", second)
        assert write_summary(full)["export_verified"] is False

    def test_only_common_targets_are_compared(self, full: Run) -> None:
        write_evaluation(full, "untouched", BEFORE[:5], KEYS[:5])
        summary = write_summary(full)
        assert summary["targets"] == 5
        assert summary["dsc_after"] == pytest.approx(AFTER[:5].mean())
        assert "5 targets that both evaluations scored; 0 were scored only before and 7 only after" in page_of(full)

    def test_means_of_different_targets_do_not_stand_side_by_side(self, full: Run) -> None:
        write_evaluation(full, "untouched", BEFORE, [f"other-{key}" for key in KEYS])
        summary = write_summary(full)
        assert summary["dsc_before"] is None
        assert summary["dsc_after"] == pytest.approx(AFTER.mean())
        assert "no target in common" in page_of(full)


class TestWords:
    def said(self, run: Run, before: np.ndarray, after: np.ndarray) -> str:
        write_evaluation(run, "untouched", before, panels=False)
        write_evaluation(run, "tuned", after, panels=False)
        return answer(read_run(run)).replace("\u00a0", " ")

    def test_rise(self, empty: Run) -> None:
        said = self.said(empty, BEFORE, BEFORE + np.linspace(0.3, 0.4, 12))
        assert "On 12 test slices mean DSC rose from 0.410 to 0.760 (+0.350, 95 % CI +0.3" in said
        assert said.endswith("Wilcoxon p < 0.001); all 12 rose.")

    def test_fall(self, empty: Run) -> None:
        said = self.said(empty, BEFORE + 0.3, BEFORE + np.linspace(0.1, 0.2, 12))
        assert "mean DSC fell from 0.710 to 0.560 (−0.150, 95 % CI −0.1" in said
        assert said.endswith("all 12 fell. Tuning made it worse here.")
        assert "rose" not in said

    def test_no_clear_change(self, empty: Run) -> None:
        said = self.said(empty, BEFORE, BEFORE + np.tile([0.1, -0.09], 6))
        assert "went from 0.410 to 0.415" in said
        assert "6 rose and 6 fell. That is no clear change: the interval includes 0." in said

    def test_unchanged(self, empty: Run) -> None:
        said = self.said(empty, BEFORE, BEFORE)
        assert "stayed at 0.410 (±0.000, 95 % CI ±0.000 to ±0.000); all 12 stayed the same." in said
        assert "Wilcoxon" not in said

    def test_a_single_target(self, empty: Run) -> None:
        write_evaluation(empty, "untouched", BEFORE[:1], KEYS[:1])
        write_evaluation(empty, "tuned", AFTER[:1], KEYS[:1])
        said = answer(read_run(empty))
        assert said.startswith("On 1 test slice mean DSC went from 0.300 to 0.750 (+0.450).")
        assert "neither an interval nor a test" in said

    @pytest.mark.parametrize(("name", "said"), [("untouched", "before"), ("tuned", "after")])
    def test_one_evaluation(self, empty: Run, name: str, said: str) -> None:
        write_evaluation(empty, name, BEFORE)
        other = {"before": "after", "after": "before"}[said]
        assert answer(read_run(empty)) == (
            f"On 12 test slices mean DSC is 0.410 {said} tuning. Whether tuning changed that is not known: "
            f"there is no evaluation {other} it."
        )
        text = Outline(page_of(empty)).text
        assert f"the evaluation {other} tuning: trainer test -c" in text
        assert "Every target" not in text

    def test_unseen_is_said_only_where_the_trace_shows_it(self, full: Run) -> None:
        assert subject(read_run(full)) == "12 unseen slices"
        assert "Other slices of this volume were trained on." in limits(read_run(full))
        full.trace.write_text(f"epoch,batch,step,loss,keys\n0,0,0,1.0,{KEYS[0]} {KEYS[4]}\n")
        assert subject(read_run(full)) == "12 test slices"
        assert "2 of the 12 evaluated samples were also trained on" in " ".join(limits(read_run(full)))

    def test_volumes_are_counted(self, full: Run) -> None:
        assert "All 12 slices come from one volume" in limits(read_run(full))[0]
        two = [f"toy-{'ab'[number % 2]}-a{number:05d}" for number in range(12)]
        write_evaluation(full, "untouched", BEFORE, two)
        write_evaluation(full, "tuned", AFTER, two)
        assert "The 12 slices come from 2 volumes" in limits(read_run(full))[0]
        plain = [f"photo-{number:03d}x" for number in range(12)]
        write_evaluation(full, "untouched", BEFORE, plain)
        write_evaluation(full, "tuned", AFTER, plain)
        assert limits(read_run(full)) == []
        assert subject(read_run(full)) == "12 unseen images"
        assert volume_of("icbm152-white-matter-c10868632198ea58-a00058") == "icbm152-white-matter-c10868632198ea58"

    @pytest.mark.parametrize(("targets", "verdict"), [(2, "went"), (5, "went"), (6, "rose")])
    def test_few_targets_get_no_verdict(self, empty: Run, targets: int, verdict: str) -> None:
        before = BEFORE[:targets]
        for name, scores in (("untouched", before), ("tuned", before + np.linspace(0.1, 0.2, targets))):
            write_evaluation(empty, name, scores, KEYS[:targets], panels=False)
        compared = read_run(empty).compare("dsc")
        assert compared
        assert compared.gain_ci95
        assert compared.gain_ci95[0] > 0, "the interval alone would say that it rose"
        said = answer(read_run(empty))
        assert f"mean DSC {verdict} from" in said
        assert (f"{targets} targets are too few to tell" in said) is (verdict == "went")

    def test_an_interval_without_a_test_is_no_verdict(self, empty: Run) -> None:
        gains = np.array([0.4, 0.35, 0.3, 0.25, -0.01, -0.02, -0.03, -0.04, -0.05, -0.06, 0.3, -0.07])
        for sign in (1, -1):
            write_evaluation(empty, "untouched", BEFORE, panels=False)
            write_evaluation(empty, "tuned", BEFORE + sign * gains, panels=False)
            compared = read_run(empty).compare("dsc")
            assert compared
            assert compared.p_value is not None
            assert compared.gain_ci95
            assert min(np.abs(compared.gain_ci95)) > 0
            assert compared.gain_ci95[0] * compared.gain_ci95[1] > 0
            assert compared.p_value > 0.05
            said = answer(read_run(empty))
            assert "mean DSC went from" in said
            assert "no clear change: the interval excludes 0, but p is not below 0.05" in said
            assert "worse" not in said

    def test_numbers(self) -> None:
        assert [signed(value) for value in (0.5, -0.5, 0.0004, None)] == ["+0.500", "−0.500", "±0.000", "–"]
        assert [duration(value) for value in (4.45, 144.58, 59.99, 7384, None)] == [
            *("4.5 s", "2 min 25 s", "60.0 s", "2 h 03 min", "–"),
        ]
        assert p_value(2e-13).replace("\u00a0", " ") == "p < 0.001"
        assert p_value(0.0312).replace("\u00a0", " ") == "p = 0.031"
        assert [measure(value).replace("\u00a0", " ") for value in (2.1e-5, 0.31, 0, 1500.0, float("inf"))] == [
            *("2.1 × 10⁻⁵", "0.31", "0", "1,500", "inf"),
        ]


SCORED = {
    "data": {"test": {"folder": "a", "index_sha256": "ab" * 32, "samples": 12}},
    "preprocessing": {"size": 128, "mean": [0.5]},
    "prompts": {"margin": 5},
    "precision": "32-true",
}


class TestScoredAlike:
    def unlike(self, run: Run, **changes: object) -> list[str]:
        for name, record in (("untouched", SCORED), ("tuned", {**SCORED, **changes})):
            (run.evaluation(name) / "evaluation.json").write_text(json.dumps(record))
        return read_run(run).unlike()

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"data": {"test": {"folder": "b", "index_sha256": "cd" * 32}}}, "test data (index abababab…, then cd"),
            ({"preprocessing": {"size": 256, "mean": [0.5]}}, "preprocessing size (128, then 256)"),
            ({"prompts": {"margin": 5, "seed": 1}}, "prompts seed (none, then 1)"),
            ({"precision": "<bf16>"}, "precision (32-true, then <bf16>)"),
        ],
    )
    def test_a_difference_is_named_everywhere(
        self, full: Run, capsys: pytest.CaptureFixture[str], changes: dict, said: str
    ) -> None:
        found = self.unlike(full, **changes)
        assert len(found) == 1
        assert found[0].startswith(said)
        warning = f"Not scored alike: {found[0]}; the difference may come from that."
        page = page_of(full)
        assert warning in Outline(page).text
        assert "<bf16>" not in page
        assert report_command([str(full.root)]) == 0
        assert "warning: n" + warning[1:] in capsys.readouterr().out

    def test_nothing_is_said_of_what_is_alike_or_not_recorded(self, full: Run) -> None:
        assert self.unlike(full, data={"test": {"folder": "moved", "index_sha256": "ab" * 32}}) == []
        assert self.unlike(full, data={"val": {"index_sha256": "cd" * 32}}, preprocessing=None, prompts=None) == []
        (full.evaluation("tuned") / "evaluation.json").unlink()
        assert read_run(full).unlike() == []
        assert "Not scored alike" not in page_of(full)


class TestTraces:
    @pytest.mark.parametrize("name", ["trace-rank1.csv", "trace-rank12.csv"])
    def test_the_samples_of_every_process_count(self, full: Run, name: str) -> None:
        assert subject(read_run(full)) == "12 unseen slices"
        (full.root / name).write_text(f"epoch,batch,step,loss,keys\n0,0,20,1.0,{KEYS[0]}\n")
        data = read_run(full)
        assert data.steps == 21
        assert subject(data) == "12 test slices"
        assert "1 of the 12 evaluated samples was also trained on" in " ".join(limits(data))

    @pytest.mark.parametrize(
        "content",
        [
            b"epoch,batch,step,loss,keys\n0,0,0,1.0,\xff\xfe\n",
            b"epoch,batch,step,loss,keys\n0,0,x,1.0,a\n0,1,1,1.0,b\n",
            b"epoch,batch,step,loss\n0,0,0,1.0\n0,1,1,1.0\n",
            b"epoch,batch,step,loss,keys\n0,0,0\n0,1,1,1.0,b\n",
        ],
    )
    def test_damage_is_one_line(self, full: Run, content: bytes, capsys: pytest.CaptureFixture[str]) -> None:
        (full.root / "trace-rank1.csv").write_bytes(content)
        assert run_command(lambda: report_command([str(full.root)]), "trainer") == 2
        shown = capsys.readouterr().err
        assert "trace-rank1.csv: not a readable trace of samples" in shown
        assert shown.count("\n") == 1

    def test_a_last_row_that_was_cut_is_left_out(self, full: Run) -> None:
        full.trace.write_text("epoch,batch,step,loss,keys\n0,0,0,1.0,a b\n0,1,1,1.0,c d")
        data = read_run(full)
        assert (data.trained, data.steps) == ({"a", "b"}, 1)

    def test_steps_are_those_of_the_log_without_a_trace(self, full: Run, empty: Run) -> None:
        full.trace.write_text("epoch,batch,step,loss,keys\n0,0,29,1.0,a\n0,0,14,1.0,a\n")
        assert read_run(full).steps == 30
        full.trace.unlink()
        assert read_run(full).steps == 12
        assert read_run(full).trained is None


class TestRecords:
    @pytest.mark.parametrize(
        ("name", "content"),
        [
            ("run.json", []),
            ("run.json", {"model": []}),
            ("run.json", {"model": {"parameters": "many"}}),
            ("run.json", {"data": {"train": "shards"}}),
            ("run.json", {"versions": ["torch"]}),
            ("stages.json", [1.0]),
            ("stages.json", {"fit": "long"}),
            ("stages.json", {"fit": float("nan")}),
            ("evaluation/tuned/evaluation.json", ["test"]),
            ("evaluation/tuned/evaluation.json", {"data": ["test"]}),
            ("exports/litemedsam/export.json", []),
            ("exports/litemedsam/export.json", {"dsc_run": "0.9"}),
            ("exports/litemedsam/export.json", {"max_logit_difference": "small"}),
            ("exports/litemedsam/export.json", {"verified": False, "tolerance": True}),
            ("exports/litemedsam/export.json", {"notes": 5}),
        ],
    )
    def test_a_value_of_the_wrong_kind_is_one_line(
        self, full: Run, name: str, content: object, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (full.root / name).write_text(json.dumps(content))
        assert run_command(lambda: report_command([str(full.root)]), "trainer") == 2
        shown = capsys.readouterr().err
        assert str(full.root / name) in shown
        assert shown.count("\n") == 1


class TestPage:
    def test_everything_is_there_in_order(self, full: Run) -> None:
        outline = Outline(page_of(full))
        titles = re.findall(r"<h2>(.*?)</h2>", page_of(full))
        assert titles == [
            *("Key figures", "Before and after", "Training", "Every target", "By term", "Worst cases", "Export gate"),
            *("About the run", "Time", "Recipe"),
        ]
        for said in (
            "toy & run",
            "Does it <help>?",
            "Caveat. one & only.",
            "11 rose and 1 fell",
            "25.00 % of 2.00 M",
            "✓ verified",
            "litemedsam in tool 1.2",
            "c0ffee with uncommitted changes",
            "ab" * 32,
            "torch 2.14.1",
            "1 min 40 s",
            "seed_everything: 0",
        ):
            assert said in outline.text, said
        assert outline.text.count("one & only.") == 2, "in its box and in the recipe, not in the question"
        assert "Missing here" not in outline.text

    def test_needs_nothing_from_outside(self, full: Run) -> None:
        page = page_of(full)
        assert "http://" not in page
        assert "https://" not in page
        assert "@import" not in page
        assert "url(" not in page
        for tag, attributes in Outline(page).tags:
            assert tag not in ("script", "link", "iframe", "object"), tag
            for name in ("src", "href", "xlink:href"):
                value = attributes.get(name) or "#"
                assert value.startswith(("#", "data:image/")), value
            assert not any(name.startswith("on") for name in attributes)
        assert len(page.encode()) < 3_000_000

    def test_text_of_the_run_is_escaped(self, full: Run) -> None:
        write_export(full, "bad", None, format="<i>", notes=["<u>x</u>"], file="<s>", consumer="<q>", sha256="<em>")
        page = page_of(full)
        assert "<script>" not in page
        assert page.count("one &amp; only.") == 2
        assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; co" in page
        for tag in ("<help>", "<i>", "<u>", "<s>", "<q>", "<em>"):
            assert tag not in page, tag
            assert tag.replace("<", "&lt;").replace(">", "&gt;") in page, tag

    def test_pictures_are_stored_once_and_described(self, full: Run) -> None:
        page = page_of(full)
        outline = Outline(page)
        assert page.count("data:image/") == 6
        ids = [attributes["id"] for _, attributes in outline.tags if attributes.get("id")]
        assert len(ids) == len(set(ids))
        for tag, attributes in outline.tags:
            if tag == "use":
                assert (attributes["href"] or "").removeprefix("#") in ids
            if tag == "svg":
                assert attributes.get("aria-label") or attributes.get("aria-hidden") == "true"

    def test_lines_of_targets_that_fell_differ(self, full: Run) -> None:
        page = page_of(full)
        assert page.count('class="pair rose"') == 11
        assert page.count('class="pair fell"') == 1
        assert re.search(r'class="pair fell"><title>toy-c10868632198ea58-a00003 [^<]*\(−0\.0', page)

    def test_worst_cases_are_the_ten_lowest(self, full: Run) -> None:
        part = page_of(full).partition("<h2>Worst cases</h2>")[2].partition("</section>")[0]
        expected = [KEYS[number] for number in np.argsort(AFTER)[:10]]
        assert re.findall(r"<code>(.*?)</code>", part) == expected

    def test_a_run_without_anything(self, empty: Run) -> None:
        text = Outline(page_of(empty)).text
        assert "toy-run" in text
        assert "Does it <help>?" in text
        assert "one & only." in text
        assert "There is no answer yet: this run has not been evaluated." in text
        for command in (
            "trainer fit -c toy-run/recipe.yaml",
            "trainer test -c toy-run/recipe.yaml ",
            "trainer test -c toy-run/recipe.yaml --ckpt_path last",
            "trainer export toy-run --to",
        ):
            assert command in text, command
        assert "no run.json" in text
        assert str(empty.root.parent) not in text, "no path of this machine"

    def test_a_run_that_was_only_fitted(self, full: Run) -> None:
        for name in ("untouched", "tuned"):
            for path in full.evaluation(name).iterdir():
                path.unlink()
        text = Outline(page_of(full)).text
        assert "has not been evaluated" in text
        assert "Training" in text
        assert "Worst cases" not in text
        assert "Before and after" not in text

    @pytest.mark.parametrize(
        ("verified", "more", "said"),
        [
            (None, {"notes": ["tool is not installed"]}, "? NOT verified litemedsam: tool is not installed"),
            (
                False,
                {"max_logit_difference": 0.3, "tolerance": 1e-4},
                "✗ failed litemedsam: logits differ by 0.3; the tolerance is 1.0 × 10⁻⁴",
            ),
            ("yes", {}, "? NOT verified litemedsam: no reason was recorded"),
        ],
    )
    def test_gate_names_what_is_wrong(self, empty: Run, verified: bool | None, more: dict, said: str) -> None:
        write_export(empty, "litemedsam", verified, **more)
        write_export(empty, "other", True)
        assert said in Outline(page_of(empty)).text

    def test_every_export_is_listed_with_what_it_is(self, full: Run) -> None:
        known = {"date": "2026-11-22T15:49:31+00:00", "dtype": "fp16", "file": "graphs", "sha256": {"a": "1", "b": "2"}}
        write_export(full, "onnx", None, **known, bytes=3 * 2**20, notes="no onnxruntime")
        part = page_of(full).partition("<h2>Export gate</h2>")[2].partition("</section>")[0]
        assert re.findall(r"<tr><td><code>(\w+)</code>", part) == ["litemedsam", "onnx"]
        assert "<small>fp16, 3.0 MiB, 2026-11-22</small><br><small>a folder, 2 hashes in its record</small>" in part
        assert "✓ verified" in part and "? NOT verified" in part

    def test_the_cost_is_what_was_measured(self, full: Run) -> None:
        assert "<h2>Cost</h2>" not in page_of(full), "there is nothing but times"
        record = json.loads(full.record.read_text())
        full.record.write_text(json.dumps({**record, "hardware": "4 × Some GPU", "world_size": 4}))
        write_log(full, 3, [{"step": 20 + s, "train/gpu_memory_gib": 3.25 + s % 2, "train/loss": 1} for s in range(4)])
        full.checkpoints.mkdir()
        for name, size in (("step-000006.ckpt", 2**21), ("step-000012.ckpt", 2**22)):
            (full.checkpoints / name).write_bytes(b"x" * size)
        (full.checkpoints / "last.ckpt").symlink_to("step-000012.ckpt")
        text = Outline(page_of(full).partition("<h2>Cost</h2>")[2].partition("</section>")[0]).text
        for said in (
            f"GPU-hours {4 * 100.5 / 3600:.2g} Time to fit 1 min 40 s",
            "Peak memory of a GPU 4.25 GiB",
            "Parameters that learn 500,000 of 2.00 M (25.00\u00a0%)",
            "Newest checkpoint 4.0 MiB All checkpoints kept 6.0 MiB",
            "time to fit × 4 GPUs",
            "evaluate-untouched",
        ):
            assert " ".join(said.split()) in text, said
        assert "Not measured" not in text
        full.stages.unlink()
        text = Outline(page_of(full).partition("<h2>Cost</h2>")[2].partition("</section>")[0]).text
        assert "GPU-hours" in text.partition("Not measured")[2] and "Time to fit" not in text

    def test_other_evaluations_are_listed(self, full: Run) -> None:
        write_evaluation(full, "external", BEFORE)
        text = Outline(page_of(full)).text
        assert "external 12 0.410 ±" in text

    def test_many_targets_stay_readable(self, empty: Run) -> None:
        keys = [f"toy-v{number % 7}-a{number:05d}" for number in range(1000)]
        scores = np.random.default_rng(0).uniform(0, 1, (2, 1000))
        write_evaluation(empty, "untouched", scores[0], keys, panels=False)
        write_evaluation(empty, "tuned", scores[1], keys, panels=False)
        page = page_of(empty)
        assert page.count('class="pair ') == 300
        assert "Lines are drawn for 300 of them" in page

    def test_a_damaged_table_is_one_line(self, full: Run) -> None:
        table = full.evaluation("tuned") / "per_case.csv"
        table.write_text(table.read_text().replace("dsc", "dice", 1))
        with pytest.raises(UserError, match=r"per_case.csv: the column 'dsc' is missing"):
            write_report(full)


def write_scored(run: Run, name: str, dsc: np.ndarray, nsd: np.ndarray | None = None) -> None:
    """An evaluation of two data sets, one of them CT with spacing and the other endoscopy without."""
    rows = [
        CaseScore(
            *(f"k{number}", 0, f"term {number % 3}", "CT" if number % 2 else "endoscopy", 50, value, value / 2),
            *(f"set <{number % 2}>", None if nsd is None else float(nsd[number]), "2 mm" if number % 2 else "2 px"),
        )
        for number, value in enumerate(dsc.tolist())
    ]
    write_scores(run.evaluation(name) / "per_case.csv", rows)


class TestNsdAndGroups:
    def part(self, run: Run, title: str) -> str:
        return Outline(page_of(run).partition(f"<h2>{title}</h2>")[2].partition("</section>")[0]).text

    def test_tables_show_nsd_and_quartiles_of_every_group(self, empty: Run) -> None:
        write_scored(empty, "untouched", BEFORE, BEFORE + 0.1)
        write_scored(empty, "tuned", AFTER, AFTER + 0.05)
        text = self.part(empty, "By modality")
        for side, values in (("CT", slice(1, None, 2)), ("endoscopy", slice(0, None, 2))):
            before, after = BEFORE[values], AFTER[values]
            quartiles = [np.percentile(scores, [50, 25, 75]) for scores in (before, after)]
            spread = " ".join("{:.3f} ({:.3f}–{:.3f})".format(*each) for each in quartiles)
            gain = f"+{after.mean() - before.mean():.3f}"
            assert f"{side} 6 {before.mean():.3f} ± {before.std(ddof=1):.3f} {after.mean():.3f}" in text
            assert f"{gain} {spread}" in text
            assert f"{(before + 0.1).mean():.3f} ± {before.std(ddof=1):.3f} {(after + 0.05).mean():.3f}" in text
        assert "NSD: share of both outlines that is within 2 mm or 2 px of the other." in text
        assert "set <0>" in self.part(empty, "By data set")
        assert "term 2" in self.part(empty, "By term")
        assert f"{(BEFORE + 0.1).mean():.3f} → {(AFTER + 0.05).mean():.3f}" in self.part(empty, "Key figures")
        assert f"{AFTER.min() + 0.05:.3f}" in self.part(empty, "Worst cases")
        summary = write_summary(empty)
        assert summary["nsd_before"] == pytest.approx((BEFORE + 0.1).mean())
        assert summary["nsd_after"] == pytest.approx((AFTER + 0.05).mean())

    def test_boxes_are_drawn_by_modality_where_there_are_several(self, empty: Run) -> None:
        write_scored(empty, "untouched", BEFORE, BEFORE + 0.1)
        write_scored(empty, "tuned", AFTER, AFTER + 0.05)
        page = page_of(empty)
        part = page.partition("<h2>By modality</h2>")[2].partition("</section>")[0]
        assert re.findall(r'aria-label="(\w+ by modality)"', part) == ["DSC by modality", "NSD by modality"]
        for name, values in (("CT", slice(1, None, 2)), ("endoscopy", slice(0, None, 2))):
            for when, scores in (("before tuning", BEFORE[values]), ("after tuning", AFTER[values])):
                low, median, high = np.percentile(scores, [25, 50, 75])
                tip = f"{name}, {when}: median {median:.3f}, quartiles {low:.3f} and {high:.3f}, whiskers "
                assert tip in part
        assert page.count(' by data set">') == page.count(' by term">') == 0, "one chart of it is enough"

    def test_boxes_of_a_single_modality_are_by_term_and_of_the_largest_only(self, empty: Run) -> None:
        rows = [
            CaseScore(f"k{n}-{copy}", 0, f"term {n:02d}", "CT", 50, 0.5 + n / 100, 0.4)
            for n in range(15)
            for copy in range(n + 1)
        ]
        write_scores(empty.evaluation("tuned") / "per_case.csv", rows)
        part = page_of(empty).partition("<h2>By term</h2>")[2].partition("</section>")[0]
        assert part.count('class="dist s0"><title>') == 12
        assert "term 14, after tuning: median 0.640" in part and "term 02, after" not in part
        assert "The 12 largest groups are drawn; 3 more are in the table." in part

    def test_an_evaluation_of_an_earlier_version_stands_beside_a_new_one(self, empty: Run) -> None:
        write_scored(empty, "untouched", BEFORE)
        write_scored(empty, "tuned", AFTER, AFTER)
        assert "NSD after" in self.part(empty, "By term")
        assert f"Mean NSD {AFTER.mean():.3f} after tuning, 12 targets" in self.part(empty, "Key figures")
        assert write_summary(empty)["nsd_before"] is None
        write_scored(empty, "tuned", AFTER)
        assert "NSD" not in Outline(page_of(empty)).text

    def test_one_group_is_no_table(self, full: Run) -> None:
        assert self.part(full, "By modality") == self.part(full, "By data set") == ""
        assert "NSD" not in Outline(page_of(full)).text, "tables of an earlier version"

    def test_the_last_validation_is_compared_with_the_untouched_model(self, empty: Run) -> None:
        names = ("val/dsc", "val/dsc_gain", "val/targets_worse")
        rows = [{"step": 3, "train/loss": 1.0}, {"step": 3, **dict(zip(names, (0.5, 0.25, 0.5), strict=True))}]
        write_log(empty, 0, [*rows, {"step": 7, **dict(zip(names, (0.6, -0.125, 0.25), strict=True))}])
        text = self.part(empty, "Training").replace("\u00a0", " ")
        assert "(step 8) mean DSC differed from the untouched model's on the same targets by −0.125; 25 % of" in text


JITTER = {"side": 1024, "samples": 5, "targets": 9, "shifts": [-5, 0, 20], "dsc": {"mean": [0.5, 0.9, 0.25]}}


class TestJitter:
    def write(self, run: Run, name: str, content: object) -> None:
        (run.evaluation(name) / "jitter.json").write_text(json.dumps(content))

    def test_both_curves_are_in_one_chart(self, full: Run) -> None:
        self.write(full, "untouched", {**JITTER, "targets": 8, "dsc": {"mean": [0.6, 0.7, 0.65]}})
        self.write(full, "tuned", JITTER)
        page = page_of(full)
        part = page.partition("<h2>Boxes that are off</h2>")[2].partition("</section>")[0]
        assert part.count("<svg") == 1
        assert part.count('class="jitter before"') == part.count('class="jitter after"') == 1
        assert "after tuning, 20 px: 0.250" in part and "before tuning, -5 px: 0.600" in part
        assert "8 targets before tuning and 9 targets after tuning" in part
        # the same height is the same score: of the ticks 0.2 … 1.0 the chart's own frame tells where
        found = {value: float(y) for y, value in re.findall(r'cy="([\d.]+)" r="3.5"><title>[^:]*: ([\d.]+)', part)}
        steps = [(found["0.250"] - found["0.900"]) / 0.65, (found["0.500"] - found["0.700"]) / 0.2]
        assert steps[0] == pytest.approx(steps[1], rel=0.01) and steps[0] > 0

    def test_one_curve_alone(self, full: Run) -> None:
        self.write(full, "tuned", JITTER)
        part = page_of(full).partition("<h2>Boxes that are off</h2>")[2].partition("</section>")[0]
        assert "before" not in part and "9 targets after tuning" in part

    @pytest.mark.parametrize(
        "change",
        [
            {"shifts": "many"},
            {"shifts": []},
            {"shifts": [0, 5]},
            {"shifts": [0, None, 5]},
            {"dsc": [0.5]},
            {"dsc": {}},
            {"side": "1024"},
            {"targets": None},
        ],
    )
    def test_damage_is_one_line(self, full: Run, change: dict, capsys: pytest.CaptureFixture[str]) -> None:
        self.write(full, "tuned", {**JITTER, **change})
        assert run_command(lambda: report_command([str(full.root)]), "trainer") == 2
        shown = capsys.readouterr().err
        assert "tuned/jitter.json: " in shown
        assert shown.count("\n") == 1


class TestPrompts:
    def test_points_are_drawn_and_explained(self, full: Run) -> None:
        assert "dotted: the prompt" in Outline(page_of(full)).text
        panels = load_panels(full.evaluation("tuned") / "panels.npz")
        points, none = np.array([[30, 20, 1], [2, 3, 0]], np.float32), np.full(4, np.nan, np.float32)
        save_panels(full.evaluation("tuned") / "panels.npz", [replace(p, points=points, box=none) for p in panels])
        page = page_of(full)
        assert "circle: on the target; cross: beside it" in Outline(page).text
        assert '<circle class="prompt point" cx="30.5" cy="20.5"' in page
        assert '<path class="prompt point" d="M2.5 3.5m' in page
        assert page.count('<rect class="prompt"') == 7, "that of the legend, and before tuning one in each picture"

    def test_a_crop_holds_the_points_and_needs_no_box(self) -> None:
        truth, none = np.zeros((200, 300), np.uint8), np.full(4, np.nan, np.float32)
        panel = Panel("k", "t", truth, truth, truth, none, np.array([[290, 10, 1]], np.float32))
        crop = crop_of(Choice("Worst", None, panel))
        assert (crop.x + crop.side, crop.y, crop.side) == (300, 0, 48)
        assert crop_of(Choice("Worst", None, replace(panel, points=np.zeros((0, 3))))).side == 300, "the whole image"


class TestSheet:
    def test_outlines_and_prompt_lie_where_they_belong(self) -> None:
        image, truth = np.full((128, 128), 100, np.uint8), np.zeros((128, 128), np.uint8)
        truth[32:96, 32:96] = 1
        box, points = np.array([16, 16, 111, 111], np.float32), np.array([[63.5, 63.5, 1]], np.float32)
        tile = np.asarray(draw_tile(Panel("k", "t", image, truth, 0 * truth, box, points)))
        assert tile.shape == (TILE, TILE, 3)
        scale = TILE / 128  # the crop is the whole image
        blue, white = (np.argwhere((tile == colour).all(-1)) for colour in ((0x56, 0xB4, 0xE9), (255, 255, 255)))
        assert blue.min(axis=0) == pytest.approx([32 * scale, 32 * scale], abs=1.5)
        assert blue.max(axis=0) == pytest.approx([96 * scale, 96 * scale], abs=1.5)
        assert white.min(axis=0) == pytest.approx([16 * scale, 16 * scale], abs=1.5)
        assert white.max(axis=0) == pytest.approx([112 * scale, 112 * scale], abs=1.5)
        assert (tile[128, 100] == 100).all(), "the image is seen between them"
        assert (tile[TILE // 2 - 4 : TILE // 2 + 5, TILE // 2 - 4 : TILE // 2 + 5] == 255).any(), "the point"
        assert not (tile == (0xFF, 0xB0, 0x00)).all(-1).any(), "nothing was predicted"

    def test_size_captions_and_any_alphabet(self) -> None:
        panels = [replace(panel, term="Läsion 病変 " * 9) for panel in discs(KEYS[:5], shift=2)]
        sheet = draw_sheet(panels, "step 7")
        assert sheet.size == (4 * TILE, 18 + 2 * (TILE + 18))
        assert draw_sheet(panels[:1], "step 7").size == (TILE, 18 + TILE + 18)
        narrow = np.zeros((300, 20), np.uint8)
        narrow[100:290, 5:15] = 1
        none = np.full(4, np.nan, np.float32)
        tile = np.asarray(draw_tile(Panel("k", "t", narrow * 0 + 90, narrow, narrow, none)))
        assert (tile[:, :100] == 0).all() and (tile[:, -100:] == 0).all(), "beside a narrow image there is nothing"


class TestCommand:
    def test_writes_both_and_shows_the_result(self, full: Run, capsys: pytest.CaptureFixture[str]) -> None:
        assert run_command(lambda: report_command([str(full.root)]), "trainer") == 0
        shown = capsys.readouterr().out
        assert f"{BEFORE.mean():.3f} → {AFTER.mean():.3f}" in shown
        assert "verified" in shown
        assert f"report: {full.root / 'report.html'}" in shown
        assert (full.root / "report.html").is_file()
        assert (full.root / "summary.json").is_file()
        assert not list(full.root.glob("*.tmp"))

    @pytest.mark.parametrize(
        ("volumes", "said"),
        [
            (1, "12 targets of 1 volume: the interval describes these slices, not other patients"),
            (5, "12 targets of 5 volumes: the interval describes these slices, not other patients"),
            (6, None),
        ],
    )
    def test_few_volumes_are_named(
        self,
        empty: Run,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
        volumes: int,
        said: str | None,
    ) -> None:
        monkeypatch.setenv("COLUMNS", "160")
        keys = [f"toy-v{number % volumes}-a{number:05d}" for number in range(12)]
        write_evaluation(empty, "untouched", BEFORE, keys, panels=False)
        write_evaluation(empty, "tuned", AFTER, keys, panels=False)
        assert report_command([str(empty.root)]) == 0
        shown = capsys.readouterr().out
        assert said in shown if said else "not other patients" not in shown
        assert json.loads((empty.root / "summary.json").read_text())["volumes"] == volumes

    def test_names_what_is_missing_with_the_folder_as_given(
        self, empty: Run, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert report_command([str(empty.root)]) == 0
        shown = capsys.readouterr().out
        assert f"missing: the evaluation before tuning; made by `trainer test -c {empty.root}/recipe.yaml`" in shown

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (["nowhere"], "is no run: it has no recipe.yaml"),
            ([], "the following arguments are required: RUN; see trainer report --help"),
            (["nowhere", "--hlep"], "unexpected '--hlep'; did you mean '--help'?"),
        ],
    )
    def test_mistakes_are_one_line(self, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert run_command(lambda: report_command(arguments), "trainer") == 2
        shown = capsys.readouterr()
        assert said in shown.err
        assert shown.err.count("\n") == 1
        assert shown.out == ""

    @pytest.mark.parametrize(("step", "outdated"), [(12, False), (6, True)])
    def test_an_evaluation_older_than_the_training_is_named(self, full: Run, step: int, outdated: bool) -> None:
        test = {"test": {"folder": "shards/test", "index_sha256": "cd" * 32, "samples": 6}}
        (full.evaluation("tuned") / "evaluation.json").write_text(json.dumps({"step": step, "data": test}))
        data = read_run(full)
        assert any("older than the training" in what for what in data.missing()) is outdated
        assert list(data.splits()) == ["train", "test"]
        assert "cd" * 32 in page_of(full)

    def test_help_teaches(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert run_command(lambda: report_command(["--help"]), "trainer") == 0
        assert "trainer report runs/quickstart" in capsys.readouterr().out

    def test_needs_no_torch(self, full: Run) -> None:
        program = (
            "import sys; from trainer.report.cli import report_command; "
            "assert report_command([sys.argv[1]]) == 0; "
            "print(sorted({'torch', 'lightning', 'transformers', 'matplotlib'} & set(sys.modules)))"
        )
        result = subprocess.run([sys.executable, "-c", program, full.root], capture_output=True, text=True, check=False)
        assert result.stdout.endswith("[]\n"), result.stdout + result.stderr
