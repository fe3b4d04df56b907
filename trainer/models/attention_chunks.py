"""Attention with decomposed relative positions in chunks: what a CPU computes without ever keeping the scores.

A chunk of queries goes through scores, softmax and values while all of it lies in the cache. The backward pass computes
its scores again, so that queries, keys, values and the positions' tables are all that is kept: the idea of Rabe and
Staats 2021 (arXiv:2112.05682) and FlashAttention (Dao et al. 2022, arXiv:2205.14135). Sums are in a fixed order. For
autograd and torch.compile it is one operation.

Shapes: G images or windows times heads, H × W tokens, N = H W, d channels; positions by row (H, H, d) and by column
(W, W, d) of query and key.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

SCORES = 2**19
"""Scores of a chunk: 2 MiB in fp32, so that they and their softmax lie in a cache; measured."""
Slices = tuple[slice, slice]


@torch.library.custom_op("sam_trainer::chunked_attention", mutates_args=())
def attend_in_chunks(query: Tensor, key: Tensor, value: Tensor, rows: Tensor, columns: Tensor, scale: float) -> Tensor:
    """Attend.

    Args:
        query: (G, N, d), all of one type.
        key: (G, N, d).
        value: (G, N, d).
        rows: Positions by row (H, H, d).
        columns: Positions by column (W, W, d).
        scale: Factor on the products of queries and keys.

    Returns:
        (G, N, d).
    """
    with torch.autocast(query.device.type, enabled=False):
        query, key, value = (part.contiguous() for part in (query, key, value))
        chunks = _Chunks.of(query, key, rows, columns, scale)
        out = torch.empty_like(query)
        for part in chunks:
            weights = chunks.weights(part)
            out[part] = torch.bmm(weights.to(query.dtype), value[part[0]])
        return out


@torch.library.custom_op("sam_trainer::chunked_attention_backward", mutates_args=())
def _backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, rows: Tensor, columns: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of queries, keys, values and both tables."""
    with torch.autocast(query.device.type, enabled=False):
        grad, query, key, value = (part.contiguous() for part in (grad, query, key, value))
        chunks = _Chunks.of(query, key, rows, columns, scale)
        grids = (len(rows), len(columns))
        by_query = torch.empty_like(query)
        by_key, by_value = (torch.zeros_like(part, dtype=chunks.exact) for part in (key, value))
        by_row, by_column = (torch.empty(*query.shape[:2], side, dtype=chunks.exact) for side in grids)
        if query.device.type != "cpu":
            by_row, by_column = by_row.to(query.device), by_column.to(query.device)
        for part in chunks:
            group = part[0]
            weights, given = chunks.weights(part), grad[part]
            _add_product(by_value[group], weights.to(query.dtype).transpose(1, 2), given)
            scores = chunks.through_softmax(given, value[group], weights)
            grid = scores.unflatten(2, grids)
            torch.sum(grid, -1, out=by_row[part])
            torch.sum(grid, -2, out=by_column[part])
            low = scores.to(query.dtype)
            by_query[part] = torch.bmm(low, key[group]).mul_(scale)
            _add_product(by_key[group], low.transpose(1, 2), chunks.query[part])
        shape = (len(query), *grids, -1)
        asked, row, column = (part.to(query.dtype).view(shape) for part in (query, by_row, by_column))
        positions = torch.einsum("ghwk,hkc->ghwc", row, rows) + torch.einsum("ghwk,wkc->ghwc", column, columns)
        return (
            by_query.add_(positions.flatten(1, 2)),
            by_key.to(key.dtype),
            by_value.to(value.dtype),
            torch.einsum("ghwk,ghwc->hkc", row, asked).contiguous(),
            torch.einsum("ghwk,ghwc->wkc", column, asked).contiguous(),
        )


@dataclass
class _Chunks:
    """The chunks of one call and their memory, which is made once: fresh memory costs as much as the arithmetic.

    Attributes:
        query: Queries times the scale.
        key: Keys (G, d, N), a view.
        row: What positions add by row of the keys (G, N, H, 1).
        column: The same by column (G, N, 1, W).
        exact: What softmax and sums compute in.
    """

    query: Tensor
    key: Tensor
    row: Tensor
    column: Tensor
    exact: torch.dtype
    memory: dict[tuple[str, torch.dtype], Tensor]

    @classmethod
    def of(cls, query: Tensor, key: Tensor, rows: Tensor, columns: Tensor, scale: float) -> _Chunks:
        exact = torch.promote_types(query.dtype, torch.float32)
        grid = query.unflatten(1, (len(rows), len(columns)))
        row = torch.einsum("ghwc,hkc->ghwk", grid, rows).to(exact).flatten(1, 2)
        column = torch.einsum("ghwc,wkc->ghwk", grid, columns).to(exact).flatten(1, 2)
        return cls(query * scale, key.transpose(1, 2), row[..., None], column[..., None, :], exact, {})

    def __iter__(self) -> Iterator[Slices]:
        groups, tokens = self.query.shape[:2]
        height = max(1, min(tokens, SCORES // tokens))
        depth = max(1, SCORES // (tokens * tokens))
        for group in range(0, groups, depth):
            for token in range(0, tokens, height):
                yield slice(group, group + depth), slice(token, token + height)

    def weights(self, part: Slices) -> Tensor:
        """Softmax of a chunk's scores (g, n, N)."""
        query, key, row, column = self.query[part], self.key[part[0]], self.row[part], self.column[part]
        scores = self._room("scores", torch.Size((*query.shape[:2], key.shape[2])), self.exact)
        torch.add(row, column, out=scores.unflatten(2, (row.shape[2], column.shape[3])))
        _add_product(scores, query, key)
        return torch.softmax(scores, -1, out=self._room("weights", scores.shape, self.exact))

    def through_softmax(self, grad: Tensor, value: Tensor, weights: Tensor) -> Tensor:
        """Gradients of a chunk's scores (g, n, N), from those of what it gave."""
        given = self._product("scores", grad, value.transpose(1, 2))
        room = self._room("gradients", given.shape, self.exact)
        return torch._softmax_backward_data(given, weights, -1, self.exact, grad_input=room)

    def _product(self, name: str, one: Tensor, other: Tensor) -> Tensor:
        """A product in the exact type, from factors that may be of a lower one."""
        shape = torch.Size((one.shape[0], one.shape[1], other.shape[2]))
        found = torch.bmm(one, other, out=self._room(name, shape, one.dtype))
        return found if one.dtype == self.exact else self._room(name, shape, self.exact).copy_(found)

    def _room(self, name: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        known = self.memory.get((name, dtype))
        if known is None or known.numel() < shape.numel():
            known = self.memory[name, dtype] = torch.empty(shape.numel(), dtype=dtype, device=self.query.device)
        return known[: shape.numel()].view(shape)


def _add_product(total: Tensor, one: Tensor, other: Tensor) -> None:
    if total.dtype == one.dtype:
        total.baddbmm_(one, other)
    else:
        total.add_(torch.bmm(one, other))


@attend_in_chunks.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, rows: Tensor, columns: Tensor, scale: float) -> Tensor:
    return torch.empty_like(query, memory_format=torch.contiguous_format)


@_backward.register_fake
def _(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, rows: Tensor, columns: Tensor, scale: float
) -> tuple[Tensor, ...]:
    plain = torch.contiguous_format
    return tuple(torch.empty_like(part, memory_format=plain) for part in (query, key, value, rows, columns))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return (*_backward(grad, *ctx.saved_tensors, ctx.scale), None)


attend_in_chunks.register_autograd(_differentiate, setup_context=_keep)


def _products(query: tuple[int, ...], rows: tuple[int, ...], columns: tuple[int, ...]) -> tuple[int, int]:
    """FLOPs of one product of queries and keys, and of one with the positions' tables."""
    groups, tokens, channels = query
    return 2 * groups * tokens**2 * channels, 2 * groups * tokens * (rows[0] + columns[0]) * channels


@register_flop_formula(torch.ops.sam_trainer.chunked_attention)
def _forward_flops(query: Any, key: Any, value: Any, rows: Any, columns: Any, *_: Any, **__: Any) -> int:
    product, positions = _products(query, rows, columns)
    return 2 * product + positions


@register_flop_formula(torch.ops.sam_trainer.chunked_attention_backward)
def _backward_flops(grad: Any, query: Any, key: Any, value: Any, rows: Any, columns: Any, *_: Any, **__: Any) -> int:
    product, positions = _products(query, rows, columns)
    return 5 * product + 3 * positions
