"""Where the transformer blocks of an encoder are, and what is in them: the one map that every tuning method reads.

A family's blocks are found by the class that implements them, so a new family is one function and one line in `_KINDS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Projection:
    """A linear layer, or the part of a fused one, that makes queries, keys or values.

    Attributes:
        module: The layer's name in the model.
        rows: Which of its outputs these are; all of them if None.
    """

    module: str
    rows: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Block:
    """A transformer block of an encoder; all names are those of modules in the model.

    Attributes:
        name: The block.
        attention: Its attention, which takes and gives tokens in the last dimension; some give a tuple of which the
            first is the tokens.
        query: What makes the queries.
        key: What makes the keys.
        value: What makes the values.
        projection: Attention's linear layer at the end.
        mlp: Its MLP.
        mlp_norm: The norm that the MLP begins with, if it has one inside.
        mlp_in: The MLP's first linear layer.
        mlp_out: The MLP's last linear layer.
        width: Channels of the tokens that attention gives, and that the MLP takes and gives.
        width_in: Channels of the tokens that attention takes.
    """

    name: str
    attention: str
    query: Projection
    key: Projection
    value: Projection
    projection: str
    mlp: str
    mlp_norm: str | None
    mlp_in: str
    mlp_out: str
    width: int
    width_in: int

    @property
    def linears(self) -> tuple[str, ...]:
        """Every linear layer of attention and MLP, once, in order."""
        makers = (self.query.module, self.key.module, self.value.module)
        return (*dict.fromkeys(makers), self.projection, self.mlp_in, self.mlp_out)


@dataclass(frozen=True)
class DecoderBlock:
    """A two-way block of SAM's mask decoder; names of modules in the model.

    Attributes:
        name: The block.
        token_to_image: Cross-attention of the prompt's tokens to the image.
        mlp: The MLP on the tokens.
        image_to_token: Cross-attention of the image to the tokens.
        width: Channels of both.
    """

    name: str
    token_to_image: str
    mlp: str
    image_to_token: str
    width: int


def encoder_blocks(model: nn.Module) -> tuple[Block, ...]:
    """The encoders' transformer blocks, from the input on."""
    found = ((name, module, _kind(module, _KINDS)) for name, module in model.named_modules())
    return tuple(describe(name, module) for name, module, describe in found if describe is not None)


def decoder_blocks(model: nn.Module) -> tuple[DecoderBlock, ...]:
    """The mask decoder's two-way blocks, in order."""
    return tuple(
        DecoderBlock(
            name=name,
            token_to_image=f"{name}.cross_attn_token_to_image",
            mlp=f"{name}.mlp",
            image_to_token=f"{name}.cross_attn_image_to_token",
            width=module.get_submodule("cross_attn_token_to_image").out_proj.out_features,
        )
        for name, module in model.named_modules()
        if _kind(module, _TWO_WAY)
    )


def _kind(module: nn.Module, kinds: Mapping[tuple[str, str], T]) -> T | None:
    """What a table holds of a module's class, by package and name: some of the packages are optional.

    Classes that it derives from count too: sharding gives every module a class of its own.
    """
    known = ((cls.__module__.split(".")[0], cls.__name__) for cls in type(module).__mro__)
    return next((kinds[kind] for kind in known if kind in kinds), None)


def _fused(module: str, width: int, heads: int | None = None) -> dict[str, Projection]:
    """Queries, keys and values of a fused layer: one after another, or so in each head."""
    outputs = torch.arange(3 * width, device="cpu")  # a plan is made under another default device
    parts = outputs.reshape(3, width) if heads is None else outputs.reshape(heads, 3, -1).transpose(0, 1).reshape(3, -1)
    return {name: Projection(module, rows) for name, rows in zip(("query", "key", "value"), parts, strict=True)}


def _sam(name: str, block: Any) -> Block:
    width = block.attn.proj.out_features
    return Block(
        name=name,
        attention=f"{name}.attn",
        **_fused(f"{name}.attn.qkv", width),
        projection=f"{name}.attn.proj",
        mlp=f"{name}.mlp",
        mlp_norm=None,
        mlp_in=f"{name}.mlp.lin1",
        mlp_out=f"{name}.mlp.lin2",
        width=width,
        width_in=width,
    )


def _tiny_vit(name: str, block: Any) -> Block:
    width = block.attn.proj.out_features
    return Block(
        name=name,
        attention=f"{name}.attn",
        **_fused(f"{name}.attn.qkv", width, heads=block.attn.num_heads),
        projection=f"{name}.attn.proj",
        mlp=f"{name}.mlp",
        mlp_norm=f"{name}.mlp.norm",
        mlp_in=f"{name}.mlp.fc1",
        mlp_out=f"{name}.mlp.fc2",
        width=width,
        width_in=width,
    )


def _hiera(name: str, block: Any) -> Block:
    width = block.attn.proj.out_features
    return Block(
        name=name,
        attention=f"{name}.attn",
        **_fused(f"{name}.attn.qkv", width),
        projection=f"{name}.attn.proj",
        mlp=f"{name}.mlp",
        mlp_norm=None,
        mlp_in=f"{name}.mlp.layers.0",
        mlp_out=f"{name}.mlp.layers.1",
        width=width,
        width_in=block.attn.qkv.in_features,
    )


def _sam3(name: str, block: Any) -> Block:
    width = block.attention.o_proj.out_features
    return Block(
        name=name,
        attention=f"{name}.attention",
        query=Projection(f"{name}.attention.q_proj"),
        key=Projection(f"{name}.attention.k_proj"),
        value=Projection(f"{name}.attention.v_proj"),
        projection=f"{name}.attention.o_proj",
        mlp=f"{name}.mlp",
        mlp_norm=None,
        mlp_in=f"{name}.mlp.fc1",
        mlp_out=f"{name}.mlp.fc2",
        width=width,
        width_in=width,
    )


_KINDS: dict[tuple[str, str], Callable[[str, Any], Block]] = {
    ("transformers", "SamVisionLayer"): _sam,
    ("timm", "TinyVitBlock"): _tiny_vit,
    ("sam2", "MultiScaleBlock"): _hiera,
    ("transformers", "Sam3ViTLayer"): _sam3,
}
_TWO_WAY = {("transformers", "SamTwoWayAttentionBlock"): True, ("sam2", "TwoWayAttentionBlock"): True}
