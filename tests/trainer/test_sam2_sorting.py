"""The self-sorting memory: what enters, what leaves and what is told, by hand; and in SAM2.

Shapes: Q objects, N memories.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from math import cos, radians, sin

import pytest
import torch
from torch import Tensor

from data_shards.errors import UserError
from trainer.models.sam2_memory import Memory, MemoryBank, Moment
from trainer.models.sam2_sorting import SelfSortingMemory


def directions(angles: Sequence[float], length: float = 1.0) -> Tensor:
    """Vectors (Q, 2) in these directions, in degrees: their cosines are those of the angles between them."""
    return torch.tensor([[length * cos(radians(angle)), length * sin(radians(angle))] for angle in angles])


def memory(
    frame: int,
    angles: Sequence[float],
    looks: Sequence[float] | None = None,
    iou: float = 0.9,
    presence: float = 5.0,
    prompted: bool = False,
) -> Memory:
    """A memory of Q objects; the angles of its features, and of its frame's own features (those of one image)."""
    count = len(angles)
    return Memory(
        frame=frame,
        features=directions(angles, 1 + frame % 3)[:, :, None, None],
        positions=torch.zeros(count, 2, 1, 1),
        pointer=torch.tensor([[10.0 * frame + q] for q in range(count)]),
        presence=torch.full((count,), presence),
        iou=torch.full((count,), iou),
        embedding=directions(looks or [0.0] * count, 2.0),
        prompted=prompted,
    )


def bank_of(*memories: Memory) -> MemoryBank:
    bank = MemoryBank()
    for one in memories:
        bank.add(one)
    return bank


def moment(look: float = 0.0, frame: int = 50, objects: int = 1, **changes: object) -> Moment:
    """A frame whose own features have this angle."""
    now = Moment(frame, 100, False, False, 7, 16, directions([look] * objects))
    return replace(now, **changes)


def told(policy: SelfSortingMemory, bank: MemoryBank, now: Moment, q: int = 0) -> list[tuple[int, int]]:
    """Places in time and pointers' first numbers, which say what frame a memory of object q is of."""
    return [(place, round(one.pointer[q].item() - q) // 10) for place, one in policy.features(bank, now)]


def plain() -> MemoryBank:
    """A prompted frame 0 at 0 degrees, and frames 1, 2 and 3 at 30, 100 and 200."""
    return bank_of(memory(0, [0], prompted=True), memory(1, [30]), memory(2, [100]), memory(3, [200]))


def test_what_is_least_unlike_the_others_leaves():
    # sums of 1 − cos to all others: .134 + .658 + 1.985 = 2.777; 1.174 + .658 + 1.174 = 3.005; 1.940 + 1.985 + 1.174
    assert told(SelfSortingMemory(size=2, resample=False), plain(), moment()) == [(0, 0), (6, 3), (5, 2)]
    assert told(SelfSortingMemory(size=3, resample=False), plain(), moment()) == [(0, 0), (6, 3), (5, 2), (4, 1)]
    # of 30 and 100: .134 + .658 < 1.174 + .658; then of 100 and 200: 2 * 1.174 < 1.940 + 1.174
    assert told(SelfSortingMemory(size=1, resample=False), plain(), moment()) == [(0, 0), (6, 3)]


def test_a_newcomer_may_be_what_leaves_and_prompted_frames_count_but_stay():
    bank = plain()
    bank.add(memory(4, [60]))
    # the newcomer: .5 + .134 + .234 + 1.766 = 2.634; of 30: 2.911; of 100: 3.239; of 200: 6.865
    assert told(SelfSortingMemory(size=3, resample=False), bank, moment()) == [(0, 0), (6, 3), (5, 2), (4, 1)]
    again = bank_of(memory(0, [0], prompted=True), memory(1, [90]), memory(2, [200]), memory(3, [2]))
    # of 90: 1 + 1.342 + .965 = 3.307; of 200: 1.940 + 1.342 + 1.951; of 2: .001 + .965 + 1.951 = 2.917
    assert told(SelfSortingMemory(size=2, resample=False), again, moment()) == [(0, 0), (6, 2), (5, 1)]
    again.prompted.clear()  # of 90: 1.342 + .965 = 2.307; of 2: .965 + 1.951 = 2.916
    assert told(SelfSortingMemory(size=2, resample=False), again, moment()) == [(6, 2), (5, 3)]


def test_only_confident_frames_with_the_object_enter():
    bank = bank_of(
        memory(0, [0], prompted=True),
        memory(1, [90], iou=0.7),
        memory(2, [180], iou=0.69),
        memory(3, [270], iou=0.99, presence=-0.1),
        memory(4, [45], iou=0.9),
    )
    now = moment(0)
    kept = [one for _, one in told(SelfSortingMemory(confidence=0.7, resample=False), bank, now)]
    assert kept[:3] == [0, 1, 4]
    assert kept[3:] == [0, 0], "in the place of what did not enter, the prompted frame again"
    assert sorted({one for _, one in told(SelfSortingMemory(confidence=0), bank, now)}) == [0, 1, 2, 4]


def test_what_is_refused_pushes_nothing_out():
    bank = plain()
    for frame, angle in ((4, 300), (5, 310), (6, 150)):
        bank.add(memory(frame, [angle], iou=0.1))
    assert told(SelfSortingMemory(size=3, resample=False), bank, moment())[:4] == [(0, 0), (6, 3), (5, 2), (4, 1)]


def test_the_most_alike_are_told_as_the_most_recent():
    looks = {1: 80.0, 2: 10.0, 3: 50.0, 4: -20.0, 5: 170.0, 6: 35.0, 7: 90.0, 8: 60.0}
    bank = bank_of(
        memory(0, [0], prompted=True), *(memory(frame, [45 * frame], [look]) for frame, look in looks.items())
    )
    by_likeness = sorted(looks, key=lambda frame: abs(looks[frame]))[:6]
    assert told(SelfSortingMemory(), bank, moment(0)) == [(0, 0), *zip(range(6, 0, -1), by_likeness, strict=True)]
    other = told(SelfSortingMemory(), bank, moment(88))
    assert [one for _, one in other][:4] == [0, 7, 1, 8]
    pointers = SelfSortingMemory().pointers(bank, moment(0))
    assert [(ago, int(one.pointer / 10)) for ago, one in pointers] == [(7, 0), *enumerate(by_likeness, start=1)]


def test_numbers_of_frames_and_directions_have_no_influence():
    memories = [
        memory(0, [0, 40], prompted=True),
        *(memory(frame, [37 * frame, 91 * frame], [13.0 * frame] * 2) for frame in range(1, 7)),
    ]
    policy = SelfSortingMemory(size=4)
    now = moment(60, objects=2)
    expected = policy.features(bank_of(*memories), now), policy.pointers(bank_of(*memories), now)
    renumbered = bank_of(*(replace(one, frame=93 - 7 * one.frame) for one in memories))
    for changed in (now, replace(now, reverse=True), replace(now, frame=3, frames=2000), replace(now, frame=95)):
        found = policy.features(renumbered, changed), policy.pointers(renumbered, changed)
        for mine, theirs in zip(itertools.chain(*found), itertools.chain(*expected), strict=True):
            assert mine[0] == theirs[0]
            assert torch.equal(mine[1].features, theirs[1].features)
            assert torch.equal(mine[1].pointer, theirs[1].pointer)


def test_the_order_of_a_bank_that_is_not_over_full_has_no_influence():
    memories = [memory(frame, [61 * frame], [17.0 * frame]) for frame in range(1, 6)]
    prompted = memory(0, [0], prompted=True)
    found = {
        tuple(told(SelfSortingMemory(size=4), bank_of(prompted, *order), moment(30)))
        for order in itertools.permutations(memories)
        if order[-1] is memories[-1]
    }
    assert len(found) == 1


def test_each_object_is_told_alike_in_any_company():
    angles = torch.randint(360, (9, 3), generator=torch.Generator().manual_seed(1)).tolist()
    ious = torch.rand(9, 3, generator=torch.Generator().manual_seed(2))

    def bank(objects: list[int]) -> MemoryBank:
        rows = [memory(n, [angles[n][q] for q in objects], [20.0 * n] * len(objects)) for n in range(9)]
        rows = [replace(one, iou=ious[n, objects], prompted=n == 0) for n, one in enumerate(rows)]
        return bank_of(*(replace(one, pointer=one.pointer[:, :1] // 10 * 10) for one in rows))

    policy = SelfSortingMemory(size=4, confidence=0.3)
    together = policy.features(bank([0, 1, 2]), moment(70, objects=3))
    for q in range(3):
        alone = policy.features(bank([q]), moment(70))
        for (place, one), (same, other) in zip(alone, together, strict=True):
            assert place == same
            assert torch.equal(one.features[0], other.features[q])
            assert torch.equal(one.pointer[0], other.pointer[q])


@pytest.mark.parametrize("size", [1, 3, 8, 20])
@pytest.mark.parametrize("resample", [True, False])
def test_forgetting_changes_nothing_that_is_told(size, resample):
    """A bank that is cut after every frame, as in evaluation, tells what one tells that keeps all, as in training."""
    generator = torch.Generator().manual_seed(size)
    policy = SelfSortingMemory(size, confidence=0.4, resample=resample)
    cut, whole = MemoryBank(), MemoryBank()
    for frame in range(15):
        angles, look = torch.rand(2, generator=generator) * 360, float(torch.rand(1, generator=generator)) * 180
        one = memory(frame, angles.tolist(), [look] * 2, prompted=frame == 0)
        one = replace(one, iou=torch.rand(2, generator=generator), presence=torch.randn(2, generator=generator) + 1)
        now = moment(look + 11, frame=frame, objects=2)
        for bank in (cut, whole):
            assert len(policy.features(bank, now)) == min(6, size, max(frame - 1, 0)) + bool(frame)
        for mine, theirs in zip(policy.features(cut, now), policy.features(whole, now), strict=True):
            assert mine[0] == theirs[0]
            assert torch.equal(mine[1].pointer, theirs[1].pointer)
            assert torch.equal(mine[1].features, theirs[1].features)
        cut.add(one)
        whole.add(one)
        policy.forget(cut, now)
        assert len(cut.others) <= size
    assert len(whole.others) == 14


def test_gradients_reach_what_is_told_and_nothing_else():
    bank = plain()
    for one in bank.others.values():
        one.features.requires_grad_()
        one.pointer.requires_grad_()
    policy, now = SelfSortingMemory(size=2, resample=False), moment(training=True)
    total = sum(one.features.sum() for _, one in policy.features(bank, now))
    total = total + sum(one.pointer.sum() for _, one in policy.pointers(bank, now))
    total.backward()
    for name in ("features", "pointer"):
        reached = [bool(getattr(one, name).grad.abs().sum() > 0) for one in bank.others.values()]
        assert reached == [False, True, True]


@pytest.mark.parametrize("options", [{"size": 0}, {"confidence": 1.5}, {"confidence": float("nan")}])
def test_nonsense_is_refused(options):
    with pytest.raises(UserError, match=next(iter(options))):
        SelfSortingMemory(**options)


def test_sam2_follows_images_in_no_order_with_it():
    """Numbers and directions do not matter, with its own memory they do; one object is followed alike in company."""
    pytest.importorskip("sam2")
    from trainer.models import SAM2, SAM2Shape
    from trainer.models.sam2_tracking import Tracking
    from trainer.prompts import Prompts

    torch.manual_seed(0)
    shape = SAM2Shape(embed_dim=16, stages=(1, 1, 2, 1), global_blocks=(3,), feedforward=64, memory_layers=1)
    model = SAM2(shape, 64, weights=None).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
            if "gamma" in name:
                parameter.fill_(0.1)
        model.sam_mask_decoder.pred_obj_score_head.layers[-1].bias.fill_(3.0)
    images = torch.nn.functional.interpolate(torch.randn(6, 3, 8, 8), (64, 64), mode="bilinear")
    boxes = torch.tensor([[10.0, 12.0, 40.0, 45.0], [30.0, 5.0, 60.0, 35.0]])

    @torch.inference_mode()
    def follow(numbers: list[int], reverse: bool, objects: list[int]) -> Tensor:
        tracking, looks = Tracking(model, 40), []
        for number, image in zip(numbers, images, strict=True):
            features = model.encode(image[None]).take(torch.zeros(len(objects), dtype=torch.int64))
            if not looks:
                prompts = Prompts(torch.arange(len(objects)), boxes=boxes[objects])
                looks.append(tracking.ask(number, features, [prompts]))
            else:
                looks.append(tracking.follow(number, features, reverse))
        return torch.stack([look.best for look in looks])

    ways = (list(range(6)), False), ([30, 25, 11, 7, 3, 1], True), ([9, 4, 39, 17, 0, 22], False)
    recent = [follow(*way, [0, 1]) for way in ways[:2]]
    assert (recent[0] - recent[1]).abs().max() > 1e-3
    model.memory = SelfSortingMemory(size=3, confidence=0.0)
    first, *others = [follow(*way, [0, 1]) for way in ways]
    assert first.isfinite().all()
    assert (first[2:] - recent[0][2:]).abs().max() > 1e-3, "it is another memory"
    for other in others:
        torch.testing.assert_close(other, first, atol=1e-5, rtol=0)
    for q in (0, 1):
        torch.testing.assert_close(follow(*ways[0], [q])[:, 0], first[:, q], atol=1e-4, rtol=1e-4)
