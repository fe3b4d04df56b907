"""Low-rank adapters in the encoder (LoRA, Hu et al. 2021, arXiv:2106.09685), by `peft`."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import inf
from typing import Any, Literal

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn

from data_shards.errors import UserError, nearest
from trainer.models.base import SegmentationModel
from trainer.models.blocks import Block
from trainer.tuning.additions import check_low_rank
from trainer.tuning.base import Tuning, freeze_all, unfreeze

ADAPTABLE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
SHORT_NAMES = ("query", "key", "value", "projection", "mlp_in", "mlp_out")


class LoRATuning(Tuning):
    """The encoder keeps its weights and learns low-rank additions; the mask decoder learns fully.

    An addition is B·A times alpha / rank, so with alpha at twice the rank it counts twice, whatever the rank; with
    `rslora` it is alpha / sqrt(rank), which keeps large ranks from learning ever more slowly.

    Args:
        rank: Rank r of an addition B·A.
        alpha: Additions are scaled by alpha / rank.
        dropout: Dropout before A, in training.
        targets: What gets an addition. Null: every linear layer of the encoder's blocks. A list: any of ``query``,
            ``key``, ``value``, ``projection``, ``mlp_in``, ``mlp_out``, in every block of any family (where queries,
            keys and values come from one fused layer, all of it is adapted; SAMedTuning adapts queries and values
            only), or last parts of the names of the encoder's modules such as ``qkv``. A text: a regular expression
            over whole module names, of any part of the model.
        train: What learns fully besides, as name prefixes or shell patterns.
        dora: Learn each output's magnitude apart from its direction (DoRA: Liu et al. 2024, arXiv:2402.09353).
        rslora: Scale additions by alpha / sqrt(rank) (rsLoRA: Kalajdzievski 2023, arXiv:2312.03732).
        quantize: ``4bit`` or ``8bit`` holds the frozen linear layers that get an addition in so many bits (QLoRA:
            Dettmers et al. 2023, arXiv:2305.14314), which saves memory and costs precision; needs bitsandbytes.
        rates: Factors on the learning rate by name prefix or shell pattern; where several fit, the last counts.
    """

    def __init__(
        self,
        rank: int = 8,
        alpha: float = 16.0,
        dropout: float = 0.0,
        targets: str | list[str] | None = None,
        train: Sequence[str] = ("mask_decoder",),
        dora: bool = False,
        rslora: bool = False,
        quantize: Literal["4bit", "8bit"] | None = None,
        rates: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__(rates)
        check_low_rank(rank, dropout)
        if not 0 < alpha < inf:
            raise UserError(f"alpha is above 0, not {alpha}")
        self.rank, self.alpha, self.dropout = rank, alpha, dropout
        self.targets, self.trained = targets, list(train)
        self.dora, self.rslora, self.bits = dora, rslora, quantize

    def apply(self, model: SegmentationModel) -> None:
        """Freeze everything, add the adapters, then let the named parts learn.

        Raises:
            UserError: `targets` is no regular expression, or matches no module, or one that takes no adapter; or the
                layers cannot be quantised.
        """
        freeze_all(model)
        names = self._target_names(model)
        if self.bits is not None:
            if importlib.util.find_spec("bitsandbytes") is None:
                raise UserError(f"quantize: {self.bits} needs bitsandbytes: pip install bitsandbytes, or leave it out")
            from trainer.tuning.quantization import quantize

            quantize(model, names, self.bits)
        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules="|".join(map(re.escape, names)),
            use_dora=self.dora,
            use_rslora=self.rslora,
        )
        with _quantised_in(model, self.bits):
            inject_adapter_in_model(config, model)
        unfreeze(model, self.trained)

    def merge(self, model: SegmentationModel) -> None:
        """Add B·A to the weights it adapts and take the adapters out; quantised weights are made plain first."""
        for name, module in list(model.named_modules()):
            if isinstance(module, LoraLayer):
                model.set_submodule(name, _merged(module))
        vars(model).pop("peft_config", None)

    def _target_names(self, model: SegmentationModel) -> list[str]:
        """Full names of the modules that get an addition."""
        if self.targets is None:
            names = [name for block in model.blocks() for name in block.linears]
        elif isinstance(self.targets, str):
            names = _matching(model, self.targets)
        else:
            names = [name for target in self.targets for name in _named(model, target)]
        if not names:
            raise UserError(f"LoRA targets {self._shown()} match no module of {type(model).__name__}")
        for name in names:
            module = model.get_submodule(name)
            if not isinstance(module, ADAPTABLE) or getattr(module, "groups", 1) > 1:
                raise UserError(
                    f"LoRA targets {self._shown()} match {name}, a {type(module).__name__}, which takes no adapter; "
                    "match linear layers and convolutions without groups"
                )
            if f"{name}.weight" in getattr(model, "fixed", ()):
                raise UserError(f"LoRA targets {self._shown()} match {name}, on which nothing depends: leave it out")
        return list(dict.fromkeys(names))

    def _shown(self) -> str:
        return f"'{self.targets}'" if isinstance(self.targets, str) else str(self.targets)


def _matching(model: SegmentationModel, targets: str) -> list[str]:
    """Modules whose whole names a regular expression matches."""
    try:
        pattern = re.compile(targets)
    except re.error as error:
        raise UserError(f"LoRA targets '{targets}' are no regular expression: {error}") from error
    names = [name for name, _ in model.named_modules() if name and pattern.fullmatch(name)]
    if not names:
        word = re.split(r"\W+", targets)[-1]
        raise UserError(
            f"LoRA targets '{targets}' match no module of {type(model).__name__}: a text is a regular expression over "
            f"whole names; a list takes short names{nearest(word, _known(model))}"
        )
    return names


def _named(model: SegmentationModel, target: str) -> list[str]:
    """Modules of the encoder with a short name, or with a last part of a name."""
    if target in SHORT_NAMES:
        return [_module(block, target) for block in model.blocks()]
    inside = [name for name, _ in model.named_modules() if name.startswith(model.encoder + ".")]
    names = [name for name in inside if name.endswith("." + target)]
    if not names:
        raise UserError(
            f"LoRA target '{target}' is no part of {type(model).__name__}'s encoder{nearest(target, _known(model))}"
        )
    return names


def _module(block: Block, target: str) -> str:
    found = getattr(block, target)
    return found if isinstance(found, str) else str(found.module)


def _known(model: SegmentationModel) -> list[str]:
    """What a list of targets may name."""
    inside = model.get_submodule(model.encoder).named_modules()
    last = (name.rpartition(".")[2] for name, module in inside if isinstance(module, ADAPTABLE))
    return [*SHORT_NAMES, *(name for name in last if name.isidentifier())]


@contextmanager
def _quantised_in(model: Any, bits: str | None) -> Iterator[None]:
    """Say to peft in its own way that layers are quantised."""
    if bits is None:
        yield
        return
    name = f"is_loaded_in_{bits}"
    setattr(model, name, True)
    try:
        yield
    finally:
        delattr(model, name)


@torch.no_grad()
def _merged(module: Any) -> nn.Module:
    """The layer that an adapter was put on, with the addition in its weight."""
    base: nn.Module = module.get_base_layer()
    if base.get_parameter("weight").is_floating_point():  # not quantised
        module.merge(safe_merge=True)
        return base
    from trainer.tuning.quantization import dequantized

    layer = dequantized(base)  # type: ignore[arg-type]
    layer.weight += module.get_delta_weight("default")
    if "default" in module.lora_magnitude_vector:  # DoRA: the learnt magnitude instead of each row's own
        layer.weight *= (module.lora_magnitude_vector["default"].weight / layer.weight.norm(dim=1))[:, None]
    return layer
