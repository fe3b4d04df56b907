"""`trainer evaluate PROTOCOL.yaml`: several models on the same cases."""

from __future__ import annotations

from pathlib import Path

from data_shards.errors import CommandParser, UserError, counted
from trainer.evaluation.protocol import KINDS, load_protocol

DESCRIPTION = """\
Let several models answer the same cases, and compare them: images, volumes that are followed from one slice, videos
that are followed from the first frame.

  trainer evaluate recipes/evaluation/sam2_transfer.yaml
  trainer evaluate PROTOCOL.yaml --only 3d --limit 5        a first look: five volumes of each set
  trainer evaluate PROTOCOL.yaml --out runs/comparison

The folder gets per_case.csv (a row for each object, model and first mask), summary.json, summary.md and report.html.
A command that was stopped goes on where it was: what has its row is not computed again, as long as its model, data and
settings, and the versions of what computes it, are the same; the tables are of the cases that the command asks for.
One volume of your own is scored with `trainer evaluate --volume --help`.
"""


def evaluate_command(arguments: list[str]) -> int:
    """Run ``trainer evaluate PROTOCOL.yaml`` and return its exit code.

    Raises:
        UserError: A mistake in the arguments or the protocol, or something that it names is missing.
    """
    values = _parser().parse_args(arguments)
    if values.limit is not None and values.limit < 1:
        raise UserError(f"--limit {values.limit}: 1 or more")
    loaded = load_protocol(values.protocol)
    folder = values.out or loaded.protocol.out
    if folder is None:
        raise UserError(f"{values.protocol}: where shall the results go? Give --out FOLDER, or the key 'out'")
    out = Path(folder)

    from trainer.evaluation.results import write_results
    from trainer.evaluation.run import prepare
    from trainer.evaluation.text import in_short
    from trainer.segment.loading import device_of

    evaluation = prepare(loaded, out, values.only, values.limit, device_of(values.device))
    if evaluation.left_aside:
        print(f"{out / 'per_case.csv'}: {evaluation.left_aside}")
    computed = evaluation.run()
    try:
        sections = write_results(evaluation)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror or error}): choose another --out") from error
    left_out = [(one.spec.title, case, term) for one in evaluation.selected for case, term in one.left_out]
    print(in_short(sections, left_out))
    before = sum(job.selected.cases for job in evaluation.jobs) - computed
    print(f"\n{counted(computed, 'case')} computed, {before:,} were there already; {out / 'report.html'}")
    return 0


def _parser() -> CommandParser:
    parser = CommandParser(prog="trainer evaluate", description=DESCRIPTION)
    parser.add_argument("protocol", metavar="PROTOCOL.yaml", help="models and sets; recipes/evaluation has some")
    parser.add_argument("--out", metavar="FOLDER", help="where the results go (default: the protocol's `out`)")
    parser.add_argument("--only", choices=KINDS, help="sets of one kind alone")
    parser.add_argument("--limit", type=int, metavar="N", help="most images, volumes or videos of each set")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:1 (default: auto)")
    return parser
