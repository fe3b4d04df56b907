"""The run's seed, and the streams of random numbers that are drawn from it."""

from __future__ import annotations

import os
from typing import Literal

import numpy as np

from data_shards.errors import UserError

Purpose = Literal[
    "negatives",
    "sampling",
    "repeats",
    "mixture",
    "box_noise",
    "points",
    "rough_masks",
    "clicks",
    "exemplars",
    "wording",
    "terms",
    "dropout",
    "clip_ends",
    "corrected",
    "augmentation",
    "resumed",
    "prompt_noise",
]
_TAGS: dict[Purpose, int] = {
    "negatives": 0x6E656761,
    "sampling": 0x73616D70,
    "repeats": 0x72657065,
    "mixture": 0x6D697874,
    "box_noise": 0x626F7865,
    "points": 0x706F696E,
    "rough_masks": 0x726F7567,
    "clicks": 0x636C6963,
    "exemplars": 0x6578656D,
    "wording": 0x776F7264,
    "terms": 0x7465726D,
    "dropout": 0x64726F70,
    "clip_ends": 0x656E6473,
    "corrected": 0x636F7272,
    "augmentation": 0x6175676D,
    "resumed": 0x72657375,
    "prompt_noise": 0x70726E6F,
}
"""Set streams apart from each other, and from those of orders, targets and boxes, which begin with (seed, epoch)."""


def run_seed(seed: int | None) -> int:
    """A seed of one's own, or else that of the run (``seed_everything``), which Lightning puts into the environment.

    Args:
        seed: 0 or more; None takes the run's, and 0 where there is none.

    Raises:
        UserError: A negative seed.
    """
    if seed is None:
        return int(os.environ.get("PL_GLOBAL_SEED", 0))
    if seed < 0:
        raise UserError(f"seed is 0 or more, not {seed}")
    return seed


def stream(seed: int, purpose: Purpose, *numbers: int) -> np.random.Generator:
    """Random numbers that are a pure function of the arguments, in every process and on every machine.

    Args:
        seed: Seed of the run.
        purpose: What they are for.
        numbers: What else they depend on, such as epoch and position.
    """
    return np.random.default_rng((seed, _TAGS[purpose], *numbers))
