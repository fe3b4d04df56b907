"""Which samples every step saw, and what loss they gave."""

from __future__ import annotations

import csv
import math
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from data_shards.batch import TripletBatch
from data_shards.errors import UserError
from trainer.run import Run


class SampleTrace(Callback):
    """Appends ``epoch,batch,step,loss,keys`` to ``trace.csv`` after every batch; ``step`` is the one it belongs to.

    Other ranks than the first have ``trace-rank1.csv`` and so on. A resumed run appends to the same files: of two lines
    with the same epoch and batch, the later one counts. A loss that is no number ends the run before it is saved.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the header of a new file."""
        trace = Run(trainer.default_root_dir).trace
        self._path = trace.with_stem(f"trace-rank{trainer.global_rank}") if trainer.global_rank else trace
        if not self._path.exists():
            self._append(["epoch", "batch", "step", "loss", "keys"])

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: TripletBatch, batch_idx: int
    ) -> None:
        """Note the step, which the batch may end."""
        self._step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: TripletBatch, batch_idx: int
    ) -> None:
        """Append a line.

        Raises:
            UserError: The loss is infinite or no number.
        """
        # outputs hold the loss as divided for accumulation; the trace shows the batch's own
        loss = float(outputs["loss"]) * trainer.accumulate_grad_batches
        self._append([trainer.current_epoch, batch_idx, self._step, f"{loss:.9g}", " ".join(batch.keys)])
        if not math.isfinite(loss):
            raise UserError(
                f"the loss is {loss} at step {self._step} on {', '.join(batch.keys)}: lower model.init_args.lr or look "
                "at these samples; the last checkpoint is from before"
            )

    def _append(self, row: list[Any]) -> None:
        with self._path.open("a", newline="") as handle:
            csv.writer(handle, lineterminator="\n").writerow(row)
