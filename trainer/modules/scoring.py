"""What every module does in an evaluation: predict at native resolution, score every target, gather the ranks' rows.

Shapes: Q targets, P points a prompt, H W native height and width.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from data_shards.batch import TripletBatch
from data_shards.errors import UserError
from trainer.metrics import overlap
from trainer.ranks import every_rank
from trainer.scores import CaseScore


@dataclass
class Prediction:
    """Predicted masks of a batch at native resolution; not frozen, because Lightning moves it between devices.

    Attributes:
        masks: Q masks (H, W) bool on the device.
        scores: (Q,) the model's own estimate of its IoU.
        boxes: (Q, 4) the first prompts' boxes, (x0, y0, x1, y1) in native pixels, on the CPU; NaN where there was none.
        points: (Q, P, 2) the first prompts' points, (x, y) in native pixels, on the CPU; NaN where there was none.
        labels: (Q, P) 1 for a point on the target, 0 beside it, −1 where there was none.
    """

    masks: list[Tensor]
    scores: Tensor
    boxes: Tensor
    points: Tensor
    labels: Tensor

    @classmethod
    def none(cls) -> Prediction:
        """That of a batch without targets."""
        zero = torch.zeros(0)
        return cls([], zero, boxes=torch.zeros(0, 4), points=torch.zeros(0, 0, 2), labels=torch.zeros(0, 0))


class ScoredModule(LightningModule):
    """Scores predictions against the truth; a family says how it predicts."""

    def __init__(self) -> None:
        super().__init__()
        self.scores: list[tuple[int, CaseScore]] = []
        """Rows of the evaluation that is running, on this rank, each with its sample's position in the corpus."""

    @abstractmethod
    def predict_masks(self, batch: TripletBatch) -> Prediction:
        """Predict every target of a batch at native resolution."""

    def evaluation_step(self, batch: TripletBatch) -> Prediction:
        """Predict, score every target at native resolution, and keep the rows."""
        prediction = self.predict_masks(batch)
        for q, (position, target) in enumerate(batch.identities):
            image = int(batch.image_index[q])
            dsc, iou = overlap(prediction.masks[q][None], batch.masks[q][None].to(self.device))
            score = CaseScore(
                key=batch.keys[image],
                target=target,
                term=batch.terms[q],
                modality=batch.provenances[image].modality,
                area_px=int(batch.masks[q].sum()),
                dsc=float(dsc),
                iou=float(iou),
            )
            self.scores.append((position, score))
        return prediction

    def validation_step(self, batch: TripletBatch, batch_idx: int) -> None:
        """Score a batch."""
        self.evaluation_step(batch)

    def test_step(self, batch: TripletBatch, batch_idx: int) -> Prediction:
        """Score a batch; callbacks take the masks."""
        return self.evaluation_step(batch)

    def predict_step(self, batch: TripletBatch, batch_idx: int) -> Prediction:
        """Predict a batch; callbacks take the masks."""
        return self.predict_masks(batch)

    def on_validation_epoch_start(self) -> None:
        """Forget the rows of the last evaluation."""
        self.scores = []

    def on_test_epoch_start(self) -> None:
        """Forget the rows of the last evaluation."""
        self.scores = []

    def on_validation_epoch_end(self) -> None:
        """Log mean DSC and IoU over all ranks' targets."""
        self._log_means("val", self.gathered_scores())

    def on_test_epoch_end(self) -> None:
        """Log mean DSC and IoU over all ranks' targets.

        Raises:
            UserError: There was none.
        """
        scores = self.gathered_scores()
        if not scores:
            raise UserError("data.init_args.test: no target was scored; the split holds none, or was limited to none")
        self._log_means("test", scores)

    def gathered_scores(self) -> list[CaseScore]:
        """Every rank's rows in corpus order, each target once."""
        rows = {(position, score.target): score for part in every_rank(self.scores) for position, score in part}
        return [rows[place] for place in sorted(rows)]

    def _log_means(self, stage: str, scores: list[CaseScore]) -> None:
        if scores:
            means = {
                f"{stage}/dsc": sum(score.dsc for score in scores) / len(scores),
                f"{stage}/iou": sum(score.iou for score in scores) / len(scores),
            }
            # every rank holds the same rows, so reducing changes nothing, and spares Lightning's warning
            self.log_dict(means, sync_dist=True, prog_bar=True)
