"""Adapters: Houlsby's, Medical SAM Adapter's, LeSAM's, AdaptFormer's."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from encoders import ATTENTION, BLOCKS, FAMILIES, SIDES, learning, logits, make
from torch import Tensor, nn

from data_shards.errors import UserError
from trainer.models import MedSAM, SegmentationModel
from trainer.models.medsam import ViT
from trainer.prompts import Prompts
from trainer.tuning import (
    AdaptFormerTuning,
    FullTuning,
    HoulsbyTuning,
    LeSAMTuning,
    LoRATuning,
    MedicalSAMAdapterTuning,
    Tuning,
)
from trainer.tuning.bottleneck import Bottleneck

METHODS: dict[str, Callable[[], Tuning]] = {
    "houlsby": lambda: HoulsbyTuning(bottleneck=4),
    "medical_sam_adapter": MedicalSAMAdapterTuning,
    "lesam": LeSAMTuning,
    "adaptformer": lambda: AdaptFormerTuning(bottleneck=4),
}
DECODER = [
    f"mask_decoder.transformer.layers.{i}.{place}"
    for i in range(2)
    for place in ("cross_attn_token_to_image", "mlp", "cross_attn_image_to_token")
]
PARAMETERS = ("down.weight", "down.bias", "up.weight", "up.bias")

everywhere = pytest.mark.parametrize("family", FAMILIES)
every_method = pytest.mark.parametrize("method", METHODS)


def adapters(model: nn.Module) -> dict[str, Bottleneck]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Bottleneck)}


def message(action: Callable[[], Any]) -> str:
    with pytest.raises(UserError) as caught:
        action()
    raw: str = caught.value.args[0]
    assert "\n" not in raw
    return raw


def tuned(family: str, method: str, seed: int = 0, stir: bool = True) -> SegmentationModel:
    """A tiny model with adapters that do something, or have just been put in."""
    model = make(family, seed)
    METHODS[method]().apply(model)
    if stir:
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for adapter in adapters(model).values():
                for parameter in adapter.parameters():
                    parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


@cache
@torch.no_grad()
def untouched_logits(family: str) -> Tensor:
    return logits(make(family), family)


def loss_of(model: SegmentationModel, family: str) -> Tensor:
    side = SIDES[family]
    image = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(1))
    boxes = torch.tensor([[5.0, 8.0, 50.0, 52.0], [20.0, 20.0, 30.0, 40.0]])
    masks, scores = model.decode(model.encode(image), Prompts(torch.tensor([0, 1]), boxes))
    return masks.square().mean() + scores.square().mean()


@everywhere
@every_method
def test_exactly_the_adapters_and_what_is_named_learn(family: str, method: str) -> None:
    model = tuned(family, method, stir=False)
    places = [f"{block}.{ATTENTION[family]}" for block in BLOCKS[family]] if method != "adaptformer" else []
    places += [f"{block}.mlp" for block in BLOCKS[family]]
    decoder = {name for name, _ in make(family).named_parameters() if name.startswith("mask_decoder.")}
    if method == "medical_sam_adapter":  # the paper: nothing else
        places, decoder = places + DECODER, set()
    assert learning(model) == {f"{place}.adapter.{name}" for place in places for name in PARAMETERS} | decoder
    own = {name for name, _ in model.named_parameters() if ".adapter." not in name}
    assert own == {name for name, _ in make(family).named_parameters()}, "the model's own names stay"


@everywhere
@every_method
def test_nothing_changes_before_training(family: str, method: str) -> None:
    untouched, model = make(family), tuned(family, method, stir=False)
    with torch.no_grad():
        assert torch.equal(logits(model, family), untouched_logits(family))
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in untouched.state_dict().items())


@everywhere
@every_method
def test_gradients_reach_every_adapter_and_nothing_that_is_frozen(family: str, method: str) -> None:
    model = tuned(family, method)
    loss_of(model, family).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        if ".adapter." in name:
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


@every_method
def test_a_first_step_can_be_taken_from_the_start(method: str) -> None:
    """With Up at zero its own gradient is not."""
    model = tuned("medsam", method, stir=False)
    loss_of(model, "medsam").backward()
    for name, adapter in adapters(model).items():
        assert adapter.up.weight.grad is not None and adapter.up.weight.grad.abs().max() > 0, name


@everywhere
@every_method
def test_saved_adapters_load_strictly_into_a_fresh_model(family: str, method: str) -> None:
    model, other = tuned(family, method), tuned(family, method, seed=5, stir=False)
    with torch.no_grad():
        wanted = logits(model, family)
        assert not torch.equal(wanted, untouched_logits(family)), "the adapters do something"
        other.load_state_dict(model.state_dict(), strict=True)
        assert torch.equal(logits(other, family), wanted)


@everywhere
@every_method
@torch.no_grad()
def test_a_copy_has_adapters_and_norms_of_its_own(family: str, method: str) -> None:
    model = tuned(family, method)
    wanted = logits(model, family)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin, family), wanted)
    for parameter in model.parameters():
        parameter.zero_()
    assert torch.equal(logits(twin, family), wanted), "the copy does not look at the original"
    for adapter in adapters(twin).values():
        adapter.up.weight.zero_()
        adapter.up.bias.zero_()
    assert torch.equal(logits(twin, family), untouched_logits(family))


def test_parameters_by_hand() -> None:
    """MedSAM of width 32 with three blocks: an adapter of h channels has 2·32·h + h + 32, a decoder's 256 for 32."""

    def count(tuning: Tuning) -> int:
        model = make("medsam")
        tuning.apply(model)
        return sum(parameter.numel() for name, parameter in model.named_parameters() if ".adapter." in name)

    assert count(HoulsbyTuning()) == 3 * 2 * (2 * 32 * 64 + 64 + 32)
    assert count(AdaptFormerTuning()) == 3 * (2 * 32 * 64 + 64 + 32)
    assert count(LeSAMTuning()) == 3 * 2 * (2 * 32 * 8 + 8 + 32)
    encoder, decoder = 3 * 2 * (2 * 32 * 8 + 8 + 32), 2 * 3 * (2 * 256 * 64 + 64 + 256)
    assert count(MedicalSAMAdapterTuning()) == encoder + decoder
    assert count(MedicalSAMAdapterTuning(decoder=False)) == encoder
    assert count(MedicalSAMAdapterTuning(ratio=0.001, decoder=False)) == 3 * 2 * (2 * 32 + 1 + 32), "never none"


def test_parameters_of_the_original_size() -> None:
    """ViT-B: 12 blocks of 768 channels; the prompt encoder never learns."""
    with torch.device("meta"):
        model = MedSAM("vit_b", weights=None)
        HoulsbyTuning().apply(model)
    assert sum(p.numel() for n, p in model.named_parameters() if ".adapter." in n) == 24 * (2 * 768 * 64 + 64 + 768)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not any(name.startswith("prompt_encoder") for name in learning(model))


@everywhere
@every_method
def test_a_plan_needs_no_memory(family: str, method: str) -> None:
    model = FAMILIES[family]().to("meta")  # sam2's own constructor needs memory
    with torch.device("meta"):
        METHODS[method]().apply(model)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert learning(model) == learning(tuned(family, method, stir=False))


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def by_hand(adapter: Bottleneck, x: Tensor, activation: Callable[[Tensor], Tensor] = gelu) -> Tensor:
    hidden = activation(x @ adapter.down.weight.T + adapter.down.bias)
    return hidden @ adapter.up.weight.T + adapter.up.bias


def expected_block(method: str, block: Any, first: Bottleneck | None, second: Bottleneck, x: Tensor) -> Tensor:
    """What a block of SAM's ViT gives with adapters, from an untouched block of global attention."""
    mixed = block.attn(block.layer_norm1(x))[0]
    x = x + mixed + (0 if first is None else by_hand(first, mixed))
    normed = block.layer_norm2(x)
    out = block.mlp(normed)
    if method in ("houlsby", "lesam"):
        return x + out + by_hand(second, out)
    if method == "medical_sam_adapter":
        return x + out + 0.5 * by_hand(second, normed)
    return x + out + 0.1 * by_hand(second, normed, torch.relu)


@every_method
@torch.no_grad()
def test_a_block_by_hand(method: str) -> None:
    model, untouched = tuned("medsam", method), make("medsam")
    x = torch.randn(2, 4, 4, 32, generator=torch.Generator().manual_seed(3))
    name = "image_encoder.layers.1"
    found = adapters(model)
    wanted = expected_block(
        method,
        untouched.get_submodule(name),
        found.get(f"{name}.attn.adapter"),
        found[f"{name}.mlp.adapter"],
        x,
    )
    given = model.get_submodule(name)(x)
    torch.testing.assert_close(given, wanted)
    assert (given - untouched.get_submodule(name)(x)).abs().max() > 0.1


@pytest.mark.parametrize(
    ("method", "scale", "activation"), [("medical_sam_adapter", 0.5, gelu), ("adaptformer", 0.1, torch.relu)]
)
@pytest.mark.parametrize("family", ["litemedsam", "sam2", "sam3"])
@torch.no_grad()
def test_an_adapter_beside_an_mlp_sees_what_the_mlp_sees(
    family: str, method: str, scale: float, activation: Callable[[Tensor], Tensor]
) -> None:
    """TinyViT's MLP normalises inside: the adapter gets the normalised tokens there too."""
    model, untouched = tuned(family, method), make(family)
    name = f"{BLOCKS[family][1]}.mlp"
    mlp: Any = untouched.get_submodule(name)
    x = 3 + 2 * torch.randn(5, 7, model.blocks()[1].width, generator=torch.Generator().manual_seed(3))
    seen = mlp.norm(x) if family == "litemedsam" else x
    wanted = mlp(x) + scale * by_hand(adapters(model)[f"{name}.adapter"], seen, activation)
    torch.testing.assert_close(model.get_submodule(name)(x), wanted)


@torch.no_grad()
def test_the_decoders_adapters_by_hand() -> None:
    model, untouched = tuned("medsam", "medical_sam_adapter"), make("medsam")
    name = "mask_decoder.transformer.layers.1"
    a = [adapters(model)[f"{name}.{place}.adapter"] for place in ("cross_attn_token_to_image", "mlp")]
    last = adapters(model)[f"{name}.cross_attn_image_to_token.adapter"]
    generator = torch.Generator().manual_seed(3)
    tokens, token_places = (torch.randn(1, 2, 7, 256, generator=generator) for _ in range(2))
    image, image_places = (torch.randn(1, 1, 16, 256, generator=generator) for _ in range(2))
    block: Any = untouched.get_submodule(name)

    query = tokens + token_places
    x = block.layer_norm1(tokens + block.self_attn(query=query, key=query, value=tokens)[0])
    mixed = block.cross_attn_token_to_image(query=x + token_places, key=image + image_places, value=image)[0]
    x = block.layer_norm2(x + mixed + by_hand(a[0], mixed))
    x = block.layer_norm3(x + block.mlp(x) + 0.5 * by_hand(a[1], x))
    mixed = block.cross_attn_image_to_token(query=image + image_places, key=x + token_places, value=x)[0]
    y = block.layer_norm4(image + mixed + by_hand(last, mixed))

    given = model.get_submodule(name)(
        queries=tokens,
        keys=image,
        query_point_embedding=token_places,
        key_point_embedding=image_places,
        attention_similarity=None,
    )
    torch.testing.assert_close(given[0], x)
    torch.testing.assert_close(given[1], y)


def test_down_starts_kaiming_and_up_at_zero() -> None:
    torch.manual_seed(0)
    adapter = Bottleneck(512, 256)
    bound = 1 / math.sqrt(512)  # uniform of variance 1 / (3 · inputs)
    assert bound * 0.99 < adapter.down.weight.abs().max() <= bound
    assert adapter.down.weight.detach().std() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert not any(p.any() for p in (adapter.down.bias, adapter.up.weight, adapter.up.bias))


@every_method
def test_recomputed_activations_give_the_same_gradients(method: str) -> None:
    gradients = []
    for recompute in (False, True):
        torch.manual_seed(0)
        shape = ViT(width=32, depth=3, heads=2, global_blocks=(1,), window=3)
        model = MedSAM(shape, 64, weights=None, checkpoint_activations=recompute)
        METHODS[method]().apply(model)
        with torch.no_grad():
            for adapter in adapters(model).values():
                adapter.up.weight.normal_(generator=torch.Generator().manual_seed(2))
        assert model.training
        loss_of(model, "medsam").backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if ".adapter." in name})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


@everywhere
@every_method
def test_half_precision(family: str, method: str) -> None:
    model = tuned(family, method)
    image = torch.rand(1, 3, SIDES[family], SIDES[family], generator=torch.Generator().manual_seed(1))
    exact = model.encode(image).detach()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = model.encode(image)
    assert (rounded - exact).norm() < 0.05 * exact.norm()
    rounded.float().square().mean().backward()
    for name, parameter in model.named_parameters():
        if name.startswith("image_encoder") and ".adapter." in name:
            assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name


@every_method
def test_adapters_are_not_folded(method: str) -> None:
    tuning = METHODS[method]()
    model = make("medsam")
    tuning.apply(model)
    text = message(lambda: tuning.merge(model))
    assert text.startswith(f"{type(tuning).__name__} cannot be folded")
    assert "LoRA, SAMed, FacT or SSF" in text


def test_what_learns_besides_and_how_fast_can_be_chosen() -> None:
    model = make("medsam")
    tuning = MedicalSAMAdapterTuning(
        decoder=False, train=["mask_decoder", "*layer_norm*"], rates={"image_encoder": 0.1, "*.adapter.*": 2.0}
    )
    tuning.apply(model)
    scales = tuning.learning_rate_scales(model)
    assert scales["image_encoder.layers.0.attn.adapter.up.weight"] == 2.0
    assert scales["image_encoder.layers.0.layer_norm1.weight"] == 0.1
    assert scales["mask_decoder.iou_token.weight"] == 1.0
    assert "image_encoder.layers.0.attn.qkv.weight" not in scales


@pytest.mark.parametrize(
    ("make_tuning", "what"),
    [
        (lambda: HoulsbyTuning(bottleneck=0), "bottleneck is 1 channel or more, not 0"),
        (lambda: AdaptFormerTuning(bottleneck=-1), "bottleneck"),
        (lambda: AdaptFormerTuning(scale=0), "scale is above 0, not 0"),
        (lambda: AdaptFormerTuning(scale=float("nan")), "scale"),
        (lambda: MedicalSAMAdapterTuning(ratio=0), "ratio"),
        (lambda: MedicalSAMAdapterTuning(ratio=1.5), "ratio"),
        (lambda: MedicalSAMAdapterTuning(scale=-0.5), "scale"),
        (lambda: LeSAMTuning(ratio=0), "above 0 and at most 1, not 0"),
        (lambda: HoulsbyTuning(rates={"image_encoder": 0}), "rates: image_encoder"),
    ],
)
def test_arguments_out_of_range(make_tuning: Callable[[], Tuning], what: str) -> None:
    assert what in message(make_tuning)


@every_method
def test_a_model_is_tuned_once(method: str) -> None:
    model = tuned("medsam", method)
    for other in (HoulsbyTuning(), LoRATuning()):
        text = message(lambda other=other: other.apply(model))  # type: ignore[misc]
        assert "MedSAM" in text and "fresh model" in text
    lora = make("medsam")
    LoRATuning().apply(lora)
    assert "fresh model" in message(lambda: METHODS[method]().apply(lora))


@every_method
def test_a_pattern_that_matches_nothing(method: str) -> None:
    tuning = METHODS[method]()
    assert isinstance(tuning, (HoulsbyTuning, LeSAMTuning, AdaptFormerTuning, MedicalSAMAdapterTuning))
    tuning.trained = ["mask_decoderr"]
    model = make("medsam")
    assert "'mask_decoderr' matches no parameter of MedSAM" in message(lambda: tuning.apply(model))
    assert not adapters(model)


@every_method
def test_a_model_without_blocks(method: str) -> None:
    model = make("medsam")
    model.image_encoder = nn.Conv2d(3, 256, 16, 16)
    text = message(lambda: METHODS[method]().apply(model))
    assert "MedSAM has no transformer blocks" in text and "FullTuning" in text
    FullTuning().apply(model)


def test_a_decoder_that_is_not_sams() -> None:
    model = make("medsam")
    model.mask_decoder.transformer = nn.Linear(1, 1)  # type: ignore[union-attr]
    assert "set decoder to false" in message(lambda: MedicalSAMAdapterTuning().apply(model))
    MedicalSAMAdapterTuning(decoder=False).apply(model)
