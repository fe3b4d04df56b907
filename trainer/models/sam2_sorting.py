"""A memory for SAM2 that keeps what is sure and unlike the rest, rather than what came last.

Shapes: Q objects, N memories, P of them of prompted frames, C channels, D channels of a memory, g side of the features.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

import torch
import torch.nn.functional as F
from torch import Tensor

from data_shards.errors import UserError
from trainer.models.sam2_memory import Memory, MemoryBank, MemoryPolicy, Moment


class SelfSortingMemory(MemoryPolicy):
    """Medical SAM 2's self-sorting memory bank, for volumes and for images in no order.

    Source: Zhu et al. 2024 (arXiv:2408.00874v2), section 3.2, Eq. 2 to 5, and its public code, `func_2d/function.py`.

    - A frame enters if the IoU that its mask is predicted to have reaches a threshold.
    - The bank holds K frames. One too many, and the one leaves that is least unlike the others: the sum of 1 minus the
      cosine between its memory's features and each other one's is the smallest. The paper gives neither K nor the
      threshold; the code has K = 16 and no threshold.
    - A frame is told those of the bank that are most like it, by the cosine between the frames' features. The paper
      draws K of them with replacement, as likely as they are alike; nothing is drawn here: answers can be repeated.

    The code (for images; its volumes are followed with SAM2's own memory) has another rule: when K are there, a
    newcomer takes the place of the nearest neighbour of that member which it is least like, if it is less like that
    member than the neighbour is, and its predicted IoU no more than 0.1 below the neighbour's. It draws by a softmax of
    the cosines, and tells no places in time and no object pointers. The paper's rules are taken here.

    Neither says the following. Prompted frames never leave, and are told to every frame, as in SAM2. Each object has a
    bank of its own: it is followed alike in any company. A frame without the object does not enter. Where fewer frames
    have entered than are told, the prompted one that is most alike is told again. Likeness stands for nearness in time:
    the frame most alike is told as the one just before, and a prompted frame's object pointer as longer ago than all of
    these. So numbers of frames and directions have no influence, only what was seen before, in what order.

    A frame that is prompted after it was followed is not taken out of the bank again.

    Args:
        size: K, how many frames without a prompt are kept, 1 or more.
        confidence: Predicted IoU from which a frame enters, in [0, 1]; 0 lets all enter in which the object is.
        resample: Tell a frame what is most like it; otherwise what is least like the rest of the bank.
    """

    def __init__(self, size: int = 16, confidence: float = 0.5, resample: bool = True) -> None:
        if size < 1 or not 0 <= confidence <= 1:
            raise UserError(
                f"SelfSortingMemory: size is 1 or more and confidence in [0, 1], not {size} and {confidence}"
            )
        self.size, self.confidence, self.resample = size, confidence, resample

    def features(self, bank: MemoryBank, now: Moment) -> list[tuple[int, Memory]]:
        """See `MemoryPolicy.features`; the most alike has the place of the frame before."""
        told = [(now.memories - 1 - rank, memory) for rank, memory in enumerate(self._told(bank, now))]
        return [(0, memory) for memory in bank.prompted.values()] + told

    def pointers(self, bank: MemoryBank, now: Moment) -> list[tuple[int, Memory]]:
        """See `MemoryPolicy.pointers`; those of the frames whose features are told."""
        told = [(1 + rank, memory) for rank, memory in enumerate(self._told(bank, now))]
        return [(now.memories, memory) for memory in bank.prompted.values()] + told

    def forget(self, bank: MemoryBank, now: Moment) -> None:
        """See `MemoryPolicy.forget`: each object's bank is cut to its size."""
        others = list(bank.others.values())
        if len(others) <= self.size:
            return
        kept = self._kept(bank)
        order = kept.to(torch.uint8).argsort(dim=0, descending=True, stable=True)[: self.size]
        # of several frames each, by object: they have no number of their own any more
        bank.others = {memory.frame: memory for memory in _composed(others, order)}

    def _told(self, bank: MemoryBank, now: Moment) -> list[Memory]:
        """The memories of each object's bank that a frame is told, the most alike first."""
        prompted, others = list(bank.prompted.values()), list(bank.others.values())
        count = min(now.memories - 1, self.size, len(others))
        if not count:
            return []
        with torch.no_grad():
            kept = self._kept(bank)
            alike = _alike(others, now.embedding)
            score = alike if self.resample else _unlike(_likeness([*prompted, *others]), kept)
            best = score.masked_fill(~kept, -inf).topk(count, 0).indices
            if prompted:
                again = len(others) + _alike(prompted, now.embedding).argmax(0)
                best = torch.where(kept.gather(0, best), best, again)
        return _composed([*others, *prompted], best)

    @torch.no_grad()
    def _kept(self, bank: MemoryBank) -> Tensor:
        """Which frames without a prompt are in each object's bank, (N, Q) bool, having come one after another."""
        others = list(bank.others.values())
        kept = torch.stack([(memory.iou >= self.confidence) & (memory.presence > 0) for memory in others])
        if len(others) <= self.size:
            return kept
        likeness = _likeness([*bank.prompted.values(), *others])
        number = torch.arange(len(others), device=kept.device)[:, None]
        for last in range(self.size, len(others)):
            here = kept & (number <= last)
            least = _unlike(likeness, here).masked_fill(~here, inf).argmin(0)
            kept = kept & ~((number == least) & (here.sum(0) > self.size))
        return kept


def _likeness(memories: Sequence[Memory]) -> Tensor:
    """Cosines (Q, N, N) between the features of memories."""
    directions = torch.stack([F.normalize(memory.features.flatten(1).float(), dim=1) for memory in memories], 1)
    return directions @ directions.mT


def _unlike(likeness: Tensor, here: Tensor) -> Tensor:
    """How unlike each memory is to all that are there.

    Args:
        likeness: (Q, P + N, P + N), prompted ones first, which are always there.
        here: (N, Q) bool, which of the others are.

    Returns:
        (N, Q), for all of the others.
    """
    prompted = likeness.shape[1] - len(here)
    there = F.pad(here.T.float(), (prompted, 0), value=1.0)
    return ((1 - likeness[:, prompted:]) @ there[:, :, None])[..., 0].T


def _alike(memories: Sequence[Memory], embedding: Tensor) -> Tensor:
    """Cosines (N, Q) between the frames of memories and a frame with its embedding (Q, C)."""
    cosines = [F.cosine_similarity(memory.embedding.float(), embedding.float()) for memory in memories]
    return torch.stack([cosine.expand(len(memory.iou)) for cosine, memory in zip(cosines, memories, strict=True)])


def _composed(memories: Sequence[Memory], chosen: Tensor) -> list[Memory]:
    """Memories whose rows come from several frames.

    Args:
        memories: N memories.
        chosen: (K, Q) int64, from which of them each object takes.

    Returns:
        K memories with numbers below 0.
    """
    rows = torch.arange(chosen.shape[1], device=chosen.device)

    def take(name: str) -> Tensor:
        return torch.stack([getattr(memory, name) for memory in memories])[chosen, rows]

    names = ("features", "pointer", "presence", "iou")
    parts = {name: take(name).unbind() for name in names}
    embeddings = torch.stack([memory.embedding.expand(len(rows), -1) for memory in memories])[chosen, rows]
    return [
        Memory(
            frame=-1 - number,
            features=parts["features"][number],
            positions=memories[0].positions,  # of the grid alone: those of all frames
            pointer=parts["pointer"][number],
            presence=parts["presence"][number],
            iou=parts["iou"][number],
            embedding=embeddings[number],
        )
        for number in range(len(chosen))
    ]
