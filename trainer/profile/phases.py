"""The phases of a profile: warm-up, plain steps, steps by part, a traced step, one whose waits are noted."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.profiler import ProfilerActivity, profile

from data_shards.batch import TripletBatch
from trainer.callbacks.throughput import PassCost
from trainer.hardware import settle
from trainer.profile.sections import Clock
from trainer.waits import Wait, watching

WARM_UP, PLAIN, BY_PART, TRACED, WATCHED = "warming up", "as it is", "by part", "traced", "waits"


class Phases(Callback):
    """Goes from phase to phase at the end of a step.

    Args:
        steps: Steps of each phase, in order.
        say: Told what is going on, in a few words.
    """

    clock: Clock
    """Counts in the steps by part; to be set before the training."""
    cost: PassCost | None = None
    """Model FLOPs of a pass, where they can be counted."""

    def __init__(self, steps: dict[str, int], say: Callable[[str], None]) -> None:
        self.seconds: dict[str, float] = {}
        """Seconds of a phase's steps, by phase."""
        self.waited: dict[str, float] = {}
        """Seconds in which the loader was waited for."""
        self.images = self.prompts = self.passes = self.flops = 0
        """What the plain steps were given."""
        self.parts: dict[str, float] = {}
        self.trace: profile | None = None
        self.waits: list[Wait] = []
        self.batch: TripletBatch | None = None
        """A batch as the module gets it."""
        self.peak_bytes: int | None = None
        self.graphs = 0
        """Graphs that were compiled after the warm-up."""
        self.judged = self.fused = False
        """Whether a `StepGuard` judges the steps, and whether the optimiser is one kernel."""
        self._phase, self._left = "", 0
        self._steps, self._say, self._total = list(steps.items()), say, sum(steps.values())
        self.steps = steps

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin with the first phase."""
        self._done, self._at = 0, -1
        self._stack = ExitStack()
        self.judged = getattr(pl_module, "judge", None) is not None
        self.fused = all(one.defaults.get("fused") for one in trainer.optimizers)
        self._say(f"step 1 of {self._total}: {WARM_UP}")
        self._next(trainer)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: TripletBatch, batch_idx: int
    ) -> None:
        """Count what a plain step is given."""
        if self._phase == PLAIN:
            self.images, self.passes = self.images + len(batch), self.passes + 1
            self.prompts += pl_module.asked(batch)
            if self.cost is not None:
                self.flops += self.cost.of_batch(pl_module, batch)
        elif self._phase == WARM_UP and batch.masks:
            self.batch = batch

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """After the last pass of a phase's last step begin the next phase."""
        if trainer.global_step == self._done:
            return
        self._done, self._left = trainer.global_step, self._left - 1
        if not self._left:
            self._end(trainer)
            self._next(trainer)
        if self._phase:
            self._say(f"step {self._done + 1} of {self._total}: {self._phase}")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave nothing open."""
        if hasattr(self, "_stack"):
            self._stack.close()

    def _next(self, trainer: Trainer) -> None:
        self._at += 1
        if self._at >= len(self._steps):
            self._phase = ""
            return
        self._phase, self._left = self._steps[self._at]
        device = self.clock.device
        settle(device)
        if self._phase == PLAIN and device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        if self._phase == PLAIN:
            self._graphs = _compiled()
        if self._phase == BY_PART:
            self.clock.start()
        if self._phase == TRACED:
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
            self.clock.naming = True
            with _hushed():
                self.trace = self._stack.enter_context(profile(activities=activities))
        if self._phase == WATCHED:
            self.waits = self._stack.enter_context(watching(device))
        self._since, self._waited = time.perf_counter(), self._loader_waited(trainer)

    def _end(self, trainer: Trainer) -> None:
        if self._phase == BY_PART:
            self.parts = self.clock.stop()
        settle(self.clock.device)
        self.seconds[self._phase] = time.perf_counter() - self._since
        self.waited[self._phase] = self._loader_waited(trainer) - self._waited
        self.clock.naming = False
        with _hushed() if self._phase == TRACED else nullcontext():
            self._stack.close()
        if self._phase == PLAIN:
            self.graphs = _compiled() - self._graphs
            if self.clock.device.type == "cuda":
                self.peak_bytes = torch.cuda.max_memory_allocated(self.clock.device)

    @staticmethod
    def _loader_waited(trainer: Trainer) -> float:
        return float(getattr(trainer.train_dataloader, "waited", 0.0))


@contextmanager
def _hushed() -> Iterator[None]:
    """Keep what a library in C++ writes to stderr off the screen: torch's profiler tells that it starts and stops."""
    screen, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(screen, 2)
        os.close(screen)
        os.close(nowhere)


def _compiled() -> int:
    """Graphs that this process has compiled so far."""
    from torch._dynamo.utils import counters

    return int(counters["stats"].get("unique_graphs", 0))
