"""Every name of the released SAM3, in every layout, and nothing lost on the way."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from official_sam3 import released
from torch import Tensor, nn
from transformers import Sam3Config, Sam3Model

from trainer.models.sam3_names import rotary_table, to_meta, to_ours, unknown_to_ours

pytest.importorskip("sam3")
TRUNK = "backbone.vision_backbone.trunk."
POINTS = {f"point_encoder.{part}.{kind}" for part in ("direct", "pool", "position") for kind in ("weight", "bias")}
RELEASED = {"heads": 16, "window": 24, "side": 72, "global_blocks": (7, 15, 23, 31)}


@pytest.fixture(scope="module")
def meta() -> dict[str, Tensor]:
    """The official image model's state, on the meta device but for its rotary tables."""
    return dict(released().state_dict())


@pytest.fixture(scope="module")
def ours() -> dict[str, Tensor]:
    """transformers' Sam3Model's state, on the meta device."""
    with torch.device("meta"):
        return dict(Sam3Model(Sam3Config()).state_dict())


def shapes(state: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in state.items()}


def test_metas_detector_becomes_transformers_name_for_name(meta, ours):
    renamed = to_ours(meta)
    assert renamed.keys() - ours.keys() == POINTS
    assert shapes({name: tensor for name, tensor in renamed.items() if name not in POINTS}) == shapes(ours)
    assert shapes({name: renamed[name] for name in POINTS}) == {
        "point_encoder.direct.weight": (256, 2),
        "point_encoder.pool.weight": (256, 256),
        "point_encoder.position.weight": (256, 256),
        **{f"point_encoder.{part}.bias": (256,) for part in ("direct", "pool", "position")},
    }


def test_ours_becomes_metas_detector_name_for_name(meta, ours):
    renamed = to_meta(ours)
    missing = unknown_to_ours(renamed, **RELEASED)
    assert not renamed.keys() & missing.keys()
    assert shapes({**renamed, **missing}) == shapes(meta)
    with_points = to_meta(to_ours(meta))
    assert unknown_to_ours(with_points, **RELEASED).keys() == {n for n in meta if n.endswith("freqs_cis")}
    assert shapes({**with_points, **unknown_to_ours(with_points, **RELEASED)}) == shapes(meta)


def test_rotary_tables_are_the_official_ones(meta):
    assert torch.equal(meta[f"{TRUNK}blocks.0.attn.freqs_cis"], rotary_table(64, 24, 24))
    assert torch.equal(meta[f"{TRUNK}blocks.7.attn.freqs_cis"], rotary_table(64, 72, 24))


def test_every_layout_is_recognised(meta, ours):
    whole = {f"detector.{name}": tensor for name, tensor in meta.items()}
    tracker = {
        "tracker.no_mem_embed": torch.zeros(1),
        "detector.backbone.vision_backbone.sam2_convs.0.x": torch.ones(1),
    }
    assert shapes(to_ours({**whole, **tracker})) == shapes(to_ours(meta))
    hub = {f"detector_model.{name}": tensor for name, tensor in ours.items()}
    hub |= {"tracker_model.memory": torch.zeros(1), "tracker_neck.fpn_layers.0.proj1.bias": torch.zeros(1)}
    assert shapes(to_ours(hub)) == shapes(to_ours(ours)) == shapes(ours)


@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_what_video_needs_is_the_trackers():
    """The names of Meta's own file, which holds both: nothing of it is taken for ours by mistake."""
    state = dict(released(video=True).state_dict())
    assert shapes(to_ours(state)) == shapes(to_ours(dict(released().state_dict())))
    assert sum(name.startswith("tracker.") for name in state) == 309
    assert sum("sam2_convs" in name for name in state) == 22


def test_an_unknown_name_is_not_lost(meta):
    strange = {"detector.new_head.weight": torch.zeros(1), "optimizer": torch.zeros(1)}
    renamed = to_ours({**{f"detector.{name}": tensor for name, tensor in meta.items()}, **strange})
    assert {"new_head.weight", "optimizer"} <= renamed.keys()


def test_numbers_survive_the_way_there_and_back():
    """Real tensors: fused projections, the transposed one, the class token."""
    torch.manual_seed(0)
    state = {
        f"{TRUNK}blocks.3.attn.qkv.weight": torch.randn(12, 4),
        f"{TRUNK}pos_embed": torch.randn(1, 10, 4),
        "transformer.decoder.layers.1.ca_text.in_proj_bias": torch.randn(6),
        "backbone.language_backbone.encoder.text_projection": torch.randn(4, 3),
        "geometry_encoder.cls_embed.weight": torch.randn(1, 4),
    }
    there = to_ours(state)
    layer = nn.Linear(4, 12, bias=False)
    layer.weight.data = state[f"{TRUNK}blocks.3.attn.qkv.weight"]
    given = torch.randn(2, 4)
    apart = [given @ there[f"vision_encoder.backbone.layers.3.attention.{part}_proj.weight"].T for part in "qkv"]
    assert torch.equal(torch.cat(apart, dim=1), layer(given))
    assert torch.equal(
        there["vision_encoder.backbone.embeddings.position_embeddings"], state[f"{TRUNK}pos_embed"][:, 1:]
    )
    assert there["text_encoder.text_projection.weight"].shape == (3, 4)
    back = to_meta(there)
    state[f"{TRUNK}pos_embed"][:, 0] = 0
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in state.items())
