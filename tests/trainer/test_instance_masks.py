"""Losses on matched masks: in chunks, at points, at either side."""

from __future__ import annotations

from dataclasses import replace
from math import log

import pytest
import torch
import torch.nn.functional as F
from object_sets import drawn_sets, gradients_of, leaves_of
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from trainer.losses import DenseMasks, ObjectSets, SetPrediction, SetPredictionLoss
from trainer.losses.instance_masks import at_points, dice_loss, focal_loss, on_one_side
from trainer.losses.semantic import semantic_truth

SEGMENTATION = {"mask_weight": 200.0, "dice_weight": 10.0}


@pytest.mark.parametrize("at", ["head", "target"])
@pytest.mark.parametrize("factored", [False, True])
@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_chunks_change_neither_values_nor_gradients(at, factored, chunk):
    prediction, targets = drawn_sets([2, 0, 3, 1], factored=factored)
    targets = replace(targets, has_mask=torch.tensor([True, True, False, True, True, True]))
    leaves = leaves_of(prediction)
    found = {}
    for name, held in (("plain", None), ("chunks", chunk)):
        values = SetPredictionLoss(**SEGMENTATION, mask_at=at, mask_chunk=held)(prediction, targets)
        found[name] = values, gradients_of(values["loss"], leaves)
    for part in range(2):
        for name, value in found["plain"][part].items():
            torch.testing.assert_close(found["chunks"][part][name], value, rtol=1e-6, atol=1e-6)
    assert found["plain"][1]["many.masks." + ("queries" if factored else "logits")].abs().sum() > 0


def test_points_are_the_same_in_the_backward_pass_and_from_a_generator():
    prediction, targets = drawn_sets([2, 0, 3, 1])
    leaves = leaves_of(prediction)

    def run(seed: int, chunk: int | None) -> tuple[float, Tensor]:
        loss = SetPredictionLoss(**SEGMENTATION, mask_points=20, mask_chunk=chunk)
        value = loss(prediction, targets, generator=torch.Generator().manual_seed(seed))["loss"]
        gradient = gradients_of(value, leaves)["first.masks.pixels"]
        assert gradient is not None
        return value.item(), gradient

    value, gradient = run(1, 100)
    again, same = run(1, None)  # not computed again: had the second draw differed, the gradients would
    assert value == again and torch.equal(gradient, same)
    assert run(2, 100)[0] != value


class CountedMasks(DenseMasks):
    """Masks that note how many are asked for at once."""

    asked: list[int]

    def of(self, prompt: int, queries: Tensor) -> Tensor:
        self.asked.append(len(queries))
        return super().of(prompt, queries)


def saved_bytes(loss: SetPredictionLoss, prediction: SetPrediction, targets: ObjectSets) -> int:
    """What the backward pass holds, each storage once."""
    held: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = loss(prediction, targets)["loss"]
    assert kept.requires_grad
    return sum(held.values())


def test_chunks_bound_what_is_held_and_only_matched_masks_are_computed():
    side, counts = 40, [6, 0, 9]
    prediction, targets = drawn_sets(counts, queries=20, side=side, target_side=side)
    one = 4 * side * side
    leaves_of(prediction)
    options = {"semantic_weight": 0.0, "semantic_dice_weight": 0.0}
    plain = saved_bytes(SetPredictionLoss(**SEGMENTATION, **options), prediction, targets)
    chunks = saved_bytes(SetPredictionLoss(**SEGMENTATION, **options, mask_chunk=4), prediction, targets)
    pixels = prediction.masks.pixels.nbytes + prediction.many.masks.pixels.nbytes
    assert plain > pixels + 60 * one  # some per matched mask
    assert chunks < pixels + 6 * one  # boxes and classes
    for chunk in (None, 4):
        masks = CountedMasks(torch.randn(3, 20, side, side))
        object.__setattr__(masks, "asked", [])
        SetPredictionLoss(**SEGMENTATION, mask_chunk=chunk)(replace(prediction, masks=masks, many=None), targets)
        assert sum(masks.asked) == 15 and max(masks.asked) <= (chunk or 9)


def test_instances_without_a_mask_are_left_out_of_mask_losses_alone():
    prediction, targets = drawn_sets([2, 1], factored=False)
    prediction = replace(prediction, many=None)
    loss = SetPredictionLoss(mask_weight=1.0, dice_weight=1.0)
    every = loss(prediction, targets)
    some = loss(prediction, replace(targets, has_mask=torch.tensor([True, False, True])))
    [pairs] = loss.match(prediction, targets).first[-1:]
    query = int(pairs.queries[1])
    logits, truth = on_one_side(prediction.masks.of(0, torch.tensor([query])), targets.masks[1:2], "head")
    assert every["dice_loss"] - some["dice_loss"] == pytest.approx(dice_loss(logits, truth).item() / 3, rel=1e-5)
    assert every["box_loss"] == some["box_loss"]


def test_at_the_head_targets_become_shares_and_at_the_targets_logits_are_enlarged():
    truth = torch.zeros(1, 4, 4)
    truth[0, 0, 0] = truth[0, 2:, 2:] = 1
    logits = torch.randn(1, 2, 2)
    found = on_one_side(logits, truth.bool(), "head")
    torch.testing.assert_close(found[1], torch.tensor([[0.25, 0, 0, 1]]))
    torch.testing.assert_close(found[0], logits.flatten(1))
    found = on_one_side(logits, truth, "target")
    torch.testing.assert_close(found[0], F.interpolate(logits[None], (4, 4), mode="bilinear")[0].flatten(1))
    torch.testing.assert_close(found[1], truth.flatten(1))
    same = [
        SetPredictionLoss(**SEGMENTATION, mask_at=at)(*drawn_sets([2, 1], target_side=8)) for at in ("head", "target")
    ]
    assert same[0] == same[1]


def test_points_are_the_official_ones(monkeypatch):
    """The same random numbers, points and losses."""
    pytest.importorskip("sam3")
    from sam3.train.loss import mask_sampling

    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 8, 8, generator=generator)
    truth = (torch.rand(3, 16, 16, generator=generator) > 0.5).float()
    draws = [torch.rand(3, 60, 2, generator=generator), torch.rand(3, 5, 2, generator=generator)]
    ours, theirs = iter(draws), iter(draws)
    monkeypatch.setattr(torch, "rand", lambda *_, generator=None, **__: next(theirs if generator is None else ours))
    values, shares = at_points(logits, truth, 20, seed=0)
    points = mask_sampling.get_uncertain_point_coords_with_randomness(
        logits[:, None], mask_sampling.calculate_uncertainty, 20, 3, 0.75
    )
    for found, maps in ((values, logits), (shares, truth)):
        expected = mask_sampling.point_sample(maps[:, None], points, align_corners=False)[:, 0]
        torch.testing.assert_close(found, expected)


def test_points_lie_where_the_mask_is_least_certain():
    logits = torch.full((1, 16, 16), 9.0)
    logits[:, :, :4] = 0.0
    values, _ = at_points(logits, torch.zeros(1, 16, 16), 100, seed=3)
    assert values.shape == (1, 100) and (values < 8).float().mean() > 0.7


def test_focal_loss_at_its_limits():
    logits = torch.tensor([[-100.0, 100.0, 0.0, 0.0]])
    truth = torch.tensor([[0.0, 1.0, 1.0, 0.0]])
    expected = [0, 0, 0.25 * 0.25 * log(2), 0.75 * 0.25 * log(2)]
    torch.testing.assert_close(focal_loss(logits, truth, 0.25, 2.0), torch.tensor([expected]))
    torch.testing.assert_close(focal_loss(logits[:, 2:], truth[:, 2:], 0.5, 0.0), torch.full((1, 2), 0.5 * log(2)))


def test_the_semantic_target_is_the_union_of_the_instances_unless_it_is_given():
    masks = torch.zeros(3, 2, 2, dtype=torch.uint8)
    masks[0, 0, 0] = masks[1, 0, 1] = masks[2, 1, 1] = 1
    targets = ObjectSets([2, 0, 1], torch.rand(3, 4), masks)
    found = semantic_truth(targets)
    assert found.tolist() == [[[1, 1], [0, 0]], [[0, 0], [0, 0]], [[0, 0], [0, 1]]]
    given = torch.ones(3, 2, 2)
    assert semantic_truth(replace(targets, semantic=given)) is given
    assert semantic_truth(replace(targets, masks=masks.bool())).int().tolist() == found.tolist()
