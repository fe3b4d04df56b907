"""The official SAM3 image model: at tiny size from its own classes, and the released one on the meta device.

Shapes: S input side, g = S/14 side in tokens, C channels of the detector.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from trainer.models import SAM3Shape

SIDE, PATCH, WINDOW, PRETRAINED = 112, 14, 4, 28
WIDTH, DEPTH, HEADS, GLOBAL = 32, 3, 2, (1, 2)
TEXT_WIDTH, TEXT_DEPTH, TEXT_HEADS = 32, 2, 2
C, FFN, QUERIES, LAYERS, GEOMETRY_LAYERS = 32, 48, 7, 2, 2


def merges() -> str:
    """Path of CLIP's byte-pair merges, which the official wheel lacks."""
    spec = importlib.util.find_spec("open_clip")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("no byte-pair merges: open-clip-torch is not installed")
    return str(Path(next(iter(spec.submodule_search_locations))) / "bpe_simple_vocab_16e6.txt.gz")


SHAPE = SAM3Shape(
    width=WIDTH, depth=DEPTH, heads=HEADS, mlp=int(4.625 * WIDTH), global_blocks=GLOBAL, window=WINDOW, patch=PATCH,
    pretrained_size=PRETRAINED, text_width=TEXT_WIDTH, text_depth=TEXT_DEPTH, text_heads=TEXT_HEADS,
    text_mlp=4 * TEXT_WIDTH, hidden=C, hidden_mlp=FFN, geometry_layers=GEOMETRY_LAYERS, encoder_layers=LAYERS,
    decoder_layers=LAYERS, queries=QUERIES,
)  # fmt: skip
"""Our name for the shape of `tiny`."""


def fusion_layer(positions: bool, dropout: float) -> nn.Module:
    """A layer of the official DETR encoder, or of its geometry encoder."""
    from sam3.model.encoder import TransformerEncoderLayer
    from sam3.model.model_misc import MultiheadAttentionWrapper as Attention

    return TransformerEncoderLayer(
        activation="relu",
        d_model=C,
        dim_feedforward=FFN,
        dropout=dropout,
        pos_enc_at_attn=positions,
        pos_enc_at_cross_attn_keys=not positions,
        pos_enc_at_cross_attn_queries=False,
        pre_norm=True,
        self_attention=Attention(num_heads=8, dropout=dropout, embed_dim=C, batch_first=positions),
        cross_attention=Attention(num_heads=8, dropout=dropout, embed_dim=C, batch_first=positions),
    )


def tiny(dropout: float = 0.1) -> Any:
    """A tiny official Sam3Image with random weights, put together as its builder does; in evaluation mode.

    Args:
        dropout: Of all that drops out.
    """
    from sam3.model.decoder import TransformerDecoder, TransformerDecoderLayer
    from sam3.model.encoder import TransformerEncoderFusion
    from sam3.model.geometry_encoders import SequenceGeometryEncoder
    from sam3.model.maskformer_segmentation import PixelDecoder, UniversalSegmentationHead
    from sam3.model.model_misc import MLP, DotProductScoring, TransformerWrapper
    from sam3.model.model_misc import MultiheadAttentionWrapper as Attention
    from sam3.model.necks import Sam3DualViTDetNeck
    from sam3.model.position_encoding import PositionEmbeddingSine
    from sam3.model.sam3_image import Sam3Image
    from sam3.model.text_encoder_ve import VETextEncoder
    from sam3.model.tokenizer_ve import SimpleTokenizer
    from sam3.model.vitdet import ViT
    from sam3.model.vl_combiner import SAM3VLBackbone

    def positions() -> nn.Module:
        return PositionEmbeddingSine(num_pos_feats=C, normalize=True)

    trunk = ViT(
        img_size=SIDE, pretrain_img_size=PRETRAINED, patch_size=PATCH, embed_dim=WIDTH, depth=DEPTH, num_heads=HEADS,
        mlp_ratio=4.625, drop_path_rate=dropout, tile_abs_pos=True, global_att_blocks=GLOBAL, rel_pos_blocks=(),
        use_rope=True, use_interp_rope=True, window_size=WINDOW, pretrain_use_cls_token=True, retain_cls_token=False,
        ln_pre=True, bias_patch_embed=False,
    )  # fmt: skip
    neck = Sam3DualViTDetNeck(
        trunk=trunk, position_encoding=positions(), d_model=C, scale_factors=[4.0, 2.0, 1.0, 0.5], add_sam2_neck=False
    )
    text = VETextEncoder(
        d_model=C, tokenizer=SimpleTokenizer(bpe_path=merges()), width=TEXT_WIDTH, heads=TEXT_HEADS, layers=TEXT_DEPTH
    )
    text.encoder.text_projection = nn.Parameter(torch.empty(TEXT_WIDTH, TEXT_WIDTH // 2))  # else it has 512 columns
    encoder = TransformerEncoderFusion(
        layer=fusion_layer(True, dropout), num_layers=LAYERS, d_model=C, num_feature_levels=1, use_act_checkpoint=True,
        add_pooled_text_to_img_feat=False, pool_text_with_mask=True,
    )  # fmt: skip
    decoder_layer = TransformerDecoderLayer(
        activation="relu", d_model=C, dim_feedforward=FFN, dropout=dropout, n_heads=8, use_text_cross_attention=True,
        cross_attention=Attention(num_heads=8, dropout=dropout, embed_dim=C),
    )  # fmt: skip
    decoder = TransformerDecoder(
        layer=decoder_layer, num_layers=LAYERS, num_queries=QUERIES, return_intermediate=True, box_refine=True,
        num_o2m_queries=0, dac=True, boxRPB="log", d_model=C, frozen=False, interaction_layer=None,
        dac_use_selfatt_ln=True, use_act_checkpoint=True, presence_token=True,
    )  # fmt: skip
    geometry = SequenceGeometryEncoder(
        pos_enc=positions(), encode_boxes_as_points=False, points_direct_project=True, points_pool=True,
        points_pos_enc=True, boxes_direct_project=True, boxes_pool=True, boxes_pos_enc=True, d_model=C,
        num_layers=GEOMETRY_LAYERS, layer=fusion_layer(False, dropout), use_act_ckpt=True,
    )  # fmt: skip
    prompt_mlp = MLP(C, FFN, C, 2, dropout=dropout, residual=True, out_norm=nn.LayerNorm(C))
    head = UniversalSegmentationHead(
        hidden_dim=C, upsampling_stages=3, aux_masks=False, presence_head=False, dot_product_scorer=None,
        act_ckpt=True, cross_attend_prompt=Attention(num_heads=8, dropout=0, embed_dim=C),
        pixel_decoder=PixelDecoder(num_upsampling_stages=3, interpolation_mode="nearest", hidden_dim=C),
    )  # fmt: skip
    model = Sam3Image(
        backbone=SAM3VLBackbone(visual=neck, text=text, scalp=1),
        transformer=TransformerWrapper(encoder=encoder, decoder=decoder, d_model=C),
        input_geometry_encoder=geometry,
        segmentation_head=head,
        num_feature_levels=1,
        o2m_mask_predict=True,
        dot_prod_scoring=DotProductScoring(d_model=C, d_proj=C, prompt_mlp=prompt_mlp),
        use_instance_query=False,
        multimask_output=True,
    )
    for name, parameter in model.named_parameters():  # zeros and ones would hide what is mixed up
        nn.init.normal_(parameter, std=0.3 if parameter.ndim < 2 else parameter[0].numel() ** -0.5)
        if "norm" in name and name.endswith("weight"):
            parameter.data.add_(1)
    nn.init.normal_(decoder.reference_points.weight)
    return model.eval()


class _WithoutMemory(TorchFunctionMode):
    """What modules are made of is made on the meta device; small constants are real ones on the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(kwargs or {})
        if func in (torch.empty, torch.zeros, torch.randn) or given.get("device") == "cuda":
            given["device"] = "meta"
        return func(*args, **given)


def released(video: bool = False) -> nn.Module:
    """The released official model on the meta device: that of images, or that of videos with the tracker."""
    from sam3 import model_builder

    with _WithoutMemory():
        if video:
            built: nn.Module = model_builder.build_sam3_video_model(
                load_from_HF=False, bpe_path=merges(), device="meta"
            )
            return built
        made: nn.Module = model_builder.build_sam3_image_model(bpe_path=merges(), device="cpu", load_from_HF=False)
    return made
