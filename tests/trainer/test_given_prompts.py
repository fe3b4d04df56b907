"""SAM2's own prompts: the mask itself, and boxes with uniform noise.

Shapes: Q targets, S side of the input.
"""

from __future__ import annotations

import pytest
import torch
from jsonargparse import ArgumentParser
from torch import Tensor
from truths import blank, cross, rectangle, truth_of

from data_shards.errors import UserError
from trainer.prompts import (
    ClickPrompts,
    GivenMaskPrompts,
    MixedPrompts,
    PointPrompts,
    Prompter,
    Prompts,
    SAM2BoxPrompts,
    SAMBoxPrompts,
    Truth,
)


def many(count: int, side: int = 32) -> Truth:
    """Targets of different sizes and places."""
    masks = [rectangle(q % 7, q % 5, q % 7 + 6 + q % 11, q % 5 + 8, side) for q in range(count)]
    return truth_of(masks, draws=[(q, q % 3) for q in range(count)])


def as_sam2_trains() -> MixedPrompts:
    """Masks, boxes and points as often as SAM2's training asks with each."""
    return MixedPrompts([GivenMaskPrompts(), SAM2BoxPrompts(), PointPrompts()], weights=[0.5, 0.25, 0.25], seed=3)


@pytest.mark.parametrize("epoch", [None, 0, 5])
def test_the_mask_itself_is_given(epoch):
    truth = truth_of([cross(), blank(), rectangle(0, 0, 31, 31)], size=(32, 32))
    (asked,) = GivenMaskPrompts().first(truth, epoch)
    assert torch.equal(asked.given, truth.masks)
    assert asked.rows.tolist() == [0, 1, 2]
    assert torch.equal(asked.image_index, truth.image_index)
    assert (asked.boxes, asked.points, asked.labels, asked.masks) == (None, None, None, None)
    assert GivenMaskPrompts().describe() == {"kind": "GivenMaskPrompts"}


def test_masks_boxes_and_points_are_mixed_in_their_shares():
    count = 2000
    truth = many(count)
    asked = as_sam2_trains().first(truth, 1)
    given, boxes, points = asked
    assert given.given is not None and boxes.boxes is not None and points.points is not None
    assert len(given) / count == pytest.approx(0.5, abs=0.04)
    assert len(boxes) / count == pytest.approx(0.25, abs=0.04)
    assert torch.cat([part.rows for part in asked]).sort().values.tolist() == list(range(count))
    assert torch.equal(given.given, truth.masks[given.rows]), "each gets its own mask"
    assert torch.equal(given.image_index, truth.image_index[given.rows])
    (evaluated,) = as_sam2_trains().first(truth, None)
    assert torch.equal(evaluated.given, truth.masks)


def given_of(asked: list[Prompts]) -> dict[int, Tensor]:
    """The given masks by target."""
    return {
        row: mask
        for part in asked
        if part.given is not None and part.rows is not None
        for row, mask in zip(part.rows.tolist(), part.given, strict=True)
    }


def test_a_given_mask_stays_while_others_are_corrected_by_clicks():
    truth = many(40)
    clicks = ClickPrompts(start=as_sam2_trains(), corrections=7, blank=0, seed=3)
    assert clicks.rounds(0) == 7
    first = clicks.first(truth, 0)
    before, asked = given_of(first), first
    assert 0 < len(before) < 40
    for correction in range(2):
        asked = clicks.correct(asked, torch.full((40, 32, 32), -1.0), truth, 0, correction)
    assert torch.cat([part.rows for part in asked]).sort().values.tolist() == list(range(40))
    after = given_of(asked)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[row], before[row]) for row in before)
    for part in asked:
        for row, points, labels in zip(part.rows.tolist(), part.points, part.labels, strict=True):
            x, y = points[-1].long().tolist()
            assert truth.masks[row, y, x] == 1, "where nothing was found, a click is on the target"
            assert labels[-1] == 1


def test_prompts_with_a_given_mask_move_and_divide_as_others_do():
    (asked,) = GivenMaskPrompts().first(many(5), 0)
    part = asked.to("cpu").subset(torch.tensor([3, 1]))
    assert torch.equal(part.given, asked.given[[3, 1]])
    assert part.rows.tolist() == [3, 1]


def test_box_noise_is_uniform_within_a_tenth_of_each_side():
    count = 4000
    truth = truth_of([rectangle(30, 40, 69, 119, 128)] * count)  # sides of 39 and 79 pixels
    (asked,) = SAM2BoxPrompts(seed=5).first(truth, 2)
    moves = (asked.boxes - truth.boxes) / torch.tensor([3.9, 7.9, 3.9, 7.9])
    assert moves.abs().max() <= 1 + 1e-5
    # a uniform number on [-1, 1] has the mean 0, the mean square 1/3 and a half of it beyond one half
    torch.testing.assert_close(moves.mean(0), torch.zeros(4), atol=0.04, rtol=0)
    torch.testing.assert_close(moves.square().mean(0), torch.full((4,), 1 / 3), atol=0.02, rtol=0)
    torch.testing.assert_close((moves.abs() > 0.5).float().mean(0), torch.full((4,), 0.5), atol=0.03, rtol=0)
    assert torch.corrcoef(moves.T).fill_diagonal_(0).abs().max() < 0.06, "every coordinate for itself"


def test_box_noise_is_official(monkeypatch):
    """With the same numbers the boxes are those of SAM2's own code, at the image's border and at the bound too."""
    utils = pytest.importorskip("sam2.modeling.sam2_utils")
    masks = [rectangle(0, 0, 255, 250, 256), rectangle(5, 250, 9, 255, 256), rectangle(20, 30, 20, 30, 256)]
    truth = truth_of(masks)
    (asked,) = SAM2BoxPrompts(seed=5).first(truth, 2)
    untouched = truth_of([rectangle(600, 600, 1399, 1399, 2000)] * 3, draws=truth.draws)
    (probe,) = SAM2BoxPrompts(max_noise=100, seed=5).first(untouched, 2)
    drawn = (probe.boxes - untouched.boxes) / 79.9
    monkeypatch.setattr(torch, "rand", lambda *size, device: (drawn[:, None] + 1) / 2)
    official, _ = utils.sample_box_points(torch.stack(masks)[:, None].bool())
    torch.testing.assert_close(asked.boxes, official.flatten(1), atol=1e-4, rtol=0)


def test_boxes_are_tight_in_evaluation_and_a_function_of_what_they_may_depend_on():
    truth = many(20)
    prompts = SAM2BoxPrompts(seed=5)
    assert torch.equal(prompts.first(truth, None)[0].boxes, truth.boxes)
    whole = prompts.first(truth, 3)[0].boxes
    part = prompts.first(truth.subset(torch.tensor([7, 2])), 3)[0].boxes
    assert torch.equal(part, whole[[7, 2]])
    assert not torch.equal(prompts.first(truth, 4)[0].boxes, whole)
    assert not torch.equal(SAM2BoxPrompts(seed=6).first(truth, 3)[0].boxes, whole)
    assert not torch.equal(SAMBoxPrompts(seed=5).first(truth, 3)[0].boxes, whole), "SAM's noise is normal"


@pytest.mark.parametrize("options", [{"noise": -0.1}, {"max_noise": float("inf")}])
def test_nonsense_is_refused(options):
    with pytest.raises(UserError, match=next(iter(options))):
        SAM2BoxPrompts(**options)


def test_recipes_name_them():
    parser = ArgumentParser()
    parser.add_subclass_arguments(Prompter, "prompts")
    parts = [
        {"class_path": "trainer.prompts.GivenMaskPrompts"},
        {"class_path": "trainer.prompts.SAM2BoxPrompts", "init_args": {"max_noise": 10}},
    ]
    mixed = {"class_path": "trainer.prompts.MixedPrompts", "init_args": {"prompters": parts, "weights": [2, 1]}}
    prompts = parser.instantiate_classes(parser.parse_object({"prompts": mixed})).prompts
    assert [type(one) for one in prompts.prompters] == [GivenMaskPrompts, SAM2BoxPrompts]
    assert prompts.prompters[1].max_noise == 10
