"""Visual prompt tuning (VPT: Jia et al. 2022, arXiv:2203.12119): learned tokens beside the image's.

Shapes: B images, H W the image's tokens, P prompts, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from data_shards.errors import UserError
from trainer.models.base import SegmentationModel
from trainer.models.blocks import Block
from trainer.tuning.added import AddedTuning
from trainer.tuning.attach import attach
from trainer.tuning.prompted_attention import Kind, attend, kind_of

PART = "prompts"
"""Name of the prompts in the attention, or for shallow ones the block, that they enter."""


class VisualPrompts(nn.Module):
    """Prompts of one block.

    Args:
        count: Their number P.
        width: Channels C of the block's tokens.
        bound: They start uniform between ± this.
        dropout: Dropout on them, in training.
    """

    def __init__(self, count: int, width: int, bound: float, dropout: float) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.empty(count, width))
        self.dropout = nn.Dropout(dropout)
        nn.init.uniform_(self.tokens, -bound, bound)

    def forward(self) -> Tensor:
        """Give the prompts, (1, P, C); what is dropped is the same for all images and windows."""
        prompts: Tensor = self.dropout(self.tokens)[None]
        return prompts


class VisualPromptTuning(AddedTuning):
    """Learned tokens that the frozen encoder's attention sees besides the image's.

    Deep: every block has its own. What a block computes at them is thrown away, as the next block brings its own, so
    they act as keys and values of attention alone. Shallow: they enter the first block and go through all of them, in
    attention, where they are asked too, and in the MLP; then they are dropped. Shallow needs an encoder of constant
    width (SAM's and SAM3's ViT).

    In windowed attention prompts join every window, and what shallow prompts get back is averaged over an image's
    windows, as VPT does for Swin. Prompts have no place in the image: no relative positions, no rotation. They start
    uniform within √(6 / (inputs of the patch embedding + C)), VPT's rule.

    Outputs change at once: a new key takes a share of attention, even if its value is zero. Prompts cannot be folded
    into the weights for exports.

    Args:
        tokens: Prompts a block, or in all if shallow.
        deep: Own prompts in every block, instead of some at the first.
        dropout: Dropout on prompts, in training.
        train: What learns fully besides, as name prefixes or shell patterns.
        rates: Factors on the learning rate by name prefix or shell pattern; where several fit, the last counts.
    """

    def __init__(
        self,
        tokens: int = 10,
        deep: bool = True,
        dropout: float = 0.0,
        train: Sequence[str] = ("mask_decoder",),
        rates: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__(train, rates)
        if tokens < 1:
            raise UserError(f"tokens is 1 prompt or more, not {tokens}: without prompts take FrozenEncoderTuning")
        if not 0 <= dropout < 1:
            raise UserError(f"dropout is in [0, 1), not {dropout}")
        self.tokens, self.deep, self.dropout = tokens, deep, dropout

    def add(self, model: SegmentationModel, blocks: Sequence[Block]) -> None:
        """Put the prompts into the blocks.

        Raises:
            UserError: The family's attention is not known, or shallow prompts are asked of a pyramid.
        """
        kinds = [kind_of(model, block) for block in blocks]
        if not self.deep:
            self._enter(model, blocks, kinds)
            return
        for block, kind in zip(blocks, kinds, strict=True):
            attention = model.get_submodule(block.attention)
            attach(attention, PART, self._prompts(model, block), _unchanged)
            norm = None if kind.norm is None else model.get_submodule(f"{block.name}.{kind.norm}")
            _compute(attention, partial(_deep, attention=attention, norm=norm, kind=kind))

    def _enter(self, model: SegmentationModel, blocks: Sequence[Block], kinds: Sequence[Kind]) -> None:
        widths = {width for block in blocks for width in (block.width_in, block.width)}
        if len(widths) > 1 or any(kind.positions is None for kind in kinds):
            raise UserError(
                f"VisualPromptTuning: shallow prompts go through all blocks, and those of {type(model).__name__} are "
                "not all of one width: set deep to true"
            )
        attach(model.get_submodule(blocks[0].name), PART, self._prompts(model, blocks[0]), _unchanged)
        for block, kind in zip(blocks, kinds, strict=True):
            layer, attention = model.get_submodule(block.name), model.get_submodule(block.attention)
            ends = (block is blocks[0], block is blocks[-1])
            compute = partial(_block, layer=layer, attention=attention, kind=kind, count=self.tokens, ends=ends)
            _compute(layer, partial(_shallow, layer=layer, compute=compute))

    def _prompts(self, model: SegmentationModel, block: Block) -> VisualPrompts:
        return VisualPrompts(
            self.tokens, block.width_in, math.sqrt(6 / (_patch_inputs(model) + block.width_in)), self.dropout
        )


def _patch_inputs(model: SegmentationModel) -> int:
    """Inputs of a channel of the patch embedding: 3 · 16² in SAM's ViT."""
    named = ((name, module) for name, module in model.named_modules() if isinstance(module, nn.Conv2d))
    parts = model.patch_embedding
    inside = (module for name, module in named if any(name == part or name.startswith(part + ".") for part in parts))
    first = next(inside, None)
    return 0 if first is None else first.weight[0].numel()


def _compute(module: nn.Module, forward: Any) -> None:
    """Let a module compute with another function, under its own name and with its own parameters."""
    module.forward = forward


def _unchanged(part: nn.Module, given: Any, output: Any) -> Any:
    """Change nothing: what the part does is in the module's forward."""
    return output


def _deep(*inputs: Any, attention: nn.Module, norm: nn.Module | None, kind: Kind, **named: Any) -> Any:
    """Attention's forward with prompts of its own."""
    windows, *rest = *inputs, *named.values()
    prompts = attention.get_submodule(PART)()
    output, _ = attend(attention, kind, windows, prompts if norm is None else norm(prompts), tuple(rest))
    return (output, None) if kind.pair else output


def _shallow(hidden_states: Tensor, *, layer: Any, compute: Callable[[Tensor], Tensor], **named: Any) -> Tensor:
    """A block's forward with prompts that came from the block before; recomputed in the backward pass if asked."""
    # older releases of transformers see to that in the layer's call, newer ones in the forward that is replaced here
    if "__call__" not in vars(GradientCheckpointingLayer) and layer.gradient_checkpointing and layer.training:
        recomputed: Tensor = layer._gradient_checkpointing_func(compute, hidden_states)
        return recomputed
    return compute(hidden_states)


def _block(
    hidden: Tensor, *, layer: Any, attention: nn.Module, kind: Kind, count: int, ends: tuple[bool, bool]
) -> Tensor:
    """One block on tokens (B, H, W, C) with prompts in rows below them, where it is not the first or last."""
    first, last = ends
    if first:
        tokens, prompts = hidden, layer.get_submodule(PART)().expand(hidden.shape[0], -1, -1)
    else:
        tokens, prompts = _unpack(hidden, count)
    windows = _partition(layer.layer_norm1(tokens), layer.window_size)
    assert kind.positions is not None
    rest = kind.positions(layer, windows)
    output, answers = attend(attention, kind, windows, layer.layer_norm1(prompts), rest, ask=not last)
    tokens = tokens + _unpartition(output, layer.window_size, tokens)
    tokens = tokens + _mlp(layer, tokens)
    if answers is None:
        return tokens
    prompts = prompts + answers.unflatten(0, (tokens.shape[0], -1)).mean(1)
    return _pack(tokens, prompts + _mlp(layer, prompts))


def _mlp(layer: Any, tokens: Tensor) -> Tensor:
    """The MLP's path of a block, dropout included where the family has one."""
    output: Tensor = layer.mlp(layer.layer_norm2(tokens))
    return layer.dropout(output) if hasattr(layer, "dropout") else output


def _pack(tokens: Tensor, prompts: Tensor) -> Tensor:
    """Put prompts (B, P, C) into rows below tokens (B, H, W, C): blocks hand one tensor on."""
    width = tokens.shape[2]
    rows = F.pad(prompts, (0, 0, 0, -prompts.shape[1] % width))
    return torch.cat([tokens, rows.unflatten(1, (-1, width))], dim=1)


def _unpack(hidden: Tensor, count: int) -> tuple[Tensor, Tensor]:
    rows = -(-count // hidden.shape[2])
    return hidden[:, :-rows], hidden[:, -rows:].flatten(1, 2)[:, :count]


def _partition(tokens: Tensor, side: int) -> Tensor:
    """Cut tokens (B, H, W, C) into windows (V, side, side, C), with zeros where they reach over; all in one if 0."""
    if not side:
        return tokens
    padded = F.pad(tokens, (0, 0, 0, -tokens.shape[2] % side, 0, -tokens.shape[1] % side))
    return padded.unflatten(2, (-1, side)).unflatten(1, (-1, side)).transpose(2, 3).flatten(0, 2)


def _unpartition(windows: Tensor, side: int, like: Tensor) -> Tensor:
    """Put windows together again: (B, H, W, C) like the tokens they were cut from."""
    if not side:
        return windows
    rows, columns = (-(-like.shape[axis] // side) for axis in (1, 2))
    image = windows.unflatten(0, (-1, rows, columns)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
    return image[:, : like.shape[1], : like.shape[2]]
