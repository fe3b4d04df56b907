"""A step's time by part: what Lightning and our modules call is timed from outside, and nothing of it changes."""

from __future__ import annotations

import functools
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from lightning.pytorch import Trainer

from data_shards.loader import TripletLoader
from trainer.hardware import settle
from trainer.models import Preprocessing
from trainer.modules.tuned import TunedModule

DATA, TRANSFER, PREPARING = "waiting for data", "transfer to the device", "preprocessing"
ASKING, ENCODER, TEXTS, MEMORY = "targets and prompts", "image encoder", "text encoder", "memory of frames"
DECODER, MATCHING, LOSS, SCORES = "mask decoder", "matching", "loss", "training metrics"
BACKWARD, CLIPPING, OPTIMIZER, LOGGING = "backward", "clipping and guards", "optimiser", "logging and callbacks"
REST = "the rest"
PARTS = (
    *(DATA, TRANSFER, PREPARING, ASKING, ENCODER, TEXTS, MEMORY, DECODER, MATCHING, LOSS, SCORES, BACKWARD, CLIPPING),
    *(OPTIMIZER, LOGGING, REST),
)
"""In the order in which a step comes to them."""


class Clock:
    """Adds up seconds by part. Time belongs to the innermost part that is open, so parts add up to the whole.

    Args:
        device: The device that is waited for wherever a part begins or ends.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.running = self.naming = False
        """Whether it counts, and whether parts are named in torch's profile."""
        self.seconds: dict[str, float] = defaultdict(float)
        self._open: list[str] = []
        self._round = 0

    def start(self) -> None:
        """Count from now on."""
        settle(self.device)
        self.running, self._round = True, self._round + 1
        self._open, self._since = [REST], time.perf_counter()

    def stop(self) -> dict[str, float]:
        """Count no longer; seconds by part."""
        self._account()
        self.running = False
        return dict(self.seconds)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count what happens in this context for a part."""
        if self.naming:
            with torch.profiler.record_function(name):
                yield
            return
        if not self.running:
            yield
            return
        mine = self._round
        self._account()
        self._open.append(name)
        try:
            yield
        finally:
            if self.running and self._round == mine:
                self._account()
                self._open.pop()

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function whose calls are counted for a part."""

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return function(*args, **kwargs)

        return call

    def _account(self) -> None:
        settle(self.device)
        now = time.perf_counter()
        self.seconds[self._open[-1]] += now - self._since
        self._since = now


@contextmanager
def measured(clock: Clock, trainer: Trainer, datamodule: Any, module: TunedModule) -> Iterator[None]:
    """Let a clock see the parts of a training's steps while the context is open.

    Args:
        clock: Counts where it runs; otherwise calls pass through.
        trainer: The trainer, before its fit.
        datamodule: What it reads.
        module: What it trains.
    """
    with ExitStack() as stack:
        for owner, name, part in _places(trainer, datamodule, module):
            stack.enter_context(_replaced(owner, name, clock.timed(part, getattr(owner, name))))
        batches = TripletLoader._batches
        stack.enter_context(_replaced(TripletLoader, "_batches", lambda loader: _each_timed(clock, batches(loader))))
        yield


def _places(trainer: Trainer, datamodule: Any, module: TunedModule) -> Iterator[tuple[Any, str, str]]:
    """What is timed: an object, the name of its function, and the part that it is."""
    import lightning.pytorch.trainer.call as hooks

    from trainer.losses import set_prediction as sets
    from trainer.modules import medsam as masks
    from trainer.modules import sam2 as clips
    from trainer.modules import sam3 as concepts

    model, strategy, connector = module.model, trainer.strategy, trainer._logger_connector
    wanted: list[tuple[Any, str, str]] = [
        (datamodule, "transfer_batch_to_device", TRANSFER),
        *((Preprocessing, name, PREPARING) for name in ("images", "masks", "shares", "boxes")),
        *((module, name, ASKING) for name in ("_truth", "_drawn", "_asked")),
        *((getattr(module, "prompts", None), name, ASKING) for name in ("first", "correct")),
        (getattr(module, "exemplars", None), "show", ASKING),
        *((clips, "followed", ASKING), (concepts, "objects_of", ASKING)),
        (model, "encode", ENCODER),
        *((model, name, TEXTS) for name in ("read", "read_tokens")),
        *((model, name, MEMORY) for name in ("without_memory", "recall", "remember")),
        *((model, name, DECODER) for name in ("decode", "look", "glance", "detect")),
        *((sets, "match", MATCHING), (getattr(module, "loss", None), "forward", LOSS)),
        *((masks, "found_overlap", SCORES), (clips, "found_dsc", SCORES)),
        *((strategy, "training_step", REST), (strategy, "backward", BACKWARD)),
        (module, "configure_gradient_clipping", CLIPPING),
        *((strategy, "optimizer_step", OPTIMIZER), (module, "optimizer_zero_grad", OPTIMIZER)),
        *((module, "log", LOGGING), (module, "log_dict", LOGGING), (hooks, "_call_callback_hooks", LOGGING)),
        *((connector, name, LOGGING) for name in ("on_batch_end", "update_train_step_metrics")),
    ]
    for owner, name, part in wanted:
        if owner is not None and hasattr(owner, name):
            yield owner, name, part


@contextmanager
def _replaced(owner: Any, name: str, function: Any) -> Iterator[None]:
    """Put a function in the place of an object's own, and take it away again."""
    table = vars(owner)
    own, before = name in table, table.get(name)
    setattr(owner, name, function)
    try:
        yield
    finally:
        if own:
            setattr(owner, name, before)
        else:
            delattr(owner, name)


def _each_timed(clock: Clock, items: Iterable[Any]) -> Iterator[Any]:
    """The items of an iterable; waiting for each is a part."""
    source, end = iter(items), object()
    while True:
        with clock.part(DATA):
            item = next(source, end)
        if item is end:
            return
        yield item
