"""What a set-prediction model says about concepts, and what is there: the two sides of SAM3's loss.

Shapes: L decoder layers (the last is the final one), P prompts (concepts asked about, flattened over the batch), Q
object queries, N targets (packed, one prompt after another), C channels, h w the mask head's side, H W that of the
targets.
Boxes are (cx, cy, w, h), as shares of the input's side.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


class QueryMasks(ABC):
    """Mask logits of object queries, computed for those that are asked for."""

    @property
    @abstractmethod
    def side(self) -> tuple[int, int]:
        """Height and width (h, w) of the masks."""

    @abstractmethod
    def of(self, prompt: int, queries: Tensor) -> Tensor:
        """Mask logits (M, h, w) of some queries (M,) of one prompt."""

    @abstractmethod
    def first(self, count: int) -> QueryMasks:
        """Those of the first prompts alone."""


@dataclass(frozen=True)
class DenseMasks(QueryMasks):
    """Masks of all queries, as a tensor.

    Attributes:
        logits: (P, Q, h, w).
    """

    logits: Tensor

    @property
    def side(self) -> tuple[int, int]:
        """Height and width (h, w) of the masks."""
        return self.logits.shape[-2], self.logits.shape[-1]

    def of(self, prompt: int, queries: Tensor) -> Tensor:
        """Mask logits (M, h, w) of some queries (M,) of one prompt."""
        return self.logits[prompt, queries]

    def first(self, count: int) -> DenseMasks:
        """Those of the first prompts alone."""
        return DenseMasks(self.logits[:count])


@dataclass(frozen=True)
class FactoredMasks(QueryMasks):
    """Masks as products of queries and pixels: 200 masks of a prompt would take 33 MB in bf16, and few are needed.

    Attributes:
        queries: (P, Q, C) embeddings.
        pixels: (P, C, h, w) embeddings.
        offsets: (P, Q) what is added to all pixels of a query's mask.
    """

    queries: Tensor
    pixels: Tensor
    offsets: Tensor

    @property
    def side(self) -> tuple[int, int]:
        """Height and width (h, w) of the masks."""
        return self.pixels.shape[-2], self.pixels.shape[-1]

    def of(self, prompt: int, queries: Tensor) -> Tensor:
        """Mask logits (M, h, w) of some queries (M,) of one prompt."""
        embedded, pixels, offsets = self._prompts[prompt]
        return torch.einsum("mc,chw->mhw", embedded[queries], pixels) + offsets[queries, None, None]

    def first(self, count: int) -> FactoredMasks:
        """Those of the first prompts alone."""
        return FactoredMasks(self.queries[:count], self.pixels[:count], self.offsets[:count])

    @cached_property
    def _prompts(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """The parts of each prompt: indexing them one by one would make a gradient of the size of all for each."""
        return list(zip(self.queries.unbind(), self.pixels.unbind(), self.offsets.unbind(), strict=True))


@dataclass(frozen=True)
class SetPrediction:
    """What the model says about every prompt.

    Attributes:
        logits: (L, P, Q) that a query is an instance of the concept, given that there is one.
        boxes: (L, P, Q, 4).
        presence: (L, P) logits that the concept is in the image.
        masks: Of the final layer's queries.
        semantic: (P, h, w) logits of all of the concept in one mask.
        many: The one-to-many half, in training: its logits, boxes and masks; it has no presence and no semantic mask.
    """

    logits: Tensor
    boxes: Tensor
    presence: Tensor | None = None
    masks: QueryMasks | None = None
    semantic: Tensor | None = None
    many: SetPrediction | None = None

    @property
    def confidence(self) -> Tensor:
        """(P, Q) confidence of the final layer's queries, in [0, 1]: that of the query times that of the presence."""
        found = self.logits[-1].float().sigmoid()
        return found if self.presence is None else found * self.presence[-1].float().sigmoid()[:, None]

    def first(self, count: int) -> SetPrediction:
        """What it says about the first prompts alone."""
        return SetPrediction(
            logits=self.logits[:, :count],
            boxes=self.boxes[:, :count],
            presence=None if self.presence is None else self.presence[:, :count],
            masks=None if self.masks is None else self.masks.first(count),
            semantic=None if self.semantic is None else self.semantic[:count],
            many=None if self.many is None else self.many.first(count),
        )


@dataclass(frozen=True)
class ObjectSets:
    """What is there: the instances of each prompt's concept, packed.

    Attributes:
        counts: P numbers of instances; 0 where the concept is absent.
        boxes: (N, 4).
        masks: (N, H, W) of 0 and 1, or shares between; None where no loss needs them.
        semantic: (P, H, W) as `masks`, all of a concept in one mask; None takes the union of the instances.
        has_mask: (N,) bool, which instances have a mask; None is all.
    """

    counts: Sequence[int]
    boxes: Tensor
    masks: Tensor | None = None
    semantic: Tensor | None = None
    has_mask: Tensor | None = None

    @property
    def starts(self) -> list[int]:
        """Where each prompt's instances begin: P numbers."""
        return [sum(self.counts[:prompt]) for prompt in range(len(self.counts))]
