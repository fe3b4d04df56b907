"""Steps that must not be learnt from: they are skipped, looked into, and after several in a row training goes back."""

from __future__ import annotations

import math
import socket
import statistics
import sys
from collections import deque
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from data_shards.batch import TripletBatch
from data_shards.errors import UserError, counted
from trainer.callbacks.forensics import Pass, again, bad_gradients, samples_of, write_report
from trainer.callbacks.rollback import go_back
from trainer.modules.tuned import TunedModule
from trainer.ranks import every_rank
from trainer.run import Run

_KEYS = 5
"""Samples that a line names."""
_MEND = "lower model.init_args.lr or look at these samples"


class StepGuard(Callback):
    """Skips bad optimiser steps: a loss or a gradient that is no finite number, on any rank, or a spike of the loss.

    A skipped step leaves weights, moments and average as they are; the schedule and the order of samples go on. What
    was wrong goes to ``forensics/`` of the run, one file for each rank that had a part in it, and one line to stderr;
    ``train/bad_steps`` counts. After `rollback_after` in a row, weights, optimiser and average are taken from the last
    good checkpoint, and the samples in between are passed over (Chowdhery et al. 2022, arXiv:2204.02311, §5.1). The run
    ends with one line where that does not help, or where none of its last steps was good. With ``16-mixed``, whose loss
    scaler skips steps itself, nothing is judged, and a loss that is no number ends the run.

    Args:
        rollback_after: Bad steps in a row after which training goes back to the last good checkpoint; 0 ends the run at
            the first bad step.
        rollbacks: How often it may do so without `rollback_after` good steps in a row in between; then the run ends.
        spike_factor: A step is bad too if its loss is more than so many times the median of the last good ones; null
            does not look.
        spike_window: How many good steps that median is of; as long as there are fewer, no loss is a spike.
        forensics: Look for samples, layer and gradients at fault, by one more forward pass of a bad step.
    """

    def __init__(
        self,
        rollback_after: int = 3,
        rollbacks: int = 2,
        spike_factor: float | None = None,
        spike_window: int = 50,
        forensics: bool = True,
    ) -> None:
        if rollback_after < 0 or rollbacks < 0 or spike_window < 1:
            raise UserError(
                f"StepGuard's rollback_after {rollback_after} and rollbacks {rollbacks} are 0 or more, spike_window "
                f"{spike_window} is 1 or more"
            )
        if spike_factor is not None and not 1 < spike_factor < math.inf:
            raise UserError(f"StepGuard's spike_factor {spike_factor}: above 1, or null")
        self.rollback_after, self.rollbacks, self.forensics = rollback_after, rollbacks, forensics
        self.spike_factor, self.spike_window = spike_factor, spike_window
        self.last_loss: float | None = None
        """Loss of the batch that has just ended, as `on_before_backward` was told, where it has been read already."""
        self.judges = False
        """Whether steps of this training are judged."""
        self._passes: list[Pass] = []
        self._good_losses: deque[float] = deque(maxlen=spike_window)
        self._total = self._streak = self._good = self._gone_back = self._bad_steps = 0
        self._first = ""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Become the judge of the module's steps."""
        self.judges = isinstance(pl_module, TunedModule) and getattr(trainer.precision_plugin, "scaler", None) is None
        self._passes.clear()
        if self.judges:
            assert isinstance(pl_module, TunedModule)
            pl_module.judge = partial(self._judge, trainer, pl_module)
            pl_module.bad_steps, pl_module.step_dropped = self._bad_steps, False

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: TripletBatch, batch_idx: int
    ) -> None:
        """Note the batch."""
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._passes.clear()
        self._passes.append(Pass(batch, batch_idx))
        self.last_loss = None

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Note its loss, without waiting for it."""
        self._passes[-1].loss = loss.detach()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Count, and go back after too many bad steps in a row; checkpoints are written after this.

        Raises:
            UserError: There is nothing to go back to, or it did not help.
        """
        if not self.judges or self.last_loss is None:  # the step has not ended
            return
        self._passes.clear()
        if trainer.global_step % max(1, trainer.log_every_n_steps) == 0:
            pl_module.log("train/bad_steps", float(self._total), batch_size=1)
        if self._streak < self.rollback_after or not self._streak:
            return
        if self._gone_back >= self.rollbacks:
            often = f"going back to a checkpoint {counted(self._gone_back, 'time')} did not help"
            raise UserError(f"{self._first}; {often}: {_MEND}")
        path = go_back(trainer, pl_module)
        if path is None:
            bad = f"{counted(self._streak, 'bad step')} in a row, and no checkpoint to go back to yet"
            raise UserError(f"{self._first}; {bad}: {_MEND}")
        if trainer.is_global_zero:
            many = f"{counted(self._streak, 'bad step')} in a row up to step {trainer.global_step - 1}"
            _say(f"{many}: weights and optimiser are those of {path} again; samples and schedule go on")
        self._streak, self._gone_back = 0, self._gone_back + 1

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say how many steps were skipped.

        Raises:
            UserError: No step at the end of the training was good: what is kept is from before.
        """
        self._stop(pl_module)
        if self._total and trainer.is_global_zero:
            where = f": {Run(trainer.default_root_dir).forensics}" if self.forensics else ""
            _say(f"{counted(self._total, 'bad step was', 'bad steps were')} skipped{where}")
        hopeless = 0 < self.rollback_after <= self._bad_steps or 0 < trainer.global_step == self._bad_steps
        if self.judges and hopeless and not trainer.should_stop:
            raise UserError(f"{self._first}; no step after it was good: {_MEND}")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Judge no more."""
        self._stop(pl_module)

    def state_dict(self) -> dict[str, Any]:
        """What a run that goes on must know to decide alike."""
        return {
            "losses": list(self._good_losses),
            "total": self._total,
            "streak": self._streak,
            "bad_steps": self._bad_steps,
            "good": self._good,
            "gone_back": self._gone_back,
            "first": self._first,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self._good_losses = deque(state_dict["losses"], maxlen=self.spike_window)
        self._total, self._streak, self._bad_steps = (state_dict[name] for name in ("total", "streak", "bad_steps"))
        self._good, self._gone_back, self._first = (state_dict[name] for name in ("good", "gone_back", "first"))

    def _stop(self, module: LightningModule) -> None:
        self._passes.clear()
        if isinstance(module, TunedModule):
            module.judge = None

    def _judge(self, trainer: Trainer, module: TunedModule, norm: Tensor) -> bool:
        """Whether a step may be taken: all ranks say the same.

        Args:
            trainer: The trainer.
            module: Its module.
            norm: 2-norm of the gradients over all ranks, a scalar.

        Raises:
            UserError: The step is bad, and the first one ends the run.
        """
        losses = torch.stack([taken.loss.float() for taken in self._passes if taken.loss is not None])
        values = torch.stack([losses.sum(), norm.to(losses)])
        if trainer.world_size > 1:
            torch.distributed.all_reduce(values)  # a sum with what is not finite is not finite
        loss, norm_read, *mine = torch.cat([values, losses]).tolist()  # the step's one wait for the device
        loss, norm_read, self.last_loss = loss / trainer.world_size, norm_read / trainer.world_size, mine[-1]
        what, limit = self._wrong(loss, norm_read)
        module.step_dropped = bool(what)
        if what:
            self._count_bad(trainer, module, what, {"step_loss": loss, "gradient_norm": norm_read}, limit)
        else:
            self._count_good(loss)
        module.bad_steps = self._bad_steps
        return not what

    def _wrong(self, loss: float, norm: float) -> tuple[str, float]:
        """What is wrong with a step, empty for nothing; and the largest loss of a pass that had no part in it."""
        if not math.isfinite(loss):
            return f"the loss is {loss}", math.inf
        if not math.isfinite(norm):
            return f"the gradients' norm is {norm}", -math.inf
        if self.spike_factor is not None and len(self._good_losses) == self.spike_window:
            median = statistics.median(self._good_losses)
            if loss > self.spike_factor * median:
                times = f"{loss / median:.3g} times" if median > 0 else "above"
                last = f"the median of the last {counted(self.spike_window, 'good step')}"
                return f"the loss is {loss:.6g}, {times} {last}", self.spike_factor * median
        return "", math.inf

    def _count_good(self, loss: float) -> None:
        self._good_losses.append(loss)
        self._streak = self._bad_steps = 0
        self._good += 1
        if self._good >= self.rollback_after:
            self._gone_back = 0

    def _count_bad(
        self, trainer: Trainer, module: TunedModule, what: str, values: dict[str, float], limit: float
    ) -> None:
        """Count a bad step, and look into it.

        Raises:
            UserError: It ends the run.
        """
        step, parts = trainer.global_step, self._look(trainer, module, what, values, limit)
        keys = [key for part in parts for key in part["keys"]]
        more = f" and {len(keys) - _KEYS} more" if len(keys) > _KEYS else ""
        named = f"{what} at step {step} on {', '.join(keys[:_KEYS])}{more}"
        notes = [note for part in parts for note in part["notes"]]
        if not self.rollback_after:
            raise UserError(f"{named}: {_MEND}; the last checkpoint is from before")
        if trainer.is_global_zero:
            folder = trainer.datamodule.folders["train"]
            look = f"`data-shards inspect {folder} --sample '{keys[0]}' --png sample.png` draws it" if keys else ""
            _say("; ".join(filter(None, [f"{named}: the step is skipped", *notes[:3], look])))
        self._total, self._streak, self._good = self._total + 1, self._streak + 1, 0
        self._first = self._first if self._bad_steps else named
        self._bad_steps += 1

    def _look(
        self, trainer: Trainer, module: TunedModule, what: str, values: dict[str, float], limit: float
    ) -> list[dict[str, Any]]:
        """Look into a bad step on every rank.

        Returns:
            Of every rank the keys of its samples at fault, and notes for a line.
        """
        passes, step = trainer.accumulate_grad_batches, trainer.global_step
        head = {
            "why": what,
            "step": step,
            "epoch": trainer.current_epoch,
            "rank": trainer.global_rank,
            "host": socket.gethostname(),
        }
        batches: list[dict[str, Any]] = []
        keys: list[str] = []
        notes: list[str] = []
        for taken in self._passes:
            loss = math.nan if taken.loss is None else float(taken.loss) * passes
            at_fault = not math.isfinite(loss) or loss > limit
            row: dict[str, Any] = {"batch": taken.number, "loss": loss, "at_fault": at_fault}
            second = again(trainer, module, taken) if self.forensics else {}
            if at_fault:
                keys += taken.batch.keys
                row |= {"second_pass": second, "samples": samples_of(trainer, taken.batch)}
                if isinstance(layer := second.get("layer"), dict) and not notes:
                    why = "" if layer.get("weights_are_finite", True) else ", and its weights are not finite"
                    notes = [f"{layer['name']} ({layer['class']}) gave {layer['output']} first{why}"]
            batches.append(row)
        if self.forensics and keys:
            path = Run(trainer.default_root_dir).forensics / f"step-{step:06d}-rank{trainer.global_rank}.json"
            report = {**head, **values, "bad_gradients": bad_gradients(module)}
            notes.append(write_report(path, report, batches) or str(path))
        return every_rank({"keys": keys, "notes": notes})


def guard_of(trainer: Trainer) -> StepGuard | None:
    """The guard that judges the steps of a training; None where there is none."""
    guards = (callback for callback in trainer.callbacks if isinstance(callback, StepGuard))
    return next((guard for guard in guards if guard.judges), None)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
