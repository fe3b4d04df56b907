"""Objects followed through volumes: the box chain by hand, SAM2's memory against its own tracking."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from encoders import make
from torch import Tensor, nn

from data_shards.errors import UserError
from trainer.models import SAM3, Preprocessing, SegmentationModel
from trainer.prompts import Prompts
from trainer.volumes.asked import Asked, prompts_of, shown, tight_box
from trainer.volumes.propagation import Found, copied, propagate

SIDE = 24


@dataclass
class Slices:
    """A stack in memory that notes which slices are read."""

    volume: np.ndarray
    name: str = "volume"
    spacing: tuple[float, float, float] | None = None
    read: list[int] = field(default_factory=list)

    @property
    def size(self) -> tuple[int, int]:
        return self.volume.shape[1], self.volume.shape[2]

    def __len__(self) -> int:
        return len(self.volume)

    def image(self, number: int) -> Tensor:
        self.read.append(number)
        return torch.from_numpy(self.volume[number])[None]


class Bright(SegmentationModel):
    """What is bright inside of the box, or where a point is; its score is the share of the box that is."""

    def __init__(self, side: int = SIDE) -> None:
        super().__init__()
        self.preprocessing = Preprocessing(side, resize="squash", scaling="minmax")
        self.anything = nn.Parameter(torch.zeros(1))
        self.asked: list[Prompts] = []

    @property
    def mask_side(self) -> int:
        return self.preprocessing.image_size

    def encode(self, images: Tensor) -> Tensor:
        return images[:, 0]

    def decode(self, features: Tensor, prompts: Prompts) -> tuple[Tensor, Tensor]:
        self.asked.append(prompts)
        ticks = torch.arange(features.shape[-1])
        logits, scores = [], []
        for row, image in enumerate(prompts.image_index.tolist()):
            if prompts.boxes is None:
                inside = torch.ones_like(features[image], dtype=torch.bool)
            else:
                x0, y0, x1, y1 = prompts.boxes[row].tolist()
                columns, rows = (ticks >= x0) & (ticks <= x1), (ticks >= y0) & (ticks <= y1)
                inside = rows[:, None] & columns[None]
            found = inside & (features[image] > 0.5)
            logits.append(torch.where(found, 10.0, -10.0))
            scores.append(found.sum() / inside.sum())
        return torch.stack(logits)[:, None], torch.stack(scores)[:, None]

    def at_size(self, image_size: int) -> SegmentationModel:
        raise NotImplementedError


def moving(depth: int = 9) -> np.ndarray:
    """A square of 4 × 4 that starts at column 2 and moves one column a slice, on rows 6 to 9."""
    volume = np.zeros((depth, SIDE, SIDE), np.uint8)
    for z in range(depth):
        volume[z, 6:10, 2 + z : 6 + z] = 200
    return volume


def collected(found: Sequence[Found]) -> tuple[list[int], dict[int, np.ndarray], dict[int, np.ndarray]]:
    return [one[0] for one in found], {one[0]: one[1] for one in found}, {one[0]: one[2] for one in found}


def columns(mask: np.ndarray) -> list[int]:
    return np.flatnonzero(mask.any(axis=0)).tolist()


class TestBoxChain:
    def test_by_hand(self) -> None:
        # the box stays where the square was, and the square leaves it column by column
        stack = Slices(moving())
        asked = [Asked("square", 4, box=(6, 6, 9, 9))]
        order, masks, scores = collected(list(propagate(Bright(), stack, asked)))
        assert order == [4, 5, 6, 7, 8, 3, 2, 1, 0]
        assert columns(masks[4][0]) == [6, 7, 8, 9]
        assert columns(masks[5][0]) == [7, 8, 9]
        assert columns(masks[6][0]) == [8, 9]
        assert columns(masks[7][0]) == [9]
        assert columns(masks[8][0]) == []
        assert columns(masks[3][0]) == [6, 7, 8]  # back from the slice that was shown, not from the last one
        assert columns(masks[1][0]) == [6]
        assert not masks[0].any()
        assert masks[4].shape == (1, SIDE, SIDE) and masks[4].dtype == bool
        assert scores[5][0] == pytest.approx(3 / 4) and scores[8][0] == 0

    def test_a_margin_lets_it_follow(self) -> None:
        stack = Slices(moving())
        found = propagate(Bright(), stack, [Asked("square", 4, box=(6, 6, 9, 9))], margin=1)
        for number, masks, _ in found:
            assert (masks[0] == (stack.volume[number] > 0)).all()

    def test_a_margin_stays_inside(self) -> None:
        volume = np.full((3, SIDE, SIDE), 200, np.uint8)
        volume[:, 5:] = 0
        model = Bright()
        list(propagate(model, Slices(volume), [Asked("strip", 1, box=(0, 0, SIDE - 1, 4))], margin=3))
        boxes = [prompts.boxes for prompts in model.asked]
        assert boxes[1] is not None and boxes[1].tolist() == [[0, 0, SIDE - 1, 7]]

    def test_stops_where_all_have_ended(self) -> None:
        volume = np.zeros((12, SIDE, SIDE), np.uint8)
        volume[5:7, 4:8, 4:8] = 200
        stack, model = Slices(volume), Bright()
        found = {number: masks for number, masks, _ in propagate(model, stack, [Asked("a", 5, box=(3, 3, 9, 9))])}
        assert sorted(found) == list(range(12))
        assert stack.read == [5, 6, 7, 4]  # nothing is encoded beyond the first slice without it
        assert len(model.asked) == 4

    def test_limits(self) -> None:
        stack = Slices(moving())
        found = propagate(Bright(), stack, [Asked("square", 4, box=(6, 6, 9, 9))], first=3, last=5)
        assert [number for number, _, _ in found] == [4, 5, 3]

    def test_a_mask_is_the_answer(self) -> None:
        mask = np.zeros((SIDE, SIDE), bool)
        mask[7, 7:9] = True  # less than the square
        model = Bright()
        _, masks, scores = collected(list(propagate(model, Slices(moving()), [Asked("part", 4, mask=mask)])))
        assert (masks[4][0] == mask).all() and scores[4][0] == 1
        assert model.asked[0].boxes is not None and model.asked[0].boxes.tolist() == [[7, 7, 8, 7]]
        assert columns(masks[5][0]) == [7, 8] and columns(masks[6][0]) == [8]

    def test_another_model_begins(self) -> None:
        class Upper(Bright):
            def decode(self, features: Tensor, prompts: Prompts) -> tuple[Tensor, Tensor]:
                logits, scores = super().decode(features, prompts)
                logits[..., 8:, :] = -10  # rows 6 and 7 only
                return logits, scores

        initial, model = Upper(), Bright()
        asked = [Asked("square", 4, box=(5, 5, 12, 12))]
        _, masks, _ = collected(list(propagate(model, Slices(moving()), asked, initial=initial)))
        assert len(initial.asked) == 1
        assert np.flatnonzero(masks[4][0].any(axis=1)).tolist() == [6, 7]
        assert model.asked[0].boxes is not None and model.asked[0].boxes.tolist() == [[6, 6, 9, 7]]

    def test_another_model_that_finds_nothing(self) -> None:
        asked = [Asked("nothing", 2, box=(14, 14, 20, 20)), Asked("square", 2, box=(4, 6, 7, 9))]
        _, masks, _ = collected(list(propagate(Bright(), Slices(moving()), asked, initial=Bright())))
        assert not any(found[0].any() for found in masks.values())
        assert masks[3][1].any()


class TestSeveralObjects:
    ASKED = (
        Asked("late", 6, box=(8, 6, 11, 9)),
        Asked("early", 2, box=(4, 6, 7, 9)),
        Asked("late too", 6, points=((9.0, 7.0, 1),)),
    )

    @pytest.mark.parametrize("at_once", [1, 16])
    def test_each_as_if_alone(self, at_once: int) -> None:
        stack = Slices(moving())
        order, masks, scores = collected(list(propagate(Bright(), stack, self.ASKED, at_once=at_once, margin=1)))
        assert order == [6, 7, 8, 5, 4, 3, 2, 1, 0]  # each slice once, as soon as all have their answer
        assert stack.read == [2, 3, 4, 5, 6, 7, 8, 5, 4, 3, 2, 1, 0]  # encoded once in each direction for all
        for place, one in enumerate(self.ASKED):
            _, alone, sure = collected(list(propagate(Bright(), Slices(moving()), [one], margin=1)))
            for number in order:
                assert (masks[number][place] == alone[number][0]).all()
                assert scores[number][place] == pytest.approx(float(sure[number][0]))

    def test_prompts_are_in_the_models_pixels(self) -> None:
        points = ((3.0, 5.0, 1), (10.0, 2.0, 0))
        asked = [Asked("a", 0, box=(2, 4, 10, 20)), Asked("b", 0, points=points), Asked("c", 0, box=(1, 1, 3, 3))]
        found = prompts_of(asked, Preprocessing(48, resize="squash"), (SIDE, 12))
        boxes, points_asked = found
        assert boxes.rows is not None and boxes.rows.tolist() == [0, 2] and boxes.image_index.tolist() == [0, 2]
        assert boxes.boxes is not None and boxes.boxes[0].tolist() == [8, 8, 40, 40]  # 4 times as wide, twice as high
        assert points_asked.points is not None and points_asked.points.tolist() == [[[12, 10], [40, 4]]]
        assert points_asked.labels is not None and points_asked.labels.tolist() == [[1, 0]]

    def test_a_small_mask_is_not_lost_on_the_way(self) -> None:
        mask = np.zeros((240, 240), bool)
        mask[100, 100] = True
        (prompts,) = prompts_of([Asked("dot", 0, mask=mask)], Preprocessing(24), (240, 240))
        assert prompts.given is not None and prompts.given.shape == (1, 24, 24)
        assert prompts.given.nonzero().tolist() == [[0, 10, 10]]


def test_medsam_as_a_plain_loop() -> None:
    model = make("medsam")
    volume = np.random.default_rng(0).integers(0, 255, (5, 40, 56), dtype=np.uint8)
    start = (12.0, 8.0, 40.0, 30.0)
    expected = {}
    with torch.no_grad():
        for way in (range(2, 5), range(2, -1, -1)):
            box: tuple[float, ...] | None = start
            for number in way:
                mask = np.zeros((40, 56), bool)
                if box is not None:
                    features = model.encode(model.preprocessing.images([torch.from_numpy(volume[number])[None]]))
                    scaled = torch.tensor([box]) * torch.tensor([64 / 56, 64 / 40] * 2)
                    logits, _ = model.decode(features, Prompts(torch.zeros(1, dtype=torch.int64), scaled))
                    mask = (model.preprocessing.to_native(logits[:, 0], 40, 56) > 0)[0].numpy()
                expected[number] = mask
                y, x = np.nonzero(mask)
                box = (x.min(), y.min(), x.max(), y.max()) if len(x) else None
    model.train()
    found = {number: masks[0] for number, masks, _ in propagate(model, Slices(volume), [Asked("a", 2, box=start)])}
    assert any(mask.any() for mask in expected.values())
    for number, mask in expected.items():
        assert (found[number] == mask).all()
    assert model.training  # as it was


class TestMistakes:
    def refused(
        self, message: str, *asked: Asked, depth: int = 4, model: SegmentationModel | None = None, **options: int
    ) -> str:
        with pytest.raises(UserError, match=message) as error:  # at the call, before a slice is asked for
            propagate(model or Bright(), Slices(moving(depth), name="scan.nii"), asked, **options)  # type: ignore[arg-type]
        return str(error.value)

    def test_each_is_one_line(self) -> None:
        box, empty = (1.0, 1.0, 5.0, 5.0), np.zeros((SIDE, SIDE), bool)
        self.refused("no prompt: show", depth=4)
        self.refused("'a' has no prompt", Asked("a", 1))
        self.refused("slice 4: it has slices 0 to 3", Asked("a", 4, box=box))
        self.refused("slice 0: wanted are slices 1 to 3", Asked("a", 0, box=box), first=1)
        self.refused("slices 2 to 9 are asked for, it has 0 to 3", Asked("a", 2, box=box), first=2, last=9)
        self.refused("two objects are called 'a'", Asked("a", 1, box=box), Asked("a", 2, box=box))
        self.refused("1,1,25,5 of 'a' reaches out", Asked("a", 1, box=(1, 1, 25, 5)))
        self.refused("upper left", Asked("a", 1, box=(5, 1, 1, 5)))
        self.refused("24, 3\\) of 'a' lies outside", Asked("a", 1, points=((24, 3, 1),)))
        self.refused("only points beside it", Asked("a", 1, points=((4, 3, 0),)))
        self.refused("mask of 'a' is empty on slice 1", Asked("a", 1, mask=empty))
        self.refused("is 12 x 24 pixels", Asked("a", 1, mask=empty[:, :12]))
        self.refused("margin -1", Asked("a", 1, box=box), margin=-1)

    def test_sam3_is_asked_in_words(self) -> None:
        message = self.refused("--text TERM", Asked("a", 1, box=(1, 1, 5, 5)), model=SAM3.__new__(SAM3))
        assert "\n" not in message


def test_prompts_from_known_masks() -> None:
    mask = np.zeros((SIDE, SIDE), bool)
    mask[5:10, 3:8] = True
    assert tight_box(mask) == (3, 5, 7, 9) and tight_box(~np.ones_like(mask)) is None
    (box,), (points,), (whole,) = (shown({"a": mask}, 3, kind) for kind in ("box", "points", "mask"))
    assert box.box == (3, 5, 7, 9) and box.slice == 3 and box.mask is None
    assert points.points == ((5.0, 7.0, 1),)
    assert whole.mask is mask
    order, masks, _ = collected(list(copied([whole], 1, 3)))
    assert order == [1, 2, 3] and all((found[0] == mask).all() for found in masks.values())


class TestMemory:
    """SAM2 of a tiny shape, with random weights."""

    @pytest.fixture
    def model(self) -> SegmentationModel:
        pytest.importorskip("sam2")
        from tiny_sam2 import make as make_sam2

        return make_sam2().eval()

    @pytest.fixture
    def stack(self) -> Slices:
        return Slices(np.random.default_rng(0).integers(0, 255, (9, 48, 56), dtype=np.uint8))

    @torch.no_grad()
    def test_is_its_tracking(self, model: SegmentationModel, stack: Slices) -> None:
        from trainer.models.sam2_tracking import Tracking

        expected, tracking = {}, Tracking(model, frames=9)
        asked = Prompts(torch.zeros(1, dtype=torch.int64), boxes=torch.tensor([[8.0, 8.0, 40.0, 48.0]]))
        for number in (4, 5, 6, 7, 8, 3, 2, 1, 0):
            features = model.encode(model.preprocessing.images([stack.image(number)]))
            look = tracking.ask(4, features, [asked]) if number == 4 else tracking.follow(number, features, number < 4)
            expected[number] = (model.preprocessing.to_native(look.best, 48, 56) > 0).numpy()
        box = (7.0, 6.0, 35.0, 36.0)  # of 56 × 48 pixels
        order, masks, scores = collected(list(propagate(model, stack, [Asked("a", 4, box=box)])))
        assert order == list(expected)
        assert any(mask.any() and not mask.all() for mask in expected.values())
        for number in order:
            assert (masks[number] == expected[number]).all()
            assert scores[number][0] > 0

    def test_each_as_if_alone(self, model: SegmentationModel, stack: Slices) -> None:
        mask = np.zeros((48, 56), bool)
        mask[10:30, 12:33] = True
        asked = [
            Asked("a", 5, box=(7, 6, 35, 36)),
            Asked("b", 2, mask=mask),
            Asked("c", 5, points=((30, 20, 1), (5, 5, 0))),
        ]
        stack.read.clear()
        order, masks, _ = collected(list(propagate(model, stack, asked)))
        assert stack.read == [2, 3, 4, 5, 6, 7, 8, 4, 3, 2, 1, 0] and sorted(order) == list(range(9))
        assert (masks[2][1] == mask).all()
        for place, one in enumerate(asked):
            _, alone, _ = collected(list(propagate(model, stack, [one])))
            same = [(masks[number][place] == alone[number][0]).mean() for number in order]
            assert min(same) > 0.999  # batched sums may differ in the last digit

    def test_in_bf16(self, model: SegmentationModel, stack: Slices) -> None:
        asked = [Asked("a", 4, box=(7, 6, 35, 36))]
        for one in (model, make("medsam")):
            full, half = (
                np.concatenate([masks[0] for _, masks, _ in propagate(one, stack, asked, precision=precision)])
                for precision in ("32-true", "bf16-mixed")
            )
            assert 0.8 < (full == half).mean() < 1

    def test_what_is_held_does_not_grow(self, model: SegmentationModel, monkeypatch: pytest.MonkeyPatch) -> None:
        from trainer.models.sam2_tracking import Tracking

        held: dict[int, list[int]] = {}
        follow = Tracking.follow

        def watched(tracking: Tracking, *arguments: object) -> object:
            found = follow(tracking, *arguments)  # type: ignore[arg-type]
            held.setdefault(tracking.frames, []).append(len(tracking.bank.others))
            return found

        monkeypatch.setattr(Tracking, "follow", watched)
        for depth in (72, 96):
            volume = np.random.default_rng(0).integers(0, 255, (depth, 16, 16), dtype=np.uint8)
            assert len(list(propagate(model, Slices(volume), [Asked("a", depth // 2, box=(2, 2, 12, 12))]))) == depth
        assert max(held[72]) == max(held[96]) < 72

    def test_nothing_where_another_model_found_nothing(self, model: SegmentationModel, stack: Slices) -> None:
        found = propagate(model, stack, [Asked("a", 4, box=(1, 1, 5, 5))], initial=_Nothing(64))
        assert not any(masks.any() for _, masks, _ in found)


class _Nothing(Bright):
    """Finds nothing, ever."""

    def decode(self, features: Tensor, prompts: Prompts) -> tuple[Tensor, Tensor]:
        logits, scores = super().decode(features, prompts)
        return -torch.ones_like(logits), scores
