"""Samplers: which samples a rank takes, micro-batch by micro-batch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler

from data_shards.errors import UserError
from data_shards.order import EpochOrder, epoch_order

__all__ = ["Draw", "EvenSampler", "GlobalOrderSampler", "epoch_order"]


class Draw(NamedTuple):
    """One sample of an epoch.

    Attributes:
        epoch: The epoch.
        position: Position of the sample in its corpus.
        repeat: How often it was drawn before in this epoch: what is random about it is drawn anew.
    """

    epoch: int
    position: int
    repeat: int = 0


class GlobalOrderSampler(Sampler[list[Draw]]):
    """Micro-batches of one rank, cut out of the global order of the epoch.

    A global batch is one optimiser step's samples over all ranks and accumulation steps. The order is cut into global
    batches first, each then into micro-batches, each of these over the ranks: so the samples of a step do not depend on
    the number of ranks. The last, incomplete global batch of an epoch is left out; the next epoch's order is another.

    Args:
        samples: The order of an epoch; a number of samples takes each of them once.
        global_batch: Samples a step, over all ranks.
        micro_batch: Samples a rank takes at once.
        rank: This rank.
        world: Number of ranks.
        seed: Seed of the order.
        counted: (N,) bool, which samples of the corpus have something to learn from; all if null.

    Raises:
        UserError: The batches do not divide, or there are fewer samples than one global batch.
    """

    def __init__(
        self,
        samples: EpochOrder | int,
        global_batch: int,
        micro_batch: int,
        rank: int,
        world: int,
        seed: int,
        counted: np.ndarray | None = None,
    ) -> None:
        per_micro_step = micro_batch * world
        if global_batch % per_micro_step:
            raise UserError(
                f"batch_size {global_batch} is not a multiple of micro_batch_size {micro_batch} × {world} rank(s): "
                f"choose a multiple of {per_micro_step}, or another micro_batch_size"
            )
        self.order = EpochOrder(samples) if isinstance(samples, int) else samples
        if len(self.order) < global_batch:
            raise UserError(
                f"{len(self.order)} training samples are fewer than one batch_size of {global_batch}: lower batch_size"
            )
        self.global_batch, self.micro_batch = global_batch, micro_batch
        self.rank, self.world, self.seed, self.counted = rank, world, seed, counted
        self.epoch = 0
        self.start = 0
        """Global samples of this epoch to leave out at the next iteration, because they were seen before."""

    @property
    def stride(self) -> int:
        """Samples over all ranks in one micro-batch."""
        return self.micro_batch * self.world

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch; Lightning calls this."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Micro-batches of a whole epoch on each rank."""
        return len(self.order) // self.global_batch * self.global_batch // self.stride

    def counted_per_pass(self) -> np.ndarray:
        """Samples that count in each micro-batch of this epoch, on average over all micro-batches of its step.

        A pure function of the order: every rank knows it without asking the others.

        Returns:
            (M,) float64, M being `len(self)`; those of one step have the same.
        """
        steps, passes = len(self.order) // self.global_batch, self.global_batch // self.stride
        if self.counted is None:
            return np.full(len(self), float(self.micro_batch))
        positions, _ = self.order(self.seed, self.epoch)
        count = self.counted[positions[: steps * self.global_batch]].reshape(steps, -1).sum(1)
        return np.repeat(count / (passes * self.world), passes)

    def __iter__(self) -> Iterator[list[Draw]]:
        """Yield micro-batches, from `start` on."""
        epoch = self.epoch
        positions, repeats = self.order(self.seed, epoch)
        for begin in range(self.start, len(self) * self.stride, self.stride):
            mine = slice(begin + self.rank * self.micro_batch, begin + (self.rank + 1) * self.micro_batch)
            pairs = zip(positions[mine].tolist(), repeats[mine].tolist(), strict=True)
            yield [Draw(epoch, position, repeat) for position, repeat in pairs]


class EvenSampler(Sampler[list[Draw]]):
    """Evaluation's micro-batches of one rank: every sample, in order, as even as can be.

    Ranks get the same number of batches, so that collectives never wait for one another: the last samples are
    repeated where needed, and whoever gathers the results drops repeated samples by their position.

    Args:
        count: Number of samples.
        micro_batch: Samples a rank takes at once.
        rank: This rank.
        world: Number of ranks.
    """

    def __init__(self, count: int, micro_batch: int, rank: int = 0, world: int = 1) -> None:
        self.count, self.micro_batch, self.rank, self.world = count, micro_batch, rank, world

    def __len__(self) -> int:
        """Micro-batches on each rank."""
        return -(-self._per_rank() // self.micro_batch)

    def __iter__(self) -> Iterator[list[Draw]]:
        """Yield micro-batches of epoch 0."""
        mine = [min(self.rank + step * self.world, self.count - 1) for step in range(self._per_rank())]
        for begin in range(0, len(mine), self.micro_batch):
            yield [Draw(0, position) for position in mine[begin : begin + self.micro_batch]]

    def _per_rank(self) -> int:
        return -(-self.count // self.world)
