"""Schedules against PyTorch's and transformers' own, and what the optimiser makes of them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, PolynomialLR

from data_shards.errors import UserError
from trainer.modules.optimization import RateSchedule, adamw, rate_factor


def rates(scheduler: LRScheduler, steps: int) -> list[float]:
    found = []
    for _ in range(steps):
        found.append(scheduler.get_last_lr()[0])
        scheduler.optimizer.step()
        scheduler.step()
    return found


def factors(steps: range | int, total: int = 100, **arguments: Any) -> list[float]:
    factor = rate_factor(RateSchedule(**arguments), total)
    return [factor(step) for step in (range(steps) if isinstance(steps, int) else steps)]


@pytest.fixture
def optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)


@pytest.mark.parametrize("shape", ["constant", "cosine", "linear", "polynomial", "inverse_sqrt"])
def test_warm_up_rises_by_equal_steps_and_never_wastes_one(shape: Any) -> None:
    assert factors(5, shape=shape, warmup_steps=4) == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_constant_stays() -> None:
    assert factors(3) == [1.0, 1.0, 1.0]
    assert factors(range(1000, 1001), warmup_steps=4, final_factor=0.5) == [1.0]


def test_cosine_without_warm_up_is_pytorchs(optimizer: torch.optim.Optimizer) -> None:
    reference = rates(CosineAnnealingLR(optimizer, 20, eta_min=0.1), 21)
    assert factors(21, 20, shape="cosine", final_factor=0.1) == pytest.approx(reference, abs=1e-7)


def test_linear_and_polynomial_are_pytorchs(optimizer: torch.optim.Optimizer) -> None:
    falling = rates(LinearLR(optimizer, start_factor=1.0, end_factor=0.2, total_iters=20), 24)
    assert factors(24, 20, shape="linear", final_factor=0.2) == pytest.approx(falling, abs=1e-7)
    optimizer.param_groups[0].update(lr=1.0, initial_lr=1.0)
    bent = rates(PolynomialLR(optimizer, 20, power=0.9), 24)
    assert factors(24, 20, shape="polynomial", power=0.9) == pytest.approx(bent, abs=1e-7)


TRANSFORMERS = {
    "cosine": ("get_cosine_schedule_with_warmup", {}, {"shape": "cosine"}),
    "cosine to a tenth": (
        "get_cosine_with_min_lr_schedule_with_warmup",
        {"min_lr_rate": 0.1},
        {"shape": "cosine", "final_factor": 0.1},
    ),
    "linear": ("get_linear_schedule_with_warmup", {}, {"shape": "linear"}),
    "polynomial": (
        "get_polynomial_decay_schedule_with_warmup",
        {"power": 2.0, "lr_end": 0.05},
        {"shape": "polynomial", "power": 2.0, "final_factor": 0.05},
    ),
    "inverse_sqrt": ("get_inverse_sqrt_schedule", {"timescale": 7}, {"shape": "inverse_sqrt", "timescale": 7}),
    "inverse_sqrt by the warm-up": ("get_inverse_sqrt_schedule", {}, {"shape": "inverse_sqrt"}),
}


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_after_the_warm_up_schedules_are_transformers(name: str, optimizer: torch.optim.Optimizer) -> None:
    function, theirs, ours = TRANSFORMERS[name]
    end = {} if "inverse" in function else {"num_training_steps": 25}
    made = getattr(transformers, function)(optimizer, num_warmup_steps=5, **end, **theirs)
    reference = rates(made, 26)
    found = factors(26, 25, warmup_steps=5, **ours)
    assert found[5:] == pytest.approx(reference[5:], abs=1e-7)
    assert found[:5] == pytest.approx(reference[1:6], abs=1e-7), "theirs begins with a step at rate 0"


def test_by_hand() -> None:
    at = range(10, 111, 25)
    cosine = factors(at, 110, shape="cosine", warmup_steps=10)
    assert cosine == pytest.approx([1.0, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5, 0.0])
    assert factors(at, 110, shape="linear", warmup_steps=10, final_factor=0.2) == pytest.approx([1, 0.8, 0.6, 0.4, 0.2])
    assert factors(at, 110, shape="polynomial", power=2, warmup_steps=10) == pytest.approx([1, 0.5625, 0.25, 0.0625, 0])
    root = {"shape": "inverse_sqrt", "warmup_steps": 10, "timescale": 25}
    assert factors(at, 110, **root) == pytest.approx([1, 2**-0.5, 3**-0.5, 0.5, 5**-0.5])
    assert factors(at, 110, **root, final_factor=0.6) == pytest.approx([1, 2**-0.5, 0.6, 0.6, 0.6])


@pytest.mark.parametrize("shape", ["cosine", "linear", "polynomial"])
def test_after_its_end_a_rate_stays_down(shape: Any) -> None:
    assert factors(range(110, 700, 300), 110, shape=shape, warmup_steps=10) == [0.0, 0.0]
    assert factors(range(110, 700, 300), 110, shape=shape, final_factor=0.3) == [0.3, 0.3]


def test_inverse_sqrt_with_cool_down_is_sam3s() -> None:
    """SAM3's configuration: warm-up, timescale and cool-down of 20 steps each (here in a run of 100)."""
    found = factors(101, 100, shape="inverse_sqrt", warmup_steps=20, timescale=20, cooldown_steps=20)
    for step in range(20, 101):
        assert found[step] == pytest.approx(math.sqrt(20 / step) * min(1, (100 - step) / 20))
    assert found[:20] == pytest.approx([step / 20 for step in range(1, 21)]), "SAM3's, a step earlier"
    assert (found[80], found[90], found[100]) == pytest.approx((0.5, 20**0.5 / 90**0.5 / 2, 0.0))
    assert found[99] == pytest.approx(0.02247333, rel=1e-6), "the last step still learns"


def test_cool_down_of_a_constant_rate_ends_at_the_final_factor() -> None:
    found = factors(range(88, 102), 100, cooldown_steps=10, final_factor=0.2)
    assert found == pytest.approx([1, 1, 1, 0.92, 0.84, 0.76, 0.68, 0.6, 0.52, 0.44, 0.36, 0.28, 0.2, 0.2])


def test_a_warm_up_as_long_as_the_run_or_longer() -> None:
    for total in (3, 5):
        assert factors(5, total, shape="cosine", warmup_steps=5) == [0.2, 0.4, 0.6, 0.8, 1.0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"warmup_steps": -1}, "warmup_steps -1 and cooldown_steps 0: steps are 0 or more"),
        ({"cooldown_steps": -2}, "cooldown_steps -2"),
        ({"power": 0.0}, "here power is 0.0"),
        ({"final_factor": 1.5}, "final_factor 1.5"),
        ({"final_factor": math.nan}, "final_factor nan"),
        ({"shape": "inverse_sqrt"}, "inverse_sqrt needs a timescale in steps, or warmup_steps"),
        ({"shape": "inverse_sqrt", "timescale": 0}, "timescale 0: 1 step or more"),
    ],
)
def test_values_out_of_range_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        RateSchedule(**arguments)


@pytest.mark.parametrize(
    ("arguments", "needs_end", "words"),
    [
        ({}, False, "constant"),
        (
            {"cooldown_steps": 9, "final_factor": 0.1, "warmup_steps": 3},
            True,
            "constant to 0.1 after 3 steps of warm-up, the last 9 cooling down",
        ),
        ({"shape": "cosine", "warmup_steps": 250}, True, "cosine to 0 after 250 steps of warm-up"),
        ({"shape": "polynomial"}, True, "polynomial (power 0.9) to 0"),
        (
            {"shape": "inverse_sqrt", "warmup_steps": 20},
            False,
            "inverse_sqrt (timescale 20) after 20 steps of warm-up",
        ),
    ],
)
def test_a_schedule_says_what_it_is(arguments: dict[str, Any], needs_end: bool, words: str) -> None:
    schedule = RateSchedule(**arguments)
    assert (schedule.needs_end, schedule.describe()) == (needs_end, words)


def test_groups_keep_their_ratio_and_their_decay() -> None:
    slow, fast = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    made = adamw(
        [
            {"params": [slow], "lr": 1e-3, "weight_decay": 0.0},
            {"params": [fast], "lr": 1e-2, "weight_decay": 0.1},
        ],
        (0.8, 0.95),
        RateSchedule("cosine", warmup_steps=2),
        4,
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
    assert scheduler.state_dict()["lr_lambdas"] == [None, None], "nothing of a function goes into checkpoints"
