"""Fine-tuning of SAM-like models with boxes, points, masks and corrections (MedSAM, LiteMedSAM).

Shapes: B images, Q targets, S the model's input side, h w the decoder's mask side.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import inf
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_shards.batch import TripletBatch
from data_shards.errors import UserError
from trainer.losses import DiceCrossEntropy, by_mask
from trainer.metrics import overlap
from trainer.models import SAM3, SegmentationModel
from trainer.modules.optimization import RateSchedule, Schedule
from trainer.modules.scoring import Prediction
from trainer.modules.tuned import TunedModule
from trainer.prompts import BoxPrompts, Prompter, Prompts, Truth, prompts_of_targets
from trainer.tuning import FullTuning, Tuning
from trainer.tuning.base import Decay, freeze


def per_image_mean(values: Tensor, image_index: Tensor, images: float | None = None) -> Tensor:
    """Average values (Q,) over the targets of each image, then over images; a scalar.

    Args:
        values: (Q,).
        image_index: (Q,) int64, the image of each.
        images: By how many images the sum over them is divided (`TripletBatch.counted`), so that the mean over all
            passes of a step is the mean over all of its images; by the number of those here if null.
    """
    return per_image_means({"": values}, image_index, images)[""]


def per_image_means(parts: Mapping[str, Tensor], image_index: Tensor, images: float | None = None) -> dict[str, Tensor]:
    """`per_image_mean` of several values (Q,), by name; where the index is on the CPU, the device is not waited for."""
    _, image, counts = image_index.unique(return_inverse=True, return_counts=True)
    weights = 1 / (counts[image] * (len(counts) if images is None else images))
    there = weights.to(next(iter(parts.values())), non_blocking=True)
    return {name: (values * there.to(values.dtype)).sum() for name, values in parts.items()}


@torch.no_grad()
def found_overlap(logits: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """DSC (Q,) and IoU (Q,) of logits (Q, h, w), enlarged, with masks (Q, S, S); on the device, a few at a time."""
    dsc, iou = by_mask(lambda some, truth: torch.stack(overlap(some > 0, truth)), logits, masks).unbind()
    return dsc, iou


@dataclass(frozen=True)
class Answer:
    """What the decoder says to one round of prompts.

    Attributes:
        asked: The prompts.
        logits: (Q, h, w) mask logits, in the order of the batch's targets.
        scores: (Q,) predicted IoU.
    """

    asked: list[Prompts]
    logits: Tensor
    scores: Tensor


class MedSAMModule(TunedModule):
    """Trains a promptable model: every image is encoded once and all its targets are decoded from that.

    Args:
        model: The foundation model.
        tuning: What learns, and how fast.
        prompts: What is asked, simulated from the truth; boxes as in MedSAM by default.
        loss: Loss on masks, per target.
        score_weight: Factor on the squared error of the predicted IoU (1 in SAM). At 0, as in MedSAM, what predicts it
            is frozen.
        prompt_buckets: Ask the decoder in one of few sizes, 1, 2, 3, 4, 6, 8, 12, 16 and so on, padded with prompts
            whose answers are left out; nothing else changes. For a decoder that is compiled, or captured in a CUDA
            graph, for each number of prompts: `CompileBlocks` sets it where it compiles the decoder.
        lr: Learning rate of the heads (of everything, without layer decay).
        weight_decay: AdamW's decay.
        decay: What decays: ``matrices`` and kernels, or ``all``, norms and biases too, as in MedSAM's code.
        betas: AdamW's averaging factors.
        schedule: What follows the warm-up: ``constant``, ``cosine``, ``linear``, ``polynomial`` or ``inverse_sqrt``.
        warmup_steps: Optimiser steps of linear warm-up.
        cooldown_steps: The last optimiser steps, in which the rate falls linearly to `final_factor`.
        power: Exponent of ``polynomial``.
        timescale: Steps after the warm-up in which ``inverse_sqrt`` falls to 1/√2; null takes `warmup_steps`.
        final_factor: Share of the rate that a falling schedule leaves at the end, in [0, 1].
    """

    def __init__(
        self,
        model: SegmentationModel,
        tuning: Tuning | None = None,
        prompts: Prompter | None = None,
        loss: DiceCrossEntropy | None = None,
        score_weight: float = 0.0,
        prompt_buckets: bool = False,
        lr: float = 1e-4,
        weight_decay: float = 0.01,
        decay: Decay = "matrices",
        betas: tuple[float, float] = (0.9, 0.999),
        schedule: Schedule = "constant",
        warmup_steps: int = 0,
        cooldown_steps: int = 0,
        power: float = 0.9,
        timescale: int | None = None,
        final_factor: float = 0.0,
    ) -> None:
        if hasattr(model, "recall"):
            raise UserError(
                "MedSAMModule knows no memory: SAM2 takes trainer.modules.SAM2Module, memory false for images"
            )
        if isinstance(model, SAM3):
            raise UserError(
                "MedSAMModule asks with boxes and points, SAM3 is asked in words: take trainer.modules.SAM3Module"
            )
        rates = RateSchedule(schedule, warmup_steps, cooldown_steps, power, timescale, final_factor)
        super().__init__(model, tuning or FullTuning(), lr, weight_decay, decay, betas, rates)
        if not 0 <= score_weight < inf:
            raise UserError(f"score_weight {score_weight}: 0 or more")
        self.prompts = prompts or BoxPrompts()
        self.loss = loss or DiceCrossEntropy()
        self.score_weight, self.prompt_buckets = score_weight, prompt_buckets
        self.predicts_iou = model.score_head is not None
        if score_weight and model.score_head is None:
            raise UserError(
                f"score_weight {score_weight:g}: {type(model).__name__} predicts no IoU that could learn: 0"
            )
        if not score_weight and model.score_head:  # no loss on masks reaches it, and DDP would wait for its gradient
            freeze(self.model, [model.score_head])
        self.tuning.check_learns(self.model)

    def setup(self, stage: str) -> None:
        """Refuse training data that a box-prompted model cannot learn from.

        Raises:
            UserError: Samples without a target, a precision that is not supported, a schedule without an end, or a
                prompt encoder that learns where all ranks wait for a gradient of all that does.
        """
        super().setup(stage)
        self.refuse_unreached(stage, [".prompt_encoder."])
        if stage == "fit":
            unused = {"clip_length": 1, "negatives_per_image": 0, "hard_negatives": False, "evaluated_negatives": 0}
            self.refuse(unused, "MedSAMModule prompts single images with boxes")
            self.refuse_empty("no box to prompt with")

    def describe_prompts(self) -> dict[str, Any]:
        """What an evaluation asks, as JSON."""
        return self.prompts.describe()

    def forward(self, batch: TripletBatch, epoch: int | None = None) -> list[Answer]:
        """Ask about every target of a batch, once or in rounds.

        Args:
            batch: B images with Q targets.
            epoch: The epoch in training, None in evaluation: prompts are drawn accordingly.
        """
        return self._ask(batch, self._truth(batch), epoch)

    def training_step(self, batch: TripletBatch, batch_idx: int) -> Tensor:
        """Loss averaged over each image's targets, then over images: the same however a step is cut into batches.

        A step's loss is the mean of what its passes on all ranks give back and log, each of which is divided by the
        images with targets that they have on average: a pass without any gives 0, one with more than others gives more.
        Where prompts come in rounds, every round's answer is learnt from alike (Kirillov et al. 2023, appendix A).
        """
        if not batch.masks:  # every sample was damaged and skipped: nothing is learnt, and other ranks do not wait
            return self.nothing_learnt()
        self.seed_dropout(batch)
        truth = self._truth(batch)
        answers = self._ask(batch, truth, self.current_epoch)
        rounds = [self._losses(answer, truth, batch.counted) for answer in answers]
        losses = {name: torch.stack([part[name] for part in rounds]).mean() for name in rounds[0]}
        with torch.no_grad():
            dsc, _ = found_overlap(answers[-1].logits, truth.masks)
        shown = {f"train/{name}": value.detach() for name, value in losses.items()} | {"train/dsc": dsc.mean()}
        self.log_dict(shown, batch_size=len(batch.masks), on_step=True, on_epoch=False)
        return losses["loss"]

    def rehearse(self, images: int, prompts: int) -> Tensor:
        """Loss of a pass over made-up images with so many targets each: boxes, then a click a round."""
        size, side = images * prompts, self.model.preprocessing.image_size
        pixels = torch.zeros(images, self.model.preprocessing.channels, side, side, device=self.device)
        truth = torch.zeros(size, side, side, device=self.device)
        features, answers = self.model.encode(pixels), []
        asked = Prompts(torch.arange(images).repeat_interleave(prompts), boxes=torch.zeros(size, 4))
        for clicks in range(1, 2 + self.prompts.rounds(0)):
            answers.append(self._decode(features, [asked], size))
            points, labels = torch.zeros(size, clicks, 2), torch.ones(size, clicks, dtype=torch.int64)
            asked = replace(asked, points=points, labels=labels, masks=answers[-1].logits.detach().float())
        return torch.stack([self._target_losses(answer, truth)["loss"] for answer in answers]).mean()

    @torch.no_grad()
    def predict_masks(self, batch: TripletBatch) -> Prediction:
        """Predict every target of a batch at native resolution, from the answers of the last round."""
        if not batch.masks:
            return Prediction.none()
        preprocessing, index = self.model.preprocessing, batch.image_index.tolist()
        answers = self(batch)
        first, last = answers[0], answers[-1]
        masks: list[Tensor] = []
        believed: dict[int, np.ndarray] = {}
        for image, tensor in enumerate(batch.images):
            mine = [q for q, owner in enumerate(index) if owner == image]
            if mine:
                native = preprocessing.to_native(last.logits[mine], *tensor.shape[-2:])
                believed |= self.reliability_of(batch, dict(zip(mine, native, strict=True)))
                masks.extend(native > 0)
        boxes, points, labels = prompts_of_targets(first.asked, len(batch.masks))
        return Prediction(
            masks=masks,
            scores=last.scores,
            boxes=preprocessing.boxes_to_native(boxes, batch.sizes),
            points=preprocessing.points_to_native(points, batch.sizes),
            labels=labels,
            reliability=believed,
        )

    def _truth(self, batch: TripletBatch) -> Truth:
        preprocessing = self.model.preprocessing
        boxes, sizes = preprocessing.boxes(batch.boxes, batch.sizes)
        masks = preprocessing.masks(batch.masks, self.device)
        return Truth(batch.image_index, boxes, sizes, masks, batch.draws, self.model.mask_side)

    def _ask(self, batch: TripletBatch, truth: Truth, epoch: int | None) -> list[Answer]:
        """Encode each image once, ask about all targets, and correct as often as the prompts say."""
        features = self.model.encode(self.model.preprocessing.images(batch.images, self.device))
        answers = [self._decode(features, self.prompts.first(truth, epoch), len(truth.draws))]
        for correction in range(self.prompts.rounds(epoch)):
            before = answers[-1]
            asked = self.prompts.correct(before.asked, before.logits.detach(), truth, epoch, correction)
            answers.append(self._decode(features, asked, len(truth.draws)))
        return answers

    def _decode(self, features: Any, asked: list[Prompts], count: int) -> Answer:
        """Decode prompts of several forms, and put the answers in the order of the batch's targets."""
        asked = [prompts.to(self.device) for prompts in asked]
        parts = []
        for prompts in asked:
            masks, believed = self.model.decode(features, prompts.padded() if self.prompt_buckets else prompts)
            parts.append((masks[: len(prompts), 0], believed[: len(prompts), 0]))
        logits, scores = (torch.cat(part) for part in zip(*parts, strict=True))
        order = torch.cat([prompts.rows for prompts in asked if prompts.rows is not None] or [torch.arange(0)])
        if len(order) and not torch.equal(order, torch.arange(count)):  # on the host; none in a rehearsal
            back = order.argsort().to(self.device, non_blocking=True)
            logits, scores = logits[back], scores[back]
        return Answer(asked, logits, scores)

    def _losses(self, answer: Answer, truth: Truth, images: float | None = None) -> dict[str, Tensor]:
        """What an answer costs, averaged over targets and so many images."""
        parts = self._target_losses(answer, truth.masks)
        return per_image_means(parts, truth.image_index, images)

    def _target_losses(self, answer: Answer, masks: Tensor) -> dict[str, Tensor]:
        """What an answer costs for each target, at the side of the model's input, where the truth is: (Q,) each."""
        parts = dict(self.loss(answer.logits, masks))
        if self.score_weight:
            _, iou = found_overlap(answer.logits, masks)
            parts["score_loss"] = (answer.scores.float() - iou).square()
            parts["loss"] = parts["loss"] + self.score_weight * parts["score_loss"]
        return parts
