"""`trainer report`: writes and names a run's report."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from data_shards.errors import CommandParser, UserError
from trainer.run import Run

if TYPE_CHECKING:
    from trainer.report.data import RunData

_HELP = """\
Write what came out of a run: RUN/report.html to read and send round, RUN/summary.json for programs.

  trainer report runs/quickstart

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
    parser.add_argument("run", metavar="RUN", help="folder of the run: the recipe's trainer.default_root_dir")
    values = parser.parse_args(arguments)
    run = Run.existing(values.run)

    from trainer.report import write_report, write_summary
    from trainer.report.data import read_run

    data = read_run(run)
    try:
        summary, path = write_summary(run, data), write_report(run, data)
    except OSError as error:
        raise UserError(f"{run.root}: the report cannot be written ({error.strerror or error})") from error
    # here, unlike in a page that is sent round, the folder is written as the user wrote it
    _show(replace(data, shown=str(run.root)), summary)
    print(f"report: {path}")
    return 0


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
