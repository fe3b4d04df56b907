"""Which checkpoints of a run stay."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from trainer.checkpoints import is_complete, remove, step_checkpoints, step_in_name


def prune(folder: Path, step: int, keep_last: int, kept: Collection[str]) -> None:
    """Remove the checkpoints that are no longer wanted, now that the one of `step` is complete.

    What is of a later step belongs to a training that was left for an earlier checkpoint: this run goes on without it.

    Args:
        folder: The run's ``checkpoints``.
        step: Step of the newest complete checkpoint of this run.
        keep_last: How many of the newest stay.
        kept: Names of those that stay for good.
    """
    whole: list[Path] = []
    rest: list[Path] = []
    for path in step_checkpoints(folder):
        (whole if step_in_name(path) <= step and is_complete(path) else rest).append(path)
    for path in (*rest, *(path for path in whole[:-keep_last] if path.name not in kept)):
        remove(path)


class Clock:
    """Keeps a checkpoint for good every so many hours of training; a run that goes on goes on counting.

    Args:
        hours: From one to the next; None keeps none.
    """

    def __init__(self, hours: float | None) -> None:
        self.hours = hours
        self.kept: list[str] = []
        """Names of those that are kept."""
        self._before = self._kept_at = 0.0
        self._since = time.monotonic()

    def start(self) -> None:
        """Begin to count; what was counted before the run was stopped counts too."""
        self._since = time.monotonic()

    def keep(self, name: str) -> None:
        """Keep a checkpoint that is about to be saved, if it is the first in its so many hours."""
        seconds = self._seconds()
        if self.hours is not None and seconds // (3600 * self.hours) > self._kept_at // (3600 * self.hours):
            self._kept_at = seconds
            self.kept.append(name)

    def state_dict(self) -> dict[str, Any]:
        """The clock as plain values."""
        return {"seconds": self._seconds(), "kept_at": self._kept_at, "kept": list(self.kept)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state; an empty one is that of a new clock."""
        self._before, self._kept_at = state.get("seconds", 0.0), state.get("kept_at", 0.0)
        self.kept = list(state.get("kept", []))

    def _seconds(self) -> float:
        return self._before + time.monotonic() - self._since
