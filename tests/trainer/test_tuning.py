"""What learns, and how fast."""

from __future__ import annotations

import copy

import pytest
import torch
from encoders import learning
from torch import nn

from data_shards.errors import UserError
from trainer.models import LiteMedSAM
from trainer.prompts import Prompts
from trainer.tuning import (
    FacTTuning,
    FrozenEncoderTuning,
    FullTuning,
    LoRATuning,
    SAMedTuning,
    SelectiveTuning,
    SSFTuning,
    Tuning,
)

EMBEDDING = "prompt_encoder.shared_embedding.positional_embedding"


@pytest.fixture
def model(small) -> LiteMedSAM:
    return copy.deepcopy(small)


@torch.no_grad()
def logits(model: LiteMedSAM) -> torch.Tensor:
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    boxes = torch.tensor([[5.0, 8.0, 50.0, 60.0], [20.0, 20.0, 30.0, 40.0]])
    return model.decode(model.encode(image), Prompts(torch.zeros(2, dtype=torch.int64), boxes))[0]


def groups_by_name(model: LiteMedSAM, tuning: Tuning, lr: float, weight_decay: float) -> dict[str, dict[str, float]]:
    """Every grouped parameter's settings; a parameter must not be in two groups."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found: dict[str, dict[str, float]] = {}
    for group in tuning.parameter_groups(model, lr, weight_decay):
        for parameter in group["params"]:
            assert names[id(parameter)] not in found
            found[names[id(parameter)]] = {key: group[key] for key in ("lr", "weight_decay")}
    return found


def message(action) -> str:
    with pytest.raises(UserError) as caught:
        action()
    raw = caught.value.args[0]
    assert "\n" not in raw
    return raw


def test_layer_decay_by_hand(model):
    tuning = FullTuning(layer_decay=0.8)
    tuning.apply(model)
    groups = groups_by_name(model, tuning, lr=2e-4, weight_decay=0.01)
    trunk = "image_encoder.trunk."
    depth_below_heads = {
        f"{trunk}patch_embed.conv1.conv.weight": 13,
        f"{trunk}stages.0.blocks.0.conv1.conv.weight": 12,
        f"{trunk}stages.0.blocks.1.conv3.bn.bias": 11,
        f"{trunk}stages.1.downsample.conv1.conv.weight": 10,
        f"{trunk}stages.1.blocks.0.attn.qkv.weight": 10,
        f"{trunk}stages.2.blocks.5.mlp.fc2.bias": 3,
        f"{trunk}stages.3.downsample.conv3.bn.weight": 2,
        f"{trunk}stages.3.blocks.1.attn.attention_biases": 1,
        "image_encoder.neck.0.weight": 0,
        "mask_decoder.iou_token.weight": 0,
    }
    for name, below in depth_below_heads.items():
        assert groups[name]["lr"] == pytest.approx(2e-4 * 0.8**below), name


@pytest.mark.parametrize(
    "tuning", [FullTuning(), FullTuning(layer_decay=0.9, freeze=()), LoRATuning(), LoRATuning(train=())]
)
def test_whatever_learns_is_in_one_group_and_matrices_alone_decay(model, tuning):
    tuning.apply(model)
    groups = groups_by_name(model, tuning, lr=1e-3, weight_decay=0.05)
    assert groups.keys() == learning(model)
    assert EMBEDDING not in groups
    parameters = dict(model.named_parameters())
    for name, group in groups.items():
        vector = parameters[name].ndim == 1 or name.endswith(("bias", "attention_biases"))
        assert group["weight_decay"] == (0.0 if vector else 0.05)
    assert {group["weight_decay"] for group in groups.values()} >= {0.05}


def test_without_layer_decay_every_rate_is_the_same(model):
    tuning = FullTuning()
    tuning.apply(model)
    assert {group["lr"] for group in groups_by_name(model, tuning, 1e-3, 0.0).values()} == {1e-3}


def test_a_papers_depth_slows_the_blocks_but_not_the_heads(model):
    tuning = FullTuning(layer_decay=0.8, depth=15)
    tuning.apply(model)
    groups = groups_by_name(model, tuning, lr=1.0, weight_decay=0.0)
    trunk = "image_encoder.trunk."
    for name, below in {
        f"{trunk}patch_embed.conv1.conv.weight": 16,
        f"{trunk}stages.0.blocks.0.conv1.conv.weight": 15,
        f"{trunk}stages.3.blocks.1.attn.qkv.weight": 4,
        "image_encoder.neck.0.weight": 0,
        "mask_decoder.iou_token.weight": 0,
    }.items():
        assert groups[name]["lr"] == pytest.approx(0.8**below), name


def test_the_models_own_depth_is_the_default(model):
    rates = [FullTuning(layer_decay=0.8, depth=depth).learning_rate_scales(model) for depth in (None, 12)]
    assert rates[0] == rates[1]
    assert "depth is the number of layers" in message(lambda: FullTuning(layer_decay=0.8, depth=0))


def test_blocks_above_a_papers_depth_learn_as_the_heads(model):
    """As with Medical SAM3's L = 12 on 32 blocks."""
    rates = FullTuning(layer_decay=0.8, depth=5).learning_rate_scales(model)
    trunk = "image_encoder.trunk."
    assert rates[f"{trunk}patch_embed.conv1.conv.weight"] == pytest.approx(0.8**6)
    assert rates[f"{trunk}stages.0.blocks.0.conv1.conv.weight"] == pytest.approx(0.8**5)
    assert rates[f"{trunk}stages.2.blocks.0.attn.qkv.weight"] == pytest.approx(0.8), "block 5"
    assert rates[f"{trunk}stages.2.blocks.1.attn.qkv.weight"] == rates[f"{trunk}stages.3.blocks.1.attn.qkv.weight"] == 1


def test_rates_multiply_layer_decay_and_the_last_that_fits_counts(model):
    rates = {"image_encoder": 0.1, "image_encoder.neck": 0.5, "*.iou_token.weight": 3.0}
    for tuning, decayed in ((FullTuning(layer_decay=0.8, rates=rates), 0.8**13), (FullTuning(rates=rates), 1.0)):
        scales = tuning.learning_rate_scales(model)
        assert scales["image_encoder.trunk.patch_embed.conv1.conv.weight"] == pytest.approx(0.1 * decayed)
        assert scales["image_encoder.neck.0.weight"] == pytest.approx(0.5)
        assert scales["mask_decoder.iou_token.weight"] == pytest.approx(3.0)
        assert scales["mask_decoder.mask_tokens.weight"] == 1.0


def test_rates_reach_adapters(model):
    tuning = LoRATuning(rates={"image_encoder": 0.5, "*.lora_B.*": 8.0})
    tuning.apply(model)
    scales = tuning.learning_rate_scales(model)
    assert {rate for name, rate in scales.items() if ".lora_A." in name} == {0.5}
    assert {rate for name, rate in scales.items() if ".lora_B." in name} == {8.0}
    assert {rate for name, rate in scales.items() if name.startswith("mask_decoder.")} == {1.0}


@pytest.mark.parametrize(
    ("rates", "what"),
    [
        ({"image_encodr": 0.1}, "'image_encodr' matches no parameter of LiteMedSAM"),
        ({"prompt_encoder": 0.1}, "rates: prompt_encoder: FullTuning lets nothing of it learn"),
    ],
)
def test_rates_of_what_is_not_there_or_does_not_learn(model, rates, what):
    tuning = FullTuning(rates=rates)
    tuning.apply(model)
    assert what in message(lambda: tuning.check_learns(model))


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan")])
def test_a_rate_is_above_zero(rate):
    assert "rates: mask_decoder" in message(lambda: SSFTuning(rates={"mask_decoder": rate}))


def test_full_tuning_freezes_the_prompt_encoder_and_nothing_else(model):
    FullTuning().apply(model)
    assert learning(model) == {n for n, _ in model.named_parameters() if not n.startswith("prompt_encoder.")}


def test_the_positional_embedding_never_learns(model):
    FullTuning(freeze=()).apply(model)
    assert learning(model) == {name for name, _ in model.named_parameters()} - {EMBEDDING}
    LoRATuning(train=("mask_decoder", "prompt_encoder", EMBEDDING)).apply(model)
    assert EMBEDDING not in learning(model)
    assert "prompt_encoder.no_mask_embed.weight" in learning(model)


@pytest.mark.parametrize(
    ("pattern", "frozen"),
    [
        ("image_encoder", lambda name: name.startswith("image_encoder.")),
        ("image_encoder.*", lambda name: name.startswith("image_encoder.")),
        ("image_encoder.trunk.stages.1", lambda name: name.startswith("image_encoder.trunk.stages.1.")),
        ("*.bias", lambda name: name.endswith(".bias")),
        ("mask_decoder.iou_token.weight", lambda name: name == "mask_decoder.iou_token.weight"),
    ],
)
def test_freeze_takes_prefixes_and_shell_patterns(model, pattern, frozen):
    FullTuning(freeze=[pattern]).apply(model)
    expected = {name for name, _ in model.named_parameters() if not frozen(name)} - {EMBEDDING}
    assert learning(model) == expected


@pytest.mark.parametrize("pattern", ["promt_encoder", "image_enc", "encoder.*", ""])
def test_a_pattern_that_matches_nothing_is_a_mistake(model, pattern):
    text = message(lambda: FullTuning(freeze=[pattern]).apply(model))
    assert f"'{pattern}' matches no parameter of LiteMedSAM" in text
    assert "image_encoder, mask_decoder, prompt_encoder" in text
    for method in (LoRATuning, SAMedTuning, FacTTuning, SSFTuning, FrozenEncoderTuning):
        tuning = method(train=[pattern])
        assert f"'{pattern}'" in message(lambda tuning=tuning: tuning.apply(copy.deepcopy(model)))


def test_freezing_everything_is_a_mistake(model):
    tuning = FullTuning(freeze=["*"])
    tuning.apply(model)
    assert "FullTuning leaves nothing to learn" in message(lambda: tuning.parameter_groups(model, 1e-3, 0.0))
    assert "FullTuning leaves nothing to learn" in message(lambda: tuning.check_learns(model))


def test_training_nothing_beside_a_frozen_encoder_is_a_mistake(model):
    tuning = FrozenEncoderTuning(train=())
    tuning.apply(model)
    assert "FrozenEncoderTuning leaves nothing to learn" in message(lambda: tuning.check_learns(model))
    tuning = FrozenEncoderTuning(train=["mask_decoder.iou_token"])
    tuning.apply(model)
    tuning.check_learns(model)
    assert learning(model) == {"mask_decoder.iou_token.weight"}


@pytest.mark.parametrize("pattern", ["image_encoder.neck", "*"])
def test_a_frozen_encoder_stays_frozen(model, pattern):
    text = message(lambda: FrozenEncoderTuning(train=[pattern]).apply(model))
    assert f"'{pattern}' takes image_encoder." in text


@pytest.mark.parametrize(
    ("arguments", "what"),
    [({}, "selects nothing"), ({"last_blocks": -1}, "last_blocks is 0 or more")],
)
def test_selecting_nothing_is_a_mistake(arguments, what):
    assert what in message(lambda: SelectiveTuning(**arguments))


def test_there_are_only_so_many_blocks(model):
    SelectiveTuning(last_blocks=10).apply(model)
    assert "last_blocks 11: LiteMedSAM has 10" in message(lambda: SelectiveTuning(last_blocks=11).apply(model))


@pytest.mark.parametrize("first", [LoRATuning(), SAMedTuning(), FacTTuning(), SSFTuning()])
def test_a_second_method_on_the_same_model_is_a_mistake(model, first):
    first.apply(model)
    for second in (first, FullTuning(), LoRATuning(), SAMedTuning(), SSFTuning(), SelectiveTuning(norms=True)):
        assert "carries the parts of a tuning method already" in message(lambda tuning=second: tuning.apply(model))
    first.merge(model)
    FullTuning().apply(model)


@pytest.mark.parametrize("layer_decay", [0.0, -0.5, 1.1])
def test_layer_decay_out_of_range(layer_decay):
    assert "layer_decay" in message(lambda: FullTuning(layer_decay=layer_decay))


def test_lora_changes_nothing_before_training(model, small):
    LoRATuning(dropout=0.1).apply(model)
    assert torch.equal(logits(model.eval()), logits(small))


def test_lora_trains_its_matrices_and_the_mask_decoder_only(model):
    LoRATuning(rank=4).apply(model)
    found = learning(model)
    adapters = {name for name in found if ".lora_A." in name or ".lora_B." in name}
    assert found - adapters == {n for n, _ in model.named_parameters() if n.startswith("mask_decoder.")}
    # ten blocks with attention, four linear layers in each, two matrices for each
    assert len(adapters) == 10 * 4 * 2
    assert all(name.startswith("image_encoder.trunk.stages.") for name in adapters)
    parameters = dict(model.named_parameters())
    assert {min(parameters[name].shape) for name in adapters} == {4}


def test_lora_is_scaled_by_alpha_over_rank_and_merges_exactly(model, small):
    original = small.state_dict()
    tuning = LoRATuning(rank=4, alpha=6.0)
    tuning.apply(model)
    torch.manual_seed(0)
    name = "image_encoder.trunk.stages.2.blocks.1.attn.qkv"
    for parameter_name, parameter in model.named_parameters():
        if ".lora_B." in parameter_name:
            nn.init.normal_(parameter, std=0.02)
    layer = model.get_submodule(name)
    addition = layer.lora_B["default"].weight @ layer.lora_A["default"].weight * (6.0 / 4)
    before = logits(model.eval())
    assert (before - logits(small)).abs().max() > 1e-2, "the adapters do something"

    tuning.merge(model)
    merged = model.state_dict()
    assert list(merged) == list(original)
    torch.testing.assert_close(merged[f"{name}.weight"], original[f"{name}.weight"] + addition.detach())
    after = logits(model)
    assert (after - before).abs().max() <= 1e-5 * before.abs().max(), "the logits reach 33, and this is float32"
    assert not [module for module in model.modules() if "lora" in type(module).__module__]
    assert {key for key in merged if not torch.equal(merged[key], original[key])} == {
        f"{n}.weight" for n, _ in small.named_modules() if n.endswith((".qkv", ".proj", ".fc1", ".fc2"))
    }
    assert torch.equal(logits(model.at_size(64)), logits(model)), "a merged model can be copied"


def test_lora_merges_to_the_same_function(model):
    """In double precision nothing but the rounding of the weights is left."""
    tuning = LoRATuning(rank=2)
    tuning.apply(model)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            nn.init.normal_(parameter, std=0.02, generator=torch.Generator().manual_seed(0))
    encoder = model.eval().image_encoder.double()
    images = torch.rand(1, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        before = encoder(images)
        tuning.merge(model)
        assert (encoder(images) - before).abs().max() < 1e-10


def test_lora_targets_can_be_chosen(model):
    LoRATuning(targets=r".*stages\.3\.blocks\.1\.attn\.qkv").apply(model)
    adapters = {name.rpartition(".lora_")[0] for name in learning(model) if "lora_" in name}
    assert adapters == {"image_encoder.trunk.stages.3.blocks.1.attn.qkv"}


@pytest.mark.parametrize(
    ("targets", "what"),
    [
        (r".*\.query", "match no module of LiteMedSAM"),
        ("qkv", "match no module"),  # the whole name has to match
        ("(", "no regular expression"),
        ("image_encoder", "takes no adapter"),
    ],
)
def test_lora_targets_that_do_not_fit(model, targets, what):
    text = message(lambda: LoRATuning(targets=targets).apply(model))
    assert f"'{targets}'" in text
    assert what in text


@pytest.mark.parametrize("arguments", [{"rank": 0}, {"rank": -2}, {"dropout": -0.1}, {"dropout": 1.0}])
@pytest.mark.parametrize("method", [LoRATuning, SAMedTuning, FacTTuning])
def test_low_ranks_and_dropouts_out_of_range(method, arguments):
    (name,) = arguments
    assert name in message(lambda: method(**arguments))


def test_scales_out_of_range():
    assert "alpha is above 0" in message(lambda: LoRATuning(alpha=0))
    assert "scale is above 0" in message(lambda: FacTTuning(scale=0))
