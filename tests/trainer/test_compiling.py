"""What `CompileBlocks` compiles: one graph a block in every family, and the decoder for few numbers of prompts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_sam3
import torch
from test_buckets import SIDE, batch, step

from data_shards.errors import UserError
from trainer.callbacks import CompileBlocks
from trainer.models import LiteMedSAM, MedSAM, SegmentationModel
from trainer.models.medsam import ViT
from trainer.modules import MedSAMModule, SAM3Module
from trainer.prompts import BoxPrompts, Prompts

TRAINER: Any = SimpleNamespace(accumulate_grad_batches=1, strategy=None)


@pytest.fixture(autouse=True)
def forget() -> Any:
    """Nothing of what other tests compiled, or these."""
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = limit


def medsam(**arguments: Any) -> MedSAM:
    torch.manual_seed(0)
    shape = ViT(width=32, depth=2, heads=2, global_blocks=(1,), window=3)
    return MedSAM(shape, SIDE, weights=None, **arguments)


def ask(model: Any) -> None:
    """One training pass with boxes."""
    features = model.encode(torch.randn(2, 3, SIDE, SIDE))
    model.decode(features, Prompts(torch.tensor([0, 1, 1]), boxes=60 * torch.rand(3, 4)))


def sam2() -> tuple[Any, Callable[[Any], Any]]:
    tiny = pytest.importorskip("tiny_sam2", reason="needs sam2")
    return tiny.make(), ask


def sam3() -> tuple[Any, Callable[[Any], Any]]:
    return tiny_sam3.make(), lambda model: tiny_sam3.detect(model, tiny_sam3.images(2), [0, 1], [4, 6])


FAMILIES: dict[str, Callable[[], tuple[Any, Callable[[Any], Any]]]] = {
    "medsam": lambda: (medsam(), ask),
    "litemedsam": lambda: (LiteMedSAM(SIDE, weights=None), ask),
    "sam2": sam2,
    "sam3": sam3,
}


@pytest.mark.parametrize("family", list(FAMILIES))
def test_each_block_is_one_graph_without_breaks(family: str) -> None:
    model, run = FAMILIES[family]()
    model.train()
    blocks = {f"{kind} {i}": block for kind, some in model.block_kinds().items() for i, block in enumerate(some)}
    if family != "sam3":  # its decoder is not called as a module
        blocks["decoder"] = model.get_submodule(model.also_called.get("mask_decoder", "mask_decoder"))
    seen: dict[str, Any] = {}
    for name, block in blocks.items():
        block.register_forward_pre_hook(
            lambda _, given, named, name=name: seen.setdefault(name, (given, named)) and None, with_kwargs=True
        )
    run(model)
    assert seen.keys() == blocks.keys()
    shapes = set()
    for name, block in blocks.items():
        given, named = seen[name]
        sizes = (
            tuple(tuple(p.shape) for p in block.parameters()),
            tuple(tuple(t.shape) for t in (*given, *named.values()) if isinstance(t, torch.Tensor)),
        )
        if sizes in shapes:  # equal blocks share a graph
            continue
        shapes.add(sizes)
        torch._dynamo.reset()
        found = torch._dynamo.explain(block.forward)(*given, **named)
        assert (name, found.graph_count, found.graph_break_count) == (name, 1, 0), found.break_reasons


def test_a_compiled_decoder_is_compiled_for_few_numbers_of_prompts(tiny_shards: Path) -> None:
    graphs: list[Any] = []

    def count(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    module, plain = (MedSAMModule(medsam(), prompts=BoxPrompts(seed=1)) for _ in range(2))
    CompileBlocks(kinds=[], backend=count, decoder=True).setup(TRAINER, module, "fit")  # type: ignore[arg-type]
    assert module.prompt_buckets
    for targets in (5, 6, 7, 8, 5):
        given = batch(tiny_shards, targets)
        wanted, found = step(plain, given), step(module, given)
        torch.testing.assert_close(found[0], wanted[0], rtol=1e-5, atol=1e-6)
        for name, gradient in wanted[1].items():
            scale = float(gradient.abs().max()) + 1e-6
            torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=2e-5 * scale, msg=name)
    assert len(graphs) == 2, "for 6 and for 8 prompts"


def test_sam3_is_asked_in_few_numbers_where_more_than_its_image_encoder_is_compiled() -> None:
    for kinds, padded in (
        (None, False),
        (["vision_encoder"], False),
        (["detr_encoder"], True),
        (["text_encoder"], True),
    ):
        module = SAM3Module(tiny_sam3.make())
        CompileBlocks(kinds=kinds, backend="eager").setup(TRAINER, module, "fit")  # type: ignore[arg-type]
        assert module.prompt_buckets is padded


def test_compiled_blocks_keep_names_and_gradients(tiny_shards: Path) -> None:
    module, plain = (MedSAMModule(medsam(), prompts=BoxPrompts(seed=1)) for _ in range(2))
    callback = CompileBlocks(backend="aot_eager")
    for _ in range(2):  # a second stage compiles nothing again
        callback.setup(TRAINER, module, "fit")
    assert module.state_dict().keys() == plain.state_dict().keys()
    assert not module.prompt_buckets
    given = batch(tiny_shards, 4)
    wanted, found = step(plain, given), step(module, given)
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-5, atol=1e-6)
    for name, gradient in wanted[1].items():
        scale = float(gradient.abs().max()) + 1e-6
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-4 * scale, msg=name)


def test_what_cannot_be_compiled_is_refused() -> None:
    module = MedSAMModule(medsam())
    with pytest.raises(UserError, match=r"no blocks of kind image_encoders.*image_encoder"):
        CompileBlocks(kinds=["image_encoders"]).setup(TRAINER, module, "fit")
    several: Any = SimpleNamespace(accumulate_grad_batches=4, strategy=None)
    with pytest.raises(UserError, match="accumulate_grad_batches 4"):
        CompileBlocks(mode="reduce-overhead").setup(several, module, "fit")
    with pytest.raises(UserError, match="SAM3 has no mask decoder"):
        CompileBlocks(decoder=True).setup(TRAINER, SAM3Module(tiny_sam3.make()), "fit")
    assert isinstance(module.model, SegmentationModel)
    assert "forward" not in vars(module.model.get_submodule("mask_decoder"))
