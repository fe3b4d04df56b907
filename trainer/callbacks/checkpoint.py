"""Checkpoints of a run."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from data_shards.datamodule import TripletDataModule
from data_shards.errors import UserError, nearest
from trainer.scores import METRICS


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
        check_monitor(monitor)
        self.every_n_steps = every_n_steps
        self._saved_step = -1
        self._due = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse to wait for a metric that never comes.

        Raises:
            UserError: A validation metric is monitored and nothing is validated.
        """
        super().setup(trainer, pl_module, stage)
        monitored = (self.monitor or "").startswith("val/")
        if stage == "fit" and monitored and not trainer.limit_val_batches and not trainer.fast_dev_run:
            raise UserError(f"checkpoint.monitor {self.monitor} needs a validation split: give data.init_args.val")

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Let a run go on with other micro-batches, or on another number of ranks, at the same sample."""
        super().on_load_checkpoint(trainer, pl_module, checkpoint)
        if trainer.state.fn == "fit":
            # at an epoch's end Lightning would take this for a start, but the weights are untouched no more
            trainer.num_sanity_val_steps = 0
        datamodule = getattr(trainer, "datamodule", None)
        if isinstance(datamodule, TripletDataModule) and "train" in datamodule.shards:
            settle(checkpoint, datamodule, trainer.world_size, trainer.max_steps != -1)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note where the run starts: that step needs no saving."""
        super().on_train_start(trainer, pl_module)
        self._saved_step = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *arguments: Any) -> None:
        """Save after every so many optimiser steps; where a validation follows, when that is done.

        A run that is killed in a validation would go on behind it otherwise, and never know what was best.
        """
        super().on_train_batch_end(trainer, pl_module, *arguments)
        self._due = trainer.global_step % self.every_n_steps == 0 or _is_last(trainer)
        if self._due and (trainer.should_stop or not _validation_follows(trainer)):
            self._save_last(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the best, and save what was due before the validation.

        Raises:
            UserError: The metric that says what is best was not logged.
        """
        if trainer.state.fn == "fit" and not trainer.sanity_checking and (self.monitor or "").startswith("val/"):
            logged = sorted(name for name in trainer.callback_metrics if name.startswith("val/"))
            if self.monitor not in logged:
                raise UserError(
                    f"checkpoint.monitor {self.monitor}: not logged here{nearest(str(self.monitor), logged)}"
                )
        super().on_validation_end(trainer, pl_module)
        if self._due and trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._saved_step = -1  # a run that is told to stop has saved already, without what this validation found
            self._save_last(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save what has been learnt even where nobody saw the end coming."""
        super().on_train_end(trainer, pl_module)
        self._save_last(trainer)

    def _save_last(self, trainer: Trainer) -> None:
        if trainer.global_step != self._saved_step and not trainer.fast_dev_run:
            assert self.dirpath is not None
            trainer.strategy.barrier("trace")  # every rank has written down what it saw before it counts as saved
            with _uninterrupted():
                trainer.save_checkpoint(Path(self.dirpath) / "last.ckpt", weights_only=False)  # the optimiser too
            self._saved_step = trainer.global_step
        self._due = False


def check_monitor(name: str | None) -> None:
    """Refuse to keep the best by a metric that no validation logs, before a training waits for it.

    Args:
        name: ``checkpoint.monitor``.

    Raises:
        UserError: There is no such metric.
    """
    known = [f"val/{metric}{kind}" for metric in METRICS for kind in ("", "_median")]
    known += ["val/dsc_gain", "val/targets_worse", "val/found", "val/false_positives", "val/presence_auroc"]
    metric, _, group = (name or "").removeprefix("val/").partition("/")
    of_group = metric in METRICS and group.partition("/")[0] in ("dataset", "modality")
    if name and not name.startswith("train/") and name not in known and not of_group:
        raise UserError(f"checkpoint.monitor {name}: no validation logs that{nearest(name, known)}")


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Let Ctrl-C wait for the end of the block.

    A file system's object that is closed in mid-write would swallow it, and the training would go on unasked.
    """
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    pending: list[tuple[int, FrameType | None]] = []
    signal.signal(signal.SIGINT, lambda number, frame: pending.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if pending:
        before(*pending[0])


def settle(checkpoint: dict[str, Any], datamodule: TripletDataModule, ranks: int, by_steps: bool) -> None:
    """Write into a checkpoint's loops and loader where training goes on: after its last optimiser step.

    Lightning counts micro-batches of one rank, and would go wrong with another number of ranks. It also miscounts
    epochs after a resume at an epoch's end, and takes every end of training for that of an epoch: a second resume would
    then begin the epoch again. And what a loader handed out was not learnt from if a run broke down before the step.
    An epoch is so many steps, so that all counters follow from how many were taken.

    Args:
        checkpoint: The checkpoint, changed in place; one without a state of our loader stays as it is.
        datamodule: The data module, set up.
        ranks: Number of ranks, from now on.
        by_steps: Whether `max_steps` ends the training: Lightning then restarts between two epochs as it does inside.

    Raises:
        UserError: The checkpoint was made with another order of samples.
    """
    loop = checkpoint["loops"]["fit_loop"]
    states = loop.get("state_dict", {}).get("combined_loader")
    if not states or "samples" not in states[0] or not datamodule.steps_per_epoch:
        return
    done, passes = checkpoint["global_step"], datamodule.accumulation(ranks)
    epoch, steps = divmod(done, datamodule.steps_per_epoch)
    for state in states:
        datamodule.check_state(state)
        state.update(epoch=epoch, samples=steps * datamodule.batch_size)
    begun = int(steps > 0)
    epochs = {"ready": epoch + begun, "started": epoch + begun, "processed": epoch, "completed": epoch}
    # As a batch's callbacks see it, one of which saves: the batch is done but for them.
    open_batch = int(begun or (by_steps and done > 0))

    def batches(count: int) -> dict[str, int]:
        return {**dict.fromkeys(("ready", "started", "processed"), count), "completed": count - open_batch}

    loop["epoch_progress"].update(total=dict(epochs), current=dict(epochs))
    loop["epoch_loop.batch_progress"].update(
        total=batches(done * passes), current=batches(steps * passes), is_last_batch=False
    )
    loop["epoch_loop.state_dict"]["_batches_that_stepped"] = done - open_batch


def _is_last(trainer: Trainer) -> bool:
    """Whether training ends with this batch.

    It is asked here because at the end of training Lightning counts the epoch as done, wherever in it the run stopped:
    a checkpoint of that moment could not go on with the next sample.
    """
    epochs = trainer.max_epochs if trainer.max_epochs is not None else -1
    last_epoch = trainer.is_last_batch and 0 <= epochs <= trainer.current_epoch + 1
    return trainer.should_stop or 0 <= trainer.max_steps <= trainer.global_step or last_epoch


def _validation_follows(trainer: Trainer) -> bool:
    """Whether Lightning validates after this batch."""
    fetcher = trainer.fit_loop._data_fetcher
    return fetcher is not None and trainer.fit_loop.epoch_loop._should_check_val_fx(fetcher)
