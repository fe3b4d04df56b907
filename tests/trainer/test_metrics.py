"""Overlap against MONAI."""

from __future__ import annotations

import pytest
import torch
from monai.metrics import DiceMetric, compute_iou

from trainer.metrics import overlap


def disc(row: float, column: float, radius: float) -> torch.Tensor:
    rows, columns = torch.meshgrid(torch.arange(40.0), torch.arange(50.0), indexing="ij")
    return (rows - row) ** 2 + (columns - column) ** 2 < radius**2


@pytest.fixture
def pairs() -> tuple[torch.Tensor, torch.Tensor]:
    """Random masks, discs that overlap, touch or miss each other, the same twice, and empty ones."""
    torch.manual_seed(0)
    noise = [(torch.rand(40, 50) > 0.5, torch.rand(40, 50) > level) for level in (0.1, 0.5, 0.9)]
    nothing = torch.zeros(40, 50, dtype=torch.bool)
    one, near, far = disc(20, 20, 8), disc(22, 24, 10), disc(30, 42, 5)
    listed = [*noise, (one, near), (one, far), (one, one), (nothing, one), (one, nothing), (nothing, nothing)]
    return torch.stack([p for p, _ in listed]), torch.stack([t for _, t in listed])


def test_dice_and_iou_are_monais(pairs):
    predictions, truths = pairs
    dsc, iou = overlap(predictions, truths)
    as_monai = predictions[:, None].float(), truths[:, None].float()
    dice = DiceMetric(include_background=True, reduction="none", ignore_empty=False)(*as_monai)
    reference = compute_iou(*as_monai, include_background=True, ignore_empty=False)
    torch.testing.assert_close(dsc, dice.flatten())
    torch.testing.assert_close(iou, reference.flatten())
    assert dsc.dtype == iou.dtype == torch.float32
    assert 0.5 < dsc[3] < 1, "discs that overlap in part"


def test_empty_masks(pairs):
    dsc, iou = overlap(*pairs)
    assert dsc[4:].tolist() == iou[4:].tolist() == [0, 1, 0, 0, 1]


def test_nonzero_is_inside_whatever_the_dtype(pairs):
    predictions, truths = pairs
    expected = overlap(predictions, truths)
    for dtype, inside in ((torch.uint8, 255), (torch.float32, 0.25), (torch.int64, -3)):
        found = overlap(predictions.to(dtype) * inside, truths.to(dtype) * inside)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_no_masks_at_all():
    dsc, iou = overlap(torch.zeros(0, 4, 4), torch.zeros(0, 4, 4))
    assert dsc.shape == iou.shape == (0,)
