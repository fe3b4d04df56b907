"""Prompts in few numbers: padded ones change neither values nor gradients, and few shapes reach the decoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_sam3
import torch

from data_shards.batch import Sample, TripletBatch, collate
from data_shards.dataset import ShardDataset
from trainer.losses import SetPredictionLoss
from trainer.models import MedSAM
from trainer.models.medsam import ViT
from trainer.modules import MedSAMModule, SAM2Module, SAM3Module
from trainer.modules.tuned import TunedModule
from trainer.prompts import (
    BoxPrompts,
    ClickPrompts,
    ConceptPrompts,
    Exemplars,
    GivenMaskPrompts,
    MaskPrompts,
    MixedPrompts,
    PointPrompts,
    Prompter,
    Prompts,
    bucket_of,
)

SIDE = 64
PROMPTS: dict[str, Prompter] = {
    "boxes": BoxPrompts(seed=1),
    "masks": MaskPrompts(seed=1),
    "mixed": MixedPrompts([BoxPrompts(seed=1), PointPrompts(seed=1)], seed=3),
    "clicks": ClickPrompts(start=PointPrompts(seed=1), corrections=1, blank=1, seed=1),
}


def batch(shards: Path, targets: int) -> TripletBatch:
    """Three images with so many targets, the first with all that are too many."""
    samples = ShardDataset(shards / "train")
    chosen = [(0, (0,) * (targets - 2)), (5, (0,)), (9, (0,))]
    return collate([Sample(position, samples[position], rows) for position, rows in chosen])


def step(module: TunedModule, given: TripletBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor], dict[str, Any]]:
    """Loss, gradients and what is logged."""
    logged: dict[str, Any] = {}
    module.log_dict = lambda values, **_: logged.update(values)
    loss = module.train().training_step(given, 0)
    assert isinstance(loss, torch.Tensor)
    module.zero_grad()
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}, logged


def assert_equal_steps(module: TunedModule, given: TripletBatch) -> None:
    plain = step(module, given)
    module.prompt_buckets = True
    padded = step(module, given)
    torch.testing.assert_close(padded[0], plain[0], rtol=1e-5, atol=1e-6)
    assert plain[1].keys() == padded[1].keys()
    for name, gradient in plain[1].items():
        scale = float(gradient.abs().max()) + 1e-6
        torch.testing.assert_close(padded[1][name], gradient, rtol=1e-4, atol=2e-5 * scale, msg=name)
    for name, value in plain[2].items():
        torch.testing.assert_close(padded[2][name], value, rtol=1e-5, atol=1e-5, msg=name)


def test_buckets_are_few_and_waste_less_than_a_third() -> None:
    assert [bucket_of(count) for count in range(14)] == [0, 1, 2, 3, 4, 6, 6, 8, 8, 12, 12, 12, 12, 16]
    found = {count: bucket_of(count) for count in range(1, 1000)}
    assert all(count <= size and (size - count) / size < 1 / 3 for count, size in found.items())
    assert len({size for count, size in found.items() if count <= 64}) == 12


def test_padding_asks_the_first_again() -> None:
    asked = Prompts(torch.tensor([2, 0, 1, 1, 0]), boxes=torch.rand(5, 4), rows=torch.arange(5))
    padded = asked.padded()
    assert padded.image_index.tolist() == [2, 0, 1, 1, 0, 2]
    assert padded.boxes is not None
    assert asked.boxes is not None
    assert torch.equal(padded.boxes, torch.cat([asked.boxes, asked.boxes[:1]]))
    assert padded.subset(torch.arange(5)).boxes is not None
    assert Prompts(torch.zeros(4, dtype=torch.int64)).padded().image_index.tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("name", list(PROMPTS))
def test_a_padded_step_of_medsam_is_the_plain_one(name: str, tiny_shards: Path) -> None:
    torch.manual_seed(0)
    model = MedSAM(ViT(width=32, depth=2, heads=2, global_blocks=(1,), window=3), SIDE, weights=None)
    sizes = set()
    model.mask_decoder.register_forward_pre_hook(
        lambda _, __, named: sizes.add(len(named["image_embeddings"])), with_kwargs=True
    )
    module = MedSAMModule(model, prompts=PROMPTS[name], score_weight=1.0)
    assert_equal_steps(module, batch(tiny_shards, 5))
    assert any(size == bucket_of(size) != 5 for size in sizes)
    sizes.clear()
    for targets in (5, 6, 7, 8):
        step(module, batch(tiny_shards, targets))
    assert all(size == bucket_of(size) for size in sizes)


def test_without_buckets_nothing_is_padded(tiny_shards: Path) -> None:
    torch.manual_seed(0)
    model = MedSAM(ViT(width=32, depth=1, heads=2, global_blocks=(0,), window=3), SIDE, weights=None)
    sizes = []
    model.mask_decoder.register_forward_pre_hook(
        lambda _, __, named: sizes.append(len(named["image_embeddings"])), with_kwargs=True
    )
    step(MedSAMModule(model), batch(tiny_shards, 5))
    assert sizes == [5]


@pytest.mark.parametrize("name", ["boxes", "mixed", "clicks"])
def test_a_padded_step_of_sam2_is_the_plain_one(name: str, tmp_path: Path) -> None:
    tiny = pytest.importorskip("tiny_sam2", reason="needs sam2")
    folder = tiny.write_volumes(tmp_path / "train", range(3))
    clips = tiny.without(tiny.clips(folder, [0, 6, 12], 3), []).by_term()
    prompts = {
        "boxes": BoxPrompts(seed=1),
        "mixed": MixedPrompts([GivenMaskPrompts(), BoxPrompts(seed=1)], seed=3),
        "clicks": ClickPrompts(start=BoxPrompts(seed=1), corrections=1, blank=0, mask=False, seed=1),
    }[name]
    module = SAM2Module(tiny.make(), prompts=prompts)
    owners = clips.image_index.div(3, rounding_mode="floor")
    last = [row for row in range(len(clips.masks)) if owners[row] == 2 and clips.terms[row] == "square"]
    clips = tiny.without(clips, last)  # five objects
    assert module.asked(clips) == 5
    sizes = set()
    module.model.sam_mask_decoder.register_forward_pre_hook(
        lambda _, __, named: sizes.add(len(named["image_embeddings"])), with_kwargs=True
    )
    assert_equal_steps(module, clips)
    if name == "boxes":
        assert sizes == {5, 6}


@pytest.mark.parametrize("exemplars", [None, Exemplars(share=1.0, boxes=1, points=1, seed=5)], ids=["texts", "shown"])
@pytest.mark.parametrize("loss", ["semantic", "masks"])
def test_a_padded_step_of_sam3_is_the_plain_one(loss: str, exemplars: Exemplars | None, tiny_shards: Path) -> None:
    """Five concepts with five texts become six with six."""
    model = tiny_sam3.make(points=exemplars is not None)
    weights = {"mask_weight": 200.0, "dice_weight": 10.0} if loss == "masks" else {}
    module = SAM3Module(model, exemplars=exemplars, loss=SetPredictionLoss(padded_queries=20, **weights))
    samples = ShardDataset(tiny_shards / "train")
    terms = ("gland", "nucleus", "stroma", "vessel")
    given = collate([Sample(0, samples[0], (0,), absent=terms)])
    assert module.asked(given) == 5
    sizes: list[tuple[int, int]] = []
    model.text_encoder.register_forward_pre_hook(
        lambda _, __, named: sizes.append((len(named["input_ids"]), 0)), with_kwargs=True
    )
    model.detr_encoder.layers[0].register_forward_pre_hook(lambda _, given: sizes.append((0, len(given[0]))))
    assert_equal_steps(module, given)
    if exemplars is None:
        assert sizes == [(5, 0), (0, 5), (6, 0), (0, 6)]
    module.eval()
    sizes.clear()
    module.predict_masks(given.by_term())
    assert sizes == [(5, 0), (0, 5)], "an evaluation is asked as it is"


def test_concepts_are_padded_with_all_that_they_are_asked_with() -> None:
    asked = ConceptPrompts(
        torch.arange(5), list("abcde"), boxes=torch.rand(5, 2, 4), box_labels=torch.ones(5, 2).long()
    )
    padded = asked.padded()
    assert padded.texts == list("abcdea") and padded.image_index.tolist() == [0, 1, 2, 3, 4, 0]
    assert padded.boxes is not None and asked.boxes is not None and padded.points is None
    assert torch.equal(padded.boxes, torch.cat([asked.boxes, asked.boxes[:1]]))
    assert ConceptPrompts(torch.arange(4), list("abcd")).padded().texts == list("abcd")
