"""Fine-tuning of SAM3: concepts named by text, learnt as sets of instances.

Shapes: B images, P prompts (a concept in an image each), Q targets, A absent terms, N instances, h w the mask head's
side, H W native height and width.
Sources: Carion et al. 2025 (SAM 3); Jiang et al. 2026 (Medical SAM3, arXiv:2601.10880).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from data_shards.batch import TripletBatch
from data_shards.errors import UserError
from trainer.distributed import zero_of
from trainer.losses import SetPredictionLoss
from trainer.losses.matching import made_up_matches
from trainer.losses.sets import ObjectSets, SetPrediction
from trainer.models import SAM3
from trainer.models.sam3 import SAM3Features
from trainer.modules.answering import AnsweringModule
from trainer.modules.concepts import nothing_absent, objects_of, unreached, without_overlaps
from trainer.modules.optimization import RateSchedule, Schedule
from trainer.modules.scoring import Prediction
from trainer.prompts.concepts import Concept, ConceptPrompts, concepts_of, drawn_terms
from trainer.prompts.exemplars import Exemplars
from trainer.prompts.wording import Wording
from trainer.tuning import FullTuning, Tuning
from trainer.tuning.base import Decay, freeze
from trainer.volumes import Instances

ASKED_AT_ONCE = 16
"""Prompts that an evaluation asks at once: each takes some 200 MB at 1008 px, and an image may have a hundred terms."""


class SAM3Module(AnsweringModule):
    """Trains SAM3: every image is encoded once, and each of its terms is asked for, there or not.

    A term with instances is learnt as these, one with a semantic mask alone as one instance. Terms that were looked for
    and are absent (``data.init_args.negatives_per_image``) teach it to answer nothing.

    In evaluation each term of an image is asked for alone, by its canonical text, and the mask of the most confident
    query is scored, as in Medical SAM3, whatever its confidence; whether that reaches `threshold` is scored apart, for
    terms that are there and for those that are absent.

    Args:
        model: The foundation model.
        tuning: What learns, and how fast; all of it by default.
        wording: What a concept is called; its canonical term by default, as in Medical SAM3.
        exemplars: Boxes and points that are shown besides in training; null asks by text alone.
        loss: What an answer costs.
        terms_per_image: How many of the terms that an image shows are asked for in an epoch, drawn anew each time; null
            asks for all. Each takes memory (`trainer plan` says how much); absent terms come on top.
        threshold: Confidence from which an answer counts; ``trainer predict`` writes no mask below it.
        answer: What is the mask of a term: ``best``, that of the most confident query, or ``semantic``, all of the term
            in one mask, whose confidence is that of its presence.
        resolve_overlaps: Whether a pixel in several terms' masks goes to the most confident one there. Medical SAM3's
            evaluation does so; terms that lie inside each other (cup and disc) must not.
        prompt_buckets: Pad a training pass's texts and prompts to few numbers, 1, 2, 3, 4, 6, 8, 12, 16 and so on, so
            that what is compiled for a number is soon used again; less than a third is for nothing, in time and in
            memory, and `trainer plan` reckons without it unless ``--prompts`` says so. What was padded is left out of
            the loss; dropout is drawn otherwise.
        lr: Learning rate of what has no rate of its own.
        weight_decay: AdamW's decay.
        decay: What decays: ``matrices`` and kernels, or ``all``, norms and biases too.
        betas: AdamW's averaging factors.
        schedule: What follows the warm-up: ``constant``, ``cosine``, ``linear``, ``polynomial`` or ``inverse_sqrt``.
        warmup_steps: Optimiser steps of linear warm-up.
        cooldown_steps: The last optimiser steps, in which the rate falls linearly to `final_factor`.
        power: Exponent of ``polynomial``.
        timescale: Steps after the warm-up in which ``inverse_sqrt`` falls to 1/√2; null takes `warmup_steps`.
        final_factor: Share of the rate that a falling schedule leaves at the end, in [0, 1].
    """

    model: SAM3
    predicts_iou, whole_images = False, True

    def __init__(
        self,
        model: SAM3,
        tuning: Tuning | None = None,
        wording: Wording | None = None,
        exemplars: Exemplars | None = None,
        loss: SetPredictionLoss | None = None,
        terms_per_image: int | None = None,
        threshold: float = 0.5,
        answer: Literal["best", "semantic"] = "best",
        resolve_overlaps: bool = False,
        prompt_buckets: bool = False,
        lr: float = 1e-4,
        weight_decay: float = 0.1,
        decay: Decay = "matrices",
        betas: tuple[float, float] = (0.9, 0.999),
        schedule: Schedule = "constant",
        warmup_steps: int = 0,
        cooldown_steps: int = 0,
        power: float = 0.9,
        timescale: int | None = None,
        final_factor: float = 0.0,
    ) -> None:
        rates = RateSchedule(schedule, warmup_steps, cooldown_steps, power, timescale, final_factor)
        super().__init__(model, tuning or FullTuning(freeze=()), lr, weight_decay, decay, betas, rates)
        if not 0 <= threshold <= 1:
            raise UserError(f"threshold is in [0, 1], not {threshold}")
        if terms_per_image is not None and terms_per_image < 1:
            raise UserError(f"terms_per_image {terms_per_image}: 1 or more, or null for all")
        if exemplars is not None and exemplars.points and model.point_encoder is None:
            raise UserError("exemplars.points: the model was made without points: set model.init_args.points to true")
        self.wording, self.exemplars = wording or Wording(), exemplars
        self.loss, self.terms_per_image = loss or SetPredictionLoss(), terms_per_image
        self.threshold, self.answer, self.resolve_overlaps = threshold, answer, resolve_overlaps
        self.prompt_buckets = prompt_buckets
        freeze(self.model, unreached(self.model, self.loss, self.exemplars))
        self.tuning.check_learns(self.model)
        self._encoded: tuple[TripletBatch, SAM3Features] | None = None

    def setup(self, stage: str) -> None:
        """Refuse clips and drawn targets, besides what every module refuses; say where no negative can be drawn.

        Raises:
            UserError: Clips, a part of a term's instances, no tokenizer, a wrong precision, or a schedule without an
                end.
        """
        super().setup(stage)
        _ = self.model.tokenizer  # read now: not when the first image has been encoded
        if self.trainer.is_global_zero:
            for line in nothing_absent(self.trainer.datamodule, stage):
                print(line, file=sys.stderr, flush=True)
        if stage == "fit":
            self.refuse({"clip_length": 1}, "SAM3Module learns from single images")
            why = "SAM3Module learns all instances of a term at once; model.init_args.terms_per_image draws whole terms"
            self.refuse({"targets_per_image": None}, why)

    def describe_prompts(self) -> dict[str, Any]:
        """What an evaluation asks, as JSON."""
        return {
            "kind": "Text",
            "wording": self.wording.describe(),
            "answer": self.answer,
            "threshold": self.threshold,
            "resolve_overlaps": self.resolve_overlaps,
        }

    def on_after_batch_transfer(self, batch: TripletBatch, dataloader_idx: int) -> TripletBatch:
        """In an evaluation, each term of an image is one target: callbacks get the batch so, too."""
        return batch if self.trainer.training else batch.by_term()

    def forward(
        self, batch: TripletBatch, concepts: Sequence[Concept], truth: ObjectSets, epoch: int | None = None
    ) -> SetPrediction:
        """Ask for concepts of a batch.

        Args:
            batch: B images.
            concepts: P concepts in them.
            truth: Their instances, which exemplars are drawn from.
            epoch: The epoch in training, None in evaluation: wordings and exemplars are drawn accordingly.
        """
        asked = self._asked(concepts, epoch)
        if epoch is not None and self.exemplars is not None:
            asked = self.exemplars.show(asked, concepts, truth, epoch)
        return self.model.detect(self._encode(batch), asked, buckets=self.prompt_buckets and epoch is not None)

    def training_step(self, batch: TripletBatch, batch_idx: int) -> Tensor:
        """The set-prediction loss over all concepts of the batch, those that are there and those that are absent."""
        concepts = self._drawn(batch)
        if not concepts:  # every sample was damaged and skipped, or shows nothing that was looked for
            nothing = self.nothing_learnt()
            self.loss.count(None, self.device)  # the other ranks count together with this one
            return nothing
        self.seed_dropout(batch)
        truth = objects_of(batch, concepts, self.model.preprocessing, self._side(), self.device)
        # not `self(…)`: as the root of sharding, this module would end its pass there
        losses = self.loss(self.forward(batch, concepts, truth, self.current_epoch), truth)
        shown = {f"train/{name}": value.detach() for name, value in losses.items()}
        self.log_dict(shown, batch_size=len(concepts), on_step=True, on_epoch=False)
        return losses["loss"]

    def idle_pass(self) -> Tensor:
        """Go through every block as a training pass does, with a made-up image and term."""
        side = self.model.preprocessing.image_size
        features = self.model.encode(torch.zeros(1, 3, side, side, device=self.device))
        return zero_of(self.model.detect(features, ConceptPrompts(torch.zeros(1, dtype=torch.int64), ["nothing"])))

    def _drawn(self, batch: TripletBatch) -> list[Concept]:
        """The concepts that a training asks for."""
        return drawn_terms(concepts_of(batch), self.terms_per_image, self.current_epoch)

    def asked(self, batch: TripletBatch) -> int:
        """How many concepts a training's pass over a batch asks for."""
        return len(self._drawn(batch))

    def rehearse(self, images: int, prompts: int) -> Tensor:
        """Loss of a pass over made-up images: each of their concepts has one instance, and a text of its own."""
        count, device, inside = images * prompts, self.device, self.model.preprocessing.image_size
        features = self.model.encode(torch.zeros(images, 3, inside, inside, device=device))
        tokens = torch.zeros(count, self.model.shape.context, dtype=torch.int64, device=device)
        valid = torch.ones_like(tokens, dtype=torch.bool)
        index = torch.arange(images, device=device).repeat_interleave(prompts)
        asked = ConceptPrompts(index, [""] * count)
        known = self.model.read_tokens(tokens, valid)
        prediction = self.model.detect_tokens(features, known, valid, torch.arange(count, device=device), asked)
        side = self._side()
        masks = torch.zeros(count, side, side, device=device)
        truth = ObjectSets([1] * count, torch.full((count, 4), 0.5, device=device), masks, masks)
        matches = made_up_matches(count, len(prediction.logits), self.loss.many_matcher.topk)
        alone = self.loss.count(truth, device, over_ranks=False)  # other ranks may be in a real pass
        return self.loss(prediction, truth, matches=matches, shares=alone)["loss"]

    @torch.no_grad()
    def predict_masks(self, batch: TripletBatch) -> Prediction:
        """Find each term of a batch at native resolution: the mask of the most confident query."""
        concepts = concepts_of(batch)
        if not concepts:
            return Prediction.none()
        features = self._encode(batch)
        self._encoded = (batch, features)
        masks: list[Tensor] = [torch.zeros(0)] * len(batch.masks)
        scores = torch.zeros(len(batch.masks))
        absent, areas = [], []
        believed: dict[int, np.ndarray] = {}
        for start in range(0, len(concepts), ASKED_AT_ONCE):
            some = concepts[start : start + ASKED_AT_ONCE]
            logits, confidence = self._answers(features, self._asked(some, None))
            for p, concept in enumerate(some):
                size = batch.images[concept.image].shape[-2:]
                native = self.model.preprocessing.to_native(logits[p : p + 1], *size)[0]
                if concept.rows:
                    believed |= self.reliability_of(batch, {concept.rows[0]: native})
                if not self.resolve_overlaps:  # logits are four times as large
                    native = native > 0
                if concept.rows:
                    masks[concept.rows[0]] = native
                    scores[concept.rows[0]] = confidence[p]
                else:
                    absent.append(confidence[p])
                    areas.append((native > 0).sum() * (confidence[p] >= self.threshold))
        if self.resolve_overlaps:
            masks = without_overlaps(masks, scores, batch.image_index)
        return Prediction(
            masks=masks,
            scores=scores,
            boxes=torch.full((len(masks), 4), torch.nan),
            points=torch.zeros(len(masks), 0, 2),
            labels=torch.zeros(len(masks), 0, dtype=torch.int64),
            absent=torch.stack(absent).float().cpu() if absent else torch.zeros(0),
            absent_areas=torch.stack(areas).cpu() if areas else torch.zeros(0, dtype=torch.int64),
            reliability=believed,
        )

    def predict_step(self, batch: TripletBatch, batch_idx: int) -> Prediction:
        """Predict a batch: no mask where the confidence is below the threshold."""
        prediction = self.predict_masks(batch)
        sure = [score >= self.threshold for score in prediction.scores.tolist()]
        return replace(prediction, masks=[mask & keep for mask, keep in zip(prediction.masks, sure, strict=True)])

    @torch.no_grad()
    def instances(self, batch: TripletBatch, terms: Sequence[Sequence[str]]) -> list[Instances]:
        """Find all instances of some terms, whose confidence reaches the threshold, at native resolution.

        Args:
            batch: B images.
            terms: For each of the images what is asked for.

        Returns:
            One for every image and term, in the order of the images.
        """
        wanted = [(image, term) for image, some in enumerate(terms) for term in some]
        kept = self._encoded
        features = kept[1] if kept is not None and kept[0] is batch else self._encode(batch)
        found = []
        for start in range(0, len(wanted), ASKED_AT_ONCE):
            some = wanted[start : start + ASKED_AT_ONCE]
            asked = self._asked([_concept(batch, image, term) for image, term in some], None)
            prediction = self.model.detect(features, asked)
            assert prediction.masks is not None
            for p, (image, term) in enumerate(some):
                confidence = prediction.confidence[p]
                queries = (confidence >= self.threshold).nonzero()[:, 0]
                size = batch.images[image].shape[-2:]
                logits = prediction.masks.of(p, queries)
                masks = self.model.preprocessing.to_native(logits, *size) > 0
                found.append(Instances(image, term, masks, confidence[queries]))
        return found

    def _log(self, stage: str, scores: Any) -> None:
        super()._log(stage, scores)
        self._encoded = None  # a training needs the memory

    def _answers(self, features: SAM3Features, asked: ConceptPrompts) -> tuple[Tensor, Tensor]:
        """Mask logits (P, h, w) and confidences (P,)."""
        if self.answer == "best":
            logits, confidence = self.model.decode(features, asked)
            return logits[:, 0], confidence[:, 0]
        found = self.model.detect(features, asked)
        assert found.semantic is not None and found.presence is not None
        return found.semantic, found.presence[-1].float().sigmoid()

    def _encode(self, batch: TripletBatch) -> SAM3Features:
        return self.model.encode(self.model.preprocessing.images(batch.images, self.device))

    def _asked(self, concepts: Sequence[Concept], epoch: int | None) -> ConceptPrompts:
        index = torch.tensor([concept.image for concept in concepts])
        return ConceptPrompts(index, self.wording.say(concepts, epoch))

    def _side(self) -> int:
        """Side in pixels at which the loss compares masks."""
        return self.model.mask_side if self.loss.mask_at == "head" else self.model.preprocessing.image_size


def _concept(batch: TripletBatch, image: int, term: str) -> Concept:
    """A term to ask for in an image of which nothing is known but where it is from."""
    origin = batch.provenances[image]
    return Concept(image, term, (), None, (), origin.modality, origin.axis, (batch.positions[image], 0))
