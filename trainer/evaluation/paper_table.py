"""The papers' tables in words: Median (Q1, Q3) with * and †, for a terminal, Markdown, LaTeX and programs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_shards.errors import UserError, counted
from trainer.evaluation.comparing import ALL, ALPHA, GROUPINGS, LOWER_IS_BETTER, METRICS, Line, Table
from trainer.evaluation.paired import Cell, Test
from trainer.evaluation.told import TITLES, finite, markdown_table
from trainer.report.latex import escaped, latex_line
from trainer.run import write_json, write_whole
from trainer.scores import write_table

if TYPE_CHECKING:
    from rich.table import Table as Drawn

COLUMNS = (
    "kind", "prompt", "sets", "metric", "by", "group", "model", "each", "objects", "cases", "volumes",
    "median", "q1", "q3", "mean", "star", "dagger",
    "reference", "difference", "ci95_low", "ci95_high", "rank_biserial", "p", "p_holm",
)  # fmt: skip
"""Of ``comparison.csv``; scores are from 0 to 1 there, distances in their unit."""
_CASES = {"3d": "volume", "video": "video"}


def title(table: Table) -> str:
    """What the table is about."""
    kind, prompt, ways = table.asking
    if not kind:
        return "Models on the same objects"
    gone_on = f", from the mask of {', '.join(ways)}" if ways and ways != ("model",) else ""
    return f"{TITLES[kind]} by {prompt}{gone_on}: {', '.join(table.sets)}"


def metric_title(table: Table, metric: str, percent: bool) -> str:
    """A score with its unit."""
    if metric in LOWER_IS_BETTER:
        units = {tolerance.rpartition(" ")[2] for tolerance in table.tolerances}
        return METRICS[metric] + (f" ({' or '.join(sorted(units))})" if units else "")
    return METRICS[metric] + (" (%)" if percent else "")


def headings(table: Table) -> list[str]:
    """Of the columns."""
    return [" · ".join(GROUPINGS[name] for name in table.by), *_counts(table), *table.columns]


def rows(table: Table, metric: str, percent: bool) -> list[list[str]]:
    """A score's rows: group, numbers, and ``Median (Q1, Q3)`` with the marks of each model."""
    return [
        [" · ".join(line.group), *(f"{getattr(line, name):,}" for name in _counts(table))]
        + [cell_text(line.cells[name], metric, percent) for name in table.columns]
        for line in table.lines
        if line.metric == metric
    ]


def cell_text(cell: Cell, metric: str, percent: bool) -> str:
    """``87.5 (80.1, 92.4)*†``."""
    q1, median, q3 = (_number(value, metric, percent) for value in (cell.q1, cell.median, cell.q3))
    return f"{median} ({q1}, {q3}){'*' * cell.star}{'†' * cell.dagger}"


def note(table: Table, percent: bool) -> list[str]:
    """What stands below the table: whose figures these are, how they were tested, and what is left out."""
    if not table.objects:
        return [f"Nothing is compared here: no object was answered by all of {', '.join(table.columns)}."]
    if not table.lines:
        return ["Nothing is compared here: no score is there for all columns."]
    parts = [_whose(table, percent), *_tested(table), *_dependence(table), *_left_out(table)]
    if "nsd" in table.metrics and table.tolerances:
        parts.append(f"NSD: share of both surfaces that is within {' or '.join(table.tolerances)} of the other.")
    return parts


def markdown(tables: Sequence[Table], percent: bool) -> str:
    """The tables as Markdown."""
    parts = ["# Comparison"]
    for table in tables:
        parts.append(f"## {title(table)}")
        for metric in table.metrics:
            lines = [[cell.replace("*", r"\*") for cell in row] for row in rows(table, metric, percent)]
            parts += [f"**{metric_title(table, metric, percent)}**", markdown_table(headings(table), lines)]
        parts.append(" ".join(note(table, percent)).replace("*", r"\*"))
    return "\n\n".join(parts) + "\n"


def latex(tables: Sequence[Table], percent: bool) -> str:
    """The tables as LaTeX; the document needs the package booktabs."""
    parts = ["% \\usepackage{booktabs}"]
    for table in tables:
        if table.lines:
            parts.append(_latex_table(table, percent))
    return "\n\n".join(parts) + "\n"


def show(tables: Sequence[Table], percent: bool) -> None:
    """Print the tables; in a narrow terminal quartiles stand below their medians."""
    from rich.console import Console
    from rich.text import Text

    console = Console()
    for table in tables:
        console.print(Text(f"\n{title(table)}", style="bold"))
        for metric in table.metrics:
            drawn = _drawn(table, metric, percent, " ")
            needed = console.measure(drawn, options=console.options.update(width=10_000)).maximum
            if needed <= console.width:
                console.print(drawn)
            elif console.is_terminal:
                console.print(_drawn(table, metric, percent, "\n"))
            else:  # a file has no width: nothing is cut there
                Console(width=needed).print(drawn)
        for part in note(table, percent):
            console.print(Text(part))
        if table.each == "object" and _dependent(table):
            console.print(Text("With --each volume the means of volumes are compared instead."))


def _drawn(table: Table, metric: str, percent: bool, between: str) -> Drawn:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table as Drawn
    from rich.text import Text

    drawn = Drawn(box=SIMPLE_HEAD, title=Text(metric_title(table, metric, percent)), title_justify="left")
    counts = len(_counts(table))
    for place, name in enumerate(headings(table)):
        number = 0 < place <= counts
        drawn.add_column(Text(name), justify="right" if number else "left", overflow="fold", no_wrap=number)
    for group, *cells in rows(table, metric, percent):
        told = [Text(cell.replace(" (", f"{between}(")) for cell in cells]
        drawn.add_row(Text(group), *told, style="bold" if group == " · ".join(ALL) else None)
    return drawn


def write(folder: Path, tables: Sequence[Table], sources: dict[str, str], percent: bool) -> None:
    """Write ``comparison.md``, ``.tex``, ``.csv`` and ``.json``.

    Args:
        folder: Made if it is not there.
        tables: What was compared.
        sources: Of each column the table that it was read from.
        percent: Whether Markdown and LaTeX have percent.

    Raises:
        UserError: The folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / "comparison.md", markdown(tables, percent))
        write_whole(folder / "comparison.tex", latex(tables, percent))
        write_table(folder / "comparison.csv", COLUMNS, csv_rows(tables))
        write_json(folder / "comparison.json", as_json(tables, sources, percent))
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror or error}): choose another --out") from error


def csv_rows(tables: Sequence[Table]) -> list[list[object]]:
    """A row for each score of each model in each group, with its test against the reference."""
    found: list[list[object]] = []
    for table in tables:
        kind, prompt, _ = table.asking
        for line in table.lines:
            for name, cell in line.cells.items():
                head = [kind, prompt, ", ".join(table.sets), line.metric, " · ".join(table.by), " · ".join(line.group)]
                numbers = [name, table.each, line.objects, line.cases, line.volumes]
                scores = [cell.median, cell.q1, cell.q3, cell.mean, int(cell.star), int(cell.dagger)]
                found.append([*head, *numbers, *scores, table.reference or "", *_against(line, name, table.reference)])
    return found


def as_json(tables: Sequence[Table], sources: dict[str, str], percent: bool) -> dict[str, Any]:
    """Everything, with the tests of every pair of columns; scores are from 0 to 1, infinite distances null."""
    return {
        "columns": sources,
        "test": "two-sided paired Wilcoxon signed-rank",
        "correction": "Holm, over all tests of a table",
        "alpha": ALPHA,
        "tables": [_table(table, percent) for table in tables],
    }


def _table(table: Table, percent: bool) -> dict[str, Any]:
    content = asdict(table)
    kind, prompt, initial = content.pop("asking")
    head = {"title": title(table), "kind": kind, "prompt": prompt, "initial": initial}
    found: dict[str, Any] = finite({**head, **content, "tests": table.tests, "note": " ".join(note(table, percent))})
    return found


def _whose(table: Table, percent: bool) -> str:
    line = max(table.lines, key=lambda one: one.objects)
    case = counted(line.cases, _CASES.get(table.asking[0], "image"))
    of = f" of {counted(line.volumes, 'volume')}" if line.volumes != line.cases else ""
    objects = f"{counted(line.objects, 'object')} in {case}{of}, the same for all columns"
    unit = " in %" if percent and {*table.metrics} - {*LOWER_IS_BETTER} else ""
    if table.each == "volume":
        return f"Median (Q1, Q3){unit} of the means of {counted(line.volumes, 'volume')} ({objects})."
    return f"Median (Q1, Q3){unit} of {objects}; each counts once."


def _tested(table: Table) -> list[str]:
    if not table.tests:
        return ["No test: there is no pair of objects that differ."]
    against = f"* better than {table.reference}; " if table.reference else ""
    tests = f"the {table.tests} tests" if table.tests > 1 else "the one test"
    parts = [
        f"{against}† better than every other column: two-sided paired Wilcoxon signed-rank test, p < {ALPHA} after "
        f"Holm's correction for {tests} of this table (each pair of columns in each row of each score). "
        "Ranks of the paired differences say which of two is better, not the medians."
    ]
    lower = [METRICS[metric] for metric in table.metrics if metric in LOWER_IS_BETTER]
    return parts + ([f"Lower is better for {', '.join(lower)}."] if lower else [])


def _dependence(table: Table) -> list[str]:
    if table.each == "object" and _dependent(table):
        volumes = max(line.volumes for line in table.lines)
        what = counted(volumes, "image or volume", "images or volumes")
        return [f"Objects of one image or volume are not independent: p seems surer than {what} allow."]
    return ["Patients are not known here: several volumes of one are not independent."]


def _dependent(table: Table) -> bool:
    """Whether several objects are of one image or volume."""
    return any(line.objects > line.volumes for line in table.lines)


def _left_out(table: Table) -> list[str]:
    parts = []
    if table.left_out:
        lacking = ", ".join(f"{name} lacks {count:,}" for name, count in table.lacking.items())
        parts.append(f"{counted(table.left_out, 'object')} left out that not all columns answered: {lacking}.")
    if table.absent:
        parts.append(f"Without answers of this kind: {', '.join(table.absent)}.")
    for metric, count in table.without.items():
        all_of_it = count == table.objects
        what = "left out" if all_of_it else f"of {table.objects - count:,} objects alone"
        parts.append(f"{METRICS[metric]} is {what}: not every column has it{'' if all_of_it else ' for the others'}.")
    return parts


def _counts(table: Table) -> list[str]:
    """Numbers that the rows show: volumes only where they are not the objects."""
    differ = any(line.objects != line.volumes for line in table.lines)
    return ["objects", "volumes"] if differ or table.each == "volume" else ["objects"]


def _number(value: float, metric: str, percent: bool) -> str:
    if math.isinf(value):
        return "∞"
    if metric in LOWER_IS_BETTER:
        return f"{value:.1f}"
    return f"{100 * value:.1f}" if percent else f"{value:.3f}"


def _latex_table(table: Table, percent: bool) -> str:
    names, counts = headings(table), _counts(table)
    kinds = "l" + "r" * len(counts) + "l" * len(table.columns)
    body = []
    for metric in table.metrics:
        block = rf"\multicolumn{{{len(names)}}}{{l}}{{\emph{{{escaped(metric_title(table, metric, percent))}}}}} \\"
        body += [r"\midrule", block, *(latex_line(row) for row in rows(table, metric, percent))]
    below = escaped(" ".join(note(table, percent)))
    lines = [
        *(r"\begin{table}", r"\centering", rf"\caption{{{escaped(title(table))}}}"),
        *(rf"\begin{{tabular}}{{{kinds}}}", r"\toprule", latex_line(names), *body, r"\bottomrule", r"\end{tabular}"),
        *(r"\par\smallskip", rf"\parbox{{\linewidth}}{{\footnotesize {below}}}", r"\end{table}"),
    ]
    return "\n".join(lines)


def _against(line: Line, name: str, reference: str | None) -> list[object]:
    """A column's test against the reference; empty cells for the reference itself."""
    test: Test | None = next((one for one in line.tests if (one.column, one.against) == (name, reference)), None)
    if test is None:
        return [""] * 6
    bounds = test.ci95 or ("", "")
    chances = ["" if value is None else f"{value:.6g}" for value in (test.p_value, test.p_holm)]
    return ["" if test.difference is None else test.difference, *bounds, test.effect, *chances]
