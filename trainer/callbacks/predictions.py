"""What ``trainer predict`` leaves in the run."""

from __future__ import annotations

import json
import math
from typing import Any, TextIO

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer
from pycocotools import mask as coco_mask

from data_shards.batch import TripletBatch
from trainer.modules.scoring import Prediction
from trainer.run import Run


class PredictionRecord(Callback):
    """Writes ``predictions/rank-R.jsonl``: a line a target, with its mask as COCO RLE at native resolution.

    ``box`` is there where one was asked with, as (x0, y0, x1, y1) in native pixels, and so are ``points``, as
    (x, y, label) with the label 1 on the target and 0 beside it.
    """

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the file."""
        folder = Run(trainer.default_root_dir).root / "predictions"
        folder.mkdir(parents=True, exist_ok=True)
        if trainer.is_global_zero:  # what a run on more ranks left
            for stale in folder.glob("rank-*.jsonl"):
                if int(stale.stem.removeprefix("rank-")) >= trainer.world_size:
                    stale.unlink()
        self._path = folder / f"rank-{trainer.global_rank}.jsonl"
        self._handle: TextIO = self._path.with_suffix(".tmp").open("w")

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Prediction, batch: TripletBatch, batch_idx: int
    ) -> None:
        """Write the batch's targets."""
        for q, (_, target) in enumerate(batch.identities):
            if (batch.numbers or batch.positions)[
                int(batch.image_index[q])
            ] % trainer.world_size != trainer.global_rank:
                continue  # repeated to make the ranks even
            self._handle.write(json.dumps(self._line(outputs, batch, q, target)) + "\n")

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the file under its final name."""
        self._handle.close()
        self._path.with_suffix(".tmp").replace(self._path)

    @staticmethod
    def _line(outputs: Prediction, batch: TripletBatch, q: int, target: int) -> dict[str, Any]:
        mask = outputs.masks[q].cpu().numpy()
        rle = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
        box = [round(side, 2) for side in outputs.boxes[q].tolist()]
        asked = zip(outputs.points[q].tolist(), outputs.labels[q].tolist(), strict=True)
        points = [[round(x, 2), round(y, 2), int(label)] for (x, y), label in asked if label >= 0]
        return {
            "key": batch.keys[int(batch.image_index[q])],
            "target": target,
            "term": batch.terms[q],
            **({"box": box} if all(map(math.isfinite, box)) else {}),
            **({"points": points} if points else {}),
            "score": round(float(outputs.scores[q]), 4),
            "mask": {"size": list(mask.shape), "counts": rle["counts"].decode("ascii")},
        }
