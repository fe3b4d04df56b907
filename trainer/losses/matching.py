"""Which query answers for which target.

Shapes: L decoder layers, P prompts, Q queries, N targets (packed, one prompt after another), K matched pairs.
All layers' costs are computed in one go on the device and cross to the host in one copy a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from data_shards.errors import UserError
from trainer.losses.boxes import overlap
from trainer.losses.sets import ObjectSets, SetPrediction

CACHED, HELD = 2**15, 2**25  # costs computed at once: what a CPU's cache holds, and on a GPU what memory does
UNKNOWN = 1e6  # the cost of a NaN: such a query is taken last, and scipy would refuse the matrix


@dataclass(frozen=True)
class Pairs:
    """Matched pairs of one layer, on the host, in the order of prompts and in a prompt of targets.

    Attributes:
        prompts: (K,) int64.
        queries: (K,) int64, within the prompt.
        targets: (K,) int64, among all N.
    """

    prompts: np.ndarray
    queries: np.ndarray
    targets: np.ndarray

    def __len__(self) -> int:
        return len(self.prompts)

    def last_of_query(self) -> np.ndarray:
        """Which pairs (M,) are the last of their query: one pair a query, where a query may answer for several."""
        places = self.prompts * (self.queries.max(initial=0) + 1) + self.queries
        _, first = np.unique(places[::-1], return_index=True)
        return np.sort(len(self) - 1 - first)


@dataclass(frozen=True)
class Matches:
    """Matched pairs of every layer.

    Attributes:
        first: Those of the first half, one item a layer.
        many: Those of the one-to-many half; none where there is no such half.
    """

    first: list[Pairs]
    many: list[Pairs]


class HungarianMatcher:
    """One query for each target, at the least sum of costs; where queries are fewer, some targets get none.

    The cost is a weighted sum of the distance of boxes (L1), minus their generalised IoU, and a focal term on the class
    logit, as in SAM3's `BinaryHungarianMatcherV2`.

    Args:
        class_cost: Factor on the class term.
        box_cost: Factor on the L1 distance of (cx, cy, w, h).
        giou_cost: Factor on minus the generalised IoU.
        alpha: Share of the positives in the focal class term.
        gamma: Focal exponent of the class term.
    """

    def __init__(
        self,
        class_cost: float = 2.0,
        box_cost: float = 5.0,
        giou_cost: float = 2.0,
        alpha: float = 0.25,
        gamma: float = 2.0,
    ) -> None:
        costs = (class_cost, box_cost, giou_cost)
        if not all(isfinite(cost) and cost >= 0 for cost in costs) or not any(costs):
            raise UserError(
                "HungarianMatcher: class_cost, box_cost and giou_cost are 0 or more and not all 0, not "
                f"{class_cost}, {box_cost} and {giou_cost}"
            )
        if not 0 <= alpha <= 1 or not (isfinite(gamma) and gamma >= 0):
            raise UserError(
                f"HungarianMatcher: alpha is between 0 and 1 and gamma is 0 or more, not {alpha} and {gamma}"
            )
        self.class_cost, self.box_cost, self.giou_cost = class_cost, box_cost, giou_cost
        self.alpha, self.gamma = alpha, gamma

    @torch.no_grad()
    def costs(self, logits: Tensor, boxes: Tensor, targets: ObjectSets) -> Tensor:
        """Costs of all queries of a target's prompt, on the device and in fp32.

        Args:
            logits: (L, P, Q) class logits.
            boxes: (L, P, Q, 4).
            targets: What is there.

        Returns:
            (L, N, Q): there is no padding, and no cost between a target and another prompt's queries.
        """
        logits = logits.float()
        found = logits.sigmoid()
        positive = -self.alpha * (1 - found) ** self.gamma * F.logsigmoid(logits)
        negative = -(1 - self.alpha) * found**self.gamma * F.logsigmoid(-logits)
        # coordinates come first in memory: what is computed of each is then contiguous
        said = torch.stack([positive - negative, *boxes.float().unbind(-1)]).flatten(1, 2)
        layers, prompts, queries = logits.shape
        places = torch.arange(layers, device=logits.device)[:, None] * prompts + prompts_of(targets, logits.device)
        wanted = targets.boxes.float().repeat(layers, 1)[:, None]
        size = max((CACHED if logits.device.type == "cpu" else HELD) // max(queries, 1), 1)
        parts = [
            self._costs(said[:, place], target)
            for place, target in zip(places.flatten().split(size), wanted.split(size), strict=True)
        ]
        return torch.cat(parts).view(layers, len(targets.boxes), queries)

    def _costs(self, said: Tensor, wanted: Tensor) -> Tensor:
        """Costs (M, Q) of class terms and boxes (5, M, Q) for one target (M, 1, 4) each."""
        boxes = said[1:].movedim(0, -1)
        distance = torch.zeros_like(said[0])
        for ours, theirs in zip(boxes.unbind(-1), wanted.unbind(-1), strict=True):
            distance += (ours - theirs).abs()
        giou = overlap(boxes, wanted)[1]
        return self.class_cost * said[0] + self.box_cost * distance - self.giou_cost * giou

    def assign(self, costs: np.ndarray, counts: Sequence[int]) -> list[Pairs]:
        """Solve every layer and prompt on its own.

        Args:
            costs: (L, N, Q), on the host. NaN does not fail: such a query is taken last.
            counts: P numbers of targets.
        """
        costs = np.nan_to_num(costs, nan=UNKNOWN, posinf=UNKNOWN, neginf=-UNKNOWN)
        ends = np.cumsum(counts, dtype=np.int64)
        layers = []
        for layer in costs:
            parts = [np.empty((3, 0), np.int64)]
            for prompt, (count, end) in enumerate(zip(counts, ends, strict=True)):
                if count:
                    rows, queries = linear_sum_assignment(layer[end - count : end])
                    parts.append(np.stack([np.full_like(rows, prompt), queries, rows + end - count]))
            layers.append(Pairs(*np.concatenate(parts, 1)))
        return layers

    def __call__(self, logits: Tensor, boxes: Tensor, targets: ObjectSets) -> list[Pairs]:
        """Match every layer, with one copy from the device; arguments as those of `costs`."""
        return self.assign(self.costs(logits, boxes, targets).cpu().numpy(), targets.counts)


class OneToManyMatcher:
    """The best queries of each target, none or several (DAC-DETR, Hu et al. 2023; SAM3's `BinaryOneToManyMatcher`).

    A query's score for a target is α times its probability plus (1 − α) times the IoU of the boxes. Kept are those
    above the threshold that are also above the quantile 1 − topk / Q of the target's scores. These are the best `topk`;
    of queries that tie at the border none is kept, nor is the worst where there are just `topk` queries. With fewer
    queries the threshold alone decides. A query may be kept by several targets.

    Args:
        alpha: Share of the probability in a score.
        threshold: A score has to be above it.
        topk: How many queries a target keeps at most.
    """

    def __init__(self, alpha: float = 0.3, threshold: float = 0.4, topk: int = 4) -> None:
        if not 0 <= alpha <= 1 or not isfinite(threshold) or topk < 1:
            raise UserError(
                "OneToManyMatcher: alpha is between 0 and 1, threshold a number and topk 1 or more, not "
                f"{alpha}, {threshold} and {topk}"
            )
        self.alpha, self.threshold, self.topk = alpha, threshold, topk

    @torch.no_grad()
    def __call__(self, logits: Tensor, boxes: Tensor, targets: ObjectSets) -> tuple[Tensor, Tensor]:
        """Match one layer on the device, in fixed shapes: nothing waits.

        Args:
            logits: (P, Q) class logits.
            boxes: (P, Q, 4).
            targets: What is there.

        Returns:
            Queries (N, min(topk, Q)) from the best on, and which of them are kept, of the same shape.
        """
        prompts = prompts_of(targets, logits.device)
        iou, _ = overlap(boxes.float()[prompts], targets.boxes.float()[:, None])
        scores = self.alpha * logits.float().sigmoid()[prompts] + (1 - self.alpha) * iou
        values, queries = scores.topk(min(self.topk + 1, scores.shape[1]), dim=1)
        best = values[:, : self.topk]
        kept = best > self.threshold
        if scores.shape[1] >= self.topk:  # the quantile lies between the last two of `values`, or is the last one
            kept &= best > values[:, -1:]
        return queries[:, : self.topk], kept

    def pairs(self, queries: np.ndarray, kept: np.ndarray, counts: Sequence[int]) -> Pairs:
        """Turn the result, on the host, into pairs; `counts` are P numbers of targets."""
        targets, places = np.nonzero(kept)
        return Pairs(np.repeat(np.arange(len(counts)), counts)[targets], queries[targets, places], targets)


def match(
    prediction: SetPrediction, targets: ObjectSets, matcher: HungarianMatcher, many_matcher: OneToManyMatcher
) -> Matches:
    """Match all layers of both halves, with one copy from the device.

    The final layer of the one-to-many half is matched one to many, all others one to one.

    Args:
        prediction: What the model says; both halves have as many queries.
        targets: What is there.
        matcher: One to one.
        many_matcher: One to many.
    """
    if len(targets.counts) != prediction.logits.shape[1] or sum(targets.counts) != len(targets.boxes):
        raise ValueError("targets have one count for each prompt, and as many boxes as they count")
    first, many = prediction, prediction.many
    logits, boxes = first.logits, first.boxes
    if many is not None:
        logits, boxes = torch.cat([logits, many.logits[:-1]]), torch.cat([boxes, many.boxes[:-1]])
    costs = matcher.costs(logits, boxes, targets)
    parts = [costs.flatten()]
    if many is not None:
        queries, kept = many_matcher(many.logits[-1], many.boxes[-1], targets)
        parts.append(torch.where(kept, queries, -1).flatten().float())  # exact: far below 2^24 queries
    host = torch.cat(parts).cpu().numpy() if len(targets.boxes) else np.empty(0, np.float32)
    pairs = matcher.assign(host[: costs.numel()].reshape(costs.shape), targets.counts)
    layers = len(first.logits)
    if many is None:
        return Matches(pairs, [])
    chosen = host[costs.numel() :].reshape(queries.shape).astype(np.int64)
    return Matches(pairs[:layers], [*pairs[layers:], many_matcher.pairs(chosen, chosen >= 0, targets.counts)])


def prompts_of(targets: ObjectSets, device: torch.device) -> Tensor:
    """The prompt of each target, (N,) int64 on the device."""
    return upload(np.repeat(np.arange(len(targets.counts)), targets.counts), device)


def upload(numbers: np.ndarray, device: torch.device) -> Tensor:
    """Bring an array to the device without waiting for it."""
    return torch.from_numpy(numbers).to(device, non_blocking=True)


def made_up_matches(count: int, layers: int, topk: int) -> Matches:
    """Matches of prompts with one target each, as `match` gives them, without looking at any number.

    Args:
        count: Prompts.
        layers: Decoder layers.
        topk: Queries that the last layer of the one-to-many half matches with a target.
    """
    prompts = np.arange(count)
    single = Pairs(prompts, np.zeros_like(prompts), prompts)
    several = Pairs(prompts.repeat(topk), np.tile(np.arange(topk), count), prompts.repeat(topk))
    return Matches([single] * layers, [*[single] * (layers - 1), several])
