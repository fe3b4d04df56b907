"""Names of SAM's prompt encoder and mask decoder: the original layout and transformers', both ways.

Shared by every family that keeps SAM's decoder (SAM, MedSAM, LiteMedSAM).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from torch import Tensor

Renaming = Sequence[tuple[str, str]]
"""Pairs (original, ours) of name parts; `#` stands for a number that is kept. The first pair that matches is used."""

SAM_DECODER: Renaming = (
    (
        "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix",
        "prompt_encoder.shared_embedding.positional_embedding",
    ),
    ("prompt_encoder.point_embeddings.#.", "prompt_encoder.point_embed.#."),
    ("prompt_encoder.mask_downscaling.0.", "prompt_encoder.mask_embed.conv1."),
    ("prompt_encoder.mask_downscaling.1.", "prompt_encoder.mask_embed.layer_norm1."),
    ("prompt_encoder.mask_downscaling.3.", "prompt_encoder.mask_embed.conv2."),
    ("prompt_encoder.mask_downscaling.4.", "prompt_encoder.mask_embed.layer_norm2."),
    ("prompt_encoder.mask_downscaling.6.", "prompt_encoder.mask_embed.conv3."),
    ("mask_decoder.output_upscaling.0.", "mask_decoder.upscale_conv1."),
    ("mask_decoder.output_upscaling.1.", "mask_decoder.upscale_layer_norm."),
    ("mask_decoder.output_upscaling.3.", "mask_decoder.upscale_conv2."),
    ("mask_decoder.output_hypernetworks_mlps.#.layers.0.", "mask_decoder.output_hypernetworks_mlps.#.proj_in."),
    ("mask_decoder.output_hypernetworks_mlps.#.layers.1.", "mask_decoder.output_hypernetworks_mlps.#.layers.0."),
    ("mask_decoder.output_hypernetworks_mlps.#.layers.2.", "mask_decoder.output_hypernetworks_mlps.#.proj_out."),
    ("mask_decoder.iou_prediction_head.layers.0.", "mask_decoder.iou_prediction_head.proj_in."),
    ("mask_decoder.iou_prediction_head.layers.1.", "mask_decoder.iou_prediction_head.layers.0."),
    ("mask_decoder.iou_prediction_head.layers.2.", "mask_decoder.iou_prediction_head.proj_out."),
    ("mask_decoder.transformer.norm_final_attn.", "mask_decoder.transformer.layer_norm_final_attn."),
    ("mask_decoder.transformer.layers.#.norm#.", "mask_decoder.transformer.layers.#.layer_norm#."),
)

SAM_ENCODER: Renaming = (
    ("image_encoder.patch_embed.proj.", "image_encoder.patch_embed.projection."),
    ("image_encoder.blocks.#.norm1.", "image_encoder.layers.#.layer_norm1."),
    ("image_encoder.blocks.#.norm2.", "image_encoder.layers.#.layer_norm2."),
    ("image_encoder.blocks.#.", "image_encoder.layers.#."),
    ("image_encoder.neck.0.", "image_encoder.neck.conv1."),
    ("image_encoder.neck.1.", "image_encoder.neck.layer_norm1."),
    ("image_encoder.neck.2.", "image_encoder.neck.conv2."),
    ("image_encoder.neck.3.", "image_encoder.neck.layer_norm2."),
)
TRANSFORMERS: Renaming = (
    ("vision_encoder.", "image_encoder."),
    ("shared_image_embedding.", "prompt_encoder.shared_embedding."),
)


def rename(state: Mapping[str, Tensor], renaming: Renaming, *, to_original: bool = False) -> dict[str, Tensor]:
    """Rename a state dict's keys; keys that no pair matches are kept.

    Args:
        state: Tensors by name.
        renaming: Pairs (original, ours).
        to_original: Go from our names to the original ones instead of the other way.
    """
    rules = [(_pattern(pair[to_original]), _template(pair[not to_original])) for pair in renaming]
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        new = name
        for pattern, template in rules:
            new, count = pattern.subn(template, name, count=1)
            if count:
                break
        renamed[new] = tensor
    return renamed


def _pattern(name: str) -> re.Pattern[str]:
    return re.compile("^" + re.escape(name).replace(r"\#", r"(\d+)"))


def _template(name: str) -> str:
    parts = name.split("#")
    return "".join(part + (rf"\g<{i + 1}>" if i < len(parts) - 1 else "") for i, part in enumerate(parts))
