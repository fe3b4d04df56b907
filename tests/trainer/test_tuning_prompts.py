"""Visual prompt tuning against attention written out plainly, with the prompts in the sequence."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from encoders import ATTENTION, BLOCKS, FAMILIES, SIDES, logits, make
from torch import Tensor, nn
from transformers.models.sam.configuration_sam import SamVisionConfig
from transformers.models.sam.modeling_sam import SAM_VISION_ATTENTION_CLASSES, SamVisionAttention

from data_shards.errors import UserError
from trainer.models import MedSAM, SegmentationModel
from trainer.models.medsam import ViT
from trainer.prompts import Prompts
from trainer.tuning import HoulsbyTuning, LoRATuning, VisualPromptTuning
from trainer.tuning.prompted_attention import attend, kind_of
from trainer.tuning.visual_prompts import VisualPrompts

NORMS = {"medsam": "layer_norm1", "litemedsam": "attn.norm", "sam2": "norm1", "sam3": "layer_norm1"}
TOKENS = 5
CASES = [*((family, True) for family in FAMILIES), ("medsam", False), ("sam3", False)]

everywhere = pytest.mark.parametrize("family", FAMILIES)
every_case = pytest.mark.parametrize(("family", "deep"), CASES, ids=lambda value: str(value))


def prompt_names(family: str, deep: bool) -> list[str]:
    if not deep:
        return [f"{BLOCKS[family][0]}.prompts.tokens"]
    return [f"{block}.{ATTENTION[family]}.prompts.tokens" for block in BLOCKS[family]]


def message(action: Callable[[], Any]) -> str:
    with pytest.raises(UserError) as caught:
        action()
    raw: str = caught.value.args[0]
    assert "\n" not in raw
    return raw


def tuned(family: str, deep: bool = True, seed: int = 0, **arguments: Any) -> SegmentationModel:
    """A tiny model with prompts that are large enough to see."""
    model = make(family, seed)
    VisualPromptTuning(TOKENS, deep, **arguments).apply(model)
    generator = torch.Generator().manual_seed(seed + 7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("prompts.tokens"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def images_of(family: str) -> Tensor:
    return torch.rand(2, 3, SIDES[family], SIDES[family], generator=torch.Generator().manual_seed(1))


# --- attention by hand: everything is in one sequence, prompts first ---------------------------------------------


def softmax_attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | float) -> Tensor:
    """(V, h, N, d) each; the result is (V, N, h·d)."""
    scores = torch.einsum("vhid,vhjd->vhij", query, key) / math.sqrt(query.shape[-1]) + bias
    weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
    return torch.einsum("vhij,vhjd->vihd", weights, value).flatten(2)


def fused(layer: Any, sequence: Tensor, heads: int) -> list[Tensor]:
    """Queries, keys and values of a fused layer whose outputs are [queries, keys, values], (V, h, N, d) each."""
    made = sequence @ layer.weight.T + layer.bias
    return [part.reshape(*part.shape[:2], heads, -1).transpose(1, 2) for part in made.chunk(3, dim=-1)]


def offsets(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Distance in rows and in columns from every token to every other."""
    y, x = torch.arange(rows).repeat_interleave(columns), torch.arange(columns).repeat(rows)
    return y[:, None] - y[None], x[:, None] - x[None]


def sam_by_hand(attention: Any, windows: Tensor, prompts: Tensor, rest: Any = ()) -> tuple[Tensor, Tensor]:
    count, (_, rows, columns, _) = prompts.shape[-2], windows.shape
    sequence = torch.cat([prompts.expand(len(windows), -1, -1), windows.flatten(1, 2)], dim=1)
    query, key, value = fused(attention.qkv, sequence, attention.num_attention_heads)
    dy, dx = offsets(rows, columns)
    places = attention.rel_pos_h[dy + rows - 1] + attention.rel_pos_w[dx + columns - 1]
    bias = torch.zeros(*query.shape[:3], query.shape[2])
    bias[:, :, count:, count:] = torch.einsum("vhid,ijd->vhij", query[:, :, count:], places)
    output = softmax_attention(query, key, value, bias) @ attention.proj.weight.T + attention.proj.bias
    return output[:, count:].reshape(len(windows), rows, columns, -1), output[:, :count]


def tiny_vit_by_hand(attention: Any, windows: Tensor, prompts: Tensor, rest: Any = ()) -> tuple[Tensor, Tensor]:
    count, side, heads = prompts.shape[-2], math.isqrt(windows.shape[1]), attention.num_heads
    norm = attention.norm
    normed = (windows - windows.mean(-1, keepdim=True)) / (windows.var(-1, False, keepdim=True) + norm.eps).sqrt()
    tokens = normed * norm.weight + norm.bias
    sequence = torch.cat([prompts.expand(len(windows), -1, -1), tokens], dim=1)
    made = (sequence @ attention.qkv.weight.T + attention.qkv.bias).reshape(*sequence.shape[:2], heads, 3, -1)
    query, key, value = (made[:, :, :, i].transpose(1, 2) for i in range(3))
    dy, dx = offsets(side, side)
    bias = torch.zeros(1, heads, query.shape[2], query.shape[2])
    bias[0, :, count:, count:] = attention.attention_biases[:, dy.abs() * side + dx.abs()]
    output = softmax_attention(query, key, value, bias) @ attention.proj.weight.T + attention.proj.bias
    return output[:, count:], output[:, :count]


def hiera_by_hand(attention: Any, windows: Tensor, prompts: Tensor, rest: Any = ()) -> tuple[Tensor, Tensor]:
    count, (_, rows, columns, _) = prompts.shape[-2], windows.shape
    sequence = torch.cat([prompts.expand(len(windows), -1, -1), windows.flatten(1, 2)], dim=1)
    query, key, value = fused(attention.qkv, sequence, attention.num_heads)
    asked, query = query[:, :, :count], query[:, :, count:]
    if attention.q_pool:  # the largest of every 2 × 2 tokens, channel by channel
        query = query.reshape(*query.shape[:2], rows // 2, 2, columns // 2, 2, -1).amax(dim=(3, 5)).flatten(2, 3)
        rows, columns = rows // 2, columns // 2
    mixed = softmax_attention(torch.cat([asked, query], dim=2), key, value, 0.0)
    output = mixed @ attention.proj.weight.T + attention.proj.bias
    return output[:, count:].reshape(len(windows), rows, columns, -1), output[:, :count]


def sam3_by_hand(attention: Any, windows: Tensor, prompts: Tensor, rest: Any = ()) -> tuple[Tensor, Tensor]:
    count, (_, rows, columns, _) = prompts.shape[-2], windows.shape
    sequence = torch.cat([prompts.expand(len(windows), -1, -1), windows.flatten(1, 2)], dim=1)
    cos, sin = (part.reshape(rows * columns, -1)[:, ::2] for part in rest[0])

    def made(layer: Any, rotated: bool) -> Tensor:
        heads = (sequence @ layer.weight.T + layer.bias).reshape(*sequence.shape[:2], attention.num_attention_heads, -1)
        heads = heads.transpose(1, 2).clone()
        if rotated:  # a pair of channels is a complex number, and a place is an angle
            pairs = torch.view_as_complex(heads[:, :, count:].unflatten(-1, (-1, 2)).contiguous())
            heads[:, :, count:] = torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(-2)
        return heads

    query, key, value = (
        made(getattr(attention, f"{name}_proj"), rotated) for name, rotated in (("q", True), ("k", True), ("v", False))
    )
    output = softmax_attention(query, key, value, 0.0) @ attention.o_proj.weight.T + attention.o_proj.bias
    return output[:, count:].reshape(len(windows), rows, columns, -1), output[:, :count]


BY_HAND: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "medsam": sam_by_hand,
    "litemedsam": tiny_vit_by_hand,
    "sam2": hiera_by_hand,
    "sam3": sam3_by_hand,
}


def recorded(model: SegmentationModel, family: str, names: list[str]) -> dict[str, Any]:
    """What modules are given, and what they give, while two images are encoded."""
    seen: dict[str, Any] = {}

    def hook(name: str) -> Callable[..., None]:
        def keep(module: nn.Module, inputs: Any, named: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output
            seen[name] = ([*inputs, *named.values()], first)

        return keep

    handles = [model.get_submodule(name).register_forward_hook(hook(name), with_kwargs=True) for name in names]
    model.encode(images_of(family))
    for handle in handles:
        handle.remove()
    return seen


@everywhere
@torch.no_grad()
def test_deep_prompts_by_hand_in_every_block(family: str) -> None:
    """In every window, at its edges and in global blocks; what comes out at the prompts is thrown away."""
    model, untouched = tuned(family), make(family)
    names = [f"{block}.{ATTENTION[family]}" for block in BLOCKS[family]]
    seen = recorded(model, family, names)
    for block, name in zip(BLOCKS[family], names, strict=True):
        attention: Any = untouched.get_submodule(name)
        norm: Any = untouched.get_submodule(f"{block}.{NORMS[family]}")
        (windows, *rest), output = seen[name]
        prompts = norm(model.get_parameter(f"{name}.prompts.tokens"))
        wanted, _ = BY_HAND[family](attention, windows, prompts, rest)
        torch.testing.assert_close(output, wanted)
        without, _ = BY_HAND[family](attention, windows, prompts[:0], rest)
        assert (without - wanted).abs().max() > 1e-4, "the prompts do something"


@everywhere
@torch.no_grad()
def test_without_prompts_attention_is_the_familys_own(family: str) -> None:
    """What is relied on inside the families is as in this release."""
    model = make(family)
    names = [block.attention for block in model.blocks()]
    seen = recorded(model, family, names)
    for block in model.blocks():
        (windows, *rest), wanted = seen[block.attention]
        attention = model.get_submodule(block.attention)
        given, _ = attend(attention, kind_of(model, block), windows, torch.zeros(1, 0, block.width_in), tuple(rest))
        torch.testing.assert_close(given, wanted)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@torch.no_grad()
def test_deep_prompts_are_tokens_in_front_of_the_sequence(implementation: str) -> None:
    """transformers' own attention on the longer sequence, where no relative position is in the way."""
    model = make_sam(implementation)
    VisualPromptTuning(TOKENS).apply(model)
    attention: Any = model.get_submodule("image_encoder.layers.1.attn")
    attention.use_rel_pos = False
    windows = torch.randn(3, 4, 4, 32, generator=torch.Generator().manual_seed(2))
    prompts = model.image_encoder.layers[1].layer_norm1(attention.prompts.tokens)
    sequence = torch.cat([prompts.expand(3, -1, -1), windows.flatten(1, 2)], dim=1)[:, :, None]
    wanted = type(attention).forward(attention, sequence)[0][:, TOKENS:, 0].reshape(3, 4, 4, 32)
    torch.testing.assert_close(attention(hidden_states=windows)[0], wanted)


def make_sam(implementation: Any, recompute: bool = False) -> MedSAM:
    torch.manual_seed(0)
    shape = ViT(width=32, depth=3, heads=2, global_blocks=(1,), window=3)
    model = MedSAM(shape, 64, weights=None, attention=implementation, checkpoint_activations=recompute)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("deep", [True, False])
@torch.no_grad()
def test_both_of_sams_attentions_agree(deep: bool) -> None:
    features = []
    for implementation in ("eager", "sdpa"):
        model = make_sam(implementation)
        attention = model.get_submodule("image_encoder.layers.0.attn")
        assert isinstance(attention, SAM_VISION_ATTENTION_CLASSES[implementation])
        torch.manual_seed(1)
        VisualPromptTuning(TOKENS, deep).apply(model)
        features.append(model.encode(images_of("medsam")))
    torch.testing.assert_close(features[0], features[1], atol=1e-5, rtol=1e-4)


def shallow_block_by_hand(
    family: str, block: Any, tokens: Tensor, prompts: Tensor, positions: Any
) -> tuple[Tensor, Tensor]:
    """One block on one image: tokens (H, W, C) and prompts (P, C); windows one after another."""
    height, width, channels = tokens.shape
    side = block.window_size or height
    attention = getattr(block, ATTENTION[family])
    normed = torch.zeros(-(-height // side) * side, -(-width // side) * side, channels)
    normed[:height, :width] = block.layer_norm1(tokens)
    mixed, answers = torch.zeros_like(normed), []
    for top in range(0, len(normed), side):
        for left in range(0, normed.shape[1], side):
            place = (slice(top, top + side), slice(left, left + side))
            output, answer = BY_HAND[family](attention, normed[place][None], block.layer_norm1(prompts), positions)
            mixed[place] = output[0]
            answers.append(answer[0])
    tokens = tokens + mixed[:height, :width]
    prompts = prompts + torch.stack(answers).mean(0)
    return tokens + block.mlp(block.layer_norm2(tokens)), prompts + block.mlp(block.layer_norm2(prompts))


@pytest.mark.parametrize("family", ["medsam", "sam3"])
@pytest.mark.parametrize("count", [1, 4, 5])  # less than a row, a row, more than a row of tokens
@torch.no_grad()
def test_shallow_prompts_by_hand_through_all_blocks(family: str, count: int) -> None:
    model, untouched = make(family), make(family)
    VisualPromptTuning(count, deep=False).apply(model)
    model.get_parameter(f"{BLOCKS[family][0]}.prompts.tokens").normal_(generator=torch.Generator().manual_seed(4))
    seen = recorded(model, family, [BLOCKS[family][0], BLOCKS[family][-1]])
    (images, *_), _ = seen[BLOCKS[family][0]]
    wanted = []
    for tokens in images:
        prompts: Tensor = model.get_parameter(f"{BLOCKS[family][0]}.prompts.tokens")
        for name in BLOCKS[family]:
            block: Any = untouched.get_submodule(name)
            positions = [block.rotary_emb(tokens, block.position_ids)] if family == "sam3" else []
            tokens, prompts = shallow_block_by_hand(family, block, tokens, prompts, positions)
        wanted.append(tokens)
    torch.testing.assert_close(seen[BLOCKS[family][-1]][1], torch.stack(wanted))


# --- what learns, saving, copying ---------------------------------------------------------------------------------


@every_case
def test_exactly_the_prompts_and_what_is_named_learn(family: str, deep: bool) -> None:
    model, untouched = tuned(family, deep), dict(make(family).named_parameters())
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    decoder = {name for name in untouched if name.startswith("mask_decoder.")}
    assert learning == {*prompt_names(family, deep), *decoder}
    assert {name for name, _ in model.named_parameters()} == {*prompt_names(family, deep), *untouched}
    only = make(family)
    VisualPromptTuning(TOKENS, deep, train=()).apply(only)
    assert {n for n, parameter in only.named_parameters() if parameter.requires_grad} == {*prompt_names(family, deep)}


@pytest.mark.parametrize(
    ("family", "deep", "widths"),
    [
        ("medsam", True, [32] * 3),
        ("medsam", False, [32]),
        ("litemedsam", True, [128] * 2 + [160] * 6 + [320] * 2),
        ("sam2", True, [16, 16, 32, 32, 64, 64]),  # a stage's first block takes the width of the stage before
        ("sam3", False, [32]),
    ],
)
def test_shapes_by_hand(family: str, deep: bool, widths: list[int]) -> None:
    model = tuned(family, deep)
    shapes = [tuple(model.get_parameter(name).shape) for name in prompt_names(family, deep)]
    assert shapes == [(TOKENS, width) for width in widths]


def test_parameters_of_the_original_size() -> None:
    """ViT-B, VPT-Deep with 50 prompts: 12 · 50 · 768."""
    with torch.device("meta"):
        model = MedSAM("vit_b", weights=None)
        VisualPromptTuning(50, train=()).apply(model)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 460_800
    assert all(parameter.is_meta for parameter in model.parameters())


@every_case
def test_a_plan_needs_no_memory(family: str, deep: bool) -> None:
    model = FAMILIES[family]().to("meta")  # sam2's own constructor needs memory
    with torch.device("meta"):
        VisualPromptTuning(TOKENS, deep).apply(model)
    assert all(parameter.is_meta for parameter in model.parameters())


def test_the_start_is_vpts() -> None:
    model = make("medsam")
    VisualPromptTuning(500).apply(model)
    bound = math.sqrt(6 / (3 * 16 * 16 + 32))
    tokens = model.get_parameter("image_encoder.layers.0.attn.prompts.tokens").detach()
    assert 0.99 * bound < tokens.abs().max() <= bound
    assert float(tokens.std()) == pytest.approx(bound / math.sqrt(3), rel=0.02)


@every_case
def test_gradients_reach_every_prompt_and_nothing_that_is_frozen(family: str, deep: bool) -> None:
    model = tuned(family, deep)
    boxes = torch.tensor([[5.0, 8.0, 50.0, 52.0], [20.0, 20.0, 30.0, 40.0]])
    masks, scores = model.decode(model.encode(images_of(family)), Prompts(torch.tensor([0, 1]), boxes))
    (masks.square().mean() + scores.square().mean()).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        if name.endswith("prompts.tokens"):
            assert parameter.grad is not None and parameter.grad.abs().amax(dim=1).min() > 0, f"every prompt of {name}"


@every_case
@torch.no_grad()
def test_saved_prompts_load_strictly_into_a_fresh_model(family: str, deep: bool) -> None:
    model, other = tuned(family, deep), tuned(family, deep, seed=5)
    wanted = logits(model, family)
    assert not torch.equal(wanted, logits(make(family), family)), "prompts change what comes out"
    other.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(logits(other, family), wanted)


@every_case
@torch.no_grad()
def test_a_copy_computes_with_its_own_prompts_and_weights(family: str, deep: bool) -> None:
    model = tuned(family, deep)
    wanted = logits(model, family)
    twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for parameter in model.parameters():
        parameter.zero_()
    for twin in twins:
        assert torch.equal(logits(twin, family), wanted), "the copy does not look at the original"
        for name in prompt_names(family, deep):
            twin.get_parameter(name).mul_(-2)
        assert not torch.equal(logits(twin, family), wanted), "nor does the original's hook act on it"


# --- training -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("deep", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_recomputed_activations_give_the_same_gradients(deep: bool, dropout: float) -> None:
    gradients, calls = [], []
    for recompute in (False, True):
        model = make_sam("eager", recompute).train()
        torch.manual_seed(1)
        VisualPromptTuning(TOKENS, deep, dropout).apply(model)
        count = [0]

        def called(module: nn.Module, inputs: Any, count: list[int] = count) -> None:
            count[0] += 1

        model.get_submodule("image_encoder.layers.1.mlp.lin1").register_forward_pre_hook(called)
        torch.manual_seed(2)
        model.encode(images_of("medsam")).square().mean().backward()
        gradients.append({name: model.get_parameter(name).grad for name in prompt_names("medsam", deep)})
        calls.append(count[0])
    assert calls[1] == 2 * calls[0], "the block was computed a second time"
    for name, gradient in gradients[0].items():
        assert gradient is not None and gradient.any()
        torch.testing.assert_close(gradients[1][name], gradient)


@every_case
def test_half_precision(family: str, deep: bool) -> None:
    model = tuned(family, deep)
    exact = model.encode(images_of(family)).detach()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = model.encode(images_of(family))
    assert (rounded - exact).norm() < 0.05 * exact.norm()
    rounded.float().square().mean().backward()
    for name in prompt_names(family, deep):
        gradient = model.get_parameter(name).grad
        assert gradient is not None and gradient.isfinite().all() and gradient.any(), name


def test_dropout_is_for_training_alone() -> None:
    torch.manual_seed(0)
    prompts = VisualPrompts(200, 50, 1.0, dropout=0.25)
    dropped = prompts.train()()[0]
    gone = dropped == 0
    assert float(gone.float().mean()) == pytest.approx(0.25, abs=0.02)
    torch.testing.assert_close(dropped[~gone], prompts.tokens[~gone] / 0.75)
    assert torch.equal(prompts.eval()()[0], prompts.tokens)


@torch.no_grad()
def test_attentions_own_dropout_stays() -> None:
    config = SamVisionConfig(hidden_size=32, num_attention_heads=2, image_size=64, attention_dropout=0.5)
    model = make_sam("eager")
    model.image_encoder.layers[1].attn = SamVisionAttention(config, window_size=0)
    VisualPromptTuning(TOKENS).apply(model)
    attention: Any = model.image_encoder.layers[1].attn
    windows = torch.randn(1, 4, 4, 32)
    attention.train()
    assert not torch.equal(attention(windows)[0], attention(windows)[0])
    attention.eval()
    assert torch.equal(attention(windows)[0], attention(windows)[0])


# --- mistakes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ({"tokens": 0}, "tokens is 1 prompt or more, not 0"),
        ({"tokens": -3}, "tokens"),
        ({"dropout": 1.0}, "dropout is in [0, 1), not 1.0"),
        ({"dropout": -0.1}, "dropout"),
        ({"rates": {"image_encoder": -1}}, "rates: image_encoder"),
    ],
)
def test_arguments_out_of_range(arguments: dict[str, Any], what: str) -> None:
    assert what in message(lambda: VisualPromptTuning(**arguments))


@pytest.mark.parametrize("family", ["litemedsam", "sam2"])
def test_shallow_prompts_do_not_go_through_a_pyramid(family: str) -> None:
    model = make(family)
    text = message(lambda: VisualPromptTuning(deep=False).apply(model))
    assert "not all of one width: set deep to true" in text
    assert type(model).__name__ in text


@every_case
def test_prompts_are_not_folded(family: str, deep: bool) -> None:
    text = message(lambda: VisualPromptTuning(deep=deep).merge(tuned(family, deep)))
    assert text.startswith("VisualPromptTuning cannot be folded")


@every_case
def test_a_model_is_tuned_once(family: str, deep: bool) -> None:
    model = tuned(family, deep)
    for other in (VisualPromptTuning(), HoulsbyTuning(), LoRATuning()):
        assert "fresh model" in message(lambda other=other: other.apply(model))  # type: ignore[misc]


def test_a_pattern_that_matches_nothing() -> None:
    model = make("medsam")
    text = message(lambda: VisualPromptTuning(train=["mask_decoderr"]).apply(model))
    assert "'mask_decoderr' matches no parameter of MedSAM" in text


def test_a_model_without_blocks() -> None:
    model = make("medsam")
    model.image_encoder = nn.Conv2d(3, 256, 16, 16)
    assert "MedSAM has no transformer blocks" in message(lambda: VisualPromptTuning().apply(model))


def test_a_release_that_is_built_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("medsam")
    with monkeypatch.context() as patch:
        patch.delattr(SamVisionAttention, "get_decomposed_rel_pos")
        assert "SamVisionAttention, which lacks get_decomposed_rel_pos" in message(
            lambda: VisualPromptTuning().apply(model)
        )

    def forward(self: Any, hidden_states: Tensor, places: Tensor) -> Tensor:
        return F.relu(hidden_states + places)

    monkeypatch.setattr(type(model.get_submodule("image_encoder.layers.0.attn")), "forward", forward)
    text = message(lambda: VisualPromptTuning().apply(model))
    assert "takes hidden_states, places" in text and "another tuning method" in text
