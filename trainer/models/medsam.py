"""SAM and MedSAM: a ViT with windowed attention, SAM's prompt encoder and mask decoder, from transformers.

Shapes: B images, S input side (1024 in the originals), g = S/16 side of the features.
Sources: Kirillov et al. 2023 (arXiv:2304.02643); Ma et al. 2024 (doi:10.1038/s41467-024-44824-z).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor
from transformers.models.sam.configuration_sam import SamVisionConfig

from data_shards.errors import UserError
from trainer.models.attention import Way, encoder_with
from trainer.models.preprocessing import Preprocessing
from trainer.models.recomputing import Recomputed, recompute_layers, recomputed_kinds
from trainer.models.sam import WIDTH, SAMDecoding
from trainer.models.sam_names import SAM_DECODER, SAM_ENCODER, TRANSFORMERS, rename
from trainer.models.weights import load_strictly, read_weights, source_of

ORIGINAL_SIZE = 1024
"""Input side that the released weights were trained at, in pixels."""


@dataclass(frozen=True)
class ViT:
    """Shape of SAM's image encoder.

    Attributes:
        width: Channels of a token.
        depth: Number of blocks.
        heads: Attention heads; they divide `width`.
        global_blocks: Positions of the blocks that attend over the whole image; the others do in windows.
        window: Side of a window in tokens.
        patch: Side of a patch in pixels.
    """

    width: int = 768
    depth: int = 12
    heads: int = 12
    global_blocks: tuple[int, ...] = (2, 5, 8, 11)
    window: int = 14
    patch: int = 16


VARIANTS = {
    "vit_b": ViT(),
    "vit_l": ViT(width=1024, depth=24, heads=16, global_blocks=(5, 11, 17, 23)),
    "vit_h": ViT(width=1280, depth=32, heads=16, global_blocks=(7, 15, 23, 31)),
}


class MedSAM(SAMDecoding):
    """SAM's architecture: ViT-B as in MedSAM (93.7 M parameters), ViT-L and ViT-H as in SAM.

    Args:
        encoder: ``vit_b``, ``vit_l``, ``vit_h``, or another shape, key by key.
        image_size: Input side S in pixels, a multiple of the patch. The released weights were trained at 1024; at
            another side their positions are interpolated, and less is faster.
        weights: A hub name (``wanglab/medsam-vit-base``, ``facebook/sam-vit-base``), a folder that transformers wrote,
            or a file in MedSAM's and Meta's ``.pth`` layout; null is random.
        weights_sha256: What the weights file must hash to, in hexadecimal; optional.
        input_like: ``medsam`` squashes an image and scales it to [0, 1]; ``sam`` pads it and takes Meta's mean and
            standard deviation. Weights work with what they were trained with.
        attention: How the encoder attends, all equal but for rounding: ``eager``, the plain form; ``sdpa``, one kernel
            with positions as a bias; ``widened``, one kernel without a bias, which flash attention takes; ``chunked``,
            for CPUs, keeps no scores; ``flex``, FlexAttention, on GPUs alone. Null takes ``chunked`` on a CPU, which is
            fastest there, and ``widened`` on a GPU.
        checkpoint_activations: Compute each block a second time in the backward pass instead of keeping what is in it:
            much less memory, about a third more time. Or a list of kinds of blocks; here there is ``image_encoder``.
    """

    patch_embedding = ("image_encoder.patch_embed", "image_encoder.pos_embed")

    def __init__(
        self,
        encoder: Literal["vit_b", "vit_l", "vit_h"] | ViT = "vit_b",
        image_size: int = ORIGINAL_SIZE,
        weights: str | None = "wanglab/medsam-vit-base",
        weights_sha256: str | None = None,
        input_like: Literal["medsam", "sam"] = "medsam",
        attention: Way | None = None,
        checkpoint_activations: Recomputed = False,
    ) -> None:
        super().__init__()
        self.shape = VARIANTS[encoder] if isinstance(encoder, str) else encoder
        _check_shape(self.shape, image_size)
        self._arguments = {"input_like": input_like, "attention": attention}
        if input_like == "medsam":
            self.preprocessing = Preprocessing(image_size, resize="squash", scaling="minmax", interpolation="bicubic")
        else:
            self.preprocessing = Preprocessing(image_size, resize="pad", scaling="mean_std")
        config = SamVisionConfig(
            hidden_size=self.shape.width,
            num_hidden_layers=self.shape.depth,
            num_attention_heads=self.shape.heads,
            image_size=image_size,
            patch_size=self.shape.patch,
            window_size=self.shape.window,
            global_attn_indexes=list(self.shape.global_blocks),
            output_channels=WIDTH,
        )
        self.image_encoder = encoder_with(config, attention)
        self.add_decoder(image_size, self.shape.patch, layer_norm_eps=1e-5)
        if recomputed_kinds(checkpoint_activations, [self.encoder]):
            recompute_layers(self.image_encoder)
        if (source := source_of(weights)) is not None:
            self.load(read_weights(source, weights_sha256), source)
        self.train()

    def encode(self, images: Tensor) -> Tensor:
        """Encode images (B, 3, S, S) into features (B, 256, g, g)."""
        features: Tensor = self.image_encoder(images).last_hidden_state
        return features

    def load(self, state: Mapping[str, Tensor], source: str) -> None:
        """Load weights in any of the layouts, for any input side.

        Args:
            state: Tensors by name, in transformers', the original or our own layout.
            source: Where they came from, for messages.

        Raises:
            UserError: They are of another architecture, or not all there.
        """
        ours = to_ours(state)
        _check_architecture(ours, self.shape, source)
        load_strictly(self, _at_side(ours, self.preprocessing.image_size // self.shape.patch, self.shape), source)

    def at_size(self, image_size: int) -> MedSAM:
        """A copy for another input side: its positions are interpolated, so it computes another function."""
        copy = MedSAM(self.shape, image_size, weights=None, **self._arguments)  # type: ignore[arg-type]
        copy.load(self.state_dict(), "of this model")
        return copy.to(next(self.parameters()).device).train(self.training)  # type: ignore[return-value]


def to_ours(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename MedSAM's and Meta's layout, or transformers', to ours; ours stays as it is."""
    if any(name.startswith("vision_encoder.") for name in state):
        # transformers names one embedding twice, and writes it under the first name, or under both
        return rename({name: state[name] for name in sorted(state, reverse=True)}, TRANSFORMERS)
    if any(name.startswith("image_encoder.layers.") for name in state):
        return dict(state)
    return rename(state, (*SAM_ENCODER, *SAM_DECODER))


def to_original(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename our layout to MedSAM's and Meta's."""
    return rename(state, (*SAM_ENCODER, *SAM_DECODER), to_original=True)


def _check_shape(shape: ViT, image_size: int) -> None:
    if min(shape.width, shape.depth, shape.heads, shape.window, shape.patch) < 1 or shape.width % (2 * shape.heads):
        raise UserError(f"encoder {shape}: sizes are 1 or more, and width is a multiple of twice the heads")
    if image_size < shape.patch or image_size % shape.patch:
        raise UserError(f"image_size {image_size}: MedSAM takes a multiple of its patch of {shape.patch} pixels")


def _check_architecture(state: Mapping[str, Tensor], shape: ViT, source: str) -> None:
    """Say at once that weights are of another encoder, instead of listing every tensor."""
    projection = state.get("image_encoder.patch_embed.projection.weight")
    depth = len({name.split(".")[2] for name in state if name.startswith("image_encoder.layers.")})
    if projection is None or not depth:
        raise UserError(
            f"weights {source}: no SAM or MedSAM: they lack its image encoder's blocks; LiteMedSAM's belong to "
            "trainer.models.LiteMedSAM"
        )
    width = projection.shape[0]
    if (width, depth) != (shape.width, shape.depth):
        fitting = (name for name, variant in VARIANTS.items() if (variant.width, variant.depth) == (width, depth))
        hint = next((f": set the model's encoder to {name}" for name in fitting), "")
        raise UserError(
            f"weights {source}: their encoder has {depth} blocks of width {width}, the recipe's {shape.depth} of "
            f"{shape.width}{hint}"
        )


def _at_side(state: Mapping[str, Tensor], side: int, shape: ViT) -> dict[str, Tensor]:
    """Interpolate positions to `side` tokens: absolute ones bilinear, relative ones linear as SAM itself does."""
    resized = dict(state)
    positions = state.get("image_encoder.pos_embed")
    if positions is not None and positions.ndim == 4 and positions.shape[1:3] != (side, side):
        grid = F.interpolate(positions.permute(0, 3, 1, 2).float(), (side, side), mode="bilinear", antialias=True)
        resized["image_encoder.pos_embed"] = grid.permute(0, 2, 3, 1).to(positions.dtype)
    for block in shape.global_blocks:
        for axis in ("h", "w"):
            name = f"image_encoder.layers.{block}.attn.rel_pos_{axis}"
            table = state.get(name)
            if table is not None and table.ndim == 2 and len(table) != 2 * side - 1:
                line = F.interpolate(table.T[None].float(), 2 * side - 1, mode="linear")
                resized[name] = line[0].T.to(table.dtype)
    return resized
