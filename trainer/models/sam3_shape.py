"""Sizes of SAM3, and what transformers calls them."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import Sam3Config

from data_shards.errors import UserError

VOCABULARY = 49_408
"""Tokens that the text encoder knows: CLIP's."""


@dataclass(frozen=True)
class SAM3Shape:
    """Sizes of SAM3; the released model's by default (840 M parameters).

    Attributes:
        width: Channels of a token in the image encoder.
        depth: Blocks of the image encoder.
        heads: Its attention heads.
        mlp: Channels inside its MLPs.
        global_blocks: Places of its blocks that attend over the whole image; the others do in windows.
        window: Side of a window in patches.
        patch: Side of a patch in pixels.
        pretrained_size: Side in pixels of the positions that are tiled over the image.
        norm_eps: ε of its norms: 1e-5 in Meta's code, which trained the weights; transformers' default is 1e-6.
        text_width: Channels of a token in the text encoder.
        text_depth: Its layers.
        text_heads: Its attention heads.
        text_mlp: Channels inside its MLPs.
        context: Tokens of a text, start and end among them; longer texts are cut.
        hidden: Channels C of the detector, a multiple of 8.
        hidden_heads: Its attention heads.
        hidden_mlp: Channels inside its MLPs.
        geometry_layers: Layers of the encoder of exemplars.
        encoder_layers: Layers that bring text and image together.
        decoder_layers: Layers that refine the queries.
        queries: Object queries Q: the most instances that can be found.
    """

    width: int = 1024
    depth: int = 32
    heads: int = 16
    mlp: int = 4736
    global_blocks: tuple[int, ...] = (7, 15, 23, 31)
    window: int = 24
    patch: int = 14
    pretrained_size: int = 336
    norm_eps: float = 1e-5
    text_width: int = 1024
    text_depth: int = 24
    text_heads: int = 16
    text_mlp: int = 4096
    context: int = 32
    hidden: int = 256
    hidden_heads: int = 8
    hidden_mlp: int = 2048
    geometry_layers: int = 3
    encoder_layers: int = 6
    decoder_layers: int = 6
    queries: int = 200


def config_of(shape: SAM3Shape, image_size: int, dropout: float = 0.0, attention: str | None = None) -> Sam3Config:
    """What transformers calls these sizes."""
    detector = {
        "dropout": dropout,
        "hidden_size": shape.hidden,
        "num_attention_heads": shape.hidden_heads,
        "intermediate_size": shape.hidden_mlp,
    }
    tokens = image_size // shape.patch
    config = Sam3Config(
        vision_config={
            "backbone_config": {
                "model_type": "sam3_vit_model",
                "hidden_size": shape.width,
                "num_hidden_layers": shape.depth,
                "num_attention_heads": shape.heads,
                "intermediate_size": shape.mlp,
                "global_attn_indexes": list(shape.global_blocks),
                "window_size": shape.window,
                "patch_size": shape.patch,
                "image_size": image_size,
                "pretrain_image_size": shape.pretrained_size,
                "layer_norm_eps": shape.norm_eps,
            },
            "fpn_hidden_size": shape.hidden,
            "backbone_feature_sizes": [[4 * tokens] * 2, [2 * tokens] * 2, [tokens] * 2],
        },
        text_config={
            "model_type": "clip_text_model",
            "vocab_size": VOCABULARY,
            "hidden_size": shape.text_width,
            "intermediate_size": shape.text_mlp,
            "projection_dim": shape.text_width // 2,
            "num_hidden_layers": shape.text_depth,
            "num_attention_heads": shape.text_heads,
            "max_position_embeddings": shape.context,
            "hidden_act": "gelu",
        },
        geometry_encoder_config={**detector, "num_layers": shape.geometry_layers},
        detr_encoder_config={**detector, "num_layers": shape.encoder_layers},
        detr_decoder_config={**detector, "num_layers": shape.decoder_layers, "num_queries": shape.queries},
        mask_decoder_config={"hidden_size": shape.hidden, "num_attention_heads": shape.hidden_heads},
    )
    config._attn_implementation = attention or "sdpa"
    return config


def check_sizes(shape: SAM3Shape, image_size: int, dropout: float, drop_path: float) -> None:
    """Refuse sizes that no SAM3 can have.

    Raises:
        UserError: The first of them.
    """
    sizes = {name: value for name, value in vars(shape).items() if name != "global_blocks"}
    small = [name for name, value in sizes.items() if value < 1 and name != "norm_eps"]
    if small:
        raise UserError(f"shape.{small[0]} {sizes[small[0]]}: sizes are 1 or more")
    if not 0 < shape.norm_eps < 1:
        raise UserError(f"shape.norm_eps {shape.norm_eps}: a small number above 0, such as 1e-5")
    beyond = [place for place in shape.global_blocks if not 0 <= place < shape.depth]
    if beyond:
        raise UserError(
            f"shape.global_blocks {beyond[0]}: shape.depth {shape.depth} has the blocks 0 to {shape.depth - 1}"
        )
    if shape.context < 3:
        raise UserError(
            f"shape.context {shape.context}: a text takes 3 tokens or more: its start, one of it, and its end"
        )
    if shape.pretrained_size < shape.patch:
        raise UserError(f"shape.pretrained_size {shape.pretrained_size}: at least shape.patch, {shape.patch} pixels")
    for width, heads, step in (
        ("width", "heads", 4),
        ("text_width", "text_heads", 1),
        ("hidden", "hidden_heads", 1),
    ):
        if sizes[width] % (step * sizes[heads]):
            raise UserError(f"shape.{width} {sizes[width]}: a multiple of {step * sizes[heads]}, for shape.{heads}")
    if shape.hidden % 8 or shape.width % 4:
        raise UserError(f"shape.hidden {shape.hidden} is a multiple of 8, shape.width {shape.width} of 4")
    if image_size < shape.patch or image_size % shape.patch:
        raise UserError(f"image_size {image_size}: SAM3 takes a multiple of its patch of {shape.patch} pixels")
    if not all(0 <= share < 1 for share in (dropout, drop_path)):
        raise UserError(f"dropout {dropout} and drop_path {drop_path} are in [0, 1)")
