"""Simulated prompts: the same whenever and wherever they are drawn, and where they belong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from jsonargparse import ArgumentParser
from truths import blank, cross, rectangle, truth_of

from data_shards.errors import UserError
from trainer.models import Preprocessing
from trainer.prompts import (
    BoxPrompts,
    ClickPrompts,
    MaskPrompts,
    MixedPrompts,
    PointPrompts,
    Prompter,
    Prompts,
    SAMBoxPrompts,
    Truth,
    prompts_of_targets,
)
from trainer.prompts.base import merged
from trainer.recipe import check_recipe


def middle(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Boxes far from the border of images of 200 rows and 256 columns."""
    return torch.tensor([[100.0, 60.0, 140.0, 120.0]]).repeat(count, 1), torch.tensor([[200, 256]]).repeat(count, 1)


def outward(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """By how many pixels each side went outwards: (Q, 4)."""
    return torch.cat([before[:, :2] - after[:, :2], after[:, 2:] - before[:, 2:]], dim=1)


def test_a_box_depends_on_seed_epoch_sample_and_target_and_on_nothing_else():
    identities = [(sample, target) for sample in range(10) for target in range(3)]
    boxes, sizes = middle(30)
    drawn = BoxPrompts(seed=7)(boxes, sizes, identities, 4)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0)).tolist()
    torch.manual_seed(123)
    shuffled = BoxPrompts(seed=7)(boxes, sizes, [identities[i] for i in order], 4)
    assert torch.equal(shuffled, drawn[order])
    for q in (0, 11, 29):
        alone = BoxPrompts(seed=7)(boxes[:1], sizes[:1], [identities[q]], 4)
        assert torch.equal(alone[0], drawn[q])


@pytest.mark.parametrize(
    ("seed", "epoch", "identity"), [(8, 4, (5, 1)), (7, 5, (5, 1)), (7, 4, (6, 1)), (7, 4, (5, 2)), (7, 4, (1, 5))]
)
def test_each_of_them_counts(seed, epoch, identity):
    boxes, sizes = middle(1)
    one = BoxPrompts(max_shift=50, seed=7)(boxes, sizes, [(5, 1)], 4)
    other = BoxPrompts(max_shift=50, seed=seed)(boxes, sizes, [identity], epoch)
    assert not torch.equal(one, other)


def test_sides_go_outwards_by_every_whole_number_up_to_the_largest_equally_often():
    boxes, sizes = middle(2000)
    shifts = outward(boxes, BoxPrompts(max_shift=5)(boxes, sizes, [(i, 0) for i in range(2000)], 0))
    for side in range(4):
        values, counts = shifts[:, side].unique(return_counts=True)
        assert values.tolist() == [0, 1, 2, 3, 4, 5]
        assert counts.min() > 2000 / 6 * 0.8
        assert counts.max() < 2000 / 6 * 1.2
    correlation = torch.corrcoef(shifts.T) - torch.eye(4)
    assert correlation.abs().max() < 0.1, "sides are drawn independently"


def test_boxes_stay_inside_their_image():
    boxes = torch.tensor([[2.0, 1.0, 253.0, 198.0]]).repeat(200, 1)
    sizes = torch.tensor([[200, 256]]).repeat(200, 1)
    moved = BoxPrompts(max_shift=20)(boxes, sizes, [(i, 0) for i in range(200)], 0)
    assert moved.amin(0).tolist()[:2] == [0, 0]
    assert moved.amax(0).tolist()[2:] == [255, 199]
    assert outward(boxes, moved).min() >= 0


@pytest.mark.parametrize("epoch", [None, 0])
def test_a_box_at_the_border_of_a_shrunk_image_is_not_pulled_inwards(epoch):
    """511 of 512 px is 255.5 of 256 px, beyond the index of the last pixel."""
    sizes = torch.tensor([[512, 400]])
    tight = torch.tensor([[0.0, 0.0, 399.0, 511.0]])
    boxes, inside = Preprocessing(image_size=256).boxes(tight, sizes)
    assert boxes.tolist() == [[0, 0, 199.5, 255.5]]
    assert torch.equal(BoxPrompts()(boxes, inside, [(0, 0)], epoch), boxes)


def test_evaluation_is_the_same_every_time():
    boxes, sizes = middle(3)
    for seed in (0, 1):
        assert torch.equal(BoxPrompts(seed=seed)(boxes, sizes, [(i, 0) for i in range(3)], None), boxes)
        shifted = BoxPrompts(eval_shift=5, seed=seed)(boxes, sizes, [(i, 0) for i in range(3)], None)
        assert torch.equal(outward(boxes, shifted), torch.full((3, 4), 5.0))


def test_no_shift_and_no_boxes():
    boxes, sizes = middle(3)
    assert torch.equal(BoxPrompts(max_shift=0)(boxes, sizes, [(i, 0) for i in range(3)], 2), boxes)
    for epoch in (None, 0):
        assert BoxPrompts()(boxes[:0], sizes[:0], [], epoch).shape == (0, 4)


@pytest.mark.parametrize("arguments", [{"max_shift": -1}, {"eval_shift": -1}, {"seed": -1}])
def test_arguments_that_make_no_sense(arguments):
    (name,) = arguments
    with pytest.raises(UserError, match=name):
        BoxPrompts(**arguments)


def test_prompts_have_a_length():
    assert len(Prompts(image_index=torch.tensor([0, 0, 1]), boxes=torch.zeros(3, 4))) == 3


# -- every prompter --------------------------------------------------------------------------------------------------

PROMPTERS: dict[str, Prompter] = {
    "boxes": BoxPrompts(seed=7),
    "sam boxes": SAMBoxPrompts(seed=7),
    "points": PointPrompts(positive=2, negative=2, seed=7),
    "masks": MaskPrompts(seed=7),
    "mixed": MixedPrompts([BoxPrompts(seed=7), PointPrompts(seed=7), MaskPrompts(seed=7)], seed=7),
    "clicks": ClickPrompts(seed=7),
}


def scene(count: int = 12) -> Truth:
    """Rectangles of many sizes in the upper left of an image, valid up to 28 rows and 30 columns."""
    masks = [rectangle(q, q // 2, q + 3 + q % 5, q // 2 + 6 + q % 3) for q in range(count)]
    return truth_of(masks, [(q // 3, q % 3) for q in range(count)], size=(28, 30))


def by_target(asked: list[Prompts], count: int) -> list[dict[str, list[Any]]]:
    """What each target was asked, as plain values."""
    found: list[dict[str, list[Any]]] = [{} for _ in range(count)]
    for prompts in asked:
        assert prompts.rows is not None
        for place, row in enumerate(prompts.rows.tolist()):
            assert not found[row], "a target is asked once"
            for name in ("image_index", "boxes", "points", "labels", "masks"):
                tensor = getattr(prompts, name)
                if tensor is not None:
                    found[row][name] = tensor[place].tolist()
    assert all(found), "no target is left out"
    return found


@pytest.mark.parametrize("name", PROMPTERS)
@pytest.mark.parametrize("epoch", [None, 0, 3])
def test_a_target_is_asked_the_same_in_any_batch(name, epoch):
    prompter, truth = PROMPTERS[name], scene()
    whole = by_target(prompter.first(truth, epoch), 12)
    order = torch.tensor([7, 0, 11, 3])
    torch.manual_seed(123)
    part = by_target(prompter.first(truth.subset(order), epoch), 4)
    assert part == [whole[row] for row in order.tolist()]
    assert [found["image_index"] for found in whole] == list(range(12))


@pytest.mark.parametrize("name", PROMPTERS)
def test_epochs_and_seeds_differ_and_evaluations_do_not(name):
    truth = scene()
    prompter, other = PROMPTERS[name], type(PROMPTERS[name])
    one = by_target(prompter.first(truth, 0), 12)
    assert one != by_target(prompter.first(truth, 1), 12)
    if name != "mixed":
        again = {"points": {"positive": 2, "negative": 2}}.get(name, {})
        reseeded = other(**again, seed=8)
        assert one != by_target(reseeded.first(truth, 0), 12)
        assert by_target(prompter.first(truth, None), 12) == by_target(reseeded.first(truth, None), 12)


@pytest.mark.parametrize("name", PROMPTERS)
@pytest.mark.parametrize("epoch", [None, 0])
def test_no_targets_and_empty_ones(name, epoch):
    (nothing,) = PROMPTERS[name].first(truth_of([]), epoch)
    assert len(nothing) == 0
    asked = PROMPTERS[name].first(truth_of([blank(), rectangle(3, 3, 9, 9)], size=(20, 20)), epoch)
    labels = prompts_of_targets(asked, 2)[2]
    assert not (labels[0] == 1).any(), "there is nothing to point at"


# -- SAM's boxes -----------------------------------------------------------------------------------------------------


def test_sam_moves_each_coordinate_by_a_tenth_of_its_side():
    masks = [rectangle(100, 60, 150, 160, side=256)] * 1500  # 50 px wide, 100 px high
    truth = truth_of(masks, [(q, 0) for q in range(1500)])
    (asked,) = SAMBoxPrompts(seed=1).first(truth, 0)
    assert asked.boxes is not None
    moves = asked.boxes - truth.boxes
    assert moves.mean(0).abs().max() < 0.6
    assert moves.std(0)[[0, 2]].tolist() == pytest.approx([5, 5], rel=0.06)
    assert moves.std(0)[[1, 3]].tolist() == pytest.approx([9.75, 9.75], rel=0.06), "10, less what is cut off at 20"
    assert moves.abs().max() == 20, "SAM's limit"
    assert ((moves.abs() == 20).float().mean(0)[[1, 3]] - 0.0455).abs().max() < 0.02, "beyond two deviations"
    assert (torch.corrcoef(moves.T) - torch.eye(4)).abs().max() < 0.1
    (tight,) = SAMBoxPrompts(seed=1).first(truth, None)
    assert tight.boxes is not None
    assert torch.equal(tight.boxes, truth.boxes)


def test_sam_boxes_stay_inside_and_upright_whatever_the_noise():
    masks = [rectangle(0, 0, 29, 27), rectangle(28, 26, 29, 27), rectangle(5, 5, 5, 5)] * 100
    truth = truth_of(masks, size=(28, 30))
    (asked,) = SAMBoxPrompts(noise=2.0, max_noise=50, seed=1).first(truth, 0)
    assert asked.boxes is not None
    assert asked.boxes.amin(0).tolist()[:2] == [0, 0]
    assert asked.boxes.amax(0).tolist()[2:] == [29, 27]
    assert (asked.boxes[:, 2:] >= asked.boxes[:, :2]).all()
    assert torch.equal(asked.boxes[2::3], truth.boxes[2::3]), "a side of no length does not move"


# -- points ----------------------------------------------------------------------------------------------------------


def chi_square(points: torch.Tensor, region: torch.Tensor) -> tuple[float, int]:
    """How far points (N, 2) are from uniform over the pixels of a region: the statistic, and degrees of freedom."""
    counts = torch.zeros_like(region)
    for x, y in points.long().tolist():
        counts[y, x] += 1
    assert counts[region == 0].sum() == 0, "no point outside"
    expected = len(points) / float(region.sum())
    return float(((counts[region > 0] - expected) ** 2 / expected).sum()), int(region.sum()) - 1


def test_points_are_drawn_uniformly_from_the_target_and_from_around_it():
    count = 3000
    truth = truth_of([cross()] * count, [(q, 1) for q in range(count)], size=(20, 20))
    (asked,) = PointPrompts(positive=1, negative=1, seed=3).first(truth, 5)
    assert asked.points is not None
    assert asked.labels is not None
    assert asked.labels.tolist() == [[1, 0]] * count
    statistic, freedom = chi_square(asked.points[:, 0], cross())
    assert freedom == 31
    assert statistic < 61.1, "the 99.9th percentile of chi-square with 31 degrees of freedom"
    # the box is x 8 to 17, y 12 to 19; half of 9 px on each side, inside 20 rows and 20 columns
    around = rectangle(4, 8, 19, 19) - cross()
    statistic, freedom = chi_square(asked.points[:, 1], around)
    assert freedom == 16 * 12 - 32 - 1
    assert statistic < 159 + 3.1 * (2 * 159) ** 0.5 + 5
    together = torch.corrcoef(torch.cat([asked.points[:, 0], asked.points[:, 1]], dim=1).T)[:2, 2:]
    assert together.abs().max() < 0.06, "drawn independently"


def test_in_evaluation_points_are_innermost_and_spread():
    # 9 x 9 around (10, 10); in its quarters the deepest pixels are then those farthest from the first point and border
    truth = truth_of([rectangle(6, 6, 14, 14)])
    (asked,) = PointPrompts(positive=2, negative=1).first(truth, None)
    assert asked.points is not None
    assert asked.labels is not None
    assert asked.points[0, 0].tolist() == [10, 10]
    # distance to the border and to (10, 10): 3 to both at (8, 8); no pixel has more
    assert asked.points[0, 1].tolist() == [8, 8]
    # the ring around it is 4 px wide (2 to 18): in its corner (3, 3) the nearest pixel outside is 2 px away,
    # at (4, 4) 5 - 4 = 2 from the target's corner diagonally, sqrt(8), and 3 from the ring's edge
    assert asked.points[0, 2].tolist() == [4, 4]
    assert asked.labels.tolist() == [[1, 1, 0]]


def test_where_the_target_fills_its_surroundings_points_go_elsewhere_or_nowhere():
    full = rectangle(0, 0, 9, 9)
    for epoch in (None, 0):
        (asked,) = PointPrompts(negative=2).first(truth_of([full], size=(10, 10)), epoch)
        assert asked.labels is not None
        assert asked.labels.tolist() == [[1, -1, -1]], "no pixel of the image is beside the target"
        points = prompts_of_targets([asked], 1)[1]
        assert points[0, 0].isfinite().all()
        assert points[0, 1:].isnan().all(), "such a point is not shown"
    for epoch in (None, 0):  # a single pixel has neighbours
        (asked,) = PointPrompts(positive=3, negative=1).first(truth_of([rectangle(4, 5, 4, 5)]), epoch)
        assert asked.points is not None
        assert asked.points[0, :3].tolist() == [[4, 5]] * 3
        assert (asked.points[0, 3] - torch.tensor([4.0, 5.0])).abs().max() == 1


# -- masks -----------------------------------------------------------------------------------------------------------


def test_masks_are_logits_of_the_decoders_size():
    truth = truth_of([rectangle(8, 8, 23, 15)], mask_side=8)  # whole blocks of 4 pixels
    (asked,) = MaskPrompts(eval_block=1).first(truth, None)
    assert asked.masks is not None
    expected = torch.full((1, 8, 8), -6.9068)
    expected[0, 2:4, 2:6] = 6.9068  # ln(0.999 / 0.001)
    assert torch.allclose(asked.masks, expected, atol=1e-3)
    (coarse,) = MaskPrompts(eval_block=8).first(truth, None)
    assert coarse.masks is not None
    assert torch.allclose(coarse.masks, expected), "blocks are no larger than half of 2 pixels"


def test_a_coarse_mask_is_the_mean_of_its_blocks():
    mask = rectangle(4, 4, 17, 15)
    (asked,) = MaskPrompts(eval_block=4).first(truth_of([mask]), None)
    assert asked.masks is not None
    means = mask.reshape(8, 4, 8, 4).mean((1, 3)).repeat_interleave(4, 0).repeat_interleave(4, 1)
    assert torch.allclose(asked.masks[0].sigmoid(), means.clamp(1e-3, 1 - 1e-3), atol=1e-5)
    assert {0.5} <= set(means.unique().tolist()), "some blocks are half full"


def test_masks_in_training_are_shifted_grown_and_shrunk_within_bounds_and_never_lost():
    mask = rectangle(40, 40, 79, 79, side=128)  # 40 x 40
    truth = truth_of([mask] * 400, [(q, 0) for q in range(400)])
    (asked,) = MaskPrompts(max_shift=0.1, max_growth=0.1, max_block=1, seed=2).first(truth, 0)
    assert asked.masks is not None
    on = asked.masks > 0
    rows, columns = on.any(2).float(), on.any(1).float()
    for line in (rows, columns):
        first, length = line.argmax(1), line.sum(1)
        assert sorted(set(length.tolist())) == [40 + 2 * growth for growth in range(-4, 5)]
        middle = first + (length - 1) / 2 - 59.5
        assert middle.min() == -4
        assert middle.max() == 4
    assert torch.equal(on.flatten(1).sum(1).float(), rows.sum(1) * columns.sum(1)), "a square stays a square"
    sizes = MaskPrompts(max_shift=0, max_growth=0, max_block=8, seed=2).first(truth, 0)[0].masks
    assert sizes is not None
    assert len({tuple(one.flatten().tolist()) for one in sizes}) > 3, "blocks of several sizes"


def test_the_smallest_target_keeps_a_mask_and_the_padding_has_none():
    truth = truth_of([rectangle(5, 5, 5, 5), rectangle(20, 18, 23, 19)] * 50, size=(20, 24), mask_side=8)
    for epoch in (None, *range(5)):
        (asked,) = MaskPrompts(max_shift=1, max_growth=1).first(truth, epoch)
        assert asked.masks is not None
        assert ((asked.masks > 0).flatten(1).sum(1) >= 1).all()
        assert (asked.masks[:, 5:] < -6.9).all()
        assert (asked.masks[:, :, 6:] < -6.9).all()


# -- mixtures --------------------------------------------------------------------------------------------------------


def test_a_mixture_draws_by_weight_and_merges_what_has_the_same_form():
    count = 2000
    truth = truth_of([rectangle(3, 3, 9, 9, side=16)] * count, [(q, 0) for q in range(count)])
    mixed = MixedPrompts([BoxPrompts(), PointPrompts(), SAMBoxPrompts(), PointPrompts(positive=2)], [4, 3, 2, 1])
    asked = mixed.first(truth, 0)
    forms = [(p.boxes is None, None if p.points is None else p.points.shape[1]) for p in asked]
    assert forms == [(False, None), (True, 1), (True, 2)], "both kinds of boxes are decoded at once"
    shares = [len(prompts) / count for prompts in asked]
    assert shares == pytest.approx([0.6, 0.3, 0.1], abs=0.035)
    boxes = asked[0]
    assert boxes.rows is not None
    assert boxes.rows.tolist() == sorted(boxes.rows.tolist())
    assert boxes.image_index.tolist() == boxes.rows.tolist()
    by_target(asked, count)
    alone = by_target(BoxPrompts().first(truth, 0), count)
    sam = by_target(SAMBoxPrompts().first(truth, 0), count)
    found = by_target(asked, count)
    kinds = [found[q] in (alone[q], sam[q]) for q in boxes.rows.tolist()]
    assert all(kinds), "each as its prompter asks it"


def test_what_a_mixture_chooses_says_nothing_about_what_is_drawn():
    count = 2000
    truth = truth_of([rectangle(0, 0, 15, 15, side=16)] * count, [(q, 0) for q in range(count)])
    boxes, points = MixedPrompts([BoxPrompts(seed=1), PointPrompts(seed=1)], seed=1).first(truth, 0)
    if boxes.points is not None:
        boxes, points = points, boxes
    assert points.points is not None
    assert points.points.mean((0, 1)).tolist() == pytest.approx([7.5, 7.5], abs=0.5)
    assert points.points.amin((0, 1)).tolist() == [0, 0]
    assert points.points.amax((0, 1)).tolist() == [15, 15]


def test_weight_zero_is_never_drawn_and_evaluation_takes_one():
    truth = scene()
    never = MixedPrompts([BoxPrompts(), PointPrompts(), MaskPrompts()], [1, 0, 1])
    assert all(prompts.points is None for epoch in range(20) for prompts in never.first(truth, epoch))
    (first,) = never.first(truth, None)
    assert torch.equal(first.boxes, truth.boxes)  # type: ignore[arg-type]
    second = MixedPrompts([BoxPrompts(), PointPrompts()], eval_prompter=1)
    assert second.first(truth, None)[0].points is not None
    assert second.describe() == {
        "kind": "MixedPrompts",
        "first": {"kind": "PointPrompts", "positive": 1, "negative": 0},
    }


def test_merging_keeps_forms_apart():
    def points(rows: list[int], count: int) -> Prompts:
        index = torch.tensor(rows)
        return Prompts(
            index, points=index[:, None, None].float().expand(-1, count, 2), labels=torch.ones(len(rows), count).long(),
            rows=index,
        )  # fmt: skip

    joined = merged([points([5, 1], 1), points([0], 2), points([3], 1), points([2], 2)])
    assert [p.rows.tolist() for p in joined if p.rows is not None] == [[1, 3, 5], [0, 2]]
    assert joined[0].points is not None
    assert joined[0].points[:, 0, 0].tolist() == [1, 3, 5]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: SAMBoxPrompts(noise=-0.1), "noise"),
        (lambda: SAMBoxPrompts(max_noise=float("nan")), "max_noise"),
        (lambda: PointPrompts(positive=0), "positive"),
        (lambda: PointPrompts(negative=-1), "negative"),
        (lambda: MaskPrompts(max_shift=1.5), "max_shift"),
        (lambda: MaskPrompts(max_growth=-0.1), "max_growth"),
        (lambda: MaskPrompts(max_block=0), "max_block"),
        (lambda: MaskPrompts(eval_block=0), "eval_block"),
        (lambda: MixedPrompts([]), "prompters is empty"),
        (lambda: MixedPrompts([BoxPrompts()], [1, 2]), "weights"),
        (lambda: MixedPrompts([BoxPrompts(), PointPrompts()], [0, 0]), "weights"),
        (lambda: MixedPrompts([BoxPrompts(), PointPrompts()], [2, -1]), "weights"),
        (lambda: MixedPrompts([BoxPrompts(), PointPrompts()], [1, float("nan")]), "weights"),
        (lambda: MixedPrompts([BoxPrompts()], eval_prompter=1), "eval_prompter"),
        (lambda: MixedPrompts([MixedPrompts([BoxPrompts()])]), "mixture in a mixture"),
        (lambda: MixedPrompts([BoxPrompts(), ClickPrompts()]), "start.* of ClickPrompts"),
        (lambda: ClickPrompts(corrections=-1), "corrections"),
        (lambda: ClickPrompts(eval_corrections=-1), "eval_corrections"),
        (lambda: ClickPrompts(blank=-1), "blank"),
        (lambda: ClickPrompts(mask=False), "set blank to 0"),
        (lambda: ClickPrompts(ClickPrompts()), "start ClickPrompts"),
        (lambda: PointPrompts(seed=-1), "seed"),
    ],
)
def test_arguments_out_of_range_are_one_line(make, words):
    with pytest.raises(UserError, match=words) as error:
        make()
    assert "\n" not in str(error.value)


# -- recipes ---------------------------------------------------------------------------------------------------------

NESTED = """
# Do clicks help?
# Launch: trainer fit
prompts:
  class_path: trainer.prompts.ClickPrompts
  init_args:
    corrections: 3
    eval_corrections: 2
    start:
      class_path: trainer.prompts.MixedPrompts
      init_args:
        weights: [2, 1, 1]
        prompters:
          - {class_path: trainer.prompts.SAMBoxPrompts, init_args: {noise: 0.2, max_noise: 5}}
          - {class_path: trainer.prompts.PointPrompts, init_args: {positive: 2, negative: 1}}
          - class_path: trainer.prompts.MaskPrompts
"""


def test_a_recipe_nests_prompters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "11")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(NESTED)
    check_recipe(recipe)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Prompter, "prompts", required=True)
    built = parser.instantiate_classes(parser.parse_object(yaml.safe_load(NESTED))).prompts
    assert isinstance(built, ClickPrompts)
    assert (built.rounds(0), built.rounds(None)) == (5, 2)
    assert isinstance(built.start, MixedPrompts)
    assert built.start.shares.tolist() == [0.5, 0.75, 1]
    boxes, points, masks = built.start.prompters
    assert isinstance(boxes, SAMBoxPrompts)
    assert isinstance(points, PointPrompts)
    assert isinstance(masks, MaskPrompts)
    assert (boxes.noise, boxes.max_noise, points.positive, points.negative) == (0.2, 5, 2, 1)
    assert built.seed == boxes.seed == masks.seed == 11, "the run's"
    assert built.describe() == {
        "kind": "ClickPrompts",
        "first": {"kind": "MixedPrompts", "first": {"kind": "SAMBoxPrompts"}},
        "corrections": 2,
        "mask": True,
    }


@pytest.mark.parametrize(
    ("wrong", "right"), [("PointPrompts", "PointPromts"), ("positive", "postive"), ("prompters:", "promters:")]
)
def test_a_typo_in_a_nested_prompter_is_named(tmp_path: Path, wrong: str, right: str):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(NESTED.replace(wrong, right))
    with pytest.raises(UserError, match=rf"{right.strip(':')}.*did you mean '.*{wrong.strip(':')}'"):
        check_recipe(recipe)
