"""Which samples every step saw, and what loss they gave."""

from __future__ import annotations

import csv
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from data_shards.batch import TripletBatch
from trainer.run import Run


class SampleTrace(Callback):
    """Appends ``epoch,batch,step,loss,keys`` to ``trace.csv`` after every batch, on rank 0's share of it.

    A resumed run appends to the same file: of two lines with the same epoch and batch, the later one counts.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the header of a new file."""
        self._path = Run(trainer.default_root_dir).trace
        if trainer.is_global_zero and not self._path.exists():
            self._append(["epoch", "batch", "step", "loss", "keys"])

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: TripletBatch, batch_idx: int
    ) -> None:
        """Append a line."""
        if trainer.is_global_zero:
            # outputs hold the loss as divided for accumulation; the trace shows the batch's own
            loss = float(outputs["loss"]) * trainer.accumulate_grad_batches
            self._append([trainer.current_epoch, batch_idx, trainer.global_step, f"{loss:.9g}", " ".join(batch.keys)])

    def _append(self, row: list[Any]) -> None:
        with self._path.open("a", newline="") as handle:
            csv.writer(handle, lineterminator="\n").writerow(row)
