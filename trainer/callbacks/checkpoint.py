"""Checkpoints of a run."""

from __future__ import annotations

from lightning.pytorch.callbacks import ModelCheckpoint


class RunCheckpoint(ModelCheckpoint):
    """Saves ``checkpoints/last.ckpt`` every few steps, and the best by a validation metric where one is named.

    Args:
        every_n_steps: Optimiser steps between saves.
        monitor: Logged metric whose best checkpoint is kept besides, such as ``val/dsc``; null keeps the last only.
        mode: Whether more (``max``) or less (``min``) of the metric is better.
        keep: How many of the best (or, without a metric, of the newest) are kept.
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
        schedule = {"every_n_train_steps": every_n_steps} if monitor is None else {"save_on_train_epoch_end": False}
        super().__init__(
            dirpath=dirpath,
            filename="step-{step:06d}",
            auto_insert_metric_name=False,
            monitor=monitor,
            mode=mode,
            save_top_k=keep,
            save_last=True,
            enable_version_counter=False,
            **schedule,
        )
