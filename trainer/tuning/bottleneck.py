"""The adapter of all adapter methods: a bottleneck, and the two places where it can be put.

Shapes: tokens are (..., C), with any number of dimensions before the channels.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, Literal

from torch import Tensor, nn

from data_shards.errors import UserError
from trainer.models.blocks import Block
from trainer.tuning.attach import attach

PART = "adapter"
"""Name of an adapter in the module that it changes."""


class Bottleneck(nn.Module):
    """scale · Up(activation(Down(tokens))); zero until it has learnt, since Up starts at zero.

    Args:
        width: Channels C of the tokens.
        hidden: Channels between Down and Up.
        activation: ``gelu`` or ``relu``.
        scale: Factor on the result.
    """

    def __init__(
        self, width: int, hidden: int, activation: Literal["gelu", "relu"] = "gelu", scale: float = 1.0
    ) -> None:
        super().__init__()
        self.down = nn.Linear(width, hidden)
        self.activation = nn.GELU() if activation == "gelu" else nn.ReLU()
        self.up = nn.Linear(hidden, width)
        self.scale = scale
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)

    def forward(self, tokens: Tensor) -> Tensor:
        """Transform tokens (..., C) into what is added to them (..., C)."""
        added: Tensor = self.up(self.activation(self.down(tokens)))
        return added if self.scale == 1 else self.scale * added

    def extra_repr(self) -> str:
        """Say the factor."""
        return f"scale={self.scale}"


def put_after(model: nn.Module, name: str, adapter: Bottleneck) -> None:
    """Put an adapter behind a module: what it gives goes through the adapter, and around it."""
    attach(model.get_submodule(name), PART, adapter, after)


def put_beside_mlp(model: nn.Module, block: Block, adapter: Bottleneck) -> None:
    """Put an adapter beside a block's MLP: it sees the same normalised tokens, and both results are added."""
    norm = None if block.mlp_norm is None else model.get_submodule(block.mlp_norm)
    attach(model.get_submodule(block.mlp), PART, adapter, beside if norm is None else partial(beside, norm=norm))


def after(adapter: nn.Module, given: Any, output: Tensor) -> Tensor:
    """The change of a serial adapter with a skip."""
    changed: Tensor = output + adapter(output)
    return changed


def beside(adapter: nn.Module, given: Tensor, output: Tensor, norm: nn.Module | None = None) -> Tensor:
    """The change of a parallel adapter; `norm` is the one that the module begins with, if it has one inside."""
    changed: Tensor = output + adapter(given if norm is None else norm(given))
    return changed


def check_bottleneck(bottleneck: int) -> int:
    """Refuse a bottleneck without channels."""
    if bottleneck < 1:
        raise UserError(f"bottleneck is 1 channel or more, not {bottleneck}")
    return bottleneck


def check_ratio(ratio: float) -> float:
    """Refuse a ratio that leaves no channels, or makes no bottleneck."""
    if not 0 < ratio <= 1:
        raise UserError(f"ratio is the adapter's channels over the block's, above 0 and at most 1, not {ratio}")
    return ratio


def check_scale(scale: float) -> float:
    """Refuse a factor that switches adapters off."""
    if not 0 < scale < math.inf:
        raise UserError(f"scale is above 0, not {scale}: at 0 an adapter would do nothing")
    return scale


def channels(width: int, ratio: float) -> int:
    """Channels of a bottleneck that is a ratio of a block's width."""
    return max(1, int(width * ratio))
