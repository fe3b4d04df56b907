"""LiteMedSAM: TinyViT at 256 px with SAM's prompt encoder and mask decoder (bowang-lab, 2024 CVPR challenge baseline).

Shapes: B images, Q prompts, S input side (256 in the original), h w = S/4 in features, S in masks.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from timm.layers import LayerNorm2d
from timm.models.tiny_vit import Attention, TinyVit
from torch import Tensor, nn

from data_shards.errors import UserError
from trainer.models.preprocessing import Preprocessing
from trainer.models.recomputing import Recomputed, recompute_blocks, recomputed_kinds
from trainer.models.sam import WIDTH, SAMDecoding
from trainer.models.sam_names import SAM_DECODER, rename
from trainer.models.weights import load_strictly, read_weights, source_of

STRIDE = 4
"""Input pixels to a side of a feature."""
ORIGINAL_SIZE = 256
"""Input side that the released weights were trained at, in pixels."""

_STAGES = 4
_ENCODER = (
    ("image_encoder.neck.", "image_encoder.neck."),
    ("image_encoder.patch_embed.seq.0.", "image_encoder.trunk.patch_embed.conv1."),
    ("image_encoder.patch_embed.seq.2.", "image_encoder.trunk.patch_embed.conv2."),
    ("image_encoder.layers.#.blocks.", "image_encoder.trunk.stages.#.blocks."),
    # a stage's downsampling is the end of the stage before it in the original, the start of the stage in timm
    *(
        (f"image_encoder.layers.{i}.downsample.", f"image_encoder.trunk.stages.{i + 1}.downsample.")
        for i in range(_STAGES - 1)
    ),
)


class TinyViTEncoder(nn.Module):
    """timm's TinyViT in LiteMedSAM's variant: no stride in the patch embedding and in the last stage."""

    def __init__(self) -> None:
        super().__init__()
        planned = torch.get_default_device().type == "meta"
        # older versions of timm compute with numbers here, and a plan's device has none; a plan draws nothing
        with torch.device("cpu"), torch.random.fork_rng(devices=[], enabled=planned):
            trunk = TinyVit(
                embed_dims=(64, 128, 160, 320),
                depths=(2, 2, 6, 2),
                num_heads=(2, 4, 5, 10),
                window_sizes=(7, 7, 14, 7),
                drop_path_rate=0.0,
                num_classes=0,
            )
        trunk = trunk.to(torch.get_default_device())
        for norm_conv in (trunk.patch_embed.conv1, trunk.patch_embed.conv2):
            old = norm_conv.conv
            norm_conv.conv = nn.Conv2d(old.in_channels, old.out_channels, kernel_size=1, bias=False)
        trunk.stages[3].downsample.conv2.conv.stride = (1, 1)
        trunk.head = nn.Identity()
        self.trunk = trunk
        self.neck = nn.Sequential(
            nn.Conv2d(320, WIDTH, kernel_size=1, bias=False),
            LayerNorm2d(WIDTH, eps=1e-6),
            nn.Conv2d(WIDTH, WIDTH, kernel_size=3, padding=1, bias=False),
            LayerNorm2d(WIDTH, eps=1e-6),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Encode images (B, 3, S, S) into features (B, 256, S/4, S/4)."""
        features = self.trunk.stages(self.trunk.patch_embed(images))
        encoded: Tensor = self.neck(features)
        return encoded


class LiteMedSAM(SAMDecoding):
    """LiteMedSAM: 9.79 M parameters, 5.73 M of them in the encoder; runs on a laptop.

    Args:
        image_size: Input side S in pixels, a multiple of 8. The released weights were trained at 256; less is faster.
        weights: ``litemedsam`` (the released weights), a path, a hub name ``owner/repository:file``; null is random.
        weights_sha256: What the weights file must hash to, in hexadecimal; optional.
        checkpoint_activations: Compute each block a second time in the backward pass instead of keeping what is in it:
            less memory, about a third more time. Or a list of kinds of blocks; here there is ``image_encoder``.
    """

    patch_embedding = ("image_encoder.trunk.patch_embed",)

    def __init__(
        self,
        image_size: int = ORIGINAL_SIZE,
        weights: str | None = "litemedsam",
        weights_sha256: str | None = None,
        checkpoint_activations: Recomputed = False,
    ) -> None:
        super().__init__()
        if image_size < 32 or image_size % 8:
            raise UserError(f"image_size {image_size}: LiteMedSAM takes a multiple of 8 pixels, 32 or more")
        self.preprocessing = Preprocessing(image_size=image_size, resize="pad", scaling="minmax")
        self.image_encoder = TinyViTEncoder()
        self.add_decoder(image_size, STRIDE, layer_norm_eps=1e-5)  # 1e-6 would cost 0.014 in the logits
        if (source := source_of(weights)) is not None:
            load_strictly(self, from_original(read_weights(source, weights_sha256)), source)
        if recomputed_kinds(checkpoint_activations, [self.encoder]):
            recompute_blocks(self.get_submodule(block.name) for block in self.blocks())
        self.train()  # a module is born in training mode without this being called: batch-norm would not be frozen

    def train(self, mode: bool = True) -> LiteMedSAM:
        """Switch training on or off, and forget the attention biases that TinyViT caches in evaluation.

        Older releases of timm drop them only when training is switched on by this method, which Lightning goes round
        after a validation: the next one would still see the biases of the first.
        """
        super().train(mode)
        for module in self.modules():
            if isinstance(module, Attention):
                module.attention_bias_cache = {}
        return self

    def encode(self, images: Tensor) -> Tensor:
        """Encode images (B, 3, S, S) into features (B, 256, S/4, S/4)."""
        features: Tensor = self.image_encoder(images)
        return features

    def layer_ids(self) -> dict[str, int]:
        """Depth by name: patch embedding 0, the 12 blocks 1 to 12 (downsampling with the block after it), rest 13."""
        trunk, first_of_stage, depth = self.image_encoder.trunk, [], 1
        for stage in trunk.stages:
            first_of_stage.append(depth)
            depth += len(stage.blocks)
        ids = {}
        for name, _ in self.named_parameters():
            part = name.split(".")
            if name.startswith("image_encoder.trunk.stages."):
                ids[name] = first_of_stage[int(part[3])] + (int(part[5]) if part[4] == "blocks" else 0)
            else:
                ids[name] = 0 if name.startswith("image_encoder.trunk.patch_embed.") else depth
        return ids

    def at_size(self, image_size: int) -> LiteMedSAM:
        """A copy for another input side: no weight depends on it."""
        copy = LiteMedSAM(image_size=image_size, weights=None).to(next(self.parameters()).device)
        load_strictly(copy, self.state_dict(), "of this model")
        copy.train(self.training)
        return copy


def from_original(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename LiteMedSAM's released layout (``.c`` convolutions, ``layers``) to ours; ours stays as it is."""
    if any(name.startswith("image_encoder.trunk.") for name in state):
        return dict(state)
    renamed = rename(state, (*_ENCODER, *SAM_DECODER))
    return {_conv_norm(name, ".c.", ".conv."): tensor for name, tensor in renamed.items()}


def to_original(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename our layout to LiteMedSAM's released one; the inverse of `from_original`."""
    shortened = {_conv_norm(name, ".conv.", ".c."): tensor for name, tensor in state.items()}
    return rename(shortened, (*_ENCODER, *SAM_DECODER), to_original=True)


def _conv_norm(name: str, old: str, new: str) -> str:
    return name.replace(old, new) if name.startswith("image_encoder.") else name
