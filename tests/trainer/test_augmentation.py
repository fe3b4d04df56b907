"""Clips seen otherwise: what is drawn, and what becomes of images, masks and boxes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("sam2")

from tiny_sam2 import LENGTH, SIDE, clips, make, write_volumes

from data_shards.errors import UserError
from trainer.models import Preprocessing
from trainer.modules import ClipAugmentation, SAM2Module
from trainer.modules.clips import Followed, clip_draws, followed
from trainer.profile.rehearsed import GPU, Pretended

STILL = {"flip": 0.0, "degrees": 0.0, "shear": 0.0, "brightness": 0.0, "contrast": 0.0}
PREPROCESSING = Preprocessing(SIDE, resize="squash", scaling="mean_std")


@pytest.fixture(scope="module")
def volumes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_volumes(tmp_path_factory.mktemp("moving") / "train", range(2))


@pytest.fixture(scope="module")
def before(volumes: Path) -> tuple[Any, Tensor, Followed]:
    batch = clips(volumes, [0, LENGTH])
    return batch, PREPROCESSING.images(batch.images), followed(batch, PREPROCESSING, 16, "cpu")


def seen(before: Any, epoch: int = 0, **named: Any) -> tuple[Tensor, Followed]:
    batch, images, everything = before
    return ClipAugmentation(**{**STILL, **named})(images, everything, clip_draws(batch), epoch)


def test_nothing_changes_nothing(before):
    images, everything = seen(before)
    torch.testing.assert_close(images, before[1], atol=1e-5, rtol=0)
    assert torch.equal(everything.masks, before[2].masks) and torch.equal(everything.rows, before[2].rows)
    there = before[2].rows >= 0
    assert (everything.boxes[there] - before[2].boxes[there]).abs().max() < SIDE / 40, "a native pixel's width"


def test_a_flip_mirrors_images_masks_and_boxes(before):
    images, everything = seen(before, flip=1.0)
    torch.testing.assert_close(images, before[1].flip(3), atol=1e-5, rtol=0)
    assert torch.equal(everything.masks, before[2].masks.flip(3))
    still = seen(before)[1].boxes
    there = everything.rows >= 0
    torch.testing.assert_close(everything.boxes[..., 0][there], SIDE - 1 - still[..., 2][there])


def test_a_quarter_turn_is_one(before):
    batch, images, everything = before
    turner = ClipAugmentation(**STILL)
    object.__setattr__(turner, "_matrix", lambda generator: np.array([[0.0, -1.0, 0.0], [1.0, 0.0, 0.0]]))
    turned, found = turner(images, everything, clip_draws(batch), 0)
    torch.testing.assert_close(turned, images.rot90(1, (2, 3)), atol=1e-5, rtol=0)
    assert torch.equal(found.masks, everything.masks.rot90(1, (2, 3)))


def test_a_smaller_scale_shows_things_smaller(before):
    everything = seen(before, scale=(0.8, 0.8))[1]
    for q in range(len(everything)):
        shrunk = everything.masks[0, q].sum() / before[2].masks[0, q].sum()
        assert 0.58 < shrunk < 0.7, "0.8² = 0.64"


def test_light_is_changed_about_the_clips_own_mean(before):
    images = seen(before, contrast=1.0)[0].unflatten(0, (2, -1)).flatten(1)
    was = before[1].unflatten(0, (2, -1)).flatten(1)
    torch.testing.assert_close(images.mean(1), was.mean(1), atol=1e-4, rtol=1e-4)
    assert ((images.std(1) / was.std(1) - 1).abs() > 0.02).all()
    inverted = seen(before, invert=1.0)[0].unflatten(0, (2, -1)).flatten(1)
    torch.testing.assert_close(inverted - was.mean(1)[:, None], was.mean(1)[:, None] - was, atol=1e-4, rtol=1e-4)
    lifted = seen(before, brightness=0.5)[0].unflatten(0, (2, -1)).flatten(1)
    assert ((lifted.mean(1) - was.mean(1)).abs() <= 0.5 * was.std(1) + 1e-4).all()
    torch.testing.assert_close(lifted.std(1), was.std(1), atol=1e-4, rtol=1e-4)


def test_all_frames_of_a_clip_change_alike_and_clips_differ(before):
    everything = seen(before, degrees=90.0, shift=0.2)[1]
    turned = ClipAugmentation(**{**STILL, "degrees": 90.0, "shift": 0.2})
    from data_shards.seed import stream

    draws = clip_draws(before[0])
    matrices = [turned._matrix(stream(0, "augmentation", 0, *draw)) for draw in draws]
    assert not np.allclose(*matrices)
    for q, clip in enumerate(everything.clip.tolist()):
        matrix = torch.from_numpy(matrices[clip]).float()
        linear, shift = matrix[:, :2], matrix[:, 2]
        for frame in range(4):
            if not everything.masks[frame, q].any():
                continue
            then = everything.masks[frame, q].nonzero().float().mean(0).flip(0)
            origin = before[2].masks[frame, q].nonzero().float().mean(0).flip(0)
            if everything.masks[frame, q].sum() < 0.95 * before[2].masks[frame, q].sum():
                continue  # cut by the border
            place = linear @ ((then + 0.5) / (SIDE / 2) - 1) + shift
            torch.testing.assert_close((place + 1) * (SIDE / 2) - 0.5, origin, atol=0.6, rtol=0)


def test_what_is_drawn_is_a_function_of_seed_epoch_and_sample(before, volumes):
    one, again, later = (seen(before, epoch, degrees=25.0, flip=0.5)[0] for epoch in (3, 3, 4))
    assert torch.equal(one, again) and not torch.equal(one, later)
    alone = clips(volumes, [LENGTH])
    arguments = PREPROCESSING.images(alone.images), followed(alone, PREPROCESSING, 16, "cpu"), clip_draws(alone)
    single = ClipAugmentation(**{**STILL, "degrees": 25.0, "flip": 0.5})(*arguments, 3)[0]
    torch.testing.assert_close(single, one[4:])


def test_what_the_anchor_no_longer_shows_is_not_followed(before):
    pushed = ClipAugmentation(**STILL)
    object.__setattr__(pushed, "_matrix", lambda generator: np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 1.1]]))  # half a side
    batch, images, everything = before
    found = pushed(images, everything, clip_draws(batch), 0)[1]
    assert len(found) == 2 < len(everything), "the squares, which lie low, are still seen"
    assert {batch.terms[int(row)] for row in found.rows[0]} == {"square"}
    away = ClipAugmentation(**STILL)
    object.__setattr__(away, "_matrix", lambda generator: np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 3.0]]))
    assert len(away(images, everything, clip_draws(batch), 0)[1]) == 0


def test_a_batch_that_shows_nothing_any_more_teaches_nothing(volumes):
    away = ClipAugmentation(**STILL)
    object.__setattr__(away, "_matrix", lambda generator: np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 3.0]]))
    module = SAM2Module(make(), augmentation=away).train()
    module.log_dict = lambda *_, **__: None  # type: ignore[method-assign]
    loss = module.training_step(clips(volumes, [0]), 0)
    loss.backward()
    assert float(loss.detach()) == 0
    assert all(float(p.grad.abs().sum()) == 0 for p in module.parameters() if p.requires_grad)


def test_evaluations_see_clips_as_they_are(volumes):
    plain, wild = (SAM2Module(make(), augmentation=a).eval() for a in (None, ClipAugmentation(flip=1.0)))
    batch = clips(volumes, [0])
    for one, other in zip(plain.predict_masks(batch).masks, wild.predict_masks(batch).masks, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ({"flip": 1.5}, "flip, invert, shift and contrast are in"),
        ({"brightness": -0.1}, "brightness is 0 or more"),
        ({"degrees": 200.0}, "degrees is in"),
        ({"shear": 90.0}, "shear in"),
        ({"scale": (1.2, 0.8)}, "scale is a smaller and a larger factor"),
        ({"scale": (0.0, 1.0)}, "scale is a smaller and a larger factor"),
    ],
)
def test_what_cannot_be_is_refused(named, message):
    with pytest.raises(UserError, match=message):
        ClipAugmentation(**named)


def test_masks_stay_what_they_are(before):
    masks = seen(before, degrees=30.0, shear=15.0, scale=(0.7, 1.4))[1].masks
    assert set(masks.unique().tolist()) <= {0.0, 1.0}
    assert replace(before[2]).masks.shape[0] == masks.shape[0]


def test_a_step_waits_once_to_learn_what_is_still_seen(before):
    batch, images, everything = before
    with FakeTensorMode(allow_non_fake_inputs=True), Pretended() as pretended:
        there = replace(everything, masks=everything.masks.to(GPU, non_blocking=True))
        ClipAugmentation()(images.to(GPU, non_blocking=True), there, clip_draws(batch), 0)
    assert [wait.call for wait in pretended.waits] == ["copies to the host"]
