"""Which query answers for which target, against recorded matches of SAM3's matchers and by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from object_sets import drawn_sets
from torch import Tensor

from data_shards.errors import UserError
from trainer.losses import HungarianMatcher, ObjectSets, OneToManyMatcher, Pairs, SetPrediction, matching
from trainer.losses.boxes import overlap
from trainer.losses.matching import match


def boxes(*rows: tuple[float, float, float, float]) -> Tensor:
    return torch.tensor(rows)


def test_overlap_by_hand():
    one = boxes((0.5, 0.5, 0.4, 0.4))
    others = boxes((0.5, 0.5, 0.4, 0.4), (0.7, 0.5, 0.4, 0.4), (0.9, 0.5, 0.4, 0.4), (0.5, 0.5, 0.0, 0.0))
    iou, giou = overlap(one, others)
    # the same; shifted by half; touching; a point inside
    torch.testing.assert_close(iou, torch.tensor([1, 1 / 3, 0, 0]))
    torch.testing.assert_close(giou, torch.tensor([1, 1 / 3, 0, 0]))
    far = overlap(boxes((0.1, 0.1, 0.2, 0.2)), boxes((0.9, 0.9, 0.2, 0.2)))[1]
    torch.testing.assert_close(far, torch.tensor([-(1 - 0.08)]))
    nothing = overlap(boxes((0.5, 0.5, 0, 0)), boxes((0.5, 0.5, 0, 0)))
    assert nothing[0] == 0 and nothing[1] == 0


def test_a_cost_by_hand():
    targets = ObjectSets([1], boxes((0.5, 0.5, 0.4, 0.4)))
    costs = HungarianMatcher().costs(torch.tensor([[[0.0]]]), boxes((0.7, 0.5, 0.4, 0.4))[None, None], targets)
    log2 = float(np.log(2))
    focal = 0.25 * 0.25 * log2 - 0.75 * 0.25 * log2
    assert costs.shape == (1, 1, 1)
    assert costs.item() == pytest.approx(5 * 0.2 + 2 * focal - 2 / 3, rel=1e-6)


def test_costs_hold_no_padding_and_each_target_meets_its_own_prompt():
    prediction, targets = drawn_sets([2, 0, 3])
    costs = HungarianMatcher().costs(prediction.logits, prediction.boxes, targets)
    assert costs.shape == (3, 5, 12)
    alone = ObjectSets([3], targets.boxes[2:])
    last = HungarianMatcher().costs(prediction.logits[:, 2:], prediction.boxes[:, 2:], alone)
    torch.testing.assert_close(costs[:, 2:], last)


def test_costs_are_the_same_in_pieces(monkeypatch):
    prediction, targets = drawn_sets([2, 0, 3])
    whole = HungarianMatcher().costs(prediction.logits, prediction.boxes, targets)
    for held in (1, 25, 1000):
        monkeypatch.setattr(matching, "CACHED", held)
        assert torch.equal(HungarianMatcher().costs(prediction.logits, prediction.boxes, targets), whole)


def test_every_layer_and_prompt_is_solved_at_the_least_sum():
    prediction, targets = drawn_sets([2, 0, 1], queries=4)
    matcher = HungarianMatcher()
    costs = matcher.costs(prediction.logits, prediction.boxes, targets)
    for layer, pairs in enumerate(matcher(prediction.logits, prediction.boxes, targets)):
        assert pairs.prompts.tolist() == [0, 0, 2] and pairs.targets.tolist() == [0, 1, 2]
        sums = [costs[layer, 0, a] + costs[layer, 1, b] for a in range(4) for b in range(4) if a != b]
        assert costs[layer, [0, 1], pairs.queries[:2]].sum() == pytest.approx(min(sums).item())
        assert pairs.queries[2] == costs[layer, 2].argmin()


def test_more_targets_than_queries_match_as_many_as_there_are_queries():
    prediction, targets = drawn_sets([7, 1], queries=3)
    for pairs in HungarianMatcher()(prediction.logits, prediction.boxes, targets):
        assert np.bincount(pairs.prompts).tolist() == [3, 1]
        assert sorted(pairs.queries[:3].tolist()) == [0, 1, 2] and len(set(pairs.targets.tolist())) == 4


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("part", ["logits", "boxes"])
def test_what_is_not_finite_is_matched_last(part, value):
    prediction, targets = drawn_sets([2, 1])
    getattr(prediction, part)[:, 0, :10] = value
    found = match(prediction, targets, HungarianMatcher(), OneToManyMatcher())
    for pairs in found.first:
        assert len(pairs) == 3
        if np.isnan(value):
            assert set(pairs.queries[:2].tolist()) <= {10, 11}
    getattr(prediction, part)[:] = value
    assert [len(pairs) for pairs in match(prediction, targets, HungarianMatcher(), OneToManyMatcher()).first] == [3] * 3


def scored(scores: list[float]) -> tuple[Tensor, Tensor, ObjectSets]:
    """Queries of these probabilities p on one target's very box: their score is 0.3 p + 0.7."""
    target = boxes((0.5, 0.5, 0.2, 0.2))
    logits = torch.logit(torch.tensor([scores]))
    return logits, target.expand(1, len(scores), 4), ObjectSets([1], target)


def kept(scores: list[float], **arguments: float) -> list[int]:
    logits, placed, targets = scored(scores)
    queries, valid = OneToManyMatcher(**arguments)(logits, placed, targets)  # type: ignore[arg-type]
    assert queries.shape == valid.shape == (1, min(OneToManyMatcher(**arguments).topk, len(scores)))  # type: ignore[arg-type]
    return sorted(queries[valid].tolist())


def test_a_target_keeps_its_best_queries_above_the_threshold():
    assert kept([0.1, 0.5, 0.3, 0.9, 0.7, 0.2]) == [1, 2, 3, 4]
    assert kept([0.1, 0.5, 0.3, 0.9, 0.7, 0.2], topk=1) == [3]
    assert kept([0.1, 0.5, 0.3, 0.9, 0.7, 0.2], threshold=0.9) == [3, 4]  # 0.97 and 0.91
    assert kept([0.1, 0.5, 0.3, 0.9, 0.7, 0.2], threshold=1.1) == []


def test_fewer_queries_than_topk_leave_it_to_the_threshold():
    assert kept([0.1, 0.5, 0.3]) == [0, 1, 2]
    assert kept([0.1, 0.5, 0.3], threshold=0.75) == [1, 2]


def test_ties_and_just_topk_queries_are_as_the_official_quantile_has_them():
    assert kept([0.1, 0.5, 0.3, 0.9]) == [1, 2, 3]
    assert kept([0.9, 0.8, 0.7, 0.5, 0.5, 0.2]) == [0, 1, 2]


def test_absent_targets_and_no_targets_keep_nothing():
    logits, placed, _ = scored([0.5, 0.6])
    queries, valid = OneToManyMatcher()(logits, placed, ObjectSets([0], torch.zeros(0, 4)))
    assert queries.shape == valid.shape == (0, 2)
    found = match(
        SetPrediction(logits[None], placed[None], many=SetPrediction(logits[None], placed[None])),
        ObjectSets([0], torch.zeros(0, 4)),
        HungarianMatcher(),
        OneToManyMatcher(),
    )
    assert [len(pairs) for pairs in (*found.first, *found.many)] == [0, 0]


def test_only_the_final_layer_of_the_second_half_is_matched_one_to_many():
    prediction, targets = drawn_sets([2, 0, 3], queries=20)
    assert prediction.many is not None
    found = match(prediction, targets, HungarianMatcher(), OneToManyMatcher(threshold=0.2))
    assert [len(pairs) for pairs in found.first] == [5] * 3
    assert [len(pairs) for pairs in found.many] == [5, 5, 20]
    alone = HungarianMatcher()(prediction.many.logits, prediction.many.boxes, targets)
    for layer in range(2):
        assert found.many[layer].queries.tolist() == alone[layer].queries.tolist()
    assert sorted(set(found.many[2].targets.tolist())) == list(range(5))
    assert set(found.many[2].prompts.tolist()) == {0, 2}


def test_the_last_pair_of_a_query_is_the_one_of_its_highest_target():
    pairs = Pairs(np.array([0, 0, 0, 2, 2]), np.array([3, 1, 3, 3, 3]), np.array([0, 1, 1, 2, 3]))
    assert pairs.last_of_query().tolist() == [1, 2, 4]
    assert Pairs(*np.empty((3, 0), np.int64)).last_of_query().tolist() == []


def test_targets_must_fit_the_prediction():
    prediction, targets = drawn_sets([2, 0, 3])
    for wrong in (ObjectSets([2, 3], targets.boxes), ObjectSets([2, 0, 2], targets.boxes)):
        with pytest.raises(ValueError, match="one count for each prompt"):
            match(prediction, wrong, HungarianMatcher(), OneToManyMatcher())


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"class_cost": -1}, "class_cost"),
        ({"class_cost": 0, "box_cost": 0, "giou_cost": 0}, "not all 0"),
        ({"box_cost": float("nan")}, "box_cost"),
        ({"alpha": 2}, "alpha"),
        ({"gamma": -1}, "gamma"),
    ],
)
def test_a_bad_argument_of_the_hungarian_matcher_is_named(arguments, named):
    with pytest.raises(UserError, match=named):
        HungarianMatcher(**arguments)


@pytest.mark.parametrize("arguments", [{"alpha": -0.1}, {"threshold": float("nan")}, {"topk": 0}])
def test_a_bad_argument_of_the_one_to_many_matcher_is_named(arguments):
    with pytest.raises(UserError, match=next(iter(arguments))):
        OneToManyMatcher(**arguments)
