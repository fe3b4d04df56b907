"""What came out of a run: a page to send round and a summary for programs.

Nothing here needs torch: a report is made from the run's files, on any machine.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.run import Run, write_json

if TYPE_CHECKING:
    from trainer.report.data import RunData
    from trainer.report.runs import Runs


def write_report(run: Run, data: RunData | None = None) -> Path:
    """Write ``report.html`` into a run, whole or not at all.

    Args:
        run: The run.
        data: What its folder holds, if it has been read already.

    Returns:
        The page: one file that needs nothing else.

    Raises:
        UserError: A file of the run is damaged.
    """
    from trainer.report.data import read_run
    from trainer.report.page import render

    path = run.root / "report.html"
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(render(data or read_run(run)), encoding="utf-8")
    temporary.replace(path)
    return path


def write_comparison(runs: Runs, path: Path) -> None:
    """Write the page that compares several runs, whole or not at all.

    Args:
        runs: From `trainer.report.runs.gather`.
        path: The page: one file that needs nothing else; its links to the runs' own pages need those.
    """
    from trainer.report.runs_page import render_runs
    from trainer.run import write_whole

    write_whole(path, render_runs(runs, path.parent))


def write_summary(run: Run, data: RunData | None = None) -> dict[str, Any]:
    """Write ``summary.json`` into a run.

    Args:
        run: The run.
        data: What its folder holds, if it has been read already.

    Returns:
        Its content; see `trainer.report.summary.summarize`.

    Raises:
        UserError: A file of the run is damaged.
    """
    from trainer.report.data import read_run
    from trainer.report.summary import summarize

    summary = summarize(data or read_run(run))
    write_json(run.root / "summary.json", summary)
    return summary
