"""Every way of attention with decomposed relative positions gives the plain one's values and gradients."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
from segment_anything.modeling.image_encoder import Attention, ImageEncoderViT
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.sam.configuration_sam import SamVisionConfig
from transformers.models.sam.modeling_sam import SamVisionAttention, SamVisionSdpaAttention

from data_shards.errors import UserError
from trainer.models import MedSAM, attention_chunks
from trainer.models import attention as ways
from trainer.models.attention import SamVisionRelativeAttention, chosen_way, lines
from trainer.models.medsam import ViT, to_original
from trainer.rehearsal import as_on_cuda
from trainer.tuning import LoRATuning

FUSED = ("sdpa", "widened", "chunked")
GRIDS = [(8, 8), (5, 9), (1, 3), (14, 14)]


def plain(height, width, heads=2, channels=8, dtype=torch.float64) -> SamVisionAttention:
    """transformers' own, with positions that are not zero."""
    torch.manual_seed(0)
    config = SamVisionConfig(hidden_size=heads * channels, num_attention_heads=heads, attention_dropout=0.0)
    made = SamVisionAttention(config, window_size=height)
    made.rel_pos_h = nn.Parameter(torch.randn(2 * height - 1, channels))
    made.rel_pos_w = nn.Parameter(torch.randn(2 * width - 1, channels))
    return made.to(dtype)


def official(module, size) -> Attention:
    """The original, which takes the softmax in fp64 where transformers' takes it in fp32."""
    made = Attention(16, 2, use_rel_pos=True, input_size=size).to(module.proj.weight)
    made.load_state_dict(module.state_dict())
    return made


def answers(module, tokens, weight, autocast=False) -> dict[str, torch.Tensor]:
    """Output, and the gradients of tokens and of all weights."""
    module.zero_grad()
    asking = tokens.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        found = module(asking)
    found = found[0] if isinstance(found, tuple) else found
    (found * weight).sum().backward()
    found_all = {"output": found.detach(), "tokens": asking.grad}
    return found_all | {name: parameter.grad.clone() for name, parameter in module.named_parameters()}


def apart(ours, theirs) -> float:
    """The largest difference, as a share of the largest value; of a table of one row, whose gradient is 0, as it is."""
    assert ours.keys() == theirs.keys()
    sizes = {name: 1.0 if len(value) == 1 else float(value.abs().max()) for name, value in theirs.items()}
    assert min(sizes.values()) > 0
    return max(float((ours[name] - theirs[name]).abs().max()) / sizes[name] for name in theirs)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("way", ["eager", *FUSED])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-10), (torch.float32, 2e-4)])
def test_values_and_gradients_are_those_of_the_plain_form(way, grid, dtype, limit, monkeypatch):
    monkeypatch.setattr(attention_chunks, "SCORES", 300)  # several chunks, and a last one that is smaller
    module = plain(*grid, dtype=dtype)
    tokens, weight = (torch.randn(3, *grid, 16, dtype=dtype) for _ in range(2))
    theirs = answers(module if dtype == torch.float32 else official(module, grid), tokens, weight)
    assert apart(answers(SamVisionRelativeAttention(module, way), tokens, weight), theirs) < limit


@pytest.mark.parametrize("way", FUSED)
def test_autocast_is_as_far_from_exact_as_the_plain_form(way):
    module = plain(9, 9, dtype=torch.float32)
    tokens, weight = (torch.randn(3, 9, 9, 16) for _ in range(2))
    exact = answers(module, tokens, weight)
    error = apart(answers(module, tokens, weight, autocast=True), exact)
    found = answers(SamVisionRelativeAttention(copy.deepcopy(module), way), tokens, weight, autocast=True)
    assert found["output"].dtype == torch.bfloat16
    assert 0 < apart(found, exact) < 1.5 * error


@pytest.mark.parametrize("scores", [1, 7 * 49, 2**20])
def test_chunks_of_any_size_give_the_same(scores, monkeypatch):
    module = SamVisionRelativeAttention(plain(7, 7), "chunked")
    tokens, weight = (torch.randn(4, 7, 7, 16, dtype=torch.float64) for _ in range(2))
    expected = answers(module, tokens, weight)
    monkeypatch.setattr(attention_chunks, "SCORES", scores)
    assert apart(answers(module, tokens, weight), expected) < 1e-12


def test_chunks_are_one_deterministic_operation():
    module = SamVisionRelativeAttention(plain(7, 7, dtype=torch.float32), "chunked")
    tokens, weight = (torch.randn(4, 7, 7, 16) for _ in range(2))
    first, second = (answers(module, tokens, weight) for _ in range(2))
    assert all(first[name].equal(second[name]) for name in first)
    parts = [torch.randn(2, 6, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    parts += [torch.randn(side, side, 4, dtype=torch.float64, requires_grad=True) for side in (2, 3)]
    torch.library.opcheck(attention_chunks.attend_in_chunks, (*parts, 0.5))


def test_chunks_keep_no_scores():
    module = SamVisionRelativeAttention(plain(16, 16, dtype=torch.float32), "chunked")
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()) or tensor, lambda x: x):
        module(torch.randn(1, 16, 16, 16, requires_grad=True))
    assert max(kept) < 2 * 256 * 256 / 4


@pytest.mark.parametrize("way", FUSED)
@pytest.mark.parametrize("size", [(6, 6), (10, 4)])
def test_a_table_of_another_length_is_interpolated_as_the_reference_does(way, size):
    height, width = size
    module = plain(8, 8)
    reference = official(module, (8, 8))
    tokens, weight = (torch.randn(2, height, width, 16, dtype=torch.float64) for _ in range(2))
    theirs = answers(reference, tokens, weight)
    assert apart(answers(SamVisionRelativeAttention(module, way), tokens, weight), theirs) < 1e-10


def test_lines_are_in_the_order_of_distances():
    table = torch.arange(9.0)[:, None]
    found = lines(table, 5)
    assert all(found[query, key] == query - key + 4 for query in range(5) for key in range(5))


def small(**arguments):
    return MedSAM(ViT(32, 3, 2, (1,), window=3), 64, weights=None, **arguments)


@pytest.mark.parametrize("way", [None, "sdpa", "widened"])
def test_an_encoder_is_that_of_segment_anything(way):
    """Windows are padded here: four tokens a side in windows of three."""
    torch.manual_seed(0)
    model = small(attention=way).double()
    for name, parameter in model.image_encoder.named_parameters():
        if "rel_pos" in name or name == "pos_embed":
            nn.init.normal_(parameter)
    theirs = ImageEncoderViT(
        img_size=64, embed_dim=32, depth=3, num_heads=2, out_chans=256, use_rel_pos=True, window_size=3,
        global_attn_indexes=(1,), norm_layer=lambda width: nn.LayerNorm(width, eps=1e-6),
    ).double()  # fmt: skip
    state = to_original(model.state_dict())
    prefix = "image_encoder."
    theirs.load_state_dict({name.removeprefix(prefix): state[name] for name in state if name.startswith(prefix)})
    images, weight = torch.randn(2, 3, 64, 64).double(), torch.randn(2, 256, 4, 4).double()
    found, expected = model.encode(images), theirs(images)
    assert (found - expected).abs().max() < 1e-10 * expected.abs().max()
    (found * weight).sum().backward()
    (expected * weight).sum().backward()
    ours = to_original(
        {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    )
    for name, parameter in theirs.named_parameters():
        assert (ours[prefix + name] - parameter.grad).abs().max() < 1e-9 * parameter.grad.abs().max(), name


def test_names_and_random_weights_are_those_of_transformers():
    torch.manual_seed(3)
    ours = small().state_dict()
    torch.manual_seed(3)
    plain_ones = small(attention="sdpa").state_dict()
    assert list(ours) == list(plain_ones)
    assert "image_encoder.layers.0.attn.rel_pos_h" in ours
    assert all(ours[name].equal(plain_ones[name]) for name in ours)


def test_the_rule_looks_at_the_device():
    here = torch.zeros(1)
    assert chosen_way(here) == "chunked"
    with as_on_cuda():
        assert chosen_way(here) == "widened"
        with ways.as_needed():
            assert chosen_way(here) == "sdpa"
    assert chosen_way(torch.zeros(1, device="meta")) == "widened"
    assert small(attention="widened").image_encoder.layers[0].attn.fused
    assert not small().image_encoder.layers[0].attn.fused


def test_sdpa_means_what_transformers_calls_so():
    module = plain(5, 5)
    theirs = SamVisionSdpaAttention.__new__(SamVisionSdpaAttention)
    theirs.__dict__.update(module.__dict__)
    tokens = torch.randn(2, 5, 5, 16, dtype=torch.float64)
    assert theirs(tokens)[0].sub(SamVisionRelativeAttention(module, "sdpa")(tokens)[0]).abs().max() < 1e-12


def test_widened_asks_flash_for_equal_heads_in_multiples_of_eight(monkeypatch):
    asked = []
    kernel = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda *parts, **named: asked.append((parts, named)) or kernel(*parts, **named),
    )
    for dtype in (torch.bfloat16, torch.float32):
        module = SamVisionRelativeAttention(plain(14, 14, channels=64, dtype=dtype), "widened")
        module(torch.randn(1, 14, 14, 128, dtype=dtype))
    shapes = [tuple(part.shape[-1] for part in parts) for parts, _ in asked]
    assert shapes == [(96, 96, 96), (96, 96, 64)]
    assert all(named == {"scale": 1.0} for _, named in asked)


def test_flex_is_the_same_where_torch_can_run_it():
    from torch.nn.attention.flex_attention import flex_attention

    torch.manual_seed(0)
    parts = [torch.randn(4, 15, 8, dtype=torch.float64) for _ in range(3)]
    parts += [torch.randn(side, side, 8, dtype=torch.float64) for side in (3, 5)]
    expected = ways.eager(*parts, 0.3, 2)
    assert (ways.flex_with(flex_attention, *parts, 0.3, 2) - expected).abs().max() < 1e-10


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch has FlexAttention's backward pass for GPUs alone")
def test_gradients_of_flex_are_those_of_the_plain_form():
    torch.manual_seed(0)
    parts = [torch.randn(4, 256, 64, device="cuda") for _ in range(3)]
    parts += [torch.randn(16, 16, 64, device="cuda") for _ in range(2)]
    parts = [part.requires_grad_() for part in parts]
    found, expected = (way(*parts, 0.125, 2) for way in (ways.flex, ways.eager))
    for one, other in zip(*(torch.autograd.grad(x.square().sum(), parts) for x in (found, expected)), strict=True):
        assert (one - other).abs().max() < 1e-2 * other.abs().max()


def test_flex_without_a_gpu_is_refused_in_one_line():
    with pytest.raises(UserError, match=r"attention flex: .* runs on cpu: take null"):
        small(attention="flex").encode(torch.zeros(1, 3, 64, 64))


def test_an_unknown_way_is_refused():
    with pytest.raises(UserError, match="attention flash: there are eager, sdpa, widened, chunked, flex"):
        small(attention="flash")


@pytest.mark.parametrize("way", [None, "sdpa", "widened"])
def test_a_compiled_block_is_one_graph_with_the_same_values(way):
    torch.manual_seed(0)
    model = small(attention=way)
    block, tokens = model.image_encoder.layers[1], torch.randn(2, 4, 4, 32, requires_grad=True)
    expected = block(tokens)
    torch._dynamo.reset()
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    found = compiled(tokens)
    assert (found - expected).abs().max() < 1e-5
    one, other = (torch.autograd.grad(values.square().sum(), tokens)[0] for values in (found, expected))
    assert (one - other).abs().max() < 1e-4 * other.abs().max()


def test_recomputed_blocks_give_the_same_gradients():
    images = torch.randn(1, 3, 64, 64)
    found = []
    for again in (False, True):
        torch.manual_seed(0)
        model = small(checkpoint_activations=again).train()
        model.encode(images).square().mean().backward()
        found.append([parameter.grad for parameter in model.image_encoder.parameters()])
    assert all((one - other).abs().max() < 1e-6 for one, other in zip(*found, strict=True))


def test_flops_of_chunks_are_counted():
    def count(way):
        module = SamVisionRelativeAttention(plain(8, 8, dtype=torch.float32), way)
        with FlopCounterMode(display=False) as counter:
            out = module(torch.randn(2, 8, 8, 16))[0]
            forward = counter.get_total_flops()
            out.sum().backward()
        return forward, counter.get_total_flops()

    (forward, both), (forward_plain, both_plain) = count("chunked"), count("eager")
    assert forward == forward_plain
    assert both_plain < both < 1.4 * both_plain  # scores and positions are computed again


@pytest.mark.parametrize("lora", [False, True], ids=["plain", "lora"])
def test_padding_that_is_not_projected_is_seen_all_the_same(lora: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """64 px make a grid of 4, which windows of 3 do not divide."""
    torch.manual_seed(0)
    model = MedSAM(ViT(width=32, depth=2, heads=2, global_blocks=(1,), window=3), 64, weights=None)
    if lora:
        LoRATuning(rank=2, targets=["query", "key", "value", "projection"]).apply(model)
    model = model.double()
    for parameter in model.image_encoder.parameters():  # biases and tables are zeros at first
        parameter.data += 0.1 * torch.randn_like(parameter)
    block = model.image_encoder.layers[0]
    assert isinstance(block, ways.WindowedLayer) and not isinstance(model.image_encoder.layers[1], ways.WindowedLayer)
    tokens, weight = torch.randn(2, 4, 4, 32, dtype=torch.float64), torch.randn(2, 4, 4, 32, dtype=torch.float64)

    def learnt() -> dict[str, torch.Tensor]:
        block.zero_grad()
        asking = tokens.clone().requires_grad_()
        found = block(asking)
        (found * weight).sum().backward()
        learning = {name: p.grad.clone() for name, p in block.named_parameters() if p.grad is not None}
        return {"output": found.detach(), "tokens": asking.grad, **learning}

    ours = learnt()
    monkeypatch.setattr(ways, "told", lambda: True)  # transformers' own way round
    monkeypatch.setattr(ways, "chosen_way", lambda query: "eager")
    theirs = learnt()
    assert ours.keys() == theirs.keys() and len(ours) > (4 if lora else 10)
    assert max(float((ours[name] - theirs[name]).abs().max()) for name in ours) < 1e-6  # its softmax is in fp32


def test_an_adapter_on_attention_is_given_whole_windows() -> None:
    model = MedSAM(ViT(width=32, depth=2, heads=2, global_blocks=(1,), window=3), 64, weights=None)
    block, seen = model.image_encoder.layers[0], []
    handle = block.attn.register_forward_hook(
        lambda module, given, found: seen.append(found[0].shape), with_kwargs=False
    )
    tokens = torch.randn(1, 4, 4, 32)
    hooked = block(tokens)
    handle.remove()
    assert seen == [(4, 3, 3, 32)]
    torch.testing.assert_close(block(tokens), hooked, rtol=1e-5, atol=1e-6)


def test_only_tokens_are_projected() -> None:
    model = MedSAM(ViT(width=32, depth=2, heads=2, global_blocks=(1,), window=3), 64, weights=None)
    block, sizes = model.image_encoder.layers[0], []
    for name in ("qkv", "proj"):
        getattr(block.attn, name).register_forward_hook(lambda module, given, found: sizes.append(found.numel()))
    block(torch.randn(1, 4, 4, 32))
    assert sizes == [16 * 96, 96, 16 * 32]  # tokens, one zero, tokens: not 36
