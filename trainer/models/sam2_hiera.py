"""SAM2's Hiera, computed without what it wastes: padding, slow kernels, an interpolation that is a small product.

Shapes: B images, H × W tokens, C channels, S a window's side, V windows of all images, h heads of d channels.
Source: Ryali et al. 2023 (arXiv:2306.00989); the package `sam2`, whose parts and names these are.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from sam2.modeling.backbones.hieradet import Hiera, MultiScaleBlock, do_pool
from torch import Tensor, nn

from trainer import rehearsal
from trainer.models.attention import HALF, projected, told, watched


class HieraBlock(MultiScaleBlock):
    """A block of Hiera: the package's own, but that padding of windows is not projected, and windows attend faster.

    Args:
        plain: What it takes the place of; its parts become this one's.
    """

    def __init__(self, plain: MultiScaleBlock) -> None:
        nn.Module.__init__(self)
        self.__dict__.update(vars(plain))

    def forward(self, x: Tensor) -> Tensor:
        """Attend within windows or the image, then the MLP.

        Args:
            x: Tokens (B, H, W, C).

        Returns:
            (B, H', W', C'), half as many rows and columns where a stage begins.
        """
        side = self.window_size
        gains = side and (x.shape[1] % side or x.shape[2] % side or _in_steps(x))
        across_windows = self.pool is not None and side % self.q_stride[0]
        if not gains or across_windows or watched(self.attn) or told():
            plain: Tensor = super().forward(x)
            return plain
        normed = self.norm1(x)
        shortcut = do_pool(self.proj(normed), self.pool) if self.dim != self.dim_out else x
        x = shortcut + self.drop_path(self._within_windows(normed))
        changed: Tensor = x + self.drop_path(self.mlp(self.norm2(x)))
        return changed

    def _within_windows(self, tokens: Tensor) -> Tensor:
        """Attend within windows; tokens alone are projected, before and after (`projected`).

        Args:
            tokens: (B, H, W, C), normalised.

        Returns:
            (B, H', W', C'), as `forward`.
        """
        attention: Any = self.attn
        side, heads = self.window_size, attention.num_heads
        query, key, value = projected(attention.qkv, tokens, side).chunk(3, dim=-1)
        (height, width), asking = tokens.shape[1:3], side
        if self.pool is not None:
            query, asking = do_pool(query, self.pool), side // self.q_stride[0]
            height, width = height // self.q_stride[0], width // self.q_stride[1]
        down, across = query.shape[1] // asking, query.shape[2] // asking
        asked = (_windows(part, edge, heads) for part, edge in ((query, asking), (key, side), (value, side)))
        mixed = within(*asked).view(len(tokens), down, across, heads, asking, asking, -1)
        whole = mixed.permute(0, 1, 4, 2, 5, 3, 6).reshape(len(tokens), down * asking, across * asking, -1)
        made: Tensor = attention.proj(whole[:, :height, :width])
        return made


def _windows(tokens: Tensor, side: int, heads: int) -> Tensor:
    """Cut (B, H, W, h d) into windows: (V, h, S², d)."""
    count, height, width, _ = tokens.shape
    cut = tokens.reshape(count, height // side, side, width // side, side, heads, -1)
    return cut.permute(0, 1, 3, 5, 2, 4, 6).reshape(-1, heads, side * side, cut.shape[-1])


def within(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Scaled-dot-product attention within windows: torch's, or where `_in_steps` says so in plain steps.

    Args:
        query: (V, h, N, d).
        key: (V, h, M, d).
        value: (V, h, M, d).

    Returns:
        (V, h, N, d).
    """
    if not _in_steps(query):
        return F.scaled_dot_product_attention(query, key, value)
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)
    return F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype) @ value


def _in_steps(tokens: Tensor) -> bool:
    """Whether plain steps are faster within windows: in half precision on a CPU.

    Torch's fused kernel takes 3 to 14 times as long there, for windows of 16 to 196 tokens (forward and backward, two
    cores of an AMD EPYC); in fp32 it is as fast.
    """
    cpu = tokens.device.type == "cpu" and not rehearsal.on_cuda()
    half = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else tokens.dtype
    return cpu and half in HALF


class Trunk(Hiera):
    """Hiera of `HieraBlock`; its background positions are enlarged by two small products.

    Interpolation is linear in what it enlarges. The bicubic kernel's backward pass takes 1.5 % of a step on a CPU, and
    on a GPU it adds up in any order, which ``deterministic`` refuses.
    """

    def __init__(self, **named: Any) -> None:
        super().__init__(**named)
        self.blocks: nn.ModuleList = nn.ModuleList(map(HieraBlock, self.blocks))

    def _get_pos_embed(self, hw: tuple[int, int]) -> Tensor:
        """Positions of a grid: (1, H, W, C)."""
        if told():
            plain: Tensor = super()._get_pos_embed(hw)
            return plain
        small, window = self.pos_embed, self.pos_embed_window
        exact = torch.float64  # a product in fp32 would be one in TF32 on some GPUs
        with torch.autocast(small.device.type, enabled=False):
            down, across = (_bicubic(old, new, small.device) for old, new in zip(small.shape[2:], hw, strict=True))
            large = (down @ small.to(exact) @ across.T).to(small.dtype)
            repeats = [side // edge for side, edge in zip(hw, window.shape[2:], strict=True)]
            return (large + window.repeat(1, 1, *repeats)).permute(0, 2, 3, 1)


def _bicubic(old: int, new: int, device: torch.device) -> Tensor:
    """The matrix (new, old) that enlarges a line as bicubic interpolation does."""
    unit = torch.eye(old, dtype=torch.float64, device=device)
    return F.interpolate(unit[None, None], size=(new, old), mode="bicubic")[0, 0]
