"""Rough masks of the target.

Shapes: Q targets, S the model's input side, h w the mask side of the model's decoder.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from data_shards.errors import UserError
from data_shards.seed import run_seed, stream
from trainer.prompts.base import Prompter, Prompts, Truth
from trainer.prompts.regions import inside

_SUREST = 1e-3
"""Probabilities stay so far from 0 and 1: logits stay within ±6.9, as a decoder's own do."""


class MaskPrompts(Prompter):
    """A rough mask of the target, as logits of the size that the decoder gives: grown or shrunk, shifted, coarse.

    Amounts go with the target's size, so that a small target keeps its place. Pixels are those of the decoder's mask:
    256 a side for MedSAM at 1024 px and for LiteMedSAM at 256 px.

    Args:
        max_shift: Largest shift in training, as a fraction of the sides of the target's box.
        max_growth: Largest growth or shrinkage of the mask's border in training, as a fraction of the box's shorter
            side.
        max_block: In training the mask is averaged over blocks of 1 to so many pixels a side.
        eval_block: Blocks of so many pixels a side in evaluation; the mask is neither shifted nor grown. A block is
            never larger than half of the box's shorter side.
        seed: Seed of the changes; that of the run (`seed_everything`) if null.
    """

    def __init__(
        self,
        max_shift: float = 0.1,
        max_growth: float = 0.1,
        max_block: int = 8,
        eval_block: int = 8,
        seed: int | None = None,
    ) -> None:
        if not (0 <= max_shift <= 1 and 0 <= max_growth <= 1) or min(max_block, eval_block) < 1:
            raise UserError(
                f"MaskPrompts: max_shift {max_shift} and max_growth {max_growth} are fractions from 0 to 1, max_block "
                f"{max_block} and eval_block {eval_block} are 1 or more"
            )
        self.max_shift, self.max_growth, self.seed = max_shift, max_growth, run_seed(seed)
        self.max_block, self.eval_block = max_block, eval_block

    def describe(self) -> dict[str, Any]:
        """What an evaluation asks, as JSON."""
        return {"kind": type(self).__name__, "eval_block": self.eval_block}

    def first(self, truth: Truth, epoch: int | None) -> list[Prompts]:
        """Ask for every target with a rough mask."""
        side = truth.mask_side
        masks = _highest_to_one(F.adaptive_avg_pool2d(truth.masks[:, None], side)[:, 0])
        # half a pixel or more is inside, relative to the pixel that is most so: the smallest target keeps one
        masks = (masks >= 0.5).float()
        sides = (truth.boxes[:, 2:] - truth.boxes[:, :2] + 1) * side / truth.masks.shape[-1]
        valid = inside(truth, side).float()
        rough = [
            self._roughen(mask, area, (width, height), None if epoch is None else (epoch, *draw))
            for mask, area, (width, height), draw in zip(masks, valid, sides.tolist(), truth.draws, strict=True)
        ]
        stacked = torch.stack(rough) if rough else masks
        logits = torch.logit(_highest_to_one(stacked) * valid, eps=_SUREST)
        return [Prompts(truth.image_index, masks=logits, rows=torch.arange(len(truth)))]

    def _roughen(
        self, mask: Tensor, valid: Tensor, box: tuple[float, float], numbers: tuple[int, ...] | None
    ) -> Tensor:
        """Change one mask.

        Args:
            mask: (h, w) of 0 and 1.
            valid: (h, w) of 0 and 1, without the padding.
            box: Width and height of the target's box, in pixels of the mask.
            numbers: What randomness depends on; None in evaluation.
        """
        shorter = min(box)
        block = self.eval_block
        if numbers is not None:
            generator = stream(self.seed, "rough_masks", *numbers)
            growth, right, down = generator.uniform(-1, 1, size=3)
            block = int(generator.integers(1, self.max_block, endpoint=True))
            mask = _grown(mask, round(growth * self.max_growth * shorter))
            mask = _shifted(mask, valid, round(right * self.max_shift * box[0]), round(down * self.max_shift * box[1]))
        return _blocks(mask, max(1, min(block, int(shorter / 2))))


def _highest_to_one(masks: Tensor) -> Tensor:
    """Scale masks (Q, h, w) so that the highest value of each is 1."""
    return masks / masks.flatten(1).amax(1).clamp(min=1e-8)[:, None, None]


def _grown(mask: Tensor, pixels: int) -> Tensor:
    """Move the border of a mask (h, w) outwards, or inwards if negative; what would be lost whole stays as it is."""
    if not pixels:
        return mask
    if pixels > 0:
        return _widest(mask, pixels)
    shrunk = -_widest(-mask, -pixels)
    return torch.where(shrunk.amax() > 0, shrunk, mask)


def _widest(mask: Tensor, pixels: int) -> Tensor:
    """The highest value of a mask (h, w) within so many pixels of each: first along columns, then along rows."""
    width = 2 * pixels + 1
    along = F.max_pool2d(mask[None], (width, 1), stride=1, padding=(pixels, 0))
    return F.max_pool2d(along, (1, width), stride=1, padding=(0, pixels))[0]


def _shifted(mask: Tensor, valid: Tensor, right: int, down: int) -> Tensor:
    """Shift a mask (h, w); what leaves the valid area (h, w) is lost, unless that were all of it."""
    shifted = F.pad(mask, (right, -right, down, -down)) * valid
    return torch.where(shifted.amax() > 0, shifted, mask)


def _blocks(mask: Tensor, side: int) -> Tensor:
    """Average a mask (h, w) over blocks of `side` pixels a side."""
    if side == 1:
        return mask
    means = F.avg_pool2d(mask[None], side, ceil_mode=True, count_include_pad=False)[0]
    return means.repeat_interleave(side, 0).repeat_interleave(side, 1)[: mask.shape[0], : mask.shape[1]]
