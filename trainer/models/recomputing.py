"""Activation checkpointing of transformers' encoders: less memory, more time (Chen et al. 2016, arXiv:1604.06174)."""

from __future__ import annotations

from functools import partial

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
