"""Checkpoints of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from data_shards.errors import UserError


class RunCheckpoint(ModelCheckpoint):
    """Keeps ``checkpoints/last.ckpt`` up to date, to its very last step, and the best by a validation metric if named.

    Lightning's own ``save_last`` leaves out the steps after the last multiple of its interval, and waits for a
    validation where a metric is monitored.

    Args:
        every_n_steps: Optimiser steps between saves of ``last.ckpt``.
        monitor: Logged metric whose best checkpoints are kept besides, such as ``val/dsc``; null keeps the last only.
        mode: Whether more (``max``) or less (``min``) of the metric is better.
        keep: How many of the best are kept.
        dirpath: Where to; ``checkpoints`` in the run by default.
    """

    def __init__(
        self,
        every_n_steps: int = 100,
        monitor: str | None = None,
        mode: str = "max",
        keep: int = 1,
        dirpath: str | None = None,
    ) -> None:
        if every_n_steps < 1:
            raise UserError(f"checkpoint.every_n_steps is 1 or more, not {every_n_steps}")
        super().__init__(
            dirpath=dirpath,
            filename="best-{step:06d}",
            auto_insert_metric_name=False,
            monitor=monitor,
            mode=mode,
            save_top_k=keep if monitor else 0,
            save_on_train_epoch_end=False,
            enable_version_counter=False,
        )
        self.every_n_steps = every_n_steps
        self._saved_step = -1

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse to wait for a metric that never comes.

        Raises:
            UserError: A validation metric is monitored and nothing is validated.
        """
        super().setup(trainer, pl_module, stage)
        monitored = (self.monitor or "").startswith("val/")
        if stage == "fit" and monitored and not trainer.limit_val_batches and not trainer.fast_dev_run:
            raise UserError(f"checkpoint.monitor {self.monitor} needs a validation split: give data.init_args.val")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note where the run starts: that step needs no saving."""
        super().on_train_start(trainer, pl_module)
        self._saved_step = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *arguments: Any) -> None:
        """Save after every so many optimiser steps."""
        super().on_train_batch_end(trainer, pl_module, *arguments)
        if trainer.global_step % self.every_n_steps == 0 or _is_last(trainer):
            self._save_last(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save what has been learnt even where nobody saw the end coming."""
        super().on_train_end(trainer, pl_module)
        self._save_last(trainer)

    def _save_last(self, trainer: Trainer) -> None:
        if trainer.global_step != self._saved_step and not trainer.fast_dev_run:
            assert self.dirpath is not None
            trainer.save_checkpoint(Path(self.dirpath) / "last.ckpt", weights_only=False)  # the optimiser too
            self._saved_step = trainer.global_step


def _is_last(trainer: Trainer) -> bool:
    """Whether training ends with this batch.

    It is asked here because at the end of training Lightning counts the epoch as done, wherever in it the run stopped:
    a checkpoint of that moment could not go on with the next sample.
    """
    epochs = trainer.max_epochs if trainer.max_epochs is not None else -1
    last_epoch = trainer.is_last_batch and 0 <= epochs <= trainer.current_epoch + 1
    return trainer.should_stop or 0 <= trainer.max_steps <= trainer.global_step or last_epoch
