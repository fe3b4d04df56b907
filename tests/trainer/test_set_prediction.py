"""SAM3's loss against the recorded official values and gradients, by hand, and where numbers get awkward."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from io import StringIO
from math import log, sqrt
from typing import Any

import numpy as np
import object_sets
import pytest
import torch
import torch.nn.functional as F
from object_sets import GOLDEN, drawn_sets, gradients_of, leaves_of
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from data_shards.errors import UserError
from trainer.losses import DenseMasks, FactoredMasks, ObjectSets, SetPrediction, SetPredictionLoss
from trainer.losses.instance_masks import at_points, dice_loss, focal_loss, on_one_side
from trainer.losses.matching import HungarianMatcher, OneToManyMatcher
from trainer.losses.semantic import semantic_truth

SEGMENTATION = {"mask_weight": 200.0, "dice_weight": 10.0}


@pytest.mark.parametrize("path", sorted((GOLDEN / "sam3").glob("[cd]_*.npz")), ids=lambda path: path.stem)
def test_values_and_gradients_are_the_official_ones(path):
    check = object_sets.checker()
    found = check.compare(path)
    assert found.unchecked() == []
    assert len(found.errors) > 70 and max(found.errors.values()) < check.BAR, found.errors


def checked(*arguments: str) -> tuple[int, dict[str, Any], str]:
    """Run the checker: its exit code, what its last line says, and the rest of what it wrote."""
    with redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as err:
        code = object_sets.checker().main(list(arguments))
    lines = out.getvalue().splitlines()
    return code, json.loads(lines[-1]) if lines else {}, err.getvalue()


def test_the_checker_runs_as_a_script_and_reports_the_worst_file(tmp_path):
    names = ["b_o2m_seed0.npz", "d_semseg_seed0.npz"]
    for name in names:
        (tmp_path / name).write_bytes((GOLDEN / "sam3" / name).read_bytes())
    command = [sys.executable, str(GOLDEN / "check.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    found = json.loads(done.stdout.splitlines()[-1])
    assert done.returncode == 0 and found["files"] == 2 and found["unchecked"] == []
    assert 0 < found["worst_relative_error"] < 1e-6 and found["worst_file"] == names[1]


@pytest.mark.parametrize(
    ("file", "array", "change", "worst"),
    [
        ("b_o2m_seed0", "out_src_idx", lambda found: found[::-1], 1.0),
        ("a_o2o_seed0", "out_src_idx", lambda found: np.roll(found, 1), 1.0),
        ("a_o2o_seed0", "out_cost", lambda found: found * np.float32(1.001), 0.001),
        ("c_loss_seed0", "out_o2m_tgt_idx_l2", lambda found: found[::-1], 1.0),
        ("c_loss_seed0", "out_paper_grad_pred_boxes", lambda found: found * np.float32(1.001), 0.001),
        ("c_loss_seed0", "out_loss_ce_aux_1_o2m", lambda found: found * np.nan, 1.0),
        ("d_semseg_seed0", "out_head1_ploss1_down1_focal1_core_loss", lambda found: found * 2, 0.5),
    ],
)
def test_the_checker_fails_where_an_array_is_off(file, array, change, worst, tmp_path):
    with np.load(GOLDEN / "sam3" / f"{file}.npz") as stored:
        arrays = {name: stored[name] for name in stored.files}
    arrays[array] = np.asarray(change(arrays[array])).copy()
    np.savez(tmp_path / f"{file}.npz", **arrays)
    code, found, _ = checked(str(tmp_path))
    assert code == 1 and found["worst_file"] == f"{file}.npz"
    assert found["worst_relative_error"] == pytest.approx(worst, rel=0.5)
    assert found["worst_array"] == array or worst == 1


def test_the_checker_says_in_one_line_what_it_cannot_read(tmp_path):
    assert "no .npz file" in checked(str(tmp_path))[2]
    with np.load(GOLDEN / "sam3" / "a_o2o_seed0.npz") as stored:
        short = {name: stored[name] for name in stored.files} | {"out_src_idx": np.zeros(3, np.int64)}
    cases: list[tuple[Any, str]] = [
        (b"nonsense", "cannot be read"),
        ({"something": np.zeros(2)}, "unknown layout"),
        ({"something": np.array([{}], dtype=object)}, "cannot be read"),
        ({name: value for name, value in short.items() if name != "out_tgt_idx"}, "out_tgt_idx' is missing"),
        (short, "do not fit"),
    ]
    for content, text in cases:
        if isinstance(content, dict):
            np.savez(tmp_path / "x.npz", **content)
        else:
            (tmp_path / "x.npz").write_bytes(content)
        code, found, said = checked(str(tmp_path))
        assert code == 2 and not found and text in said and len(said.splitlines()) == 1, said


def only(**weights: float) -> SetPredictionLoss:
    """The loss with all weights 0 but these."""
    names = ("box", "giou", "class", "presence", "semantic", "semantic_dice")
    return SetPredictionLoss(**{**{f"{name}_weight": 0.0 for name in names}, **weights})  # type: ignore[arg-type]


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
    loss = only(mask_weight=1.0, dice_weight=1.0)
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


def test_targets_are_counted_over_the_ranks(tmp_path):
    arguments = (object_sets.free_port(), str(tmp_path))
    torch.multiprocessing.start_processes(
        object_sets.rank_main, arguments, nprocs=object_sets.RANKS, start_method="fork"
    )
    for rank, counts in enumerate(object_sets.RANK_COUNTS):
        found = torch.load(tmp_path / f"rank{rank}.pt")
        alone = SetPredictionLoss(mask_weight=1, dice_weight=1)(*drawn_sets(counts, seed=rank))
        share = sum(map(sum, object_sets.RANK_COUNTS)) / object_sets.RANKS
        assert share == 2 and sum(counts) != share
        for name, value in alone.items():
            per_target = name.startswith(("box", "giou", "mask", "dice"))
            factor = sum(counts) / share if per_target else 1
            if name != "loss":
                torch.testing.assert_close(found[name], value * factor)


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
