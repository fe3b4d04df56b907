"""Hiera as SAM2 computes it here against the package's own: values, gradients, and what it does not do."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("sam2", reason="SAM2 needs the package sam2")

import tiny_sam2
import torch
import torch.nn.functional as F
from sam2.modeling.backbones.hieradet import Hiera, MultiScaleBlock
from torch import Tensor

from trainer import rehearsal
from trainer.models import sam2_hiera
from trainer.models.sam2_hiera import HieraBlock, Trunk, within
from trainer.tuning import AdaptFormerTuning, HoulsbyTuning, LoRATuning, SSFTuning, VisualPromptTuning

CASES = {
    "windows of 3 on a grid of 4": (4, 3, None),
    "windows of 14 on a grid of 16, where a stage begins": (16, 14, (2, 2)),
    "odd windows where a stage begins": (16, 7, (2, 2)),
    "windows that divide": (8, 4, None),
    "windows that divide, where a stage begins": (8, 4, (2, 2)),
    "the whole image": (4, 0, None),
}


def blocks(window: int, pool: tuple[int, int] | None) -> tuple[MultiScaleBlock, HieraBlock]:
    torch.manual_seed(0)
    plain = MultiScaleBlock(16, 32 if pool else 16, 2, q_stride=pool, window_size=window).double()
    for parameter in plain.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return plain, HieraBlock(copy.deepcopy(plain))


def learnt(block: Any, tokens: Tensor) -> dict[str, Tensor]:
    """What a block gives for tokens, and the gradients of a sum with weights, by name."""
    block.zero_grad()
    asking = tokens.clone().requires_grad_()
    found = block(asking)
    weight = torch.arange(found.numel(), dtype=found.dtype).view_as(found).sin()
    (found * weight).sum().backward()
    return {"output": found.detach(), "tokens": asking.grad} | {n: p.grad for n, p in block.named_parameters()}


@pytest.mark.parametrize("steps", [False, True], ids=["fused", "in steps"])
@pytest.mark.parametrize("case", CASES)
def test_a_block_is_that_of_sam2(case: str, steps: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    side, window, pool = CASES[case]
    plain, ours = blocks(window, pool)
    if steps:
        monkeypatch.setattr(sam2_hiera, "_in_steps", lambda tokens: True)
    tokens = torch.randn(2, side, side, 16, dtype=torch.float64)
    expected, found = learnt(plain, tokens), learnt(ours, tokens)
    assert expected.keys() == found.keys() and list(plain.state_dict()) == list(ours.state_dict())
    limit = 1e-5 if steps else 1e-10  # the softmax of steps is in fp32
    assert max(float((found[name] - expected[name]).abs().max()) for name in expected) < limit


def test_in_bf16_windows_are_as_exact_as_bf16_is() -> None:
    torch.manual_seed(0)
    given = [torch.randn(6, 2, count, 32, requires_grad=True) for count in (16, 64, 64)]
    exact = F.scaled_dot_product_attention(*given)
    expected = torch.autograd.grad(exact.sin().sum(), given)
    low = [part.detach().bfloat16().requires_grad_() for part in given]
    rough = within(*low)
    found = torch.autograd.grad(rough.float().sin().sum(), low)
    for one, other in zip((rough, *found), (exact, *expected), strict=True):
        assert one.dtype == torch.bfloat16 and (one - other).norm() < 0.02 * other.norm()


@pytest.mark.parametrize("size", [(8, 8), (8, 16), (32, 32)])
@pytest.mark.parametrize("background", [2, 7, 14])
def test_positions_are_those_of_sam2(size: tuple[int, int], background: int) -> None:
    torch.manual_seed(0)
    named: dict[str, Any] = {
        "embed_dim": 8, "num_heads": 1, "stages": (1, 1, 1, 1), "global_att_blocks": (2,),
        "window_pos_embed_bkg_spatial_size": (background, background),
    }  # fmt: skip
    plain, ours = Hiera(**named), Trunk(**named)
    for parameter in (plain.pos_embed, plain.pos_embed_window):
        parameter.data.normal_()
    ours.load_state_dict(plain.state_dict())
    weight = torch.randn(1, *size, 8)
    for trunk in (plain, ours):
        with torch.autocast("cpu", torch.bfloat16):
            (trunk._get_pos_embed(size) * weight).sum().backward()
    torch.testing.assert_close(ours._get_pos_embed(size), plain._get_pos_embed(size), rtol=1e-5, atol=1e-6)
    for name in ("pos_embed", "pos_embed_window"):
        torch.testing.assert_close(getattr(ours, name).grad, getattr(plain, name).grad, rtol=1e-4, atol=1e-4)


def test_positions_learn_without_a_sum_in_any_order() -> None:
    """CUDA's backward pass of bicubic interpolation is refused where ``deterministic`` is asked for."""

    def passes(node: Any) -> set[str]:
        return {type(node).__name__}.union(*(passes(before) for before, _ in node.next_functions if before))

    trunk = tiny_sam2.make().image_encoder.trunk
    names = passes(trunk._get_pos_embed((16, 16)).grad_fn)
    assert "AccumulateGrad" in names and not [name for name in names if "Upsample" in name]
    assert [name for name in passes(Hiera._get_pos_embed(trunk, (16, 16)).grad_fn) if "Bicubic" in name]


def test_only_tokens_are_projected() -> None:
    _, block = blocks(3, None)
    sizes: list[int] = []
    for name in ("qkv", "proj"):
        getattr(block.attn, name).register_forward_hook(lambda module, given, found: sizes.append(found.numel()))
    block(torch.randn(1, 4, 4, 16, dtype=torch.float64))
    assert sizes == [16 * 48, 48, 16 * 16]  # tokens, one zero, tokens: not 36


def test_windows_attend_in_steps_in_half_precision_on_a_cpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    fused: list[torch.dtype] = []
    kernel = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v: fused.append(q.dtype) or kernel(q, k, v))
    _, block = blocks(4, None)
    block, tokens = block.float(), torch.randn(1, 8, 8, 16)
    with torch.autocast("cpu", torch.bfloat16):
        block(tokens)
    block.bfloat16()(tokens.bfloat16())
    assert not fused
    monkeypatch.setattr(rehearsal, "_pretending", True)
    block(tokens.bfloat16())
    monkeypatch.setattr(rehearsal, "_pretending", False)
    block.float()(tokens)
    assert fused == [torch.bfloat16, torch.float32]


def test_what_watches_attention_is_given_whole_windows() -> None:
    _, block = blocks(3, None)
    seen: list[torch.Size] = []
    handle = block.attn.register_forward_hook(lambda module, given, found: seen.append(given[0].shape))
    tokens = torch.randn(1, 4, 4, 16, dtype=torch.float64)
    hooked = block(tokens)
    handle.remove()
    assert seen == [(4, 3, 3, 16)]
    torch.testing.assert_close(block(tokens), hooked)


@pytest.mark.parametrize(
    "method",
    [
        LoRATuning(rank=2, dropout=0.0),
        AdaptFormerTuning(bottleneck=4),
        HoulsbyTuning(bottleneck=4),
        SSFTuning(),
        VisualPromptTuning(tokens=2),
    ],
    ids=lambda method: type(method).__name__,
)
def test_methods_learn_as_they_do_in_the_package(method: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Grids of 16, 8, 4 and 2, which the last two windows do not divide."""
    monkeypatch.setattr(tiny_sam2, "SHAPE", replace(tiny_sam2.SHAPE, window_spec=(8, 4, 6, 3)))
    model = tiny_sam2.make()
    method.apply(model)
    added = dict(model.named_parameters())
    for parameter in added.values():
        parameter.data += 0.1 * torch.randn_like(parameter)
    trunk, image = model.image_encoder.trunk.eval(), torch.randn(1, 3, tiny_sam2.SIDE, tiny_sam2.SIDE)

    def learnt() -> dict[str, Tensor]:
        model.zero_grad()
        levels = trunk(image)
        sum(level.sin().sum() for level in levels).backward()
        gradients = {name: p.grad.clone() for name, p in trunk.named_parameters() if p.grad is not None}
        return gradients | {f"level {number}": level.detach() for number, level in enumerate(levels)}

    ours = learnt()
    monkeypatch.setattr(sam2_hiera, "told", lambda: True)
    theirs = learnt()
    assert ours.keys() == theirs.keys() and len(ours) > 4
    for name in ours:
        assert (ours[name] - theirs[name]).norm() <= 1e-4 * theirs[name].norm() + 1e-6, name
