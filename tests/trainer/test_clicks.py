"""Clicks: where points of a region are, what a click corrects, and when there is none.

Shapes: Q targets, S side of the input.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from encoders import make
from torch import Tensor
from truths import blank, cross, rectangle, truth_of

from trainer.prompts import BoxPrompts, ClickPrompts, MaskPrompts, PointPrompts, Prompts, Truth
from trainer.prompts.regions import DRAWN_BELOW, deepest, drawn, innermost


def sure(*masks: Tensor) -> Tensor:
    """Logits (Q, S, S) of predictions that are these masks."""
    return torch.stack(masks) * 20 - 10


def brute_depth(region: np.ndarray) -> np.ndarray:
    """Distance of every pixel of a region (S, S) to the nearest one outside, the frame around the image included."""
    framed = np.pad(region, 1)
    outside = np.argwhere(~framed)
    depth = np.zeros(region.shape)
    for y, x in np.argwhere(region):
        depth[y, x] = np.sqrt(((outside - (y + 1, x + 1)) ** 2).sum(1).min())
    return depth


def blobs(count: int, side: int = 20) -> list[np.ndarray]:
    """Random regions of several pieces, some at the image's border."""
    numbers = np.random.default_rng(5)
    found = []
    for _ in range(count):
        y, x = np.mgrid[:side, :side]
        region = np.zeros((side, side), dtype=bool)
        for _ in range(3):
            (cy, cx), (ry, rx) = numbers.integers(0, side, 2), numbers.uniform(1, 7, 2)
            region |= ((y - cy) / ry) ** 2 + ((x - cx) / rx) ** 2 <= 1
        found.append(region)
    return found


def test_the_deepest_pixel_is_that_of_a_brute_force_search():
    for region in blobs(40):
        depth = brute_depth(region)
        found, x, y = deepest(region)
        assert found == pytest.approx(depth.max(), abs=1e-12)
        assert depth[y, x] == pytest.approx(depth.max(), abs=1e-12)
    assert deepest(np.zeros((5, 5), dtype=bool)) == (0.0, 0, 0)
    assert deepest(np.ones((5, 7), dtype=bool)) == (3.0, 2, 2), "of several, the first by rows"


def test_innermost_points_count_as_border_for_the_next():
    for region in blobs(10):
        points, there = innermost(torch.from_numpy(region)[None], 3)
        left = region.copy()
        assert there.tolist() == [True]
        for x, y in points[0].long().tolist():
            depth = brute_depth(left)
            assert depth[y, x] == pytest.approx(depth.max(), abs=1e-12)
            left[y, x] = False


def test_every_pixel_of_a_region_has_its_number():
    """The n-th pixel by rows for the number n, again from the first after the last."""
    regions = torch.from_numpy(np.stack(blobs(8)))
    for region in regions:
        pixels = region.nonzero().flip(1).float()
        numbers = torch.arange(2 * len(pixels))[None]
        points, there = drawn(region[None], numbers)
        assert torch.equal(points[0], pixels.repeat(2, 1))
        assert there.tolist() == [True]
    together, there = drawn(torch.cat([regions, regions[:1] & False]), torch.full((9, 1), DRAWN_BELOW - 1))
    assert there.tolist() == [True] * 8 + [False]
    for region, (point,) in zip(regions, together, strict=False):
        assert region[int(point[1]), int(point[0])]


# -- one click -------------------------------------------------------------------------------------------------------


def click(clicks: ClickPrompts, truth: Truth, logits: Tensor, epoch: int | None, correction: int = 0) -> Prompts:
    (asked,) = clicks.correct(clicks.first(truth, epoch), logits, truth, epoch, correction)
    assert asked.rows is not None
    assert asked.rows.tolist() == list(range(len(truth)))
    return asked


PLAIN = ClickPrompts(BoxPrompts(max_shift=0), blank=0, seed=4)


@pytest.mark.parametrize("epoch", [0, None])
def test_a_click_is_positive_where_the_truth_was_missed_and_negative_where_too_much_was_taken(epoch):
    target = rectangle(4, 4, 15, 15)
    missed, excess = rectangle(4, 4, 9, 15), rectangle(4, 4, 15, 15) + rectangle(16, 4, 21, 15)
    truth = truth_of([target] * 200, [(q, 0) for q in range(200)])
    asked = click(PLAIN, truth, sure(*[missed, excess] * 100), epoch)
    assert asked.points is not None
    assert asked.labels is not None
    assert asked.masks is not None
    assert asked.labels[:, 0].tolist() == [1, 0] * 100
    positive, negative = asked.points[::2, 0], asked.points[1::2, 0]
    if epoch is None:
        assert positive.unique(dim=0).tolist() == [[12, 6]]  # 6 x 12 pixels: depth 3 first at row 6, column 12
        assert negative.unique(dim=0).tolist() == [[18, 6]]
    else:
        assert positive.amin(0).tolist() == [10, 4]
        assert positive.amax(0).tolist() == [15, 15]
        assert negative.amin(0).tolist() == [16, 4]
        assert negative.amax(0).tolist() == [21, 15]
    assert torch.equal(asked.boxes, truth.boxes)  # type: ignore[arg-type]
    assert torch.equal(asked.masks, sure(*[missed, excess] * 100)), "the answer comes back, not thresholded"


def test_clicks_are_drawn_uniformly_from_all_that_is_wrong():
    count = 3000
    target = rectangle(4, 4, 9, 9)
    predicted = target - rectangle(4, 4, 6, 4) + rectangle(12, 4, 18, 4)  # 3 pixels missed, 7 too much
    truth = truth_of([target] * count, [(q, 0) for q in range(count)])
    asked = click(PLAIN, truth, sure(*[predicted] * count), 0)
    assert asked.points is not None
    assert asked.labels is not None
    x, counts = asked.points[:, 0, 0].unique(return_counts=True)
    assert x.tolist() == [4, 5, 6, *range(12, 19)]
    assert float(((counts - 300) ** 2 / 300).sum()) < 27.9, "the 99.9th percentile of chi-square, 9 degrees of freedom"
    assert (asked.labels[:, 0] == (asked.points[:, 0, 0] < 10)).all()
    assert (asked.points[:, 0, 1] == 4).all()


def test_in_evaluation_the_deeper_error_is_clicked_not_the_larger_one():
    target = rectangle(2, 2, 25, 9)
    missed = rectangle(2, 2, 25, 3)  # 48 pixels, depth 1
    excess = rectangle(10, 20, 14, 24)  # 25 pixels, depth 3
    asked = click(PLAIN, truth_of([target]), sure(target - missed + excess), None)
    assert asked.points is not None
    assert asked.labels is not None
    assert (asked.points.tolist(), asked.labels.tolist()) == ([[[12, 22]]], [[0]])


@pytest.mark.parametrize("epoch", [0, None])
def test_where_nothing_is_wrong_the_target_is_clicked_and_where_there_is_none_nothing(epoch):
    truth = truth_of([cross(), blank()] * 100, [(q, 0) for q in range(200)])
    asked = click(PLAIN, truth, sure(*[cross(), blank()] * 100), epoch)
    assert asked.points is not None
    assert asked.labels is not None
    assert asked.labels[:, 0].tolist() == [1, -1] * 100
    x, y = asked.points[::2, 0].long().unbind(1)
    assert cross()[y, x].all()
    different = len(set(zip(x.tolist(), y.tolist(), strict=True)))
    assert different == 1 if epoch is None else different > 20


@pytest.mark.parametrize("epoch", [0, None])
def test_the_padding_is_never_clicked(epoch):
    target = rectangle(3, 3, 8, 8)
    everywhere, nan = torch.full((32, 32), 10.0), torch.full((32, 32), torch.nan)
    truth = truth_of([target] * 300, [(q, 0) for q in range(300)], size=(12, 20))
    asked = click(PLAIN, truth, everywhere.expand(300, -1, -1), epoch)
    assert asked.points is not None
    assert asked.labels is not None
    assert (asked.labels == 0).all()
    assert asked.points.amax((0, 1)).tolist()[0] <= 19
    assert asked.points.amax((0, 1)).tolist()[1] <= 11
    if epoch == 0:
        assert asked.points.amax((0, 1)).tolist() == [19, 11]
    unknown = click(PLAIN, truth, nan.expand(300, -1, -1), epoch)  # no number is no mask: all of the target was missed
    assert unknown.labels is not None
    assert (unknown.labels == 1).all()


def test_errors_are_judged_at_the_inputs_size():
    """Logits of 8 pixels a side for an input of 32: as large a mask as the module scores."""
    target = rectangle(8, 8, 23, 23)
    coarse = torch.nn.functional.avg_pool2d(target[None], 4) * 20 - 10
    full = torch.nn.functional.interpolate(coarse[None], (32, 32), mode="bilinear")[0, 0] > 0
    wrong = full != (target > 0)
    truth = truth_of([target] * 200, [(q, 0) for q in range(200)], mask_side=8)
    asked = click(PLAIN, truth, coarse.expand(200, -1, -1), 0)
    assert asked.points is not None
    assert asked.masks is not None
    assert asked.masks.shape == (200, 8, 8)
    assert wrong.any(), "a corner is rounded"
    x, y = asked.points[:, 0].long().unbind(1)
    assert wrong[y, x].all()


# -- rounds ----------------------------------------------------------------------------------------------------------


def test_a_click_depends_on_its_target_and_round_only():
    truth = truth_of([cross()] * 20, [(q // 2, q % 2) for q in range(20)])
    nothing = sure(*[blank()] * 20)
    whole = click(PLAIN, truth, nothing, 3).points
    assert whole is not None
    order = torch.tensor([13, 2, 19])
    part = click(PLAIN, truth.subset(order), nothing[:3], 3).points
    assert part is not None
    assert torch.equal(part, whole[order])
    for other in (click(PLAIN, truth, nothing, 4), click(PLAIN, truth, nothing, 3, 1)):
        assert other.points is not None
        assert not torch.equal(other.points, whole)
    reseeded = ClickPrompts(BoxPrompts(max_shift=0), blank=0, seed=5)
    assert not torch.equal(click(reseeded, truth, nothing, 3).points, whole)  # type: ignore[arg-type]


def play(clicks: ClickPrompts, truth: Truth, epoch: int | None) -> list[list[int]]:
    """How many points each target has in each round: rounds by targets; the model never learns."""
    asked = clicks.first(truth, epoch)
    logits = sure(*[blank()] * len(truth))
    counts = []
    for correction in range(-1, clicks.rounds(epoch)):
        if correction >= 0:
            asked = clicks.correct(asked, logits, truth, epoch, correction)
        line = [-1] * len(truth)
        for prompts in asked:
            assert prompts.rows is not None
            assert (prompts.masks is not None) == (correction >= 0 and clicks.mask)
            for row in prompts.rows.tolist():
                assert line[row] == -1, "a target is asked once"
                line[row] = 0 if prompts.points is None else prompts.points.shape[1]
        assert -1 not in line, "no target is left out"
        counts.append(line)
    return counts


def test_sam_clicks_eight_times_and_has_two_rounds_without_a_click():
    """Kirillov et al. 2023, appendix A: 11 rounds; one blank somewhere among the clicks, one at the end."""
    clicks, count = ClickPrompts(), 450
    truth = truth_of([cross()] * count, [(q, 0) for q in range(count)])
    counts = torch.tensor(play(clicks, truth, 0))
    assert len(counts) == 11
    boxes = (counts[0] == 0).float().mean()
    assert boxes == pytest.approx(0.5, abs=0.08), "a box or a point with equal chance"
    added = counts.diff(dim=0)
    assert added.unique().tolist() == [0, 1]
    assert (added.sum(0) == 8).all()
    assert (added[-1] == 0).all()
    places = (added[:-1] == 0).float()
    assert (places.sum(0) == 1).all()
    by_round = places.sum(1)
    assert len(by_round) == 9
    assert float(((by_round - 50) ** 2 / 50).sum()) < 26.1, "any of the 9: the 99.9th percentile, 8 degrees of freedom"
    assert torch.equal(counts, torch.tensor(play(clicks, truth, 0)))


def test_forms_are_few_in_every_round():
    """A box or none, one blank round past or none: four forms at most, and two at the end."""
    truth = truth_of([cross()] * 40, [(q, 0) for q in range(40)])
    clicks = ClickPrompts()
    asked = clicks.first(truth, 0)
    for correction in range(clicks.rounds(0)):
        asked = clicks.correct(asked, sure(*[blank()] * 40), truth, 0, correction)
        assert len(asked) <= 4
    assert sorted((p.points.shape[1], p.boxes is None) for p in asked if p.points is not None) == [
        (8, False),
        (9, True),
    ]


@pytest.mark.parametrize(("corrections", "blank_rounds", "given"), itertools.product((0, 1, 3), (0, 1, 3), (0, 2)))
def test_any_number_of_clicks_and_blanks(corrections, blank_rounds, given):
    clicks = ClickPrompts(BoxPrompts(), corrections, blank_rounds, eval_corrections=given)
    truth = truth_of([cross()] * 6)
    counts = torch.tensor(play(clicks, truth, 2))
    assert len(counts) == 1 + corrections + blank_rounds
    assert (counts[-1] == corrections).all()
    assert torch.tensor(play(clicks, truth, None)).tolist() == [[n] * 6 for n in range(given + 1)]
    assert clicks.describe()["corrections"] == given


def test_the_start_is_kept_and_the_mask_comes_back_only_where_it_is_asked_for():
    truth = truth_of([cross()] * 2)
    without = ClickPrompts(MaskPrompts(), blank=0, mask=False)
    (first,) = without.first(truth, 0)
    (second,) = without.correct([first], sure(blank(), blank()), truth, 0, 0)
    assert torch.equal(second.masks, first.masks)  # type: ignore[arg-type]
    points = ClickPrompts(PointPrompts(positive=2, negative=1), blank=0)
    (first,) = points.first(truth, 0)
    logits = sure(blank(), blank()).bfloat16().requires_grad_()
    (second,) = points.correct([first], logits, truth, 0, 0)
    assert second.points is not None
    assert torch.equal(second.points[:, :3], first.points)  # type: ignore[arg-type]
    assert second.points.shape == (2, 4, 2)
    assert second.masks is not None
    assert second.masks.dtype == torch.float32
    assert not second.masks.requires_grad, "a round does not learn through the one before"


@pytest.mark.parametrize("epoch", [0, None])
@pytest.mark.parametrize("count", [0, 3])
def test_a_model_is_asked_in_rounds(epoch, count):
    """With the loop of a training: prompts of several forms, decoded one after the other; nothing about no target."""
    model = make("medsam")
    masks = [rectangle(8, 8, 40, 30, side=64), rectangle(20, 5, 30, 60, side=64), rectangle(1, 1, 3, 2, side=64)]
    truth = truth_of(masks[:count], mask_side=model.mask_side) if count else truth_of([], mask_side=model.mask_side)
    features = model.encode(torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(1)))
    clicks = ClickPrompts(corrections=2, eval_corrections=3)

    def decode(asked: list[Prompts]) -> Tensor:
        if not count:  # transformers' decoder takes one prompt or more
            return torch.zeros(0, model.mask_side, model.mask_side)
        logits = torch.cat([model.decode(features, prompts)[0][:, 0] for prompts in asked])
        order = torch.cat([prompts.rows for prompts in asked if prompts.rows is not None])
        assert sorted(order.tolist()) == list(range(count))
        return logits[order.argsort()]

    asked = clicks.first(truth, epoch)
    logits = decode(asked)
    answers = [logits]
    for correction in range(clicks.rounds(epoch)):
        asked = clicks.correct(asked, logits.detach(), truth, epoch, correction)
        logits = decode(asked)
        answers.append(logits)
    assert logits.shape == (count, model.mask_side, model.mask_side)
    assert len(answers) == (5 if epoch == 0 else 4)
    if count:
        assert logits.isfinite().all()
        assert not torch.allclose(answers[0], answers[-1]), "clicks are heard"
        torch.stack(answers).mean().backward()
        learnt = model.mask_decoder.iou_token.weight.grad  # type: ignore[union-attr]
        assert learnt is not None
