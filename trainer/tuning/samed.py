"""SAMed: low-rank additions to queries and values only (Zhang & Liu 2023, arXiv:2304.13785)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.models.base import SegmentationModel
from trainer.models.blocks import Block
from trainer.tuning.added import AddedTuning
from trainer.tuning.additions import Addition, add_to_queries_and_values, check_low_rank, fold_additions

NAME = "samed"


class LowRank(Addition):
    """The map B·A of a rank r; B starts at zero, so the model starts unchanged."""

    def __init__(self, layer: nn.Linear, rows: Tensor | None, rank: int, dropout: float) -> None:
        super().__init__(layer, rows)
        self.A = nn.Parameter(torch.empty(rank, self.inputs))
        self.B = nn.Parameter(torch.zeros(self.outputs, rank))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        self.dropout = nn.Dropout(dropout)

    def forward(self, given: Tensor) -> Tensor:
        """Map tokens (..., C) to (..., O)."""
        return F.linear(F.linear(self.dropout(given), self.A), self.B)

    def matrix(self) -> Tensor:
        """B·A, (O, C)."""
        return self.B @ self.A


class SAMedTuning(AddedTuning):
    """The encoder keeps its weights and learns B·A on queries and values; the mask decoder learns fully.

    Also inside a fused layer, where LoRATuning would change the keys too. There is no alpha: additions have a scale
    of 1. SAMed itself also trains the prompt encoder's default embedding: add ``prompt_encoder.no_mask_embed`` to
    `train`.

    Args:
        rank: Rank r of an addition; SAMed's is 4.
        dropout: Dropout before A, in training; SAMed has none.
        train: What learns fully besides, as name prefixes or shell patterns.
        rates: Factors on the learning rate by name prefix or shell pattern; where several fit, the last counts.
    """

    def __init__(
        self,
        rank: int = 4,
        dropout: float = 0.0,
        train: Sequence[str] = ("mask_decoder",),
        rates: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__(train, rates)
        check_low_rank(rank, dropout)
        self.rank, self.dropout = rank, dropout

    def add(self, model: SegmentationModel, blocks: Sequence[Block]) -> None:
        """Add B·A to the queries and to the values of every block."""
        add_to_queries_and_values(
            model, blocks, NAME, lambda layer, rows: LowRank(layer, rows, self.rank, self.dropout)
        )

    def merge(self, model: SegmentationModel) -> None:
        """Add B·A to the rows that make queries and values."""
        fold_additions(model, NAME)
