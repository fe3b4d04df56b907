"""A specialist: a U-Net that is told the box by a channel of its own, as in the comparisons of MedSAM's paper.

Its network is MONAI's, with random weights at the start: what does a foundation model gain over a network that has seen
these data alone? Nothing is encoded once for all prompts of an image: the box is a part of the input.

Shapes: B images, Q prompts, C channels of an image, S input side, also that of the masks.
Sources: Ronneberger et al. 2015 (arXiv:1505.04597); Falk et al. 2019 (doi:10.1038/s41592-018-0261-2), whose layout
MONAI's `BasicUNet` has; the box as a binary mask beside the image: Ma et al. 2024 (doi:10.1038/s41467-024-44824-z).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from data_shards.errors import UserError
from trainer.models.base import SegmentationModel
from trainer.models.preprocessing import Preprocessing
from trainer.models.weights import load_strictly, read_weights, source_of
from trainer.prompts.base import Prompts

STRIDE = 16
"""Input pixels to a side of the coarsest features."""


class BoxUNet(SegmentationModel):
    """MONAI's U-Net with a box as another input channel: 1.98 M parameters, trained from scratch.

    All of it learns in `FullTuning` with ``freeze: []``, at a learning rate of its own: 1e-3 about, where a foundation
    model takes 1e-4. It is asked with boxes alone, and no export format but a checkpoint holds it.

    Args:
        image_size: Input side S in pixels, a multiple of 16.
        features: Channels of the five levels, from full resolution down, and of the last layer; MONAI's by default.
        weights: A file with this network's tensors; null is random, as a specialist begins.
        weights_sha256: What the weights file must hash to, in hexadecimal; optional.
    """

    score_head = None
    specialist: ClassVar[bool] = True
    encoder = "network"
    patch_embedding = ("network.conv_0",)

    def __init__(
        self,
        image_size: int = 256,
        features: Sequence[int] = (32, 32, 64, 128, 256, 32),
        weights: str | None = None,
        weights_sha256: str | None = None,
    ) -> None:
        super().__init__()
        if image_size < 2 * STRIDE or image_size % STRIDE:
            raise UserError(f"image_size {image_size}: BoxUNet takes a multiple of {STRIDE} pixels, 32 or more")
        if len(features) != 6 or min(features) < 1:
            raise UserError(f"features {list(features)}: six numbers of channels, each 1 or more")
        self.features = tuple(features)
        self.preprocessing = Preprocessing(image_size=image_size, resize="pad", scaling="minmax")
        self.network = _network(self.preprocessing.channels + 1, self.features)
        if (source := source_of(weights)) is not None:
            load_strictly(self, read_weights(source, weights_sha256), source)

    @property
    def mask_side(self) -> int:
        """That of the input."""
        return self.preprocessing.image_size

    def encode(self, images: Tensor) -> Tensor:
        """The images (B, C, S, S) themselves: without a box there is nothing to compute."""
        return images

    def decode(self, features: Tensor, prompts: Prompts) -> tuple[Tensor, Tensor]:
        """Predict one mask a prompt.

        Args:
            features: The images (B, C, S, S).
            prompts: Boxes.

        Returns:
            Logits (Q, 1, S, S), and the IoU (Q, 1) that the model expects by its own probabilities.

        Raises:
            UserError: It is asked with anything but boxes.
        """
        asked = (name for name in ("points", "masks", "given") if getattr(prompts, name) is not None)
        other = next(asked, None) if prompts.boxes is not None else "no box"
        if other or prompts.boxes is None:
            raise UserError(f"BoxUNet is asked with boxes alone, not with {other}: take trainer.prompts.BoxPrompts")
        boxed = box_channel(prompts.boxes, self.mask_side).to(features)
        logits: Tensor = self.network(torch.cat([features[prompts.image_index], boxed], dim=1))
        return logits, expected_iou(logits.detach())

    def at_size(self, image_size: int) -> BoxUNet:
        """A copy for another input side: no weight depends on it."""
        copy = BoxUNet(image_size, self.features).to(next(self.parameters()).device)
        load_strictly(copy, self.state_dict(), "of this model")
        copy.train(self.training)
        return copy


def box_channel(boxes: Tensor, side: int) -> Tensor:
    """Draw boxes as masks: 1 in every pixel that a box touches, and 0 elsewhere.

    Args:
        boxes: (Q, 4) as (x0, y0, x1, y1) in pixels; those that the ends lie in belong to the box.
        side: Side of the masks in pixels.

    Returns:
        (Q, 1, side, side) float32.
    """
    x0, y0, x1, y1 = boxes.float()[:, :, None].unbind(1)
    pixels = torch.arange(side, device=boxes.device)
    columns, rows = ((pixels + 1 > low) & (pixels <= high) for low, high in ((x0, x1), (y0, y1)))
    return (rows[:, None, :, None] & columns[:, None, None, :]).float()


def expected_iou(logits: Tensor) -> Tensor:
    """IoU that probabilities expect of the mask they are cut to at one half; nothing learns it.

    Args:
        logits: (Q, 1, H, W).

    Returns:
        (Q, 1): the sum of the probabilities inside, by the pixels inside and the sum of the probabilities outside; 0
        where the mask is empty. Right in the mean only if the probabilities are.
    """
    chances = logits.float().sigmoid()
    inside = (logits > 0).float()
    union = inside.sum((-2, -1)) + (chances * (1 - inside)).sum((-2, -1))
    return (chances * inside).sum((-2, -1)) / union.clamp(min=1e-6)


def _network(channels: int, features: Sequence[int]) -> nn.Module:
    """MONAI's U-Net.

    Raises:
        UserError: MONAI is not there.
    """
    if importlib.util.find_spec("monai") is None:
        raise UserError("BoxUNet's network is MONAI's: pip install 'monai>=1.5.1,<2', or leave the specialist out")
    from monai.networks.nets.basic_unet import BasicUNet

    return BasicUNet(spatial_dims=2, in_channels=channels, out_channels=1, features=tuple(features))
