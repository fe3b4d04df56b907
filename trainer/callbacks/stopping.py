"""SIGTERM and SIGUSR1, as schedulers and container hosts send them: a fit ends after its step, saved, on all ranks.

What they send, and to whom, as seen on a real SLURM 22.05 (`tests/slurm`):

- ``scontrol requeue``, preemption, ``scancel`` and the time limit: SIGCONT and SIGTERM to every process of the job, its
  batch shell too; SIGKILL after ``KillWait`` (30 s by default), or a partition's ``GraceTime``.
- ``sbatch --signal=USR1@N``: SIGUSR1 to the tasks and their children, about N seconds before the time limit (13 s late
  as seen: slurmctld looks twice a minute); with ``B:`` to the batch shell alone.
- ``srun --kill-on-bad-exit`` once a rank has ended with another code than 0: SIGTERM to the other ranks, then SIGKILL.
- torchrun that gets SIGTERM, or one of whose ranks has ended: SIGTERM to its ranks; SIGKILL after 30 s. With
  ``--max-restarts`` it starts all anew, which with gloo needs ``TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1`` (torch 2.14).
- Kubernetes that evicts a pod: SIGTERM to its first process; SIGKILL after its grace period (30 s by default).

SLURM requeues what it stopped itself (the job is then no longer ``RUNNING``); a time limit it does not: there the job's
script calls ``scontrol requeue`` where the exit code is `trainer.run.STOPPED`. A job that was cancelled must not do so:
it would be started again.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.optim import Optimizer

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class GracefulStop(Callback):
    """Ends a fit that SIGTERM or SIGUSR1 tells to, on whichever rank: all together, after the running step, saved.

    The signal's handler notes it and does nothing else. At the end of every optimiser step, and of every batch of a
    validation, the ranks tell each other, and then Lightning's own way of stopping is taken: `RunCheckpoint` saves that
    step, loggers write, the fit is left. A validation is left after its batch, and not begun after a signal: the
    checkpoint from before it is what counts, so that the run that goes on validates again, as one that was not stopped.

    Lightning's own handler broadcasts from rank 0 inside of the signal, which hangs where another rank had it, and
    stops without a checkpoint; its loop also asks rank 0 before each batch, and waits for the device to answer. Both
    are replaced for the time of a fit. Instead one byte goes over the CPUs (gloo) while the device still computes: it
    is sent before the optimiser steps and looked at after. Under SLURM Lightning would also answer SIGUSR1 by a
    checkpoint of its own, written inside of the signal, and requeue the job by itself: that is replaced too.

    Once the ranks have agreed, they ignore both signals until they have ended: the first one that ends makes srun and
    torchrun send SIGTERM to those that still write.

    An evaluation has nothing to save, and ends at once.
    """

    def __init__(self) -> None:
        self.signal = 0
        """Number of the signal that stopped the run, the same on all ranks; 0 while there is none."""
        self._told = 0
        self._asked = False
        self._group: dist.ProcessGroup | None = None
        self._answer: tuple[torch.Tensor, dist.Work] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take the place of Lightning's handlers; Lightning itself removes them."""
        self.signal, self._told, self._asked, self._group = 0, 0, False, None
        handler = self._note if stage == "fit" else partial(_leave, trainer)
        trainer._signal_connector.register_signal_handlers = partial(_register, trainer, handler)
        if stage != "fit":
            return
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = _ask_nobody
        if trainer.world_size > 1 and dist.is_initialized():
            group = dist.new_group(backend="gloo", timeout=getattr(trainer.strategy, "_timeout", None))
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
        self._told = number

    def _ask(self) -> None:
        """Begin to tell the other ranks whether this one was signalled."""
        self._asked = True
        if self._group is not None and self._answer is None:
            told = torch.tensor(self._told, dtype=torch.uint8)
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
            told = int(mark)
        if told:
            self.signal = told
            connector = trainer._signal_connector
            connector.received_sigterm = True
            for number in SIGNALS:  # from here until the process ends
                connector._original_handlers[number] = signal.SIG_IGN
                connector._register_signal(number, signal.SIG_IGN)

    @staticmethod
    def _leave_if_told(trainer: Trainer) -> None:
        if trainer.state.fn == "fit" and trainer.received_sigterm:
            raise SIGTERMException


def _ask_nobody() -> None:
    """In the place of Lightning's broadcast before every batch."""


def _register(trainer: Trainer, handler: Callable[[int, FrameType | None], None]) -> None:
    """Let Lightning note which handlers there were, and set one for both signals in the place of its own."""
    connector = trainer._signal_connector
    environment = trainer._accelerator_connector.cluster_environment
    if isinstance(environment, SLURMEnvironment):
        environment.auto_requeue = False
    type(connector).register_signal_handlers(connector)
    for number in SIGNALS:
        connector._register_signal(number, handler)


def _leave(trainer: Trainer, number: int, frame: FrameType | None) -> None:
    """End an evaluation at once, with the ranks that were started from here."""
    if trainer.is_global_zero:
        name = signal.Signals(number).name
        os.write(2, f"trainer: stopped by {name}; an evaluation starts anew\n".encode())
    launcher = trainer.strategy.launcher
    if launcher is not None:
        launcher.kill(signal.SIGTERM)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGTERM)


def signal_that_stopped(trainer: Trainer) -> str:
    """Name of the signal that stopped a fit."""
    stop = next((callback for callback in trainer.callbacks if isinstance(callback, GracefulStop)), None)
    return signal.Signals(stop.signal if stop is not None and stop.signal else signal.SIGTERM).name
