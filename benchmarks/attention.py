"""How fast is attention with SAM's relative positions in each of its ways, and does the rule choose well?

python benchmarks/attention.py           # on a CPU or a GPU: MedSAM's own sizes, minutes on two cores
python benchmarks/attention.py --quick   # an image of 512 × 512, under a minute on two cores

Forward and backward of one attention layer of ViT-B: `segment-anything`'s module and all of our ways, in turn, over the
whole image and in windows, in fp32 and with bf16 autocast. On a GPU, FlexAttention too, compiled; chunks are for CPUs.

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
  bar           {"needed", "met"}
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from functools import partial

import torch
from measuring import arguments, device, finish, in_turn, say, settle
from segment_anything.modeling.image_encoder import Attention
from torch import Tensor, nn
from transformers.models.sam.configuration_sam import SamVisionConfig
from transformers.models.sam.modeling_sam import SamVisionAttention

from trainer.models.attention import SamVisionRelativeAttention, Way, chosen_way

WIDTH, HEADS, WINDOW = 768, 12, 14
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


def main() -> None:
    values = arguments(__doc__, side=0, rounds=0)
    place, side = device(), values.side or (32 if values.quick else 64)
    windows = math.ceil(side / WINDOW) ** 2
    ways: list[Way] = ["eager", "sdpa", "widened", "flex" if place.type == "cuda" else "chunked"]
    chosen = chosen_way(torch.empty(0, device=place))
    milliseconds: dict[str, dict[str, dict[str, float]]] = {}
    ratios: dict[str, float] = {}
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
