"""Simulated boxes: the same whenever and wherever they are drawn, and never smaller than the truth."""

from __future__ import annotations

import pytest
import torch

from data_shards.errors import UserError
from trainer.models import Preprocessing
from trainer.prompts import BoxPrompts, Prompts


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
