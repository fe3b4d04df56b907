"""Which samples every step saw, what loss they gave, and which could not be read."""

from __future__ import annotations

import csv
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from data_shards.batch import TripletBatch
from data_shards.errors import UserError, counted
from trainer.callbacks.guard import guard_of
from trainer.ranks import every_rank
from trainer.report.traces import encode_keys
from trainer.run import Run, naming

COLUMNS = ("epoch", "batch", "step", "loss", "keys", "attempt")
_TAIL = 2**20
"""Bytes at the end of a trace that are looked at: more than any of its lines has."""


class SampleTrace(Callback):
    """Appends ``epoch,batch,step,loss,keys,attempt`` to ``trace.csv`` after every batch; it belongs to that ``step``.

    A step's loss is the mean of those of its batches on all ranks; a batch without a target has 0.
    Other ranks than the first have ``trace-rank1.csv`` and so on. A resumed run appends to the same files with the next
    ``attempt``: lines of earlier ones from its first step on no longer count, since their work was not saved. A loss
    that is no number ends the run before it is saved, unless a `StepGuard` sees to it. Samples that the recipe allows
    to skip and that could not be read are named in ``skipped.csv`` of the run, or ``skipped-rank1.csv``, and counted at
    the end.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the header of a new file, and number the attempt."""
        run = Run(trainer.default_root_dir)
        self._path, self._skipped = (
            path.with_stem(f"{path.stem}-rank{trainer.global_rank}") if trainer.global_rank else path
            for path in (run.trace, run.skipped)
        )
        self._attempt = every_rank(1 + _last_attempt(run.trace) if trainer.is_global_zero else 0)[0]
        self._keys: list[str] = []
        self._columns = columns(self._path)
        if not self._columns:
            self._columns = list(COLUMNS)
            append(self._path, COLUMNS)

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
            UserError: The loss is infinite or no number, and no guard skips the step.
        """
        guard = guard_of(trainer)
        read = guard.last_loss if guard is not None else None  # to read it again would wait for the device again
        # outputs hold the loss as divided for accumulation; the trace shows the batch's own
        loss = (float(outputs["loss"]) if read is None else read) * trainer.accumulate_grad_batches
        place = (trainer.current_epoch, batch_idx, self._step)
        values = dict(zip(COLUMNS, (*place, f"{loss:.9g}", encode_keys(batch.keys), self._attempt), strict=True))
        append(self._path, [values[name] for name in self._columns])
        for item in batch.skipped:
            if not self._skipped.exists():
                append(self._skipped, ["epoch", "batch", "step", "key", "reason"])
            append(self._skipped, [*place, item.key, item.reason])
            if not self._keys:
                print(f"{item.reason}: it is skipped, as are others to come: {self._skipped}", file=sys.stderr)
            self._keys.append(item.key)
        if not math.isfinite(loss) and guard is None:
            raise UserError(
                f"the loss is {loss} at step {self._step} on {', '.join(batch.keys)}: lower model.init_args.lr or look "
                "at these samples; the last checkpoint is from before"
            )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say how many samples could not be read."""
        keys = [key for part in every_rank(self._keys) for key in part]
        if keys and trainer.is_global_zero:
            files = self._skipped.with_stem("skipped*") if trainer.world_size > 1 else self._skipped
            what = counted(len(set(keys)), "damaged sample was", "damaged samples were")
            often = f", {len(keys)} times in all" if len(keys) > len(set(keys)) else ""
            print(f"{what} skipped{often}: {files} names them", file=sys.stderr, flush=True)


def append(path: Path, row: Sequence[Any]) -> None:
    """Add a row to a table."""
    with naming(path), path.open("a", newline="") as handle:
        csv.writer(handle, lineterminator="\n").writerow(row)


def columns(path: Path) -> list[str]:
    """Return the columns of a table, none if it is not there; what a kill left of its last line is cut away."""
    if not path.exists():
        return []
    with path.open("r+b") as handle:
        end = handle.seek(0, os.SEEK_END)
        handle.seek(max(0, end - _TAIL))
        tail = handle.read()
        handle.truncate(end - len(tail) + tail.rfind(b"\n") + 1)
        handle.seek(0)
        return next(csv.reader([handle.readline().decode()]), [])


def _last_attempt(path: Path) -> int:
    """Return the number of the attempt that wrote last into a trace; −1 where there is none."""
    names = columns(path)
    if not names:
        return -1
    with path.open("rb") as handle:
        handle.seek(max(0, handle.seek(0, os.SEEK_END) - _TAIL))
        last = handle.read().decode(errors="replace").splitlines()[-1].rpartition(",")[2]
    return int(last) if names[-1] == COLUMNS[-1] and last.isdigit() else 0
