"""The schedule against PyTorch's own, and what the optimiser makes of it."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from transformers import get_cosine_schedule_with_warmup

from trainer.modules.optimization import adamw, rate_factor


def rates(scheduler: torch.optim.lr_scheduler.LRScheduler, steps: int) -> list[float]:
    found = []
    for _ in range(steps):
        found.append(scheduler.get_last_lr()[0])
        scheduler.optimizer.step()
        scheduler.step()
    return found


@pytest.fixture
def optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)


def test_warm_up_rises_by_equal_steps_and_never_wastes_one():
    factor = rate_factor("constant", 4, 100)
    assert [factor(step) for step in range(7)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0]
    assert factor(1000) == 1.0
    assert rate_factor("constant", 0, 100)(0) == 1.0


def test_cosine_without_warm_up_is_pytorchs(optimizer):
    factor = rate_factor("cosine", 0, 20)
    assert [factor(step) for step in range(21)] == pytest.approx(rates(CosineAnnealingLR(optimizer, 20), 21), abs=1e-7)


def test_cosine_after_warm_up_is_transformers(optimizer):
    factor = rate_factor("cosine", 5, 25)
    reference = rates(get_cosine_schedule_with_warmup(optimizer, 5, 25), 26)
    assert [factor(step) for step in range(5, 26)] == pytest.approx(reference[5:], abs=1e-7)
    assert [factor(step) for step in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])


def test_cosine_by_hand():
    factor = rate_factor("cosine", 10, 110)
    assert factor(10) == 1.0
    assert factor(35) == pytest.approx(0.5 + 0.5**1.5)
    assert factor(60) == pytest.approx(0.5)
    assert factor(110) == 0.0
    assert factor(500) == 0.0, "and it does not rise again"


def test_a_warm_up_as_long_as_the_run_or_longer():
    for total in (3, 5):
        factor = rate_factor("cosine", 5, total)
        assert [factor(step) for step in range(5)] == [0.2, 0.4, 0.6, 0.8, 1.0]


def test_groups_keep_their_ratio_and_their_decay():
    slow, fast = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    made = adamw(
        [
            {"params": [slow], "lr": 1e-3, "weight_decay": 0.0},
            {"params": [fast], "lr": 1e-2, "weight_decay": 0.1},
        ],
        betas=(0.8, 0.95),
        schedule="cosine",
        warmup_steps=2,
        total_steps=4,
    )
    optimizer, scheduler = made["optimizer"], made["lr_scheduler"]["scheduler"]
    assert made["lr_scheduler"]["interval"] == "step"
    assert isinstance(optimizer, torch.optim.AdamW)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 0.1]
    assert {group["betas"] for group in optimizer.param_groups} == {(0.8, 0.95)}
    seen = []
    for _ in range(5):
        seen.append([group["lr"] for group in optimizer.param_groups])
        (slow.sum() + fast.sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    assert [low for low, _ in seen] == pytest.approx([5e-4, 1e-3, 1e-3, 5e-4, 0.0])
    assert [high for _, high in seen] == pytest.approx([10 * low for low, _ in seen])
    # a constant gradient moves AdamW by its learning rate at every step
    assert slow.tolist() == pytest.approx([1 - 3e-3] * 2, abs=1e-6)
