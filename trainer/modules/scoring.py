"""What every module does in an evaluation: predict at native resolution, score every target, gather the ranks' rows.

Shapes: Q targets, P points a prompt, H W native height and width.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from data_shards.batch import TripletBatch, on_host
from data_shards.errors import UserError
from trainer.metrics import nsd, overlap
from trainer.modules.reliability import reliability
from trainer.ranks import every_rank
from trainer.scores import CaseScore, spreads

TOLERANCE = 2.0
"""Largest distance that NSD forgives, in mm where an image's spacing is known, else in native pixels."""


@dataclass
class Prediction:
    """Predicted masks of a batch at native resolution; not frozen, because Lightning moves it between devices.

    Attributes:
        masks: Q masks (H, W) bool on the device.
        scores: (Q,) the model's own estimate of its IoU.
        boxes: (Q, 4) the first prompts' boxes, (x0, y0, x1, y1) in native pixels, on the CPU; NaN where there was none.
        points: (Q, P, 2) the first prompts' points, (x, y) in native pixels, on the CPU; NaN where there was none.
        labels: (Q, P) 1 for a point on the target, 0 beside it, −1 where there was none.
        absent: (A,) confidences of the terms that were asked for and are not there, on the CPU.
        absent_areas: (A,) native pixels of the masks that these were answered with, on the CPU.
        reliability: What `trainer.modules.reliability` finds for each target, if the module was told to keep it.
    """

    masks: list[Tensor]
    scores: Tensor
    boxes: Tensor
    points: Tensor
    labels: Tensor
    absent: Tensor = field(default_factory=lambda: torch.zeros(0))
    absent_areas: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    reliability: dict[int, np.ndarray] = field(default_factory=dict)

    @classmethod
    def none(cls) -> Prediction:
        """That of a batch without targets."""
        zero = torch.zeros(0)
        return cls([], zero, boxes=torch.zeros(0, 4), points=torch.zeros(0, 0, 2), labels=torch.zeros(0, 0))


class ScoredModule(LightningModule):
    """Scores predictions against the truth; a family says how it predicts.

    Attributes:
        predicts_iou: Whether the scores of its predictions are the IoU that it expects of its masks.
        keeps_reliability: Whether its predictions say how probabilities of pixels compare with the truth.
        whole_images: Whether all pixels are compared: nothing in its prompts says where a target may be.
    """

    predicts_iou: bool = True
    keeps_reliability: bool = False
    whole_images: bool = False

    def __init__(self) -> None:
        super().__init__()
        self.scores: list[tuple[int, CaseScore]] = []
        """Rows of the evaluation that is running, on this rank, each with its sample's position in the corpus."""
        self._gathered: list[CaseScore] | None = None

    def reliability_of(self, batch: TripletBatch, logits: Mapping[int, Tensor]) -> dict[int, np.ndarray]:
        """Reliability of native logits (H, W) of some of a batch's targets, for `Prediction`; none if not kept."""
        if not self.keeps_reliability:
            return {}
        return {q: reliability(one, batch.masks[q], self.whole_images) for q, one in logits.items()}

    @abstractmethod
    def predict_masks(self, batch: TripletBatch) -> Prediction:
        """Predict every target of a batch at native resolution."""

    def rehearse(self, images: int, prompts: int) -> Tensor:
        """Loss of a training's pass over made-up images, whose memory `trainer plan` measures on fake tensors.

        These have no values: nothing in it may ask for one, as ``tolist``, ``unique`` and ``if`` on a tensor do.

        Args:
            images: Images of the pass.
            prompts: Prompts of each.

        Raises:
            NotImplementedError: The module has no such pass.
        """
        raise NotImplementedError(f"{type(self).__name__} has no rehearsal")

    def asked(self, batch: TripletBatch) -> int:
        """How many prompts a training's pass over a batch asks, in the words of `rehearse`."""
        return len(batch.masks)

    def counts(self, batch: TripletBatch, row: int) -> bool:
        """Whether a target of a batch is scored."""
        return True

    def evaluation_step(self, batch: TripletBatch) -> Prediction:
        """Predict, score every target at native resolution, and keep the rows."""
        prediction = self.predict_masks(batch)
        identities, images = batch.identities, batch.image_index.tolist()
        scored = [q for q in range(len(identities)) if self.counts(batch, q)]
        # surfaces are compared on the CPU: there all is, after one wait for each side instead of five a target
        masks, truths = (on_host([kind[q] for q in scored]) for kind in (prediction.masks, batch.masks))
        for q, mask, truth in zip(scored, masks, truths, strict=True):
            (position, target), image = identities[q], images[q]
            origin = batch.provenances[image]
            dsc, iou = overlap(mask[None], truth[None])
            score = CaseScore(
                key=batch.keys[image],
                target=target,
                term=batch.terms[q],
                modality=origin.modality,
                area_px=int(truth.sum()),
                dsc=float(dsc),
                iou=float(iou),
                dataset=origin.dataset,
                nsd=nsd(mask.numpy(), truth.numpy(), TOLERANCE, origin.spacing or (1.0, 1.0)),
                tolerance=f"{TOLERANCE:g} {'mm' if origin.spacing else 'px'}",
            )
            self.scores.append((position, score))
        return prediction

    def validation_step(self, batch: TripletBatch, batch_idx: int) -> Prediction:
        """Score a batch; callbacks take the masks."""
        return self.evaluation_step(batch)

    def test_step(self, batch: TripletBatch, batch_idx: int) -> Prediction:
        """Score a batch; callbacks take the masks."""
        return self.evaluation_step(batch)

    def predict_step(self, batch: TripletBatch, batch_idx: int) -> Prediction:
        """Predict a batch; callbacks take the masks."""
        return self.predict_masks(batch)

    def on_validation_epoch_start(self) -> None:
        """Forget the rows of the last evaluation."""
        self._forget()

    def on_test_epoch_start(self) -> None:
        """Forget the rows of the last evaluation."""
        self._forget()

    def _forget(self) -> None:
        self.scores, self._gathered = [], None

    def on_validation_epoch_end(self) -> None:
        """Log means and medians over all ranks' targets."""
        self._log("val", self.gathered_scores())

    def on_test_epoch_end(self) -> None:
        """Log means and medians over all ranks' targets.

        Raises:
            UserError: There was none.
        """
        scores = self.gathered_scores()
        if not scores:
            raise UserError("data.init_args.test: no target was scored; the split holds none, or was limited to none")
        self._log("test", scores)

    def gathered_scores(self) -> list[CaseScore]:
        """Every rank's rows in corpus order, each target once; at an evaluation's end, when all ranks ask."""
        if self._gathered is None:
            rows = {(position, score.target): score for part in every_rank(self.scores) for position, score in part}
            self._gathered = [rows[place] for place in sorted(rows)]
        return self._gathered

    def _log(self, stage: str, scores: list[CaseScore]) -> None:
        # every rank holds the same rows, so reducing changes nothing, and spares Lightning's warning
        self.log_dict(logged_spreads(stage, scores), sync_dist=True)


def logged_spreads(stage: str, scores: Sequence[CaseScore]) -> dict[str, float]:
    """What is logged of an evaluation.

    Args:
        stage: ``val`` or ``test``.
        scores: Its rows.

    Returns:
        Means such as ``val/dsc``, medians such as ``val/dsc_median``, and where there are several data sets or
        modalities their means, such as ``val/dsc/modality/CT``. Terms may be hundreds: they are left to the tables.
    """
    found = spreads(scores)
    groups = Counter(spread.kind for spread in found if spread.metric == "dsc")
    values: dict[str, float] = {}
    for spread in found:
        name = f"{stage}/{spread.metric}"
        if spread.kind == "all":
            values |= {name: spread.mean, f"{name}_median": spread.median}
        elif spread.kind in ("dataset", "modality") and groups[spread.kind] > 1:
            values[f"{name}/{spread.kind}/{spread.group}"] = spread.mean
    return values
