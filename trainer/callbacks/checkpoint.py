"""Checkpoints of a run."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any
from weakref import proxy

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from data_shards.datamodule import TripletDataModule
from data_shards.errors import UserError, nearest
from trainer.callbacks.retention import Clock, prune
from trainer.callbacks.writing import Writer, are_finite
from trainer.checkpoints import point_last, remove, sweep, write
from trainer.checkpoints.ranks import together
from trainer.checkpoints.twin import twin
from trainer.ranks import every_rank
from trainer.scores import METRICS
from trainer.version import CODE, code


class RunCheckpoint(ModelCheckpoint):
    """Keeps checkpoints of a run: the newest, to its very last step, and the best by a validation metric if named.

    ``checkpoints/step-000500.ckpt`` is written beside the training, which waits only for the copy; the training may be
    killed at any moment, and ``last.ckpt`` names the newest that is complete. What is no longer wanted is removed after
    that. Nothing is saved in the middle of a streak of bad steps, nor weights that are not finite.

    Lightning's own ``save_last`` leaves out the steps after the last multiple of its interval, and waits for a
    validation where a metric is monitored.

    Args:
        every_n_steps: Optimiser steps between two checkpoints.
        monitor: Logged metric whose best checkpoints are kept besides, such as ``val/dsc``; null keeps the last only.
        mode: Whether more (``max``) or less (``min``) of the metric is better.
        keep: How many of the best are kept.
        keep_last: How many of the newest are kept: where one is damaged, the one before is gone on from.
        every_n_hours: Keep one for good besides, every so many hours of training; null keeps none.
        background: Write beside the training; it waits for every write otherwise.
        dirpath: Where to; ``checkpoints`` in the run by default.
    """

    def __init__(
        self,
        every_n_steps: int = 100,
        monitor: str | None = None,
        mode: str = "max",
        keep: int = 1,
        keep_last: int = 2,
        every_n_hours: float | None = None,
        background: bool = True,
        dirpath: str | None = None,
    ) -> None:
        for name, count in (("every_n_steps", every_n_steps), ("keep_last", keep_last)):
            if count < 1:
                raise UserError(f"checkpoint.{name} is 1 or more, not {count}")
        if every_n_hours is not None and not every_n_hours > 0:
            raise UserError(f"checkpoint.every_n_hours is above 0, or null for none, not {every_n_hours}")
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
        self.every_n_steps, self.keep_last = every_n_steps, keep_last
        self.every_n_hours, self.background = every_n_hours, background
        self._saved_step = self._checked_step = -1
        self._due = False
        self._postponed = False
        self._refusing = False
        self._clock = Clock(every_n_hours)
        self._best: list[Path] = []
        self._outdone: list[Path] = []
        self._removed: list[str] = []
        self._writer: Writer | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse to wait for a metric that never comes, and clear up what a kill left half written.

        Raises:
            UserError: A validation metric is monitored and nothing is validated, or the folder cannot be made.
        """
        super().setup(trainer, pl_module, stage)
        if stage != "fit" or trainer.fast_dev_run:
            return
        if (self.monitor or "").startswith("val/") and not trainer.limit_val_batches:
            raise UserError(f"checkpoint.monitor {self.monitor} needs a validation split: give data.init_args.val")
        if trainer.is_global_zero:
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(
                    f"cannot write to {self._folder} ({error.strerror}): choose another checkpoint.dirpath"
                ) from error
            sweep(self._folder)
        self._writer = Writer(self.background)

    def state_dict(self) -> dict[str, Any]:
        """What Lightning keeps of the best, what is being removed, and for how long the run has been training."""
        return {**super().state_dict(), "clock": self._clock.state_dict(), "removed": self._removed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with it."""
        super().load_state_dict(state_dict)
        self._clock.load_state_dict(state_dict.get("clock", {}))
        self._outdone = [self._folder / name for name in state_dict.get("removed", [])]  # a kill may have left them

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add which code made it."""
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        checkpoint[CODE] = code()

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
        self._saved_step, self._postponed = trainer.global_step, False
        self._clock.start()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *arguments: Any) -> None:
        """Save after every so many optimiser steps; where a validation follows, when that is done.

        A run that is killed in a validation would go on behind it otherwise, and never know what was best.

        Raises:
            UserError: The checkpoint before could not be written.
        """
        super().on_train_batch_end(trainer, pl_module, *arguments)
        if self._writer is not None and trainer.global_step != self._checked_step:  # the ranks talk once a step
            self._checked_step = trainer.global_step
            self._writer.check()
        self._due = self._postponed or trainer.global_step % self.every_n_steps == 0 or _is_last(trainer)
        if self._due and (trainer.should_stop or not _validation_follows(trainer)):
            self._save_last(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the best, and save what was due before the validation.

        Raises:
            UserError: The metric that says what is best was not logged.
        """
        in_fit = trainer.state.fn == "fit" and not trainer.sanity_checking
        if in_fit and (self.monitor or "").startswith("val/"):
            logged = sorted(name for name in trainer.callback_metrics if name.startswith("val/"))
            if self.monitor not in logged:
                raise UserError(
                    f"checkpoint.monitor {self.monitor}: not logged here{nearest(str(self.monitor), logged)}"
                )
        if in_fit and self.save_top_k and not self._may_save(trainer):
            self._postponed |= self._due
            return
        super().on_validation_end(trainer, pl_module)
        if in_fit and (self._due or trainer.received_sigterm):
            self._saved_step = -1  # a run that is told to stop has saved already, without what this validation found
            self._save_last(trainer)
        if self._best:
            self._save(trainer, [])

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save what has been learnt even where nobody saw the end coming, and wait until it is written.

        Raises:
            UserError: It could not be written.
        """
        super().on_train_end(trainer, pl_module)
        self._save_last(trainer, at_end=True)
        self.finish()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let what was saved before be written to its end; what goes wrong there is told besides."""
        super().on_exception(trainer, pl_module, exception)
        try:
            self.finish()
        except UserError as error:
            if not isinstance(error.__cause__, RuntimeError):  # as of a lost rank, which is what ends the run
                print(error, file=sys.stderr, flush=True)

    def finish(self) -> None:
        """Wait until everything is written, before a checkpoint is read; all ranks call this.

        Raises:
            UserError: It could not be written.
        """
        if self._writer is not None:
            self._writer.wait()

    @property
    def _folder(self) -> Path:
        assert self.dirpath is not None
        return Path(self.dirpath)

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        """Note that this moment is one of the best; it is saved together with what else is due at it."""
        self._best.append(Path(filepath))
        self._last_global_step_saved, self._last_checkpoint_saved = trainer.global_step, filepath

    def _remove_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        """Note that it is one of the best no more; it is removed when a better one is complete."""
        self._outdone.append(Path(filepath))

    def _save_last(self, trainer: Trainer, at_end: bool = False) -> None:
        if trainer.global_step != self._saved_step and not trainer.fast_dev_run:
            streak = getattr(trainer.lightning_module, "bad_steps", 0) > 0 and not (at_end or _is_last(trainer))
            self._postponed = streak or not self._may_save(trainer)
            if not self._postponed:
                self._save(trainer, [self._folder / f"step-{trainer.global_step:06d}.ckpt"])
                self._saved_step = trainer.global_step
        self._due = False

    def _may_save(self, trainer: Trainer) -> bool:
        """Whether the weights are finite; others are told of once, and not saved."""
        finite = all(every_rank(are_finite(trainer.lightning_module.parameters())))
        if not finite and not self._refusing and trainer.is_global_zero:
            line = f"weights are not finite after step {trainer.global_step}: nothing is saved until they are"
            print(f"{line}; the newest checkpoint in {self._folder} is from before", file=sys.stderr, flush=True)
        self._refusing = not finite
        return finite

    def _save(self, trainer: Trainer, steps: list[Path]) -> None:
        """Save this moment, once, under the name of its step, if it is due, and under those of the best."""
        assert self._writer is not None
        step, folder = trainer.global_step, self._folder
        best, paths = self._best, [*self._best, *steps]  # the best first: the step's own state names it
        outdone = [path for path in self._outdone if str(path) not in self.best_k_models]
        self._best, self._outdone, self._removed = [], [], [path.name for path in outdone]
        if steps:
            self._clock.keep(steps[0].name)
        keep_last, kept, first_rank = self.keep_last, frozenset(self._clock.kept), trainer.is_global_zero
        trainer.strategy.barrier("trace")  # every rank has written down what it saw before it counts as saved

        def written(content: dict[str, Any], group: Any) -> None:
            write(content, paths[0], group=group)
            with together(group):
                if first_rank:
                    for path in paths[1:]:
                        twin(paths[0], path)
                    if steps:
                        point_last(steps[0])
                        prune(folder, step, keep_last, kept)
                    for path in outdone:
                        remove(path)

        with _uninterrupted():
            self._writer.submit(trainer._checkpoint_connector.dump_checkpoint(weights_only=False), written)
        if first_rank and best:
            for logger in trainer.loggers:
                logger.after_save_checkpoint(proxy(self))


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
    stopped = trainer.should_stop or trainer.received_sigterm
    return stopped or 0 <= trainer.max_steps <= trainer.global_step or last_epoch


def _validation_follows(trainer: Trainer) -> bool:
    """Whether Lightning validates after this batch."""
    fetcher = trainer.fit_loop._data_fetcher
    return fetcher is not None and trainer.fit_loop.epoch_loop._should_check_val_fx(fetcher)
