"""A report as plain values, to be written as strict JSON."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

from data_shards import __version__
from data_shards.lint.findings import MOST_KEPT, SEVERITIES, Finding, Report

SCHEMA_VERSION = 1
"""Raised whenever a field changes its meaning or goes."""


def record(report: Report) -> dict[str, Any]:
    """Return all of a report. It depends on the corpus and the options alone: it holds no time."""
    return {
        "schema_version": SCHEMA_VERSION,
        "tool": f"data-shards lint {__version__}",
        "corpus": report.folder,
        "summary": report.summary(),
        "worst": report.worst,
        "totals": {severity: report.total(severity) for severity in SEVERITIES},
        "splits": {name: asdict(facts) for name, facts in report.splits.items()},
        "ignored": list(report.ignored),
        "remarks": report.remarks,
        "counts": [
            {"code": check.code, "severity": check.severity, "about": check.about, "splits": counts}
            for check, counts in report.found()
        ],
        "most_kept": MOST_KEPT,
        "findings": [_finding(finding) for finding in report.findings],
    }


def _finding(finding: Finding) -> dict[str, Any]:
    value = finding.value if finding.value is not None and math.isfinite(finding.value) else None
    other = None if finding.other is None else finding.other._asdict()
    return {**asdict(finding), "value": value, "other": other}
