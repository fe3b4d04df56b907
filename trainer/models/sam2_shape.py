"""Sizes of SAM2's parts, and those of the released models.

Source: Ravi et al. 2024 (arXiv:2408.00714); the configurations of SAM 2.1.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Literal

from data_shards.errors import UserError

Variant = Literal["tiny", "small", "base_plus", "large"]
STRIDE = 16
"""Pixels of the input to one of the features that memories are made of."""
SIDES = 32
"""The input's side is a multiple of so many pixels."""


@dataclass(frozen=True)
class SAM2Shape:
    """Shape of SAM2; the defaults are SAM 2.1 tiny.

    Attributes:
        embed_dim: Channels of a token in Hiera's first stage; each later stage has twice as many.
        num_heads: Attention heads in the first stage; each later stage has twice as many.
        stages: Blocks of each of the four stages.
        global_blocks: Positions of the blocks that attend over the whole image; the others do in windows.
        window_spec: Side of a window in tokens, by stage.
        background: Side of the grid of absolute positions, which is interpolated.
        width: Channels of the features, of the memory attention and of the mask decoder: a multiple of 32.
        memory_width: Channels of a memory; it divides `width`.
        memory_layers: Layers of the memory attention.
        feedforward: Hidden channels of these layers.
        memories: Frames that are remembered as features, the prompted ones counted as one.
        pointers: Frames that are remembered as object pointers, at most.
    """

    embed_dim: int = 96
    num_heads: int = 1
    stages: tuple[int, int, int, int] = (1, 2, 7, 2)
    global_blocks: tuple[int, ...] = (5, 7, 9)
    window_spec: tuple[int, int, int, int] = (8, 4, 14, 7)
    background: int = 7
    width: int = 256
    memory_width: int = 64
    memory_layers: int = 4
    feedforward: int = 2048
    memories: int = 7
    pointers: int = 16

    @property
    def channels(self) -> list[int]:
        """Channels of the four stages, the deepest first."""
        return [self.embed_dim * 2**stage for stage in (3, 2, 1, 0)]


VARIANTS: dict[str, SAM2Shape] = {
    "tiny": SAM2Shape(),
    "small": SAM2Shape(stages=(1, 2, 11, 2), global_blocks=(7, 10, 13)),
    "base_plus": SAM2Shape(embed_dim=112, num_heads=2, stages=(2, 3, 16, 3), global_blocks=(12, 16, 20), background=14),
    "large": SAM2Shape(
        embed_dim=144, num_heads=2, stages=(2, 6, 36, 4), global_blocks=(23, 33, 43), window_spec=(8, 4, 16, 8)
    ),
}


def shape_of(variant: Variant | SAM2Shape) -> SAM2Shape:
    """The shape that a recipe names.

    Raises:
        UserError: There is no such variant.
    """
    shape = VARIANTS.get(variant) if isinstance(variant, str) else variant
    if not isinstance(shape, SAM2Shape):
        raise UserError(f"variant {variant}: one of {', '.join(VARIANTS)}, or another shape, key by key")
    return shape


def check_sizes(shape: SAM2Shape, image_size: int) -> None:
    """Refuse sizes that no SAM2 can have.

    Raises:
        UserError: There is such a size.
    """
    sizes = (shape.embed_dim, shape.num_heads, *shape.stages, *shape.window_spec, shape.background)
    rest = (shape.memory_width, shape.memory_layers, shape.feedforward)
    if min(*sizes, *rest) < 1 or shape.embed_dim % shape.num_heads:
        raise UserError(f"variant {shape}: sizes are 1 or more, and embed_dim is a multiple of num_heads")
    if shape.width % 32 or shape.width % shape.memory_width or shape.memory_width % 4:
        raise UserError(
            f"variant {shape}: width is a multiple of 32 and of memory_width, and memory_width a multiple of 4"
        )
    if shape.memories < 2 or shape.pointers < 2:
        raise UserError(f"variant {shape}: memories and pointers are 2 or more")
    if any(not 0 <= block < sum(shape.stages) for block in shape.global_blocks):
        raise UserError(f"variant {shape}: global_blocks name blocks from 0 to {sum(shape.stages) - 1}")
    firsts = {sum(shape.stages[:stage]) for stage in (1, 2, 3)}
    if firsts & set(shape.global_blocks):
        raise UserError(
            f"variant {shape}: global_blocks: {min(firsts & set(shape.global_blocks))} is the first block of a stage, "
            "which pools windows: take a later one"
        )
    side = STRIDE // 4 * shape.window_spec[0]
    if image_size < SIDES or image_size % SIDES or image_size % side:
        multiple = max(SIDES, side)
        raise UserError(f"image_size {image_size}: SAM2 takes a multiple of {multiple} pixels, such as 512 or 1024")


def require_sam2() -> None:
    """Say how to install the package that SAM2's parts come from.

    Raises:
        UserError: It is not there.
    """
    if importlib.util.find_spec("sam2") is None:
        raise UserError(
            "SAM2 needs the package sam2: SAM2_BUILD_CUDA=0 pip install --no-build-isolation sam2==1.1.0, after torch"
        )
