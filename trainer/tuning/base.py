"""Tuning: takes a model, marks what learns, and how fast."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Sequence
from fnmatch import fnmatch
from typing import Any

from torch import nn

from data_shards.errors import UserError
from trainer.models.base import SegmentationModel


class Tuning(ABC):
    """A way of fine-tuning. Freeze first, then add adapters."""

    @abstractmethod
    def apply(self, model: SegmentationModel) -> None:
        """Mark what learns, in place; adapters are put in here."""

    def merge(self, model: SegmentationModel) -> None:  # noqa: B027 - most methods have nothing to merge
        """Fold adapters into the weights they adapt, so that the model has its original layout again."""

    def learning_rate_scales(self, model: SegmentationModel) -> dict[str, float]:
        """Factor on the learning rate for every parameter that learns, by name; 1 unless a method says otherwise."""
        return {name: 1.0 for name, parameter in model.named_parameters() if parameter.requires_grad}

    def parameter_groups(self, model: SegmentationModel, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """Make the optimiser's groups: one for each learning-rate factor and each decay.

        Norms, biases (attention's too) and other vectors are not decayed (the habit since Goyal et al. 2017,
        arXiv:1706.02677, §5).

        Args:
            model: The model that `apply` was called on.
            lr: Base learning rate.
            weight_decay: Decay of matrices and kernels.

        Raises:
            UserError: Nothing learns.
        """
        scales = self.learning_rate_scales(model)
        groups: dict[tuple[float, float], list[nn.Parameter]] = defaultdict(list)
        for name, parameter in model.named_parameters():
            if name in scales:
                decayed = parameter.ndim > 1 and "bias" not in name.rpartition(".")[2]
                groups[scales[name], weight_decay if decayed else 0.0].append(parameter)
        if not groups:
            raise UserError(
                f"{type(self).__name__} leaves nothing to learn: check its patterns against the model's names"
            )
        return [
            {"params": parameters, "lr": lr * scale, "weight_decay": decay}
            for (scale, decay), parameters in sorted(groups.items(), key=lambda item: item[0])
        ]


def freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Freeze parameters whose names match; a pattern that matches none is a mistake.

    Args:
        model: The model, changed in place.
        patterns: Shell patterns over parameter names; a bare prefix such as ``prompt_encoder`` takes all below it.

    Raises:
        UserError: A pattern matches nothing.
    """
    _mark(model, patterns, requires_grad=False)


def unfreeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Let parameters whose names match learn; the twin of `freeze`."""
    _mark(model, patterns, requires_grad=True)


def _mark(model: nn.Module, patterns: Sequence[str], *, requires_grad: bool) -> None:
    parameters = dict(model.named_parameters())
    fixed = {name for name in parameters if name.endswith("shared_embedding.positional_embedding")}
    for pattern in patterns:
        matching = [
            name for name in parameters if fnmatch(name, pattern) or name.startswith(pattern.rstrip(".*") + ".")
        ]
        if not matching:
            parts = sorted({name.split(".")[0] for name in parameters})
            raise UserError(
                f"pattern '{pattern}' matches no parameter of {type(model).__name__}; its parts: {', '.join(parts)}"
            )
        for name in matching:
            parameters[name].requires_grad_(requires_grad and name not in fixed)
