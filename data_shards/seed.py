"""The run's seed."""

from __future__ import annotations

import os

from data_shards.errors import UserError


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
