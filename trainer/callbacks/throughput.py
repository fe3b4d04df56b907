"""Images per second, and whether they are waited for."""

from __future__ import annotations

import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from data_shards.batch import TripletBatch


class Stopwatch:
    """Counts seconds of training, those of evaluations left out, and those of them in which the loader was waited for.

    Args:
        trainer: The trainer.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self.restart()

    def restart(self) -> None:
        """Begin anew, at this optimiser step."""
        self.step, self._since, self._waited = self._trainer.global_step, time.perf_counter(), self._loader_waited()

    def pause(self) -> None:
        """Stop until `go_on`."""
        self._paused = time.perf_counter()

    def go_on(self) -> None:
        """Count again."""
        self._since += time.perf_counter() - self._paused

    def is_due(self) -> bool:
        """Whether the batch that ends has ended a step that is logged anyway: the device may be waited for."""
        step = self._trainer.global_step
        return step != self.step and step % max(1, self._trainer.log_every_n_steps) == 0

    def read(self) -> tuple[float, float]:
        """Seconds since it was started, and for how many of them batches were waited for."""
        seconds = max(1e-9, time.perf_counter() - self._since)
        return seconds, min(seconds, self._loader_waited() - self._waited)

    def _loader_waited(self) -> float:
        """Seconds for which batches were waited for so far; 0 where the loader does not say."""
        return float(getattr(self._trainer.train_dataloader, "waited", 0.0))


class Throughput(Callback):
    """Logs ``train/images_per_second`` over all ranks: from one optimiser step to the next, without evaluations.

    Besides, ``train/data_wait`` is the share of that time in which this rank waited for its loader.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._watch, self._images = Stopwatch(trainer), 0

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock: time until `on_validation_end` does not count."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._watch.pause()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock again."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._watch.go_on()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: TripletBatch, batch_idx: int
    ) -> None:
        """Count images; log at a step that is logged anyway, so that the device is not waited for more often."""
        self._images += len(batch) * trainer.world_size
        if not self._watch.is_due():
            return
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds, waited = self._watch.read()
        logged = {"train/images_per_second": self._images / seconds, "train/data_wait": waited / seconds}
        pl_module.log_dict(logged, batch_size=1)
        self._watch.restart()
        self._images = 0
