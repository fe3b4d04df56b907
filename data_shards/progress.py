"""Progress on stderr: a bar where someone watches, a line now and then where a file does."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.text import Text

_LINE_SECONDS = 10.0
"""Between two lines in a log."""
_BAR_SECONDS = 0.1
"""Between two looks at the bar: samples may be finished faster than anyone can see."""


class _Rate(ProgressColumn):
    """Units per second."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:.0f}/s" if task.speed else "")


def progress(of_bytes: bool = False) -> Progress:
    """Return a bar with count, rate and remaining time.

    Args:
        of_bytes: What is counted are bytes, not things.
    """
    counts = (DownloadColumn(), TransferSpeedColumn()) if of_bytes else (MofNCompleteColumn(), _Rate())
    columns = (TextColumn("{task.description}"), BarColumn(), *counts, TimeRemainingColumn())
    console = Console(file=sys.stderr)
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


class Meter:
    """How far a build is: measured in bytes of source files, so that the time left means something.

    Args:
        blocks: Number of blocks to build.
        size: Bytes of their source files.
    """

    def __init__(self, blocks: int, size: int) -> None:
        self.blocks, self.size = blocks, max(1, size)
        self.done = self.slices = 0
        self._start = self._shown = time.monotonic()
        console = Console(file=sys.stderr)
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.0f}%"))
        self._bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task = self._bar.add_task("", total=1.0)

    def __enter__(self) -> Meter:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def show(self, blocks: int, size: float, slices: int) -> None:
        """Say how many blocks, bytes and slices are done; called as often as one likes."""
        self.done, self.slices = blocks, slices
        now = time.monotonic()
        share = min(1.0, size / self.size)
        if not self._bar.disable:
            if now - self._shown >= _BAR_SECONDS:
                self._shown = now
                self._bar.update(self._task, completed=share, description=self.line(share))
        elif now - self._shown >= _LINE_SECONDS:
            self._shown = now
            print(self.line(share), file=sys.stderr, flush=True)

    def line(self, share: float) -> str:
        """Return the state in words.

        Args:
            share: Done, from 0 to 1.
        """
        seconds = self.seconds
        left = f", left {clock(seconds * (1 - share) / share)}" if share > 0 else ""
        return (
            f"{self.done:,}/{self.blocks:,} blocks, {self.slices:,} slices, "
            f"{self.slices / max(seconds, 1e-9):,.0f}/s{left}"
        )

    @property
    def seconds(self) -> float:
        """Time since the start."""
        return time.monotonic() - self._start


def clock(seconds: float) -> str:
    """Return a duration as ``0:01:32``."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
