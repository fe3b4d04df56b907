"""How fast is attention with SAM's relative positions in each of its ways, and does the rule choose well?

python benchmarks/attention.py           # on a CPU or a GPU: MedSAM's own sizes, minutes on two cores
python benchmarks/attention.py --quick   # an image of 512 × 512, under a minute on two cores

Forward and backward of one attention layer of ViT-B: `segment-anything`'s module and all of our ways, in turn, over the
whole image and in windows, in fp32 and with bf16 autocast. On a GPU, FlexAttention too, compiled; chunks are for CPUs.
Then the windowed blocks of SAM2.1 tiny's Hiera, one after another: those of the package `sam2`, and ours.

The last line is one JSON object:
  benchmark     "attention"
  quick         whether --quick was given
  device        what it ran on
  side          of the image in tokens
  chosen        the way that the rule takes here
  milliseconds  by precision, then "global" and "windows", then way and "reference": medians over rounds
  difference    the largest of output and gradients from the reference in fp32, as a share of their largest value
  ratios        by precision: `ratio` of the way that the rule takes
  ratio         the reference's time divided by that of the way that the rule takes, for the four global and eight
                windowed layers of an encoder, in the precision where it is less
  hiera         by precision: {"milliseconds": those of "ours" and of "reference", "ratio"} of the windowed blocks of
                SAM2.1 tiny, on four times the side; null where the package `sam2` is not installed
  bar           {"needed", "met"}
"""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from measuring import arguments, device, finish, in_turn, say, settle
from segment_anything.modeling.image_encoder import Attention
from torch import Tensor, nn
from transformers.models.sam.configuration_sam import SamVisionConfig
from transformers.models.sam.modeling_sam import SamVisionAttention

from trainer.models.attention import SamVisionRelativeAttention, Way, chosen_way

WIDTH, HEADS, WINDOW = 768, 12, 14
HIERA = (
    *((4, 96, 96, 1, 8, None), (4, 96, 192, 2, 8, (2, 2)), (2, 192, 192, 2, 4, None), (2, 192, 384, 4, 4, (2, 2))),
    *3 * ((1, 384, 384, 4, 14, None),),
    *((1, 384, 768, 8, 14, (2, 2)), (0.5, 768, 768, 8, 7, None)),
)
"""Windowed blocks of SAM2.1 tiny: side by ViT-B's, channels in and out, heads, window, pool."""
LAYERS = {"global": 4, "windows": 8}
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
NEEDED = 1.0
Rates = dict[str, list[float]]


def modules(side: int, ways: list[Way], place: torch.device) -> dict[str, nn.Module]:
    """The reference's attention and ours in every way, with the same weights."""
    torch.manual_seed(0)
    reference = Attention(WIDTH, HEADS, use_rel_pos=True, input_size=(side, side))
    for table in (reference.rel_pos_h, reference.rel_pos_w):
        nn.init.normal_(table, std=0.2)
    found: dict[str, nn.Module] = {"reference": reference}
    for way in ways:
        config = SamVisionConfig(hidden_size=WIDTH, num_attention_heads=HEADS)
        found[way] = SamVisionRelativeAttention(SamVisionAttention(config, side), way)
        found[way].load_state_dict(reference.state_dict())
    return {name: module.to(place) for name, module in found.items()}


def step(module: nn.Module, tokens: Tensor, grad: Tensor, dtype: torch.dtype) -> int:
    """Forward and backward."""
    module.zero_grad()
    asking = tokens.detach().requires_grad_()
    with torch.autocast(tokens.device.type, dtype, enabled=dtype != torch.float32):
        found = module(asking)
    found = found[0] if isinstance(found, tuple) else found
    found.backward(grad.to(found.dtype))
    module.found = (found.detach(), asking.grad)  # type: ignore[assignment]
    settle(tokens.device)
    return 1


def difference(parts: dict[str, nn.Module]) -> float:
    """Of what the last step gave, from the reference."""

    def results(module: nn.Module) -> list[Tensor]:
        return [*module.found, *(parameter.grad for parameter in module.parameters())]  # type: ignore[list-item, misc]

    theirs, largest = results(parts["reference"]), 0.0
    for name in parts:
        for one, other in zip(results(parts[name]), theirs, strict=True):
            largest = max(largest, float((one - other).abs().max() / other.abs().max()))
    return largest


def hiera(side: int, dtype: torch.dtype, rounds: int, place: torch.device) -> dict[str, Any] | None:
    """The windowed blocks of SAM2.1 tiny: milliseconds of the package's and of ours, and their ratio."""
    try:
        from sam2.modeling.backbones.hieradet import MultiScaleBlock
    except ImportError:
        return None
    from trainer.models.sam2_hiera import HieraBlock

    torch.manual_seed(0)
    plain, given = [], []
    for share, channels, out, heads, window, pool in HIERA:
        plain.append(MultiScaleBlock(channels, out, heads, q_stride=pool, window_size=window).to(place))
        given.append(torch.randn(1, int(share * side), int(share * side), channels, device=place))
    ours = [HieraBlock(block) for block in copy.deepcopy(plain)]
    with torch.no_grad():
        grads = [torch.randn_like(block(tokens)) for block, tokens in zip(plain, given, strict=True)]

    def all_of(blocks: list[nn.Module]) -> int:
        for block, tokens, grad in zip(blocks, given, grads, strict=True):
            step(block, tokens, grad, dtype)
        return 1

    rates = in_turn({"ours": partial(all_of, ours), "reference": partial(all_of, plain)}, rounds)
    milliseconds = {name: 1000 / statistics.median(each) for name, each in rates.items()}
    ratio = statistics.median(one / other for one, other in zip(rates["ours"], rates["reference"], strict=True))
    return {"milliseconds": milliseconds, "ratio": ratio}


def main() -> None:
    values = arguments(__doc__, side=0, rounds=0)
    place, side = device(), values.side or (32 if values.quick else 64)
    windows = math.ceil(side / WINDOW) ** 2
    ways: list[Way] = ["eager", "sdpa", "widened", "flex" if place.type == "cuda" else "chunked"]
    chosen = chosen_way(torch.empty(0, device=place))
    milliseconds: dict[str, dict[str, dict[str, float]]] = {}
    ratios: dict[str, float] = {}
    windowed: dict[str, Any] = {}
    apart = 0.0
    for precision, dtype in PRECISIONS.items():
        rates: dict[str, Rates] = {}
        for kind, count, edge in (("global", 1, side), ("windows", windows, WINDOW)):
            say(f"{precision}, {kind}")
            parts = modules(edge, ways, place)
            tokens, grad = (torch.randn(count, edge, edge, WIDTH, device=place) for _ in range(2))
            runs: dict[str, Callable[[], int]] = {
                name: partial(step, module, tokens, grad, dtype) for name, module in parts.items()
            }
            rates[kind] = in_turn(runs, values.rounds or 3)
            if precision == "fp32":
                apart = max(apart, difference(parts))
        milliseconds[precision] = {
            kind: {name: 1000 / statistics.median(each) for name, each in found.items()}
            for kind, found in rates.items()
        }
        ours, theirs = (_encoder(rates, name) for name in (chosen, "reference"))
        ratios[precision] = statistics.median(other / one for one, other in zip(ours, theirs, strict=True))
        for kind, found in milliseconds[precision].items():
            line = ", ".join(f"{name} {figure:.0f}" for name, figure in found.items())
            print(f"{precision}, {kind}: ms of forward and backward: {line}")
        print(f"{precision}: the rule takes {chosen}, {ratios[precision]:.2f} times as fast as the reference")
        say(f"{precision}, Hiera")
        if (found := hiera(side, dtype, values.rounds or 3, place)) is not None:
            windowed[precision] = found
            print(f"{precision}: windowed blocks of SAM2's Hiera, {found['ratio']:.2f} times as fast as the package's")
    ratio = min(ratios.values())
    finish(
        {
            "benchmark": "attention",
            "quick": values.quick,
            "device": place.type,
            "side": side,
            "chosen": chosen,
            "milliseconds": milliseconds,
            "difference": apart,
            "ratios": ratios,
            "ratio": ratio,
            "hiera": windowed or None,
            "bar": {"needed": NEEDED, "met": ratio >= NEEDED},
        },
        values.save,
    )


def _encoder(rates: dict[str, Rates], name: str) -> list[float]:
    """Seconds of an encoder's layers, of every round."""
    rounds = zip(*(rates[kind][name] for kind in LAYERS), strict=True)
    return [sum(count / rate for count, rate in zip(LAYERS.values(), each, strict=True)) for each in rounds]


if __name__ == "__main__":
    main()
