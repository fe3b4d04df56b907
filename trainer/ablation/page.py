"""The page of an ablation: the answer, the trade-off between score and cost, and every table, in one file."""

from __future__ import annotations

from pathlib import Path

from trainer.ablation.plots import Point, forest_plot, pareto_plot
from trainer.ablation.results import Results
from trainer.ablation.spec import Loaded
from trainer.ablation.tables import (
    LEVEL,
    NAMES,
    Table,
    all_tables,
    count,
    difference,
    group_tables,
    hardware,
    main_table,
    mark,
    missing,
    notes,
)
from trainer.report.markup import Markup, code, facts, paragraph, score, section, table, text
from trainer.report.page import document
from trainer.run import write_whole


def write_page(path: Path, loaded: Loaded, results: Results) -> None:
    """Write ``results.html``: one file that needs no network, no script and no other file."""
    write_whole(path, render(loaded, results))


def render(loaded: Loaded, results: Results) -> str:
    """Return the page."""
    groups = group_tables(results)
    others = [one for one in all_tables(results)[1:] if one not in groups]
    parts = [
        _header(loaded, results),
        _pareto(results),
        _differences(results),
        _table_section("Cost and scores", main_table(results)),
        *(_table_section(one.title, one) for one in [*groups, *others]),
        section("How to read this", *(paragraph(line, "note") for line in notes(loaded, results))),
        _circumstances(loaded, results),
    ]
    return document(text(f"{loaded.name} – sam-trainer ablation"), "\n".join(part for part in parts if part))


def _header(loaded: Loaded, results: Results) -> str:
    caveat = f'<div class="aside caveat"><p><b>Caveat.</b> {text(loaded.caveat)}</p></div>' if loaded.caveat else ""
    lacking, aside = missing(results), ""
    if lacking:
        items = "".join(f"<li>{text(line)}</li>" for line in lacking)
        aside = f'<div class="aside caveat"><p><b>Not finished</b>, and so not in the tables:</p><ul>{items}</ul></div>'
    return "\n".join(
        (
            '<header>\n<p class="kicker">sam-trainer ablation</p>',
            f"<h1>{text(loaded.name)}</h1>",
            paragraph(loaded.question or "The spec states no question.", "question"),
            _answer(loaded, results),
            caveat,
            aside,
            "</header>",
        )
    )


def _answer(loaded: Loaded, results: Results) -> str:
    """What was found, a line for each cell, in words that need no statistics."""
    base = results.entry(results.reference, "dsc")
    if base is None:
        return paragraph(f"No answer yet: the reference, {results.reference}, has no scores.", "answer")
    head = (
        f"After {loaded.spec.budget.describe()} each, the reference {results.reference} reaches a median DSC of "
        f"{score(base.median)} on {base.n:,} targets."
    )
    lines = []
    for row in results.rows:
        entry = results.entry(row.name, "dsc")
        if row.name == results.reference or entry is None or entry.difference is None:
            continue
        gain, _ = difference(entry, results.reference)
        said = {"*": "better", "↓": "worse"}.get(mark(entry), "no difference beyond chance was found")
        last = row.results[-1]
        cost = f"{100 * last.learning / last.parameters:.2f} % of its parameters learn" if last.parameters else ""
        learns = cost if row.tuned else "nothing learns"
        lines.append(f"<li><b>{text(row.name)}</b> ({text(learns)}): {text(gain)} in mean DSC, {said}</li>")
    found = f"<ul>{''.join(lines)}</ul>" if lines else ""
    return paragraph(head, "answer") + (f'<div class="aside">{found}</div>' if found else "")


def _points(results: Results, cost: str) -> list[Point]:
    """The cells that have a score and this cost."""
    points = []
    for row in results.rows:
        entry = results.entry(row.name, "dsc")
        known = float(row.results[-1].learning) if cost == "learning" else row.mean_of("memory_gib")
        if entry is None or not known or not row.tuned:
            continue
        said = f"{count(round(known))} parameters" if cost == "learning" else f"{known:.2f} GiB"
        points.append(Point(row.name, known, said, entry.mean, entry.mean_low, entry.mean_high))
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
        if rows:
            drawn = forest_plot(rows, name, results.reference)
            figures.append(f"<figure><h3>{name}</h3>{drawn}</figure>")
    note = (
        f"Mean difference over the same targets, with its bootstrap 95 % interval. Coloured, with * or ↓: beyond "
        f"chance (Wilcoxon signed-rank, Holm, p < {LEVEL})."
    )
    body = f'<div class="charts">{"".join(figures)}</div>'
    return section("Differences from the reference", body, paragraph(note, "note")) if figures else ""


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
        )
    )
    written = f"<details><summary>As it was written</summary><pre>{text(loaded.text)}</pre></details>"
    return section("About the ablation", known, f'<div class="below">{written}</div>')
