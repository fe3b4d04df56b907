"""The loss of set prediction: SAM3's (Carion et al. 2025), with the weights of Medical SAM3's Table 2.

Shapes: L decoder layers, P prompts, Q queries, N targets, K matched pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_shards.errors import UserError, nearest
from trainer.losses.boxes import overlap
from trainer.losses.instance_masks import Side, mask_losses
from trainer.losses.matching import HungarianMatcher, Matches, OneToManyMatcher, Pairs, match, prompts_of, upload
from trainer.losses.semantic import semantic_losses, semantic_truth
from trainer.losses.sets import ObjectSets, SetPrediction

LEAST_QUALITY = 0.01  # the least classification target of a matched query
SIDES = ("head", "target")


@dataclass(frozen=True)
class Shares:
    """What a rank divides its sums by: what it has on average over all ranks; 0-dimensional each.

    Attributes:
        targets: Targets; at least one over all ranks.
        prompts: Prompts; at least one over all ranks.
        shown: Prompts whose semantic mask is not empty, and a trifle.
        root: Square root of the number of prompts of all ranks together.
    """

    targets: Tensor
    prompts: Tensor
    shown: Tensor
    root: Tensor


class SetPredictionLoss(nn.Module):
    """Boxes, IoU-aware classification, presence and masks of all decoder layers and both halves.

    The sum is that of the first half, `one_to_many_weight` times that of the one-to-many half, and the semantic terms.
    Terms on boxes and masks are sums over matched pairs, divided by the targets a rank has on average over all ranks;
    the others are means over prompts, counted over all ranks too. So the mean of the ranks' losses, which is what they
    learn, is the loss of one process with all their prompts in one pass. (The official code counts prompts on each rank
    by itself: on one rank it is the same.) Computed in fp32, also under autocast. A NaN anywhere in the boxes or logits
    makes the loss NaN.

    A step of several passes (`micro_batch_size`) learns the mean of their losses, each divided by its own numbers of
    targets and prompts: a target counts for more where there are few others in its pass. The official code sums them,
    divided likewise. So here alone the number of ranks matters where it changes the number of passes.

    A weight of 0 on both mask terms, or on both semantic ones, leaves them out: then what only they would train gets no
    gradient, not one of 0.

    Args:
        box_weight: Factor on the L1 distance of (cx, cy, w, h).
        giou_weight: Factor on 1 − generalised IoU.
        class_weight: Factor on the classification term, the mean over queries. A matched query's target is
            p^alpha · IoU^(1 − alpha), at least 0.01; prompts whose concept is absent count as 0.
        presence_weight: Factor on the presence term, half the cross-entropy of "the concept is in the image".
        positive_weight: Factor on the matched queries in the classification term.
        alpha: Exponent of the probability in the classification target.
        gamma: Exponent of the probability that weighs down queries without a target. 0, or 1 and above.
        padded_queries: The classification term is divided by at least so many queries a prompt.
        mask_weight: Factor on the focal loss of matched masks. The paper lists no term on instance masks; the official
            segmentation recipe has 200.
        dice_weight: Factor on the Dice loss of matched masks; 10 in the official segmentation recipe.
        semantic_weight: Factor on the focal loss of the semantic mask, the mean over prompts whose concept is there.
        semantic_dice_weight: Factor on the Dice loss of the semantic mask.
        one_to_many_weight: Factor on the one-to-many half.
        scale_by_prompts: Multiply the sum by the square root of the number of prompts, as the official code does; of
            those of all ranks.
        matcher: One query a target, for all layers; None is a `HungarianMatcher` with its own defaults.
        many_matcher: Several queries a target, for the one-to-many half's final layer (its other layers are matched one
            to one); None is a `OneToManyMatcher` with its own defaults.
        mask_at: Where masks and targets meet. "head" averages targets over the pixels of the mask head; "target"
            enlarges the logits to the targets' side, as the official code does, which takes some twelve times the
            memory.
        mask_chunk: How many masks are computed and held at once; they are computed again in the backward pass. None is
            all at once.
        mask_points: At how many random points a mask is compared, most of them where it is least certain. None is every
            pixel, as in the official recipes.
    """

    def __init__(
        self,
        box_weight: float = 5.0,
        giou_weight: float = 2.0,
        class_weight: float = 20.0,
        presence_weight: float = 20.0,
        positive_weight: float = 10.0,
        alpha: float = 0.25,
        gamma: float = 2.0,
        padded_queries: int = 200,
        mask_weight: float = 0.0,
        dice_weight: float = 0.0,
        semantic_weight: float = 20.0,
        semantic_dice_weight: float = 30.0,
        one_to_many_weight: float = 2.0,
        scale_by_prompts: bool = True,
        matcher: HungarianMatcher | None = None,
        many_matcher: OneToManyMatcher | None = None,
        mask_at: Side = "head",
        mask_chunk: int | None = None,
        mask_points: int | None = None,
    ) -> None:
        super().__init__()
        self.weights = {
            "box_loss": box_weight,
            "giou_loss": giou_weight,
            "class_loss": class_weight,
            "presence_loss": presence_weight,
            "mask_loss": mask_weight,
            "dice_loss": dice_weight,
            "semantic_loss": semantic_weight,
            "semantic_dice": semantic_dice_weight,
        }
        factors = {**self.weights, "positive_weight": positive_weight, "one_to_many_weight": one_to_many_weight}
        for name, factor in factors.items():
            if not (isfinite(factor) and factor >= 0):
                raise UserError(f"SetPredictionLoss: {ARGUMENTS.get(name, name)} is {factor}: give 0 or more")
        if not any(self.weights.values()):
            raise UserError(f"SetPredictionLoss: nothing is learnt: {', '.join(ARGUMENTS.values())} are all 0")
        _check(alpha, gamma, padded_queries, mask_at, mask_chunk, mask_points)
        self.positive_weight, self.alpha, self.gamma = positive_weight, alpha, gamma
        self.padded_queries, self.one_to_many_weight = padded_queries, one_to_many_weight
        self.scale_by_prompts = scale_by_prompts
        self.matcher, self.many_matcher = matcher or HungarianMatcher(), many_matcher or OneToManyMatcher()
        self.mask_at, self.mask_chunk, self.mask_points = mask_at, mask_chunk, mask_points

    def match(self, prediction: SetPrediction, targets: ObjectSets) -> Matches:
        """Match all layers of both halves; the one thing in a step that waits for the device."""
        return match(prediction, targets, self.matcher, self.many_matcher)

    def count(self, targets: ObjectSets | None, device: torch.device, over_ranks: bool = True) -> Shares:
        """Count what the terms are divided by; nothing waits for the device.

        Args:
            targets: What is there; None where this rank has no prompt: the others count together with it.
            device: Where the targets are.
            over_ranks: Count over all ranks, which must all ask; otherwise this rank's alone.
        """
        truth = semantic_truth(targets) if targets is not None and self._learns_semantic else None
        shown = torch.zeros((), device=device) if truth is None else truth.flatten(1).any(1).float().sum()
        sizes = (0, 0) if targets is None else (len(targets.boxes), len(targets.counts))
        counts = torch.stack([*(torch.full((), float(size), device=device) for size in sizes), shown])
        world = 1
        if over_ranks and torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(counts)
            world = torch.distributed.get_world_size()
        some = counts.clamp(min=1) / world
        return Shares(some[0], some[1], (counts[2] + 1e-6) / world, counts[1].sqrt())

    @property
    def _learns_semantic(self) -> bool:
        return bool(self.weights["semantic_loss"] or self.weights["semantic_dice"])

    def forward(
        self,
        prediction: SetPrediction,
        targets: ObjectSets,
        *,
        generator: torch.Generator | None = None,
        matches: Matches | None = None,
        shares: Shares | None = None,
    ) -> dict[str, Tensor]:
        """Compute the loss.

        Args:
            prediction: What the model says.
            targets: What is there, on the same device.
            generator: Of `mask_points`, on the CPU.
            matches: From `match`, where they are known already.
            shares: From `count`, where they are known already; otherwise all ranks must ask.

        Returns:
            ``loss``, and its components before any weight: ``box_loss``, ``giou_loss``, ``class_loss``,
            ``presence_loss``, ``mask_loss``, ``dice_loss``, ``semantic_loss`` and ``semantic_dice``, of the final
            layer. With the suffix ``_aux``, sums over the layers before it, where there are any; with ``_many`` and
            ``_many_aux``, the same of the one-to-many half. All are 0-dimensional.

        Raises:
            UserError: If a term on masks has a weight and the targets have no masks.
        """
        total = torch.zeros((), device=prediction.logits.device)
        found: dict[str, Tensor] = {}
        shares = shares or self.count(targets, total.device)
        parts = self.components(prediction, targets, generator=generator, matches=matches, shares=shares)
        for name, layers in parts.items():
            weight = self.weights[name.removesuffix("_many")]
            total = total + weight * (self.one_to_many_weight if name.endswith("_many") else 1.0) * layers.sum()
            found[name] = layers[-1]
            if len(layers) > 1:
                found[f"{name}_aux"] = layers[:-1].sum()
        if self.scale_by_prompts:
            total = total * shares.root
        return {"loss": total, **found}

    def components(
        self,
        prediction: SetPrediction,
        targets: ObjectSets,
        *,
        generator: torch.Generator | None = None,
        matches: Matches | None = None,
        shares: Shares | None = None,
    ) -> dict[str, Tensor]:
        """Compute the components before any weight, layer by layer.

        Args:
            prediction: What the model says.
            targets: What is there.
            generator: Of `mask_points`, on the CPU.
            matches: From `match`, where they are known already.
            shares: From `count`, where they are known already; otherwise all ranks must ask.

        Returns:
            By the names of `forward`, (L,) each, the final layer at the end; (1,) for those on masks.
        """
        device = prediction.logits.device
        matches = matches or self.match(prediction, targets)
        shares = shares or self.count(targets, device)
        found: dict[str, Tensor] = {}
        with torch.autocast(device.type, enabled=False):
            present = present_of(targets, device)
            found |= self._detection(prediction, matches.first, targets, present, shares)
            if prediction.presence is not None:
                found["presence_loss"] = presence_losses(prediction.presence, present, shares)
            if prediction.many is not None:
                many = self._detection(prediction.many, matches.many, targets, present, shares)
                found |= {f"{name}_many": value for name, value in many.items()}
            found |= self._semantic(prediction, targets, shares)
        found |= self._masks(prediction, matches.first, targets, shares, generator)
        if prediction.many is not None:
            masks = self._masks(prediction.many, matches.many, targets, shares, generator)
            found |= {f"{name}_many": value for name, value in masks.items()}
        return found

    def _detection(
        self, half: SetPrediction, layers: Sequence[Pairs], targets: ObjectSets, present: Tensor, shares: Shares
    ) -> dict[str, Tensor]:
        """Losses (L,) on the boxes and classes of one half."""
        logits, boxes, wanted = half.logits.float(), half.boxes.float(), targets.boxes.float()
        places, rows, last = _numbers(layers, logits.shape, logits.device)
        chosen, wanted = boxes.flatten(0, 2)[places], wanted[rows]
        iou, giou = overlap(chosen, wanted)
        values = torch.stack([(chosen - wanted).abs().sum(-1), 1 - giou], 1)
        sums = torch.stack([part.sum(0) for part in values.split([len(pairs) for pairs in layers])])
        touched = 0 * boxes.sum((1, 2, 3))  # every layer takes part, and a NaN shows, also where nothing is matched
        with torch.no_grad():
            quality = logits.flatten()[places[last]].sigmoid() ** self.alpha * iou[last] ** (1 - self.alpha)
            truth = torch.zeros_like(logits).flatten()
            matched = truth.scatter(0, places[last], 1.0).view_as(logits)
            truth = truth.scatter(0, places[last], quality.clamp(min=LEAST_QUALITY)).view_as(logits)
        positive = self.positive_weight * matched * _cross_entropy(logits, truth)
        negative = (1 - matched) * logits.sigmoid() ** self.gamma * _cross_entropy(logits, torch.zeros_like(logits))
        queries = logits.shape[-1]
        class_loss = ((positive + negative) * present[:, None]).sum((1, 2))
        return {
            "box_loss": sums[:, 0] / shares.targets + touched,
            "giou_loss": sums[:, 1] / shares.targets + touched,
            "class_loss": class_loss / (max(self.padded_queries, queries) * shares.prompts),
        }

    def _semantic(self, prediction: SetPrediction, targets: ObjectSets, shares: Shares) -> dict[str, Tensor]:
        if prediction.semantic is None or not self._learns_semantic:
            return {}
        truth = semantic_truth(targets)
        if truth is None:
            raise UserError(_no_masks("semantic_weight", "semantic_dice_weight"))
        losses = semantic_losses(prediction.semantic, truth, at=self.mask_at, shown=shares.shown)
        return {name: value[None] for name, value in losses.items()}

    def _masks(
        self,
        half: SetPrediction,
        layers: Sequence[Pairs],
        targets: ObjectSets,
        shares: Shares,
        generator: torch.Generator | None,
    ) -> dict[str, Tensor]:
        if half.masks is None or not (self.weights["mask_loss"] or self.weights["dice_loss"]):
            return {}
        if targets.masks is None:
            raise UserError(_no_masks("mask_weight", "dice_weight"))
        sums = mask_losses(
            half.masks,
            layers[-1],
            targets,
            at=self.mask_at,
            chunk=self.mask_chunk,
            points=self.mask_points,
            generator=generator,
        )
        mask_loss, dice = (sums / shares.targets).unbind()
        return {"mask_loss": mask_loss[None], "dice_loss": dice[None]}


ARGUMENTS = {
    "box_loss": "box_weight",
    "giou_loss": "giou_weight",
    "class_loss": "class_weight",
    "presence_loss": "presence_weight",
    "mask_loss": "mask_weight",
    "dice_loss": "dice_weight",
    "semantic_loss": "semantic_weight",
    "semantic_dice": "semantic_dice_weight",
}


def _check(
    alpha: float, gamma: float, padded_queries: int, mask_at: str, mask_chunk: int | None, mask_points: int | None
) -> None:
    """Refuse what makes no loss."""
    if not 0 <= alpha <= 1:
        raise UserError(f"SetPredictionLoss: alpha is {alpha}: give a number between 0 and 1")
    if gamma != 0 and not (isfinite(gamma) and gamma >= 1):
        raise UserError(f"SetPredictionLoss: gamma is {gamma}: give 0, or 1 and above, so that gradients are finite")
    if padded_queries < 0:
        raise UserError(f"SetPredictionLoss: padded_queries is {padded_queries}: give 0 or more")
    if mask_at not in SIDES:
        raise UserError(f"SetPredictionLoss: mask_at is {mask_at!r}{nearest(mask_at, SIDES)}")
    for name, count in (("mask_chunk", mask_chunk), ("mask_points", mask_points)):
        if count is not None and count < 1:
            raise UserError(f"SetPredictionLoss: {name} is {count}: give 1 or more, or null")


def _no_masks(*names: str) -> str:
    return f"SetPredictionLoss: the targets have no masks: set {' and '.join(names)} to 0, or load masks"


def _numbers(layers: Sequence[Pairs], shape: torch.Size, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Where the pairs of all layers are: their places (K,) in L · P · Q, their targets (K,), and one pair a query."""
    _, prompts, queries = shape
    places = [(number * prompts + pairs.prompts) * queries + pairs.queries for number, pairs in enumerate(layers)]
    starts = np.cumsum([0, *map(len, layers)])
    last = [start + pairs.last_of_query() for start, pairs in zip(starts[:-1], layers, strict=True)]
    parts = [np.concatenate(part) for part in (places, [pairs.targets for pairs in layers], last)]
    numbers = upload(np.concatenate(parts), device)
    found = numbers.split([len(part) for part in parts])
    return found[0], found[1], found[2]


def _cross_entropy(logits: Tensor, truth: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, truth, reduction="none")


def present_of(targets: ObjectSets, device: torch.device) -> Tensor:
    """Whether each prompt has a target, (P,) of 0 and 1; one whose box has no area is none, as in the official code."""
    seen = (targets.boxes[:, 2:] > 0).all(1).float()
    return torch.zeros(len(targets.counts), device=device).scatter_reduce(0, prompts_of(targets, device), seen, "amax")


def presence_losses(logits: Tensor, present: Tensor, shares: Shares) -> Tensor:
    """Half the mean cross-entropy (L,) of presence logits (L, P): the focal loss at α 0.5 and γ 0, without its NaN."""
    return 0.5 * _cross_entropy(logits.float(), present.expand_as(logits)).sum(1) / shares.prompts
