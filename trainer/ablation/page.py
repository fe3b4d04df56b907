"""The page of an ablation: the answer, the trade-off between score and cost, and every table, in one file."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np

from trainer.ablation.pictures import pictures
from trainer.ablation.plots import Point, forest_plot, pareto_plot
from trainer.ablation.results import Results, pooled
from trainer.ablation.spec import Loaded
from trainer.ablation.tables import (
    COSTS,
    LEVEL,
    NAMES,
    Table,
    all_tables,
    count,
    group_tables,
    hardware,
    main_table,
    mark,
    missing,
    notes,
    software,
)
from trainer.ablation.words import scale, verdict
from trainer.report.boxes import box_plot
from trainer.report.markup import Markup, code, facts, paragraph, section, table, text
from trainer.report.page import document
from trainer.run import write_whole
from trainer.scores import grouped, values_of


def write_page(path: Path, loaded: Loaded, results: Results) -> None:
    """Write ``results.html``: one file that needs no network, no script and no other file."""
    write_whole(path, render(loaded, results))


def render(loaded: Loaded, results: Results) -> str:
    """Return the page."""
    groups, main = group_tables(results), main_table(results)
    others = [one for one in all_tables(results)[1:] if one not in groups]
    parts = [
        _header(loaded, results),
        _differences(results),
        _table_section("Scores", _part(main, (0, *range(COSTS + 1, len(main.columns))))),
        _table_section("Cost", _part(main, range(COSTS + 1))),
        _pareto(results),
        _boxes(results),
        *(_table_section(one.title, one) for one in [*groups, *others]),
        pictures(results),
        section("How to read this", *(paragraph(line, "note") for line in notes(loaded, results))),
        _circumstances(loaded, results),
    ]
    title = text(f"{loaded.name} – sam-trainer ablation")
    return document(title, "\n".join(part for part in parts if part))


def _part(whole: Table, columns: Sequence[int]) -> Table:
    """Some columns of a table."""
    rows = tuple(tuple(row[column] for column in columns) for row in whole.rows)
    return Table(whole.title, tuple(whole.columns[column] for column in columns), rows, whole.words)


def _header(loaded: Loaded, results: Results) -> str:
    caveat = f'<div class="aside caveat"><p><b>Caveat.</b> {text(loaded.caveat)}</p></div>' if loaded.caveat else ""
    lacking, aside = missing(results), ""
    if lacking:
        items = "".join(f"<li>{text(line)}</li>" for line in lacking)
        again = "The same command again runs what is missing."
        said = f"<p><b>Not finished</b>, and so not in the tables:</p><ul>{items}</ul><p>{again}</p>"
        aside = f'<div class="aside caveat">{said}</div>'
    return "\n".join(
        (
            f'<header>\n<p class="kicker">sam-trainer ablation · {text(loaded.name)}</p>',
            f"<h1>{text(loaded.question or loaded.name)}</h1>",
            paragraph(_named(verdict(loaded, results), results), "answer"),
            paragraph(_named(scale(results), results)),
            caveat,
            aside,
            "</header>",
        )
    )


def _named(said: str, results: Results) -> Markup:
    """A sentence with the names of cells in bold."""
    names = sorted((row.name for row in results.rows), key=len, reverse=True)
    either = "|".join(re.escape(escape(name)) for name in names)
    return Markup(re.sub(rf"(?<![\w.+-])({either})(?![\w+-])", r"<b>\1</b>", escape(said)))


def _boxes(results: Results) -> str:
    """DSC of every cell, by modality where there are several."""
    kind = "modality" if len(results.groups("modality")) > 1 else "all"
    rows = sorted((row for row in results.rows if row.finished), key=lambda row: row.name != results.reference)
    drawn: dict[str, dict[str, np.ndarray]] = {}
    for row in rows:
        for (found, group), scores in grouped(pooled(row.finished)).items():
            if found == kind:
                drawn.setdefault(group if kind != "all" else "all targets", {})[row.name] = values_of(scores, "dsc")
    if not drawn:
        return ""
    groups = list(drawn.items())
    halves = [dict(groups[: (len(groups) + 1) // 2]), dict(groups[(len(groups) + 1) // 2 :])]
    bounds = (0.0, 1.0)  # alike in both
    plots = [box_plot(half, name="DSC", bounds=bounds) for half in halves if half]
    figures = "".join(f"<figure>{plot}</figure>" for plot in plots)
    note = (
        f"Boxes: quartiles and median; whiskers: the last target within 1.5 interquartile ranges; dots: targets "
        f"beyond. Dashed: {results.reference}. Point at a box for its numbers."
    )
    title = "DSC by modality" if kind == "modality" else "DSC of all targets"
    return section(title, f'<div class="charts">{figures}</div>', paragraph(note, "note"))


def _points(results: Results, cost: str) -> list[Point]:
    """The cells that have a score and this cost."""
    points = []
    for row in results.rows:
        entry = results.entry(row.name, "dsc")
        known = float(row.results[-1].learning) if cost == "learning" else row.mean_of("memory_gib")
        if entry is None or not known or not row.tuned:
            continue
        said = f"{count(round(known))} parameters" if cost == "learning" else f"{known:.2f} GiB"
        points.append(
            Point(row.name, known, said, entry.mean, entry.mean_low, entry.mean_high, specialist=row.specialist)
        )
    return points


def _pareto(results: Results) -> str:
    """Score against what learns, and against memory."""
    untouched = next((row for row in results.rows if not row.tuned and results.entry(row.name, "dsc")), None)
    entry = results.entry(untouched.name, "dsc") if untouched else None
    level = (entry.cell, entry.mean) if entry else None
    figures = []
    for cost, title, axis in (
        ("learning", "Parameters that learn", "parameters that learn"),
        ("memory_gib", "Peak memory", "peak memory of the training (GiB)"),
    ):
        points = _points(results, cost)
        if points:
            drawn = pareto_plot(points, axis, "mean DSC", logarithmic=cost == "learning", level=level)
            figures.append(f"<figure><h3>{title}</h3>{drawn}</figure>")
    note = (
        "Up and to the left is better. Filled and joined: cells that no other beats, which cost no more and score no "
        "less. Bars: bootstrap 95 % interval of the mean over targets. Point at a dot for its numbers."
    )
    if any(row.specialist for row in results.rows):
        note += " Diamond: the specialist, a model of another kind, which is no part of that line."
    if not figures:
        return ""
    return section("Score against cost", f'<div class="charts">{"".join(figures)}</div>', paragraph(note, "note"))


def _differences(results: Results) -> str:
    """Differences from the reference, with intervals."""
    figures = []
    for metric, name in NAMES.items():
        found = [results.entry(row.name, metric) for row in results.rows if row.name != results.reference]
        rows = [
            (one.cell, one.difference, one.difference_low, one.difference_high, mark(one))
            for one in found
            if one is not None and one.difference is not None
        ]
        aside = [row.name for row in results.rows if row.specialist or not row.tuned]
        rows.sort(key=lambda row: row[0] in aside)
        if rows:
            drawn = forest_plot(rows, name, results.reference, aside)
            figures.append(f"<figure><h3>{name}</h3>{drawn}</figure>")
    note = (
        f"Left of the dashed line is worse. Mean difference over the same targets, with its bootstrap 95 % interval. "
        f"Coloured, with * or ↓: beyond chance (Wilcoxon signed-rank, Holm, p < {LEVEL}). An arrow: further out than "
        "is drawn."
    )
    body = f'<div class="charts">{"".join(figures)}</div>'
    return section(f"Difference from {results.reference}", body, paragraph(note, "note")) if figures else ""


def _table_section(title: str, found: Table) -> str:
    return section(title, table(found.columns, found.rows, label=found.title, words=found.words))


def _circumstances(loaded: Loaded, results: Results) -> str:
    known = facts(
        (
            ("Base", Markup(code(loaded.spec.base))),
            ("Budget of each cell", loaded.spec.budget.describe()),
            ("Seeds", ", ".join(map(str, loaded.spec.seeds))),
            ("Reference", results.reference),
            ("Hardware", hardware(results)),
            ("Software", software(results)),
        )
    )
    cells = [one.cell for row in results.rows for one in row.results if one is row.results[0]]
    recipes = "".join(
        f"<details><summary>Recipe of {text(cell.title)}</summary><pre>{text(cell.text)}</pre></details>"
        for cell in cells
    )
    written = f"<details><summary>The ablation as it was written</summary><pre>{text(loaded.text)}</pre></details>"
    return section("How it was run", known, f'<div class="below">{written}{recipes}</div>')
