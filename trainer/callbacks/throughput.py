"""Images per second."""

from __future__ import annotations

import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from data_shards.batch import TripletBatch


class Throughput(Callback):
    """Logs ``train/images_per_second`` over all ranks: from one optimiser step to the next, without evaluations."""

    def __init__(self) -> None:
        self._paused = 0.0
        self._restart(0)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._restart(trainer.global_step)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock: time until `on_validation_end` does not count."""
        self._paused = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock again."""
        self._since += time.perf_counter() - self._paused

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: TripletBatch, batch_idx: int
    ) -> None:
        """Count images; log at a step that is logged anyway, so that the device is not waited for more often."""
        self._images += len(batch) * trainer.world_size
        if trainer.global_step == self._step or trainer.global_step % max(1, trainer.log_every_n_steps):
            return
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        rate = self._images / max(1e-9, time.perf_counter() - self._since)
        pl_module.log("train/images_per_second", rate, batch_size=1)
        self._restart(trainer.global_step)

    def _restart(self, step: int) -> None:
        self._since, self._images, self._step = time.perf_counter(), 0, step
