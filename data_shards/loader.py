"""Loaders over shards: batches in an exact order, and a state that says what was used, not what was fetched."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader

from data_shards.ahead import Ferry, OneAhead, Sent
from data_shards.batch import TripletBatch, collate
from data_shards.errors import UserError, counted
from data_shards.sampler import EvenSampler, GlobalOrderSampler
from data_shards.views import SampleView
from data_shards.workers import settle

__all__ = ["SampleView", "TripletLoader"]


class TripletLoader:
    """An iterable of `TripletBatch` that Lightning can resume inside an epoch.

    It counts batches as they are handed out: what workers fetched ahead does not count. Its state is a number of
    samples over all ranks, so it does not depend on their number.

    With workers, a thread fetches the next batch while one is used, and takes it to the GPU if there is one.

    Args:
        view: The samples.
        sampler: Their order; for training one that is resumable.
        num_workers: Worker processes; 0 reads in the main process.
        pin_memory: Pin batches, each as one block, for a GPU that they are copied to later.
        data_hash: Hash of the data's index; a state of other data is refused.
        max_damaged: Share of an epoch's samples that may be damaged, where the view skips them; more is an error.
        device: GPU to which workers' batches are copied ahead, on a stream of its own; None yields them on the CPU.
    """

    def __init__(
        self,
        view: SampleView,
        sampler: GlobalOrderSampler | EvenSampler,
        num_workers: int = 0,
        pin_memory: bool = False,
        data_hash: str = "",
        max_damaged: float = 0.01,
        device: torch.device | None = None,
    ) -> None:
        self.dataset, self.sampler, self.data_hash, self.max_damaged = view, sampler, data_hash, max_damaged
        self._loader = DataLoader(
            view,
            batch_sampler=sampler,
            num_workers=num_workers,
            collate_fn=partial(collate, frames=view.frames),
            persistent_workers=num_workers > 0,
            worker_init_fn=settle,
            generator=torch.Generator(),  # its own: starting workers draws nothing from the global one
        )
        self.steps_per_epoch: int | None = None
        """Steps after which an epoch ends, where it is known; a resumed run needs the same."""
        self.waited = 0.0
        """Seconds for which batches were waited for, over all epochs."""
        self._pinned = pin_memory
        self._device = device if num_workers else None
        self._ferry: Ferry | None = None
        self._ahead: OneAhead[TripletBatch] | OneAhead[Sent] | None = None
        self._yielded = 0
        self._resume: dict[str, Any] | None = None

    @property
    def batch_sampler(self) -> GlobalOrderSampler | EvenSampler:
        """The sampler under its other name: Lightning asks a loader with a `sampler` for both."""
        return self.sampler

    def __len__(self) -> int:
        """Batches of a whole epoch, also while one is being resumed."""
        return len(self.sampler)

    def __iter__(self) -> Iterator[TripletBatch]:
        """Yield the epoch's batches, from where a loaded state says."""
        self._yielded = 0
        if self._ahead is not None:  # an iteration that was left
            self._ahead.stop()
        if isinstance(self.sampler, GlobalOrderSampler):
            self.sampler.start = self._samples_seen()
            self._yielded = self.sampler.start // self.sampler.stride
        per_pass = self.sampler.counted_per_pass() if isinstance(self.sampler, GlobalOrderSampler) else None
        damaged = 0
        try:
            for batch in self._timed():
                batch.counted = None if per_pass is None else float(per_pass[self._yielded])
                damaged += len(batch.skipped)
                if batch.skipped:
                    self._check_damage(damaged, batch.skipped[-1].reason)
                self._yielded += 1
                yield batch
        except UserError:
            self.close()
            raise

    def close(self) -> None:
        """Stop the workers; another iteration starts them again.

        Left to the garbage collector they would not be told, because their queues are closed before the loader's end is
        known, and the process would wait for them, five seconds each.
        """
        if self._ahead is not None:
            self._ahead.stop()
            self._ahead = None
        workers = self._loader._iterator
        if workers is not None and hasattr(workers, "_shutdown_workers"):
            workers._shutdown_workers()
        self._loader._iterator = None

    def _timed(self) -> Iterator[TripletBatch]:
        """Yield batches and add up what they are waited for."""
        started = time.perf_counter()
        for batch in self._batches():
            self.waited += time.perf_counter() - started
            yield batch
            started = time.perf_counter()

    def _batches(self) -> Iterable[TripletBatch]:
        """What is read, pinned and on the GPU as was asked for; with workers one batch ahead."""
        found: Iterator[TripletBatch] = iter(self._loader)
        if self._device is not None:
            ferry = self._ferry = self._ferry or Ferry(self._device)
            sent = self._ahead = OneAhead(map(ferry.send, found))
            return map(ferry.receive, sent)
        if self._pinned:
            found = map(TripletBatch.pin_memory, found)
        if not self._loader.num_workers:
            return found
        ahead = self._ahead = OneAhead(found)
        return ahead

    def state_dict(self) -> dict[str, Any]:
        """Where the loader stands: plain numbers, safe to save."""
        if not isinstance(self.sampler, GlobalOrderSampler):
            return {}
        if self._resume is not None:  # loaded and not yet gone on from
            return dict(self._resume)
        return {
            "epoch": self.sampler.epoch,
            "samples": self._yielded * self.sampler.stride,
            "seed": self.sampler.seed,
            "order": self.sampler.order.name,
            "steps_per_epoch": self.steps_per_epoch,
            "data_hash": self.data_hash,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where a state stood.

        Raises:
            UserError: The state was made with other data or another seed: the order would not be the same.
        """
        if not isinstance(self.sampler, GlobalOrderSampler):
            return
        check_state(state, self.data_hash, self.sampler.seed, self.sampler.order.name)
        self._resume = dict(state)

    def _check_damage(self, damaged: int, reason: str) -> None:
        """Stop before a run learns from what happens to be left of its data."""
        if damaged > math.ceil(self.sampler.micro_batch * len(self.sampler) * self.max_damaged):
            raise UserError(
                f"{counted(damaged, 'damaged sample')} in one epoch on one rank: data.init_args.max_damaged "
                f"({self.max_damaged:g}) allows fewer; the last one: {reason}"
            )

    def _samples_seen(self) -> int:
        """Samples of the coming epoch that were used before a resume; a state serves once."""
        assert isinstance(self.sampler, GlobalOrderSampler)
        state, self._resume = self._resume, None
        if state is None or state["epoch"] != self.sampler.epoch:
            return 0
        samples = int(state["samples"])
        if samples % self.sampler.stride:
            raise UserError(
                f"cannot resume: {samples} samples were used, which {self.sampler.stride} samples at a time cannot "
                "reach; choose micro_batch_size so that it × ranks divides the old one's"
            )
        return 0 if samples >= len(self) * self.sampler.stride else samples


def check_state(state: Mapping[str, Any], data_hash: str, seed: int, order: str) -> None:
    """Check that a loader's state goes with an order of samples.

    Args:
        state: The state.
        data_hash: Hash of the index of the samples.
        seed: Seed of the order.
        order: Its name.

    Raises:
        UserError: It was made with other data, another seed or another order: the samples would not be the same.
    """
    if state["data_hash"] != data_hash:
        raise UserError(
            f"cannot resume: the checkpoint was made on other training shards (index {state['data_hash'][:12]}, "
            f"now {data_hash[:12]}); restore them, or start a new run in another default_root_dir"
        )
    if state["seed"] != seed:
        raise UserError(f"cannot resume: data seed was {state['seed']}, now {seed}; set it back")
    if state.get("order", "") != order:
        raise UserError(
            "cannot resume: the samples were chosen or weighted in another way; set data.init_args (sampling, kinds, "
            "only_with_targets, train_samples, clip_length, clip_step, batch_size) back"
        )
