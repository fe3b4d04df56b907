"""Low-rank additions by hand: which layers, which scale, which rows; and in few bits."""

from __future__ import annotations

import copy
import functools
import importlib.util
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from encoders import FAMILIES, logits, make
from torch import Tensor, nn

from data_shards.errors import UserError
from trainer.models import SegmentationModel
from trainer.tuning import FacTTuning, LoRATuning, SAMedTuning, Tuning
from trainer.tuning.additions import Addition

QUANTISED = ("4bit", "8bit")


@functools.cache
def untouched(family: str) -> SegmentationModel:
    return make(family)


def applied(family: str, tuning: Tuning) -> SegmentationModel:
    model = copy.deepcopy(untouched(family))
    tuning.apply(model)
    return model.eval()


def adapted(model: nn.Module) -> set[str]:
    return {name.rpartition(".lora_A.")[0] for name, _ in model.named_parameters() if ".lora_A." in name}


def message(action: Callable[[], Any]) -> str:
    with pytest.raises(UserError) as caught:
        action()
    raw = str(caught.value.args[0])
    assert "\n" not in raw
    return raw


def randomise(model: nn.Module) -> None:
    """Move every adapter away from zero."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and not name.startswith("mask_decoder."):
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


@torch.no_grad()
def answer(model: SegmentationModel, family: str) -> Tensor:
    return logits(model, family)


@pytest.mark.parametrize(
    ("family", "targets", "layers"),
    [
        ("medsam", ["query", "mlp_in"], {"attn.qkv", "mlp.lin1"}),
        ("medsam", ["projection"], {"attn.proj"}),
        ("medsam", ["qkv", "lin2"], {"attn.qkv", "mlp.lin2"}),
        ("medsam", ["attn.proj"], {"attn.proj"}),
        ("litemedsam", ["value", "fc2"], {"attn.qkv", "mlp.fc2"}),
        ("sam2", ["key", "mlp_out"], {"attn.qkv", "mlp.layers.1"}),
        ("sam3", ["query", "value"], {"attention.q_proj", "attention.v_proj"}),
        ("sam3", ["key", "projection", "mlp_in"], {"attention.k_proj", "attention.o_proj", "mlp.fc1"}),
    ],
)
def test_targets_by_short_and_last_names(family: str, targets: list[str], layers: set[str]) -> None:
    model = applied(family, LoRATuning(rank=2, targets=targets))
    blocks = [block.name for block in untouched(family).blocks()]
    assert adapted(model) == {f"{block}.{layer}" for block in blocks for layer in layers}


@pytest.mark.parametrize(
    ("targets", "closest"),
    [
        (["qvk"], "did you mean 'qkv'?"),
        (["query", "projektion"], "did you mean 'projection'?"),
        (["lin3"], "did you mean 'lin2'?"),
        (r".*\.qvk", "did you mean 'qkv'?"),
        (["zzz"], "known: conv1, conv2, key, "),
    ],
)
def test_an_unknown_target_names_the_closest(targets: str | list[str], closest: str) -> None:
    text = message(lambda: applied("medsam", LoRATuning(targets=targets)))
    assert closest in text
    assert f"'{targets if isinstance(targets, str) else targets[-1]}'" in text


@pytest.mark.parametrize(
    ("family", "targets", "what"),
    [
        ("medsam", ["attn"], "image_encoder.layers.0.attn, a SamVision"),
        ("medsam", [], "match no module"),
        ("litemedsam", ".*local_conv.conv", "without groups"),
        ("litemedsam", ["norm"], "a LayerNorm, which takes no adapter"),
    ],
)
def test_a_target_that_takes_no_adapter(family: str, targets: str | list[str], what: str) -> None:
    assert what in message(lambda: applied(family, LoRATuning(targets=targets)))


@pytest.mark.parametrize("dora", [False, True])
def test_convolutions_take_additions_too(dora: bool) -> None:
    tuning = LoRATuning(rank=2, targets=r"image_encoder\.(patch_embed\.projection|neck\.conv2)", dora=dora)
    model = applied("medsam", tuning)
    assert adapted(model) == {"image_encoder.patch_embed.projection", "image_encoder.neck.conv2"}
    torch.testing.assert_close(answer(model, "medsam"), answer(untouched("medsam"), "medsam"), rtol=1e-4, atol=1e-4)
    randomise(model)
    before = answer(model, "medsam")
    assert (before - answer(untouched("medsam"), "medsam")).abs().max() > 1e-2
    tuning.merge(model)
    torch.testing.assert_close(answer(model, "medsam"), before, rtol=1e-4, atol=1e-4)
    assert list(model.state_dict()) == list(untouched("medsam").state_dict())


@pytest.mark.parametrize(("rslora", "scale"), [(False, 6 / 4), (True, 6 / 2)])
def test_additions_are_scaled_by_alpha_over_the_rank_or_its_root(rslora: bool, scale: float) -> None:
    tuning = LoRATuning(rank=4, alpha=6, rslora=rslora)
    model = applied("medsam", tuning)
    randomise(model)
    name = "image_encoder.layers.1.mlp.lin1"
    layer: Any = model.get_submodule(name)
    addition = layer.lora_B["default"].weight @ layer.lora_A["default"].weight * scale
    tuning.merge(model)
    weight = untouched("medsam").get_parameter(f"{name}.weight")
    torch.testing.assert_close(model.get_parameter(f"{name}.weight"), weight + addition)


def test_dora_learns_magnitude_and_direction_apart() -> None:
    tuning = LoRATuning(rank=4, alpha=6, dora=True)
    model = applied("medsam", tuning)
    name = "image_encoder.layers.1.mlp.lin1"
    weight = untouched("medsam").get_parameter(f"{name}.weight")
    layer: Any = model.get_submodule(name)
    magnitude = layer.lora_magnitude_vector["default"].weight
    torch.testing.assert_close(magnitude, weight.norm(dim=1))
    randomise(model)
    direction = weight + layer.lora_B["default"].weight @ layer.lora_A["default"].weight * 1.5
    tuning.merge(model)
    torch.testing.assert_close(
        model.get_parameter(f"{name}.weight"), magnitude[:, None] * direction / direction.norm(dim=1, keepdim=True)
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["samed", "fact"])
def test_queries_and_values_get_their_additions_and_keys_none(family: str, method: str) -> None:
    tuning: Tuning = SAMedTuning(rank=2) if method == "samed" else FacTTuning(rank=3, scale=0.5)
    model = applied(family, tuning)
    randomise(model)
    parameters = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    tuning.merge(model)
    for block in untouched(family).blocks():
        outputs = block.width
        for kind in ("query", "key", "value"):
            projection = getattr(block, kind)
            rows = torch.arange(outputs) if projection.rows is None else projection.rows
            weight = f"{projection.module}.weight"
            change = model.get_parameter(weight)[rows] - untouched(family).get_parameter(weight)[rows]
            part = f"{projection.module}.{method}_{kind}"
            shared = f"image_encoder.fact.{block.width_in}_{outputs}"
            if kind == "key":
                wanted = torch.zeros(outputs, block.width_in)
            elif method == "samed":
                wanted = parameters[f"{part}.B"] @ parameters[f"{part}.A"]
            else:
                wanted = 0.5 * parameters[f"{shared}.V"] @ parameters[f"{part}.core"] @ parameters[f"{shared}.U"]
            torch.testing.assert_close(change, wanted, rtol=1e-5, atol=1e-6)


def test_interleaved_rows_by_hand() -> None:
    """Two heads of two: q0 q1 k0 k1 v0 v1, and again; the values' rows are 4, 5, 10, 11."""

    class Twice(Addition):
        def forward(self, given: Tensor) -> Tensor:
            return 2 * given

        def matrix(self) -> Tensor:
            return 2 * torch.eye(4)

    values = Twice(nn.Linear(4, 12), torch.tensor([4, 5, 10, 11]))
    assert values.spread(torch.tensor([1.0, 2, 3, 4])).tolist() == [0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 3, 4]
    with pytest.raises(NotImplementedError):
        Twice(nn.Linear(4, 12), torch.tensor([0, 1, 4, 5]))


def test_the_factors_of_fact_are_saved_once() -> None:
    model = applied("medsam", FacTTuning(rank=3))
    names = [name for name in model.state_dict() if name.endswith((".U", ".V"))]
    assert names == ["image_encoder.fact.32_32.U", "image_encoder.fact.32_32.V"]
    assert torch.count_nonzero(model.state_dict()[names[1]]) == 0
    assert len(list(model.parameters())) == len({id(p) for p in model.parameters()})


def test_samed_can_train_the_prompt_encoders_default_embedding() -> None:
    model = applied("medsam", SAMedTuning(train=["mask_decoder", "prompt_encoder.no_mask_embed"]))
    prompts = {name for name, p in model.named_parameters() if p.requires_grad and name.startswith("prompt_encoder.")}
    assert prompts == {"prompt_encoder.no_mask_embed.weight"}


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("bits", QUANTISED)
def test_quantised_layers_learn_additions_and_merge_to_plain_ones(bits: Any, dora: bool) -> None:
    pytest.importorskip("bitsandbytes")
    tuning = LoRATuning(rank=2, quantize=bits, dora=dora)
    model = applied("medsam", tuning)
    before, plain = answer(model, "medsam"), answer(untouched("medsam"), "medsam")
    assert 0 < (before - plain).abs().max() < (2.0 if bits == "4bit" else 0.5), "it is not what it was, but near"
    assert {model.get_parameter(f"{name}.base_layer.weight").dtype for name in adapted(model)} == {
        torch.uint8 if bits == "4bit" else torch.int8
    }
    logits(model.train(), "medsam").square().mean().backward()
    learn = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name for name, p in model.named_parameters() if p.grad is not None} | {
        name for name in learn if "iou_prediction_head" in name
    } == learn
    randomise(model.eval())
    before = answer(model, "medsam")
    tuning.merge(model)
    difference = (answer(model, "medsam") - before).abs().max()
    assert difference < (1e-4 if bits == "4bit" else 0.5), "8-bit layers round their inputs too"
    assert list(model.state_dict()) == list(untouched("medsam").state_dict())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert {type(module) for module in model.modules()} == {type(module) for module in untouched("medsam").modules()}


@pytest.mark.parametrize("bits", QUANTISED)
def test_quantised_models_are_saved_loaded_and_copied(bits: Any) -> None:
    pytest.importorskip("bitsandbytes")
    model = applied("medsam", LoRATuning(rank=2, quantize=bits))
    randomise(model)
    before = answer(model, "medsam")
    fresh = make("medsam", seed=9)
    LoRATuning(rank=2, quantize=bits).apply(fresh)
    answer(fresh, "medsam")  # bitsandbytes moves constants about in the first call
    fresh.load_state_dict(model.state_dict(), strict=True)
    for twin in (fresh, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(answer(twin.eval(), "medsam"), before)


@pytest.mark.parametrize("bits", QUANTISED)
def test_quantising_what_has_no_weights_or_without_the_package(bits: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("bitsandbytes") is not None:
        with torch.device("meta"):
            model = FAMILIES["medsam"]()
        assert "plan has no weights" in message(lambda: LoRATuning(quantize=bits).apply(model))
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "bitsandbytes" else found(name, *a)
    )
    text = message(lambda: applied("medsam", LoRATuning(quantize=bits)))
    assert f"quantize: {bits} needs bitsandbytes" in text
