"""The command `data-shards`: build, verify and inspect a corpus.

What a subcommand needs is imported when it runs, so that ``--help`` is fast.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NoReturn

from data_shards import __version__
from data_shards.errors import CommandParser, UserError, nearest, run_command

if TYPE_CHECKING:
    from rich.console import Console

_MOST_PROBLEMS = 50
"""Problems that `verify` prints; a truncated shard can have thousands."""

_HELP = """\
Turn medical images and their masks into verified shards, and look at them.

  data-shards build SPEC.yaml --out data/liver --root /scans   build the shards
  data-shards verify data/liver                                check every byte of them
  data-shards inspect data/liver --png sheet.png               see what is in them

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

    build = group.add_parser("build", help="build shards from a spec")
    build.add_argument("spec", metavar="SPEC.yaml", help="the spec; examples lie in data_shards/catalogue")
    build.add_argument("--out", required=True, metavar="DIR", help="folder of the corpus; it is made")
    build.add_argument("--root", metavar="DIR", help="folder of the spec's relative paths (default: the spec's root)")
    build.add_argument("--overwrite", action="store_true", help="replace a corpus built from something else")
    build.set_defaults(run=_build)

    verify = group.add_parser("verify", help="check every byte and sample; writes nothing")
    verify.add_argument("dir", metavar="DIR", help="a corpus, or one split of it")
    verify.set_defaults(run=_verify)

    inspect = group.add_parser("inspect", help="show what a corpus holds")
    inspect.add_argument("dir", metavar="DIR", help="a corpus, or one split of it")
    inspect.add_argument("--sample", metavar="KEY", help="show this sample instead of the tables")
    inspect.add_argument("--png", metavar="OUT", help="draw the sample, or a dozen samples, into this file")
    inspect.set_defaults(run=_inspect)
    return parser, dict(group.choices)


def _console() -> Console:
    from rich.console import Console

    return Console(markup=False, emoji=False, highlight=False)  # terms and paths may hold brackets and colons


def _build(values: argparse.Namespace) -> int:
    from data_shards.build import build, show

    with _stoppable():
        result = build(values.spec, values.out, root=values.root, overwrite=values.overwrite)
    for warning in result.warnings:
        print(f"data-shards: warning: {warning}", file=sys.stderr)
    show(result, _console())
    return 0


@contextmanager
def _stoppable() -> Iterator[None]:
    """Let SIGTERM, as schedulers send it, unwind like an error does: what was begun is removed."""

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
        print(f"{len(result.problems)} problems in {result.summary()}")
        return 2
    print(f"OK: {result.summary()}")
    return 0


def _inspect(values: argparse.Namespace) -> int:
    from data_shards import inspect

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


if __name__ == "__main__":
    sys.exit(main())
