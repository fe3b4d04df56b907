"""What weights expect of their input, done on the device.

Shapes: B images, Q masks, C channels, H W native height and width, S the model's input side.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

_MEAN = (123.675 / 255, 116.28 / 255, 103.53 / 255)
_STD = (58.395 / 255, 57.12 / 255, 57.375 / 255)
"""Of ImageNet's colours, as SAM takes them."""
_ROUNDING = 2e-6
"""Deviation, relative to the highest value, that an image of one value may get from resizing in fp32."""
HELD = 2**26
"""Native pixels of soft targets that are held at once in fp32."""


@dataclass(frozen=True)
class Preprocessing:
    """From native images to a model's input, and back for the masks. Travels with the weights through every export.

    Attributes:
        image_size: Side S of the square input in pixels.
        resize: ``"pad"`` scales the longer side to S and pads bottom and right with zeros; ``"squash"`` scales both.
        scaling: ``"minmax"`` maps each image's own range to [0, 1] (MedSAM, LiteMedSAM); ``"mean_std"`` takes 8-bit
            images as they are, others with their own range mapped to [0, 255], and standardises with ImageNet's mean
            and deviation (SAM); ``"centred"`` does the same with a mean and deviation of one half (SAM3); ``"zscore"``
            takes each image's own mean and deviation, over all its channels, after resizing and before padding: an
            image of one value becomes 0.
        interpolation: Filter for images; always antialiased. Bicubic stays within an image's own range, as in the
            resizing of MedSAM's scripts: it would ring at edges, and a black background be grey. Masks are taken
            nearest.
        channels: Number of input channels; grey images are repeated.
    """

    image_size: int
    resize: Literal["pad", "squash"] = "pad"
    scaling: Literal["minmax", "mean_std", "centred", "zscore"] = "minmax"
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    channels: int = 3

    def input_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width that an image (height, width) takes inside the input, before padding."""
        if self.resize == "squash":
            return self.image_size, self.image_size
        scale = self.image_size / max(height, width)
        # halves are rounded up, as SAM's own resizing does; Python's `round` would go to the even neighbour
        return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))

    def images(self, images: Sequence[Tensor], device: torch.device | str | None = None) -> Tensor:
        """Make the input batch.

        Args:
            images: B images (C, H, W) with 1 or 3 channels, any real dtype, any sizes.
            device: Where to compute; the images' own by default.

        Returns:
            (B, channels, S, S) float32.
        """

        def prepare(stack: Tensor) -> Tensor:
            resized = F.interpolate(
                stack.float(), self.input_size(*stack.shape[-2:]), mode=self.interpolation, antialias=True
            )
            if self.interpolation == "bicubic":
                native = stack.float().flatten(1)
                lowest, highest = (bound.view(-1, 1, 1, 1) for bound in native.aminmax(dim=1))
                resized = resized.clamp(lowest, highest)
            scaled = _standardised(resized) if self.scaling == "zscore" else self._ranged(resized, stack.dtype)
            return self._pad(scaled.expand(-1, self.channels, -1, -1))

        return _by_size([image.to(device) for image in images], prepare)

    def masks(self, masks: Sequence[Tensor], device: torch.device | str | None = None) -> Tensor:
        """Make the targets: Q masks (H, W), nonzero inside → (Q, S, S) float32 of 0 and 1, zero in the padding."""
        if not masks:
            return torch.zeros(0, self.image_size, self.image_size, device=device)

        def prepare(stack: Tensor) -> Tensor:
            size = self.input_size(*stack.shape[-2:])
            native = (stack[:, None] != 0).float()
            resized = F.interpolate(native, size, mode="nearest-exact")
            return self._pad(with_lost(resized, native, wait=native.device.type == "cpu"))[:, 0]

        return _by_size([mask.to(device) for mask in masks], prepare)

    def shares(self, masks: Sequence[Tensor], device: torch.device | str | None = None) -> Tensor:
        """Make soft targets: which share of each pixel a mask fills, so that the smallest and the thinnest still count.

        Args:
            masks: Q masks (H, W), nonzero inside.
            device: Where to compute, without waiting for it; the masks' own by default.

        Returns:
            (Q, S, S) float32 in [0, 1], zero in the padding.
        """
        if not masks:
            return torch.zeros(0, self.image_size, self.image_size, device=device)

        def prepare(stack: Tensor) -> Tensor:
            size = self.input_size(*stack.shape[-2:])
            some = max(1, HELD // stack[0].numel())  # in fp32 a hundred nuclei of a slide would take gigabytes
            parts = [F.adaptive_avg_pool2d((piece[:, None] != 0).float(), size) for piece in stack.split(some)]
            return self._pad(torch.cat(parts))[:, 0]

        return _by_size([mask.to(device) for mask in masks], prepare)

    def boxes(self, boxes: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
        """Bring native boxes into the input's pixels.

        Args:
            boxes: (Q, 4) as (x0, y0, x1, y1) in native pixels.
            sizes: (Q, 2) native height and width.

        Returns:
            Boxes (Q, 4), and the valid height and width (Q, 2), both in pixels of the input.
        """
        inside = self._inside(sizes).to(boxes.device)
        scale = (inside / sizes.to(inside)).flip(1)
        return boxes.float() * torch.cat([scale, scale], dim=1), inside

    def boxes_to_native(self, boxes: Tensor, sizes: Tensor) -> Tensor:
        """Bring boxes (Q, 4) from the input's pixels into native ones; the inverse of `boxes`."""
        inside = self._inside(sizes).to(boxes.device)
        scale = (sizes.to(inside) / inside).flip(1)
        return boxes * torch.cat([scale, scale], dim=1)

    def points_to_native(self, points: Tensor, sizes: Tensor) -> Tensor:
        """Bring points (Q, P, 2), as (x, y), from the input's pixels into native ones."""
        inside = self._inside(sizes).to(points.device)
        return points * (sizes.to(inside) / inside).flip(1)[:, None]

    def to_native(self, logits: Tensor, height: int, width: int) -> Tensor:
        """Bring mask logits (Q, h, w) of one image back to its native grid: (Q, height, width), bilinear."""
        full = F.interpolate(logits[:, None].float(), (self.image_size, self.image_size), mode="bilinear")
        rows, columns = self.input_size(height, width)
        return F.interpolate(full[..., :rows, :columns], (height, width), mode="bilinear")[:, 0]

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON."""
        return asdict(self)

    @property
    def fixed_statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
        """Mean and deviation by channel with which images in [0, 1] are standardised; None where none are fixed."""
        halves = (0.5,) * self.channels
        return {"mean_std": (_MEAN, _STD), "centred": (halves, halves)}.get(self.scaling)

    def _ranged(self, resized: Tensor, native: torch.dtype) -> Tensor:
        """Scale images (B, C, H, W) by 8 bits or by their own range, and by what the weights were trained with."""
        if self.scaling != "minmax" and native == torch.uint8:
            scaled = resized / 255
        else:
            low, high = resized.amin((1, 2, 3), keepdim=True), resized.amax((1, 2, 3), keepdim=True)
            scaled = (resized - low) / (high - low).clamp(min=1e-8)
        if self.scaling == "centred":
            return 2 * scaled - 1
        if self.scaling == "mean_std":
            mean, std = (torch.tensor(values)[:, None, None].to(scaled, non_blocking=True) for values in (_MEAN, _STD))
            return (scaled - mean) / std
        return scaled

    def _inside(self, sizes: Tensor) -> Tensor:
        """Valid height and width (Q, 2) inside the input for native sizes (Q, 2)."""
        return torch.tensor([self.input_size(*size) for size in sizes.tolist()], dtype=torch.float32).reshape(-1, 2)

    def _pad(self, stack: Tensor) -> Tensor:
        height, width = stack.shape[-2:]
        return F.pad(stack, (0, self.image_size - width, 0, self.image_size - height))


def _standardised(images: Tensor) -> Tensor:
    """Bring images (B, C, H, W) to mean 0 and deviation 1 each, and those of one value to 0."""
    deviation, mean = torch.std_mean(images, (1, 2, 3), correction=0, keepdim=True)
    # resizing and the mean round: that much deviation is not the image's own and must not be blown up
    rounding = _ROUNDING * images.abs().amax((1, 2, 3), keepdim=True)
    return torch.where(deviation > rounding, (images - mean) / deviation.clamp(min=1e-30), 0)


def with_lost(resized: Tensor, native: Tensor, wait: bool) -> Tensor:
    """Give a pixel to each mask that lost all of its own: its box would be trained to hold nothing.

    Args:
        resized: (Q, 1, h, w) of 0 and 1, the nearest pixels of the native masks.
        native: (Q, 1, H, W) of 0 and 1.
        wait: Ask which masks are lost, and compute for these alone; else for all, and the device is not waited for.
    """
    size = (resized.shape[-2], resized.shape[-1])
    if size[0] >= native.shape[-2] and size[1] >= native.shape[-1]:  # enlarged, every pixel is sampled
        return resized
    lost = (resized.flatten(1).amax(1) == 0) & (native.flatten(1).amax(1) > 0)
    if not wait:
        return torch.where(lost[:, None, None, None], F.adaptive_max_pool2d(native, size), resized)
    if lost.any():
        resized[lost] = F.adaptive_max_pool2d(native[lost], size)
    return resized


def _by_size(tensors: Sequence[Tensor], prepare: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply `prepare` once for each distinct shape and dtype and put the results back in order."""
    groups: dict[tuple[torch.Size, torch.dtype], list[int]] = defaultdict(list)
    for position, tensor in enumerate(tensors):
        groups[tensor.shape, tensor.dtype].append(position)
    results: list[Tensor] = [None] * len(tensors)  # type: ignore[list-item]
    for positions in groups.values():
        prepared = prepare(torch.stack([tensors[position] for position in positions]))
        for position, result in zip(positions, prepared, strict=True):
            results[position] = result
    return torch.stack(results)
