"""FacT: low-rank additions whose outer factors all blocks share (Jie & Deng 2023, arXiv:2212.03145)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_shards.errors import UserError
from trainer.models.base import SegmentationModel
from trainer.models.blocks import Block
from trainer.tuning.added import AddedTuning
from trainer.tuning.additions import Addition, add_to_queries_and_values, check_low_rank, fold_additions

NAME = "fact"


class Factors(nn.Module):
    """What the blocks of one pair of widths share: U (r, C), and V (O, r), which starts at zero."""

    def __init__(self, inputs: int, outputs: int, rank: int, device: torch.device) -> None:
        super().__init__()
        self.U = nn.Parameter(torch.empty(rank, inputs, device=device))
        self.V = nn.Parameter(torch.zeros(outputs, rank, device=device))
        nn.init.kaiming_uniform_(self.U, a=math.sqrt(5))


class TensorTrain(Addition):
    """The map s·V Σ U with a block's own Σ (r, r)."""

    def __init__(
        self, layer: nn.Linear, rows: Tensor | None, shared: nn.ModuleDict, rank: int, scale: float, dropout: float
    ) -> None:
        super().__init__(layer, rows)
        widths = f"{self.inputs}_{self.outputs}"
        if widths not in shared:
            shared[widths] = Factors(self.inputs, self.outputs, rank, layer.weight.device)
        factors = shared[widths]
        assert isinstance(factors, Factors)
        # in a tuple: the factors are the encoder's, not a part of every block, and are saved and sharded once
        self.shared = (factors,)
        self.core = nn.Parameter(torch.empty(rank, rank))
        nn.init.kaiming_uniform_(self.core, a=math.sqrt(5))
        self.scale = scale
        self.dropout = nn.Dropout(dropout)

    def forward(self, given: Tensor) -> Tensor:
        """Map tokens (..., C) to (..., O)."""
        factors = self.shared[0]
        inner = self.dropout(F.linear(F.linear(given, factors.U), self.core))
        return self.scale * F.linear(inner, factors.V)

    def matrix(self) -> Tensor:
        """s·V Σ U, (O, C)."""
        factors = self.shared[0]
        return self.scale * factors.V @ self.core @ factors.U


class FacTTuning(AddedTuning):
    """FacT-TT on queries and values, and the mask decoder fully, as in MA-SAM (Chen et al. 2023, arXiv:2309.08842).

    ΔW = s·V Σ U: U and V are shared by all blocks, Σ is each block's own, one for its queries and one for its values.
    An encoder whose width changes has one U and V for each pair of widths in and out. They are the encoder's
    ``fact.IN_OUT``.

    Args:
        rank: Rank r; MA-SAM's is 32.
        scale: Factor s on an addition.
        dropout: Dropout after Σ, in training; MA-SAM's is 0.1.
        train: What learns fully besides, as name prefixes or shell patterns.
        rates: Factors on the learning rate by name prefix or shell pattern; where several fit, the last counts.
    """

    def __init__(
        self,
        rank: int = 32,
        scale: float = 1.0,
        dropout: float = 0.0,
        train: Sequence[str] = ("mask_decoder",),
        rates: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__(train, rates)
        check_low_rank(rank, dropout)
        if not 0 < scale < math.inf:
            raise UserError(f"scale is above 0, not {scale}")
        self.rank, self.scale, self.dropout = rank, scale, dropout

    def add(self, model: SegmentationModel, blocks: Sequence[Block]) -> None:
        """Add V Σ U to the queries and to the values of every block, and the shared factors to the encoder."""
        shared = nn.ModuleDict()
        add_to_queries_and_values(
            model,
            blocks,
            NAME,
            lambda layer, rows: TensorTrain(layer, rows, shared, self.rank, self.scale, self.dropout),
        )
        model.get_submodule(model.encoder).add_module(NAME, shared)

    def merge(self, model: SegmentationModel) -> None:
        """Add s·V Σ U to the rows that make queries and values."""
        fold_additions(model, NAME)
        delattr(model.get_submodule(model.encoder), NAME)
