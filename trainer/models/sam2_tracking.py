"""Following objects through frames with SAM2's memory.

Shapes: Q objects, C channels, g side of the features.
Source: Ravi et al. 2024 (arXiv:2408.00714), section 4.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from trainer.models.sam2 import SAM2, Look, SAM2Features, merged
from trainer.models.sam2_memory import MemoryBank, Moment
from trainer.prompts import Prompts


class Tracking:
    """Follows Q objects through the frames of one clip, or of several of the same length at once.

    In evaluation mode it answers as SAM2VideoPredictor does, and keeps only what later frames can ask for, so that a
    volume of any length is followed in the memory of some tens of frames. In training everything has gradients.

    Args:
        model: The model.
        frames: Number of frames of the whole.
    """

    def __init__(self, model: SAM2, frames: int) -> None:
        self.model, self.frames, self.bank = model, frames, MemoryBank()

    def ask(self, frame: int, features: SAM2Features, prompts: Sequence[Prompts]) -> Look:
        """Show the objects in a frame for the first time; the frame is remembered as a prompted one.

        Args:
            frame: Its number.
            features: One row for each object.
            prompts: Of one form each; their `rows` together are all objects.
        """
        look = self.first(features, prompts)
        self.keep(frame, features, look, prompted=True)
        return look

    def follow(self, frame: int, features: SAM2Features, reverse: bool = False) -> Look:
        """Find the objects in a frame by what is remembered; the frame is remembered too.

        Args:
            frame: Its number.
            features: One row for each object.
            reverse: Whether frames are followed backwards.
        """
        conditioned = self.conditioned(frame, features, reverse)
        look = self.model.look(features, conditioned, None)
        self.keep(frame, features, look, prompted=False, reverse=reverse)
        return look

    def first(self, features: SAM2Features, prompts: Sequence[Prompts]) -> Look:
        """Answer prompts without a memory; nothing is remembered yet."""
        return self.answer(features, self.model.without_memory(features), prompts)

    def conditioned(self, frame: int, features: SAM2Features, reverse: bool = False) -> torch.Tensor:
        """A frame's features (Q, C, g, g) as they are with what is remembered."""
        now, policy = self._now(frame, features, reverse), self.model.memory
        memories, pointers = policy.features(self.bank, now), policy.pointers(self.bank, now)
        return self.model.recall(features, memories, pointers, self.frames)

    def answer(
        self, features: SAM2Features, conditioned: torch.Tensor, prompts: Sequence[Prompts], plain: bool = False
    ) -> Look:
        """Answer prompts of several forms about frames of which something may be remembered.

        Args:
            features: One row for each object.
            conditioned: (Q, C, g, g) the features as they are with what is remembered.
            prompts: Of one form each; their `rows` together are all objects.
            plain: Answer as the predictor of single images does.
        """
        answer = self.model.glance if plain else self.model.look
        if len(prompts) == 1 and prompts[0].rows is None:
            return answer(features, conditioned, prompts[0].to(conditioned.device))
        looks, places = [], []
        for asked in prompts:
            asked = asked.to(conditioned.device)
            rows = torch.arange(len(asked)) if asked.rows is None else asked.rows
            given = conditioned[rows.to(conditioned.device, non_blocking=True)]
            looks.append(answer(features.take(rows), given, asked))
            places.append(rows)
        return merged(looks, places)

    def keep(self, frame: int, features: SAM2Features, look: Look, prompted: bool, reverse: bool = False) -> None:
        """Remember a frame with its masks."""
        self.bank.add(self.model.remember(frame, features, look, prompted))
        if not self.model.training:
            self.model.memory.forget(self.bank, self._now(frame, features, reverse))

    def _now(self, frame: int, features: SAM2Features, reverse: bool) -> Moment:
        shape, training = self.model.shape, self.model.training
        embedding = features.top.mean((2, 3))
        return Moment(frame, self.frames, reverse, training, shape.memories, shape.pointers, embedding)
