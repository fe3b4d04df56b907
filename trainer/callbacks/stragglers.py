"""Which rank the others wait for, and whether it is its data or its device."""

from __future__ import annotations

import socket
import statistics
import sys
import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from data_shards.batch import TripletBatch
from data_shards.errors import UserError
from trainer.callbacks.throughput import Stopwatch
from trainer.callbacks.trace import append, columns
from trainer.ranks import every_rank
from trainer.run import Run

COLUMNS = ("step", "rank", "data_wait_seconds", "forward_seconds", "step_seconds")


class RankTimes(Callback):
    """Writes ``ranks.csv`` at logged steps: how long each rank waited for data and took for its forward passes.

    All seconds are means per optimiser step since the last logged one, without evaluations. A rank's own time is both
    together; backward passes are left out, for they wait for the other ranks, and so do forward passes of sharded
    models in part: there a slow device shows less than it is. ``train/straggler`` is the slowest rank's own time
    divided by the median of all, ``train/data_wait_worst`` the largest share of its steps in which a rank waited for
    data. With one rank nothing is written: there is `Throughput`.

    Args:
        slow: A rank whose own time is more than so many times the median is slow.
        patience: After so many logged steps in a row in which a rank was slow, a line says so, once.
    """

    def __init__(self, slow: float = 1.5, patience: int = 10) -> None:
        if not slow > 1 or patience < 1:
            raise UserError(f"RankTimes' slow {slow} is above 1, patience {patience} is 1 or more")
        self.slow, self.patience = slow, patience
        self._watch: Stopwatch | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin the table, or go on with it, and start the clocks."""
        if trainer.world_size == 1:
            return
        self._path = Run(trainer.default_root_dir).ranks
        if trainer.is_global_zero and not columns(self._path):
            append(self._path, COLUMNS)
        self._hosts = every_rank(socket.gethostname())
        self._slow_for, self._said = [0] * trainer.world_size, False
        self._clock = _DeviceClock() if pl_module.device.type == "cuda" else _HostClock()
        self._watch = Stopwatch(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock: time until `on_validation_end` does not count."""
        if self._watch is not None and not trainer.sanity_checking:
            self._watch.pause()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock again."""
        if self._watch is not None and not trainer.sanity_checking:
            self._watch.go_on()

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: TripletBatch, batch_idx: int
    ) -> None:
        """A forward pass begins."""
        if self._watch is not None:
            self._clock.start()

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """A forward pass has ended."""
        if self._watch is not None:
            self._clock.stop()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """At a step that is logged anyway, tell each other."""
        if self._watch is None or not self._watch.is_due():
            return
        steps = trainer.global_step - self._watch.step
        seconds, waited = self._watch.read()
        times = every_rank((waited / steps, self._clock.read() / steps, seconds / steps))
        own = [waiting + forward for waiting, forward, _ in times]
        median = max(1e-9, statistics.median(own))
        worst = max(waiting / whole for waiting, _, whole in times)
        # every rank holds the same numbers
        logged = {"train/straggler": max(own) / median, "train/data_wait_worst": worst}
        pl_module.log_dict(logged, batch_size=1)
        if trainer.is_global_zero:
            for rank, row in enumerate(times):
                append(self._path, [trainer.global_step, rank, *(f"{value:.6f}" for value in row)])
            self._watch_for_slow(own, median)
        self._watch.restart()

    def _watch_for_slow(self, own: list[float], median: float) -> None:
        """Say, once, that a rank is slow all the time."""
        slow = [time > self.slow * median for time in own]
        self._slow_for = [count + 1 if late else 0 for count, late in zip(self._slow_for, slow, strict=True)]
        late = next((rank for rank, count in enumerate(self._slow_for) if count >= self.patience), None)
        if late is not None and not self._said:
            times = f"{own[late]:.3g} s a step for data and forward pass, the median rank {median:.3g} s"
            print(f"rank {late} on {self._hosts[late]} is slow: {times}: {self._path}", file=sys.stderr, flush=True)
            self._said = True


class _HostClock:
    """Seconds of what the host computes."""

    def __init__(self) -> None:
        self._seconds, self._since = 0.0, 0.0

    def start(self) -> None:
        self._since = time.perf_counter()

    def stop(self) -> None:
        self._seconds += time.perf_counter() - self._since

    def read(self) -> float:
        """Seconds so far; it begins anew."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds


class _DeviceClock:
    """Seconds of what a CUDA device computes: nothing waits for it until they are read."""

    def __init__(self) -> None:
        self._spans: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def start(self) -> None:
        self._spans.append((torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)))
        self._spans[-1][0].record()

    def stop(self) -> None:
        self._spans[-1][1].record()

    def read(self) -> float:
        """Seconds so far; it begins anew."""
        for _, end in self._spans[-1:]:
            end.synchronize()
        seconds = sum(start.elapsed_time(end) for start, end in self._spans) / 1000
        self._spans = []
        return seconds
