"""The map of an encoder's blocks points at what is there, in every family."""

from __future__ import annotations

import pytest
import torch
from encoders import FAMILIES, make
from torch import nn

from trainer.models.blocks import Projection, decoder_blocks, encoder_blocks

DEPTHS = {"medsam": 3, "litemedsam": 10, "sam2": 6, "sam3": 3}


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_point_at_what_is_there(family: str) -> None:
    model = make(family)
    blocks = model.blocks()
    assert len(blocks) == DEPTHS[family]
    for block in blocks:
        assert isinstance(model.get_submodule(block.projection), nn.Linear)
        assert model.get_submodule(block.projection).out_features == block.width
        assert model.get_submodule(block.mlp_in).in_features == block.width
        assert model.get_submodule(block.mlp_out).out_features == block.width
        outputs = []
        for part in (block.query, block.key, block.value):
            layer = model.get_submodule(part.module)
            assert layer.in_features == block.width_in
            rows = range(layer.out_features) if part.rows is None else part.rows.tolist()
            outputs.append({(part.module, row) for row in rows})
        assert [len(rows) for rows in outputs] == [block.width] * 3
        assert len(set.union(*outputs)) == 3 * block.width, "queries, keys and values share nothing"
        for name in (block.name, block.attention, block.mlp, *([block.mlp_norm] if block.mlp_norm else [])):
            model.get_submodule(name)
    assert len(decoder_blocks(model)) == 2
    ids = model.layer_ids()
    assert max(ids.values()) == (13 if family == "litemedsam" else len(blocks) + 1)
    assert set(ids.values()) == set(range(max(ids.values()) + 1))


def zero(model: nn.Module, part: Projection) -> None:
    """Make queries, keys or values zero."""
    layer = model.get_submodule(part.module)
    rows = slice(None) if part.rows is None else part.rows
    with torch.no_grad():
        layer.weight[rows] = 0
        layer.bias[rows] = 0


@pytest.mark.parametrize("family", FAMILIES)
def test_values_are_values_and_keys_are_keys(family: str) -> None:
    """Without values attention gives its last layer's bias; with values alone, no key or query matters."""
    for which in ("value", "query and key"):
        model = make(family)
        block = model.blocks()[1]
        attention = model.get_submodule(block.attention)
        seen: list[torch.Tensor] = []

        def record(module: nn.Module, inputs: object, output: object, seen: list[torch.Tensor] = seen) -> None:
            seen.append(output[0] if isinstance(output, tuple) else output)  # type: ignore[index]

        attention.register_forward_hook(record)
        side = 56 if family == "sam3" else 64
        images = torch.rand(1, 3, side, side)
        with torch.no_grad():
            model.encode(images)
            if which == "value":
                zero(model, block.value)
                model.encode(images)
                bias = model.get_submodule(block.projection).bias
                torch.testing.assert_close(seen[1], bias.expand_as(seen[1]))
            else:
                zero(model, block.query)
                model.encode(images)
                zero(model, block.key)
                model.encode(images)
                assert not torch.equal(seen[0], seen[1])
                torch.testing.assert_close(seen[1], seen[2], rtol=1e-4, atol=1e-6)


def test_a_class_derived_from_a_block_is_one() -> None:
    """Sharding gives each module a class of its own, in another package."""
    model = make("medsam")
    for layer in model.image_encoder.layers:
        layer.__class__ = type("Sharded", (type(layer),), {"__module__": "elsewhere"})
    assert len(encoder_blocks(model)) == 3
