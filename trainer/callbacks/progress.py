"""Progress: a bar where people look on, plain lines where they read a log afterwards."""

from __future__ import annotations

import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

READ_EVERY = 1.0
"""Seconds between two readings of what was logged, at least: each makes the training wait for its device."""


class TrainingClock:
    """What is left of a run, from the steps done since it started or was resumed."""

    def start(self, trainer: Trainer) -> None:
        """Start the clock."""
        self._since, self._first = time.perf_counter(), trainer.global_step

    @staticmethod
    def total_steps(trainer: Trainer) -> int:
        """Optimiser steps of the run; 0 if nobody can know."""
        if trainer.max_steps > 0:
            return trainer.max_steps
        per_epoch = trainer.num_training_batches / trainer.accumulate_grad_batches
        return int(per_epoch * trainer.max_epochs) if trainer.max_epochs and trainer.max_epochs > 0 else 0

    def left(self, trainer: Trainer) -> str:
        """Time left as h:mm:ss, or a dash before anything is known."""
        done = trainer.global_step - self._first
        total = self.total_steps(trainer)
        if not done or not total:
            return "–"
        rate = (time.perf_counter() - self._since) / done
        seconds = int(rate * max(0, total - trainer.global_step))
        return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"

    def status(self, trainer: Trainer) -> str:
        """Loss, DSC and speed as last logged, and the time left."""
        names = {"loss": "train/loss", "dsc": "train/dsc", "val dsc": "val/dsc", "images/s": "train/images_per_second"}
        logged = trainer.callback_metrics
        shown = [f"{short} {float(logged[name]):.3g}" for short, name in names.items() if name in logged]
        return "  ".join([*shown, f"left {self.left(trainer)}"])


class RunBar(ProgressBar):
    """A bar over the whole run's optimiser steps with loss, DSC, images/s and the time left; over batches elsewhere.

    Lightning's own counts an epoch's micro-batches, which says little of a run that is measured in steps.
    """

    def __init__(self) -> None:
        super().__init__()
        self._enabled = True
        self._clock = TrainingClock()
        self._bar: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._shown, self._read = "", -READ_EVERY

    def disable(self) -> None:
        """Show nothing; Lightning calls this on all ranks but the first."""
        self._enabled = False

    def enable(self) -> None:
        """Show the bar."""
        self._enabled = True

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Only the first rank shows anything."""
        super().setup(trainer, pl_module, stage)
        if not trainer.is_global_zero:
            self.disable()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the terminal as it was."""
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the terminal as it was, before the message."""
        self._close()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start bar and clock."""
        self._clock.start(trainer)
        self._open("train", TrainingClock.total_steps(trainer) or None, trainer.global_step)

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Move on by whole optimiser steps; the figures follow once a second, and at the end."""
        now, last = time.perf_counter(), trainer.global_step == TrainingClock.total_steps(trainer)
        if last or now - self._read >= READ_EVERY:
            self._shown, self._read = self._clock.status(trainer), now
        self._move("train", trainer.global_step, self._shown)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start a bar below that of the training."""
        self._open("validate", _batches(trainer.num_val_batches))

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        """Move on."""
        self._move("validate", batch_idx + 1)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the bar away again."""
        if self._bar is not None and "validate" in self._tasks:
            self._bar.remove_task(self._tasks.pop("validate"))

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the bar."""
        self._open("test", _batches(trainer.num_test_batches))

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        """Move on."""
        self._move("test", batch_idx + 1)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End the bar before the table of results."""
        self._close()

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the bar."""
        self._open("predict", _batches(trainer.num_predict_batches))

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        """Move on."""
        self._move("predict", batch_idx + 1)

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print above the bar."""
        if self._bar is not None:
            self._bar.console.print(*args)
        elif self._enabled:
            print(*args)

    def _open(self, name: str, total: int | None, completed: int = 0) -> None:
        if not self._enabled:
            return
        if self._bar is None:
            columns = ("{task.description}", BarColumn(24), MofNCompleteColumn(), TimeElapsedColumn())
            self._bar = Progress(*columns, TextColumn("{task.fields[shown]}"))
            self._bar.start()
        self._tasks[name] = self._bar.add_task(name, total=total, completed=completed, shown="")

    def _move(self, name: str, completed: int, shown: str = "") -> None:
        if self._bar is not None and name in self._tasks:
            self._bar.update(self._tasks[name], completed=completed, shown=shown)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
        self._bar, self._tasks = None, {}


class ProgressLines(Callback):
    """One line every few seconds, for logs.

    Args:
        seconds: Shortest time between two lines.
    """

    def __init__(self, seconds: float = 15.0) -> None:
        self.seconds = seconds
        self._clock = TrainingClock()
        self._last = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock; the first step has its line, whatever came before."""
        self._clock.start(trainer)
        self._last = 0.0

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Print a line if it is time."""
        total = TrainingClock.total_steps(trainer)
        done = trainer.global_step == total and trainer.fit_loop.epoch_loop._should_accumulate() is False
        if not trainer.is_global_zero or not (done or time.perf_counter() - self._last > self.seconds):
            return
        self._last = time.perf_counter()
        print(f"step {trainer.global_step}/{total or '?'}  {self._clock.status(trainer)}", flush=True)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._last = time.perf_counter()

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        """Print a line if it is time."""
        self._say(trainer, "evaluated", batch_idx + 1, trainer.num_test_batches)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._last = time.perf_counter()

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        """Print a line if it is time."""
        self._say(trainer, "predicted", batch_idx + 1, trainer.num_predict_batches)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock, where no training's last line has."""
        self._last = self._last or time.perf_counter()

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        """Print a line if it is time."""
        checked = trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches
        self._say(trainer, "validated", batch_idx + 1, checked)

    def _say(self, trainer: Trainer, what: str, done: int, counts: Any) -> None:
        """Print how far an evaluation is, if it is time."""
        if trainer.is_global_zero and time.perf_counter() - self._last > self.seconds:
            self._last = time.perf_counter()
            print(f"{what} {done}/{_batches(counts) or '?'} batches", flush=True)


def _batches(counts: Any) -> int | None:
    """Batches of all loaders; None if one has no length."""
    total = sum(counts)
    return None if total == float("inf") else int(total)
