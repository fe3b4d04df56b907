"""An export from the run to its name on disk."""

from __future__ import annotations

import datetime
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from data_shards.errors import UserError
from trainer.callbacks.record import versions
from trainer.export.base import DTYPES, Exporter
from trainer.export.companions import companions
from trainer.export.companions.explained import describe_preprocessing
from trainer.export.companions.facts import Facts, gather
from trainer.export.companions.given import Given
from trainer.export.gate import Verdict, compare, real_clip, real_samples, require_consumer
from trainer.export.placing import COMPANIONS, Place
from trainer.models import SegmentationModel
from trainer.models.weights import sha256_of
from trainer.restore import AVERAGE, Weights, find_checkpoint, outline_checkpoint, recipe_of, restore
from trainer.run import Run, write_json
from trainer.tuning.added import AddedTuning
from trainer.version import git

RECORD_VERSION = 1
"""Raised whenever a field of ``export.json`` changes its meaning; new fields do not raise it."""


@dataclass(frozen=True)
class Options:
    """What an export is told besides the run, the format and the name.

    Attributes:
        checkpoint: Checkpoint of the run; the newest by default.
        images: Split of shards for the gate; the run's test split by default.
        samples: How many images the gate compares on.
        unverified: Write without the gate.
        weights: Which weights, where the checkpoint has an average of them (EMA): that by default.
        given: What a person said for the card.
    """

    checkpoint: Path | None = None
    images: str | None = None
    samples: int = 8
    unverified: bool = False
    weights: Weights | None = None
    given: Given = Given()  # noqa: RUF009  # frozen, and its list is never changed


def export(run: Run, exporter: Exporter, out: Path, options: Options | None = None) -> dict[str, Any]:
    """Export a run and pass it through the gate.

    Args:
        run: The run.
        exporter: The format.
        out: File or folder to write; nothing takes this name before the gate has passed.
        options: What else is wanted.

    Returns:
        The record that travels with the export, and is written into the run's ``exports`` folder.

    Raises:
        UserError: The run has no such checkpoint, its model does not fit the format, the gate did not pass, or
            something cannot be written.
    """
    options = options or Options()
    check_out(out, exporter)
    batches, clip = [], None
    if not options.unverified:  # before anything slow
        require_consumer(exporter)
        folder = options.images or _test_split(run)
        batches = real_samples(folder, options.samples)
        clip = real_clip(str(folder), batches) if exporter.asks == "prompts and frames" else None
    facts = gather(run, options.given)
    with Place(out, folder=not exporter.suffix) as place:
        checkpoint = options.checkpoint or find_checkpoint("last", run) or run.last_checkpoint()
        module = restore(run, checkpoint, options.weights)
        folds = type(module.tuning).merge is not AddedTuning.merge
        if exporter.merged or (exporter.merged is None and folds):
            module.tuning.merge(module.model)
        if not exporter.accepts(module.model):
            raise UserError(f"{run.root}: a {type(module.model).__name__} cannot be exported to '{exporter.name}'")
        exporter = exporter.of_type(exporter.dtype)  # a copy
        exporter.weights = facts.node("model")[1].get("weights")
        exporter = exporter.for_model(module.model).of_type(exporter.dtype)
        _round(module.model, DTYPES[exporter.dtype])
        _write(exporter, module.model, place)
        wording = getattr(module, "wording", None)
        verdict = None if options.unverified else compare(exporter, place.made, module.model, batches, wording, clip)
        if verdict is not None and not verdict.verified:
            raise UserError(f"export to '{exporter.name}' failed: {verdict.fault}; nothing was written")
        own = module.model.preprocessing
        confidence = getattr(module, "threshold", None)
        preprocessing = describe_preprocessing(
            own, exporter.image_size, module.model.mask_side, confidence, facts.datasets
        )
        record = _record(exporter, place, verdict, own.image_size)
        record |= {"checkpoint": _checkpoint(checkpoint, options.weights), **_origin(facts)}
        record = _publish(place, facts, record, preprocessing)
    write_json(run.exports / exporter.name / "export.json", record)
    return record


def check_out(out: Path, exporter: Exporter) -> None:
    """Refuse a name that the format cannot take.

    Raises:
        UserError: It ends in something else, or is another thing already.
    """
    if exporter.suffix and out.suffix != exporter.suffix:
        raise UserError(f"--out {out}: a file for '{exporter.name}' ends in {exporter.suffix}")
    if exporter.suffix and out.is_dir():
        raise UserError(f"--out {out}: '{exporter.name}' writes a file, and this is a folder: give another")
    if not exporter.suffix and out.is_dir() and any(out.iterdir()):
        raise UserError(f"--out {out}: '{exporter.name}' fills a folder, and this one is not empty: give another")
    if not exporter.suffix and out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: '{exporter.name}' fills a folder, and this is a file: give another")


def _write(exporter: Exporter, model: SegmentationModel, place: Place) -> None:
    """Write the weights.

    Raises:
        UserError: They cannot be written.
    """
    with place.naming():
        try:
            exporter.write(model, place.made)
        except (RuntimeError, SafetensorError) as error:  # how torch and safetensors say that the disk is full
            if isinstance(error, RuntimeError) and not re.search("PytorchStreamWriter|inline_container", str(error)):
                raise
            raise OSError(" ".join(str(error).split())[:120]) from error


def _publish(place: Place, facts: Facts, record: Mapping[str, Any], preprocessing: Mapping[str, Any]) -> dict[str, Any]:
    """Write what travels along, and give all of it its name; return the record as it was written."""
    texts, whole = companions(facts, record, preprocessing, place.folder)
    with place.naming():
        for name, text in texts.items():
            place.write(name, text)
    place.publish()
    return whole


def _round(model: nn.Module, dtype: torch.dtype) -> None:
    """Round a model's tensors to a type; they stay in fp32."""
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype).float()


def _test_split(run: Run) -> str | None:
    folder: str | None = (recipe_of(run).get("data", {}).get("init_args") or {}).get("test")
    return folder


def _record(exporter: Exporter, place: Place, verdict: Verdict | None, trained_at: int) -> dict[str, Any]:
    """What was written, and what the gate found."""
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
    made = place.made
    if exporter.suffix:
        hashes: dict[str, Any] = {"sha256": sha256_of(made)}
    else:
        files = {path.relative_to(made).as_posix(): path for path in made.rglob("*") if path.is_file()}
        weights = sorted(files.keys() - {*COMPANIONS.values()})  # those have hashes of their own
        hashes = {"sha256": {name: sha256_of(files[name]) for name in weights}}
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    size = sum(path.stat().st_size for path in (made, *made.rglob("*")) if path.is_file())
    where = {"format": exporter.name, "file": place.out.name, "bytes": size, **hashes, "dtype": exporter.dtype}
    return {"record_version": RECORD_VERSION, "date": date, **where, **built, **found, "notes": notes}


def _checkpoint(path: Path, weights: Weights | None) -> dict[str, Any]:
    """Which weights these are: name of the checkpoint, its step, and whether they are its average."""
    outline = outline_checkpoint(path)
    averaged = weights != "raw" and AVERAGE in outline
    return {
        "name": path.resolve().name,
        "step": outline.get("global_step"),
        "weights": "average" if averaged else "raw",
    }


def _origin(facts: Facts) -> dict[str, Any]:
    """Run, data and code that the weights are from, and the code that exported them."""
    record = facts.run.record
    data = {split.name: {"index_sha256": split.sha256, "samples": split.samples} for split in facts.splits}
    trained_with = {name: record.get(name) for name in ("git_commit", "git_dirty", "versions")}
    return {
        "run": {"name": facts.run.name, **trained_with, "data": data},
        "exported_with": {**git(), "versions": versions()},
    }
