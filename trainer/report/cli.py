"""`trainer report`: writes and names a run's report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_shards.errors import CommandParser, UserError
from trainer.run import Run

if TYPE_CHECKING:
    from trainer.report.data import RunData
    from trainer.report.runs import Runs

COMPARISON = "comparison.html"
"""The page of several runs, where no other name is given."""

_HELP = """\
Write what came out of a run: RUN/report.html to read and send round, RUN/summary.json for programs.

  trainer report runs/quickstart
  trainer report runs/full runs/lora --out full-or-lora.html

Of several runs there is a page besides that compares them on the targets that all have scored, the others with the
first one: scores with tests, box plots by modality, curves, cost, and what differs between the recipes.

The report shows the scores before and after tuning with pictures, the training curves, the worst cases, the export
gate and everything needed to repeat the run. It is one file and needs no network. What the run lacks is named with
the command that makes it, so a report can be written at any time, also while the run is being trained.
"""


def report_command(arguments: list[str]) -> int:
    """Write report and summary of a run, and print the result.

    Args:
        arguments: Those after ``trainer report``.

    Returns:
        The exit code.

    Raises:
        UserError: The arguments are wrong, there is no such run, or a file of it is damaged.
    """
    parser = CommandParser(prog="trainer report", description=_HELP)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run: its recipe's trainer.default_root_dir")
    parser.add_argument(
        "--out", metavar="FILE", help=f"the page that compares several runs ({COMPARISON} in this folder by default)"
    )
    values = parser.parse_args(arguments)
    runs = [Run.existing(folder) for folder in values.runs]
    out = _comparison_path(values.out, runs)

    from trainer.report.data import read_run
    from trainer.report.runs import gather

    read = [(run, read_run(run)) for run in runs]
    beside = gather([(run.root, data) for run, data in read]) if out else None
    for run, data in read:
        _write(run, data)
    if out and beside:
        _compare(beside, out)
    return 0


def _comparison_path(given: str | None, runs: Sequence[Run]) -> Path | None:
    """Where the page of several runs goes; None of a single one.

    Raises:
        UserError: It cannot go there.
    """
    if len(runs) == 1:
        if given is not None:
            raise UserError("--out is the page that compares several runs: give another RUN, or leave it out")
        return None
    out = Path(given or COMPARISON)
    if out.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--out {out}: the page is HTML, so its name ends in .html")
    if out.is_dir() or not out.resolve().parent.is_dir():
        raise UserError(f"--out {out}: {'this is a folder' if out.is_dir() else 'there is no such folder'}")
    own = [run.root for run in runs if out.resolve() == (run.root / "report.html").resolve()]
    if own:
        raise UserError(f"--out {out}: this is the page of {own[0]} itself; give another name")
    return out


def _write(run: Run, data: RunData) -> None:
    """Write and print a run's own report."""
    from trainer.report import write_report, write_summary

    try:
        summary, path = write_summary(run, data), write_report(run, data)
    except OSError as error:
        raise UserError(f"{run.root}: the report cannot be written ({error.strerror or error})") from error
    # here, unlike in a page that is sent round, the folder is written as the user wrote it
    _show(replace(data, shown=str(run.root)), summary)
    print(f"report: {path}")


def _compare(runs: Runs, out: Path) -> None:
    """Write and print the comparison of several runs."""
    from trainer.report import write_comparison
    from trainer.report.runs_page import verdict

    try:
        write_comparison(runs, out)
    except OSError as error:
        raise UserError(f"{out}: the comparison cannot be written ({error.strerror or error})") from error
    print(verdict(runs))
    for label, said in runs.unlike().items():
        print(f"warning: {label} was not scored as the first run: {'; '.join(said)}")
    print(f"comparison: {out}")


def _show(data: RunData, summary: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    from trainer.report.answer import few_volumes, scored_unlike
    from trainer.report.markup import UNKNOWN, duration, interval, score
    from trainer.scores import METRICS

    ends = {name: f"{score(summary[f'{name}_before'])} → {score(summary[f'{name}_after'])}" for name in METRICS}
    bounds = summary["dsc_gain_ci95"]
    gain = f"  (gain, 95 % CI: {interval((bounds[0], bounds[1]))})" if bounds else ""
    rate, verified = summary["images_per_second"], summary["export_verified"]
    table = Table(show_header=False)
    table.add_row("targets", UNKNOWN if summary["targets"] is None else f"{summary['targets']:,}")
    table.add_row("DSC", ends["dsc"] + gain)
    table.add_row("IoU", ends["iou"])
    if summary["nsd_after"] is not None or summary["nsd_before"] is not None:
        table.add_row("NSD", ends["nsd"])
    few = few_volumes(data)
    if few:
        table.add_row("note", few)
    table.add_row("images/s", UNKNOWN if rate is None else f"{rate:.3g}")
    table.add_row("time", duration(summary["seconds"]))
    table.add_row("export gate", {True: "verified", False: "NOT verified", None: "no export"}[verified])
    Console().print(table)
    unlike = scored_unlike(data)
    if unlike:
        print(f"warning: not scored alike: {unlike}")
    for what, command in data.missing().items():
        print(f"missing: {what}; made by `{command}`")
