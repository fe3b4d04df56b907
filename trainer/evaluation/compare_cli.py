"""`trainer compare`: the papers' tables, from what was scored already."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from data_shards.errors import CommandParser, UserError, nearest

DESCRIPTION = """\
Put models side by side on the objects that all of them answered: Median (Q1, Q3), with * where one is better than the
reference and † where it is better than every other column (paired Wilcoxon signed-rank tests, Holm's correction over
all tests of a table). Nothing is computed again: per_case.csv is enough.

  trainer compare SAM=runs/a/evaluation/untouched tuned=runs/a
  trainer compare full=runs/full lora=runs/lora --reference full --by modality term --out tables
  trainer compare runs/sam2-transfer --models SAM MedSAM SAM2-Tiny      an evaluation that has several models
  trainer compare runs/a                                                a run before and after tuning

PATH is a per_case.csv, or a folder that has one: an evaluation, or a run, of which NAME=PATH takes the tuned model.
Prompts that were moved at random (`trainer evaluate --noise`) are left out here: their curves are in report.html.
NAME=PATH is one column; PATH alone gives every model of the table, or every evaluation of the run.
--out writes comparison.md, comparison.tex (booktabs), comparison.csv and comparison.json: with mean differences, their
bootstrap 95 % intervals, and p before and after correction.
"""


def compare_command(arguments: list[str]) -> int:
    """Run ``trainer compare`` and return its exit code.

    Raises:
        UserError: A mistake in the arguments, or a table is missing, damaged or of other cases.
    """
    values = _parser().parse_args(arguments)
    from trainer.evaluation.columns import choose, read_columns
    from trainer.evaluation.comparing import GROUPINGS, METRICS, compare_columns
    from trainer.evaluation.paper_table import show, write

    by, metrics = _known("--by", values.by, GROUPINGS), _known("--metric", values.metric, METRICS)
    out = Path(values.out) if values.out else None
    if out is not None and out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: is a file: name a folder")
    columns = read_columns(values.tables)
    if values.models:
        columns = choose(columns, values.models)
    tables = compare_columns(columns, values.reference, by, metrics or None, values.each)
    percent = not values.fractions
    show(tables, percent)
    if out is not None:
        write(out, tables, {column.name: str(column.path) for column in columns}, percent)
        print(f"\n{out / 'comparison.md'}, and the same as .tex, .csv and .json")
    return 0


def _known(option: str, given: Sequence[str], options: Iterable[str]) -> list[str]:
    """What was given, each once."""
    for name in given:
        if name not in options:
            raise UserError(f"{option}: there is no '{name}'{nearest(name, options)}")
    return list(dict.fromkeys(given))


def _parser() -> CommandParser:
    parser = CommandParser(prog="trainer compare", description=DESCRIPTION)
    parser.add_argument("tables", nargs="+", metavar="[NAME=]PATH", help="a column, or every column of a table")
    parser.add_argument("--reference", metavar="NAME", help="column that * is about (default: the first)")
    parser.add_argument("--models", nargs="+", metavar="NAME", help="these columns alone, in this order")
    parser.add_argument(
        "--by", nargs="+", default=["modality"], metavar="NAME",
        help="what rows are of: dataset, modality, term, set, tolerance, plane, size (terciles), or several (default: "
        "modality)",
    )  # fmt: skip
    parser.add_argument(
        "--metric", nargs="+", default=[], metavar="NAME",
        help="dsc, iou, nsd, hd95, dsc_unprompted (default: dsc and nsd, where all have it)",
    )  # fmt: skip
    parser.add_argument(
        "--each", choices=("object", "volume"), default="object",
        help="what counts as one: an object (default), or a volume by the mean of its objects, since those are not "
        "independent",
    )  # fmt: skip
    parser.add_argument("--fractions", action="store_true", help="scores from 0 to 1 instead of percent")
    parser.add_argument("--out", metavar="FOLDER", help="write the tables there, too")
    return parser
