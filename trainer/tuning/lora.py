"""Low-rank adapters in the encoder (LoRA, Hu et al. 2021, arXiv:2106.09685), by `peft`."""

from __future__ import annotations

import re
from collections.abc import Sequence

from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn

from data_shards.errors import UserError
from trainer.models.base import SegmentationModel
from trainer.tuning.base import Tuning, unfreeze


class LoRATuning(Tuning):
    """The encoder keeps its weights and learns low-rank additions; the mask decoder learns fully.

    Args:
        rank: Rank r of an addition B·A.
        alpha: Additions are scaled by alpha / rank.
        dropout: Dropout before A, in training.
        targets: Regular expression over module names that get an addition; the model's own choice if null.
        train: What learns fully besides, as name prefixes or shell patterns.
    """

    def __init__(
        self,
        rank: int = 8,
        alpha: float = 16.0,
        dropout: float = 0.0,
        targets: str | None = None,
        train: Sequence[str] = ("mask_decoder",),
    ) -> None:
        if rank < 1:
            raise UserError(f"rank is 1 or more, not {rank}")
        if not 0 <= dropout < 1:
            raise UserError(f"dropout is in [0, 1), not {dropout}")
        self.rank, self.alpha, self.dropout = rank, alpha, dropout
        self.targets, self.trained = targets, list(train)

    def apply(self, model: SegmentationModel) -> None:
        """Freeze everything, add the adapters, then let the named parts learn.

        Raises:
            UserError: `targets` is no regular expression, or matches no module, or one that takes no adapter.
        """
        targets = self.targets or model.lora_targets()
        try:
            pattern = re.compile(targets)
        except re.error as error:
            raise UserError(f"LoRA targets '{targets}' are no regular expression: {error}") from error
        if not any(pattern.fullmatch(name) for name, _ in model.named_modules()):
            raise UserError(f"LoRA targets '{targets}' match no module of {type(model).__name__}")
        model.requires_grad_(False)
        config = LoraConfig(r=self.rank, lora_alpha=self.alpha, lora_dropout=self.dropout, target_modules=targets)
        try:
            inject_adapter_in_model(config, model)
        except ValueError as error:
            raise UserError(
                f"LoRA targets '{targets}' match a module that takes no adapter; match linear layers and convolutions"
            ) from error
        unfreeze(model, self.trained)

    def merge(self, model: SegmentationModel) -> None:
        """Add B·A to the weights it adapts and take the adapters out."""
        for name, module in list(model.named_modules()):
            if isinstance(module, LoraLayer):
                module.merge(safe_merge=True)
                parent, _, child = name.rpartition(".")
                base = module.get_base_layer()
                assert isinstance(base, nn.Module)
                setattr(model.get_submodule(parent), child, base)
