"""Whether a model's probabilities, and its own estimate of its IoU, are to be believed.

Shapes: K bins of `trainer.modules.reliability`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer

from data_shards.batch import TripletBatch
from trainer.callbacks.evaluation import evaluation_folder
from trainer.modules.reliability import AROUND, BINS, LEAST, calibration_error, in_bins
from trainer.modules.scoring import Prediction, ScoredModule
from trainer.ranks import every_rank
from trainer.run import write_json


class CalibrationRecord(Callback):
    """Compares what the model promises in ``trainer test`` with what is true, into ``calibration.json``.

    A pixel's probability is the sigmoid of its mask logit at native resolution. Of a model that is asked with boxes or
    points, the pixels in the target's own box are looked at, enlarged by a tenth of its sides: further away everything
    is background, which is trivially right, and would hide how well the model knows an edge. A model that is asked in
    words has to find out itself where the target is: of it all pixels of the image are looked at. The pixels of one
    target together weigh as much as those of any other, so that large organs do not drown small lesions.

    Of a model that estimates its own IoU, that is compared with the IoU that was measured, at its decision threshold.

    The file has for each of 15 bins of equal width its share of the pixels (``share``), their mean probability
    (``probability``) and the part of them that is in the truth (``inside``), null where a bin is empty; ``ece`` is the
    expected calibration error, ``brier`` the mean squared difference. ``iou`` has the same of the IoU, with ``error``,
    the mean absolute difference.
    """

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let the module keep what is needed."""
        self._pixels, self._ious = np.zeros((4, BINS)), np.zeros((4, BINS))
        self._distance, self._targets, self._rows = 0.0, 0, 0
        self._seen: set[tuple[int, int]] = set()
        pl_module.keeps_reliability = True

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Prediction, batch: TripletBatch, batch_idx: int
    ) -> None:
        """Add the batch's targets, each once: one may be repeated to make the ranks even, or be in several clips."""
        assert isinstance(pl_module, ScoredModule)
        rows = pl_module.scores[self._rows :]
        self._rows += len(rows)
        scored = [q for q in range(len(batch.masks)) if pl_module.counts(batch, q)]
        for q, (_, score) in zip(scored, rows, strict=True):
            number = (batch.numbers or batch.positions)[int(batch.image_index[q])]
            who = batch.identities[q]
            if number % trainer.world_size != trainer.global_rank or who in self._seen or q not in outputs.reliability:
                continue
            self._seen.add(who)
            self._targets += 1
            self._pixels += outputs.reliability[q]
            if pl_module.predicts_iou:
                estimate = float(np.clip(np.nan_to_num(float(outputs.scores[q])), 0, 1))
                self._ious += in_bins(np.array([estimate]), np.array([score.iou]))
                self._distance += abs(estimate - score.iou)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the sums of all ranks."""
        pl_module.keeps_reliability = False
        pixels, ious = np.sum(every_rank(np.stack([self._pixels, self._ious])), axis=0)
        distance, targets = sum(every_rank(self._distance)), sum(every_rank(self._targets))
        if targets and trainer.is_global_zero:
            assert isinstance(pl_module, ScoredModule)
            content = summary(pixels, ious, distance, targets, pl_module.whole_images)
            write_json(evaluation_folder(trainer) / "calibration.json", content)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Keep nothing more."""
        pl_module.keeps_reliability = False


def summary(pixels: np.ndarray, ious: np.ndarray, distance: float, targets: int, whole: bool) -> dict[str, Any]:
    """What ``calibration.json`` says.

    Args:
        pixels: (4, K) sum of the targets' `trainer.modules.reliability.reliability`.
        ious: (4, K) estimated against measured IoU, as of `in_bins`; zeros where nothing was estimated.
        distance: Sum of their absolute differences.
        targets: Number of targets.
        whole: Whether whole images were looked at.
    """
    content: dict[str, Any] = {
        "targets": targets,
        "region": "image" if whole else "box",
        "enlarged_by": None if whole else AROUND,
        "at_least_px": None if whole else LEAST,
        "ece": round(calibration_error(pixels), 6),
        "brier": round(float(pixels[3].sum() / targets), 6),
        "share": [round(float(share / targets), 9) for share in pixels[0]],
        "probability": _means(pixels[1], pixels[0]),
        "inside": _means(pixels[2], pixels[0]),
    }
    known = ious[0].sum()
    if known:
        content["iou"] = {
            "targets": int(known),
            "error": round(distance / float(known), 6),
            "mean_estimated": round(float(ious[1].sum() / known), 6),
            "mean_measured": round(float(ious[2].sum() / known), 6),
            "share": [round(float(number / known), 9) for number in ious[0]],
            "estimated": _means(ious[1], ious[0]),
            "measured": _means(ious[2], ious[0]),
        }
    return content


def _means(sums: np.ndarray, weights: np.ndarray) -> list[float | None]:
    """Means of each bin, None of an empty one."""
    return [round(float(s / w), 6) if w else None for s, w in zip(sums, weights, strict=True)]
