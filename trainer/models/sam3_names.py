"""Names of SAM3's weights: Meta's layout and transformers', which is ours, both ways.

Shapes: T tokens a side of the input, W of a window; K positions a side of the pretraining; D width of the ViT.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import torch
from torch import Tensor

from trainer.models.sam_names import Renaming, rename

_TRUNK, _VIT = "backbone.vision_backbone.trunk.", "vision_encoder.backbone."
_NECK, _FPN = "backbone.vision_backbone.convs.", "vision_encoder.neck.fpn_layers."
_CLIP, _TEXT = "backbone.language_backbone.encoder.", "text_encoder.text_model."
_DECODER = "transformer.decoder."


def _attention(meta: str, ours: str) -> Renaming:
    """Of an attention whose output transformers names otherwise; the three inputs are taken apart before."""
    return (f"{meta}.out_proj.", f"{ours}.o_proj."), (f"{meta}.", f"{ours}.")


def _fusion_layer(meta: str, ours: str) -> Renaming:
    """Of the layer that the DETR encoder and the geometry encoder share."""
    return (
        *_attention(f"{meta}self_attn", f"{ours}self_attn"),
        *_attention(f"{meta}cross_attn_image", f"{ours}cross_attn"),
        (f"{meta}linear#.", f"{ours}mlp.fc#."),
        (f"{meta}norm#.", f"{ours}layer_norm#."),
    )


def _mlp(meta: str, ours: str, depth: int) -> Renaming:
    """Of an MLP; Meta counts its layers from 0, transformers from 1."""
    return tuple((f"{meta}.layers.{i}.", f"{ours}.layer{i + 1}.") for i in range(depth))


_VISION: Renaming = (
    (f"{_TRUNK}pos_embed", f"{_VIT}embeddings.position_embeddings"),
    (f"{_TRUNK}patch_embed.proj.", f"{_VIT}embeddings.patch_embeddings.projection."),
    (f"{_TRUNK}ln_pre.", f"{_VIT}layer_norm."),
    (f"{_TRUNK}blocks.#.norm#.", f"{_VIT}layers.#.layer_norm#."),
    (f"{_TRUNK}blocks.#.attn.proj.", f"{_VIT}layers.#.attention.o_proj."),
    (f"{_TRUNK}blocks.#.attn.", f"{_VIT}layers.#.attention."),
    (f"{_TRUNK}blocks.#.", f"{_VIT}layers.#."),
    (f"{_NECK}0.dconv_2x2_0.", f"{_FPN}0.scale_layers.0."),
    (f"{_NECK}0.dconv_2x2_1.", f"{_FPN}0.scale_layers.2."),
    (f"{_NECK}1.dconv_2x2.", f"{_FPN}1.scale_layers.0."),
    (f"{_NECK}#.conv_1x1.", f"{_FPN}#.proj1."),
    (f"{_NECK}#.conv_3x3.", f"{_FPN}#.proj2."),
)
_LANGUAGE: Renaming = (
    (f"{_CLIP}token_embedding.", f"{_TEXT}embeddings.token_embedding."),
    (f"{_CLIP}positional_embedding", f"{_TEXT}embeddings.position_embedding.weight"),
    (f"{_CLIP}ln_final.", f"{_TEXT}final_layer_norm."),
    (f"{_CLIP}text_projection", "text_encoder.text_projection.weight"),
    (f"{_CLIP}transformer.resblocks.#.attn.", f"{_TEXT}encoder.layers.#.self_attn."),
    (f"{_CLIP}transformer.resblocks.#.ln_#.", f"{_TEXT}encoder.layers.#.layer_norm#."),
    (f"{_CLIP}transformer.resblocks.#.mlp.c_fc.", f"{_TEXT}encoder.layers.#.mlp.fc1."),
    (f"{_CLIP}transformer.resblocks.#.mlp.c_proj.", f"{_TEXT}encoder.layers.#.mlp.fc2."),
    ("backbone.language_backbone.resizer.", "text_projection."),
)
_GEOMETRY: Renaming = (
    *_fusion_layer("geometry_encoder.encode.#.", "geometry_encoder.layers.#."),
    ("geometry_encoder.img_pre_norm.", "geometry_encoder.vision_layer_norm."),
    ("geometry_encoder.norm.", "geometry_encoder.prompt_layer_norm."),
    ("geometry_encoder.encode_norm.", "geometry_encoder.output_layer_norm."),
    ("geometry_encoder.points_direct_project.", "point_encoder.direct."),
    ("geometry_encoder.points_pool_project.", "point_encoder.pool."),
    ("geometry_encoder.points_pos_enc_project.", "point_encoder.position."),
    # what is left of it has one name in both
)
_DETR: Renaming = (
    *_fusion_layer("transformer.encoder.layers.#.", "detr_encoder.layers.#."),
    *_attention(f"{_DECODER}layers.#.self_attn", "detr_decoder.layers.#.self_attn"),
    *_attention(f"{_DECODER}layers.#.ca_text", "detr_decoder.layers.#.text_cross_attn"),
    *_attention(f"{_DECODER}layers.#.cross_attn", "detr_decoder.layers.#.vision_cross_attn"),
    (f"{_DECODER}layers.#.norm1.", "detr_decoder.layers.#.vision_cross_attn_layer_norm."),
    (f"{_DECODER}layers.#.norm2.", "detr_decoder.layers.#.self_attn_layer_norm."),
    (f"{_DECODER}layers.#.norm3.", "detr_decoder.layers.#.mlp_layer_norm."),
    (f"{_DECODER}layers.#.catext_norm.", "detr_decoder.layers.#.text_cross_attn_layer_norm."),
    (f"{_DECODER}layers.#.linear#.", "detr_decoder.layers.#.mlp.fc#."),
    *_mlp(f"{_DECODER}bbox_embed", "detr_decoder.box_head", 3),
    *_mlp(f"{_DECODER}presence_token_head", "detr_decoder.presence_head", 3),
    *_mlp(f"{_DECODER}ref_point_head", "detr_decoder.ref_point_head", 2),
    *_mlp(f"{_DECODER}boxRPB_embed_x", "detr_decoder.box_rpb_embed_x", 2),
    *_mlp(f"{_DECODER}boxRPB_embed_y", "detr_decoder.box_rpb_embed_y", 2),
    (f"{_DECODER}norm.", "detr_decoder.output_layer_norm."),
    (f"{_DECODER}presence_token_out_norm.", "detr_decoder.presence_layer_norm."),
    (_DECODER, "detr_decoder."),
)
_HEADS: Renaming = (
    *_mlp("dot_prod_scoring.prompt_mlp", "dot_product_scoring.text_mlp", 2),
    ("dot_prod_scoring.prompt_mlp.out_norm.", "dot_product_scoring.text_mlp_out_norm."),
    ("dot_prod_scoring.prompt_proj.", "dot_product_scoring.text_proj."),
    ("dot_prod_scoring.hs_proj.", "dot_product_scoring.query_proj."),
    *_attention("segmentation_head.cross_attend_prompt", "mask_decoder.prompt_cross_attn"),
    ("segmentation_head.cross_attn_norm.", "mask_decoder.prompt_cross_attn_norm."),
    ("segmentation_head.mask_predictor.mask_embed.", "mask_decoder.mask_embedder."),
    ("segmentation_head.instance_seg_head.", "mask_decoder.instance_projection."),
    ("segmentation_head.semantic_seg_head.", "mask_decoder.semantic_projection."),
    ("segmentation_head.pixel_decoder.", "mask_decoder.pixel_decoder."),
)
SAM3: Renaming = (*_VISION, *_LANGUAGE, *_GEOMETRY, *_DETR, *_HEADS)
"""Meta's detector, without its prefix, and ours."""

OF_THE_TRACKER = re.compile(
    r"^(detector\.)?(tracker|inst_interactive_predictor|backbone\.vision_backbone\.sam2_convs)\."
)
"""What Meta's files hold for video: the tracker, and its neck inside the detector."""
_NOT_OURS = re.compile(OF_THE_TRACKER.pattern + r"|^tracker_(model|neck)\.|\.attn\.freqs_cis$")
"""Known names that no model of ours has; rotary tables are computed."""
_FUSED = re.compile(r"^(?P<stem>.+\.)(?:in_proj_|qkv\.)(?P<kind>weight|bias)$")
_FIRST = re.compile(r"^(?P<stem>.+\.)q_proj\.(?P<kind>weight|bias)$")
META_POSITIONS = f"{_TRUNK}pos_embed"
"""Meta's positions (1, 1 + K², D), that of the class token first."""
_PROJECTION = f"{_CLIP}text_projection"


def to_ours(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename weights in any layout to ours; a name that is not known is kept, for the loader to complain about.

    Args:
        state: Of Meta's file (``detector.`` and ``tracker.``), of Meta's detector alone, of a hub file of transformers
            (``detector_model.`` beside ``tracker_model.``), of transformers' Sam3Model, or of our own model.
    """
    kept = {name: tensor for name, tensor in state.items() if not _NOT_OURS.search(name)}
    for prefix in ("detector.", "detector_model."):
        kept = {name.removeprefix(prefix): tensor for name, tensor in kept.items()}
    if any(name.startswith("transformer.decoder.") for name in kept):
        kept = rename(_taken_apart(kept), SAM3)
    return kept


def to_meta(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename our weights to Meta's detector, without its prefix; `unknown_to_ours` is what is missing then.

    The position of the class token becomes zero: Meta's ViT cuts that token off before it adds the positions.
    """
    return _put_together(rename(state, SAM3, to_original=True))


def unknown_to_ours(
    state: Mapping[str, Tensor], heads: int, window: int, side: int, global_blocks: tuple[int, ...]
) -> dict[str, Tensor]:
    """What Meta's detector has and renamed weights of ours lack.

    The rotary tables are computed. The projections of point exemplars are zero if they are missing: only point
    exemplars ask for them, which Meta's detector itself ignores.

    Args:
        state: What `to_meta` gave.
        heads: Attention heads of the ViT.
        window: Side W of a window in tokens.
        side: Side T of the input in tokens.
        global_blocks: Blocks of the ViT that attend over the whole image.
    """
    found = {}
    positions = state[META_POSITIONS]
    depth = len({name.removeprefix(f"{_TRUNK}blocks.").split(".")[0] for name in state if f"{_TRUNK}blocks." in name})
    for block in range(depth):
        here = side if block in global_blocks else window
        found[f"{_TRUNK}blocks.{block}.attn.freqs_cis"] = rotary_table(positions.shape[-1] // heads, here, window)
    width = len(state["geometry_encoder.norm.weight"])
    for name, inputs in (("direct", 2), ("pool", width), ("pos_enc", width)):
        for kind, shape in (("weight", (width, inputs)), ("bias", (width,))):
            key = f"geometry_encoder.points_{name}_project.{kind}"
            if key not in state:
                found[key] = torch.zeros(shape)
    return found


def rotary_table(width: int, side: int, window: int) -> Tensor:
    """Rotations of an attention head's channels by place: Heo et al. 2024 (arXiv:2403.13298), axial.

    Args:
        width: Channels of a head.
        side: Side in tokens of what is attended over.
        window: Side W of a window; a larger grid is squeezed onto as many positions.

    Returns:
        (side², width / 2) complex64, half of it turned by the column and half by the row.
    """
    frequencies = 1.0 / (10000.0 ** (torch.arange(0, width, 4)[: width // 4].float() / width))
    places = torch.arange(side * side, dtype=torch.float32)
    column, row = places % side, torch.div(places, side, rounding_mode="floor")
    angles = torch.cat([torch.outer(axis * (window / side), frequencies) for axis in (column, row)], dim=-1)
    return torch.polar(torch.ones_like(angles), angles)


def _taken_apart(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Meta's names, with queries, keys and values apart, no class token, and the text's projection as a weight."""
    apart = {}
    for name, tensor in state.items():
        if fused := _FUSED.match(name):
            for part, chunk in zip("qkv", tensor.chunk(3), strict=True):
                apart[f"{fused['stem']}{part}_proj.{fused['kind']}"] = chunk
        elif name == META_POSITIONS and math.isqrt(tensor.shape[1]) ** 2 != tensor.shape[1]:
            apart[name] = tensor[:, 1:]
        else:
            apart[name] = tensor.T if name == _PROJECTION else tensor
    return apart


def _put_together(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `_taken_apart`."""
    whole = {}
    for name, tensor in state.items():
        if first := _FIRST.match(name):
            parts = [state[f"{first['stem']}{part}_proj.{first['kind']}"] for part in "qkv"]
            fused = "qkv." if name.startswith(_TRUNK) else "in_proj_"
            whole[f"{first['stem']}{fused}{first['kind']}"] = torch.cat(parts)
        elif name == META_POSITIONS:
            whole[name] = torch.cat([torch.zeros_like(tensor[:, :1]), tensor], dim=1)
        elif not re.search(r"\.[kv]_proj\.(weight|bias)$", name):
            whole[name] = tensor.T if name == _PROJECTION else tensor
    return whole
