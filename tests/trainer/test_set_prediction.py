"""SAM3's loss against the recorded official values and gradients, by hand, and where numbers get awkward."""

from __future__ import annotations

from dataclasses import replace
from math import log, sqrt

import numpy as np
import object_sets
import pytest
import torch
from object_sets import drawn_sets, gradients_of, joined, leaves_of
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from data_shards.errors import UserError
from trainer.losses import FactoredMasks, ObjectSets, SetPrediction, SetPredictionLoss
from trainer.losses.matching import HungarianMatcher, OneToManyMatcher

SEGMENTATION = {"mask_weight": 200.0, "dice_weight": 10.0}


def single(logit: float = 0.0, target: tuple[float, ...] = (0.5, 0.5, 0.4, 0.4)) -> tuple[SetPrediction, ObjectSets]:
    """One layer, one prompt, one query half beside the one target, and a second prompt without a target."""
    box = torch.tensor([0.7, 0.5, 0.4, 0.4]).expand(1, 2, 1, 4)
    prediction = SetPrediction(torch.full((1, 2, 1), logit), box, torch.tensor([[1.0, -2.0]]))
    return prediction, ObjectSets([1, 0], torch.tensor([target]))


def test_components_by_hand():
    found = SetPredictionLoss(padded_queries=4)(*single())
    assert found["box_loss"].item() == pytest.approx(0.2)
    assert found["giou_loss"].item() == pytest.approx(1 - 1 / 3)
    quality = 0.5**0.25 * (1 / 3) ** 0.75
    assert quality > 0.01
    assert found["class_loss"].item() == pytest.approx(10 * log(2) / (4 * 2))  # whatever the target, at a logit of 0
    assert found["presence_loss"].item() == pytest.approx(0.25 * (log(1 + np.exp(-1)) + log(1 + np.exp(-2))), rel=1e-6)
    weighted = 5 * 0.2 + 2 * 2 / 3 + 20 * found["class_loss"].item() + 20 * found["presence_loss"].item()
    assert found["loss"].item() == pytest.approx(sqrt(2) * weighted, rel=1e-6)
    assert found.keys() == {"loss", "box_loss", "giou_loss", "class_loss", "presence_loss"}


def test_the_classification_target_is_a_product_of_powers_with_a_floor():
    for logit, beside, expected in ((1.3, 0.7, None), (1.3, 0.95, 0.01)):
        prediction, targets = single(logit)
        prediction = replace(prediction, boxes=torch.tensor([beside, 0.5, 0.4, 0.4]).expand(1, 2, 1, 4))
        found = SetPredictionLoss(padded_queries=0)(prediction, targets)["class_loss"].item()
        probability = 1 / (1 + np.exp(-logit))
        quality = expected or probability**0.25 * (1 / 3) ** 0.75
        entropy = -quality * log(probability) - (1 - quality) * log(1 - probability)
        assert found == pytest.approx(10 * entropy / 2, rel=1e-5)


def test_a_target_without_an_area_is_matched_but_not_present():
    found = SetPredictionLoss()(*single(target=(0.6, 0.5, 0.0, 0.0)))
    assert found["box_loss"].item() == pytest.approx(0.1 + 0.4 + 0.4)
    assert found["class_loss"] == 0
    expected = 0.25 * (log(1 + np.exp(1)) + log(1 + np.exp(-2)))
    assert found["presence_loss"].item() == pytest.approx(expected, rel=1e-6)


def test_the_loss_is_the_weighted_sum_of_its_components():
    prediction, targets = drawn_sets([2, 0, 3])
    loss = SetPredictionLoss(**SEGMENTATION, one_to_many_weight=3, scale_by_prompts=False)
    found = loss(prediction, targets)
    weights = {"box": 5, "giou": 2, "class": 20, "presence": 20, "mask": 200, "dice": 10, "semantic": 20}
    expected = 30 * found.pop("semantic_dice")
    total = found.pop("loss")
    for name, value in found.items():
        expected = expected + weights[name.split("_")[0]] * (3 if "_many" in name else 1) * value
        assert value.ndim == 0
    torch.testing.assert_close(total, expected)
    aux = {f"{name}_loss{half}_aux" for name in ("box", "giou", "class") for half in ("", "_many")}
    assert aux | {"presence_loss_aux"} == {name for name in found if name.endswith("_aux")}
    layers = loss.components(prediction, targets)["box_loss"]
    assert found["box_loss"] == layers[2] and found["box_loss_aux"] == layers[:2].sum()


def test_matches_that_are_known_are_not_looked_for_again(monkeypatch):
    prediction, targets = drawn_sets([2, 0, 3])
    loss = SetPredictionLoss()
    matches = loss.match(prediction, targets)
    expected = loss(prediction, targets)["loss"]
    monkeypatch.setattr(loss, "match", None)
    assert loss(prediction, targets, matches=matches)["loss"] == expected


AWKWARD = {
    "no target at all": ([0, 0, 0], {}),
    "no target in some": ([0, 2, 0], {}),
    "one prompt": ([3], {}),
    "more targets than queries": ([7, 0, 1], {"queries": 4}),
    "fewer queries than topk": ([1, 2], {"queries": 3}),
    "one query": ([1, 2], {"queries": 1}),
    "no prompt": ([], {}),
}


def assert_finite(
    loss: SetPredictionLoss,
    prediction: SetPrediction,
    targets: ObjectSets,
    aside: str = "nothing",
    autocast: bool = False,
) -> None:
    leaves = {name: leaf for name, leaf in leaves_of(prediction).items() if aside not in name}
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        value = loss(prediction, targets)["loss"]
    assert torch.isfinite(value)
    for name, gradient in gradients_of(value, leaves).items():
        assert gradient is not None, f"{name} takes no part"
        assert torch.isfinite(gradient).all(), name


@pytest.mark.parametrize("options", [{}, {"mask_at": "target"}, {"mask_chunk": 2}, {"mask_points": 5}])
@pytest.mark.parametrize("case", AWKWARD)
def test_all_is_finite_and_takes_part(case, options):
    counts, sizes = AWKWARD[case]
    prediction, targets = drawn_sets(counts, **sizes)
    loss = SetPredictionLoss(**SEGMENTATION, **options)
    assert_finite(loss, prediction, targets, aside="nothing" if counts else ".masks")


@pytest.mark.parametrize("size", [(0.0, 0.0), (0.0, 0.1), (0.1, 0.1), (1.0, 1.0)])
def test_boxes_without_an_area_and_the_very_boxes_of_the_targets_are_finite(size):
    prediction, targets = drawn_sets([2, 3])
    prediction.boxes[..., 2:] = torch.tensor(size)
    prediction.many.boxes[:] = prediction.boxes
    for wanted in (targets.boxes, prediction.boxes[-1, 0, :5].clone(), torch.full((5, 4), 0.5), torch.zeros(5, 4)):
        assert_finite(SetPredictionLoss(**SEGMENTATION), prediction, replace(targets, boxes=wanted))


@pytest.mark.parametrize("value", [-100.0, 100.0])
@pytest.mark.parametrize("part", ["logits", "presence", "semantic"])
def test_steep_logits_are_finite(part, value):
    for counts in ([2, 0, 3], [0, 0, 0]):
        prediction, targets = drawn_sets(counts)
        getattr(prediction, part)[:] = value
        prediction.many.logits[:] = value
        assert_finite(SetPredictionLoss(**SEGMENTATION), prediction, targets)


def test_steep_masks_are_finite():
    prediction, targets = drawn_sets([2, 0, 3], factored=False)
    for half, value in ((prediction, 100.0), (prediction.many, -100.0)):
        half.masks.logits[:] = value
    assert_finite(SetPredictionLoss(**SEGMENTATION), prediction, targets)


def in_bfloat16(prediction: SetPrediction) -> SetPrediction:
    def lower(value: object) -> object:
        if isinstance(value, SetPrediction):
            return in_bfloat16(value)
        if isinstance(value, FactoredMasks):
            return FactoredMasks(*(part.bfloat16() for part in vars(value).values()))
        return value.bfloat16() if isinstance(value, Tensor) else value

    return SetPrediction(**{name: lower(value) for name, value in vars(prediction).items()})  # type: ignore[arg-type]


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_is_computed_in_fp32(autocast):
    prediction, targets = drawn_sets([2, 0, 3])
    low = in_bfloat16(prediction)
    back = replace(low, logits=low.logits.float(), boxes=low.boxes.float(), presence=low.presence.float())
    loss = SetPredictionLoss()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = loss(low, targets)
    assert found["loss"].dtype == torch.float32
    expected = loss(replace(back, semantic=low.semantic.float()), targets)
    for name in found:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-6, atol=0)
    assert_finite(SetPredictionLoss(**SEGMENTATION, mask_chunk=2), low, targets, autocast=autocast)


@pytest.mark.parametrize("part", ["logits", "boxes", "presence", "semantic"])
@pytest.mark.parametrize("everywhere", [False, True])
def test_a_nan_makes_the_loss_nan(part, everywhere):
    prediction, targets = drawn_sets([0, 2, 3])
    tensor = getattr(prediction, part)
    tensor[... if everywhere else (0,) * tensor.ndim] = float("nan")  # the first prompt has no target
    assert torch.isnan(SetPredictionLoss()(prediction, targets)["loss"])


def test_an_all_empty_batch_gives_zeros_where_a_batch_with_targets_gives_gradients():
    prediction, targets = drawn_sets([0, 0])
    leaves = leaves_of(prediction)
    loss = SetPredictionLoss(**SEGMENTATION)(prediction, targets)["loss"]
    for name, gradient in gradients_of(loss, leaves).items():
        assert gradient is not None, name
        assert (gradient.count_nonzero() > 0) == (name == "first.presence"), name


def test_without_a_weight_masks_take_no_part():
    prediction, targets = drawn_sets([2, 0, 3])
    leaves = leaves_of(prediction)
    bare = replace(targets, masks=None)
    found = SetPredictionLoss(semantic_weight=0, semantic_dice_weight=0)(prediction, bare)
    gradients = gradients_of(found["loss"], leaves)
    assert {name for name, gradient in gradients.items() if gradient is None} == {
        *(f"{half}.masks.{part}" for half in ("first", "many") for part in ("queries", "pixels", "offsets")),
        "first.semantic",
    }
    for weights in ({"mask_weight": 1}, {}):
        with pytest.raises(UserError, match=r"have no masks: set (mask|semantic)_weight and \w+ to 0"):
            SetPredictionLoss(**weights)(prediction, bare)


@pytest.mark.parametrize("case", object_sets.RANK_COUNTS)
def test_the_mean_over_ranks_is_the_loss_of_one_process_with_all_prompts(case, tmp_path):
    arguments = (object_sets.free_port(), case, str(tmp_path))
    torch.multiprocessing.start_processes(
        object_sets.rank_main, arguments, nprocs=object_sets.RANKS, start_method="fork"
    )
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(object_sets.RANKS)]
    parts = [drawn_sets(counts, seed=rank) for rank, counts in enumerate(object_sets.RANK_COUNTS[case])]
    loss = SetPredictionLoss(mask_weight=1, dice_weight=1)
    together = loss(*joined(parts))
    assert ranks[0].keys() == together.keys() and len(together) > 15
    for name, value in together.items():
        torch.testing.assert_close(sum(found[name] for found in ranks) / len(ranks), value, msg=name)
    alone = [loss(*part)["loss"] for part in parts]
    assert (sum(alone) / 2 - together["loss"]).abs() > 0.01 * together["loss"], "each by itself is something else"


def test_nothing_but_the_match_waits_for_the_device():
    """On tensors that only pretend to be on a GPU, reading a value fails; so does mixing devices."""
    loss = SetPredictionLoss(**SEGMENTATION, mask_chunk=3)
    matches = loss.match(*drawn_sets([2, 0, 3]))
    with FakeTensorMode(allow_non_fake_inputs=True):
        prediction, targets = drawn_sets([2, 0, 3], device="cuda")
        targets = replace(targets, has_mask=torch.ones(5, dtype=torch.bool, device="cuda"))
        leaves_of(prediction)
        found = loss(prediction, targets, matches=matches)
        assert all(value.device.type == "cuda" for value in found.values())
        with pytest.raises(DataDependentOutputException):
            found["loss"].item()
        costs = HungarianMatcher().costs(prediction.logits, prediction.boxes, targets)
        queries, kept = OneToManyMatcher()(prediction.logits[-1], prediction.boxes[-1], targets)
        assert {costs.device.type, queries.device.type, kept.device.type} == {"cuda"}


def test_the_match_copies_once(monkeypatch):
    prediction, targets = drawn_sets([2, 0, 3], layers=6)
    leaves_of(prediction)
    copies = []
    real = Tensor.cpu
    monkeypatch.setattr(Tensor, "cpu", lambda tensor: copies.append(tensor.shape) or real(tensor))
    SetPredictionLoss(**SEGMENTATION)(prediction, targets)["loss"].backward()
    assert copies == [(11 * 5 * 12 + 5 * 4,)]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"box_weight": -1}, "box_weight is -1"),
        ({"semantic_dice_weight": float("inf")}, "semantic_dice_weight is inf"),
        ({"positive_weight": float("nan")}, "positive_weight is nan"),
        ({"one_to_many_weight": -2}, "one_to_many_weight is -2"),
        ({"alpha": 1.5}, "alpha is 1.5"),
        ({"gamma": 0.5}, "gamma is 0.5"),
        ({"padded_queries": -1}, "padded_queries is -1"),
        ({"mask_at": "heads"}, "did you mean 'head'"),
        ({"mask_chunk": 0}, "mask_chunk is 0"),
        ({"mask_points": 0}, "mask_points is 0"),
    ],
)
def test_a_bad_argument_is_named(arguments, named):
    with pytest.raises(UserError, match=named):
        SetPredictionLoss(**arguments)
