"""Clips seen otherwise: the same change to every frame of a clip, on the device.

Shapes: B clips, T frames of each, Q objects, S the model's input side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data_shards.errors import UserError
from data_shards.seed import run_seed, stream
from trainer.modules.clips import Followed


@dataclass(frozen=True)
class ClipAugmentation:
    """Flips, turns, shears, scales, shifts and changes the light of training clips; evaluations see them as they are.

    What is drawn for a clip is a pure function of (seed, epoch, sample), and the same for all of its frames. Defaults
    are those of SAM 2.1's training but for its grey images and its light that changes from frame to frame. Left and
    right are parts of many labels: set `flip` to 0 where the model is to tell them apart.

    Attributes:
        flip: Share of the clips that are mirrored left to right.
        degrees: Largest turn to either side.
        shear: Largest shear to either side along rows, in degrees.
        scale: Smallest and largest factor on the size of what is seen.
        shift: Largest shift to either side, as a share of the input's side.
        brightness: Largest change, as a share of the clip's own standard deviation.
        contrast: Largest share by which contrast grows or falls.
        invert: Share of the clips whose dark and bright are exchanged.
        seed: Seed of the changes; that of the run (`seed_everything`) if null.
    """

    flip: float = 0.5
    degrees: float = 25.0
    shear: float = 20.0
    scale: tuple[float, float] = (1.0, 1.0)
    shift: float = 0.0
    brightness: float = 0.1
    contrast: float = 0.03
    invert: float = 0.0
    seed: int | None = None

    def __post_init__(self) -> None:
        shares = (self.flip, self.invert, self.shift, self.contrast)
        if not all(0 <= share <= 1 for share in shares) or not 0 <= self.brightness < np.inf:
            raise UserError(
                "ClipAugmentation: flip, invert, shift and contrast are in [0, 1], brightness is 0 or more, not "
                f"{', '.join(map(str, (*shares, self.brightness)))}"
            )
        if not 0 <= self.degrees <= 180 or not 0 <= self.shear < 90:
            raise UserError(
                f"ClipAugmentation: degrees is in [0, 180] and shear in [0, 90), not {self.degrees} and {self.shear}"
            )
        if not 0 < self.scale[0] <= self.scale[1] < np.inf:
            raise UserError(f"ClipAugmentation: scale is a smaller and a larger factor above 0, not {self.scale}")

    def __call__(
        self, images: Tensor, everything: Followed, draws: Sequence[tuple[int, ...]], epoch: int
    ) -> tuple[Tensor, Followed]:
        """Change images (B T, C, S, S) and what is followed in them; what the anchor no longer shows is left out.

        Args:
            images: The input, clip after clip.
            everything: The objects.
            draws: For each of the B clips what its randomness depends on.
            epoch: The epoch.
        """
        frames = len(images) // len(draws)
        streams = [stream(run_seed(self.seed), "augmentation", epoch, *draw) for draw in draws]
        matrices = torch.from_numpy(np.stack([self._matrix(generator) for generator in streams])).float()
        light = torch.from_numpy(np.stack([self._light(generator) for generator in streams])).float()
        every = matrices.to(images.device, non_blocking=True)
        light = light.to(images.device, non_blocking=True).repeat_interleave(frames, 0)
        seen = _warped(images, every.repeat_interleave(frames, 0))
        clips = images.unflatten(0, (-1, frames)).flatten(1)
        mean, deviation = (
            value.repeat_interleave(frames)[:, None, None, None] for value in (clips.mean(1), clips.std(1))
        )
        gain, lift = (part[:, None, None, None] for part in light.unbind(1))
        seen = (seen - mean) * gain + mean + lift * deviation
        shape = everything.masks.shape
        own = every[everything.clip.to(every.device, non_blocking=True)].repeat(shape[0], 1, 1)
        masks = (_warped(everything.masks.flatten(0, 1)[:, None], own) > 0.5).float().reshape(shape)
        boxes, there = _boxes(masks)
        return seen, _shown(replace(everything, masks=masks, boxes=boxes), there)

    def _matrix(self, generator: np.random.Generator) -> np.ndarray:
        """Where each place of the new image is taken from: (2, 3), in shares of half the side."""
        mirrored = -1.0 if generator.random() < self.flip else 1.0
        turn = np.deg2rad(generator.uniform(-self.degrees, self.degrees))
        shear = np.tan(np.deg2rad(generator.uniform(-self.shear, self.shear)))
        size = np.exp(generator.uniform(*np.log(self.scale)))
        shift = generator.uniform(-2 * self.shift, 2 * self.shift, size=2)
        rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
        linear = np.diag([mirrored, 1.0]) @ rotation @ np.array([[1.0, shear], [0.0, 1.0]]) / size
        return np.concatenate([linear, shift[:, None]], axis=1)

    def _light(self, generator: np.random.Generator) -> np.ndarray:
        """Factor on contrast and change of brightness: (2,)."""
        gain = 1 + generator.uniform(-self.contrast, self.contrast)
        lift = generator.uniform(-self.brightness, self.brightness)
        return np.array([-gain if generator.random() < self.invert else gain, lift])


def _warped(images: Tensor, matrices: Tensor) -> Tensor:
    """Images (N, C, S, S) seen through affine maps (N, 2, 3); what comes from outside is zero."""
    grid = F.affine_grid(matrices.to(images.dtype), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def _boxes(masks: Tensor) -> tuple[Tensor, Tensor]:
    """Tight boxes (T, Q, 4) around masks (T, Q, S, S), zeros around nothing, and where there is something (T, Q).

    Both are on the CPU: the one time that a step waits for the device.
    """
    sides = []
    for axis in (2, 3):  # columns, then rows
        line = masks.amax(axis)  # (T, Q, S)
        ticks = torch.arange(line.shape[-1], device=line.device)
        low = torch.where(line > 0, ticks, line.shape[-1]).amin(-1)
        high = torch.where(line > 0, ticks, -1).amax(-1)
        sides.append((low, high))
    (left, right), (top, bottom) = sides
    there = left <= right  # in an empty mask nothing is lowest and nothing highest
    found = torch.stack([left, top, right, bottom, torch.ones_like(left)], dim=-1).where(there[..., None], 0).cpu()
    return found[..., :4].float(), found[..., 4] > 0


def _shown(everything: Followed, there: Tensor) -> Followed:
    """The objects that their anchor shows, and frames without a mask as such; `there` (T, Q) says where masks are."""
    anchors = torch.tensor([everything.anchors[clip] for clip in everything.clip.tolist()], dtype=torch.int64)
    kept = there[anchors, torch.arange(len(anchors))].nonzero()[:, 0]
    rows = torch.where(there, everything.rows, -1)
    return replace(everything, rows=rows).subset(kept)
