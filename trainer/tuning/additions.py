"""Linear maps added to queries and values: what SAMed and FacT share.

A fused layer makes queries, keys and values at once, in some families interleaved by head: an addition reaches its own
rows only, and folds into them exactly.

Shapes: C channels that a layer takes, O channels of the queries (or values), P outputs of the layer (3 O if fused).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_shards.errors import UserError
from trainer.models.blocks import Block
from trainer.tuning.attach import attach, attached, detach

KINDS = ("query", "value")


class Addition(nn.Module, ABC):
    """A linear map that is added to some outputs of a linear layer.

    Args:
        layer: The layer.
        rows: Which of its outputs these are, in runs of one length at one distance; all of them if None.
    """

    def __init__(self, layer: nn.Linear, rows: Tensor | None) -> None:
        super().__init__()
        self.inputs, self.total = layer.in_features, layer.out_features
        # numbers, not a buffer: they hold on any device, also after a plan without memory
        self.first, self.run, self.runs = (0, self.total, 1) if rows is None else _runs(rows, self.total)
        self.outputs = self.run * self.runs

    @abstractmethod
    def forward(self, given: Tensor) -> Tensor:
        """Map tokens (..., C) to what is added, (..., O)."""

    @abstractmethod
    def matrix(self) -> Tensor:
        """The same map as a matrix (O, C)."""

    def spread(self, addition: Tensor) -> Tensor:
        """Put (..., O) into its places among all outputs (..., P), zeros elsewhere."""
        if self.outputs == self.total:
            return addition
        behind = self.total // self.runs - self.first - self.run
        return F.pad(addition.unflatten(-1, (self.runs, self.run)), (self.first, behind)).flatten(-2)


def _runs(rows: Tensor, total: int) -> tuple[int, int, int]:
    """First output, length of a run and number of runs; in a fused layer they repeat over all outputs."""
    runs = 1 + int((rows.diff() != 1).sum())
    first, run = int(rows[0]), len(rows) // runs
    if not torch.equal(rows, torch.arange(total, device="cpu").view(runs, -1)[:, first : first + run].flatten()):
        raise NotImplementedError("the rows of a fused layer are not in runs of one length at one distance")
    return first, run, runs


def add_to_queries_and_values(
    model: nn.Module, blocks: Iterable[Block], name: str, make: Callable[[nn.Linear, Tensor | None], Addition]
) -> None:
    """Attach an addition to the queries and one to the values of every block, as ``NAME_query`` and ``NAME_value``."""
    for block in blocks:
        for kind in KINDS:
            projection = getattr(block, kind)
            layer = model.get_submodule(projection.module)
            assert isinstance(layer, nn.Linear)
            attach(layer, f"{name}_{kind}", make(layer, projection.rows), _add)


@torch.no_grad()
def fold_additions(model: nn.Module, name: str) -> None:
    """Add every addition's matrix to the rows of the weight that it changes, and take it off."""
    for kind in KINDS:
        for layer in attached(model, f"{name}_{kind}"):
            part = detach(layer, f"{name}_{kind}")
            assert isinstance(part, Addition) and isinstance(layer, nn.Linear)
            layer.weight += part.spread(part.matrix().T).T


def check_low_rank(rank: int, dropout: float) -> None:
    """Refuse a rank below 1 and a dropout outside [0, 1).

    Raises:
        UserError: One of them is.
    """
    if rank < 1:
        raise UserError(f"rank is 1 or more, not {rank}")
    if not 0 <= dropout < 1:
        raise UserError(f"dropout is in [0, 1), not {dropout}")


def _add(part: nn.Module, given: Any, output: Any) -> Any:
    assert isinstance(part, Addition)
    return output + part.spread(part(given))
