"""Progress: a bar where people look on, plain lines where they read a log afterwards."""

from __future__ import annotations

import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar


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
        if not done:
            return "–"
        rate = (time.perf_counter() - self._since) / done
        seconds = int(rate * max(0, self.total_steps(trainer) - trainer.global_step))
        return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"


class RunBar(RichProgressBar):
    """Rich's bar with loss, DSC, images/s and the time left of the whole run."""

    def __init__(self) -> None:
        super().__init__(leave=False)
        self._clock = TrainingClock()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start bar and clock."""
        super().on_train_start(trainer, pl_module)
        self._clock.start(trainer)

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """What stands beside the bar."""
        items = {k: v for k, v in super().get_metrics(trainer, pl_module).items() if k != "v_num"}
        if trainer.training:
            total = TrainingClock.total_steps(trainer)
            items |= {"step": f"{trainer.global_step}/{total or '?'}", **shown_metrics(trainer)}
            items["left"] = self._clock.left(trainer)
        return items


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
        """Start the clock."""
        self._clock.start(trainer)

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Print a line if it is time."""
        total = TrainingClock.total_steps(trainer)
        done = trainer.global_step == total and trainer.fit_loop.epoch_loop._should_accumulate() is False
        if not trainer.is_global_zero or not (done or time.perf_counter() - self._last > self.seconds):
            return
        self._last = time.perf_counter()
        shown = "  ".join(f"{name} {value}" for name, value in shown_metrics(trainer).items())
        print(f"step {trainer.global_step}/{total or '?'}  {shown}  left {self._clock.left(trainer)}", flush=True)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._last = time.perf_counter()

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        """Print a line if it is time."""
        if trainer.is_global_zero and time.perf_counter() - self._last > self.seconds:
            self._last = time.perf_counter()
            print(f"evaluated {batch_idx + 1}/{trainer.num_test_batches[0]} batches", flush=True)


def shown_metrics(trainer: Trainer) -> dict[str, str]:
    """Loss, DSC and speed as last logged, as text."""
    names = {"loss": "train/loss", "dsc": "train/dsc", "val dsc": "val/dsc", "images/s": "train/images_per_second"}
    logged = trainer.callback_metrics
    return {short: f"{float(logged[name]):.3g}" for short, name in names.items() if name in logged}
