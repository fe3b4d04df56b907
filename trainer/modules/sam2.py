"""Fine-tuning of SAM2: on single images, and through its memory on clips of slices or frames.

Shapes: B clips (or images), T frames of each, Q objects, M masks an object, S the model's input side, h w the
decoder's mask side.
Sources: Ravi et al. 2024 (SAM 2, arXiv:2408.00714); Ma et al. 2024 (arXiv:2408.03322), on medical images and videos.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from data_shards.batch import TripletBatch
from data_shards.errors import UserError
from data_shards.seed import run_seed, stream
from trainer.distributed import is_sharded
from trainer.losses import BestMaskLoss, DiceCrossEntropy
from trainer.models import SegmentationModel
from trainer.modules.answering import AnsweringModule
from trainer.modules.augmentation import ClipAugmentation
from trainer.modules.clicked import Clicked, first_of, gives_masks, made_up_click, not_given, only, patched, spread
from trainer.modules.clips import NUMBERS, Followed, clip_draws, followed, found_dsc, rows_of, smaller, with_absences
from trainer.modules.medsam import per_image_means
from trainer.modules.optimization import RateSchedule, Schedule
from trainer.modules.scoring import Prediction
from trainer.prompts import BoxPrompts, GivenMaskPrompts, Prompter, Prompts, prompts_of_targets
from trainer.tuning import FullTuning, Tuning
from trainer.tuning.base import Decay, freeze

if TYPE_CHECKING:
    from trainer.models.sam2 import Look, SAM2Features
    from trainer.models.sam2_tracking import Tracking

MEMORY_PARTS = (
    *("memory_attention", "memory_encoder", "obj_ptr_proj", "obj_ptr_tpos_proj", "mask_downsample"),
    *("maskmem_tpos_enc", "no_obj_ptr", "no_obj_embed_spatial"),
)
"""What only a memory reaches."""


class SAM2Module(AnsweringModule):
    """Trains SAM2: on clips through its memory, or on single images.

    In a clip the anchor (``data.init_args.clip_anchor``) is prompted, and the other frames are found through the
    memory, with gradients through all of it: forwards from a first frame, backwards from a last one, outwards from one
    in the middle. What a frame costs is summed over its answers and over frames, as in SAM2's training code, and
    averaged over a clip's objects, then over clips. An evaluation prompts each clip's anchor and scores the others.

    Args:
        model: The foundation model, `trainer.models.SAM2`.
        memory: Learn from clips, through the memory; else from single images, and what belongs to the memory is frozen.
        tuning: What learns, and how fast; everything by default.
        prompts: What is asked of the anchor, simulated from the truth; boxes by default. Corrections, as `ClickPrompts`
            makes them, go to the anchor and to other frames that are drawn; an object whose mask was given gets none.
        loss: `BestMaskLoss`, SAM2's own, by default; or `DiceCrossEntropy`, MedSAM's, on the best mask.
        loss_at: Where masks are compared: at the side of the model's ``input``, or at the ``decoder``'s.
        corrected_frames: Frames of a clip that are corrected in training, at most: so many are drawn, the anchor always
            among them; 2 in SAM2's training. Corrected frames are remembered as prompted ones.
        augmentation: How training clips are changed: flipped, turned and the like; not at all if null.
        prompt_buckets: Pad a training pass's objects to few numbers, as `MedSAMModule`; dropout is drawn otherwise.
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

    model: Any

    def __init__(
        self,
        model: SegmentationModel,
        memory: bool = True,
        tuning: Tuning | None = None,
        prompts: Prompter | None = None,
        loss: BestMaskLoss | DiceCrossEntropy | None = None,
        loss_at: Literal["input", "decoder"] = "input",
        corrected_frames: int = 1,
        augmentation: ClipAugmentation | None = None,
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
        if not hasattr(model, "recall"):
            raise UserError(
                f"SAM2Module trains trainer.models.SAM2, not {type(model).__name__}: take the module of its family"
            )
        rates = RateSchedule(schedule, warmup_steps, cooldown_steps, power, timescale, final_factor)
        super().__init__(model, tuning or FullTuning(freeze=()), lr, weight_decay, decay, betas, rates)
        if corrected_frames < 1:
            raise UserError(f"corrected_frames {corrected_frames}: 1 or more; prompts without corrections correct none")
        self.memory, self.prompts, self.loss = memory, prompts or BoxPrompts(), loss or BestMaskLoss()
        self.asks_in_vain, self.predicts_iou = memory, not memory  # through a memory, a score is that of presence
        self.loss_at, self.corrected_frames, self.augmentation = loss_at, corrected_frames, augmentation
        self.prompt_buckets = prompt_buckets
        if not memory and gives_masks(self.prompts):
            raise UserError(
                "GivenMaskPrompts: the mask that is given is the answer, and of a single image nothing else is asked: "
                "take other prompts, or memory true"
            )
        if corrected_frames > 1 and not self.prompts.rounds(0):
            raise UserError(
                f"corrected_frames {corrected_frames}: {type(self.prompts).__name__} correct nothing: take "
                "ClickPrompts with corrections, or leave it out"
            )
        self._rehearsed: Callable[..., list[Prompts]] | None = None
        """Stands in for the prompts' corrections where nothing has a value."""
        freeze(self.model, self._unreached())
        self.tuning.check_learns(self.model)

    def _unreached(self) -> list[str]:
        """Parts of the model that no gradient reaches: weight decay would wear them away."""
        decoder = "sam_mask_decoder"
        heads = {
            "iou_prediction_head": isinstance(self.loss, BestMaskLoss) and self.loss.iou_weight > 0,
            "pred_obj_score_head": isinstance(self.loss, BestMaskLoss) and self.loss.presence_weight > 0,
        }
        parts = [f"{decoder}.{name}" for name, reached in heads.items() if not reached]
        if isinstance(self.prompts, GivenMaskPrompts):  # nothing is answered without a memory
            parts.append("no_mem_embed")
        if self.memory:
            return parts
        if isinstance(self.loss, DiceCrossEntropy):  # it learns the one mask that is answered first
            parts += [f"{decoder}.output_hypernetworks_mlps.{number}" for number in (1, 2, 3)]
        return [*parts, *MEMORY_PARTS]

    def setup(self, stage: str) -> None:
        """Refuse data that the module cannot learn from.

        Raises:
            UserError: Single images for a memory, or clips for none; samples without a target; a precision that is not
                supported, a schedule without an end, or a prompt encoder that DDP would wait for.
        """
        super().setup(stage)
        given = [".no_mem_embed"] if gives_masks(self.prompts) else []
        self.refuse_unreached(stage, [".sam_prompt_encoder.", ".mask_downsample.", *given])
        datamodule = self.trainer.datamodule
        length = getattr(datamodule, "clip_length", 1)
        if self.memory and length < 2:
            raise UserError(
                f"data.init_args.clip_length {length}: a memory learns from clips of 2 or more slices: set it to 4 or "
                "8, or model.init_args.memory to false"
            )
        if not self.memory:
            self.refuse({"clip_length": 1}, "model.init_args.memory is false, so single images are learnt")
        unused = {"negatives_per_image": 0, "hard_negatives": False, "evaluated_negatives": 0}
        self.refuse(unused, "SAM2 is asked with boxes, points and masks")
        if stage == "fit" and not self.memory:
            self.refuse_empty("nothing to prompt with")

    def describe_prompts(self) -> dict[str, Any]:
        """What an evaluation asks, as JSON."""
        if not self.memory:
            return self.prompts.describe()
        datamodule = self.trainer.datamodule if self._trainer is not None else None
        clip = {name: getattr(datamodule, f"clip_{name}", None) for name in ("length", "step", "anchor")}
        return {**self.prompts.describe(), "clip": clip, "memory": type(self.model.memory).__name__}

    def on_after_batch_transfer(self, batch: TripletBatch, dataloader_idx: int) -> TripletBatch:
        """Each term of a clip's frame is one target; in an evaluation, frames that lack it are asked for it too."""
        if not self.memory:
            return batch
        batch = batch.by_term()
        return batch if self.trainer.training else with_absences(batch)

    def forward(self, batch: TripletBatch, epoch: int | None = None) -> list[tuple[Followed, dict[int, Look]]]:
        """Follow the objects of a batch.

        Args:
            batch: B clips, or single images.
            epoch: The epoch in training, None in evaluation: prompts are drawn accordingly.

        Returns:
            For clips that are followed alike their objects, and the last answer to each frame.
        """
        return [(group, looks) for group, looks, _ in self._follow(batch, epoch)]

    def training_step(self, batch: TripletBatch, batch_idx: int) -> Tensor:
        """What the answers to all frames cost, averaged over each clip's objects, then over a step's clips."""
        if batch.masks:
            self.seed_dropout(batch)
        groups = list(self._follow(batch, self.current_epoch)) if batch.masks else []
        if not groups:  # all were damaged, or no anchor shows what it did, after an augmentation
            return self.nothing_learnt()
        losses, shown = self._losses(groups, batch.counted)
        self.log_dict(shown, batch_size=len(batch) // batch.frames, on_step=True, on_epoch=False)
        return losses["loss"]

    def loss_of(self, batch: TripletBatch, epoch: int) -> Tensor:
        """The loss of a batch in an epoch, without a trainer."""
        return self._losses(list(self._follow(batch, epoch)), batch.counted)[0]["loss"]

    def _losses(
        self, groups: list[tuple[Followed, dict[int, Look], dict[str, Tensor]]], count: float | None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Losses by name, averaged over so many clips, and what is shown of them."""
        clips = torch.cat([group.clip for group, _, _ in groups])
        parts = {name: torch.cat([costs[name] for _, _, costs in groups]) for name in groups[0][2]}
        losses = per_image_means(parts, clips, count)
        shown = {f"train/{name}": value.detach() for name, value in losses.items()}
        with torch.no_grad():
            shown["train/dsc"] = found_dsc(groups)
        if not losses["loss"].requires_grad and not is_sharded(self):  # nothing but given masks
            losses["loss"] = losses["loss"] + self.nothing_learnt()
        return losses, shown

    def asked(self, batch: TripletBatch) -> int:
        """How many objects a training's pass over a batch follows, each through all frames of its clip."""
        owners = batch.image_index.tolist()
        if not batch.objects:
            return len(owners)
        return len({(owner // batch.frames, thing) for owner, thing in zip(owners, batch.objects, strict=True)})

    def rehearse(self, images: int, prompts: int, frames: int = 1) -> Tensor:
        """Loss of a pass over made-up clips with so many objects each, asked with boxes."""
        side, device, count = self.model.preprocessing.image_size, self.device, images * prompts
        features = self.model.encode(torch.zeros(images * frames, 3, side, side, device=device))
        clip = torch.arange(images).repeat_interleave(prompts)
        image = clip * frames + torch.arange(frames)[:, None]
        masks = torch.zeros(frames, count, side, side, device=device)
        draws: list[list[tuple[int, ...]]] = [[(0, q) for q in range(count)]] * frames
        everything = Followed(
            clip, [0] * images, image, image, masks, torch.zeros(frames, count, 4),
            torch.full((count, 2), float(side)), draws, self.model.mask_side,
        )  # fmt: skip
        asked = [Prompts(torch.arange(count), boxes=torch.zeros(count, 4))]
        corrected = tuple(range(min(self.corrected_frames, frames)))
        self._rehearsed = made_up_click
        try:
            _, costs = self._follow_group(features, everything, 0, corrected, 0, asked)
        finally:
            self._rehearsed = None
        return costs["loss"].mean()

    def counts(self, batch: TripletBatch, row: int) -> bool:
        """Whether a target is scored: what was prompted in a clip is not."""
        if not self.memory:
            return True
        clip, frame = divmod(int(batch.image_index[row]), batch.frames)
        return frame != batch.anchors[clip]

    @torch.no_grad()
    def predict_masks(self, batch: TripletBatch) -> Prediction:
        """Predict every target of a batch at native resolution, from the last answer to its frame."""
        if not batch.masks:
            return Prediction.none()
        masks: list[Tensor] = [torch.zeros(0)] * len(batch.masks)
        scores, believed = torch.zeros(len(masks)), dict[int, Any]()
        absent, asked = dict[tuple[int, int], tuple[Tensor, Tensor]](), list[Prompts]()
        for group, looks, _ in self._follow(batch, None, asked):
            for frame, look in looks.items():
                sure = look.presence.float().sigmoid() if self.memory else look.ious.amax(1).float()
                shown = group.rows[frame].tolist(), group.image[frame].tolist()
                for q, (row, image) in enumerate(zip(*shown, strict=True)):
                    size = batch.images[image].shape[-2:]
                    native = self.model.preprocessing.to_native(look.best[q : q + 1], *size)[0]
                    if row >= 0:
                        believed |= self.reliability_of(batch, {row: native})
                        masks[row], scores[row] = native > 0, sure[q]
                    else:
                        thing = batch.objects[int(group.rows[:, q].max())]
                        absent[image // batch.frames * NUMBERS + thing, image] = (sure[q], (native > 0).sum())
        boxes, points, labels = prompts_of_targets(asked, len(masks))
        gone = [absent[place] for place in sorted(absent)]
        return Prediction(
            masks=masks,
            scores=scores,
            boxes=self.model.preprocessing.boxes_to_native(boxes, batch.sizes),
            points=self.model.preprocessing.points_to_native(points, batch.sizes),
            labels=labels,
            absent=torch.stack([sure for sure, _ in gone]).float().cpu() if gone else torch.zeros(0),
            absent_areas=torch.stack([area for _, area in gone]).cpu() if gone else torch.zeros(0, dtype=torch.int64),
            reliability=believed,
        )

    def _follow(
        self, batch: TripletBatch, epoch: int | None, asked: list[Prompts] | None = None
    ) -> Iterable[tuple[Followed, dict[int, Look], dict[str, Tensor]]]:
        """Encode all frames once, and follow the objects of clips that are gone through alike together.

        Args:
            batch: B clips, or single images.
            epoch: The epoch in training, None in evaluation.
            asked: Takes the first prompts, whose `rows` are the batch's targets.

        Yields:
            Objects, the last answer to each frame, and what each object costs by the name of the loss: (Q,) each.
        """
        preprocessing = self.model.preprocessing
        images = preprocessing.images(batch.images, self.device)
        everything = followed(batch, preprocessing, self.model.mask_side, self.device)
        if self.augmentation is not None and epoch is not None:
            images, everything = self.augmentation(images, everything, clip_draws(batch), epoch)
        if not len(everything):  # as for a batch with nothing in it
            return
        features = self.model.encode(images)
        groups: dict[tuple[int, tuple[int, ...]], list[int]] = {}
        for clip, anchor in enumerate(everything.anchors):
            corrected = self._corrected(batch, clip, anchor, epoch)
            groups.setdefault((anchor, corrected), []).append(clip)
        for (anchor, corrected), clips in groups.items():
            mine = torch.isin(everything.clip, torch.tensor(clips)).nonzero()[:, 0]
            if not len(mine):
                continue
            group = everything.subset(mine) if len(mine) < len(everything) else everything
            padded = group.padded() if self.prompt_buckets and epoch is not None else group
            first = self.prompts.first(padded.truth(anchor), epoch)
            if asked is not None:
                asked += [replace(some, rows=rows_of(some, group.rows[anchor])) for some in first]
            yield group, *first_of(len(group), *self._follow_group(features, padded, anchor, corrected, epoch, first))

    def _corrected(self, batch: TripletBatch, clip: int, anchor: int, epoch: int | None) -> tuple[int, ...]:
        """Which frames of a clip are corrected; a pure function of (seed, epoch, sample)."""
        most = min(self.corrected_frames, batch.frames)
        if epoch is None or most == 1 or not self.prompts.rounds(epoch):
            return (anchor,)
        generator = stream(run_seed(None), "corrected", epoch, *clip_draws(batch)[clip])
        others = [frame for frame in range(batch.frames) if frame != anchor]
        count = int(generator.integers(1, most, endpoint=True)) - 1
        return (anchor, *sorted(generator.choice(others, size=count, replace=False).tolist()))

    def _follow_group(
        self,
        features: SAM2Features,
        group: Followed,
        anchor: int,
        corrected: tuple[int, ...],
        epoch: int | None,
        first: list[Prompts],
    ) -> tuple[dict[int, Look], dict[str, Tensor]]:
        """Follow objects from the anchor to the end, then from it back to the beginning."""
        from trainer.models.sam2_tracking import Tracking

        frames, clicked = len(group.image), not_given(first, len(group))
        tracking, looks, costs = Tracking(self.model, frames), {}, []
        order = [*range(anchor, frames), *range(anchor - 1, -1, -1)]
        for place, frame in enumerate(order):
            mine, reverse = features.take(group.image[frame]), frame < anchor
            if frame == anchor:
                conditioned, asked = self.model.without_memory(mine), first
                look = self._say(tracking, mine, conditioned, asked)
            else:
                conditioned, asked = tracking.conditioned(frame, mine, reverse), []
                look = self.model.look(mine, conditioned, None)
            costs.append(self._costs(look, group.masks[frame]))
            if frame in corrected and len(clicked) and self.prompts.rounds(epoch):
                some = Clicked.of(group, mine, conditioned, look.best, clicked)
                asked = only(asked, clicked, len(group)) if frame == anchor else [Prompts(torch.arange(len(clicked)))]
                again = list(self._corrections(tracking, some, frame, epoch, asked))
                costs += [{name: spread(one, clicked, len(group)) for name, one in cost.items()} for _, cost in again]
                look = patched(look, again[-1][0], clicked)
            looks[frame] = look
            if place + 1 < len(order):  # nothing looks back at the last one
                tracking.keep(frame, mine, look, frame == anchor or frame in corrected, reverse)
        return looks, {name: torch.stack([part[name] for part in costs]).sum(0) for name in costs[0]}

    def _corrections(
        self, tracking: Tracking, some: Clicked, frame: int, epoch: int | None, asked: list[Prompts]
    ) -> Iterator[tuple[Look, dict[str, Tensor]]]:
        """Answers to one click after another on a frame, and what each costs."""
        correct, logits = self._rehearsed or self.prompts.correct, some.logits
        for correction in range(self.prompts.rounds(epoch)):
            asked = correct(asked, logits.detach(), some.group.truth(frame), epoch, correction)
            look = self._say(tracking, some.features, some.conditioned, asked)
            logits = look.best
            yield look, self._costs(look, some.group.masks[frame])

    def _say(self, tracking: Tracking, mine: SAM2Features, conditioned: Tensor, asked: list[Prompts]) -> Look:
        """Answer prompts: as the predictor of images where nothing but masks is learnt of single ones."""
        plain = not self.memory and not (self.training and isinstance(self.loss, BestMaskLoss))
        return tracking.answer(mine, conditioned, asked, plain)

    def _costs(self, look: Look, truth: Tensor) -> dict[str, Tensor]:
        """What an answer costs for each object: (Q,) each; masks that are not there teach nothing but that."""
        if not self.training:
            return {"loss": look.presence.detach()}
        if self.loss_at == "decoder":
            truth = smaller(truth, look.best.shape[-1])
        if isinstance(self.loss, BestMaskLoss):
            return dict(self.loss(look.logits, look.ious, look.presence, truth))
        there = truth.flatten(1).amax(1)
        found = self.loss(look.best, truth)
        return {name: value * there for name, value in found.items()}
