"""Where the transformer blocks of an encoder are, and what is in them: the one map that every tuning method reads.

A family's blocks are found by the class that implements them: a new family is one line in `_KINDS`.
"""

from __future__ import annotations

from collections.abc import Mapping
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
    return tuple(_describe(name, module, names) for name, module, names in found if names is not None)


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


@dataclass(frozen=True)
class _Names:
    """How a class of blocks calls its parts.

    Attributes:
        attention: Its attention.
        makers: Attention's linear layers that make queries, keys and values; one, if they are fused.
        projection: Attention's linear layer at the end.
        mlp: First and last linear layer of ``mlp``.
        norm: Whether ``mlp`` begins with a ``norm``.
        by_head: Whether the outputs of a fused layer are queries, keys and values of one head after another.
    """

    attention: str
    makers: tuple[str, ...]
    projection: str
    mlp: tuple[str, str]
    norm: bool = False
    by_head: bool = False


def _describe(name: str, block: nn.Module, names: _Names) -> Block:
    attention: Any = block.get_submodule(names.attention)
    width: int = attention.get_submodule(names.projection).out_features
    makers = [f"{name}.{names.attention}.{maker}" for maker in names.makers]
    if len(makers) == 1:
        outputs = torch.arange(3 * width, device="cpu")  # a plan is made under another default device
        heads: int = attention.num_heads if names.by_head else 1
        parts = outputs.reshape(heads, 3, -1).transpose(0, 1).reshape(3, -1)
        query, key, value = (Projection(makers[0], rows) for rows in parts)
    else:
        query, key, value = map(Projection, makers)
    return Block(
        name=name,
        attention=f"{name}.{names.attention}",
        query=query,
        key=key,
        value=value,
        projection=f"{name}.{names.attention}.{names.projection}",
        mlp=f"{name}.mlp",
        mlp_norm=f"{name}.mlp.norm" if names.norm else None,
        mlp_in=f"{name}.mlp.{names.mlp[0]}",
        mlp_out=f"{name}.mlp.{names.mlp[1]}",
        width=width,
        width_in=attention.get_submodule(names.makers[0]).in_features,
    )


_KINDS = {
    ("transformers", "SamVisionLayer"): _Names("attn", ("qkv",), "proj", ("lin1", "lin2")),
    ("timm", "TinyVitBlock"): _Names("attn", ("qkv",), "proj", ("fc1", "fc2"), norm=True, by_head=True),
    ("sam2", "MultiScaleBlock"): _Names("attn", ("qkv",), "proj", ("layers.0", "layers.1")),
    ("transformers", "Sam3ViTLayer"): _Names("attention", ("q_proj", "k_proj", "v_proj"), "o_proj", ("fc1", "fc2")),
}
_TWO_WAY = {("transformers", "SamTwoWayAttentionBlock"): True, ("sam2", "TwoWayAttentionBlock"): True}
