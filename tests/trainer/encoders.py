"""One tiny model of each family, with random weights: what every tuning method is tried on.

Shapes: inputs are (B, 3, side, side) with the side that `SIDES` says.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.sam3.configuration_sam3 import Sam3ViTConfig
from transformers.models.sam3.modeling_sam3 import Sam3ViTModel

from trainer.models import LiteMedSAM, MedSAM, Preprocessing, SegmentationModel
from trainer.models.medsam import ViT
from trainer.models.sam import WIDTH, SAMDecoding
from trainer.prompts import Prompts

SIDES = {"medsam": 64, "litemedsam": 64, "sam2": 64, "sam3": 56}
BLOCKS = {
    "medsam": [f"image_encoder.layers.{i}" for i in range(3)],
    "litemedsam": [
        f"image_encoder.trunk.stages.{stage}.blocks.{i}" for stage, n in ((1, 2), (2, 6), (3, 2)) for i in range(n)
    ],
    "sam2": [f"image_encoder.blocks.{i}" for i in range(6)],
    "sam3": [f"image_encoder.layers.{i}" for i in range(3)],
}
"""The names that the transformer blocks have."""
ATTENTION = {"medsam": "attn", "litemedsam": "attn", "sam2": "attn", "sam3": "attention"}
"""What a block calls its attention."""


class Encoder(SAMDecoding):
    """Another family's encoder, SAM's prompt encoder and decoder on top of it: until issue-wise modules are there."""

    def __init__(self, image_encoder: nn.Module, side: int, stride: int, width: int, patch: tuple[str, ...]) -> None:
        super().__init__()
        self.preprocessing = Preprocessing(image_size=side)
        self.image_encoder = image_encoder
        self.neck = nn.Conv2d(width, WIDTH, kernel_size=1)
        self.patch_embedding = patch
        self.add_decoder(side, stride, layer_norm_eps=1e-5)

    def encode(self, images: Tensor) -> Tensor:
        found: Any = self.image_encoder(images)
        if isinstance(found, list):  # Hiera: features of each stage
            features = found[-1]
        else:
            side = int(found.last_hidden_state.shape[1] ** 0.5)
            features = found.last_hidden_state.transpose(1, 2).unflatten(2, (side, side))
        encoded: Tensor = self.neck(features)
        return encoded

    def at_size(self, image_size: int) -> SegmentationModel:
        raise NotImplementedError


def medsam() -> SegmentationModel:
    return MedSAM(ViT(width=32, depth=3, heads=2, global_blocks=(1,), window=3), 64, weights=None)


def litemedsam() -> SegmentationModel:
    return LiteMedSAM(64, weights=None)


def sam2() -> SegmentationModel:
    hieradet = pytest.importorskip("sam2.modeling.backbones.hieradet")
    trunk = hieradet.Hiera(
        embed_dim=16, num_heads=1, stages=(1, 2, 2, 1), global_att_blocks=(4,), window_spec=(8, 4, 4, 2),
        window_pos_embed_bkg_spatial_size=(4, 4),
    )  # fmt: skip
    patch = ("image_encoder.patch_embed", "image_encoder.pos_embed", "image_encoder.pos_embed_window")
    return Encoder(trunk, 64, 32, 128, patch)


def sam3() -> SegmentationModel:
    config = Sam3ViTConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, image_size=56,
        window_size=2, global_attn_indexes=[1], pretrain_image_size=28,
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    return Encoder(Sam3ViTModel(config), 56, 14, 32, ("image_encoder.embeddings",))


FAMILIES: dict[str, Callable[[], SegmentationModel]] = {
    "medsam": medsam,
    "litemedsam": litemedsam,
    "sam2": sam2,
    "sam3": sam3,
}


def make(family: str, seed: int = 0) -> SegmentationModel:
    """A tiny model with random weights, none of them zero, in evaluation mode."""
    torch.manual_seed(seed)
    model = FAMILIES[family]()
    with torch.no_grad():
        for parameter in model.parameters():  # zeros and ones would hide what a method does
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model.eval()


def logits(model: SegmentationModel, family: str) -> Tensor:
    """Mask logits of two boxes on a fixed random image."""
    side = SIDES[family]
    image = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(1))
    boxes = torch.tensor([[5.0, 8.0, 50.0, 52.0], [20.0, 20.0, 30.0, 40.0]])
    decoded: Tensor = model.decode(model.encode(image), Prompts(torch.zeros(2, dtype=torch.int64), boxes))[0]
    return decoded


def learning(model: nn.Module) -> set[str]:
    """Names of the parameters that learn."""
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}
