"""Attention with SAM's decomposed relative positions, in several exact ways, one of them chosen by a measured rule.

A score is q·k s + q·a(y − y') + q·b(x − x'): a query of row y and column x asks tables a and b too (Li et al. 2022,
arXiv:2112.01526, section 4.1). The ways differ in what is kept for the backward pass, and in the kernels that they can
take; they give the same values and gradients but for rounding.

Shapes: B images or windows, h heads of d channels, H × W tokens, N = H W; G = B h.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.sam.configuration_sam import SamVisionConfig
from transformers.models.sam.modeling_sam import SamVisionAttention, SamVisionEncoder, SamVisionLayer

from data_shards.errors import UserError
from trainer import rehearsal
from trainer.models.attention_chunks import attend_in_chunks

Way = Literal["eager", "sdpa", "widened", "chunked", "flex"]
"""How attention is computed; see `MedSAM`."""
HALF = (torch.bfloat16, torch.float16)
FLASH = 256
"""The most channels of a head that flash attention takes."""
_needed = False


class SamVisionRelativeAttention(SamVisionAttention):
    """Attention of a SAM block: transformers' own, with its names and weights, computed in any of the ways.

    Args:
        plain: What it takes the place of; its parts become this one's.
        way: How to compute; None lets `chosen_way` choose at each call.
    """

    def __init__(self, plain: SamVisionAttention, way: Way | None = None) -> None:
        nn.Module.__init__(self)
        self.num_attention_heads, self.scale, self.dropout = plain.num_attention_heads, plain.scale, plain.dropout
        self.qkv, self.proj = plain.qkv, plain.proj
        self.use_rel_pos, self.rel_pos_h, self.rel_pos_w = True, plain.rel_pos_h, plain.rel_pos_w
        self.way = way
        self.train(plain.training)

    def forward(self, hidden_states: Tensor, output_attentions: bool | None = None) -> tuple[Tensor, None]:
        """Attend within images or windows.

        Args:
            hidden_states: Tokens (B, H, W, C).
            output_attentions: Weights are not given, since only one of the ways has them.

        Returns:
            Tokens (B, H, W, C), and None.
        """
        count, height, width, _ = hidden_states.shape
        qkv = self.qkv(hidden_states).reshape(count, height * width, 3, self.num_attention_heads, -1)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).reshape(3, -1, height * width, qkv.shape[-1]).unbind(0)
        rows, columns = lines(self.rel_pos_h, height), lines(self.rel_pos_w, width)
        way = WAYS[self.way or chosen_way(query)]
        mixed = way(query, key, value, rows, columns, self.scale, self.num_attention_heads)
        mixed = mixed.reshape(count, self.num_attention_heads, height, width, -1).permute(0, 2, 3, 1, 4)
        return self.proj(mixed.reshape(count, height, width, -1)), None

    def within_windows(self, tokens: Tensor, side: int) -> Tensor:
        """Attend within windows that do not divide the grid, as `SamVisionLayer` does by padding it with zeros.

        Tokens alone are projected, before and after: at 1024 px, 4096 in the place of 4900.

        Args:
            tokens: (B, H, W, C), normalised.
            side: Side S of a window.

        Returns:
            (B, H, W, C).
        """
        count, height, width, _ = tokens.shape
        down, across = -(-height // side), -(-width // side)
        heads, padded = self.num_attention_heads, projected(self.qkv, tokens, side)
        split = padded.view(count, down, side, across, side, 3, heads, -1).permute(5, 0, 1, 3, 6, 2, 4, 7)
        query, key, value = split.reshape(3, -1, side * side, split.shape[-1]).unbind(0)
        rows, columns = lines(self.rel_pos_h, side), lines(self.rel_pos_w, side)
        mixed = WAYS[self.way or chosen_way(query)](query, key, value, rows, columns, self.scale, heads)
        mixed = mixed.view(count, down, across, heads, side, side, -1).permute(0, 1, 4, 2, 5, 3, 6)
        whole = mixed.reshape(count, down * side, across * side, -1)[:, :height, :width]
        made: Tensor = self.proj(whole)
        return made

    def get_rel_pos(self, q_size: int, k_size: int, rel_pos: Tensor) -> Tensor:
        """Positions of a grid that asks itself, as all of SAM's do: see `lines`."""
        assert q_size == k_size
        return lines(rel_pos, q_size)

    @property
    def fused(self) -> bool:
        """Whether one kernel of torch's computes it where the weights are now."""
        return (self.way or chosen_way(self.rel_pos_h)) in ("sdpa", "widened", "flex")


class WindowedLayer(SamVisionLayer):
    """A SAM block whose windows do not divide the grid: transformers' own, but that padding is not projected.

    Args:
        plain: What it takes the place of; its parts become this one's.
    """

    def __init__(self, plain: SamVisionLayer) -> None:
        nn.Module.__init__(self)
        self.layer_norm1, self.attn = plain.layer_norm1, plain.attn
        self.layer_norm2, self.mlp = plain.layer_norm2, plain.mlp
        self.window_size = plain.window_size
        self.train(plain.training)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Attend within windows, then the MLP.

        Args:
            hidden_states: Tokens (B, H, W, C).
        """
        attention = self.attn
        if watched(attention) or told():  # adapters on attention are given whole windows, and exports stay as they are
            plain: Tensor = super().forward(hidden_states)
            return plain
        hidden_states = hidden_states + attention.within_windows(self.layer_norm1(hidden_states), self.window_size)
        changed: Tensor = hidden_states + self.mlp(self.layer_norm2(hidden_states))
        return changed


def encoder_with(config: SamVisionConfig, way: Way | None) -> SamVisionEncoder:
    """Make a SAM encoder: ``eager`` and ``sdpa`` are transformers' own, the rest is `SamVisionRelativeAttention`.

    Args:
        config: Its shape.
        way: How to attend; None lets `chosen_way` choose at each call.

    Raises:
        UserError: There is no such way.
    """
    if way is not None and way not in get_args(Way):
        raise UserError(f"attention {way}: there are {', '.join(get_args(Way))}, and null for what is best")
    config._attn_implementation = way if way in ("eager", "sdpa") else "eager"
    encoder = SamVisionEncoder(config)
    if way not in ("eager", "sdpa"):
        grid = config.image_size // config.patch_size
        for number, block in enumerate(encoder.layers):
            block.attn = SamVisionRelativeAttention(block.attn, way)
            if block.window_size and grid % block.window_size:
                encoder.layers[number] = WindowedLayer(block)
    return encoder


def projected(project: Callable[[Tensor], Tensor], tokens: Tensor, side: int) -> Tensor:
    """Make queries, keys and values of tokens, padded with zeros to whole windows, without projecting the zeros.

    Zeros are asked too: their keys and values are what the projection makes of a zero, which is the same for all.

    Args:
        project: Makes D channels of C.
        tokens: (B, H, W, C).
        side: Side S of a window.

    Returns:
        (B, H', W', D), H' and W' the next multiples of S.
    """
    height, width, channels = tokens.shape[1:]
    lower, wider, made = -height % side, -width % side, project(tokens)
    if lower or wider:
        count, empty = len(made), project(tokens.new_zeros(1, 1, 1, channels))
        made = torch.cat([made, empty.expand(count, height, wider, -1)], dim=2)
        made = torch.cat([made, empty.expand(count, lower, width + wider, -1)], dim=1)
    return made


def watched(attention: nn.Module) -> bool:
    """Whether somebody wants to see what attention is given: it must be called as it is."""
    return bool(attention._forward_hooks or attention._forward_pre_hooks or "forward" in vars(attention))


def told() -> bool:
    """Whether it is written down as a graph for others."""
    return torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export() or torch.jit.is_tracing()


def chosen_way(query: Tensor) -> Way:
    """Which way fits a device.

    On a CPU ``chunked``, in every precision: 1.5 times as fast as the reference's module in fp32 and 1.15 times in bf16
    (12 heads, 64 × 64 tokens, forward and backward, one core of an AMD EPYC; ``benchmarks/attention.py``). On a GPU
    ``widened``, which flash and memory-efficient kernels take: reasoned from what they can take, and not measured. What
    is exported or counted takes forms that any tool knows.

    Args:
        query: Queries; only where they are and of which type is looked at.
    """
    if told():
        return "eager"
    if _needed:
        return "sdpa"
    return "chunked" if query.device.type == "cpu" and not rehearsal.on_cuda() else "widened"


@contextmanager
def as_needed() -> Iterator[None]:
    """Take the form that computes no more than attention needs, where a way may be chosen: to count FLOPs.

    One-hot columns and padding of ``widened`` would count as progress otherwise.
    """
    global _needed
    before, _needed = _needed, True
    try:
        yield
    finally:
        _needed = before


def lines(table: Tensor, side: int) -> Tensor:
    """Positions by row (or column) of query and key.

    Args:
        table: By distance (2 L − 1, d), from −(L − 1) on; interpolated as SAM does if L is not `side`.
        side: Rows S of the grid.

    Returns:
        (S, S, d); no index crosses from the CPU to the device.
    """
    if len(table) != 2 * side - 1:
        table = F.interpolate(table.T[None], size=2 * side - 1, mode="linear")[0].T
    return table.flip(0).unfold(0, side, 1).flip(0).transpose(1, 2)


def relative_terms(query: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """What each query adds by row (G, N, H) and column (G, N, W) of the keys, from queries (G, N, d) as they are."""
    height, width = len(rows), len(columns)
    grid = query.unflatten(1, (height, width))
    by_row = torch.einsum("ghwc,hkc->ghwk", grid, rows)
    by_column = torch.einsum("ghwc,wkc->ghwk", grid, columns)
    return by_row.flatten(1, 2), by_column.flatten(1, 2)


def _bias(query: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """All of what positions add to the scores: (G, N, N)."""
    by_row, by_column = relative_terms(query, rows, columns)
    return (by_row[..., None] + by_column[..., None, :]).flatten(2)


def eager(
    query: Tensor, key: Tensor, value: Tensor, rows: Tensor, columns: Tensor, scale: float, heads: int = 1
) -> Tensor:
    """The plain form: scores, bias, softmax in fp32, and products with values, one after another.

    Args:
        query: (G, N, d).
        key: (G, N, d).
        value: (G, N, d).
        rows: Positions by row (H, H, d), see `lines`.
        columns: Positions by column (W, W, d).
        scale: Factor s on the products of queries and keys.
        heads: Heads h of an image, which kernels of four dimensions want to know.

    Returns:
        (G, N, d).
    """
    weights = (query * scale) @ key.transpose(-2, -1) + _bias(query, rows, columns)
    return F.softmax(weights, dtype=torch.float32 if query.dtype in HALF else None, dim=-1).to(query.dtype) @ value


def sdpa(
    query: Tensor, key: Tensor, value: Tensor, rows: Tensor, columns: Tensor, scale: float, heads: int = 1
) -> Tensor:
    """Torch's scaled-dot-product attention with the bias as a mask; arguments as of `eager`."""
    bias = _bias(query, rows, columns).unflatten(0, (-1, heads))
    query, key, value = (part.unflatten(0, (-1, heads)) for part in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale).flatten(0, 1)


def widened(
    query: Tensor, key: Tensor, value: Tensor, rows: Tensor, columns: Tensor, scale: float, heads: int = 1
) -> Tensor:
    """Scaled-dot-product attention without a mask: positions as further channels of queries and keys.

    q' = [q s, by row, by column] and k' = [k, one-hot of its row, one-hot of its column] have the same products. In
    half precision values are padded to the same channels, which flash attention asks for. Arguments as of `eager`.
    """
    channels, height, width = query.shape[-1], len(rows), len(columns)
    full = channels + height + width
    spare = -full % 8  # kernels want a multiple of 8
    by_row, by_column = relative_terms(query, rows, columns)
    wide = torch.cat([query * scale, by_row.to(query.dtype), by_column.to(query.dtype)], dim=-1)
    keys = torch.cat([key, _places(key, height, width).expand(len(key), -1, -1)], dim=-1)
    wide, keys = (F.pad(part, (0, spare)) if spare else part for part in (wide, keys))
    same = full + spare <= FLASH and query.dtype in HALF
    values = F.pad(value, (0, full + spare - channels)) if same else value
    wide, keys, values = (part.unflatten(0, (-1, heads)) for part in (wide, keys, values))
    return F.scaled_dot_product_attention(wide, keys, values, scale=1.0)[..., :channels].flatten(0, 1)


def _places(like: Tensor, height: int, width: int) -> Tensor:
    """Row and column of every token, one-hot: (N, H + W)."""
    row, column = (torch.eye(side, dtype=like.dtype, device=like.device) for side in (height, width))
    return torch.cat([row[:, None].expand(-1, width, -1), column.expand(height, -1, -1)], dim=-1).flatten(0, 1)


def chunked(
    query: Tensor, key: Tensor, value: Tensor, rows: Tensor, columns: Tensor, scale: float, heads: int = 1
) -> Tensor:
    """Scores in chunks that stay in the cache, computed again in the backward pass; arguments as of `eager`."""
    return attend_in_chunks(query, key, value, rows.to(query.dtype), columns.to(query.dtype), scale)


def flex(
    query: Tensor, key: Tensor, value: Tensor, rows: Tensor, columns: Tensor, scale: float, heads: int = 1
) -> Tensor:
    """FlexAttention, compiled; gradients of positions are summed up in any order. Arguments as of `eager`.

    Raises:
        UserError: It is not on a GPU, where alone torch has its backward pass.
    """
    if query.device.type != "cuda":
        raise UserError(
            f"attention flex: torch has FlexAttention's backward pass for GPUs alone, and this runs on "
            f"{query.device.type}: take null"
        )
    return flex_with(_flex_attention(), query, key, value, rows, columns, scale, heads)


def flex_with(
    kernel: Callable[..., Any],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rows: Tensor,
    columns: Tensor,
    scale: float,
    heads: int = 1,
) -> Tensor:
    """`flex` by torch's function, compiled or as it is."""
    width = len(columns)
    by_row, by_column = (part.unflatten(0, (-1, heads)) for part in relative_terms(query, rows, columns))

    def add_positions(score: Tensor, batch: Tensor, head: Tensor, asking: Tensor, asked: Tensor) -> Tensor:
        row, column = by_row[batch, head, asking, asked // width], by_column[batch, head, asking, asked % width]
        return score + row + column

    four = (part.unflatten(0, (-1, heads)) for part in (query, key, value))
    mixed: Tensor = kernel(*four, score_mod=add_positions, scale=scale)
    return mixed.flatten(0, 1)


def _flex_attention() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    found: Any = flex_attention if torch.compiler.is_compiling() else _compiled()
    kernel: Callable[..., Any] = found
    return kernel


@cache
def _compiled() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    made: Callable[..., Any] = torch.compile(flex_attention)
    return made


WAYS: dict[str, Callable[..., Tensor]] = {
    "eager": eager,
    "sdpa": sdpa,
    "widened": widened,
    "chunked": chunked,
    "flex": flex,
}
