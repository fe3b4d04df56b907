"""`trainer consolidate`: one file from a checkpoint that many ranks wrote."""

from __future__ import annotations

import sys
from pathlib import Path

from data_shards.errors import CommandParser, UserError
from data_shards.progress import progress
from trainer.checkpoints.consolidate import consolidate
from trainer.checkpoints.store import LAST, bytes_of, newest_good
from trainer.run import Run

DESCRIPTION = """\
Make one file of a sharded checkpoint, as a run of one process would have written it: weights, optimiser, average and
all the rest. Every byte is checked first, and nothing in it is run.

  trainer consolidate runs/organs                                      the newest undamaged checkpoint of the run
  trainer consolidate runs/organs/checkpoints/step-000500.ckpt --out organs.ckpt

`fit`, `test`, `predict`, `export` and the other commands read both forms, on any number of ranks: this is for moving a
checkpoint, keeping it, or reading it with other programs:

  torch.load("organs.ckpt", weights_only=True)["state_dict"]

Beside the file lies FILE.json with its size and SHA-256; without it the file is read too, with weaker checks. The whole
checkpoint has to fit the memory. For weights in the format of another tool see `trainer export --help`.
"""


def consolidate_command(arguments: list[str]) -> int:
    """Run ``trainer consolidate`` and return its exit code.

    Raises:
        UserError: A mistake in the arguments, no checkpoint that is whole, or a file that cannot be written.
    """
    values = _parser().parse_args(arguments)
    path = _checkpoint(Path(values.checkpoint))
    default = path.resolve().with_name(f"{path.resolve().stem}-consolidated.ckpt")
    out = Path(values.out) if values.out else default
    if path.resolve().is_file() and not values.out:
        raise UserError(f"{path} is one file already; --out FILE writes a checked copy of it")
    if out.suffix != ".ckpt":
        raise UserError(f"--out {out}: a checkpoint's file ends in .ckpt")
    if out.is_dir() or out.resolve() == path.resolve():
        raise UserError(f"--out {out} is {'the checkpoint itself' if out.resolve() == path.resolve() else 'a folder'}")
    with progress(of_bytes=True) as bar:
        task = bar.add_task("checking and writing", total=2 * bytes_of(path))
        consolidate(path, out, lambda count: bar.advance(task, count))
    print(f"{out}: {out.stat().st_size / 1e6:,.1f} MB, from {path}")
    return 0


def _parser() -> CommandParser:
    parser = CommandParser(prog="trainer consolidate", description=DESCRIPTION)
    parser.add_argument(
        "checkpoint", metavar="RUN_OR_CHECKPOINT", help="a run's folder, or a checkpoint of either form"
    )
    parser.add_argument(
        "--out", metavar="FILE", help="file to write (default: beside the checkpoint, NAME-consolidated.ckpt)"
    )
    return parser


def _checkpoint(path: Path) -> Path:
    """The checkpoint that is meant.

    Raises:
        UserError: There is none.
    """
    run = Run(path)
    if not run.recipe.is_file():
        if not path.exists():
            raise UserError(f"{path}: no such run or checkpoint")
        return path
    found = newest_good(run.checkpoints, lambda line: print(line, file=sys.stderr))
    last = run.checkpoints / LAST
    if found is None and last.is_file() and not last.is_symlink():  # of an older run
        found = last
    if found is None:
        raise UserError(f"{path} has no complete checkpoint: `trainer fit` has not saved one yet")
    return found
