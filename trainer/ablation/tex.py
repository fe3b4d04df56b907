"""The tables of an ablation as LaTeX that fits a page: booktabs, and graphicx where a table has to be made smaller."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from trainer.ablation.results import Results
from trainer.ablation.spec import Loaded
from trainer.ablation.tables import COSTS, Table, all_tables, notes
from trainer.report.latex import escaped, latex_line
from trainer.run import write_whole

_FITTED = r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%"
"""Begins what is made smaller where it is wider than a line, and left alone elsewhere."""


def write_latex(path: Path, loaded: Loaded, results: Results) -> None:
    """Write ``results.tex``: the tables with booktabs, to be put into a paper as they are."""
    write_whole(path, document(loaded.name, all_tables(results), notes(loaded, results)))


def document(name: str, tables: Sequence[Table], notes: Sequence[str]) -> str:
    """All tables, each a float with its caption, to be taken into a document as they are.

    Args:
        name: The ablation.
        tables: The main one first.
        notes: What they mean, below the first.
    """
    plain = " ".join(name.split())
    lines = [f"% {plain}: written by `trainer ablate`; needs \\usepackage{{booktabs,graphicx}}"]
    for number, table in enumerate(tables):
        body = _two_parts(table) if number == 0 else _one_part(table)
        caption = escaped(f"{table.title}.")
        below = escaped(" ".join(notes)) if number == 0 else ""
        lines += [
            *("\\begin{table}", "\\centering\\small", f"\\caption{{{caption}}}", _FITTED, *body, "}"),
            *((f"\\par\\smallskip\\parbox{{\\linewidth}}{{\\footnotesize {below}}}",) if below else ()),
            *("\\end{table}", ""),
        ]
    return "\n".join(lines)


def _one_part(table: Table) -> list[str]:
    kinds = "".join("l" if place in table.words else "r" for place in range(len(table.columns)))
    rows = [latex_line(row) for row in table.rows]
    return _tabular(kinds, [latex_line(table.columns), "\\midrule", *rows])


def _two_parts(table: Table) -> list[str]:
    """The main table, whose scores stand above its costs: side by side they are wider than any page."""
    scores = [(row[0], *row[COSTS + 1 :]) for row in (table.columns, *table.rows)]
    costs = [row[: COSTS + 1] for row in (table.columns, *table.rows)]
    room, count = len(costs[0]) - 1, len(scores[0]) - 1
    spans = [room // count + (place < room % count) for place in range(count)]
    above = [_spanning(row, spans) for row in scores]
    below = [latex_line(row) for row in costs]
    lines = [above[0], "\\midrule", *above[1:], "\\midrule", below[0], "\\midrule", *below[1:]]
    return _tabular("l" + "r" * room, lines)


def _spanning(row: Sequence[str], spans: Sequence[int]) -> str:
    """A line whose cells after the first take several columns each."""
    cells = [f"\\multicolumn{{{span}}}{{r}}{{{escaped(cell)}}}" for cell, span in zip(row[1:], spans, strict=True)]
    return " & ".join([escaped(row[0]), *cells]) + r" \\"


def _tabular(kinds: str, lines: Sequence[str]) -> list[str]:
    return [f"\\begin{{tabular}}{{{kinds}}}", "\\toprule", *lines, "\\bottomrule", "\\end{tabular}"]
