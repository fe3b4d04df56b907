"""SAM2's parts, from the package `sam2`, in the sizes that a shape says.

Shapes: none.
Source: Ravi et al. 2024 (arXiv:2408.00714); the configurations of SAM 2.1.
"""

from __future__ import annotations

from typing import Any

from sam2.modeling.backbones.image_encoder import FpnNeck, ImageEncoder
from sam2.modeling.memory_attention import MemoryAttention, MemoryAttentionLayer
from sam2.modeling.memory_encoder import CXBlock, Fuser, MaskDownSampler, MemoryEncoder
from sam2.modeling.position_encoding import PositionEmbeddingSine
from sam2.modeling.sam.transformer import RoPEAttention
from torch import nn

from trainer.models.sam2_hiera import Trunk
from trainer.models.sam2_shape import STRIDE, SAM2Shape


def _positions(channels: int) -> PositionEmbeddingSine:
    return PositionEmbeddingSine(num_pos_feats=channels, normalize=True, scale=None, temperature=10000)


def image_encoder(shape: SAM2Shape, drop_path: float) -> nn.Module:
    """Hiera with its neck."""
    trunk = Trunk(
        embed_dim=shape.embed_dim,
        num_heads=shape.num_heads,
        drop_path_rate=drop_path,
        stages=shape.stages,
        global_att_blocks=shape.global_blocks,
        window_spec=shape.window_spec,
        window_pos_embed_bkg_spatial_size=(shape.background, shape.background),
    )
    neck = FpnNeck(
        position_encoding=_positions(shape.width),
        d_model=shape.width,
        backbone_channel_list=shape.channels,
        fpn_top_down_levels=[2, 3],
        fpn_interp_model="nearest",
    )
    return ImageEncoder(trunk=trunk, neck=neck, scalp=1)


def memory_attention(shape: SAM2Shape, image_size: int, dropout: float) -> nn.Module:
    """What conditions a frame's features on memories."""
    side = image_size // STRIDE
    rotary: dict[str, Any] = {
        "rope_theta": 10000.0, "feat_sizes": (side, side), "embedding_dim": shape.width, "num_heads": 1,
        "downsample_rate": 1, "dropout": dropout,
    }  # fmt: skip
    layer = MemoryAttentionLayer(
        activation="relu",
        dim_feedforward=shape.feedforward,
        dropout=dropout,
        pos_enc_at_attn=False,
        self_attention=RoPEAttention(**rotary),
        d_model=shape.width,
        pos_enc_at_cross_attn_keys=True,
        pos_enc_at_cross_attn_queries=False,
        cross_attention=RoPEAttention(**rotary, rope_k_repeat=True, kv_in_dim=shape.memory_width),
    )
    return MemoryAttention(d_model=shape.width, pos_enc_at_input=True, layer=layer, num_layers=shape.memory_layers)


def memory_encoder(shape: SAM2Shape) -> nn.Module:
    """What makes a memory of a frame's features and a mask."""
    return MemoryEncoder(
        out_dim=shape.memory_width,
        in_dim=shape.width,
        position_encoding=_positions(shape.memory_width),
        mask_downsampler=MaskDownSampler(embed_dim=shape.width, kernel_size=3, stride=2, padding=1),
        fuser=Fuser(
            CXBlock(dim=shape.width, kernel_size=7, padding=3, layer_scale_init_value=1e-6, use_dwconv=True),
            num_layers=2,
        ),
    )


def composition(shape: SAM2Shape, image_size: int, postprocessing: bool) -> dict[str, Any]:
    """How SAM 2.1 puts its parts together."""
    stable = {
        "dynamic_multimask_via_stability": True,
        "dynamic_multimask_stability_delta": 0.05,
        "dynamic_multimask_stability_thresh": 0.98,
    }
    return {
        "num_maskmem": shape.memories,
        "image_size": image_size,
        "max_obj_ptrs_in_encoder": shape.pointers,
        "sigmoid_scale_for_mem_enc": 20.0,
        "sigmoid_bias_for_mem_enc": -10.0,
        "use_mask_input_as_output_without_sam": True,
        "directly_add_no_mem_embed": True,
        "no_obj_embed_spatial": True,
        "use_high_res_features_in_sam": True,
        "multimask_output_in_sam": True,
        "iou_prediction_use_sigmoid": True,
        "use_obj_ptrs_in_encoder": True,
        "add_tpos_enc_to_obj_ptrs": True,
        "proj_tpos_enc_in_obj_ptrs": True,
        "use_signed_tpos_enc_to_obj_ptrs": True,
        "only_obj_ptrs_in_the_past_for_eval": True,
        "pred_obj_scores": True,
        "pred_obj_scores_mlp": True,
        "fixed_no_obj_ptr": True,
        "multimask_output_for_tracking": True,
        "use_multimask_token_for_obj_ptr": True,
        "multimask_min_pt_num": 0,
        "multimask_max_pt_num": 1,
        "use_mlp_for_obj_ptr_proj": True,
        "binarize_mask_from_pts_for_mem_enc": postprocessing,
        "sam_mask_decoder_extra_args": stable if postprocessing else None,
    }
