"""Activation checkpointing: less memory, more time (Chen et al. 2016, arXiv:1604.06174)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from data_shards.errors import UserError, nearest

Recomputed = bool | list[str]
"""Which kinds of blocks are computed a second time in the backward pass; true is all of them."""


def recomputed_kinds(asked: bool | Sequence[str], kinds: Sequence[str]) -> set[str]:
    """Read a model's ``checkpoint_activations``.

    Args:
        asked: True, false, or names of kinds.
        kinds: Those that the model has.

    Raises:
        UserError: It has no such kind.
    """
    if isinstance(asked, bool):
        return set(kinds) if asked else set()
    for name in asked:
        if name not in kinds:
            raise UserError(f"checkpoint_activations: no blocks of kind {name}{nearest(name, kinds)}")
    return set(asked)


def recompute_layers(encoder: nn.Module) -> None:
    """Compute each layer of an encoder a second time in the backward pass, in training.

    transformers' own switch would also make a frozen encoder's embeddings require gradients.
    """
    for layer in encoder.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.gradient_checkpointing = True
            layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)


def recompute_blocks(blocks: Iterable[nn.Module]) -> None:
    """Compute each of some blocks a second time in the backward pass, in training."""
    for block in blocks:
        block.forward = _Recomputed(block, block.forward)


@contextmanager
def recomputed_for_now(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Compute each of some blocks a second time until the context ends, to see what that saves."""
    before = [block.__dict__.get("forward") for block in blocks]
    recompute_blocks(blocks)
    try:
        yield
    finally:
        for block, own in zip(blocks, before, strict=True):
            if own is None:
                del block.forward
            else:
                block.forward = own


def is_recomputed(block: nn.Module) -> bool:
    """Whether a block is computed a second time in the backward pass, in training."""
    return isinstance(block.forward, _Recomputed) or bool(getattr(block, "gradient_checkpointing", False))


def plain_forward(block: nn.Module) -> Callable[..., Any]:
    """A block's forward pass without what recomputes it."""
    return block.forward.forward if isinstance(block.forward, _Recomputed) else block.forward


def wrap_forward(block: nn.Module, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Put something around a block's forward pass; inside of its recomputation, where there is one."""
    if isinstance(block.forward, _Recomputed):
        block.forward.forward = wrap(block.forward.forward)
    else:
        block.forward = wrap(block.forward)


class _Recomputed:
    """A block's forward pass that keeps its inputs alone; a class, so that a copied block calls its own."""

    def __init__(self, block: nn.Module, forward: Any) -> None:
        self.block, self.forward = block, forward

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        if self.block.training and torch.is_grad_enabled():
            return checkpoint(self.forward, *inputs, use_reentrant=False, **named)
        return self.forward(*inputs, **named)
