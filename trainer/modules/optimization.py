"""The optimiser and its schedule, the same for every module."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch.optim.lr_scheduler import LambdaLR

Schedule = Literal["constant", "cosine"]


def adamw(
    groups: list[dict[str, Any]],
    betas: tuple[float, float],
    schedule: Schedule,
    warmup_steps: int,
    total_steps: int,
) -> dict[str, Any]:
    """AdamW with linear warm-up and a schedule by step, as Lightning takes it.

    Args:
        groups: Parameter groups, each with its learning rate and weight decay.
        betas: Averaging factors of the gradient and its square.
        schedule: What follows the warm-up: ``"constant"``, or ``"cosine"`` down to zero at `total_steps`.
        warmup_steps: Optimiser steps in which the rate rises from zero.
        total_steps: Optimiser steps of the whole run.
    """
    fused = all(parameter.is_cuda for group in groups for parameter in group["params"])
    optimizer = torch.optim.AdamW(groups, betas=betas, fused=fused)
    scheduler = LambdaLR(optimizer, rate_factor(schedule, warmup_steps, total_steps))
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def rate_factor(schedule: Schedule, warmup_steps: int, total_steps: int) -> Callable[[int], float]:
    """The learning rate's factor as a function of the step, from 0."""

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        if schedule == "constant":
            return 1.0
        progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    return factor
