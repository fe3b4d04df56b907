"""Loaders over shards: batches in an exact order, and a state that says what was used, not what was fetched."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset

from data_shards.batch import Sample, TripletBatch, collate
from data_shards.dataset import ShardDataset
from data_shards.errors import UserError
from data_shards.sampler import EvenSampler, GlobalOrderSampler


class SampleView(Dataset[Sample]):
    """A shard dataset as (epoch, position) → `Sample`, with the targets of that epoch chosen.

    Args:
        shards: The samples.
        targets_per_image: How many targets of an image are drawn in an epoch; null takes all. MedSAM draws one.
        seed: Seed of the draw.
    """

    def __init__(self, shards: ShardDataset, targets_per_image: int | None = None, seed: int = 0) -> None:
        self.shards, self.targets_per_image, self.seed = shards, targets_per_image, seed

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, item: tuple[int, int]) -> Sample:
        """Read one sample."""
        epoch, position = item
        triplet = self.shards[position]
        count = len(triplet.targets)
        if self.targets_per_image is None or count <= self.targets_per_image:
            return Sample(position, triplet, tuple(range(count)))
        generator = np.random.default_rng((self.seed, epoch, position))
        chosen = generator.choice(count, size=self.targets_per_image, replace=False)
        return Sample(position, triplet, tuple(sorted(int(index) for index in chosen)))


class TripletLoader:
    """An iterable of `TripletBatch` that Lightning can resume inside an epoch.

    It counts batches as they are handed out: what workers fetched ahead does not count. Its state is a number of
    samples over all ranks, so it does not depend on their number.

    Args:
        view: The samples.
        sampler: Their order; for training one that is resumable.
        num_workers: Worker processes; 0 reads in the main process.
        pin_memory: Pin batches for a GPU.
        data_hash: Hash of the data's index; a state of other data is refused.
    """

    def __init__(
        self,
        view: SampleView,
        sampler: GlobalOrderSampler | EvenSampler,
        num_workers: int = 0,
        pin_memory: bool = False,
        data_hash: str = "",
    ) -> None:
        self.dataset, self.sampler, self.data_hash = view, sampler, data_hash
        self._loader = DataLoader(
            view,
            batch_sampler=sampler,
            num_workers=num_workers,
            collate_fn=collate,
            pin_memory=pin_memory,
            persistent_workers=num_workers > 0,
        )
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
        if isinstance(self.sampler, GlobalOrderSampler):
            self.sampler.start = self._samples_seen()
            self._yielded = self.sampler.start // self._stride
        try:
            for batch in self._loader:
                self._yielded += 1
                yield batch
        except UserError:
            # workers that are not told to stop make the process wait for them, seconds each, after the message
            workers = self._loader._iterator
            if workers is not None and hasattr(workers, "_shutdown_workers"):
                workers._shutdown_workers()
                self._loader._iterator = None
            raise

    def state_dict(self) -> dict[str, Any]:
        """Where the loader stands: plain numbers, safe to save."""
        if not isinstance(self.sampler, GlobalOrderSampler):
            return {}
        if self._resume is not None:  # loaded and not yet gone on from
            return dict(self._resume)
        return {
            "epoch": self.sampler.epoch,
            "samples": self._yielded * self._stride,
            "seed": self.sampler.seed,
            "data_hash": self.data_hash,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where a state stood.

        Raises:
            UserError: The state was made with other data or another seed: the order would not be the same.
        """
        if not isinstance(self.sampler, GlobalOrderSampler):
            return
        if state["data_hash"] != self.data_hash:
            raise UserError(
                f"cannot resume: the checkpoint was made on other training shards (index {state['data_hash'][:12]}, "
                f"now {self.data_hash[:12]}); restore them, or start a new run in another default_root_dir"
            )
        if state["seed"] != self.sampler.seed:
            raise UserError(f"cannot resume: data seed was {state['seed']}, now {self.sampler.seed}; set it back")
        self._resume = dict(state)

    @property
    def _stride(self) -> int:
        """Samples over all ranks in one micro-batch."""
        assert isinstance(self.sampler, GlobalOrderSampler)
        return self.sampler.micro_batch * self.sampler.world

    def _samples_seen(self) -> int:
        """Samples of the coming epoch that were used before a resume; a state serves once."""
        state, self._resume = self._resume, None
        if state is None or state["epoch"] != self.sampler.epoch:  # type: ignore[union-attr]
            return 0
        samples = int(state["samples"])
        if samples % self._stride:
            raise UserError(
                f"cannot resume: {samples} samples were used, which {self._stride} samples at a time cannot reach; "
                "choose micro_batch_size so that it × ranks divides the old one's"
            )
        return 0 if samples >= len(self) * self._stride else samples
