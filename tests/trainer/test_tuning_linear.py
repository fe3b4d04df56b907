"""Every method that adds nothing, or what folds into the weights, on every family of encoders."""

from __future__ import annotations

import copy
import functools
import pickle

import pytest
import torch
from encoders import BLOCKS, FAMILIES, SIDES, learning, logits, make
from linear_methods import LINEAR_METHODS as METHODS
from torch import Tensor

from trainer.models import MedSAM, SegmentationModel
from trainer.models.medsam import ViT
from trainer.prompts import Prompts
from trainer.tuning import (
    FacTTuning,
    FrozenEncoderTuning,
    LoRATuning,
    SAMedTuning,
    SelectiveTuning,
    SSFTuning,
    Tuning,
)

ADDING = ("lora", "dora", "samed", "fact", "ssf")
"""Methods that put parts in, and fold them into the weights."""

QUERY_VALUE = {
    "medsam": ("attn.qkv", "attn.qkv"),
    "litemedsam": ("attn.qkv", "attn.qkv"),
    "sam2": ("attn.qkv", "attn.qkv"),
    "sam3": ("attention.q_proj", "attention.v_proj"),
}
LINEARS = {
    "medsam": ("attn.qkv", "attn.proj", "mlp.lin1", "mlp.lin2"),
    "litemedsam": ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"),
    "sam2": ("attn.qkv", "attn.proj", "mlp.layers.0", "mlp.layers.1"),
    "sam3": (*(f"attention.{part}_proj" for part in "qkvo"), "mlp.fc1", "mlp.fc2"),
}
WIDTHS = {  # pairs of widths that attention takes and gives
    "medsam": {(32, 32)},
    "litemedsam": {(128, 128), (160, 160), (320, 320)},
    "sam2": {(16, 16), (16, 32), (32, 32), (32, 64), (64, 64), (64, 128)},
    "sam3": {(32, 32)},
}
PATCH = {
    "medsam": ("image_encoder.patch_embed.", "image_encoder.pos_embed"),
    "litemedsam": ("image_encoder.trunk.patch_embed.",),
    "sam2": ("image_encoder.patch_embed.", "image_encoder.pos_embed"),
    "sam3": ("image_encoder.embeddings.",),
}
cases = pytest.mark.parametrize(("family", "method"), [(f, m) for f in FAMILIES for m in METHODS])
adding = pytest.mark.parametrize(("family", "method"), [(f, m) for f in FAMILIES for m in ADDING])


@functools.cache
def untouched(family: str) -> SegmentationModel:
    """A family's model; not to be changed."""
    return make(family)


@functools.cache
def trained(family: str, method: str) -> SegmentationModel:
    """A model after a method was applied and one optimiser step taken; not to be changed.

    Every parameter holds its gradient of that step.
    """
    torch.manual_seed(3)
    model = applied(family, METHODS[method]())
    step(model, family)
    return model


@functools.cache
def before_training(family: str) -> Tensor:
    return answer(untouched(family), family)


@functools.cache
def after_training(family: str, method: str) -> Tensor:
    return answer(trained(family, method), family)


def applied(family: str, tuning: Tuning) -> SegmentationModel:
    model = copy.deepcopy(untouched(family))
    tuning.apply(model)
    return model.eval()


def loss(model: SegmentationModel, family: str) -> Tensor:
    """A smooth function of masks and scores."""
    image = torch.rand(1, 3, SIDES[family], SIDES[family], generator=torch.Generator().manual_seed(1))
    boxes = torch.tensor([[5.0, 8.0, 50.0, 52.0]])
    masks, scores = model.decode(model.encode(image), Prompts(torch.zeros(1, dtype=torch.int64), boxes))
    return masks.square().mean() + scores.square().mean()


def step(model: SegmentationModel, family: str) -> None:
    loss(model.train(), family).backward()  # in evaluation TinyViT keeps positions that it has computed once
    torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01).step()
    model.eval()


@torch.no_grad()
def answer(model: SegmentationModel, family: str) -> Tensor:
    return logits(model, family)


def own(family: str) -> dict[str, Tensor]:
    return dict(untouched(family).named_parameters())


def in_encoder(family: str) -> set[str]:
    return {name for name in own(family) if name.startswith("image_encoder.")}


def expected(family: str, method: str) -> set[str]:
    """What should learn in the encoder."""
    if method == "full":
        return in_encoder(family)
    if method == "selective":
        norms = {name for name in in_encoder(family) if own(family)[name].ndim == 1}
        assert all(name.endswith((".weight", ".bias")) for name in norms), "vectors are norms and biases"
        last = BLOCKS[family][-1] + "."
        return norms | {name for name in in_encoder(family) if name.startswith((*PATCH[family], last))}
    if method in ("lora", "dora"):
        layers = [f"{block}.{layer}" for block in BLOCKS[family] for layer in LINEARS[family]]
        adapters = {f"{layer}.lora_{part}.default.weight" for layer in layers for part in "AB"}
        magnitudes = {f"{layer}.lora_magnitude_vector.default.weight" for layer in layers}
        return adapters | magnitudes if method == "dora" else adapters
    if method in ("samed", "fact"):
        query, value = QUERY_VALUE[family]
        parts = {
            f"{block}.{layer}.{method}_{kind}"
            for block in BLOCKS[family]
            for kind, layer in (("query", query), ("value", value))
        }
        if method == "samed":
            return {f"{part}.{factor}" for part in parts for factor in "AB"}
        shared = {f"image_encoder.fact.{a}_{b}.{factor}" for a, b in WIDTHS[family] for factor in "UV"}
        return shared | {f"{part}.core" for part in parts}
    if method == "ssf":
        biased = {name.removesuffix("bias") for name in in_encoder(family) if name.endswith(".bias")}
        return {f"{layer}ssf.{part}" for layer in biased for part in ("scale", "shift")}
    return set()


@cases
def test_exactly_these_parameters_learn(family: str, method: str) -> None:
    decoder = {name for name in own(family) if name.startswith("mask_decoder.")}
    neck = {"neck.weight", "neck.bias"} & own(family).keys() if method == "full" else set()
    assert learning(trained(family, method)) == expected(family, method) | decoder | neck


@cases
def test_nothing_changes_before_training(family: str, method: str) -> None:
    before, after = before_training(family), answer(applied(family, METHODS[method]()), family)
    if method == "dora":  # it divides each row by its own norm
        torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)
    else:
        assert torch.equal(after, before)


@cases
def test_gradients_reach_what_learns_and_nothing_else(family: str, method: str) -> None:
    model = trained(family, method)
    assert {name for name, p in model.named_parameters() if p.grad is not None} == learning(model)
    assert any(
        p.grad.abs().max() > 0 for n, p in model.named_parameters() if n in learning(model) and p.grad is not None
    )


@cases
def test_one_step_changes_what_learns_and_the_masks(family: str, method: str) -> None:
    model = trained(family, method)
    kept = {name.replace(".base_layer.", "."): p for name, p in model.named_parameters() if name not in learning(model)}
    assert kept.keys() <= own(family).keys()
    assert all(torch.equal(parameter, own(family)[name]) for name, parameter in kept.items())
    assert (after_training(family, method) - before_training(family)).abs().max() > 1e-3


@cases
def test_a_saved_model_loads_into_a_fresh_one(family: str, method: str) -> None:
    model = trained(family, method)
    torch.manual_seed(5)
    fresh = FAMILIES[family]()
    METHODS[method]().apply(fresh)
    fresh.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(answer(fresh.eval(), family), after_training(family, method))


@adding
def test_copies_are_independent(family: str, method: str) -> None:
    model, before = trained(family, method), after_training(family, method)
    twins = (
        [copy.deepcopy(model)] if family == "litemedsam" else [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    )
    for twin in twins:
        assert torch.equal(answer(twin, family), before)
        with torch.no_grad():
            for name in expected(family, method):
                twin.get_parameter(name).add_(0.1)
        assert (answer(twin, family) - before).abs().max() > 1e-4, "the copy uses its own parts"
    assert torch.equal(answer(model, family), before), "and the original its own"


@adding
def test_merging_keeps_the_function_and_restores_the_layout(family: str, method: str) -> None:
    """In double precision nothing but the rounding of the weights is left."""
    model = copy.deepcopy(trained(family, method))
    encoder = model.get_submodule("image_encoder").double()
    image = torch.rand(1, 3, SIDES[family], SIDES[family], dtype=torch.float64)

    def features() -> Tensor:
        found = encoder(image)
        return found[-1] if isinstance(found, list) else getattr(found, "last_hidden_state", found)

    with torch.no_grad():
        before = features()
        METHODS[method]().merge(model)
        assert (features() - before).abs().max() < 1e-9 * before.abs().max()
    assert list(model.state_dict()) == list(untouched(family).state_dict())
    assert [type(module) for module in model.modules()] == [type(module) for module in untouched(family).modules()]
    assert not any(module._forward_hooks for module in model.modules())
    METHODS[method]().apply(model)  # it is a fresh model again


@cases
def test_a_plan_needs_no_memory(family: str, method: str) -> None:
    with torch.device("cpu" if family == "sam2" else "meta"):  # the sam2 package asks tensors for numbers
        model = FAMILIES[family]().to("meta")
    with torch.device("meta"):
        METHODS[method]().apply(model)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert learning(model) == learning(trained(family, method))
    shapes = {name: parameter.shape for name, parameter in trained(family, method).named_parameters()}
    assert {name: parameter.shape for name, parameter in model.named_parameters()} == shapes


@pytest.mark.parametrize(
    ("tuning", "count"),
    [
        # three blocks of width 32: qkv 32→96, projection 32→32, MLP 32→128→32
        (SAMedTuning(rank=4), 3 * 2 * (4 * 32 + 32 * 4)),
        (FacTTuning(rank=3), 3 * 32 + 32 * 3 + 3 * 2 * 3 * 3),
        # patch embedding; per block two norms and four linear layers; two norms of the neck
        (SSFTuning(), 2 * (32 + 3 * (32 + 96 + 32 + 32 + 128 + 32) + 2 * 256)),
        (LoRATuning(rank=2), 3 * 2 * ((32 + 96) + (32 + 32) + (32 + 128) + (128 + 32))),
        (LoRATuning(rank=2, dora=True), 3072 + 3 * (96 + 32 + 128 + 32)),
        (SelectiveTuning(norms=True), 3 * 2 * (32 + 32) + 2 * (256 + 256)),
        (SelectiveTuning(biases=True), 32 + 3 * (32 + 96 + 32 + 32 + 128 + 32) + 2 * 256),
        (SelectiveTuning(patch_embedding=True), 3 * 16 * 16 * 32 + 32 + 4 * 4 * 32),
        # norms, linear layers, and relative positions of a window of 3: 2 × 5 for 16 channels a head
        (SelectiveTuning(last_blocks=1), 128 + 33 * 96 + 33 * 32 + 33 * 128 + 129 * 32 + 2 * 5 * 16),
        (FrozenEncoderTuning(), 0),
    ],
)
def test_how_many_learn_by_hand(tuning: Tuning, count: int) -> None:
    model = applied("medsam", tuning)
    learn = [p.numel() for name, p in model.named_parameters() if p.requires_grad and not name.startswith("mask_dec")]
    assert sum(learn) == count


@pytest.mark.parametrize("method", METHODS)
def test_activation_checkpointing_gives_the_same_gradients(method: str) -> None:
    shape = ViT(width=32, depth=3, heads=2, global_blocks=(1,), window=3)
    found = []
    for checkpoint in (False, True):
        torch.manual_seed(0)
        model = MedSAM(shape, 64, weights=None, checkpoint_activations=checkpoint)
        model.load_state_dict(untouched("medsam").state_dict())
        METHODS[method]().apply(model)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in expected("medsam", method):  # away from zero, or most gradients would be zero
                    parameter.add_(0.05 * torch.randn_like(parameter))
        loss(model.train(), "medsam").backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        assert found[-1].keys() == learning(model)
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("method", ADDING)
def test_under_autocast_the_parts_keep_the_precision_of_what_they_change(method: str) -> None:
    seen = {}
    for model in (untouched("medsam"), trained("medsam", method)):
        layer = copy.deepcopy(model.get_submodule("image_encoder.layers.0.attn.qkv"))
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            seen[model is untouched("medsam")] = layer(torch.ones(1, 32)).dtype
    assert seen == {True: torch.bfloat16, False: torch.bfloat16}
