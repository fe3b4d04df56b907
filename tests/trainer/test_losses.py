"""Losses on masks against MONAI and PyTorch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from monai.losses import DiceCELoss, DiceLoss
from PIL import Image

from trainer.losses import DiceCrossEntropy, resize_logits


@pytest.fixture
def masks() -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and truths of six masks; one truth is empty, one is full, one is met almost exactly."""
    torch.manual_seed(0)
    logits = torch.randn(6, 20, 24) * 4
    truths = (torch.rand(6, 20, 24) > 0.6).float()
    truths[1], truths[2] = 0, 1
    logits[3] = (truths[3] - 0.5) * 40
    return logits, truths


def test_dice_is_monais(masks):
    logits, truths = masks
    reference = DiceLoss(sigmoid=True, squared_pred=True, reduction="none")(logits[:, None], truths[:, None])
    torch.testing.assert_close(DiceCrossEntropy()(logits, truths)["dice_loss"], reference.flatten(), atol=1e-6, rtol=0)


def test_cross_entropy_is_pytorchs_mask_by_mask(masks):
    logits, truths = masks
    found = DiceCrossEntropy()(logits, truths)["cross_entropy"]
    for q in range(6):
        torch.testing.assert_close(found[q], F.binary_cross_entropy_with_logits(logits[q], truths[q]))


def test_mean_loss_and_gradient_are_those_of_monais_dice_ce(masks):
    """MONAI's DiceCELoss has no loss per mask, but the same mean, one channel being binary cross-entropy there too."""
    logits, truths = masks
    mine, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    loss = DiceCrossEntropy()(mine, truths)["loss"].mean()
    reference = DiceCELoss(sigmoid=True, squared_pred=True)(theirs[:, None], truths[:, None])
    torch.testing.assert_close(loss, reference)
    loss.backward()
    reference.backward()
    torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-7, rtol=1e-4)


def test_weights_and_smoothing(masks):
    logits, truths = masks
    losses = DiceCrossEntropy(dice_weight=0.25, cross_entropy_weight=3.0, smooth=2.0)(logits, truths)
    dice = DiceLoss(sigmoid=True, squared_pred=True, reduction="none", smooth_nr=2.0, smooth_dr=2.0)
    torch.testing.assert_close(losses["dice_loss"], dice(logits[:, None], truths[:, None]).flatten())
    torch.testing.assert_close(losses["loss"], 0.25 * losses["dice_loss"] + 3.0 * losses["cross_entropy"])
    plain = DiceCrossEntropy()(logits, truths)
    torch.testing.assert_close(plain["loss"], plain["dice_loss"] + plain["cross_entropy"])
    assert all(value.shape == (6,) for value in plain.values())


@pytest.mark.parametrize("truth", [0.0, 1.0])
@pytest.mark.parametrize("level", [-200.0, -1.0, 0.0, 1.0, 200.0])
def test_empty_and_full_masks_give_finite_losses_and_gradients(truth, level):
    logits = torch.full((2, 16, 16), level, requires_grad=True)
    losses = DiceCrossEntropy()(logits, torch.full((2, 16, 16), truth))
    losses["loss"].sum().backward()
    assert all(value.isfinite().all() for value in losses.values())
    assert logits.grad.isfinite().all()
    if abs(level) == 1:
        assert (logits.grad * (1 - 2 * truth) > 0).all(), "descent goes towards the truth"
    if level == (200.0 if truth else -200.0):
        assert losses["loss"].max() < 1e-6, "a perfect answer costs nothing, an empty one included"


def test_half_precision_logits_are_computed_in_single(masks):
    logits, truths = masks
    coarse = logits.bfloat16().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = DiceCrossEntropy()(coarse, truths.to(torch.uint8))
    expected = DiceCrossEntropy()(coarse.detach().float(), truths)
    for name, value in found.items():
        assert value.dtype == torch.float32
        assert torch.equal(value, expected[name])
    found["loss"].sum().backward()
    assert coarse.grad.dtype == torch.bfloat16
    assert coarse.grad.isfinite().all()


def test_resizing_logits_is_bilinear_between_pixel_centres():
    """Pillow enlarges by the same rule."""
    logits = torch.from_numpy(np.random.default_rng(0).normal(0, 5, (2, 16, 20)).astype(np.float32))
    resized = resize_logits(logits, (64, 50))
    assert resized.shape == (2, 64, 50)
    for q in range(2):
        pillow = np.asarray(Image.fromarray(logits[q].numpy()).resize((50, 64), Image.Resampling.BILINEAR))
        np.testing.assert_allclose(resized[q].numpy(), pillow, atol=1e-4)
    assert resize_logits(logits, (16, 20)) is logits
