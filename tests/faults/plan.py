"""All faults, in the order in which they are injected."""

from __future__ import annotations

import random

import cases
import damage
import hostile
import surroundings
from cases import Case

SEED = 8


def all_cases() -> list[Case]:
    """Every case; the same ones each time."""
    makers = (
        *(cases.kills, cases.broken_writes, cases.terms, cases.launched),
        *(damage.checkpoints, surroundings.full_disks, surroundings.data, surroundings.others),
        *(hostile.checkpoints, hostile.recipes),
    )
    return [case for number, maker in enumerate(makers) for case in maker(random.Random(SEED + number))]
