"""A report on the terminal: counts by check and split, and a few examples of each; never thousands of lines."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from data_shards.lint.findings import CHECKS, Finding, Report

EXAMPLES = 3
"""Findings of a check that are shown."""

_STYLES = {"error": "bold red", "warning": "yellow", "note": "cyan"}
_COLUMNS = 6
"""Splits that get a column; of more, the counts are added up."""


def show(report: Report, console: Console) -> None:
    """Print a report."""
    found = report.found()
    if found:
        console.print(_table(report))
        console.print()
    for check, counts in found:
        console.print(
            Text.assemble((check.severity, _STYLES[check.severity]), f" {check.code}: {check.about}"), soft_wrap=True
        )
        mine = [finding for finding in report.findings if finding.code == check.code][:EXAMPLES]
        for finding in mine:
            console.print(Text(f"  {where(finding)}{finding.message}"), soft_wrap=True)
        rest = sum(counts.values()) - len(mine)
        if rest:
            console.print(Text(f"  … and {rest:,} more"))
    if found:
        console.print()
    for remark in report.remarks:
        console.print(Text(remark), soft_wrap=True)
    console.print(Text(f"{report.summary()} ({_rate(report)})"), soft_wrap=True)


def show_checks(console: Console) -> None:
    """Print the table of all checks."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("code", "severity", "what it finds"):
        table.add_column(name, no_wrap=name != "what it finds")
    for check in CHECKS.values():
        table.add_row(check.code, Text(check.severity, _STYLES[check.severity]), Text(check.about))
    console.print(table)


def where(finding: Finding) -> str:
    """Return the split and the sample of a finding, as ``train KEY: ``."""
    place = " ".join(filter(None, (finding.split, finding.key)))
    return f"{place}: " if place else ""


def _table(report: Report) -> Table:
    splits = list(report.splits) if len(report.splits) <= _COLUMNS else []
    table = Table()
    for name in ("severity", "check", *splits, "all"):
        table.add_column(Text(name), justify="left" if name in ("severity", "check") else "right")
    for check, counts in report.found():
        cells = [f"{counts[split]:,}" if split in counts else "" for split in splits]
        table.add_row(Text(check.severity, _STYLES[check.severity]), check.code, *cells, f"{sum(counts.values()):,}")
    return table


def _rate(report: Report) -> str:
    return f"{report.seconds:.1f} s, {report.linted / max(report.seconds, 1e-9):,.0f} samples/s"
