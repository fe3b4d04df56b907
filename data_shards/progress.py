"""Progress on stderr: a bar where someone watches, a line now and then where a file does."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
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


class _Pace:
    """Says when so many seconds have passed since it said so last, or since the start."""

    def __init__(self, seconds: float) -> None:
        self._seconds, self._last = seconds, time.monotonic()

    def due(self) -> bool:
        now = time.monotonic()
        if now - self._last < self._seconds:
            return False
        self._last = now
        return True


class _Lines(Progress):
    """What is to be a bar, as a line now and then: a log has nobody who watches."""

    def __init__(self, of_bytes: bool) -> None:
        super().__init__(console=Console(file=sys.stderr), disable=True, get_time=lambda: time.monotonic())
        self._of_bytes, self._pace = of_bytes, _Pace(_LINE_SECONDS)

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        super().advance(task_id, advance)
        self._say(task_id)

    def update(self, task_id: TaskID, *args: Any, **kwargs: Any) -> None:
        super().update(task_id, *args, **kwargs)
        self._say(task_id)

    def _say(self, task_id: TaskID) -> None:
        if self._pace.due():
            task = next(task for task in self.tasks if task.id == task_id)
            print(_line(task, self._of_bytes), file=sys.stderr, flush=True)


def _line(task: Task, of_bytes: bool) -> str:
    """Return the state of a task in words."""
    scale, unit, form = (1e6, " MB", ",.1f") if of_bytes else (1, "", ",.0f")
    total = "" if task.total is None else f"/{task.total / scale:{form}}"
    rate = task.completed / max(task.elapsed or 0, 1e-9)
    left = f", left {clock((task.total - task.completed) / rate)}" if task.total is not None and rate else ""
    return f"{task.description}: {task.completed / scale:{form}}{total}{unit}, {rate / scale:{form}}{unit}/s{left}"


def progress(of_bytes: bool = False) -> Progress:
    """Return a bar with count, rate and remaining time; where nobody watches, a line every ten seconds says the same.

    Args:
        of_bytes: What is counted are bytes, not things.
    """
    console = Console(file=sys.stderr)
    if not console.is_terminal:
        return _Lines(of_bytes)
    counts = (DownloadColumn(), TransferSpeedColumn()) if of_bytes else (MofNCompleteColumn(), _Rate())
    columns = (TextColumn("{task.description}"), BarColumn(), *counts, TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True)


class Meter:
    """How far a build is: measured in bytes of source files, so that the time left means something.

    Args:
        blocks: Number of blocks to build.
        size: Bytes of their source files.
    """

    def __init__(self, blocks: int, size: int) -> None:
        self.blocks, self.size = blocks, max(1, size)
        self.done = self.slices = 0
        self._start = time.monotonic()
        console = Console(file=sys.stderr)
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.0f}%"))
        self._bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task = self._bar.add_task("", total=1.0)
        self._pace = _Pace(_LINE_SECONDS if self._bar.disable else _BAR_SECONDS)

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
        if not self._pace.due():
            return
        share = min(1.0, size / self.size)
        if self._bar.disable:
            print(self.line(share), file=sys.stderr, flush=True)
        else:
            self._bar.update(self._task, completed=share, description=self.line(share))

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
