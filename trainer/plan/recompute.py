"""Which blocks are computed twice so that a pass fits a memory: as few as that asks for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from data_shards.errors import UserError
from trainer.models.recomputing import is_recomputed, recomputed_for_now
from trainer.modules.tuned import TunedModule
from trainer.plan.activations import pass_bytes


@dataclass(frozen=True)
class Choice:
    """What was chosen.

    Attributes:
        blocks: The model's transformer blocks, in the order in which they are recomputed.
        count: How many of them are.
        activations: Bytes that a pass takes then, beside weights, gradients and the optimiser's.
        fits: Whether that fits.
    """

    blocks: Sequence[nn.Module]
    count: int
    activations: int
    fits: bool

    def __str__(self) -> str:
        return f"{self.count} of {len(self.blocks)} blocks are computed twice"


def choose(module: TunedModule, step: Callable[[], Tensor], precision: str, room: int) -> Choice:
    """The fewest blocks whose recomputation makes a pass fit; all of them where none does.

    Args:
        module: The module, on any device; nothing of it changes.
        step: Gives the loss of a pass on tensors without content.
        precision: As Lightning's trainer takes it.
        room: Bytes that a pass may take.

    Raises:
        UserError: Some blocks are computed twice already.
    """
    blocks = blocks_of(module)

    def taken(count: int) -> int:
        with recomputed_for_now(blocks[:count]), torch.compiler.set_stance("force_eager"):
            return pass_bytes(module, step, precision)

    count, activations = fewest(taken, len(blocks), room)
    return Choice(blocks, count, activations, activations <= room)


def blocks_of(module: TunedModule) -> list[nn.Module]:
    """A model's transformer blocks, the image encoder's first.

    Raises:
        UserError: Some are computed twice already.
    """
    kinds: dict[str, Sequence[nn.Module]] = {**module.model.block_kinds()}
    first = kinds.pop(module.model.encoder)
    blocks = [*first, *(block for others in kinds.values() for block in others)]
    if any(map(is_recomputed, blocks)):
        raise UserError(
            "RecomputeToFit chooses the blocks itself: set the model's checkpoint_activations to false, or leave it out"
        )
    return blocks


def fewest(taken: Callable[[int], int], most: int, room: int) -> tuple[int, int]:
    """The fewest recomputed blocks with which it fits.

    Args:
        taken: Bytes by recomputed blocks: fewer the more there are.
        most: All blocks.
        room: Bytes that there are.

    Returns:
        How many, and the bytes then; all of them where that does not fit either.
    """
    low, high, found = 0, most, {0: taken(0)}
    if found[0] <= room:
        return 0, found[0]
    found[most] = taken(most)
    while found[most] <= room and high - low > 1:
        middle = (low + high) // 2
        found[middle] = taken(middle)
        low, high = (low, middle) if found[middle] <= room else (middle, high)
    return high, found[high]
