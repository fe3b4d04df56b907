"""What SAM2 remembers of the frames it has seen, and which of it a frame is told.

Shapes: Q objects, C channels, D channels of a memory, g side of the features.
Source: Ravi et al. 2024 (arXiv:2408.00714), section 4, "Memory bank".
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class Memory:
    """What is remembered of a frame.

    Attributes:
        frame: Its number.
        features: (Q, D, g, g) its features with the mask in them.
        positions: (1, D, g, g) where they are, for every object.
        pointer: (Q, C) the decoder's token of each object.
        presence: (Q,) logits of the object's being there.
        iou: (Q,) IoU that the mask was predicted to have.
        embedding: (Q, C) the frame's own features, averaged over it.
        prompted: Whether the frame was shown with prompts.
    """

    frame: int
    features: Tensor
    positions: Tensor
    pointer: Tensor
    presence: Tensor
    iou: Tensor
    embedding: Tensor
    prompted: bool = False


@dataclass
class MemoryBank:
    """The memories of the frames so far.

    Attributes:
        prompted: Those of prompted frames, by number; they stay.
        others: Those of the other frames, by number.
    """

    prompted: dict[int, Memory] = field(default_factory=dict)
    others: dict[int, Memory] = field(default_factory=dict)

    def add(self, memory: Memory) -> None:
        """Keep a memory; a frame that was kept before is replaced."""
        self.others.pop(memory.frame, None)
        (self.prompted if memory.prompted else self.others)[memory.frame] = memory

    def __iter__(self) -> Iterator[Memory]:
        yield from self.prompted.values()
        yield from self.others.values()


@dataclass(frozen=True)
class Moment:
    """A frame that is about to be looked at.

    Attributes:
        frame: Its number.
        frames: Number of frames of the whole.
        reverse: Whether frames are followed backwards.
        training: Whether gradients are wanted.
        memories: How many frames are remembered as features, the prompted ones counted as one.
        pointers: How many are remembered as object pointers, at most.
        embedding: (Q, C) the frame's own features, averaged over it.
    """

    frame: int
    frames: int
    reverse: bool
    training: bool
    memories: int
    pointers: int
    embedding: Tensor

    @property
    def sign(self) -> int:
        """1 forwards, −1 backwards."""
        return -1 if self.reverse else 1


class MemoryPolicy(ABC):
    """Chooses among memories. It holds nothing itself: what it chooses is a function of the bank and the moment."""

    @abstractmethod
    def features(self, bank: MemoryBank, now: Moment) -> list[tuple[int, Memory]]:
        """Choose whose features a frame attends to.

        Returns:
            Each with its place in time: 0 for a prompted frame, else 1 (longest ago) to ``memories - 1`` (the frame
            before).
        """

    def pointers(self, bank: MemoryBank, now: Moment) -> list[tuple[int, Memory]]:
        """Choose whose object pointers a frame attends to, each with how many frames ago it was."""
        # in evaluation SAM 2.1 takes no prompted frames that are still to come
        chosen = [
            ((now.frame - frame) * now.sign, memory)
            for frame, memory in bank.prompted.items()
            if now.training or (now.frame - frame) * now.sign >= 0
        ]
        for ago in range(1, min(now.frames, now.pointers)):
            memory = bank.others.get(now.frame - ago * now.sign)
            if memory is not None:
                chosen.append((ago, memory))
        return chosen

    @abstractmethod
    def forget(self, bank: MemoryBank, now: Moment) -> None:
        """Drop the memories that no later frame can ask for."""


class RecentMemory(MemoryPolicy):
    """SAM2's own: all prompted frames, and the frames just before."""

    def features(self, bank: MemoryBank, now: Moment) -> list[tuple[int, Memory]]:
        """See `MemoryPolicy.features`."""
        chosen = [(0, memory) for memory in bank.prompted.values()]
        for place in range(1, now.memories):
            memory = bank.others.get(now.frame - (now.memories - place) * now.sign)
            if memory is not None:
                chosen.append((place, memory))
        return chosen

    def forget(self, bank: MemoryBank, now: Moment) -> None:
        """See `MemoryPolicy.forget`: what is near is kept, and what is near a prompt, where backwards begins."""
        near = [now.frame, *bank.prompted]
        for frame in list(bank.others):
            if all(abs(frame - other) > now.pointers for other in near):
                del bank.others[frame]
