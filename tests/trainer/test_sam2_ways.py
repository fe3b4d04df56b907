"""Every way of tuning on the whole SAM2: what learns, what the memory carries back to it, and what folding leaves.

`encoders.py` has Hiera with a stand-in for the rest; here are SAM2's own neck, memory and mask decoder.
"""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from linear_methods import LINEAR_METHODS
from torch import Tensor

pytest.importorskip("sam2")

from encoders import learning
from tiny_sam2 import LENGTH, SHAPE, SIDE, clips, make, write_volumes

from data_shards.errors import UserError
from trainer.models import SAM2
from trainer.models.sam2 import Look
from trainer.models.sam2_tracking import Tracking
from trainer.modules import SAM2Module
from trainer.prompts import BoxPrompts, ClickPrompts, Prompts
from trainer.tuning import (
    AdaptFormerTuning,
    FullTuning,
    HoulsbyTuning,
    LeSAMTuning,
    LoRATuning,
    MedicalSAMAdapterTuning,
    Tuning,
    VisualPromptTuning,
)

METHODS: dict[str, Callable[[], Tuning]] = {
    **LINEAR_METHODS,
    "houlsby": lambda: HoulsbyTuning(bottleneck=4),
    "medical_sam_adapter": MedicalSAMAdapterTuning,
    "lesam": LeSAMTuning,
    "adaptformer": lambda: AdaptFormerTuning(bottleneck=16),
    "visual_prompts": lambda: VisualPromptTuning(tokens=3),
}
FOLDED = ("lora", "dora", "samed", "fact", "ssf")
"""Methods whose parts fold into the weights."""
KEPT = ("houlsby", "medical_sam_adapter", "lesam", "adaptformer", "visual_prompts")
"""Methods whose parts stay."""
TRUNK = "image_encoder.trunk."
BLOCKS = [f"{TRUNK}blocks.{number}" for number in range(6)]
LINEARS = ("attn.qkv", "attn.proj", "mlp.layers.0", "mlp.layers.1")
WIDTHS = ((16, 16), (16, 32), (32, 32), (32, 64), (64, 64), (64, 128))
"""Channels that the attention of each block takes and gives."""
BOTTLENECK = ("down.weight", "down.bias", "up.weight", "up.bias")
TWO_WAY = [
    f"sam_mask_decoder.transformer.layers.{number}.{place}.adapter.{part}"
    for number in range(2)
    for place in ("cross_attn_token_to_image", "mlp", "cross_attn_image_to_token")
    for part in BOTTLENECK
]
FRAMES = 3
BOXES = torch.tensor([[5.0, 8.0, 50.0, 52.0], [20.0, 20.0, 30.0, 40.0]])

every = pytest.mark.parametrize("method", METHODS)
folded = pytest.mark.parametrize("method", FOLDED)


@functools.cache
def untouched() -> SAM2:
    """Not to be changed."""
    return make().eval()


def applied(tuning: Tuning, **arguments: bool) -> SAM2:
    torch.manual_seed(3)
    model = make(**arguments)
    tuning.apply(model)
    return model.eval()


@functools.cache
def trained(method: str) -> SAM2:
    """After two optimiser steps on a clip, with the gradients of the second; not to be changed."""
    model = applied(METHODS[method]()).train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        loss_of(followed(model)).backward()
        optimizer.step()
    return model.eval()


def frames(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(FRAMES, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1)).to(dtype)


def followed(model: SAM2, images: Tensor | None = None) -> list[Look]:
    """What is said of two boxes in the first frame, and of the frames after it."""
    features = model.encode(frames() if images is None else images)
    tracking = Tracking(model, FRAMES)
    mine = [features.take(torch.full((2,), frame)) for frame in range(FRAMES)]
    looks = [tracking.ask(0, mine[0], [Prompts(torch.zeros(2, dtype=torch.int64), boxes=BOXES)])]
    return [*looks, *(tracking.follow(frame, mine[frame]) for frame in range(1, FRAMES))]


def loss_of(looks: list[Look]) -> Tensor:
    """A smooth function of all that is said."""
    parts = [(look.logits, look.ious, look.pointer, look.presence) for look in looks]
    return torch.stack([part.square().mean() for look in parts for part in look]).sum()


@torch.no_grad()
def clip_answer(model: SAM2, images: Tensor | None = None) -> Tensor:
    return torch.stack([look.best for look in followed(model, images)])


@torch.no_grad()
def image_answer(model: SAM2) -> Tensor:
    asked = Prompts(torch.zeros(2, dtype=torch.int64), boxes=BOXES)
    return torch.cat([part.flatten() for part in model.decode(model.encode(frames()[:1]), asked)])


@functools.cache
def before_training() -> tuple[Tensor, Tensor]:
    return clip_answer(untouched()), image_answer(untouched())


def names() -> list[str]:
    return [name for name, _ in untouched().named_parameters()]


def expected(method: str) -> set[str]:
    """What should learn beside the mask decoder."""
    if method == "full":
        return {n for n in names() if not n.startswith("sam_prompt_encoder.") and n != "no_mem_pos_enc"}
    if method == "selective":
        vectors = {n for n in names() if n.startswith("image_encoder.") and untouched().get_parameter(n).ndim == 1}
        first = (f"{TRUNK}patch_embed.", f"{TRUNK}pos_embed")
        return vectors | {n for n in names() if n.startswith((*first, f"{BLOCKS[-1]}."))}
    if method in ("lora", "dora"):
        layers = [f"{block}.{layer}" for block in BLOCKS for layer in LINEARS]
        parts = {f"{layer}.lora_{part}.default.weight" for layer in layers for part in "AB"}
        return parts | {f"{n}.lora_magnitude_vector.default.weight" for n in layers if method == "dora"}
    if method == "samed":
        return {f"{b}.attn.qkv.samed_{kind}.{part}" for b in BLOCKS for kind in ("query", "value") for part in "AB"}
    if method == "fact":
        shared = {f"image_encoder.fact.{a}_{b}.{factor}" for a, b in WIDTHS for factor in "UV"}
        return shared | {f"{b}.attn.qkv.fact_{kind}.core" for b in BLOCKS for kind in ("query", "value")}
    if method == "ssf":
        biased = [n.removesuffix("bias") for n in names() if n.startswith("image_encoder.") and n.endswith(".bias")]
        return {f"{layer}ssf.{part}" for layer in biased for part in ("scale", "shift")}
    if method == "visual_prompts":
        return {f"{block}.attn.prompts.tokens" for block in BLOCKS}
    places = {"adaptformer": ("mlp",), "frozen_encoder": ()}.get(method, ("attn", "mlp"))
    parts = {f"{block}.{place}.adapter.{part}" for block in BLOCKS for place in places for part in BOTTLENECK}
    return parts | set(TWO_WAY) if method == "medical_sam_adapter" else parts


def decoder(method: str) -> set[str]:
    """The mask decoder, under the name that SAM2 gives it; the Medical SAM Adapter leaves it frozen."""
    return set() if method == "medical_sam_adapter" else {n for n in names() if n.startswith("sam_mask_decoder.")}


# --- names


@every
def test_exactly_these_parameters_learn(method: str) -> None:
    model = applied(METHODS[method]())
    assert learning(model) == expected(method) | decoder(method)
    added = {name.replace(".base_layer.", ".") for name, _ in model.named_parameters()} - set(names())
    assert added == expected(method) - set(names()), "and nothing else was added"


@pytest.mark.parametrize(
    ("pattern", "own"),
    [
        ("mask_decoder", "sam_mask_decoder."),
        ("mask_decoder.*", "sam_mask_decoder."),
        ("mask_decoder.transformer.layers.1", "sam_mask_decoder.transformer.layers.1."),
        ("mask_decoder.*_token.weight", ("sam_mask_decoder.iou_token.", "sam_mask_decoder.obj_score_token.")),
        ("prompt_encoder.not_a_point_embed", "sam_prompt_encoder.not_a_point_embed."),
        ("sam_mask_decoder", "sam_mask_decoder."),
    ],
)
def test_other_families_names_mean_sam2s_own(pattern: str, own: str | tuple[str, ...]) -> None:
    wanted = {name for name in names() if name.startswith(own)}
    model = applied(LoRATuning(train=[pattern]))
    assert wanted and {name for name in learning(model) if ".lora_" not in name} == wanted
    model = applied(FullTuning(freeze=[pattern]))
    assert set(names()) - learning(model) == wanted | {"no_mem_pos_enc"}


def test_rates_by_other_families_names() -> None:
    tuning = FullTuning(rates={"mask_decoder": 0.5}, learning_rates={"mask_decoder.iou_token": 3.0})
    model = applied(tuning)
    rates = {id(p): group["lr"] for group in tuning.parameter_groups(model, 1.0, 0.0) for p in group["params"]}
    found = {name: rates[id(p)] for name, p in model.named_parameters() if id(p) in rates}
    assert found["sam_mask_decoder.iou_token.weight"] == 1.5
    assert {rate for name, rate in found.items() if not name.startswith("sam_mask_decoder.")} == {1.0}
    assert {rate for name, rate in found.items() if name.startswith("sam_mask_decoder.")} == {0.5, 1.5}


@pytest.mark.parametrize(
    "pattern", ["maskdecoder", "mask_decoder.transfomer", "memory", "sam_image_encoder", "detr_decoder"]
)
def test_a_name_that_sam2_does_not_have_is_refused_with_those_that_it_has(pattern: str) -> None:
    with pytest.raises(
        UserError, match=rf"'{pattern}' matches no parameter of SAM2; its parts: image_encoder, "
    ) as error:
        applied(FullTuning(freeze=[pattern]))
    assert "memory_attention, memory_encoder" in str(error.value)


def test_layer_decay_goes_by_hieras_blocks() -> None:
    """The patch embedding with its positions lies 7 below the heads; neck, memory and decoder are heads."""
    scales = FullTuning(freeze=(), layer_decay=0.5).learning_rate_scales(untouched())
    for name, rate in scales.items():
        block = next((depth for depth, block in enumerate(BLOCKS, 1) if name.startswith(f"{block}.")), None)
        first = name.startswith((f"{TRUNK}patch_embed.", f"{TRUNK}pos_embed"))
        assert rate == (0.5**7 if first else 1.0 if block is None else 0.5 ** (7 - block)), name
    assert scales["memory_attention.layers.0.linear1.weight"] == scales["image_encoder.neck.convs.0.conv.bias"] == 1


# --- the start, gradients, steps


@every
def test_nothing_changes_before_training(method: str) -> None:
    model = applied(METHODS[method]())
    clip, image = before_training()
    if method == "dora":  # it divides each row by its own norm; a memory is rounded to bf16 in between
        torch.testing.assert_close(image_answer(model), image, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(clip_answer(model), clip, rtol=1e-2, atol=1e-3 * float(clip.abs().max()))
    elif method == "visual_prompts":  # a new key takes a share of attention
        assert not torch.equal(image_answer(model), image)
    else:
        assert torch.equal(image_answer(model), image) and torch.equal(clip_answer(model), clip)


@every
def test_gradients_reach_what_learns_and_nothing_else(method: str) -> None:
    model = trained(method)
    found = {name for name, p in model.named_parameters() if p.grad is not None}
    unasked = {name for name in learning(model) if name.startswith("mask_downsample.")}  # of masks that are given
    assert found == learning(model) - unasked
    silent = {name for name in expected(method) & found if not model.get_parameter(name).grad.any()}
    assert not {name for name in silent if name.startswith("image_encoder.")}


@every
def test_the_memory_carries_gradients_to_what_learns(method: str) -> None:
    """The last frame's own features are cut off: what arrives has come through the memory of the frames before."""
    model = copy.deepcopy(trained(method)).train()
    model.zero_grad()
    features = model.encode(frames())
    mine = [features.take(torch.full((2,), frame)) for frame in range(FRAMES)]
    last = type(features)(mine[2].top.detach(), tuple(m.detach() for m in mine[2].high), mine[2].positions)
    tracking = Tracking(model, FRAMES)
    tracking.ask(0, mine[0], [Prompts(torch.zeros(2, dtype=torch.int64), boxes=BOXES)])
    tracking.follow(1, mine[1])
    tracking.follow(2, last).logits.square().mean().backward()
    inside = {name for name in expected(method) if name.startswith("image_encoder.")}
    reached = {name for name in inside if (grad := model.get_parameter(name).grad) is not None and grad.any()}
    assert reached >= {name for name in inside if not name.startswith("image_encoder.neck.convs.")}, inside - reached
    assert any(grad is not None and grad.any() for grad in (model.get_parameter(n).grad for n in learning(model)))


@every
def test_steps_change_what_learns_and_the_answers(method: str) -> None:
    model, own = trained(method), dict(untouched().named_parameters())
    kept = {n.replace(".base_layer.", "."): p for n, p in model.named_parameters() if n not in learning(model)}
    assert kept.keys() <= own.keys() and all(torch.equal(p, own[name]) for name, p in kept.items())
    for after, before in zip((clip_answer(model), image_answer(model)), before_training(), strict=True):
        assert (after - before).abs().max() > 1e-3


@every
def test_recomputed_blocks_give_the_same_gradients(method: str) -> None:
    found = []
    for twice in (False, True):
        model = applied(METHODS[method](), checkpoint_activations=twice)
        model.load_state_dict(trained(method).state_dict())
        sum(look.logits.square().mean() for look in followed(model.train())).backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)


# --- saved, copied, folded, planned


@every
def test_a_saved_model_loads_into_a_fresh_one(method: str) -> None:
    fresh = make(seed=5)
    METHODS[method]().apply(fresh)
    fresh.load_state_dict(trained(method).state_dict(), strict=True)
    assert torch.equal(clip_answer(fresh.eval()), clip_answer(trained(method)))


@pytest.mark.parametrize("method", [*FOLDED, *KEPT])
def test_copies_are_independent(method: str) -> None:
    model, before = trained(method), clip_answer(trained(method))
    generator = torch.Generator().manual_seed(8)  # a constant would vanish in the norm before attention
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(clip_answer(twin), before)
        with torch.no_grad():
            for name in expected(method):
                twin.get_parameter(name).add_(torch.randn(twin.get_parameter(name).shape, generator=generator))
        assert (clip_answer(twin) - before).abs().max() > 1e-4, "the copy uses its own parts"
    assert torch.equal(clip_answer(model), before), "and the original its own"


@folded
def test_merging_keeps_the_function_and_restores_the_layout(method: str) -> None:
    """The encoder, which alone is changed, in double; all of it through the memory in fp32."""
    model = copy.deepcopy(trained(method)).train()  # in training a memory is not rounded to bf16
    double = copy.deepcopy(model)
    double.image_encoder.double()
    with torch.no_grad():
        before, through = double.image_encoder(frames(torch.float64))["backbone_fpn"], clip_answer(model)
        for made in (double, model):
            METHODS[method]().merge(made)
        after = double.image_encoder(frames(torch.float64))["backbone_fpn"]
    for new, old in zip(after, before, strict=True):
        assert (new - old).abs().max() < 1e-9 * old.abs().max()
    torch.testing.assert_close(clip_answer(model), through, rtol=1e-4, atol=1e-4 * float(through.abs().max()))
    assert list(model.state_dict()) == list(untouched().state_dict())
    assert [type(module) for module in model.modules()] == [type(module) for module in untouched().modules()]
    assert not any(module._forward_hooks for module in model.modules())
    smaller = model.at_size(SIDE // 2)  # a merged model is a plain one
    assert smaller.mask_side == SIDE // 8 and smaller.state_dict().keys() == model.state_dict().keys()
    METHODS[method]().apply(model)


@pytest.mark.parametrize("method", KEPT)
def test_what_is_not_linear_is_not_folded(method: str) -> None:
    with pytest.raises(UserError, match="cannot be folded into the model's own weights"):
        METHODS[method]().merge(applied(METHODS[method]()))


@every
def test_a_plan_needs_no_memory(method: str) -> None:
    with torch.device("meta"):
        model = SAM2(SHAPE, SIDE, weights=None)
        METHODS[method]().apply(model)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert learning(model) == learning(trained(method))
    shapes = {name: parameter.shape for name, parameter in trained(method).named_parameters()}
    assert {name: parameter.shape for name, parameter in model.named_parameters()} == shapes


def test_shallow_prompts_need_blocks_of_one_width() -> None:
    with pytest.raises(UserError, match="those of SAM2 are not all of one width: set deep to true"):
        applied(VisualPromptTuning(tokens=3, deep=False))


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_a_quantised_encoder_learns_through_the_memory_and_merges_to_plain_layers(bits: str) -> None:
    pytest.importorskip("bitsandbytes")
    tuning = LoRATuning(rank=2, quantize=bits)  # type: ignore[arg-type]
    model = applied(tuning).train()
    followed(model)[-1].logits.square().mean().backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert {name for name in expected("lora") if "lora_B" in name} <= reached
    tuning.merge(model)
    assert list(model.state_dict()) == list(untouched().state_dict())
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert [type(module) for module in model.modules()] == [type(module) for module in untouched().modules()]


# --- in the module


@pytest.fixture(scope="module")
def volumes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_volumes(tmp_path_factory.mktemp("moving") / "train", range(2))


@every
@pytest.mark.parametrize("memory", [True, False], ids=["clips", "images"])
def test_a_module_reaches_all_that_a_method_lets_learn(method: str, memory: bool, volumes: Path) -> None:
    """Else DDP would wait for it, and weight decay wear it away. In bf16, as recipes train."""
    torch.manual_seed(3)
    prompts = ClickPrompts(start=BoxPrompts(), corrections=1, blank=0)
    made = SAM2Module(make(), memory=memory, tuning=METHODS[method](), prompts=prompts).train()
    batch = clips(volumes, [0, LENGTH], frames=3 if memory else 1)
    with torch.autocast("cpu", torch.bfloat16):
        loss = made.loss_of(batch, 0)
    loss.backward()
    learns = learning(made.model)
    assert learns >= {n for n in expected(method) if n.startswith("image_encoder.")}
    found = {name for name, p in made.model.named_parameters() if p.grad is not None}
    assert found <= learns
    given = {name for name in learns if name.startswith(("mask_downsample.", "sam_prompt_encoder."))}
    assert learns - found <= given, "of the prompt encoder what the prompts need"
    assert all(p.grad.isfinite().all() for p in made.model.parameters() if p.grad is not None) and loss.isfinite()
