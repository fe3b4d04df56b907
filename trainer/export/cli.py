"""`trainer export`: weights for other tools, proved to load there."""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_shards.errors import CommandParser, UserError, nearest
from trainer.export import ALIASES, EXPORTERS, Exporter
from trainer.export.base import DTYPES
from trainer.export.companions.given import read_given
from trainer.export.exporting import Options, check_out, export
from trainer.restore import find_checkpoint
from trainer.run import Run

DESCRIPTION = """\
Write a run's weights in the format of another tool, then prove it: the tool's own code loads the file, every key of
it, and its logits are compared with ours on real images. Only an export that passes takes its name on disk.

  trainer export runs/quickstart --to litemedsam --out brain.pth
  trainer export runs/liver --to segment-anything --out liver.pth         for it, and for MedSAM's own scripts
  trainer export runs/organs --to sam2 --out organs.pt         for Meta's SAM2: images, volumes and videos
  trainer export runs/terms --to sam3 --base sam3.pt --out terms.pt       for Meta's SAM3, with its tracker for videos

What is linear (LoRA, SAMed, FacT, SSF) is merged first; other adapters and visual prompts have a place in onnx
and torch-export alone, which hold computations and not layouts of weights.
Beside the file lie FILE.preprocessing.json (what the weights expect of an image), FILE.export.json (what the gate
found, and from what the weights are), FILE.card.md (a model card, of facts only), FILE.recipe.yaml and
FILE.citation.bib; a folder has them inside, the card as README.md.
"""


def export_command(arguments: list[str]) -> int:
    """Run ``trainer export`` and return its exit code: 0 only if the file is there.

    Raises:
        UserError: A mistake in the arguments, a run that cannot be exported, or a gate that did not pass.
    """
    values = _parser().parse_args(arguments)
    exporter = find_exporter(values.to)
    started = time.perf_counter()
    run, out = Run.existing(values.run), Path(values.out)
    check_out(out, exporter)
    exporter = exporter.of_type(values.dtype)
    if values.base:
        exporter = exporter.based_on(Path(values.base))
    if values.merge:
        exporter = exporter.and_merged()
    samples = exporter.samples if values.samples is None else values.samples
    if samples < 1:
        raise UserError(f"--samples {samples}: the gate needs 1 image or more")
    given = read_given(values.card)
    checkpoint = find_checkpoint(values.checkpoint, run) if values.checkpoint else None
    options = Options(checkpoint, values.images, samples, values.unverified, values.weights, given)
    _print(export(run, exporter, out, options), out)
    run.add_stage("export", time.perf_counter() - started)
    return 0


def find_exporter(name: str) -> Exporter:
    """The export that ``--to`` names.

    Raises:
        UserError: There is none of this name.
    """
    known = ALIASES.get(name, name)
    if known not in EXPORTERS:
        raise UserError(f"there is no export '{name}'{nearest(name, EXPORTERS)}")
    found = copy.copy(EXPORTERS[known])
    found.name = name
    return found


def _parser() -> CommandParser:
    parser = CommandParser(prog="trainer export", description=DESCRIPTION)
    parser.add_argument("run", metavar="RUN", help="the run's folder (trainer.default_root_dir of its recipe)")
    parser.add_argument("--to", required=True, metavar="FORMAT", help=f"one of: {', '.join(EXPORTERS)}")
    parser.add_argument("--out", required=True, metavar="PATH", help="file or folder to write; what it lies in is made")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="fp32", help="what weights are written in (fp32)")
    parser.add_argument("--checkpoint", metavar="CKPT", help="last, best or a path (default: last)")
    parser.add_argument(
        "--weights",
        choices=("average", "raw"),
        help="which, of a checkpoint that has an average (trainer.callbacks.EMA): that by default",
    )
    parser.add_argument("--images", metavar="FOLDER", help="shards for the gate (default: the run's test split)")
    parser.add_argument(
        "--samples", type=int, metavar="N", help="images for the gate (default: 8; 4 for sam2, 2 for sam3)"
    )
    parser.add_argument("--base", metavar="FILE", help="sam3: Meta's sam3.pt, whose tracker goes into the file too")
    parser.add_argument(
        "--card", metavar="FILE", help="YAML with what only you know: authors, contact, licence, intended_use, …"
    )
    parser.add_argument("--merge", action="store_true", help="peft: write the merged model too, into merged/")
    parser.add_argument("--unverified", action="store_true", help="write without the gate; the record says so")
    return parser


def _print(record: Mapping[str, Any], out: Path) -> None:
    if record["verified"] is None:
        print(f"NOT verified (--unverified): {out}", file=sys.stderr)
        return
    print(
        f"verified: {record['consumer']} {record['consumer_version']} loads {out}; "
        f"logits differ by at most {record['max_logit_difference']:.1e} on {record['samples']} images"
    )
    if record["max_confidence_difference"] is not None:
        print(f"confidences and boxes differ by at most {record['max_confidence_difference']:.1e}")
    if record["max_followed_difference"] is not None:
        differ = f"{record['max_followed_difference']:.1e}"
        print(f"followed through {record['frames']} frames: logits differ by at most {differ}")
    print(f"compared: {record['compared']}")
    print(f"DSC there {record['dsc_consumer']:.3f} at {record['image_size']} px, in the run {record['dsc_run']:.3f}")
