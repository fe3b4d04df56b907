"""What SAM2Module asks, follows, learns from, freezes and scores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("sam2")

import tiny_sam2
from tiny_sam2 import LENGTH, SIDE, clips, make, write_volumes

from data_shards.errors import UserError
from trainer.losses import BestMaskLoss, DiceCrossEntropy, resize_logits
from trainer.metrics import overlap
from trainer.models.sam2_tracking import Tracking
from trainer.modules import SAM2Module
from trainer.modules.clips import followed, with_absences
from trainer.modules.sam2 import MEMORY_PARTS
from trainer.prompts import BoxPrompts, ClickPrompts, GivenMaskPrompts, MixedPrompts, Prompts
from trainer.tuning import FullTuning


@pytest.fixture(scope="module")
def volumes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_volumes(tmp_path_factory.mktemp("moving") / "train", range(3))


def module(**arguments: Any) -> SAM2Module:
    """A module that can be asked for losses without a trainer."""
    made = SAM2Module(make(), **{"prompts": BoxPrompts(max_shift=0, eval_shift=0), **arguments})
    made.log_dict = lambda *_, **__: None  # type: ignore[method-assign]
    return made.train()


def follow(made: SAM2Module, batch: Any, epoch: int | None = 0) -> Any:
    return list(made._follow(batch, epoch))


# --- what is followed


def test_a_backwards_clip_is_turned_round_and_a_middle_one_goes_outwards(volumes):
    made = module()
    for anchor, first in (("first", 0), ("last", 3), ("middle", 2)):
        batch = clips(volumes, [0], anchor=anchor)
        found = followed(batch, made.model.preprocessing, made.model.mask_side, "cpu")
        frame = found.anchors[0]
        assert found.image[frame].unique().tolist() == [first]
        assert [batch.terms[row] for row in found.rows[frame].tolist()] == (
            ["disc"] if anchor == "last" else ["disc", "square"]
        )
        order = found.image[:, 0].tolist()
        assert order == ([3, 2, 1, 0] if anchor == "last" else [0, 1, 2, 3])


def test_what_vanishes_has_an_empty_mask_and_what_is_not_at_the_anchor_is_not_followed(volumes):
    made = module()
    batch = clips(volumes, [1])  # slices 1 to 4: the square is gone from 3 on
    found = followed(batch, made.model.preprocessing, made.model.mask_side, "cpu")
    areas = found.masks.flatten(2).sum(2)
    assert (areas[:, 0] > 0).all() and (areas[:2, 1] > 0).all() and (areas[2:, 1] == 0).all()
    assert found.rows[2:, 1].tolist() == [-1, -1]
    later = tiny_sam2.without(batch, [batch.terms.index("square")])  # as if slice 1 did not show it
    assert len(followed(later, made.model.preprocessing, made.model.mask_side, "cpu")) == 1
    gone = with_absences(batch)
    assert gone.absent_terms == ["square", "square"] and gone.absent_index.tolist() == [2, 3]


def test_clips_of_several_volumes_are_followed_as_each_by_itself(volumes):
    made = module().eval()
    single = [clips(volumes, [position], targets_per_image=None) for position in (0, LENGTH)]
    both = clips(volumes, [0, LENGTH])
    with torch.no_grad():
        ((together, looks, _),) = follow(made, both, None)
        for clip, batch in enumerate(single):
            ((_, alone, _),) = follow(made, batch, None)
            mine = (together.clip == clip).nonzero()[:, 0]
            for frame in range(4):
                torch.testing.assert_close(looks[frame].best[mine], alone[frame].best, atol=1e-5, rtol=0)


def test_the_module_follows_as_tracking_does(volumes):
    """The anchor asked, then forwards, then backwards, on one memory."""
    made = module().eval()
    batch = clips(volumes, [0], anchor="middle")
    with torch.no_grad():
        ((group, looks, _),) = follow(made, batch, None)
        features = made.model.encode(made.model.preprocessing.images(batch.images))
        tracking = Tracking(made.model, 4)
        asked = made.prompts.first(group.truth(2), None)
        for frame in (2, 3, 1, 0):
            mine = features.take(torch.full((len(group),), frame))
            look = tracking.ask(2, mine, asked) if frame == 2 else tracking.follow(frame, mine, frame < 2)
            torch.testing.assert_close(looks[frame].best, look.best)


# --- gradients


def grads(made: SAM2Module, loss: torch.Tensor) -> dict[str, float]:
    made.zero_grad()
    loss.backward()
    return {n: 0.0 if p.grad is None else float(p.grad.abs().sum()) for n, p in made.model.named_parameters()}


def test_a_loss_on_the_third_frame_reaches_the_memory_and_the_first_frames_encoder(volumes):
    """Frame 3's own features are cut off, so that what arrives has come through the memory alone."""
    made = module()
    batch = clips(volumes, [0], frames=3)
    images = made.model.preprocessing.images(batch.images)
    first = images[:1].clone().requires_grad_()
    features = [made.model.encode(first), *(made.model.encode(image[None]) for image in images[1:])]
    cut = type(features[2])(
        features[2].top.detach(), tuple(m.detach() for m in features[2].high), features[2].positions
    )
    tracking, index = Tracking(made.model, 3), torch.zeros(1, dtype=torch.int64)
    tracking.ask(0, features[0].take(index), [Prompts(index, boxes=torch.tensor([[10.0, 10.0, 40.0, 40.0]]))])
    tracking.follow(1, features[1].take(index))
    look = tracking.follow(2, cut.take(index))
    found = grads(made, look.logits.square().mean())
    for part in (
        "memory_encoder",
        "memory_attention",
        "image_encoder.trunk.patch_embed",
        "obj_ptr_proj",
        "maskmem_tpos_enc",
    ):
        assert max(v for n, v in found.items() if n.startswith(part)) > 0, part
    assert first.grad is not None and float(first.grad.abs().sum()) > 0, "frame 1's pixels"


def test_everything_that_learns_is_reached_in_a_clip(volumes):
    prompts = ClickPrompts(start=BoxPrompts(), corrections=1, blank=0)
    made = module(prompts=prompts)
    batch = clips(volumes, [0, LENGTH])
    found = grads(made, made.loss_of(batch, 0))
    unreached = {name for name, value in found.items() if value == 0}
    learning = {name for name, p in made.model.named_parameters() if p.requires_grad}
    # of the prompts a batch reaches those parts that it needs; nothing was given as a mask, and no object was absent
    conditional = {n for n in learning if n.startswith(("sam_prompt_encoder.", "mask_downsample.", "no_obj_"))}
    conditional |= {n for n in learning if n.endswith("k_proj.bias")}  # softmax is blind to it
    conditional |= {n for n in learning if "output_hypernetworks_mlps" in n}  # the best of three masks learns
    assert unreached & learning <= conditional, unreached & learning - conditional
    assert "no_mem_pos_enc" not in learning


@pytest.mark.parametrize(
    "frozen",
    ["image_encoder", "memory_attention", "memory_encoder", "sam_prompt_encoder", "sam_mask_decoder", "obj_ptr_proj"],
)
def test_each_frozen_part_stays_as_it_is(volumes, frozen):
    made = module(tuning=FullTuning(freeze=[frozen]))
    before = {name: p.detach().clone() for name, p in made.model.named_parameters()}
    groups = made.tuning.parameter_groups(made.model, 1e-2, 0.1, "all")
    optimizer = torch.optim.AdamW(groups)
    for _ in range(2):
        optimizer.zero_grad()
        made.loss_of(clips(volumes, [0]), 0).backward()
        optimizer.step()
    changed = {name for name, p in made.model.named_parameters() if not torch.equal(p, before[name])}
    assert changed and not [name for name in changed if name.startswith(frozen + ".")]
    assert all(p.grad is None for n, p in made.model.named_parameters() if n.startswith(frozen + "."))


def test_single_images_freeze_the_memory_and_clips_do_not():
    images, through = module(memory=False), module()
    for part in MEMORY_PARTS:
        for made, learns in ((images, False), (through, True)):
            states = {
                p.requires_grad for n, p in made.model.named_parameters() if n == part or n.startswith(part + ".")
            }
            assert states == {learns}, part


def test_heads_that_no_loss_reaches_are_frozen():
    plain = module(loss=DiceCrossEntropy())
    names = ("sam_mask_decoder.iou_prediction_head.", "sam_mask_decoder.pred_obj_score_head.")
    assert not [n for n, p in plain.model.named_parameters() if p.requires_grad and n.startswith(names)]
    sure = module(loss=BestMaskLoss(iou_weight=0))
    learns = {n for n, p in sure.model.named_parameters() if p.requires_grad and n.startswith(names)}
    assert learns and all("pred_obj" in name for name in learns)


# --- what it costs


def test_a_clip_costs_the_sum_over_its_frames_averaged_over_objects_then_clips(volumes):
    made = module()
    batch = clips(volumes, [1, LENGTH])
    loss, total = made.loss_of(batch, 0), {0: [], 1: []}
    for group, looks, _ in follow(made, batch):
        for q, clip in enumerate(group.clip.tolist()):
            costs = [
                made.loss(
                    look.logits[q : q + 1], look.ious[q : q + 1], look.presence[q : q + 1], group.masks[f, q : q + 1]
                )
                for f, look in looks.items()
            ]
            total[clip].append(sum(float(cost["loss"][0].detach()) for cost in costs))
    assert len(total[0]) == 2
    expected = sum(sum(costs) / len(costs) for costs in total.values()) / 2
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-5)


def test_corrections_are_learnt_on_the_frames_that_were_drawn(volumes):
    prompts = ClickPrompts(start=BoxPrompts(), corrections=2, blank=0)
    made = module(prompts=prompts, corrected_frames=3)
    batch = clips(volumes, [0])
    drawn = [made._corrected(batch, 0, 0, epoch) for epoch in range(40)]
    assert {len(frames) for frames in drawn} == {1, 2, 3} and all(frames[0] == 0 for frames in drawn)
    assert {frame for frames in drawn for frame in frames} == {0, 1, 2, 3}
    assert made._corrected(batch, 0, 0, 7) == drawn[7], "a pure function of the seed, the epoch and the sample"
    assert made._corrected(batch, 0, 0, None) == (0,)
    epoch = next(epoch for epoch, frames in enumerate(drawn) if len(frames) == 2)
    calls = []
    correct = prompts.correct

    def counted(*arguments: Any) -> Any:
        calls.append(arguments[4])
        return correct(*arguments)

    prompts.correct = counted  # type: ignore[method-assign]
    follow(made, batch, epoch)
    assert calls == [0, 1, 0, 1]


def test_corrected_frames_are_remembered_as_prompted(volumes, monkeypatch):
    prompts = ClickPrompts(start=BoxPrompts(), corrections=1, blank=0)
    made = module(prompts=prompts, corrected_frames=4)
    epoch = next(e for e in range(99) if len(made._corrected(clips(volumes, [0]), 0, 0, e)) == 3)
    kept = {}
    keep = Tracking.keep

    def watched(self: Tracking, frame: int, features: Any, look: Any, prompted: bool, reverse: bool = False) -> None:
        kept[frame] = prompted
        keep(self, frame, features, look, prompted, reverse)

    monkeypatch.setattr(Tracking, "keep", watched)
    batch = clips(volumes, [0])
    follow(made, batch, epoch)
    frames = made._corrected(batch, 0, 0, epoch)
    assert kept == {frame: frame in frames for frame in range(3)}, "and nothing looks back at the last one"


def test_masks_can_be_compared_at_the_decoders_side(volumes):
    small = module(loss_at="decoder", loss=DiceCrossEntropy(), memory=False)
    batch = clips(volumes, [0], frames=1)
    ((group, looks, costs),) = follow(small, batch)
    side = small.model.mask_side
    truth = torch.nn.functional.interpolate(group.masks[0][:, None], (side, side), mode="nearest-exact")[:, 0]
    expected = small.loss(looks[0].best, truth)["loss"]
    torch.testing.assert_close(costs["loss"], expected)
    large = module(loss=DiceCrossEntropy(), memory=False)
    ((group, looks, costs),) = follow(large, batch)
    torch.testing.assert_close(
        costs["loss"], large.loss(resize_logits(looks[0].best, (SIDE, SIDE)), group.masks[0])["loss"]
    )


def test_dice_and_cross_entropy_teach_no_mask_where_there_is_no_object(volumes):
    made = module(loss=DiceCrossEntropy())
    ((group, _, costs),) = follow(made, clips(volumes, [2]))  # the square is there in the first frame alone
    assert len(group) == 2
    alone = tiny_sam2.clips(volumes, [2], frames=2)
    ((_, _, first),) = follow(made, tiny_sam2.clips(volumes, [2], frames=1))
    assert costs["loss"].tolist()[1] == pytest.approx(first["loss"].tolist()[1], rel=1e-4) and len(alone) == 2


def test_given_masks_are_the_answer_and_teach_what_follows(volumes):
    made = module(prompts=GivenMaskPrompts())
    batch = clips(volumes, [0], frames=3)
    ((group, looks, _),) = follow(made, batch)
    torch.testing.assert_close((looks[0].full > 0).float(), group.masks[0])
    found = grads(made, made.loss_of(batch, 0))
    assert found["mask_downsample.weight"] > 0 and found["memory_encoder.out_proj.weight"] > 0
    single = made.loss_of(clips(volumes, [0], frames=1), 0)  # nothing follows: a loss all the same, without gradients
    assert max(grads(made, single).values()) == 0


def mixed() -> ClickPrompts:
    """Masks and boxes by chance, and two clicks."""
    start = MixedPrompts([GivenMaskPrompts(), BoxPrompts()], weights=[0.5, 0.5])
    return ClickPrompts(start=start, corrections=2, blank=0)


def test_objects_whose_masks_were_given_are_not_clicked_on(volumes):
    """As in SAM2's training; and what is said to them again is not counted again."""
    made, plain = module(prompts=mixed(), corrected_frames=4), module(prompts=mixed().start)
    batch = clips(volumes, [0, LENGTH])
    kinds = ({p.given is None for p in made.prompts.first(_truth(made, batch), epoch)} for epoch in range(99))
    epoch = next(epoch for epoch, found in enumerate(kinds) if len(found) == 2)
    asked: list[Prompts] = []
    groups, without = list(made._follow(batch, epoch, asked)), {}
    for group, _, costs in plain._follow(batch, epoch):
        without |= zip(group.rows[0].tolist(), costs["loss"].tolist(), strict=True)
    given = {int(row) for prompts in asked if prompts.given is not None for row in prompts.rows}
    assert 0 < len(given) < len(without)
    for group, looks, costs in groups:
        for q, row in enumerate(group.rows[0].tolist()):
            if row in given:
                assert (looks[0].full[q] > 0).float().equal(group.masks[0, q]), "the mask stays the answer"
                assert float(costs["loss"][q]) == pytest.approx(without[row], rel=1e-4), "nobody's clicks touch it"
            else:
                assert float(costs["loss"][q]) > without[row], "every answer to a click costs"


def _truth(made: SAM2Module, batch: Any) -> Any:
    return followed(batch, made.model.preprocessing, made.model.mask_side, "cpu").truth(0)


def test_masks_alone_leave_nothing_to_click_on(volumes):
    plain = module(prompts=GivenMaskPrompts())
    clicked = module(prompts=ClickPrompts(start=GivenMaskPrompts(), corrections=3, blank=0), corrected_frames=3)
    batch = clips(volumes, [0])
    assert float(plain.loss_of(batch, 0).detach()) == pytest.approx(float(clicked.loss_of(batch, 0).detach()), rel=1e-6)
    frozen = {n for n, p in plain.model.named_parameters() if not p.requires_grad}
    assert "no_mem_embed" in frozen, "nothing is answered without a memory"


def test_single_images_with_one_mask_leave_the_other_three_alone(volumes):
    made = module(memory=False, loss=DiceCrossEntropy())
    names = [n for n, p in made.model.named_parameters() if p.requires_grad and "output_hypernetworks_mlps" in n]
    assert names and all("output_hypernetworks_mlps.0." in name for name in names)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision_trains_and_evaluates(volumes, half):
    """Memories are kept in bf16 in an evaluation: autocast to fp16 cannot join these with its own."""
    made = module(prompts=mixed(), corrected_frames=2)
    batch = clips(volumes, [0])
    with torch.autocast("cpu", half):
        loss = made.loss_of(batch, 0)
        prediction = made.eval().predict_masks(batch)
    loss.backward()
    assert torch.isfinite(loss) and len(prediction.masks) == len(batch.masks)
    assert all(torch.isfinite(p.grad).all() for p in made.parameters() if p.grad is not None)


def test_a_copy_made_within_an_evaluation_can_learn(volumes):
    made = module().eval()
    with torch.inference_mode():
        copy = made.model.at_size(96)
    batch = clips(volumes, [0])
    other = SAM2Module(copy, prompts=BoxPrompts()).train()
    other.loss_of(batch, 0).backward()
    assert other.model.preprocessing.image_size == 96


# --- evaluation


def test_an_evaluation_scores_what_was_not_prompted_and_notes_what_vanished(volumes):
    made = module().eval()
    batch = with_absences(clips(volumes, [1]))
    prediction = made.evaluation_step(batch)
    rows = [q for q in range(len(batch.masks)) if made.counts(batch, q)]
    assert [int(batch.image_index[q]) for q in rows] == [1, 1, 2, 3] and len(made.scores) == 4
    for (_, score), q in zip(made.scores, rows, strict=True):
        dsc, _ = overlap(prediction.masks[q][None], batch.masks[q][None])
        assert score.dsc == pytest.approx(float(dsc)) and prediction.masks[q].shape == tiny_sam2.SIZE
    answers = [answer for _, answer in made.answers]
    assert [answer.present for answer in answers].count(False) == 2 and len(answers) == 4 + 2, "anchors are not found"
    assert [answer.term for answer in answers if not answer.present] == ["square", "square"]
    asked = [q for q in range(len(batch.masks)) if not prediction.boxes[q].isnan().any()]
    assert [int(batch.image_index[q]) for q in asked] == [0, 0], "the anchor alone was prompted"
    torch.testing.assert_close(prediction.boxes[asked], batch.boxes[asked])


def test_single_images_are_answered_as_the_image_predictor(volumes):
    made = module(memory=False).eval()
    batch = clips(volumes, [0, 1], frames=1)
    prediction = made.predict_masks(batch)
    boxes, _ = made.model.preprocessing.boxes(batch.boxes, batch.sizes)
    with torch.no_grad():
        features = made.model.encode(made.model.preprocessing.images(batch.images))
        logits, ious = made.model.decode(features, Prompts(batch.image_index, boxes=boxes))
    for q, mask in enumerate(prediction.masks):
        native = made.model.preprocessing.to_native(logits[q], *tiny_sam2.SIZE)[0] > 0
        assert torch.equal(mask, native)
    torch.testing.assert_close(prediction.scores, ious[:, 0])
    made.evaluation_step(batch)
    assert made.scores and not made.answers, "nothing was asked for in vain"


# --- mistakes


def test_another_model_is_refused():
    from encoders import make as encoder

    with pytest.raises(
        UserError, match=r"SAM2Module trains trainer.models.SAM2, not MedSAM: take the module of its family"
    ):
        SAM2Module(encoder("medsam"))


def test_no_corrected_frame_is_refused():
    with pytest.raises(UserError, match="corrected_frames 0: 1 or more"):
        SAM2Module(make(), corrected_frames=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_size": 100}, "image_size 100: SAM2 takes a multiple of 32 pixels"),
        ({"dropout": 1.0}, "dropout is a share in"),
        ({"drop_path": -0.1}, "drop_path is a share in"),
    ],
)
def test_sizes_and_shares_that_cannot_be_are_refused(arguments, message):
    from trainer.models import SAM2

    with pytest.raises(UserError, match=message):
        SAM2(tiny_sam2.SHAPE, **{"image_size": SIDE, "weights": None, **arguments})


def test_recomputation_changes_nothing_but_memory(volumes):
    """Gradients are the same when blocks are computed twice; a copy recomputes its own blocks."""
    import copy

    plain, twice = module(), SAM2Module(make(checkpoint_activations=True), prompts=BoxPrompts(max_shift=0)).train()
    twice.model.load_state_dict(plain.model.state_dict())
    batch = clips(volumes, [0])
    torch.testing.assert_close(grads(twice, twice.loss_of(batch, 0)), grads(plain, plain.loss_of(batch, 0)))
    other = copy.deepcopy(twice)
    with torch.no_grad():
        other.model.image_encoder.trunk.blocks[0].mlp.layers[0].weight.zero_()
    assert float(other.loss_of(batch, 0)) != pytest.approx(float(twice.loss_of(batch, 0)), rel=1e-6)
