"""`trainer evaluate`: several models on the same cases, by a protocol or by what the command line names."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import get_args

from data_shards.errors import CommandParser, UserError, counted
from trainer.evaluation.given import Asking, Prompt, given_protocol
from trainer.evaluation.protocol import GROUPINGS, KINDS, Loaded, load_protocol

DESCRIPTION = """\
Let several models answer the same cases, and compare them: images, volumes that are followed from one slice, videos
that are followed from the first frame.

  trainer evaluate runs/liver --data data/liver/test --out eval/liver             a run: the newest of its checkpoints
  trainer evaluate MedSAM=recipes/medsam/full.yaml tuned=runs/liver --data data/liver/test data/other/test \\
      --prompt box point --out eval/both                                  before and after tuning, asked in two ways
  trainer evaluate MedSAM=recipes/medsam/full.yaml SAM3=runs/words --data data/liver/test --objects term --out eval/ct
                                       SAM3 takes words alone: beside boxes all of a term in an image is one object
  trainer evaluate tuned=runs/tumour --data data/ct/test --kind 3d --lesions --noise 5 10 20 --by size --out eval/burden
                                       lesions counted, boxes that are off by 5, 10 and 20 % of their sides, by size
  trainer evaluate recipes/evaluation/sam2_transfer.yaml                  a protocol says all of that, and more
  trainer evaluate PROTOCOL.yaml --only 3d --limit 5        a first look: five volumes of each set
  trainer evaluate PROTOCOL.yaml --out runs/comparison

The folder gets per_case.csv (a row for each object, model and first mask), summary.json, summary.md and report.html:
DSC, NSD and HD95 with intervals, subgroups, volumes or areas with Bland-Altman plots, lesions and noise if asked for.
A command that was stopped goes on where it was: what has its row is not computed again, as long as its model, data and
settings, and the versions of what computes it, are the same; the tables are of the cases that the command asks for.
One volume of your own is scored with `trainer evaluate --volume --help`.
"""


def evaluate_command(arguments: list[str]) -> int:
    """Run ``trainer evaluate`` with a protocol, or with models and data, and return its exit code.

    Raises:
        UserError: A mistake in the arguments or the protocol, or something that they name is missing.
    """
    values = _parser().parse_args(arguments)
    if values.limit is not None and values.limit < 1:
        raise UserError(f"--limit {values.limit}: 1 or more")
    loaded = _loaded(values)
    folder = values.out or loaded.protocol.out
    if folder is None:
        raise UserError(f"{loaded.path}: where shall the results go? Give --out FOLDER, or the key 'out' of a protocol")
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
    print(in_short(sections, left_out, loaded.protocol.by))
    before = sum(job.selected.cases for job in evaluation.jobs) - computed
    print(f"\n{counted(computed, 'case')} computed, {before:,} were there already; {out / 'report.html'}")
    return 0


def _loaded(values: Namespace) -> Loaded:
    """The protocol that is named, or the one that models and data make."""
    if values.data:
        asking = Asking(
            values.kind or "2d",
            values.margin or 0,
            values.objects or "target",
            bool(values.lesions),
            tuple(values.noise or ()),
            values.negatives or 0,
        )
        return given_protocol(values.models, values.data, values.prompt or ["box"], asking, values.by)
    for name in ("kind", "prompt", "margin", "objects", "lesions", "noise", "negatives"):
        if getattr(values, name) is not None:
            raise UserError(f"--{name} belongs to --data; in a protocol it is a key of a set")
    if len(values.models) > 1:
        raise UserError("several models, and no data: give --data FOLDER, or one PROTOCOL.yaml")
    (path,) = values.models
    if Path(path).is_dir():
        raise UserError(f"{path}: evaluated on what? Give --data FOLDER of shards, or a PROTOCOL.yaml")
    return load_protocol(path).grouped(values.by)


def _parser() -> CommandParser:
    parser = CommandParser(prog="trainer evaluate", description=DESCRIPTION)
    parser.add_argument(
        "models",
        nargs="+",
        metavar="PROTOCOL.yaml | [NAME=]MODEL",
        help="a protocol (recipes/evaluation has some); or with --data the models: a run, a checkpoint of one, or a "
        "recipe, whose model is taken untouched",
    )
    parser.add_argument("--data", nargs="+", metavar="FOLDER", help="shards, such as data/mine/test")
    parser.add_argument(
        "--kind", choices=KINDS, help="with --data: images, volumes followed from a slice, or videos (default: 2d)"
    )
    parser.add_argument(
        "--prompt", nargs="+", choices=get_args(Prompt), help="with --data: how the truth is shown (default: box)"
    )
    parser.add_argument("--margin", type=int, metavar="PX", help="with --data: pixels that a box is enlarged by (0)")
    parser.add_argument(
        "--objects", choices=("target", "term"),
        help="with --data, of images: each target by itself, or all of a term in an image together, which SAM3 needs "
        "(default: target)",
    )  # fmt: skip
    parser.add_argument(
        "--lesions",
        action="store_true",
        default=None,
        help="with --data: count connected pieces, true, found and false",
    )
    parser.add_argument(
        "--noise", nargs="+", type=float, metavar="PERCENT",
        help="with --data: ask again with boxes whose sides (or points that) are moved at random by up to so many "
        "percent of the box's sides, for a curve of DSC",
    )  # fmt: skip
    parser.add_argument(
        "--negatives",
        type=int,
        metavar="N",
        help="with --data and text: absent terms that are asked for in each image (0)",
    )
    parser.add_argument(
        "--by", nargs="+", metavar="NAME",
        help=f"subgroup tables: {', '.join(GROUPINGS)} (default: size, and what the cases differ in)",
    )  # fmt: skip
    parser.add_argument("--out", metavar="FOLDER", help="where the results go (default: the protocol's `out`)")
    parser.add_argument("--only", choices=KINDS, help="sets of one kind alone")
    parser.add_argument("--limit", type=int, metavar="N", help="most images, volumes or videos of each set")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:1 (default: auto)")
    return parser
