"""Detection of lesions by hand, and against an exhaustive search for the best matching."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
from scipy.ndimage import label

from trainer.metrics import detect, pool


def squares(*corners: tuple[int, int, int], shape: tuple[int, int] = (30, 40)) -> np.ndarray:
    """Squares by top, left and side."""
    mask = np.zeros(shape, bool)
    for top, left, side in corners:
        mask[top : top + side, left : left + side] = True
    return mask


def test_found_missed_and_false_by_hand() -> None:
    truth = squares((2, 2, 4), (2, 20, 4), (20, 2, 2))
    prediction = squares((2, 4, 4), (2, 20, 4), (20, 30, 3))
    found = detect(prediction, truth)
    assert [(lesion.size, lesion.found) for lesion in found.lesions] == [(16, True), (16, True), (4, False)]
    assert [lesion.dice for lesion in found.lesions] == pytest.approx([0.5, 1, 0])
    assert [lesion.iou for lesion in found.lesions] == pytest.approx([8 / 24, 1, 0])
    assert found.false_sizes == (9,)
    assert (found.true_positives, found.misses, found.false_positives) == (2, 1, 1)
    assert (found.sensitivity, found.precision, found.f1) == pytest.approx((2 / 3, 2 / 3, 2 / 3))
    assert found.lesion_wise_dice == pytest.approx(1.5 / 4), "three lesions and a false piece"


def test_the_overlap_decides_what_was_found() -> None:
    truth, prediction = squares((2, 2, 4)), squares((2, 4, 4))  # IoU 1/3
    for overlap, found in ((0.0, True), (0.1, True), (1 / 3, True), (0.34, False), (0.5, False), (1.0, False)):
        result = detect(prediction, truth, overlap=overlap)
        assert (result.lesions[0].found, result.false_positives) == (found, not found), overlap
    corner = squares((5, 5, 4))  # one common pixel
    assert detect(corner, truth, overlap=0).true_positives == 1
    assert detect(corner, truth).true_positives == 0, "1 of 31 is not enough"
    assert detect(squares((6, 6, 4)), truth, overlap=0).true_positives == 0, "touching is not overlapping"
    assert detect(truth, truth, overlap=1).true_positives == 1


def test_pieces_that_touch_at_a_corner_are_one() -> None:
    diagonal = np.eye(5, dtype=bool)
    assert len(detect(diagonal, diagonal).lesions) == 1
    volume = np.zeros((3, 3, 3), bool)
    volume[0, 0, 0] = volume[1, 1, 1] = volume[2, 2, 2] = True
    assert len(detect(volume, volume).lesions) == 1


def test_a_piece_over_two_lesions_finds_one() -> None:
    truth = squares((2, 2, 4), (2, 8, 6))
    merged = np.zeros_like(truth)
    merged[2:8, 2:14] = True
    found = detect(merged, truth)
    assert [lesion.found for lesion in found.lesions] == [False, True], "the one that it fits better"
    assert (found.sensitivity, found.precision) == (0.5, 1)


def test_of_two_pieces_of_a_lesion_one_is_false() -> None:
    truth = np.zeros((12, 20), bool)
    truth[2:8, 2:16] = True
    split = truth.copy()
    split[:, 6] = False
    found = detect(split, truth)
    assert (found.true_positives, found.false_sizes, found.misses) == (1, (24,), 0)


def test_the_sum_of_overlaps_counts_and_not_who_comes_first() -> None:
    """A piece overlaps two lesions and another one the first of them only: each finds its own."""
    truth = squares((0, 0, 6), (0, 8, 6), shape=(8, 30))
    prediction = np.zeros_like(truth)
    prediction[0:2, 0:6] = True  # a third of the first lesion
    prediction[4:6, 2:14] = True  # some of the first and a third of the second
    found = detect(prediction, truth, overlap=0)
    assert found.true_positives == 2
    assert [lesion.iou for lesion in found.lesions] == pytest.approx([12 / 36, 12 / 48])


def test_sizes_are_in_the_unit_of_the_spacing() -> None:
    truth = np.zeros((4, 6, 6), bool)
    truth[1:3, 1:4, 1:4] = True
    false = np.zeros_like(truth)
    false[0, 5, 5] = True
    found = detect(false, truth, (5.0, 0.5, 0.8))
    assert found.lesions[0].size == pytest.approx(18 * 2)
    assert found.false_sizes == pytest.approx((2,))
    assert detect(false, truth).lesions[0].size == 18


def test_nothing_to_find() -> None:
    nothing, one = squares(), squares((2, 2, 4))
    neither = detect(nothing, nothing)
    assert (neither.sensitivity, neither.precision, neither.f1, neither.lesion_wise_dice) == (None,) * 4
    missed = detect(nothing, one)
    assert (missed.sensitivity, missed.precision, missed.f1, missed.lesion_wise_dice) == (0, None, 0, 0)
    false = detect(one, nothing)
    assert (false.sensitivity, false.precision, false.f1, false.lesion_wise_dice) == (None, 0, 0, 0)
    whole = np.ones((5, 6), bool)
    assert detect(whole, whole).f1 == 1


def test_nonzero_is_inside_whatever_the_dtype() -> None:
    truth, prediction = squares((2, 2, 4), (20, 2, 2)), squares((2, 4, 4))
    expected = detect(prediction, truth)
    assert detect(prediction * np.float32(0.25), truth.astype(np.int16) * -3) == expected


def test_pooled_cases_count_lesions_and_not_cases() -> None:
    truth = squares((2, 2, 4), (2, 20, 4), (20, 2, 2))
    all_found, none = detect(truth, truth), detect(squares((20, 30, 3)), squares((2, 2, 4)))
    both = pool([all_found, none])
    assert (both.true_positives, both.misses, both.false_positives) == (3, 1, 1)
    assert both.sensitivity == 0.75, "and not the mean of 1 and 0"
    assert pool([]).f1 is None


def best_sum(iou: np.ndarray) -> float:
    """Largest sum of overlaps (pieces, lesions) of all ways of pairing, by trying each."""
    if not iou.size:
        return 0.0
    rest = iou[:, 1:]
    ways = [row for row in range(len(iou)) if iou[row, 0]]
    return max([best_sum(rest), *(iou[row, 0] + best_sum(np.delete(rest, row, 0)) for row in ways)])


def test_random_masks_are_matched_as_well_as_possible() -> None:
    rng = np.random.default_rng(0)
    several = 0
    for _ in range(100):
        shape = (9, 12) if rng.random() < 0.5 else (3, 7, 7)
        truth = rng.random(shape) < 0.12
        prediction = truth ^ (rng.random(shape) < 0.06)
        overlap = float(rng.choice([0, 0.1, 0.3]))
        near = np.ones((3,) * len(shape))
        (ours, pieces), (theirs, lesions) = label(prediction, near), label(truth, near)
        iou = np.zeros((pieces, lesions))
        for i, j in itertools.product(range(pieces), range(lesions)):
            one, other = ours == i + 1, theirs == j + 1
            share = (one & other).sum() / (one | other).sum()
            iou[i, j] = share if share >= overlap else 0
        found = detect(prediction, truth, overlap=overlap)
        assert sum(lesion.iou for lesion in found.lesions) == pytest.approx(best_sum(iou))
        assert found.true_positives + found.false_positives == pieces
        assert found.true_positives + found.misses == lesions
        several += found.true_positives > 1
    assert several > 10


def test_thousands_of_pieces_take_little_time() -> None:
    rng = np.random.default_rng(3)
    truth = rng.random((400, 400)) < 0.05
    prediction = truth ^ (rng.random(truth.shape) < 0.01)
    began = time.process_time()
    found = detect(prediction, truth)
    assert len(found.lesions) > 3000
    assert found.true_positives > 2000
    assert time.process_time() - began < 5


def test_masks_that_cannot_be_compared() -> None:
    one = squares((2, 2, 4))
    with pytest.raises(ValueError, match="one size"):
        detect(one, one[:-1])
    with pytest.raises(ValueError, match="one size"):
        detect(one, one, (1.0, 1.0, 1.0))
    for overlap in (-0.1, 1.1):
        with pytest.raises(ValueError, match="between 0 and 1"):
            detect(one, one, overlap=overlap)
