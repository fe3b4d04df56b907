"""Frozen linear layers in 4 or 8 bits, by `bitsandbytes`: it is optional, so only what needs it imports this file."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant
from torch import Tensor, nn

from data_shards.errors import UserError

Bits = Literal["4bit", "8bit"]
_TEXT = 512
"""Bytes of a description of constants; some 140 are needed."""


class Linear4bit(bnb.nn.Linear4bit):  # type: ignore[misc, unused-ignore]
    """A layer in 4-bit NF4, whose constants are quantised too, as in QLoRA."""

    weight: Any

    def __init__(self, inputs: int, outputs: int, bias: bool) -> None:
        # single precision, or bitsandbytes would round the bias to its input's; autocast acts inside all the same
        super().__init__(inputs, outputs, bias, compute_dtype=torch.float32, quant_type="nf4")
        self.support_avx512bf16_for_cpu = False  # packs the weight for CPUs, and fails unless 64 divides the width

    def weights(self) -> Tensor:
        """The weight as numbers (outputs, inputs)."""
        return dequantize_4bit(self.weight.data, self.weight.quant_state)

    def _save_to_state_dict(self, destination: dict[str, Tensor], prefix: str, keep_vars: bool) -> None:
        """Save the description of the constants, a text, at one length: checkpoints are compared by shape."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in [name for name in destination if name.startswith(prefix) and name.endswith("bitsandbytes__nf4")]:
            text = destination[name]
            destination[name] = torch.cat([text, text.new_full((max(0, _TEXT - len(text)),), ord(" "))])

    def _load_from_state_dict(self, state: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        """Take the constants too: bitsandbytes saves them, but would not load them."""
        start = f"{prefix}weight."
        constants = {name.removeprefix(start): state.pop(name) for name in list(state) if name.startswith(start)}
        if constants:
            self.weight = bnb.nn.Params4bit.from_prequantized(
                state[f"{prefix}weight"], constants, device=self.weight.device, module=self
            )
        super()._load_from_state_dict(state, prefix, *rest)


class Linear8bit(bnb.nn.Linear8bitLt):  # type: ignore[misc, unused-ignore]
    """A layer in 8 bits, one scale an output (LLM.int8(): Dettmers et al. 2022, arXiv:2208.07339)."""

    weight: Any

    def __init__(self, inputs: int, outputs: int, bias: bool) -> None:
        super().__init__(inputs, outputs, bias, has_fp16_weights=False)

    def forward(self, given: Tensor) -> Tensor:
        """Map (..., inputs) to (..., outputs)."""
        if self.weight.SCB is None:  # DoRA looks at a weight by moving it, which hides the scales from the layer
            self.weight.CB = None
        # flat, since on a CPU bitsandbytes takes no grids; in single precision, or it would round the bias
        output: Tensor = super().forward(given.flatten(0, -2).float())
        return output.to(given.dtype).unflatten(0, given.shape[:-1])

    def weights(self) -> Tensor:
        """The weight as numbers (outputs, inputs)."""
        scales: Any = self.state.SCB if self.weight.SCB is None else self.weight.SCB
        return int8_vectorwise_dequant(self.weight.data, scales)

    def _load_from_state_dict(self, state: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        """Take the scales too, also after the first forward pass, in which bitsandbytes moves them elsewhere."""
        scales = state.pop(f"{prefix}SCB", None)
        state.pop(f"{prefix}weight_format", None)
        if scales is not None:
            values = state[f"{prefix}weight"].to(self.weight.device).clone()
            self.state.CB = self.state.SCB = None
            self.weight = bnb.nn.Int8Params(values, False, False, CB=values, SCB=scales.to(values.device).clone())
        super()._load_from_state_dict(state, prefix, *rest)


def quantize(model: nn.Module, names: Iterable[str], bits: Bits) -> None:
    """Replace linear layers by quantised ones; what is no linear layer stays as it is.

    Args:
        model: The model, with its weights; changed in place.
        names: The layers.
        bits: How small.

    Raises:
        UserError: The model has no weights yet.
    """
    for name in names:
        layer = model.get_submodule(name)
        if type(layer) is nn.Linear:
            if layer.weight.is_meta:
                raise UserError(f"quantize: {bits}: a plan has no weights to quantise: leave it out; as much learns")
            model.set_submodule(name, _quantized(layer, bits))


def dequantized(layer: Linear4bit | Linear8bit) -> nn.Linear:
    """An ordinary linear layer with a quantised one's values."""
    weight, bias = layer.weights(), layer.bias
    plain = nn.Linear(layer.in_features, layer.out_features, bias is not None, device=weight.device)
    plain.weight.data.copy_(weight)
    if bias is not None:
        plain.bias.data.copy_(bias.data)
    return plain.requires_grad_(False)


def _quantized(layer: nn.Linear, bits: Bits) -> nn.Module:
    kind = Linear4bit if bits == "4bit" else Linear8bit
    with torch.device("cpu"):
        new = kind(layer.in_features, layer.out_features, layer.bias is not None)
    new.load_state_dict(layer.state_dict())
    moved: nn.Module = new.to(layer.weight.device).requires_grad_(False)  # quantises
    return moved
