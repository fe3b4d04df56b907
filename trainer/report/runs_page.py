"""The page that compares several runs: scores, cost, curves and what differs between their recipes."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from data_shards.errors import counted
from trainer.report.answer import FEW, SIGNIFICANT
from trainer.report.cost import gib, hours_text, millions, size
from trainer.report.data import RunData
from trainer.report.gate import gate_figure
from trainer.report.groups import box_charts, mean_sd, quartiles, scored_metrics, tolerance_note
from trainer.report.lines import lines_chart
from trainer.report.markup import (
    UNKNOWN,
    Markup,
    code,
    duration,
    interval,
    p_value,
    paragraph,
    section,
    signed,
    table,
    text,
)
from trainer.report.page import document
from trainer.report.runs import ABSENT, Runs
from trainer.report.scatter import series_legend
from trainer.scores import CaseScore, grouped, values_of

UNTOUCHED = "untouched"
_CURVES = (
    ("train/loss", "Loss", None, True),
    ("train/dsc", "DSC of the batches", (0.0, 1.0), True),
    ("val/dsc", "DSC of the validation split", (0.0, 1.0), False),
)


def render_runs(runs: Runs, folder: Path) -> str:
    """Return the page.

    Args:
        runs: At least two.
        folder: Where the page is going to lie: links to the runs' own pages are relative to it.
    """
    count = counted(len(runs.runs), "run")
    parts = (
        _header(runs, count),
        _table(runs, folder),
        _boxes(runs),
        _training(runs),
        _cost(runs),
        _unequal("What differs between the recipes", "Key", runs, runs.recipe_differences()),
        _unequal("What differs in their records", "Recorded", runs, runs.record_differences()),
    )
    title = f"{count} compared – sam-trainer report"
    return document(text(title), "\n".join(part for part in parts if part))


def verdict(runs: Runs) -> str:
    """Which run scores highest, and whether that is sure, in a sentence or two."""
    if not runs.scored:
        return "There is no answer yet: none of these runs has been evaluated after tuning."
    if len(runs.scored) < 2:
        return f"Only {next(iter(runs.scored))} has been evaluated after tuning, so there is nothing to compare."
    if not runs.common:
        return "The runs have no target in common, so nothing can be compared: evaluate them on the same split."
    means = {label: float(values_of(runs.rows(label), "dsc").mean()) for label in runs.scored}
    best = max(means, key=lambda label: means[label])
    said = (
        f"On {counted(len(runs.common), 'target')} that all of them scored, {best} has the highest mean DSC after "
        f"tuning: {means[best]:.3f}."
    )
    found = runs.differences()
    if not found:
        return said
    nearest = max(found, key=lambda label: found[label][0].gain)  # of the others, where the first is the best
    who = nearest if best == runs.first else best
    one, p = found[who]
    # as in a run's own report, a verdict needs both the interval and the test
    outside = one.gain_ci95 is not None and one.gain_ci95[0] * one.gain_ci95[1] > 0
    sure = outside and p is not None and p < SIGNIFICANT and one.count >= FEW
    spread = f", 95 % CI {interval(one.gain_ci95)}" if one.gain_ci95 else ""
    tested = f", corrected Wilcoxon {p_value(p)}" if p is not None else ""
    why = (
        "the targets are too few to tell"
        if one.count < FEW
        else "p is not below 0.05"
        if outside
        else "the interval includes 0"
    )
    less = "" if sure else f" That is no clear difference: {why}."
    return f"{said} {who} differs from {runs.first} by {signed(one.gain)}{spread}{tested}.{less}".replace(
        " %", "\u00a0%"
    )


def _header(runs: Runs, count: str) -> str:
    unlike = "".join(f"<li>{text(label)}: {text('; '.join(said))}</li>" for label, said in runs.unlike().items())
    warning = (
        f'<div class="aside caveat"><p><b>Not scored alike</b> (differences may come from that):</p><ul>{unlike}</ul>'
        "</div>"
        if unlike
        else ""
    )
    absent = [label for label in runs.runs if label not in runs.scored]
    lacking = f"Not evaluated after tuning: {', '.join(absent)}." if absent else ""
    own = {label: len(table) - len(runs.common) for label, table in runs.scored.items()}
    alone = ", ".join(f"{label} {number}" for label, number in own.items() if number)
    unmatched = f"Targets left out, since not every run has scored them: {alone}." if runs.common and alone else ""
    volumes = len({row.volume for row in runs.rows(next(iter(runs.scored)))}) if runs.common else 0
    few = (
        f"The targets come from {counted(volumes, 'volume')}: targets of one volume are not independent, and intervals "
        "and p-values seem surer than they are."
        if 0 < volumes < len(runs.common)
        else ""
    )
    return "\n".join(
        (
            '<header>\n<p class="kicker">sam-trainer report</p>',
            f"<h1>{text(count)} compared</h1>",
            paragraph(verdict(runs), "answer"),
            warning,
            paragraph(" ".join(one for one in (lacking, unmatched, few) if one), "note"),
            "</header>",
        )
    )


def _table(runs: Runs, folder: Path) -> str:
    """A row for each run: what it is, what it scored, and how that differs from the first."""
    found = runs.differences()
    nsd = "nsd" in scored_metrics([row for label in runs.scored for row in runs.rows(label)])
    columns = ["Run", "n", "DSC", "difference (95 % CI)", "p (Holm)", "median (quartiles)", *(["NSD"] if nsd else [])]
    columns += ["Tuning", "Export gate"]

    def line(name: Any, scores: Sequence[CaseScore], difference: Sequence[str | None]) -> tuple[Any, ...]:
        surface = (mean_sd(scores, "nsd"),) if nsd else ()
        return name, len(scores) or None, mean_sd(scores, "dsc"), *difference, quartiles(scores, "dsc"), *surface

    rows = [(*line(UNTOUCHED, runs.untouched, (None, None)), None, None)] if runs.untouched else []
    for (label, data), root in zip(runs.runs.items(), runs.roots, strict=True):
        one, p = found.get(label, (None, None))
        difference = (
            (
                f"{signed(one.gain)} ({interval(one.gain_ci95)})",
                p_value(p).removeprefix("p\u00a0").removeprefix("=\u00a0"),
            )
            if one
            else ("reference" if label == runs.first else None, None)
        )
        gate = Markup(f'<span class="whole">{gate_figure(data.exports)[0]}</span>')
        rows.append((*line(_link(label, root, folder), runs.rows(label), difference), data.record.get("tuning"), gate))
    note = (
        "After tuning, on the targets that all runs scored: mean ± standard deviation, median with quartiles, and "
        f"paired differences from {runs.first}, with two-sided Wilcoxon signed-rank tests corrected by Holm. "
        if runs.common
        else "After tuning, each run on its own targets: mean ± standard deviation, and median with quartiles. "
    )
    note += tolerance_note([row for label in runs.scored for row in runs.rows(label)])
    words = (0, len(columns) - 2, len(columns) - 1)
    shown = table(columns, rows, label="The runs and their scores", words=words)
    return section("Runs", shown, paragraph(note.strip(), "note"), _questions(runs))


def _link(label: str, root: Path, folder: Path) -> Markup:
    """A link to the run's own page."""
    href = Path(os.path.relpath(root / "report.html", folder.resolve())).as_posix()
    return Markup(f'<a class="whole" href="{quote(href)}">{text(label)}</a>')


def _questions(runs: Runs) -> str:
    asked = [(label, data.question) for label, data in runs.runs.items() if data.question]
    items = "".join(f"<dt>{text(label)}</dt><dd>{text(question)}</dd>" for label, question in asked)
    return f"<details><summary>What each run asks</summary><dl>{items}</dl></details>" if items else ""


def _boxes(runs: Runs) -> str:
    """Box plots by modality; of a single one by data set, and of a single data set of all targets."""
    series: dict[str, list[CaseScore]] = {UNTOUCHED: runs.untouched} if runs.untouched else {}
    series |= {label: runs.rows(label) for label in runs.scored}
    parts = {label: grouped(rows) for label, rows in series.items()}
    names = {
        kind: {
            name: sum(len(part.get((kind, name), ())) for part in parts.values())
            for part in parts.values()
            for of, name in part
            if of == kind
        }
        for kind in ("modality", "dataset", "all")
    }
    kind = next((kind for kind in ("modality", "dataset") if len(names[kind]) > 1), "all")
    ordered = sorted(names[kind], key=lambda name: (-names[kind][name], name))
    groups = {name: {label: part.get((kind, name), []) for label, part in parts.items()} for name in ordered}
    title = {"modality": "By modality", "dataset": "By data set", "all": "All targets"}[kind]
    return section(title, box_charts(groups, title.lower())) if groups else ""


def _training(runs: Runs) -> str:
    """Curves of all runs, one chart for each of what was logged."""
    begin = int(bool(runs.untouched))  # a run has one colour in all charts of the page
    numbers = {label: number for number, label in enumerate(runs.runs, start=begin)}
    charts = []
    for column, name, bounds, smoothed in _CURVES:
        curves = {label: data.curves[column] for label, data in runs.runs.items() if data.curves.get(column)}
        if curves:
            drawn = lines_chart(curves, name=name.partition(" ")[0], numbers=numbers, bounds=bounds, smoothed=smoothed)
            charts.append(f"<figure><h3>{text(name)}</h3>{drawn}</figure>")
    if not charts:
        return ""
    losses = any(".loss" in f".{key}" for key in runs.recipe_differences())
    note = "Curves of the batches are smoothed."
    note += " The recipes have different losses: their curves do not compare." if losses else ""
    return section(
        "Training", series_legend(numbers), f'<div class="charts">{"".join(charts)}</div>', paragraph(note, "note")
    )


def _cost(runs: Runs) -> str:
    """What was measured of each run; columns of which nothing was are left out."""
    gpu = [data.on_gpu() for data in runs.runs.values()]
    hours = "GPU-hours" if all(gpu) else "Device-hours" if any(gpu) else "Processor-hours"
    columns = {
        "Parameters": lambda data: millions((data.record.get("model") or {}).get("parameters")),
        "that learn": lambda data: millions((data.record.get("model") or {}).get("trainable")),
        "share": _share,
        "Peak memory": lambda data: _told(data.peak_memory_gib(), gib),
        "Images/s": lambda data: _told(data.images_per_second(), lambda rate: f"{rate:,.3g}"),
        "Steps": lambda data: _told(data.steps, lambda steps: f"{steps:,}"),
        "Time to fit": lambda data: _told(data.stages.get("fit"), duration),
        hours: lambda data: _told(data.device_hours(), hours_text),
        "Checkpoint": lambda data: _told(data.checkpoint_bytes, size),
        "Hardware": lambda data: data.record.get("hardware"),
    }
    cells = {name: [told(data) for data in runs.runs.values()] for name, told in columns.items()}
    known = {name: column for name, column in cells.items() if any(column)}
    if not known:
        return ""
    rows = [(label, *row) for label, row in zip(runs.runs, zip(*known.values(), strict=True), strict=True)]
    words = (0, len(known)) if "Hardware" in known else (0,)
    note = (
        "Peak memory: of tensors on the fullest GPU, or on processors of the whole process. Hours: devices × time to "
        "fit. Checkpoint: the newest one, from which a training goes on."
    )
    return section("Cost", table(("Run", *known), rows, label="Cost of the runs", words=words), paragraph(note, "note"))


def _share(data: RunData) -> str | None:
    model = data.record.get("model") or {}
    total, learning = model.get("parameters"), model.get("trainable")
    return f"{learning / total:.2%}".replace("%", "\u00a0%") if total and learning is not None else None


def _told(value: Any, how: Any) -> str | None:
    return None if value is None else str(how(value))


def _unequal(title: str, first: str, runs: Runs, found: Mapping[str, Sequence[Any]]) -> str:
    """A table of values that are not the same in all runs."""
    rows = [(code(key), *(_value(cell) for cell in cells)) for key, cells in found.items()]
    shown = table((first, *runs.runs), rows, label=title, words=range(len(runs.runs) + 1)) if rows else ""
    return section(title, shown or paragraph("Nothing that is compared here.", "note"))


def _value(cell: Any) -> Any:
    if cell is ABSENT:
        return UNKNOWN
    shown = "null" if cell is None else str(cell).lower() if isinstance(cell, bool) else str(cell)
    return Markup(f'<span title="{text(shown)}">{text(shown[:12])}…</span>') if len(shown) == 64 else shown
