"""The command ``data-shards lint``."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from data_shards.errors import CommandParser, UserError

if TYPE_CHECKING:
    from data_shards.lint.findings import Report

HELP = """\
Find what is wrong with a corpus before a node is booked. Writes nothing but the files asked for.

  data-shards lint data/liver                                  look at every sample
  data-shards lint data/liver --html lint.html                 and see the offenders
  data-shards lint data/liver --sample 2000                    a quick look
  data-shards lint data/liver --ignore tiny-target --fail-on warning
  data-shards lint --checks                                    list the checks

Exit code with --fail-on            error (default)   warning   never
  an error                                          2         2       0
  warnings are the worst                            0         1       0
  notes, or nothing                                 0         0       0

A mistake in the command, such as a folder that is no corpus, ends with 2 in any case.
"""


def add_arguments(parser: CommandParser) -> None:
    """Add the options of the command."""
    parser.add_argument("dir", nargs="?", metavar="DIR", help="a corpus, or one split of it")
    parser.add_argument("--checks", action="store_true", help="list the checks and leave")
    parser.add_argument("--sample", type=_count, metavar="N", help="look at N samples only, evenly spread")
    parser.add_argument("--workers", type=_count, default=1, metavar="W", help="processes (default: 1)")
    parser.add_argument("--ignore", action="append", default=[], metavar="CODE", help="do not run a check; repeatable")
    parser.add_argument(
        "--fail-on",
        choices=("error", "warning", "never"),
        default="error",
        help="what makes the exit code other than 0 (default: error)",
    )
    parser.add_argument("--json", metavar="FILE", help="write all findings into this file")
    parser.add_argument("--html", metavar="FILE", help="write a page with pictures of the offenders into this file")


def run(values: argparse.Namespace) -> int:
    """Run the command; returns the exit code, which the help explains.

    Raises:
        UserError: There is no corpus, a code is unknown, or a file cannot be written.
    """
    from rich.console import Console

    from data_shards.display import check_place
    from data_shards.lint.linter import lint
    from data_shards.lint.terminal import show, show_checks

    console = Console(markup=False, emoji=False, highlight=False)
    if values.checks:
        show_checks(console)
        return 0
    if values.dir is None:
        raise UserError("lint: DIR is missing: the folder of a corpus; see data-shards lint --help")
    for option, path in (("--json", values.json), ("--html", values.html)):
        check_place(option, path)
    report = lint(values.dir, values.sample, values.workers, values.ignore)
    show(report, console)
    _write(values.json, _write_json, report)
    _write(values.html, _write_html, report)
    return report.exit_code(values.fail_on)


def _write(path: str | None, write: Callable[[Path, Report], None], report: Report) -> None:
    if path is None:
        return
    try:
        write(Path(path), report)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error}): choose another file") from error
    print(f"written {path}")


def _write_json(path: Path, report: Report) -> None:
    from data_shards.lint.record import record
    from data_shards.stage import write_json

    write_json(path, record(report))


def _write_html(path: Path, report: Report) -> None:
    from data_shards.lint.page import render

    path.write_text(render(report), encoding="utf-8")


def _count(text: str) -> int:
    """Read a whole number from 1 on."""
    if not re.fullmatch(r"[0-9]{1,9}", text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is no whole number from 1 on: give one, as 8")
    return int(text)
