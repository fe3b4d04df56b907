"""FLOPs of a pass against counts by hand, and of full-size models against those that were measured before."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trainer.flops import Flops, pass_flops, step_flops
from trainer.models import MedSAM
from trainer.models.medsam import ViT
from trainer.modules import MedSAMModule


class Step(nn.Module):
    """One layer and its loss, with an input that needs a gradient or not."""

    def __init__(self, layer: nn.Module, run: Callable[[nn.Module, Tensor], Tensor], *shape: int) -> None:
        super().__init__()
        self.layer, self.run, self.shape = layer, run, shape

    def count(self, learns: bool = True) -> Flops:
        return pass_flops(self, lambda: self.run(self.layer, torch.zeros(*self.shape, requires_grad=learns)).sum())


def test_a_linear_layer() -> None:
    step = Step(nn.Linear(32, 64), lambda layer, x: layer(x), 5, 7, 32)
    once = 2 * 5 * 7 * 32 * 64
    assert step.count() == Flops(model=3 * once, hardware=3 * once, forward=once)
    assert step.count(learns=False).model == 2 * once, "no gradient of the input"
    step.layer.weight.requires_grad_(False)
    assert step.count().model == 2 * once, "none of a frozen weight"


@pytest.mark.parametrize("groups", [1, 4, 8])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_convolution(groups: int, transposed: bool) -> None:
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    step = Step(kind(8, 16, 3, stride=2, groups=groups), lambda layer, x: layer(x), 2, 8, 9, 9)
    places = 9 * 9 if transposed else 4 * 4  # each input, or each output, meets the whole kernel
    once = 2 * 2 * places * (8 // groups) * 16 * 9
    assert step.count() == Flops(model=3 * once, hardware=3 * once, forward=once)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_attention(half: bool, masked: bool) -> None:
    def attend(_: nn.Module, x: Tensor) -> Tensor:
        x = x.bfloat16() if half else x
        mask = torch.zeros(1, 1, 40, 40, dtype=x.dtype) if masked else None
        return F.scaled_dot_product_attention(x, x, x, attn_mask=mask)

    product = 2 * 2 * 4 * 40 * 40 * 16  # batch × heads × queries × keys × channels: scores, and what they weigh
    found = Step(nn.Identity(), attend, 2, 4, 40, 16).count()
    assert found == Flops(model=6 * product, hardware=7 * product, forward=2 * product), "scores are computed again"


def test_what_is_computed_again_is_told_apart() -> None:
    layers = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32), nn.GELU())
    kept = Step(layers, lambda layer, x: layer(x), 10, 32).count()
    again = Step(layers, lambda layer, x: checkpoint(layer, x, use_reentrant=False), 10, 32).count()
    assert again.model == kept.model == kept.hardware == 3 * again.forward
    assert again.hardware == kept.model + again.forward


def test_a_pass_is_affine_in_images_and_prompts_and_leaves_the_module_alone() -> None:
    module = MedSAMModule(MedSAM(ViT(32, 3, 2, (1,), window=3), 64, weights=None, attention="sdpa"))
    state = torch.get_rng_state()
    one, two = step_flops(module, 1, 1).model, step_flops(module, 1, 2).model
    assert step_flops(module, 3, 4).model == pytest.approx(3 * (one + 3 * (two - one)), rel=1e-4) and two > one
    assert all(parameter.grad is None for parameter in module.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_medsam_at_full_size() -> None:
    with torch.device("meta"):
        module = MedSAMModule(MedSAM(weights=None, attention="sdpa"))
    one, two = step_flops(module, 1, 1), step_flops(module, 1, 2)
    assert one.forward == pytest.approx(976e9, rel=0.01)
    assert one.model == pytest.approx(2.92e12, rel=0.01)
    assert two.forward - one.forward == pytest.approx(3.6e9, rel=0.05), "a pass of the mask decoder"
    assert one.model < one.hardware < 1.05 * one.model, "attention's scores"
