"""What an evaluation leaves in the run: a row a target, and pictures."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer

from data_shards.batch import TripletBatch
from data_shards.errors import UserError, counted
from trainer.callbacks.record import describe_data
from trainer.modules.medsam import MedSAMModule, Prediction
from trainer.ranks import every_rank
from trainer.report.panels import save_panels
from trainer.restore import read_checkpoint
from trainer.run import Run, write_json
from trainer.scores import CaseScore, write_scores


class EvaluationRecord(Callback):
    """Writes ``evaluation/NAME/per_case.csv``, ``evaluation.json`` and ``panels.npz`` after ``trainer test``.

    ``evaluation.json`` says what was scored: the checkpoint and its step, the split and the hash of its index.

    Args:
        name: The evaluation's name; by default ``untouched`` without a checkpoint and ``tuned`` with one.
        panels: How many targets are kept as pictures, evenly spread over the split: the same ones in every evaluation.
    """

    def __init__(self, name: str | None = None, panels: int = 16) -> None:
        if name is not None and not re.fullmatch(r"[\w-]+", name):
            raise UserError(f"an evaluation's name has letters, digits, - and _, not '{name}'")
        if panels < 0:
            raise UserError(f"panels is 0 or more, not {panels}")
        self.name, self.panels = name, panels

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Choose the samples to show."""
        count = len(trainer.test_dataloaders.dataset)
        self._shown = set(np.linspace(0, count - 1, min(count, self.panels)).round().astype(int).tolist())
        self._kept: dict[tuple[int, int], dict[str, Any]] = {}
        self._skipped: dict[str, str] = {}

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Prediction, batch: TripletBatch, batch_idx: int
    ) -> None:
        """Keep the pictures of the chosen samples, and count those that could not be read."""
        self._skipped.update({item.key: item.reason for item in batch.skipped})
        for q, (position, target) in enumerate(batch.identities):
            if position in self._shown:
                image = int(batch.image_index[q])
                self._kept[position, target] = {
                    "keys": batch.keys[image],
                    "terms": batch.terms[q],
                    "images": to_uint8(batch.images[image].cpu().numpy()),
                    "truths": batch.masks[q].cpu().numpy().astype(np.uint8),
                    "predictions": outputs.masks[q].cpu().numpy().astype(np.uint8),
                    "boxes": outputs.boxes[q].cpu().numpy().astype(np.float32),
                }

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the table and the pictures."""
        assert isinstance(pl_module, MedSAMModule)
        scores, kept = pl_module.gathered_scores(), self._gather()
        skipped = {key: reason for part in every_rank(self._skipped) for key, reason in sorted(part.items())}
        if not trainer.is_global_zero:
            return
        name = self.name or ("tuned" if trainer.ckpt_path else "untouched")
        if trainer.num_test_batches[0] < len(trainer.test_dataloaders):
            name += "-partial"  # limit_test_batches: never in the place of a whole one
        folder = Run(trainer.default_root_dir).evaluation(name)
        folder.mkdir(parents=True, exist_ok=True)
        write_scores(folder / "per_case.csv", scores)
        described = describe_evaluation(trainer, pl_module, name, scores)
        write_json(folder / "evaluation.json", {**described, "skipped": skipped})
        if skipped:
            what = counted(len(skipped), "damaged sample was", "damaged samples were")
            print(f"{what} not scored: {folder / 'evaluation.json'} names them")
        if kept:
            columns = {column: [item[column] for item in kept] for column in kept[0]}
            save_panels(folder / "panels.npz", **columns)

    def _gather(self) -> list[dict[str, Any]]:
        merged = {place: item for part in every_rank(self._kept) for place, item in part.items()}
        return [merged[place] for place in sorted(merged)]


def describe_evaluation(trainer: Trainer, module: MedSAMModule, name: str, scores: list[CaseScore]) -> dict[str, Any]:
    """What was scored, on what data."""
    checkpoint = trainer.ckpt_path
    step: int | None = 0
    if checkpoint:  # its step is restored in a fit only; a sharded one is a folder
        step = read_checkpoint(Path(checkpoint)).get("global_step") if Path(checkpoint).is_file() else None
    return {
        "name": name,
        "checkpoint": str(checkpoint) if checkpoint else None,
        "step": step,
        "data": describe_data(trainer.datamodule),
        "targets": len(scores),
        "preprocessing": module.model.preprocessing.to_dict(),
        "prompts": module.prompts.describe(),
        "precision": str(trainer.precision),
    }


def to_uint8(image: np.ndarray) -> np.ndarray:
    """Image (C, H, W) of any dtype as a picture: (H, W) or (H, W, 3) uint8; other ranges are stretched."""
    if image.dtype != np.uint8:
        low, high = float(image.min()), float(image.max())
        image = ((image - low) / max(high - low, 1e-8) * 255).round().astype(np.uint8)
    return image[0] if image.shape[0] == 1 else np.moveaxis(image, 0, -1)
