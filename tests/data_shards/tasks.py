"""Tasks for worker processes, which import them by this module's name."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from data_shards.workers import Report


def note(folder: Path, name: str, seconds: float, report: Report) -> None:
    """Leave a file that says which process did it, with how many threads."""
    report(10, 1)
    (folder / name).write_text(f"{os.getpid()} {os.environ.get('OPENBLAS_NUM_THREADS')}")
    time.sleep(seconds)
    report(20, 2)


def fail(folder: Path, name: str, seconds: float, report: Report) -> None:
    """Raise what a full disk raises, once others are at work."""
    limit = time.monotonic() + 20
    while not list(folder.iterdir()) and time.monotonic() < limit:
        time.sleep(0.02)
    raise OSError(28, "No space left on device")


def die(folder: Path, name: str, seconds: float, report: Report) -> None:
    """End as a process does that takes too much memory."""
    os.kill(os.getpid(), signal.SIGKILL)


def either(folder: Path, name: str, seconds: float, report: Report) -> None:
    """Do what the name says."""
    {"fail": fail, "die": die}.get(name, note)(folder, name, seconds, report)
