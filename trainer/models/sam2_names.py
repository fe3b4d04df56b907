"""Names of SAM2's weights: Meta's layout, which is ours, and transformers', both ways; and whose weights they are.

Meta's file holds ``{"model": state dict}``; transformers' holds its Sam2VideoModel. Shapes: C channels of a token.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from data_shards.errors import UserError
from trainer.models.sam2_shape import VARIANTS, SAM2Shape
from trainer.models.sam_names import SAM_DECODER, Renaming, rename

_TRUNK, _BACKBONE = "image_encoder.trunk.", "vision_encoder.backbone."
_LAYER = "transformer.layers.#."
_STAGES = 4
"""Strides of the memory encoder's mask downsampler: 16 = 2⁴, of which each has a convolution, a norm and a GELU."""


def _mlp(meta: str, theirs: str, depth: int) -> Renaming:
    """Of an MLP, whose first and last layers transformers names apart."""
    last = depth - 1
    return (
        (f"{meta}.layers.0.", f"{theirs}.proj_in."),
        *((f"{meta}.layers.{i}.", f"{theirs}.layers.{i - 1}.") for i in range(1, last)),
        (f"{meta}.layers.{last}.", f"{theirs}.proj_out."),
    )


def _output(meta: str, theirs: str, *attentions: str) -> Renaming:
    """Of the output of attentions; their inputs have one name in both."""
    return tuple((f"{meta}{name}.out_proj.", f"{theirs}{name}.o_proj.") for name in attentions)


_VISION: Renaming = (
    (f"{_TRUNK}patch_embed.proj.", f"{_BACKBONE}patch_embed.projection."),
    (f"{_TRUNK}blocks.#.norm#.", f"{_BACKBONE}blocks.#.layer_norm#."),
    *_mlp(f"{_TRUNK}blocks.#.mlp", f"{_BACKBONE}blocks.#.mlp", 2),
    (_TRUNK, _BACKBONE),
    ("image_encoder.neck.convs.#.conv.", "vision_encoder.neck.convs.#."),
)
_HEADS: Renaming = (
    *((f"sam_{meta}", theirs) for meta, theirs in SAM_DECODER),
    *_mlp(f"sam_mask_decoder.{_LAYER}mlp", f"mask_decoder.{_LAYER}mlp", 2),
    *_output(
        f"sam_mask_decoder.{_LAYER}",
        f"mask_decoder.{_LAYER}",
        "self_attn",
        "cross_attn_token_to_image",
        "cross_attn_image_to_token",
    ),
    *_output("sam_mask_decoder.transformer.", "mask_decoder.transformer.", "final_attn_token_to_image"),
    *_mlp("sam_mask_decoder.pred_obj_score_head", "mask_decoder.pred_obj_score_head", 3),
    ("sam_prompt_encoder.", "prompt_encoder."),
    ("sam_mask_decoder.", "mask_decoder."),
)
_MASKS, _DOWN = "memory_encoder.mask_downsampler.encoder.", "memory_encoder.mask_downsampler."
_MEMORY: Renaming = (
    *_output("memory_attention.layers.#.", "memory_attention.layers.#.", "self_attn", "cross_attn_image"),
    ("memory_attention.layers.#.norm#.", "memory_attention.layers.#.layer_norm#."),
    ("memory_attention.norm.", "memory_attention.layer_norm."),
    *((f"{_MASKS}{3 * i}.", f"{_DOWN}layers.{i}.conv.") for i in range(_STAGES)),
    *((f"{_MASKS}{3 * i + 1}.", f"{_DOWN}layers.{i}.layer_norm.") for i in range(_STAGES)),
    (f"{_MASKS}{3 * _STAGES}.", f"{_DOWN}final_conv."),
    ("memory_encoder.pix_feat_proj.", "memory_encoder.feature_projection."),
    ("memory_encoder.out_proj.", "memory_encoder.projection."),
    ("memory_encoder.fuser.layers.#.gamma", "memory_encoder.memory_fuser.layers.#.scale"),
    ("memory_encoder.fuser.layers.#.dwconv.", "memory_encoder.memory_fuser.layers.#.depthwise_conv."),
    ("memory_encoder.fuser.layers.#.norm.", "memory_encoder.memory_fuser.layers.#.layer_norm."),
    ("memory_encoder.fuser.layers.#.pwconv#.", "memory_encoder.memory_fuser.layers.#.pointwise_conv#."),
)
_REST: Renaming = (
    ("maskmem_tpos_enc", "memory_temporal_positional_encoding"),
    ("no_mem_embed", "no_memory_embedding"),
    ("no_mem_pos_enc", "no_memory_positional_encoding"),
    ("no_obj_ptr", "no_object_pointer"),
    ("no_obj_embed_spatial", "occlusion_spatial_embedding_parameter"),
    ("obj_ptr_tpos_proj.", "temporal_positional_encoding_projection_layer."),
    *_mlp("obj_ptr_proj", "object_pointer_proj", 3),
    # mask_downsample has one name in both
)
SAM2: Renaming = (*_VISION, *_HEADS, *_MEMORY, *_REST)
"""Meta's names, which are ours, and transformers'."""

_POINTS = "sam_prompt_encoder.point_embeddings."
"""Meta's embeddings of points and corners, four of (1, C); transformers has them in one of (4, C)."""
_POINT_EMBED = "prompt_encoder.point_embed.weight"
_OF_POINTS, _OF_IMAGE = "prompt_encoder.shared_embedding.", "shared_image_embedding."
"""Where transformers keeps its two copies of one random matrix."""


def to_ours(state: Mapping[str, Tensor], source: str = "of this model") -> dict[str, Tensor]:
    """Rename weights in any layout to ours; a name that is not known is kept, for the loader to complain about.

    Args:
        state: Of Meta's file, of transformers' Sam2VideoModel, or of our own model.
        source: Where they came from, for messages.

    Raises:
        UserError: The random matrix of positions is there twice, and not the same.
    """
    if not any(name.startswith("vision_encoder.") for name in state):
        return dict(state)
    theirs = dict(state)
    for name in [name for name in theirs if name.startswith(_OF_IMAGE)]:
        image, points = theirs.pop(name), name.replace(_OF_IMAGE, _OF_POINTS)
        if not torch.equal(theirs.setdefault(points, image), image):
            raise UserError(
                f"weights {source}: {name} and {points} differ, and SAM2 has one matrix for both: give weights that "
                "were converted from a SAM2"
            )
    embeddings = theirs.pop(_POINT_EMBED, None)
    ours = rename(theirs, SAM2, to_original=True)
    if embeddings is not None:
        ours.update({f"{_POINTS}{i}.weight": row.clone() for i, row in enumerate(embeddings.split(1))})
    return ours


def to_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename our weights to transformers' Sam2VideoModel; nothing is lost either way."""
    points = sorted(name for name in state if name.startswith(_POINTS))
    theirs = rename({name: tensor for name, tensor in state.items() if name not in points}, SAM2)
    if points:
        theirs[_POINT_EMBED] = torch.cat([state[name] for name in points])
    for name in [name for name in theirs if name.startswith(_OF_POINTS)]:
        theirs[name.replace(_OF_POINTS, _OF_IMAGE)] = theirs[name].clone()
    return theirs


def check_architecture(state: Mapping[str, Tensor], shape: SAM2Shape, source: str) -> None:
    """Say at once that weights are of another model, instead of listing every tensor.

    Args:
        state: Tensors by our names.
        shape: The model's.
        source: Where they came from, for messages.

    Raises:
        UserError: No SAM2, SAM 2.0, the image model alone, or another variant.
    """
    patches = state.get(f"{_TRUNK}patch_embed.proj.weight")
    depth = len({name.removeprefix(f"{_TRUNK}blocks.").split(".")[0] for name in state if f"{_TRUNK}blocks." in name})
    if patches is None or not depth:
        raise UserError(f"weights {source}: no SAM2: they lack its image encoder's blocks (image_encoder.trunk.blocks)")
    if not any(name.startswith("memory_") for name in state):
        raise UserError(
            f"weights {source}: the image model alone, without SAM2's memory: give the video model's, as in "
            "facebook/sam2.1-hiera-tiny"
        )
    if not any(name.startswith(("no_obj_embed_spatial", "obj_ptr_tpos_proj.")) for name in state):
        raise UserError(
            f"weights {source}: of SAM 2.0, which lacks no_obj_embed_spatial and obj_ptr_tpos_proj: give SAM 2.1's, as "
            "in facebook/sam2.1-hiera-tiny"
        )
    found, wanted = (patches.shape[0], depth), (shape.embed_dim, sum(shape.stages))
    if found != wanted:
        fitting = (name for name, variant in VARIANTS.items() if (variant.embed_dim, sum(variant.stages)) == found)
        hint = next((f": set the model's variant to {name}" for name in fitting), "")
        raise UserError(
            f"weights {source}: their image encoder has {found[1]} blocks from width {found[0]}, the recipe's "
            f"{wanted[1]} from {wanted[0]}{hint}"
        )
