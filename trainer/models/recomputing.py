"""Activation checkpointing: less memory, more time (Chen et al. 2016, arXiv:1604.06174)."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer


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


class _Recomputed:
    """A block's forward pass that keeps its inputs alone; a class, so that a copied block calls its own."""

    def __init__(self, block: nn.Module, forward: Any) -> None:
        self.block, self.forward = block, forward

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        if self.block.training and torch.is_grad_enabled():
            return checkpoint(self.forward, *inputs, use_reentrant=False, **named)
        return self.forward(*inputs, **named)
