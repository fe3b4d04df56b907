"""SAM2's training loss against the official one, in value and gradient.

Shapes: Q objects, M masks of each.
"""

from __future__ import annotations

import importlib
import importlib.resources
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from data_shards.errors import UserError
from trainer.losses import BestMaskLoss, resize_logits

WEIGHTS = {"loss_mask": 20.0, "loss_dice": 1.0, "loss_iou": 1.0, "loss_class": 1.0}
NAMES = {"loss_mask": "focal", "loss_dice": "dice_loss", "loss_iou": "iou_loss", "loss_class": "presence_loss"}


@pytest.fixture
def official(monkeypatch) -> type[torch.nn.Module]:
    """`MultiStepMultiMasksAndIous`; of the trainer that its module imports it needs one name only."""
    pytest.importorskip("sam2")
    pytest.importorskip("training.utils.distributed")
    trainer: Any = ModuleType("training.trainer")
    trainer.CORE_LOSS_KEY = "core_loss"
    monkeypatch.setitem(sys.modules, "training.trainer", trainer)
    monkeypatch.delitem(sys.modules, "training.loss_fns", raising=False)
    found = importlib.import_module("training.loss_fns")
    monkeypatch.delitem(sys.modules, "training.loss_fns")  # what is imported after this test gets the real trainer
    return found.MultiStepMultiMasksAndIous


def case(masks: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits (6, M, 20, 24), IoUs, object scores and targets; two targets are empty, one is full, one is met."""
    torch.manual_seed(masks)
    logits = torch.randn(6, masks, 20, 24) * 3
    targets = (torch.rand(6, 20, 24) > 0.6).float()
    targets[1] = targets[4] = 0
    targets[2] = 1
    logits[3, -1] = (targets[3] - 0.5) * 20
    return logits, torch.rand(6, masks), torch.randn(6) * 2, targets


def gradients(loss: Tensor, *leaves: Tensor) -> list[Tensor]:
    found = torch.autograd.grad(loss, leaves, allow_unused=True)
    return [torch.zeros_like(leaf) if one is None else one for leaf, one in zip(leaves, found, strict=True)]


@pytest.mark.parametrize("masks", [1, 3])
@pytest.mark.parametrize("all_ious", [True, False])
@pytest.mark.parametrize("iou_l1", [True, False])
@pytest.mark.parametrize("scored", [True, False])
def test_values_and_gradients_are_the_official_ones(official, masks, all_ious, iou_l1, scored):
    logits, ious, presence, targets = (tensor.requires_grad_() for tensor in case(masks))
    targets = targets.detach()
    reference = official(
        dict(WEIGHTS), supervise_all_iou=all_ious, iou_use_l1_loss=iou_l1, pred_obj_scores=scored
    )([{
        "multistep_pred_multimasks_high_res": [logits],
        "multistep_pred_ious": [ious],
        "multistep_object_score_logits": [presence[:, None]],
    }], targets[None])  # fmt: skip
    found = BestMaskLoss(iou_l1=iou_l1, all_ious=all_ious)(logits, ious, presence if scored else None, targets)
    assert set(found) == {"loss", *NAMES.values()}
    assert all(value.shape == (6,) and value.dtype == torch.float32 for value in found.values())
    for theirs, mine in NAMES.items():  # theirs are divided by the number of objects
        torch.testing.assert_close(found[mine].mean(), torch.as_tensor(reference[theirs]), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(found["loss"].mean(), reference["core_loss"], atol=1e-6, rtol=1e-5)
    leaves = (logits, ious, presence)
    for mine, theirs in zip(
        gradients(found["loss"].mean(), *leaves), gradients(reference["core_loss"], *leaves), strict=True
    ):
        torch.testing.assert_close(mine, theirs, atol=1e-7, rtol=1e-5)


def test_the_defaults_are_the_released_configurations():
    package = pytest.importorskip("sam2")
    yaml = pytest.importorskip("yaml")
    folder = importlib.resources.files(package) / "configs" / "sam2.1_training"
    text = (folder / "sam2.1_hiera_b+_MOSE_finetune.yaml").read_text(encoding="utf-8")
    released = yaml.safe_load(text)["trainer"]["loss"]["all"]
    loss = BestMaskLoss()
    assert released["weight_dict"] == {
        "loss_mask": loss.focal_weight,
        "loss_dice": loss.dice_weight,
        "loss_iou": loss.iou_weight,
        "loss_class": loss.presence_weight,
    }
    assert (released["supervise_all_iou"], released["iou_use_l1_loss"]) == (loss.all_ious, loss.iou_l1)
    assert (released["focal_gamma_obj_score"], released["focal_alpha_obj_score"]) == (loss.presence_gamma, -1)
    assert loss.presence_alpha is None


def test_a_focal_loss_on_the_object_score_is_the_official_one(official):
    logits, ious, presence, targets = case(1)
    outputs = {
        "multistep_pred_multimasks_high_res": [logits],
        "multistep_pred_ious": [ious],
        "multistep_object_score_logits": [presence[:, None]],
    }
    options = {"pred_obj_scores": True, "focal_alpha": 0.6, "focal_gamma": 1.5}
    reference = official(dict(WEIGHTS), focal_alpha_obj_score=0.25, focal_gamma_obj_score=2.0, **options)
    losses = reference([outputs], targets[None])
    loss = BestMaskLoss(focal_alpha=0.6, focal_gamma=1.5, presence_alpha=0.25, presence_gamma=2.0)
    found = loss(logits, ious, presence, targets)
    torch.testing.assert_close(found["presence_loss"].mean(), losses["loss_class"])
    torch.testing.assert_close(found["focal"].mean(), losses["loss_mask"])


def test_only_the_best_mask_learns_and_an_absent_object_teaches_its_absence_alone():
    target = torch.zeros(2, 4, 4)
    target[0, :2] = 1  # the second object is not there
    logits = torch.stack([torch.zeros(4, 4), target[0] * 4 - 2, 2 - target[0] * 4]).repeat(2, 1, 1, 1)
    logits, presence = logits.requires_grad_(), torch.zeros(2, requires_grad=True)
    ious = torch.tensor([[0.25, 0.5, 1.0]] * 2, requires_grad=True)
    found = BestMaskLoss(all_ious=False)(logits, ious, presence, target)
    assert found["iou_loss"].tolist() == [0.5, 0], "the second mask is exact, and said to be half right"
    for name in ("focal", "dice_loss"):
        assert found[name][0] > 0
        assert found[name][1] == 0
    torch.testing.assert_close(found["presence_loss"], torch.full((2,), 2.0).log())
    found["loss"].sum().backward()
    moved = logits.grad.abs().amax((2, 3)) > 0
    assert moved.tolist() == [[False, True, False], [False, False, False]]
    assert ious.grad.tolist() == [[0, -1, 0], [0, 0, 0]]
    assert presence.grad.tolist() == [-0.5, 0.5]


def test_the_weights_decide_what_is_best():
    """A sure mask that misses a little against an unsure one that misses nothing: Dice and focal disagree."""
    target = torch.zeros(1, 10, 10)
    target[0, 0] = 1
    unsure = (target * 0.2 - 0.1)[None]
    sure = target[None] * 40 - 20
    sure[0, 0, 0, 5:] = -20
    logits = torch.cat([unsure, sure], 1)
    ious = torch.zeros(1, 2)
    focal = BestMaskLoss(dice_weight=0)(logits, ious, None, target)
    dice = BestMaskLoss(focal_weight=0)(logits, ious, None, target)
    assert focal["focal"] < 0.2 < dice["focal"]
    assert dice["dice_loss"] < 0.4 < focal["dice_loss"]


def test_smaller_logits_are_enlarged_as_sam2_does():
    logits, ious, presence, targets = case(3)
    small = torch.nn.functional.avg_pool2d(logits, 4).requires_grad_()
    enlarged = torch.stack([resize_logits(masks, (20, 24)) for masks in small.unbind(1)], 1)
    found, expected = (BestMaskLoss()(one, ious, presence, targets)["loss"].sum() for one in (small, enlarged))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradients(found, small)[0], gradients(expected, small)[0])


def test_half_precision_is_computed_in_single():
    logits, ious, presence, targets = case(3)
    coarse = [tensor.bfloat16() for tensor in (logits, ious, presence)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = BestMaskLoss()(*coarse, targets.byte())
    expected = BestMaskLoss()(*(tensor.float() for tensor in coarse), targets)
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], atol=0, rtol=0)


@pytest.mark.parametrize("level", [-1024.0, -20.0, 20.0, 1024.0])
@pytest.mark.parametrize("truth", [0.0, 1.0])
def test_the_surest_answers_have_finite_losses_and_gradients(level, truth):
    logits = torch.full((2, 3, 8, 8), level, requires_grad=True)
    presence = torch.full((2,), level, requires_grad=True)
    found = BestMaskLoss()(logits, torch.zeros(2, 3), presence, torch.full((2, 8, 8), truth))
    found["loss"].sum().backward()
    assert all(value.isfinite().all() for value in found.values())
    assert logits.grad.isfinite().all()
    assert presence.grad.isfinite().all()


def test_no_objects_give_no_losses():
    found = BestMaskLoss()(torch.zeros(0, 3, 8, 8), torch.zeros(0, 3), torch.zeros(0), torch.zeros(0, 16, 16))
    assert all(value.shape == (0,) for value in found.values())


class Watch(TorchDispatchMode):
    """Notes what is called of the operations that wait for a device."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "item", "unique")

    def __init__(self) -> None:
        super().__init__()
        self.waited: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(name in str(func) for name in self.WAITING):
            self.waited.append(str(func))
        return func(*args, **(kwargs or {}))


def test_the_device_is_never_waited_for():
    logits, ious, presence, targets = case(3)
    logits.requires_grad_()
    with Watch() as watch:
        BestMaskLoss()(logits, ious, presence, targets)["loss"].sum().backward()
    assert not watch.waited
    with Watch() as watch:
        logits[logits > 0].sum().item()
    assert watch.waited, "the watch sees what it looks for"


def test_nothing_of_full_size_is_held_for_the_backward_pass_but_the_targets():
    logits, ious, presence, targets = case(3)
    small = torch.nn.functional.avg_pool2d(logits, 4).requires_grad_()
    held: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        held.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        found = BestMaskLoss()(small, ious, presence, targets)
    assert sum(numel >= targets.numel() for numel in held) == 1, "the targets"
    found["loss"].sum().backward()
    assert small.grad.abs().sum() > 0


@pytest.mark.parametrize(
    "options",
    [
        {"focal_weight": -1.0},
        {"iou_weight": float("nan")},
        {"presence_weight": float("inf")},
        {"focal_weight": 0.0, "dice_weight": 0.0},
        {"focal_alpha": 1.5},
        {"presence_alpha": -1.0},
        {"focal_gamma": -0.5},
        {"presence_gamma": float("inf")},
    ],
)
def test_nonsense_is_refused_in_one_line(options):
    with pytest.raises(UserError, match="BestMaskLoss") as caught:
        BestMaskLoss(**options)
    assert "\n" not in str(caught.value)
    assert next(iter(options)) in str(caught.value)
