"""`trainer export`: weights for other tools, proved to load there."""

from __future__ import annotations

import copy
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from data_shards.errors import CommandParser, UserError, nearest
from trainer.export import ALIASES, EXPORTERS, Exporter
from trainer.export.base import DTYPES
from trainer.export.gate import Verdict, compare, real_clip, real_samples, require_consumer
from trainer.models.weights import sha256_of
from trainer.restore import Weights, find_checkpoint, recipe_of, restore
from trainer.run import Run, write_json

DESCRIPTION = """\
Write a run's weights in the format of another tool, then prove it: the tool's own code loads the file, every key of
it, and its logits are compared with ours on real images. Only an export that passes takes its name on disk.

  trainer export runs/quickstart --to litemedsam --out brain.pth
  trainer export runs/liver --to segment-anything --out liver.pth         for it, and for MedSAM's own scripts
  trainer export runs/organs --to sam2 --out organs.pt         for Meta's SAM2: images, volumes and videos
  trainer export runs/terms --to sam3 --base sam3.pt --out terms.pt       for Meta's SAM3, with its tracker for videos

What is linear (LoRA, SAMed, FacT, SSF) is merged first; adapters and visual prompts have no place in these formats.
Beside the file lie FILE.preprocessing.json (what the weights expect of an image) and FILE.export.json (what the gate
found).
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
    _check_out(out, exporter)
    exporter = exporter.of_type(values.dtype)
    if values.base:
        exporter = exporter.based_on(Path(values.base))
    samples = exporter.samples if values.samples is None else values.samples
    if samples < 1:
        raise UserError(f"--samples {samples}: the gate needs 1 image or more")
    checkpoint = find_checkpoint(values.checkpoint, run) if values.checkpoint else None
    record = export(run, exporter, out, checkpoint, values.images, samples, values.unverified, values.weights)
    _print(record)
    run.add_stage("export", time.perf_counter() - started)
    return 0


def export(
    run: Run,
    exporter: Exporter,
    out: Path,
    checkpoint: Path | None = None,
    images: str | None = None,
    samples: int = 8,
    unverified: bool = False,
    weights: Weights | None = None,
) -> dict[str, Any]:
    """Export a run and pass it through the gate.

    Args:
        run: The run.
        exporter: The format.
        out: File to write; nothing takes this name before the gate has passed.
        checkpoint: Checkpoint of the run; the newest by default.
        images: Split of shards for the gate; the run's test split by default.
        samples: How many images the gate compares on.
        unverified: Write without the gate.
        weights: Which weights, where the checkpoint has an average of them (EMA): that by default.

    Returns:
        The record that is written beside the file and into the run's ``exports`` folder.

    Raises:
        UserError: The run has no such checkpoint, its model does not fit the format, or the gate did not pass.
    """
    batches, clip = [], None
    if not unverified:  # before anything slow
        require_consumer(exporter)
        folder = images or _test_split(run)
        batches = real_samples(folder, samples)
        clip = real_clip(str(folder), batches) if exporter.asks == "prompts and frames" else None
    module = restore(run, checkpoint, weights)
    if exporter.merged:
        module.tuning.merge(module.model)
    if not exporter.accepts(module.model):
        raise UserError(f"{run.root}: a {type(module.model).__name__} cannot be exported to '{exporter.name}'")
    exporter = exporter.for_model(module.model).of_type(exporter.dtype)
    _round(module.model, DTYPES[exporter.dtype])
    partial = out.with_name(f".{out.name}.partial")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _remove(partial)  # of an export that was killed
        if not exporter.suffix:
            partial.mkdir()
        exporter.write(module.model, partial)
        wording = getattr(module, "wording", None)
        verdict = None if unverified else compare(exporter, partial, module.model, batches, wording, clip)
        if verdict is not None and not verdict.verified:
            raise UserError(f"export to '{exporter.name}' failed: {verdict.fault}; nothing was written")
        record = _record(exporter, out, partial, verdict, module.model.preprocessing.image_size)
        preprocessing = module.model.preprocessing.to_dict()
        partial.replace(out)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror or error}): choose another --out") from error
    finally:
        _remove(partial)
    write_json(beside(out, exporter, "preprocessing.json"), preprocessing)
    write_json(beside(out, exporter, "export.json"), record)
    write_json(run.exports / exporter.name / "export.json", record)
    return record


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


def beside(out: Path, exporter: Exporter, name: str) -> Path:
    """Where a file lies that travels with an export: in its folder, or beside its file."""
    return out.with_name(f"{out.name}.{name}") if exporter.suffix else out / name


def _check_out(out: Path, exporter: Exporter) -> None:
    if exporter.suffix and out.suffix != exporter.suffix:
        raise UserError(f"--out {out}: a file for '{exporter.name}' ends in {exporter.suffix}")
    if not exporter.suffix and out.is_dir() and any(out.iterdir()):
        raise UserError(f"--out {out}: '{exporter.name}' fills a folder, and this one is not empty: give another")
    if not exporter.suffix and out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: '{exporter.name}' fills a folder, and this is a file: give another")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    elif path.exists():
        path.unlink()


def _round(model: nn.Module, dtype: torch.dtype) -> None:
    """Round a model's tensors to a type; they stay in fp32."""
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype).float()


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
    parser.add_argument("--unverified", action="store_true", help="write without the gate; the record says so")
    return parser


def _test_split(run: Run) -> str | None:
    folder: str | None = (recipe_of(run).get("data", {}).get("init_args") or {}).get("test")
    return folder


def _record(exporter: Exporter, out: Path, made: Path, verdict: Verdict | None, trained_at: int) -> dict[str, Any]:
    notes = list(exporter.notes)
    if trained_at != exporter.image_size:
        notes.insert(
            0, f"Trained at {trained_at} px; {exporter.package} runs at {exporter.image_size} px, see both DSCs."
        )
    found = {**asdict(verdict), "compared": verdict.compared} if verdict else {"verified": None}
    if verdict and verdict.frames and not verdict.frames_shown:
        seen = "was compared with the score of an object's being there raised in both, and the verdict rests on that"
        memory = f"its memory {seen if verdict.frames_shown_raised else 'is untested'}"
        notes.append(f"{exporter.package} holds everything to be absent after the first frame: {memory}.")
    built = {"builder": dict(exporter.builder)} if exporter.builder else {}
    if exporter.suffix:
        hashes: dict[str, Any] = {"sha256": sha256_of(made)}
    else:
        files = sorted(path for path in made.rglob("*") if path.is_file())
        hashes = {"sha256": {str(path.relative_to(made)): sha256_of(path) for path in files}}
    where = {"format": exporter.name, "file": str(out), **hashes, "dtype": exporter.dtype}
    return {**where, **built, **found, "notes": notes}


def _print(record: Mapping[str, Any]) -> None:
    if record["verified"] is None:
        print(f"NOT verified (--unverified): {record['file']}", file=sys.stderr)
        return
    print(
        f"verified: {record['consumer']} {record['consumer_version']} loads {record['file']}; "
        f"logits differ by at most {record['max_logit_difference']:.1e} on {record['samples']} images"
    )
    if record["max_confidence_difference"] is not None:
        print(f"confidences and boxes differ by at most {record['max_confidence_difference']:.1e}")
    if record["max_followed_difference"] is not None:
        differ = f"{record['max_followed_difference']:.1e}"
        print(f"followed through {record['frames']} frames: logits differ by at most {differ}")
    print(f"compared: {record['compared']}")
    print(f"DSC there {record['dsc_consumer']:.3f} at {record['image_size']} px, in the run {record['dsc_run']:.3f}")
