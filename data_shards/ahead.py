"""Fetching the next item while one is used, and taking it to the GPU meanwhile."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import Generic, TypeVar

import torch

from data_shards.batch import TripletBatch

T = TypeVar("T")
Sent = tuple[TripletBatch, torch.cuda.Event]
"""A batch on its way, and what the device notes when it has arrived."""

_POLL = 0.1
"""Seconds after which a thread that waits looks whether it is still wanted."""
_PATIENCE = 5.0
"""Seconds for which the thread is waited for when it is no longer wanted."""


class OneAhead(Generic[T]):
    """The items of an iterator; a thread fetches the next one while one is used.

    Args:
        source: The iterator. From now on only the thread touches it.
    """

    def __init__(self, source: Iterator[T]) -> None:
        self._source = source
        self._ready: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(1)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._fetch, daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[T]:
        """Yield the items; what the iterator raises is raised here."""
        while True:
            try:
                item, error = self._ready.get(timeout=_POLL)
            except queue.Empty:
                if self._stopped.is_set():  # ending quietly would pass for the end of the items
                    raise RuntimeError("this iteration was left: what it iterates was closed or begun anew") from None
                continue
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item  # type: ignore[misc]

    def stop(self) -> None:
        """Stop the thread, so that the iterator can be closed."""
        self._stopped.set()
        self._thread.join(_PATIENCE)

    def _fetch(self) -> None:
        while not self._stopped.is_set():
            try:
                found: tuple[T | None, BaseException | None] = (next(self._source), None)
            except BaseException as error:  # also KeyboardInterrupt: it is raised where items are used
                found = (None, error)
            while not self._stopped.is_set():
                try:
                    self._ready.put(found, timeout=_POLL)
                    break
                except queue.Full:
                    continue
            if found[1] is not None:
                return


class Ferry:
    """Takes batches to a GPU on a stream of its own, so that a batch is copied while the device works on another.

    Args:
        device: The GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device)

    def send(self, batch: TripletBatch) -> Sent:
        """Pin a batch and begin to copy it, in any thread; nothing waits."""
        with torch.cuda.stream(self._stream):  # makes the GPU this thread's own, too
            there = batch.pin_memory().to(self.device, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record(self._stream)
        return there, arrived

    def receive(self, sent: Sent) -> TripletBatch:
        """Hand a batch to the stream that trains: the device waits for it if it must, this thread does not."""
        there, arrived = sent
        stream = torch.cuda.current_stream(self.device)
        stream.wait_event(arrived)
        there.record_stream(stream)
        return there
