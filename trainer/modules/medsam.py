"""Fine-tuning of SAM-like models with box prompts (MedSAM, LiteMedSAM).

Shapes: B images, Q targets, S the model's input side, h w the decoder's mask side.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from data_shards.batch import TripletBatch
from data_shards.errors import UserError
from trainer.losses import DiceCrossEntropy, resize_logits
from trainer.metrics import overlap
from trainer.models import SegmentationModel
from trainer.modules.optimization import Schedule, adamw
from trainer.prompts import BoxPrompts, Prompts
from trainer.ranks import every_rank
from trainer.scores import CaseScore
from trainer.tuning import FullTuning, Tuning
from trainer.tuning.base import freeze


@dataclass
class Prediction:
    """Predicted masks of a batch at native resolution; not frozen, because Lightning moves it between devices.

    Attributes:
        masks: Q masks (H, W) bool on the device.
        scores: (Q,) the model's own estimate of its IoU.
        boxes: (Q, 4) the prompts, (x0, y0, x1, y1) in native pixels, on the CPU.
    """

    masks: list[Tensor]
    scores: Tensor
    boxes: Tensor


def per_image_mean(values: Tensor, image_index: Tensor) -> Tensor:
    """Average values (Q,) over the targets of each image, then over the images that have any; a scalar."""
    _, image, counts = image_index.unique(return_inverse=True, return_counts=True)
    weights = 1 / (counts[image] * len(counts))
    return (values * weights.to(values)).sum()


class MedSAMModule(LightningModule):
    """Trains a box-prompted model: every image is encoded once and all its targets are decoded from that.

    Args:
        model: The foundation model.
        tuning: What learns, and how fast.
        prompts: Boxes simulated from the truth.
        loss: Loss on masks, per target.
        lr: Learning rate of the heads (of everything, without layer decay).
        weight_decay: AdamW's decay of matrices and kernels.
        betas: AdamW's averaging factors.
        schedule: ``constant`` or ``cosine``, after the warm-up.
        warmup_steps: Optimiser steps of linear warm-up.
    """

    def __init__(
        self,
        model: SegmentationModel,
        tuning: Tuning | None = None,
        prompts: BoxPrompts | None = None,
        loss: DiceCrossEntropy | None = None,
        lr: float = 1e-4,
        weight_decay: float = 0.01,
        betas: tuple[float, float] = (0.9, 0.999),
        schedule: Schedule = "constant",
        warmup_steps: int = 0,
    ) -> None:
        super().__init__()
        if lr <= 0 or weight_decay < 0 or warmup_steps < 0 or not all(0 <= beta < 1 for beta in betas):
            raise UserError(
                f"lr {lr} is above 0, weight_decay {weight_decay} and warmup_steps {warmup_steps} are 0 or more, "
                f"betas {betas} in [0, 1)"
            )
        self.model = model
        self.tuning = tuning or FullTuning()
        self.prompts = prompts or BoxPrompts()
        self.loss = loss or DiceCrossEntropy()
        self.lr, self.weight_decay, self.betas = lr, weight_decay, betas
        self.schedule, self.warmup_steps = schedule, warmup_steps
        self.scores: list[tuple[int, CaseScore]] = []
        """Rows of the evaluation that is running, on this rank, each with its sample's position in the corpus."""
        self.tuning.apply(self.model)
        # as in MedSAM the loss is on masks alone; DDP would wait for a gradient that never comes
        freeze(self.model, [self.model.score_head])

    def setup(self, stage: str) -> None:
        """Refuse training data that a box-prompted model cannot learn from.

        Raises:
            UserError: Samples without a target, a precision that is not supported, or a schedule without an end.
        """
        precision = str(self.trainer.precision)
        if precision.endswith("-true") and precision != "32-true":
            raise UserError(f"trainer.precision {precision} is not supported: take bf16-mixed or 32-true")
        if (
            stage == "fit"
            and self.schedule == "cosine"
            and self.trainer.max_steps < 0
            and self.trainer.max_epochs == -1
        ):
            raise UserError("schedule cosine needs to know the end: set trainer.max_steps or trainer.max_epochs")
        datamodule = self.trainer.datamodule
        for name, alone in (("clip_length", 1), ("negatives_per_image", 0)):
            if stage == "fit" and getattr(datamodule, name, alone) != alone:
                given = getattr(datamodule, name)
                raise UserError(
                    f"data.init_args.{name} {given}: MedSAMModule prompts single images with boxes: leave it out"
                )
        empty = datamodule.without_targets("train") if stage == "fit" and datamodule is not None else 0
        if empty:
            raise UserError(
                f"{datamodule.folders['train']}: {empty} samples have no target, so no box to prompt with: set "
                "data.init_args.only_with_targets to true, or build the shards with `slices: {keep: nonempty}`"
            )

    def forward(self, batch: TripletBatch, epoch: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Decode every target of a batch.

        Args:
            batch: B images with Q targets.
            epoch: The epoch in training, None in evaluation: boxes are jittered accordingly.

        Returns:
            Mask logits (Q, h, w), predicted IoU (Q,), and boxes (Q, 4) in pixels of the model's input.
        """
        preprocessing = self.model.preprocessing
        boxes, valid = preprocessing.boxes(batch.boxes, batch.sizes)
        boxes = self.prompts(boxes, valid, batch.draws, epoch)
        features = self.model.encode(preprocessing.images(batch.images, self.device))
        asked = Prompts(image_index=batch.image_index.to(self.device), boxes=boxes.to(self.device))
        logits, scores = self.model.decode(features, asked)
        return logits[:, 0], scores[:, 0], boxes

    def training_step(self, batch: TripletBatch, batch_idx: int) -> Tensor:
        """Loss averaged over each image's targets, then over images: the same however a step is cut into batches."""
        if not batch.masks:  # every sample was damaged and skipped: nothing is learnt, and other ranks do not wait
            return torch.stack([(p * 0).sum() for p in self.parameters() if p.requires_grad]).sum()
        logits, _, _ = self(batch, epoch=self.current_epoch)
        side = self.model.preprocessing.image_size
        logits = resize_logits(logits, (side, side))
        truths = self.model.preprocessing.masks(batch.masks, self.device)
        losses = {name: per_image_mean(value, batch.image_index) for name, value in self.loss(logits, truths).items()}
        with torch.no_grad():
            dsc, _ = overlap(logits > 0, truths)
        shown = {f"train/{name}": value.detach() for name, value in losses.items()} | {"train/dsc": dsc.mean()}
        self.log_dict(shown, batch_size=len(batch.masks), on_step=True, on_epoch=False)
        return losses["loss"]

    @torch.no_grad()
    def predict_masks(self, batch: TripletBatch) -> Prediction:
        """Predict every target of a batch at native resolution."""
        if not batch.masks:
            return Prediction(masks=[], scores=torch.zeros(0), boxes=torch.zeros(0, 4))
        logits, scores, boxes = self(batch)
        preprocessing, index = self.model.preprocessing, batch.image_index.tolist()
        masks: list[Tensor] = []
        for image, tensor in enumerate(batch.images):
            mine = [q for q, owner in enumerate(index) if owner == image]
            if mine:
                masks.extend(preprocessing.to_native(logits[mine], *tensor.shape[-2:]) > 0)
        native = preprocessing.boxes_to_native(boxes, batch.sizes)
        return Prediction(masks=masks, scores=scores, boxes=native)

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

    def configure_optimizers(self) -> Any:
        """AdamW over the tuning method's groups."""
        groups = self.tuning.parameter_groups(self.model, self.lr, self.weight_decay)
        return adamw(groups, self.betas, self.schedule, self.warmup_steps, self._total_steps())

    def _total_steps(self) -> int:
        """Optimiser steps of the whole run.

        Not `Trainer.estimated_stepping_batches`: that sets up the loaders before a checkpoint is restored, and the
        loader's state would then be dropped without a word.
        """
        trainer = self.trainer
        if trainer.max_steps > 0:
            return trainer.max_steps
        steps = trainer.datamodule.steps_per_epoch
        return (trainer.max_epochs or 1) * steps

    def _log_means(self, stage: str, scores: list[CaseScore]) -> None:
        if scores:
            means = {
                f"{stage}/dsc": sum(score.dsc for score in scores) / len(scores),
                f"{stage}/iou": sum(score.iou for score in scores) / len(scores),
            }
            # every rank holds the same rows, so reducing changes nothing, and spares Lightning's warning
            self.log_dict(means, sync_dist=True, prog_bar=True)
