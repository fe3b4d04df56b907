"""Losses on many masks, a few at a time: values, gradients and memory against the plain form."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from trainer.losses import BestMaskLoss, DiceCrossEntropy, best_mask, masks, resize_logits
from trainer.metrics import overlap
from trainer.modules.medsam import found_overlap

SIDE = 40


def case(several: int = 0) -> tuple[Tensor, Tensor]:
    """Logits (7, 10, 10), or (7, M, 10, 10), and targets (7, 40, 40); one target is empty."""
    torch.manual_seed(several)
    logits = 3 * torch.randn(7, *[several] * (several > 0), 10, 10)
    targets = (torch.rand(7, SIDE, SIDE) > 0.6).float()
    targets[4] = 0
    return logits.requires_grad_(), targets


@pytest.fixture(params=[1, 3, 100], ids=["one by one", "by threes", "at once"])
def held(request: Any, monkeypatch: pytest.MonkeyPatch) -> int:
    """How many masks are held at once."""
    for module in (masks, best_mask):
        monkeypatch.setattr(module, "HELD", request.param * SIDE**2)
    return int(request.param)


def kept_by(loss: Any) -> int:
    """Bytes that the backward pass of a loss needs, but for tensors that are there anyway."""
    sizes: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss()
    return sum(sizes.values())


def test_dice_and_cross_entropy_are_those_of_all_masks_at_once(held: int) -> None:
    logits, targets = case()
    loss = DiceCrossEntropy()
    full = resize_logits(logits, (SIDE, SIDE))
    plain = dict(zip(("dice_loss", "cross_entropy"), loss._parts(full, targets), strict=True))
    weights = torch.rand(7)
    (wanted,) = torch.autograd.grad(((plain["dice_loss"] + plain["cross_entropy"]) * weights).sum(), logits)
    found = loss(logits, targets)
    (gradient,) = torch.autograd.grad((found["loss"] * weights).sum(), logits)
    for name, value in plain.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=1e-9)
    with torch.no_grad():
        assert torch.equal(loss(logits, targets)["loss"], found["loss"])


def test_nothing_of_full_size_is_kept_but_the_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, targets = case()
    plain = kept_by(lambda: DiceCrossEntropy()(logits, targets))
    monkeypatch.setattr(masks, "HELD", SIDE**2)
    assert kept_by(lambda: DiceCrossEntropy()(logits, targets)) <= logits.nbytes + targets.nbytes
    assert plain >= 3 * targets.nbytes


@pytest.mark.parametrize("several", [1, 3])
def test_the_best_mask_is_the_same(held: int, several: int) -> None:
    logits, targets = case(several)
    ious, presence = torch.rand(7, several, requires_grad=True), torch.randn(7, requires_grad=True)
    loss = BestMaskLoss()
    found = loss(logits, ious, presence, targets)
    gradients = torch.autograd.grad(found["loss"].sum(), (logits, ious, presence))
    full = torch.stack([resize_logits(one, (SIDE, SIDE)) for one in logits.unbind(1)], 1)
    for row in range(7):  # alone, every object is computed at once
        own = loss(full[row : row + 1], ious[row : row + 1], presence[row : row + 1], targets[row : row + 1])
        for name, value in own.items():
            torch.testing.assert_close(found[name][row], value[0], rtol=1e-5, atol=1e-6)
        wanted = torch.autograd.grad(own["loss"].sum(), (logits, ious, presence), retain_graph=True)
        for ours, theirs in zip(gradients, wanted, strict=True):
            torch.testing.assert_close(ours[row], theirs[row], rtol=1e-4, atol=1e-7)


def test_the_overlap_that_is_shown_is_that_of_enlarged_masks(held: int) -> None:
    logits, targets = case()
    with torch.no_grad():
        wanted = overlap(resize_logits(logits, (SIDE, SIDE)) > 0, targets)
    for ours, theirs in zip(found_overlap(logits, targets), wanted, strict=True):
        assert torch.equal(ours, theirs)
