"""The command `data-shards`: build, merge, verify, lint and inspect a corpus.

What a subcommand needs is imported when it runs, so that ``--help`` is fast.
"""

from __future__ import annotations

import argparse
import re
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NoReturn

from data_shards import __version__, reindex, stats
from data_shards.errors import CommandParser, UserError, counted, nearest, run_command
from data_shards.lint import command as lint_command

if TYPE_CHECKING:
    from rich.console import Console

_MOST_PROBLEMS = 50
"""Problems that `verify` prints; a truncated shard can have thousands."""

_HELP = """\
Turn medical images and their masks into verified shards, and look at them.

  data-shards build SPEC.yaml --out data/liver --root /scans   build the shards
  data-shards build SPEC.yaml --out data/liver --part 1/8      build the first of eight parts
  data-shards merge data/liver                                 make one corpus of all parts
  data-shards verify data/liver                                check every byte of them
  data-shards lint data/liver --html lint.html                 find what is wrong with the data
  data-shards inspect data/liver --png sheet.png               see what is in them
  data-shards stats data/liver --png stats.png                 how much of what, and how balanced
  data-shards index data/foreign                               make the index of other people's tars
  data-shards formats                                          what can be read, and how

A spec says which files belong together and what their masks mean. A whole one:

  dataset: liver-ct
  modality: CT
  cases:
    - image: "imgs/{id}.nii.gz"        # {id} fits every case of the folder
      mask: "gts/{id}_seg.nii.gz"
      patient: "^(P[0-9]+)_"           # finds the patient in the id
  targets:
    - {term: liver, value: 1}
  intensity: {kind: window, level: 40, width: 400}
  split: {kind: patients, fractions: {train: 0.8, test: 0.2}, seed: 0}
"""


_BUILD_HELP = """\
Build shards from a spec. A build that was stopped goes on where it was: give the same command.

  data-shards build SPEC.yaml --out data/liver --dry-run       show what would be built
  data-shards build SPEC.yaml --out data/liver --workers 8     build it with eight processes

On several machines that share a disk, each job builds its part; here with SLURM:

  #SBATCH --array=1-8 --cpus-per-task=4
  data-shards build SPEC.yaml --out data/liver --part $SLURM_ARRAY_TASK_ID/8 --workers 4

and when all have ended:

  data-shards merge data/liver

The corpus is the same to the byte, whatever the number of parts and workers, and however often
it was stopped.
"""

_MERGE_HELP = """\
Make one corpus of the parts that `data-shards build --part I/N` built, and remove the parts.

  data-shards merge data/liver                                 parts that lie in data/liver/parts
  data-shards merge a/parts/1-of-2 b/parts/2-of-2 --out c      parts from different places

Every byte of the parts is checked. Parts of different specs or files do not go together.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Arguments; by default those of the process.

    Returns:
        The exit code: 0, or 2 for a user's mistake or a corpus with problems.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    return run_command(lambda: _run(arguments), "data-shards")


def _run(arguments: list[str]) -> int:
    parser, commands = _parsers()
    if not arguments:
        parser.print_help()
        return 2
    if not arguments[0].startswith("-") and arguments[0] not in commands:
        raise UserError(f"unknown command '{arguments[0]}'{nearest(arguments[0], commands)}")
    _check_options(arguments, commands.get(arguments[0], parser))
    values, unknown = parser.parse_known_args(arguments)
    if unknown:
        raise UserError(f"{values.command}: unexpected '{unknown[0]}'; see data-shards {values.command} --help")
    code: int = values.run(values)
    return code


def _check_options(arguments: list[str], parser: CommandParser) -> None:
    """Name a misspelt option before argparse complains that the right one is missing."""
    command = parser.prog.partition(" ")[2]
    place = f"{command}: " if command else ""
    known = [option for action in parser._actions for option in action.option_strings]
    options = arguments[: arguments.index("--")] if "--" in arguments else arguments
    for name in (argument.partition("=")[0] for argument in options):
        if name.startswith("-") and name != "-" and name not in known:
            raise UserError(f"{place}unknown option '{name}'{nearest(name, known)}")


def _parsers() -> tuple[CommandParser, dict[str, CommandParser]]:
    """Return the parser and those of its commands."""
    parser = CommandParser(prog="data-shards", description=_HELP)
    parser.add_argument("--version", action="version", version=f"sam-trainer {__version__}")
    group = parser.add_subparsers(dest="command", title="commands", metavar="COMMAND", required=True)

    build = group.add_parser("build", help="build shards from a spec", description=_BUILD_HELP)
    build.add_argument("spec", metavar="SPEC.yaml", help="the spec; examples lie in data_shards/catalogue")
    build.add_argument("--out", metavar="DIR", help="folder of the corpus; it is made")
    build.add_argument("--root", metavar="DIR", help="folder of the spec's relative paths (default: the spec's root)")
    build.add_argument("--part", type=_part, metavar="I/N", help="build the I-th of N parts, to be merged")
    build.add_argument(
        "--workers", type=_count, metavar="W", help="processes (default: up to 4, as far as the work is worth it)"
    )
    build.add_argument("--overwrite", action="store_true", help="replace a corpus built from something else")
    build.add_argument("--dry-run", action="store_true", help="show cases, splits and blocks; build nothing")
    build.set_defaults(run=_build)

    merge = group.add_parser("merge", help="make one corpus of parts", description=_MERGE_HELP)
    merge.add_argument("dirs", nargs="+", metavar="DIR", help="a corpus in parts, or a single part")
    merge.add_argument("--out", metavar="DIR", help="folder of the corpus (default: the DIR given)")
    merge.add_argument("--overwrite", action="store_true", help="replace a corpus built from something else")
    merge.add_argument("--keep-parts", action="store_true", help="leave the parts where they are")
    merge.set_defaults(run=_merge)

    verify = group.add_parser("verify", help="check every byte and sample; writes nothing")
    verify.add_argument("dir", metavar="DIR", help="a corpus, or one split of it")
    verify.set_defaults(run=_verify)

    inspect = group.add_parser("inspect", help="show what a corpus holds")
    inspect.add_argument("dir", metavar="DIR", help="a corpus, or one split of it")
    inspect.add_argument("--sample", metavar="KEY", help="show this sample instead of the tables")
    inspect.add_argument("--png", metavar="OUT", help="draw the sample, or a dozen samples, into this file")
    inspect.set_defaults(run=_inspect)

    for name, module, what in (
        ("lint", lint_command, "find what is wrong with the data"),
        ("stats", stats, "count what a corpus holds"),
        ("index", reindex, "make the index of any tars"),
    ):
        command = group.add_parser(name, help=what, description=module.HELP)
        module.add_arguments(command)
        command.set_defaults(run=module.run)

    formats = group.add_parser("formats", help="list what can be read, and the options of a spec's 'reader'")
    formats.add_argument("suffix", nargs="?", metavar="SUFFIX", help="only this format, as .png or dicom")
    formats.set_defaults(run=_formats)
    return parser, dict(group.choices)


def _console() -> Console:
    from rich.console import Console

    return Console(markup=False, emoji=False, highlight=False)  # terms and paths may hold brackets and colons


def _part(text: str) -> tuple[int, int]:
    """Read ``2/8``."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise argparse.ArgumentTypeError(f"'{text}' is no part: give I/N with I from 1 to N, as 2/8")
    return int(match[1]), int(match[2])


def _count(text: str) -> int:
    """Read a number of processes."""
    if not re.fullmatch(r"\d{1,4}", text):
        raise argparse.ArgumentTypeError(f"'{text}' is no number of processes: give a whole number, as 8")
    return int(text)


def _build(values: argparse.Namespace) -> int:
    from data_shards.build import build, build_part, prepare
    from data_shards.summary import show, show_plan

    if values.dry_run:
        show_plan(prepare(values.spec, values.root), _console())
        return 0
    if values.out is None:
        raise UserError("build: --out is missing: the folder of the corpus; see data-shards build --help")
    options = {"root": values.root, "overwrite": values.overwrite, "workers": values.workers}
    with _stoppable():
        if values.part is None:
            result = build(values.spec, values.out, **options)
        else:
            result = build_part(values.spec, values.out, *values.part, **options)
    _warn(result.warnings)
    show(result, _console())
    return 0


def _warn(warnings: Sequence[str]) -> None:
    for warning in warnings:
        print(f"data-shards: warning: {warning}", file=sys.stderr)


def _merge(values: argparse.Namespace) -> int:
    from data_shards.build import BuildResult, surprises
    from data_shards.merge import merge
    from data_shards.summary import show

    with _stoppable():
        out, manifest, reused = merge(values.dirs, values.out, values.overwrite, values.keep_parts)
    _warn([] if reused else surprises(manifest))
    show(BuildResult(out, reused, manifest), _console())
    return 0


@contextmanager
def _stoppable() -> Iterator[None]:
    """Let SIGTERM, as schedulers send it, unwind like an error does: nothing is left half done."""

    def stop(number: int, _: object) -> NoReturn:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _verify(values: argparse.Namespace) -> int:
    from data_shards.verify import verify

    result = verify(values.dir)
    for problem in result.problems[:_MOST_PROBLEMS]:
        print(f"data-shards: problem: {problem}", file=sys.stderr)
    if len(result.problems) > _MOST_PROBLEMS:
        print(f"data-shards: … and {len(result.problems) - _MOST_PROBLEMS:,} more", file=sys.stderr)
    if result.problems:
        print(f"{counted(len(result.problems), 'problem')} in {result.summary()}")
        return 2
    print(f"OK: {result.summary()}")
    return 0


def _inspect(values: argparse.Namespace) -> int:
    from data_shards import inspect

    if values.png is not None and not values.png.lower().endswith(".png"):
        raise UserError(f"--png {values.png}: a PNG is drawn: give it a name that ends in .png")
    splits = inspect.open_splits(values.dir)
    if values.sample is not None:
        triplet = inspect.find_sample(splits, values.sample)
        inspect.show_sample(triplet, _console())
        if values.png is not None:
            inspect.draw_sample(triplet, values.png)
    else:
        inspect.show_corpus(splits, _console())
        if values.png is not None:
            inspect.draw_sheet(splits, values.png)
    if values.png is not None:
        print(f"drawn {values.png}")
    return 0


def _formats(values: argparse.Namespace) -> int:
    from rich.table import Table

    from data_shards.readers.formats import formats

    wanted = (values.suffix or "").lower().removeprefix(".")
    chosen = [item for item in formats() if wanted in "".join(item.suffixes).lower() + item.summary.lower()]
    if not chosen:
        known = [suffix for item in formats() for suffix in item.suffixes]
        raise UserError(f"formats: no format '{values.suffix}'{nearest(values.suffix, known)}")
    console = _console()
    for item in chosen:
        console.print(f"{' '.join(item.suffixes)}  ({item.reads})", style="bold", soft_wrap=True)
        console.print(f"  {item.summary}", soft_wrap=True)
        table = Table(show_header=False, box=None, padding=(0, 1, 0, 4))
        for name, default, meaning in item.options:
            table.add_row(f"{name}: {default}", meaning)
        if item.options:
            console.print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
