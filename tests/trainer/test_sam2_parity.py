"""SAM2 answers as the official predictors do: images as SAM2ImagePredictor, clips as SAM2VideoPredictor.

Shapes: T frames, Q objects, S = 128 px input side.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache
from unittest import mock

import pytest
import torch
from torch import Tensor

from trainer.models import SAM2
from trainer.prompts import Prompts

pytest.importorskip("sam2")

SIDE = 128
CONFIG = "configs/sam2.1/sam2.1_hiera_t.yaml"
BOXES = torch.tensor([[20.0, 24.0, 80.0, 90.0], [60.0, 10.0, 120.0, 70.0]])
POINTS = torch.tensor([[[40.0, 50.0], [100.0, 20.0]], [[90.0, 40.0], [10.0, 110.0]]])
LABELS = torch.tensor([[1, 0], [1, 1]])


@cache
def ours(postprocessing: bool = True) -> SAM2:
    torch.manual_seed(0)
    model = SAM2("tiny", SIDE, weights=None, postprocessing=postprocessing)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))  # zeros would hide what is left out
            if "gamma" in name:
                parameter.fill_(0.1)  # 1e-6 would hide the memory encoder's fuser
        # random weights hold every object to be absent, whose masks are all alike
        model.sam_mask_decoder.pred_obj_score_head.layers[-1].bias.fill_(3.0)
    return model.eval()


@cache
def predictor(postprocessing: bool = True):
    from sam2.build_sam import build_sam2_video_predictor

    side = [f"++model.image_size={SIDE}"]
    # without the compiled extension holes cannot be filled: it would only warn
    extra = [*side, "++model.fill_hole_area=0"]
    official = build_sam2_video_predictor(
        CONFIG, None, device="cpu", hydra_overrides_extra=extra, apply_postprocessing=postprocessing
    )
    official.fill_hole_area = 0
    official.load_state_dict(ours(postprocessing).state_dict(), strict=True)
    return official.eval()


def frames(count: int, seed: int = 1) -> Tensor:
    """A pattern that drifts and changes: (T, 3, S, S), standardised."""
    generator = torch.Generator().manual_seed(seed)
    base, change = (torch.rand(3, SIDE // 8, SIDE // 8, generator=generator) for _ in range(2))
    still = torch.stack([base + 0.3 * t * change for t in range(count)])
    large = torch.nn.functional.interpolate(still, (SIDE, SIDE), mode="bilinear")
    return torch.stack([image.roll(5 * t, dims=2) for t, image in enumerate(large)]) * 2 - 1


@pytest.mark.parametrize("what", ["box", "points", "box and points", "mask"])
@pytest.mark.parametrize("postprocessing", [True, False])
def test_images_as_the_image_predictor(what, postprocessing):
    from sam2.sam2_image_predictor import SAM2ImagePredictor

    model, image = ours(postprocessing), frames(1)
    official = SAM2ImagePredictor(predictor(postprocessing))
    official._bb_feat_sizes = [(SIDE // stride, SIDE // stride) for stride in (4, 8, 16)]
    index, masks = torch.zeros(2, dtype=torch.int64), torch.randn(2, 32, 32, generator=torch.Generator().manual_seed(3))
    asked = {
        "box": Prompts(index, boxes=BOXES),
        "points": Prompts(index, points=POINTS, labels=LABELS),
        "box and points": Prompts(index, boxes=BOXES, points=POINTS, labels=LABELS),
        "mask": Prompts(index, boxes=BOXES, masks=masks),
    }[what]
    with torch.no_grad():
        logits, ious = model.decode(model.encode(image), asked)
        with mock.patch.object(official, "_transforms", _Ready(image)):
            official.set_image(image[0].permute(1, 2, 0).numpy())
        for q in range(2):
            _, their_iou, theirs = official._predict(
                None if asked.points is None else POINTS[q : q + 1],
                None if asked.points is None else LABELS[q : q + 1],
                None if asked.boxes is None else BOXES[q : q + 1],
                None if asked.masks is None else masks[q : q + 1, None],
                multimask_output=False,
                return_logits=True,
            )
            torch.testing.assert_close(logits[q].clamp(-32, 32), theirs[0], atol=1e-4, rtol=0)
            torch.testing.assert_close(ious[q], their_iou[0], atol=1e-4, rtol=0)
    assert logits.std() > 0.01


class _Ready:
    """Stands in for the predictor's preprocessing: the image is ready."""

    mask_threshold = 0.0

    def __init__(self, image: Tensor) -> None:
        self.image = image

    def __call__(self, _: object) -> Tensor:
        return self.image[0]

    def postprocess_masks(self, masks: Tensor, size: tuple[int, int]) -> Tensor:
        return masks


def propagated(images: Tensor, start: int, add, postprocessing: bool = True) -> Tensor:
    """The predictor's mask logits of two objects in all frames, (T, Q, S, S): forwards, then backwards."""
    official = predictor(postprocessing)
    with mock.patch("sam2.sam2_video_predictor.load_video_frames", return_value=(images, SIDE, SIDE)):
        state = official.init_state("frames")
    for q in range(2):
        add(official, state, start, q)
    found: dict[int, Tensor] = {}
    for reverse in (False, True):
        for frame, _, masks in official.propagate_in_video(state, start_frame_idx=start, reverse=reverse):
            found.setdefault(frame, masks[:, 0])
    return torch.stack([found[frame] for frame in range(len(images))])


def followed(images: Tensor, start: int, asked: list[Prompts], postprocessing: bool = True, context=nullcontext):
    """Ours: (T, Q, h, w)."""
    from trainer.models.sam2_tracking import Tracking

    model = ours(postprocessing)
    with torch.no_grad(), context():
        tracking, features = Tracking(model, len(images)), [model.encode(image[None]) for image in images]
        index = torch.zeros(2, dtype=torch.int64)
        looks = {start: tracking.ask(start, features[start].take(index), asked)}
        for frame in range(start + 1, len(images)):
            looks[frame] = tracking.follow(frame, features[frame].take(index))
        for frame in range(start - 1, -1, -1):
            looks[frame] = tracking.follow(frame, features[frame].take(index), reverse=True)
    return torch.stack([looks[frame].best for frame in range(len(images))]), looks


INDEX = torch.zeros(2, dtype=torch.int64)
MASK = torch.zeros(2, SIDE, SIDE)
MASK[0, 30:80, 25:70] = 1
MASK[1, 15:60, 70:110] = 1
ASKED = {
    "box": (
        [Prompts(INDEX, boxes=BOXES)],
        lambda official, state, frame, q: official.add_new_points_or_box(state, frame, q, box=BOXES[q]),
    ),
    "points": (
        [Prompts(INDEX, points=POINTS, labels=LABELS)],
        lambda official, state, frame, q: official.add_new_points_or_box(
            state, frame, q, points=POINTS[q], labels=LABELS[q]
        ),
    ),
    "one point": (
        [Prompts(INDEX, points=POINTS[:, :1], labels=torch.ones(2, 1, dtype=torch.int64))],
        lambda official, state, frame, q: official.add_new_points_or_box(
            state, frame, q, points=POINTS[q, :1], labels=torch.ones(1, dtype=torch.int32)
        ),
    ),
    "mask": (
        [Prompts(INDEX, given=MASK)],
        lambda official, state, frame, q: official.add_new_mask(state, frame, q, MASK[q].bool()),
    ),
}


@pytest.mark.parametrize("start", [0, 4, 9])
@pytest.mark.parametrize("what", ASKED)
def test_clips_as_the_video_predictor(what, start):
    images = frames(10)
    asked, add = ASKED[what]
    found, looks = followed(images, start, asked)
    theirs = propagated(images, start, add)
    large = torch.nn.functional.interpolate(found, (SIDE, SIDE), mode="bilinear", align_corners=False)
    torch.testing.assert_close(large, theirs, atol=1e-4, rtol=1e-5)
    assert all(look.presence.min() > 0 for look in looks.values()), "absent objects have masks that are all alike"
    assert (found[1] - found[8]).abs().max() > 0.1, "frames differ"


def test_clips_without_postprocessing_too():
    images = frames(6)
    asked, add = ASKED["box"]
    found, _ = followed(images, 2, asked, postprocessing=False)
    theirs = propagated(images, 2, add, postprocessing=False)
    large = torch.nn.functional.interpolate(found, (SIDE, SIDE), mode="bilinear", align_corners=False)
    torch.testing.assert_close(large, theirs, atol=1e-4, rtol=1e-5)


def test_a_long_clip_whose_memories_are_forgotten():
    """Over more frames than are remembered, the answers are still the predictor's, and the bank stays small."""
    from trainer.models.sam2_tracking import Tracking

    images = frames(44)
    asked, add = ASKED["mask"]
    kept: list[int] = []
    keep = Tracking.keep

    def counted(self, *arguments, **named):
        keep(self, *arguments, **named)
        kept.append(len(self.bank.others))

    with mock.patch.object(Tracking, "keep", counted):
        found, _ = followed(images, 21, asked)
    large = torch.nn.functional.interpolate(found, (SIDE, SIDE), mode="bilinear", align_corners=False)
    torch.testing.assert_close(large, propagated(images, 21, add), atol=1e-4, rtol=1e-5)
    assert max(kept) <= 50 and len(kept) == 44


def test_a_mixture_of_forms_is_answered_in_the_objects_order():
    images = frames(4)
    box = followed(images, 0, ASKED["box"][0])[0]
    mask = followed(images, 0, ASKED["mask"][0])[0]
    mixed = [
        Prompts(INDEX[:1], given=MASK[1:], rows=torch.tensor([1])),
        Prompts(INDEX[:1], boxes=BOXES[:1], rows=torch.tensor([0])),
    ]
    found, _ = followed(images, 0, mixed)
    torch.testing.assert_close(found, torch.stack([box[:, 0], mask[:, 1]], dim=1), atol=1e-4, rtol=1e-5)


def test_an_absent_object_has_no_mask_and_is_remembered_as_absent():
    images = frames(5)
    asked, add = ASKED["box"]
    head = ours(True).sam_mask_decoder.pred_obj_score_head.layers[-1]
    official = predictor(True).sam_mask_decoder.pred_obj_score_head.layers[-1]
    before = head.bias.detach().clone()
    try:
        with torch.no_grad():
            head.bias.fill_(-500.0)
            official.bias.fill_(-500.0)
        found, looks = followed(images, 0, asked)
        theirs = propagated(images, 0, add)
    finally:
        with torch.no_grad():
            head.bias.copy_(before)
            official.bias.copy_(before)
    assert (found == -1024).all() and looks[3].presence.max() < 0
    torch.testing.assert_close(looks[3].full, theirs[3])


@pytest.mark.parametrize("context", [torch.inference_mode])
def test_an_evaluation_leaves_nothing_that_training_cannot_use(context):
    """sam2 keeps tensors aside; made in inference mode, they would end the training after the first validation."""
    from trainer.models.sam2_tracking import Tracking

    followed(frames(3), 0, ASKED["box"][0], context=context)
    model = ours(True).train()
    try:
        images, index = frames(2), torch.zeros(2, dtype=torch.int64)
        tracking = Tracking(model, 2)
        tracking.ask(0, model.encode(images[:1]).take(index), ASKED["box"][0])
        tracking.follow(1, model.encode(images[1:]).take(index)).logits.sum().backward()
    finally:
        model.eval().zero_grad()
