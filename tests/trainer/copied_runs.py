"""A run for a test alone: exporting writes into a run, and other tests read the one that was copied."""

from __future__ import annotations

import shutil
from pathlib import Path


def copied(run: Path, where: Path) -> Path:
    """Copy a run to a path that does not exist yet, without its exports."""
    return Path(shutil.copytree(run, where, ignore=shutil.ignore_patterns("exports", "logs")))
