"""Attention that sees visual prompts too: what is relied on inside each family's attention is in this file alone.

Prompts join the tokens of every window. They have no place in the image, so they get no relative positions and no
rotation; nothing else of attention changes. A new family is a few functions and an entry in `_KINDS`.

Shapes: B images, V windows of all images, N tokens a window, P prompts, C channels, h heads of d channels.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.sam.modeling_sam import SamVisionSdpaAttention

from data_shards.errors import UserError
from trainer.models.base import SegmentationModel
from trainer.models.blocks import Block

Split = tuple[Tensor, Tensor, Tensor]
"""Queries, keys and values, each (V, h, N, d)."""


@dataclass(frozen=True)
class Placed:
    """What attention computes from the tokens of windows, positions included.

    Attributes:
        query: Queries (V, h, N', d); pooling makes N' smaller than N.
        key: Keys (V, h, N, d).
        value: Values (V, h, N, d).
        grid: Sides of a window of queries.
        bias: What is added to the products of queries and keys (V or 1, h, N', N).
        fused: Whether the family computes this with one fused kernel.
        dropout: Dropout of attention's weights.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    grid: tuple[int, ...]
    bias: Tensor | None = None
    fused: bool = True
    dropout: float = 0.0


@dataclass(frozen=True)
class Kind:
    """How a family attends.

    Attributes:
        norm: The norm before attention, in a block; None if it is inside attention.
        output: Attention's linear layer at the end.
        needs: What attention's class must have, or functions its file must have.
        arguments: What attention's forward is known to take.
        split: Makes queries, keys and values of tokens (V, N, C), without positions.
        place: Does so for windows (V, …, C), with their positions and what else attention was given.
        pair: Whether attention gives a pair of tokens and weights.
        positions: What a block computes for attention besides, from windows; None where shallow prompts are not known.
    """

    norm: str | None
    output: str
    needs: tuple[str, ...]
    arguments: frozenset[str]
    split: Callable[[Any, Tensor], Split]
    place: Callable[[Any, Tensor, tuple[Any, ...]], Placed]
    pair: bool
    positions: Callable[[Any, Tensor], tuple[Any, ...]] | None = None


def kind_of(model: SegmentationModel, block: Block) -> Kind:
    """Find out how a block attends.

    Raises:
        UserError: The family is not known, or this release of its package is built otherwise.
    """
    layer, attention = type(model.get_submodule(block.name)), model.get_submodule(block.attention)
    kind = next((_KINDS[known.__name__] for known in layer.__mro__ if known.__name__ in _KINDS), None)
    if kind is None:
        raise UserError(f"visual prompts do not know how a {layer.__name__} attends: take another tuning method")
    made = next(known for known in type(attention).__mro__ if not known.__module__.startswith("trainer."))
    file = sys.modules[made.__module__]
    lacking = [name for name in kind.needs if not hasattr(attention, name) and not hasattr(file, name)]
    given = [*inspect.signature(type(attention).forward).parameters.values()][1:]
    taken = [parameter.name for parameter in given if parameter.kind != parameter.VAR_KEYWORD]
    if lacking or not kind.arguments.issuperset(taken):
        what = f"lacks {', '.join(lacking)}" if lacking else f"takes {', '.join(taken)}"
        raise UserError(
            f"visual prompts do not know this release's {made.__module__}.{made.__name__}, which {what}: take a"
            " release that the dependencies of this package allow, or another tuning method"
        )
    return kind


def attend(
    attention: nn.Module, kind: Kind, windows: Tensor, prompts: Tensor, rest: tuple[Any, ...] = (), ask: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Attend within windows and to prompts.

    Args:
        attention: The family's attention.
        kind: How it attends.
        windows: Tokens (V, …, C) as attention is given them.
        prompts: Prompts of every image (B, P, C), or of all (1, P, C), normalised unless attention does so itself.
        rest: What else attention is given.
        ask: Whether prompts are asked too, not only seen.

    Returns:
        Tokens (V, …, C'), and the prompts' own (V, P, C') if they were asked.
    """
    own = kind.place(attention, windows, rest)
    query, key, value = own.query, own.key, own.value
    asked, *seen = (
        part.expand(windows.shape[0], -1, -1, -1)
        if prompts.shape[0] == 1
        else part.repeat_interleave(_ratio(windows, part), 0)
        for part in kind.split(attention, prompts)
    )
    count = prompts.shape[1]
    key, value = (torch.cat(parts, dim=2) for parts in zip(seen, (key, value), strict=True))
    bias = own.bias
    if ask:
        query = torch.cat([asked, query], dim=2)
    if bias is not None:
        bias = F.pad(bias, (count, 0, count if ask else 0, 0))
    dropout = own.dropout if attention.training else 0.0
    mixed = _mix(query, key, value, bias, own.fused, dropout).transpose(1, 2).flatten(2)
    output: Tensor = attention.get_submodule(kind.output)(mixed)
    if ask:
        return output[:, count:].unflatten(1, own.grid), output[:, :count]
    return output.unflatten(1, own.grid), None


def _ratio(windows: Tensor, part: Tensor) -> int:
    """Windows an image."""
    return windows.shape[0] // part.shape[0]


def _mix(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, fused: bool, dropout: float) -> Tensor:
    """Attention itself, (V, h, N', d), with the kernel that the family has chosen."""
    if fused:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, dropout_p=dropout)
    weights = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)
    weights = weights if bias is None else weights + bias
    weights = F.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype)
    return F.dropout(weights, p=dropout) @ value


def _split_fused(qkv: Tensor, heads: int) -> Split:
    """Queries, keys and values that come one after another in a fused layer's outputs (V, N, 3C)."""
    query, key, value = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    return query, key, value


def _sam_split(attention: Any, tokens: Tensor) -> Split:
    return _split_fused(attention.qkv(tokens), attention.num_attention_heads)


def _sam_place(attention: Any, windows: Tensor, rest: tuple[Any, ...]) -> Placed:
    grid = (windows.shape[1], windows.shape[2])
    query, key, value = _sam_split(attention, windows.flatten(1, 2))
    bias = None
    if attention.use_rel_pos:
        flat = query.flatten(0, 1)
        bias = attention.get_decomposed_rel_pos(flat, attention.rel_pos_h, attention.rel_pos_w, grid, grid)
        bias = bias.reshape(*query.shape[:3], key.shape[2])
    fused = isinstance(attention, SamVisionSdpaAttention) or getattr(attention, "fused", False)
    return Placed(query, key, value, grid, bias, fused, 0.0 if fused else attention.dropout)


def _tiny_vit_split(attention: Any, tokens: Tensor) -> Split:
    qkv = attention.qkv(attention.norm(tokens)).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
    query, key, value = qkv.split([attention.key_dim, attention.key_dim, attention.val_dim], dim=-1)
    return query, key, value


def _tiny_vit_place(attention: Any, windows: Tensor, rest: tuple[Any, ...]) -> Placed:
    bias = attention.get_attention_biases(windows.device)[None]
    return Placed(*_tiny_vit_split(attention, windows), (windows.shape[1],), bias, attention.fused_attn)


def _hiera_split(attention: Any, tokens: Tensor) -> Split:
    return _split_fused(attention.qkv(tokens), attention.num_heads)


def _hiera_place(attention: Any, windows: Tensor, rest: tuple[Any, ...]) -> Placed:
    grid = (windows.shape[1], windows.shape[2])
    query, key, value = _hiera_split(attention, windows.flatten(1, 2))
    if attention.q_pool:
        heads = query.shape[1]
        pooled = attention.q_pool(query.transpose(2, 3).flatten(1, 2).unflatten(2, grid))  # (V, h·d, sides)
        grid = (pooled.shape[2], pooled.shape[3])
        query = pooled.flatten(2).unflatten(1, (heads, -1)).transpose(2, 3)
    return Placed(query, key, value, grid)


def _sam3_split(attention: Any, tokens: Tensor) -> Split:
    heads = (attention.num_attention_heads, -1)
    query, key, value = (
        layer(tokens).unflatten(-1, heads).transpose(1, 2)
        for layer in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    return query, key, value


def _sam3_place(attention: Any, windows: Tensor, rest: tuple[Any, ...]) -> Placed:
    from transformers.models.sam3.modeling_sam3 import apply_rotary_pos_emb_2d

    cos, sin = rest[0]
    query, key, value = _sam3_split(attention, windows.flatten(1, 2))
    query, key = apply_rotary_pos_emb_2d(query, key, cos=cos, sin=sin)
    grid = (windows.shape[1], windows.shape[2])
    return Placed(query, key, value, grid, dropout=attention.attention_dropout)


def _no_positions(block: Any, windows: Tensor) -> tuple[Any, ...]:
    return ()


def _sam3_positions(block: Any, windows: Tensor) -> tuple[Any, ...]:
    return (block.rotary_emb(windows, block.position_ids),)


_KINDS = {
    "SamVisionLayer": Kind(
        norm="layer_norm1",
        output="proj",
        needs=("qkv", "proj", "num_attention_heads", "use_rel_pos", "get_decomposed_rel_pos", "dropout"),
        arguments=frozenset({"hidden_states", "output_attentions"}),
        split=_sam_split,
        place=_sam_place,
        pair=True,
        positions=_no_positions,
    ),
    "TinyVitBlock": Kind(
        norm=None,
        output="proj",
        needs=("norm", "qkv", "proj", "num_heads", "key_dim", "val_dim", "get_attention_biases", "fused_attn"),
        arguments=frozenset({"x"}),
        split=_tiny_vit_split,
        place=_tiny_vit_place,
        pair=False,
    ),
    "MultiScaleBlock": Kind(
        norm="norm1",
        output="proj",
        needs=("qkv", "proj", "num_heads", "q_pool"),
        arguments=frozenset({"x"}),
        split=_hiera_split,
        place=_hiera_place,
        pair=False,
    ),
    "Sam3ViTLayer": Kind(
        norm="layer_norm1",
        output="o_proj",
        needs=(
            *("q_proj", "k_proj", "v_proj", "o_proj", "num_attention_heads", "attention_dropout"),
            "apply_rotary_pos_emb_2d",
        ),
        arguments=frozenset({"hidden_states", "position_embeddings"}),
        split=_sam3_split,
        place=_sam3_place,
        pair=True,
        positions=_sam3_positions,
    ),
}
