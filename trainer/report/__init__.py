"""What came out of a run: a page to send round and a summary for programs.

Nothing here needs torch: a report is made from the run's files, on any machine.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trainer.run import Run, write_json


def write_report(run: Run) -> Path:
    """Write ``report.html`` into a run, whole or not at all.

    Returns:
        The page: one file that needs nothing else.

    Raises:
        UserError: A file of the run is damaged.
    """
    from trainer.report.data import read_run
    from trainer.report.page import render

    path = run.root / "report.html"
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(render(read_run(run)), encoding="utf-8")
    temporary.replace(path)
    return path


def write_summary(run: Run) -> dict[str, Any]:
    """Write ``summary.json`` into a run.

    Returns:
        Its content; see `trainer.report.summary.summarize`.

    Raises:
        UserError: A file of the run is damaged.
    """
    from trainer.report.data import read_run
    from trainer.report.summary import summarize

    summary = summarize(read_run(run))
    write_json(run.root / "summary.json", summary)
    return summary
