"""Images per second, and whether they are waited for."""

from __future__ import annotations

import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from data_shards.batch import TripletBatch


class Throughput(Callback):
    """Logs ``train/images_per_second`` over all ranks: from one optimiser step to the next, without evaluations.

    Besides, ``train/data_wait`` is the share of that time in which this rank waited for its loader.
    """

    def __init__(self) -> None:
        self._paused = 0.0
        self._restart(0)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._restart(trainer.global_step, _waited(trainer))

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
        seconds, waited = max(1e-9, time.perf_counter() - self._since), _waited(trainer)
        share = min(1.0, (waited - self._waited) / seconds)
        pl_module.log_dict({"train/images_per_second": self._images / seconds, "train/data_wait": share}, batch_size=1)
        self._restart(trainer.global_step, waited)

    def _restart(self, step: int, waited: float = 0.0) -> None:
        self._since, self._images, self._step, self._waited = time.perf_counter(), 0, step, waited


def _waited(trainer: Trainer) -> float:
    """Seconds for which the training's batches were waited for so far; 0 where its loader does not say."""
    return float(getattr(trainer.train_dataloader, "waited", 0.0))
