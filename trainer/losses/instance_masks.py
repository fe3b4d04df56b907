"""Losses on the masks of matched queries, with memory that does not grow with their number.

Shapes: M masks, K values of a mask, h w the mask head's side, H W that of the targets.
"""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from trainer.losses.masks import resize_logits
from trainer.losses.matching import Pairs, upload
from trainer.losses.sets import ObjectSets, QueryMasks

Side = Literal["head", "target"]

ALPHA, GAMMA = 0.25, 2.0  # of the focal loss on instances, as in SAM3
OVERSAMPLING, UNCERTAIN = 3, 0.75  # of drawn points, as in PointRend (Kirillov et al. 2020) and Mask2Former


def focal_loss(logits: Tensor, truth: Tensor, alpha: float, gamma: float) -> Tensor:
    """Focal loss of every value (Lin et al. 2017, Eq. 5); the truth may be any share in [0, 1]."""
    found = logits.sigmoid()
    right = found * truth + (1 - found) * (1 - truth)
    weight = alpha * truth + (1 - alpha) * (1 - truth)
    return weight * (1 - right) ** gamma * F.binary_cross_entropy_with_logits(logits, truth, reduction="none")


def dice_loss(logits: Tensor, truth: Tensor) -> Tensor:
    """Dice loss (M,) of masks (M, K), with 1 added above and below; sums, not squares, as in SAM3."""
    found = logits.sigmoid()
    return 1 - (2 * (found * truth).sum(1) + 1) / (found.sum(1) + truth.sum(1) + 1)


def on_one_side(logits: Tensor, truth: Tensor, at: Side) -> tuple[Tensor, Tensor]:
    """Bring logits (M, h, w) and truth (M, H, W) to one side: (M, K) each, in fp32.

    Args:
        logits: Of masks.
        truth: 0 or 1.
        at: "head" averages the truth over the pixels of the mask head, so that it becomes a share and the smallest
            target still counts; "target" enlarges the logits, bilinear, as the official code does.
    """
    logits, truth = logits.float(), truth.float()
    if at == "target":
        logits = resize_logits(logits, (truth.shape[-2], truth.shape[-1]))
    elif truth.shape[-2:] != logits.shape[-2:]:
        truth = F.interpolate(truth[:, None], logits.shape[-2:], mode="area")[:, 0]
    return logits.flatten(1), truth.flatten(1)


def at_points(logits: Tensor, truth: Tensor, points: int, seed: int) -> tuple[Tensor, Tensor]:
    """Read logits (M, h, w) and truth (M, H, W) at random points, most of them where the logits are near 0.

    Three times as many points as needed are drawn; three quarters of the result are the least certain of these, and
    the rest is drawn anew. Values between pixels are bilinear.

    Args:
        logits: Of masks.
        truth: 0 or 1.
        points: How many of a mask.
        seed: The draw is a function of it and of the device.

    Returns:
        (M, points) each, in fp32.
    """
    logits, truth = logits.float(), truth.float()
    generator = torch.Generator(logits.device).manual_seed(seed)
    draw = partial(torch.rand, generator=generator, device=logits.device)
    with torch.no_grad():
        drawn = draw(len(logits), OVERSAMPLING * points, 2)
        near = (-_read(logits, drawn).abs()).topk(int(UNCERTAIN * points), dim=1).indices
        chosen = drawn.gather(1, near[..., None].expand(-1, -1, 2))
        chosen = torch.cat([chosen, draw(len(logits), points - near.shape[1], 2)], 1)
    return _read(logits, chosen), _read(truth, chosen)


def _read(maps: Tensor, points: Tensor) -> Tensor:
    """Values (M, K) of maps (M, h, w) at points (M, K, 2) as (x, y) in [0, 1]."""
    return F.grid_sample(maps[:, None], 2 * points[:, :, None] - 1, align_corners=False)[:, 0, :, 0]


def mask_losses(
    masks: QueryMasks,
    pairs: Pairs,
    targets: ObjectSets,
    *,
    at: Side = "head",
    chunk: int | None = None,
    points: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Sums of the focal and of the Dice loss over matched pairs, (2,).

    The focal loss of a mask is its mean over pixels or points. Only matched masks are ever computed.

    Args:
        masks: Of the queries.
        pairs: Which of them answer for which target.
        targets: With masks.
        at: As in `on_one_side`; with `points` either side is read where it is.
        chunk: How many masks are computed and held at once; they are computed again in the backward pass. None is all
            at once, and held until then.
        points: How many points of a mask are read; None is all pixels.
        generator: Of the points, on the CPU.
    """
    assert targets.masks is not None
    device = targets.masks.device
    numbers = upload(np.concatenate([pairs.queries, pairs.targets]), device)
    queries, rows = numbers[: len(pairs)], numbers[len(pairs) :]
    total = torch.zeros(2, device=device)
    if len(targets.counts):  # a batch without targets gives the mask head a gradient of 0, not none: DDP waits for it
        total = total + 0 * masks.of(0, queries[:0]).float().sum()
    held = chunk is None or not torch.is_grad_enabled()
    for start in range(0, len(pairs), chunk or max(len(pairs), 1)):
        stop = min(start + (chunk or len(pairs)), len(pairs))
        seed = int(torch.randint(2**62, (), generator=generator)) if points else 0
        runs = _runs(pairs.prompts[start:stop], start)
        compute = partial(_sums, masks, runs, targets, at=at, points=points, seed=seed)
        here = queries, rows[start:stop]
        total = total + (
            compute(*here) if held else checkpoint(compute, *here, use_reentrant=False, preserve_rng_state=False)
        )
    return total


def _runs(prompts: np.ndarray, start: int) -> list[tuple[int, int, int]]:
    """Each prompt of a piece, and between which pairs it is, counted from `start`."""
    edges = [0, *(np.flatnonzero(np.diff(prompts)) + 1).tolist(), len(prompts)]
    return [(int(prompts[a]), start + a, start + b) for a, b in pairwise(edges)]


def _sums(
    masks: QueryMasks,
    runs: list[tuple[int, int, int]],
    targets: ObjectSets,
    queries: Tensor,
    rows: Tensor,
    *,
    at: Side,
    points: int | None,
    seed: int,
) -> Tensor:
    """Sums (2,) of the losses over one piece."""
    assert targets.masks is not None
    logits = torch.cat([masks.of(prompt, queries[start:stop]) for prompt, start, stop in runs])
    with torch.autocast(logits.device.type, enabled=False):
        truth = targets.masks[rows]
        values, truth = at_points(logits, truth, points, seed) if points else on_one_side(logits, truth, at)
        losses = torch.stack([focal_loss(values, truth, ALPHA, GAMMA).mean(1), dice_loss(values, truth)])
        if targets.has_mask is not None:
            losses = losses * targets.has_mask[rows]
        return losses.sum(1)
