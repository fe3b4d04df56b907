"""A rank that hangs, or whose machine is gone, ends the run in time, with a line that names it."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from dataclasses import replace
from datetime import timedelta
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from data_shards.errors import UserError
from trainer.callbacks.roll_call import Place, RollCall

_MINUTES = 30.0
"""PyTorch's own timeout of a connection, where a strategy has none."""
_SHARE = 0.9
"""Of the timeout: after it the connection itself breaks, and NCCL ends the process without naming anybody."""
_BEAT = 2.0
_LINGER = 0.5
"""Seconds that a rank stays which has lost another one: those that look a little later are not to miss it too."""


class Heartbeat(Callback):
    """Watches over the ranks: where one waits for the others in vain, the run ends, and the line says for whom.

    A rank that is stopped, that hangs in its data or on its disk, or whose machine is lost leaves the others waiting
    inside of a collective, on CPUs and GPUs alike, and what that raises in the end names no rank. Here every rank notes
    where in its step it is, a thread sends that to the first rank every two seconds (`RollCall`: a packet, nothing
    waits), and where a rank has not moved for nine tenths of the timeout, it asks which ranks are silent or behind. If
    there are any, it says so and ends with exit code 2, whereupon srun and torchrun end the others. If there are none,
    nothing is done: all wait at one place, for a device or the network, and the connection's own timeout ends that.

    Time in which the whole run is suspended, as by Ctrl-Z, does not count.

    Args:
        minutes: How long a rank waits for another one; by default the strategy's ``timeout``.
    """

    def __init__(self, minutes: float | None = None) -> None:
        if minutes is not None and not minutes > 0:
            raise UserError(f"Heartbeat's minutes {minutes}: above 0")
        self.minutes = minutes
        self._roll: RollCall | None = None
        self._place = Place()
        self._over, self._armed = threading.Event(), True

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begin to watch, on several ranks."""
        self.leave()
        self._place, self._over, self._armed = Place(), threading.Event(), True
        if trainer.world_size == 1:
            return
        self._trainer, self.limit = trainer, _SHARE * self._timeout(trainer).total_seconds()
        self._interval = min(_BEAT, self.limit / 20)
        roll = RollCall(trainer.global_rank, os.environ.get("MASTER_ADDR", "127.0.0.1"))
        if not roll.works:
            if trainer.is_global_zero:
                line = "ranks do not reach the first one by UDP: one that hangs will end the run without being named"
                print(f"trainer: warning: {line}", file=sys.stderr, flush=True)
            return
        self._roll = roll
        threading.Thread(target=self._watch, args=(roll, self._over), name="heartbeat", daemon=True).start()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A mark."""
        self._pass("loading its first batch")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """A mark."""
        self._pass("in its forward pass")

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """A mark."""
        self._pass("in its backward pass")

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """A mark."""
        self._pass("in its optimiser's step")

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """A mark."""
        self._pass("between two batches")

    def on_validation_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """A mark."""
        self._pass("in an evaluation's batch")

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """A mark."""
        self._pass("between two batches of an evaluation")

    on_test_batch_start = on_predict_batch_start = on_validation_batch_start
    on_test_batch_end = on_predict_batch_end = on_validation_batch_end

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """End nothing any more; this rank is heard of, and can ask, until it leaves."""
        self._armed = False

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Tell that this rank has ended."""
        self.leave()

    def lost(self, patience: float = 12.0) -> str | None:
        """Which ranks are gone, in a few words, to be asked where a connection broke; None where all are there.

        Args:
            patience: Seconds in which ranks of other machines may turn out to be silent; of this one it is seen.
        """
        roll = self._roll
        if roll is None:
            return None
        here, started, answers = roll.homes[roll.rank], time.monotonic(), roll.answers
        only_here = all((home.host, home.space) == (here.host, here.space) for home in roll.homes)
        patience = min(2.0, patience) if only_here else patience
        while not (gone := roll.gone()) and time.monotonic() < started + patience:
            roll.tell(self._place, ask=True)
            if not only_here and (gone := [seen.rank for seen in roll.board if seen.silent]):
                break
            time.sleep(0.1)
        if not gone and not only_here and roll.answers == answers:
            gone = [0]
        time.sleep(_LINGER)
        verb = "is" if len(gone) == 1 else "are"
        return f"{self._named(roll, gone)} {verb} gone: see what is said there" if gone else None

    def leave(self) -> None:
        """Tell that this rank ends by itself."""
        self._over.set()
        if self._roll is not None:
            self._roll.tell(replace(self._place, left=True))
            self._roll = None

    def _pass(self, doing: str) -> None:
        self._place = Place(self._place.count + 1, self._trainer.global_step if self._roll else 0, doing)

    def _watch(self, roll: RollCall, over: threading.Event) -> None:
        """Beat; where this rank does not move, find out for whom it waits."""
        here, waited, asked_since = self._place, 0.0, 0
        while not over.wait(self._interval):
            # beats are counted, not seconds: those of a suspended run are none
            here, waited = (here, waited + self._interval) if self._place is here else (self._place, 0.0)
            ask = waited > self.limit / 2
            asked_since = asked_since if ask else roll.beats
            roll.beat(here, ask)
            stuck = waited > self.limit and self._armed and self._place is here
            if stuck and (fault := self._whose_fault(roll, asked_since)):
                self._break_off(roll, *fault)

    def _whose_fault(self, roll: RollCall, asked_since: int) -> tuple[list[int], str] | None:
        """The ranks that this one waits for, and what is known of them."""
        behind = [seen for seen in roll.board if seen.place.count < self._place.count]
        if silent := roll.gone() or self._silent(roll, asked_since):
            return silent, "silent: its process or its machine hangs or is gone"
        if behind:
            last = min(behind, key=lambda seen: seen.place.count).place
            return [seen.rank for seen in behind], f"still {last.doing} (step {last.step})"
        return None

    def _silent(self, roll: RollCall, since: int) -> list[int]:
        """Ranks that are not heard of any more; the first one if it does not answer."""
        if roll.beats - max(roll.answered, since) >= 5:
            return [0]
        return [seen.rank for seen in roll.board if seen.silent] if roll.answered > since else []

    def _named(self, roll: RollCall, ranks: list[int]) -> str:
        names = [f"rank {rank} on {roll.homes[rank].host}" for rank in sorted(ranks)[:4]]
        return " and ".join([", ".join(names[:-1]), names[-1]] if names[1:] else names) + (
            f" and {len(ranks) - 4} more" if len(ranks) > 4 else ""
        )

    def _break_off(self, roll: RollCall, ranks: list[int], what: str) -> None:
        """End this process, and the ranks it started; the first of those that wait says why, and ends last."""
        speaker = min(set(range(len(roll.homes))) - set(ranks), default=roll.rank)
        if roll.rank == speaker:
            verb = "is" if len(ranks) == 1 else "are"
            line = f"{self._named(roll, ranks)} {verb} {what}; the others waited {self.limit:.0f} s at step "
            line += f"{self._place.step}: see what is said there, then start it again, with --ckpt_path last"
            os.write(2, f"trainer: error: {line}\n".encode())
            time.sleep(3 * self._interval)  # until the others have found out too
        roll.tell(replace(self._place, left=True))
        launcher = self._trainer.strategy.launcher
        if launcher is not None:
            launcher.kill(signal.SIGKILL)
        os._exit(2)

    def _timeout(self, trainer: Trainer) -> timedelta:
        if self.minutes is not None:
            return timedelta(minutes=self.minutes)
        timeout = getattr(trainer.strategy, "_timeout", None)
        return timeout if isinstance(timeout, timedelta) else timedelta(minutes=_MINUTES)


def heartbeat_of(trainer: Trainer) -> Heartbeat | None:
    """The run's heartbeat."""
    return next((callback for callback in trainer.callbacks if isinstance(callback, Heartbeat)), None)
