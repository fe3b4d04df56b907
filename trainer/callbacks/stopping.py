"""SIGTERM, as schedulers and container hosts send it: a fit ends after its step, with a checkpoint, on all ranks."""

from __future__ import annotations

import os
import signal
from functools import partial
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.optim import Optimizer

STOPPED = 128 + signal.SIGTERM
"""Exit code of what SIGTERM ended, as shells have it."""


class GracefulStop(Callback):
    """Ends a fit that SIGTERM tells to, on whichever rank: all ranks together, after the running step, saved.

    The signal's handler notes it and does nothing else. At the end of every optimiser step, and of every batch of a
    validation, the ranks tell each other, and then Lightning's own way of stopping is taken: `RunCheckpoint` saves that
    step, loggers write, the fit is left. A validation is left after its batch, and not begun after a signal: the
    checkpoint from before it is what counts, so that the run that goes on validates again, as one that was not stopped.

    Lightning's own handler broadcasts from rank 0 inside of the signal, which hangs where another rank had it, and
    stops without a checkpoint; its loop also asks rank 0 before each batch, and waits for the device to answer. Both
    are replaced for the time of a fit. Instead one byte goes over the CPUs (gloo) while the device still computes: it
    is sent before the optimiser steps and looked at after.

    An evaluation has nothing to save, and ends at once.
    """

    def __init__(self) -> None:
        self._told = False
        self._asked = False
        self._group: dist.ProcessGroup | None = None
        self._answer: tuple[torch.Tensor, dist.Work] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take the place of Lightning's handler; Lightning itself installs and removes it."""
        self._told = self._asked = False
        self._group = None
        if stage != "fit":
            trainer._signal_connector._sigterm_notifier_fn = partial(_leave, trainer)
            return
        trainer._signal_connector._sigterm_notifier_fn = self._note
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = _ask_nobody
        if trainer.world_size > 1 and dist.is_initialized():
            group = dist.new_group(backend="gloo")
            self._group = group if isinstance(group, dist.ProcessGroup) else None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave at once if the signal came in the last batch of the validation before the first step."""
        self._leave_if_told(trainer)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Ask all ranks while the step is computed."""
        self._ask()

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Stop if any rank was told to; checkpoints are written after this."""
        self._stop_if_told(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do not begin a validation after a signal."""
        self._leave_if_told(trainer)

    def on_validation_batch_start(self, trainer: Trainer, *_: Any) -> None:
        """Ask all ranks while the batch is computed; they have equally many."""
        if trainer.state.fn == "fit":
            self._ask()

    def on_validation_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Leave the validation if any rank was told to."""
        self._stop_if_told(trainer)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._told = True

    def _ask(self) -> None:
        """Begin to tell the other ranks whether this one was signalled."""
        self._asked = True
        if self._group is not None and self._answer is None:
            told = torch.tensor(int(self._told), dtype=torch.uint8)
            work = dist.all_reduce(told, dist.ReduceOp.MAX, group=self._group, async_op=True)
            self._answer = told, work

    def _stop_if_told(self, trainer: Trainer) -> None:
        """Set Lightning's mark that the run stops, at the same moment on every rank; only where it was asked before."""
        if not self._asked:
            return
        self._asked, told = False, self._told
        if self._answer is not None:
            (mark, work), self._answer = self._answer, None
            work.wait()
            told = bool(mark)
        if told:
            trainer._signal_connector.received_sigterm = True

    @staticmethod
    def _leave_if_told(trainer: Trainer) -> None:
        if trainer.state.fn == "fit" and trainer.received_sigterm:
            raise SIGTERMException


def _ask_nobody() -> None:
    """In the place of Lightning's broadcast before every batch."""


def _leave(trainer: Trainer, number: int, frame: FrameType | None) -> None:
    """End an evaluation at once, with the ranks that were started from here."""
    if trainer.is_global_zero:
        os.write(2, b"trainer: stopped by SIGTERM; an evaluation starts anew\n")
    launcher = trainer.strategy.launcher
    if launcher is not None:
        launcher.kill(number)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGTERM)
