"""The plan's table of memory: against counts by hand and against what real passes on the CPU allocate."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from trainer import rehearsal
from trainer.losses import SetPredictionLoss
from trainer.models import SAM3, LiteMedSAM, MedSAM
from trainer.models.medsam import ViT
from trainer.models.sam3 import SAM3Shape
from trainer.modules import MedSAMModule, SAM3Module
from trainer.modules.scoring import ScoredModule
from trainer.plan import activations
from trainer.plan.activations import StorageMeter, memory_at, pass_bytes
from trainer.plan.planned import prompts_per_image
from trainer.plan.text import show_memory
from trainer.prompts import ClickPrompts
from trainer.rehearsal import as_on_cuda

Command = Callable[..., tuple[int, str, str]]
TINY_VIT = ViT(width=32, depth=3, heads=2, global_blocks=(1,), window=3)
TINY_SAM3 = SAM3Shape(
    width=32, depth=2, heads=2, mlp=64, global_blocks=(1,), window=8, patch=7, pretrained_size=56, text_width=32,
    text_depth=2, text_heads=2, text_mlp=64, hidden=64, hidden_heads=4, hidden_mlp=128, geometry_layers=1,
    encoder_layers=1, decoder_layers=2, queries=20,
)  # fmt: skip


class Blocks(nn.Module):
    """Six residual blocks, kept or computed a second time."""

    def __init__(self, again: bool) -> None:
        super().__init__()
        parts = (nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 32)) for _ in range(6))
        self.blocks, self.again = nn.ModuleList(parts), again

    def step(self, count: int) -> Tensor:
        x = torch.zeros(count, 32)
        for block in self.blocks:
            x = x + (checkpoint(block, x, use_reentrant=False) if self.again else block(x))
        return x.square().mean()


def medsam(again: bool = False, **arguments: Any) -> MedSAMModule:
    model = MedSAM(TINY_VIT, 64, weights=None, attention="sdpa", checkpoint_activations=again)
    return MedSAMModule(model, **arguments)


def sam3(again: bool = False) -> SAM3Module:
    model = SAM3(TINY_SAM3, 112, weights=None, checkpoint_activations=again)
    return SAM3Module(model, loss=SetPredictionLoss(mask_weight=200.0, dice_weight=10.0))


def allocated(module: nn.Module, step: Callable[[], Tensor]) -> int:
    """The most bytes that a real pass allocates at a time, as the profiler sees them, gradients being there before."""
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step().backward()
    live = peak = 0
    events = profiler.profiler.kineto_results.events()
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def math_attention(*args: Any, **kwargs: Any) -> Tensor:
    found: Tensor = torch.ops.aten._scaled_dot_product_attention_math(*args, **kwargs)[0]
    return found


def test_two_layers_by_hand() -> None:
    first, second = nn.Linear(10, 100), nn.Linear(100, 10)
    module, n = nn.Sequential(first, second), 1000

    def step() -> Tensor:
        return second(F.gelu(first(torch.zeros(n, 10)))).sum()

    # at its most, in the second layer's backward: the input, GELU's input and output, and the gradient of that
    assert pass_bytes(module, step) == pytest.approx(4 * n * (10 + 100 + 100 + 100), rel=0.01)
    assert pass_bytes(module, lambda: step() + step()) == pytest.approx(4 * n * (2 * 210 + 100), rel=0.01)


@pytest.mark.parametrize("again", [False, True])
def test_what_checkpointing_saves_is_measured(again: bool) -> None:
    module = Blocks(again)
    real = allocated(module, lambda: module.step(5000))
    assert pass_bytes(module, lambda: module.step(5000)) == pytest.approx(real, rel=0.01)


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("make", [medsam, sam3])
def test_real_modules_allocate_what_was_said(
    make: Callable[[bool], ScoredModule], again: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the CPU has no fused attention with a bias that learns, so both take the plain one
    monkeypatch.setattr(rehearsal, "fused_attention", math_attention)
    module = make(again)
    with sdpa_kernel(SDPBackend.MATH):
        real = allocated(module, lambda: module.rehearse(10, 2))
    assert pass_bytes(module, lambda: module.rehearse(10, 2)) == pytest.approx(real, rel=0.03)


def test_rounds_of_clicks_add_up() -> None:
    sizes = [
        pass_bytes(module, partial(module.rehearse, 2, 8))
        for module in (medsam(), medsam(prompts=ClickPrompts(corrections=1, blank=0)), medsam(prompts=ClickPrompts()))
    ]
    assert sizes[0] < sizes[1] < sizes[2]
    module = medsam(prompts=ClickPrompts(corrections=3, blank=1), score_weight=1.0)
    real = allocated(module, lambda: module.rehearse(4, 4))
    assert pass_bytes(module, lambda: module.rehearse(4, 4)) == pytest.approx(real, rel=0.05)


def test_autocast_follows_cudas_lists() -> None:
    x, weight = torch.ones(2, 4, 8, 8), torch.ones(8, 8)
    operations: dict[str, Callable[[Tensor], Tensor]] = {
        "linear": lambda h: F.linear(h, weight),
        "gelu": F.gelu,
        "layer_norm": lambda h: F.layer_norm(h, (8,)),
        "group_norm": lambda h: F.group_norm(h, 2),
        "softmax": lambda h: h.softmax(-1),
        "sum": lambda h: h.sum(),
        "exp": torch.exp,
        "interpolate": lambda h: F.interpolate(h, (4, 4), mode="bilinear"),
        "softmax as asked": lambda h: h.softmax(-1, dtype=torch.bfloat16),
    }
    narrow = {"linear", "gelu", "softmax as asked"}
    with FakeTensorMode() as mode, as_on_cuda(), torch.autocast("cpu", torch.bfloat16):
        fake = mode.from_tensor(x).bfloat16()
        weight = mode.from_tensor(weight)
        found = {name: operation(fake).dtype for name, operation in operations.items()}
    assert found == {name: torch.bfloat16 if name in narrow else torch.float32 for name in operations}
    with torch.autocast("cpu", torch.bfloat16):  # and the CPU's own are back
        assert F.layer_norm(x.bfloat16(), (8,)).dtype == torch.bfloat16
    assert torch.equal(F.scaled_dot_product_attention(x, x, x), x)


@pytest.mark.parametrize("masked", [False, True])
def test_attention_keeps_no_scores(masked: bool) -> None:
    with FakeTensorMode(), as_on_cuda(), StorageMeter() as meter:
        query = torch.zeros(2, 4, 512, 64, dtype=torch.bfloat16, requires_grad=True)
        mask = torch.zeros(2, 1, 512, 512, dtype=torch.bool) if masked else None
        before = meter.live
        out = F.scaled_dot_product_attention(query, query, query, attn_mask=mask)
        kept = meter.live - before
        out.sum().backward()
    sums, bias = 2 * 4 * 512 * 4, 2 * 512 * 512 * 2 if masked else 0
    assert kept == pytest.approx(out.nbytes + sums + bias, rel=0.01)
    assert query.grad is not None and query.grad.shape == query.shape


@pytest.mark.parametrize("make", [medsam, sam3])
def test_between_the_corners_it_is_never_too_little(
    make: Callable[[], ScoredModule], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(activations, "IMAGES", (1, 3))
    monkeypatch.setattr(activations, "PROMPTS", (1, 2, 4))
    module = make()
    table = memory_at(module, "bf16-mixed", kept=1000, images=2, prompts=None)
    assert [(cell["images"], cell["prompts"]) for cell in table] == [(b, p) for b in (1, 2, 3) for p in (1, 2, 4)]
    for cell in table:
        at = (cell["images"], cell["prompts"])
        if at in {(3, 4), (2, 1), (2, 2)}:
            true = 1000 + pass_bytes(module, partial(module.rehearse, *at), "bf16-mixed")
            assert true * 0.999 <= cell["bytes"] <= true * (1 if at in {(3, 4), (2, 1)} else 1.1), at


def test_sam3_at_full_size_takes_what_was_reckoned_before() -> None:
    with torch.device("meta"):
        module = SAM3Module(SAM3(weights=None), loss=SetPredictionLoss(mask_weight=200.0, dice_weight=10.0))
    size = pass_bytes(module, lambda: module.rehearse(1, 1), "bf16-mixed")
    assert size / 2**30 == pytest.approx(10.1, rel=0.05)  # reckoned from the saved tensors of transformers' model


def test_the_module_stays_as_it_was() -> None:
    with torch.device("meta"):
        module = medsam()
    before = list(module.parameters())
    assert all(parameter.is_meta for parameter in before)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    pass_bytes(module, lambda: module.rehearse(1, 1), "bf16-mixed")
    assert torch.equal(torch.get_rng_state(), state)
    assert all(now is then for now, then in zip(module.parameters(), before, strict=True))
    assert all(parameter.grad is None for parameter in before) and module.device.type == "meta"


def test_precision_and_checkpointing_count() -> None:
    plain, again = medsam(), medsam(again=True)
    full = pass_bytes(plain, lambda: plain.rehearse(64, 1), "32-true")
    mixed = pass_bytes(plain, lambda: plain.rehearse(64, 1), "bf16-mixed")
    less = pass_bytes(again, lambda: again.rehearse(64, 1), "bf16-mixed")
    assert less < mixed < full


def test_the_recipes_own_numbers_are_in_the_table(tiny_recipe: Path, tmp_path: Path, trainer_command: Command) -> None:
    own = ("--data.init_args.targets_per_image", 3, "--data.init_args.micro_batch_size", 4)
    code, out, err = trainer_command("plan", tiny_recipe, *own, "--json", tmp_path / "plan.json")
    assert (code, err) == (0, "")
    plan = json.loads((tmp_path / "plan.json").read_text())
    sizes = {(cell["images"], cell["prompts"]): cell["bytes"] for cell in plan["memory_at"]}
    assert sorted(sizes) == [(b, p) for b in (1, 2, 4, 8) for p in (1, 3, 4, 16)]
    module = MedSAMModule(LiteMedSAM(64, weights=None))
    kept = plan["memory_bytes"]["total"]
    assert sizes[4, 3] == kept + pass_bytes(module, lambda: module.rehearse(4, 3))
    assert "4 images *" in out and "3 prompts *" in out and "* as in the recipe" in out
    assert f"{sizes[4, 3] / 2**20:.1f} MiB" in out
    assert "images in 24 GB" in out and "images in 40 GB" not in out, "all fits the smallest"
    assert max(map(len, out.splitlines())) <= 140


def test_it_can_be_left_out(tiny_recipe: Path, trainer_command: Command) -> None:
    code, out, _ = trainer_command("plan", tiny_recipe, "--no-memory", "--json", "-")
    assert code == 0 and json.loads(out)["memory_at"] == []
    code, out, _ = trainer_command("plan", "--no-memory", tiny_recipe)
    assert code == 0 and "before activations" in out and "in the recipe" not in out


def test_what_cannot_be_rehearsed_is_planned_without(
    tiny_recipe: Path, trainer_command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asks_for_a_value(self: MedSAMModule, images: int, prompts: int) -> Tensor:
        return torch.zeros(1) if torch.zeros(images).sum().item() else torch.ones(1)

    monkeypatch.setattr(MedSAMModule, "rehearse", asks_for_a_value)
    code, out, err = trainer_command("plan", tiny_recipe)
    assert (code, err) == (0, "")
    assert "before activations" in out and "mask_decoder" in out
    assert out.count("note: no table of memory: a pass cannot be run on tensors without content") == 1
    code, out, _ = trainer_command("plan", tiny_recipe, "--json", "-")
    assert code == 0 and json.loads(out)["memory_at"] == [] and "no table" in json.loads(out)["notes"][-1]


def test_which_cards_it_fits() -> None:
    cells = [
        {"images": b, "prompts": p, "bytes": round(size * 2**30)}
        for b, p, size in ((1, 1, 21.5), (8, 1, 36.1), (1, 16, 21.7), (8, 16, 100))
    ]
    plan = {"memory_at": cells, "step": {"micro_batch": 8}, "prompts_per_image": 16, "notes": ["one"]}
    console = Console(width=140, markup=False)
    with console.capture() as capture:
        show_memory(plan, console)
    lines = [" ".join(line.split()) for line in capture.get().splitlines()]
    assert "1 prompt 16 prompts *" in lines and "8 images * 36.10 GiB 100.00 GiB" in lines
    assert [line for line in lines if line.startswith("images in")] == [
        "images in 24 GB 1 –",  # 21.6 GiB of 24
        "images in 40 GB 1 1",  # 36 GiB of 40
        "images in 80 GB 8 or more 1",
        "images in 141 GB 8 or more 8 or more",
    ]
    assert lines[-1] == "note: one"


@pytest.mark.parametrize(
    ("data", "prompts"),
    [({}, None), ({"targets_per_image": 3}, 3), ({"targets_per_image": 3, "negatives_per_image": 2}, 5)],
)
def test_prompts_of_a_recipe(data: dict[str, Any], prompts: int | None) -> None:
    assert prompts_per_image(data) == prompts
