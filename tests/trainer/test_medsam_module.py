"""What a training step asks, learns from, and shows: several forms of prompts, several rounds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from data_shards.batch import Sample, TripletBatch, collate
from data_shards.dataset import ShardDataset
from data_shards.errors import UserError
from trainer.models import MedSAM
from trainer.models.medsam import ViT
from trainer.modules import MedSAMModule
from trainer.modules.medsam import per_image_mean
from trainer.prompts import BoxPrompts, ClickPrompts, MixedPrompts, PointPrompts, Prompter, Prompts, Truth
from trainer.tuning import FullTuning

SIDE = 64


def model(seed: int = 0) -> MedSAM:
    torch.manual_seed(seed)
    return MedSAM(ViT(width=32, depth=2, heads=2, global_blocks=(1,), window=3), SIDE, weights=None)


@pytest.fixture
def batch(tiny_shards: Path) -> TripletBatch:
    """Three images; the first stands there with its target twice."""
    shards = ShardDataset(tiny_shards / "train")
    chosen = [(0, (0, 0)), (5, (0,)), (9, (0,))]
    return collate([Sample(position, shards[position], targets) for position, targets in chosen])


class Mixture(Prompter):
    """The first and the last target are asked with points, the others with boxes."""

    def first(self, truth: Truth, epoch: int | None) -> list[Prompts]:
        at = torch.tensor([3, 0])
        points = truth.boxes[at].reshape(2, 2, 2).mean(1, keepdim=True)
        labels = torch.ones(2, 1, dtype=torch.int64)
        middle = torch.tensor([1, 2])
        return [
            Prompts(truth.image_index[at], points=points, labels=labels, rows=at),
            Prompts(truth.image_index[middle], boxes=truth.boxes[middle], rows=middle),
        ]

    def describe(self) -> dict[str, Any]:
        return {}


def test_answers_to_several_forms_come_back_in_the_batch_s_order(batch: TripletBatch) -> None:
    module = MedSAMModule(model(), prompts=Mixture()).eval()
    with torch.no_grad():
        (answer,) = module(batch)
        features = module.model.encode(module.model.preprocessing.images(batch.images))
        truth = module._truth(batch)
        for part in answer.asked:
            for row, image in zip(part.rows.tolist(), part.image_index.tolist(), strict=True):
                at = part.rows.tolist().index(row)
                alone = Prompts(
                    torch.tensor([image]),
                    boxes=None if part.boxes is None else part.boxes[at : at + 1],
                    points=None if part.points is None else part.points[at : at + 1],
                    labels=None if part.labels is None else part.labels[at : at + 1],
                )
                logits, scores = module.model.decode(features, alone)
                assert image == truth.image_index[row]
                torch.testing.assert_close(answer.logits[row], logits[0, 0], rtol=1e-4, atol=1e-5)
                torch.testing.assert_close(answer.scores[row], scores[0, 0], rtol=1e-4, atol=1e-5)
        prediction = module.predict_masks(batch)
    assert [bool(row.isnan().all()) for row in prediction.boxes] == [True, False, False, True]
    assert prediction.labels.tolist() == [[1], [-1], [-1], [1]]
    native = batch.boxes[3].reshape(2, 2).mean(0)
    torch.testing.assert_close(prediction.points[3, 0], native, rtol=0, atol=1e-3)
    torch.testing.assert_close(prediction.boxes[1], batch.boxes[1], rtol=0, atol=1e-3)


class Rounds(BoxPrompts):
    """Boxes, asked three times; the third time with what was answered as a mask."""

    def rounds(self, epoch: int | None) -> int:
        return 2

    def correct(
        self, asked: list[Prompts], logits: Tensor, truth: Truth, epoch: int | None, correction: int
    ) -> list[Prompts]:
        assert not logits.requires_grad
        (before,) = asked
        masks = logits if correction == 1 else None
        return [Prompts(before.image_index, boxes=before.boxes, masks=masks, rows=before.rows)]


def step(module: MedSAMModule, batch: TripletBatch) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a training step, and what it logs."""
    logged: dict[str, Tensor] = {}
    module.log_dict = lambda values, **_: logged.update(values)  # type: ignore[method-assign]
    return module.training_step(batch, 0), logged


def test_every_round_is_learnt_from_alike(batch: TripletBatch) -> None:
    module = MedSAMModule(model(), prompts=Rounds(max_shift=0))
    encoded: list[int] = []
    module.model.image_encoder.register_forward_hook(lambda m, i, o: encoded.append(1))
    loss, logged = step(module, batch)
    assert encoded == [1], "an image is encoded once, whatever the rounds"
    answers = module(batch, epoch=0)
    assert len(answers) == 3
    truth = module._truth(batch)
    losses = [module._losses(answer, truth)["loss"] for answer in answers]
    torch.testing.assert_close(loss, sum(losses) / 3)
    assert torch.equal(losses[0], losses[1]) and not torch.equal(losses[1], losses[2])
    assert logged["train/loss"] == loss
    (again,) = MedSAMModule(module.model, prompts=BoxPrompts(max_shift=0))(batch, epoch=0)
    torch.testing.assert_close(again.logits, answers[0].logits)


def test_the_loss_is_the_mean_over_images_of_the_mean_over_their_targets(batch: TripletBatch) -> None:
    module = MedSAMModule(model(), prompts=BoxPrompts(max_shift=0))
    loss, _ = step(module, batch)
    (answer,) = module(batch, epoch=0)
    truth = module._truth(batch)
    values = module.loss(
        torch.nn.functional.interpolate(answer.logits[:, None], (SIDE, SIDE), mode="bilinear")[:, 0], truth.masks
    )
    a, b, c, d = values["loss"]
    torch.testing.assert_close(loss, ((a + b) / 2 + c + d) / 3)
    assert per_image_mean(torch.tensor([1.0, 3.0, 5.0]), torch.tensor([7, 7, 2])) == 3.5
    assert per_image_mean(torch.tensor([1.0, 3.0, 5.0]), torch.tensor([7, 7, 2]), 1.75) == 4  # (2 + 5) / 1.75


def test_a_pass_with_fewer_images_than_others_counts_less(batch: TripletBatch) -> None:
    """Three images in a pass; its step has two such on average, so that of four others this one learns a share."""
    module = MedSAMModule(model(), prompts=BoxPrompts(max_shift=0))
    loss, _ = step(module, batch)
    batch.counted = 2.0
    shared, logged = step(module, batch)
    torch.testing.assert_close(shared, loss * 3 / 2)
    torch.testing.assert_close(logged["train/loss"], shared.detach())


def test_the_predicted_quality_learns_only_where_it_is_asked_for(batch: TripletBatch) -> None:
    plain = MedSAMModule(model())
    loss, logged = step(plain, batch)
    loss.backward()
    assert all(p.grad is None for p in plain.model.get_submodule(plain.model.score_head).parameters())
    assert "train/score_loss" not in logged
    scored = MedSAMModule(model(), score_weight=0.5, prompts=BoxPrompts(max_shift=0))
    loss, logged = step(scored, batch)
    loss.backward()
    assert all(p.grad is not None for p in scored.model.get_submodule(scored.model.score_head).parameters())
    (answer,) = scored(batch, epoch=0)
    truth = scored._truth(batch)
    full = torch.nn.functional.interpolate(answer.logits[:, None], (SIDE, SIDE), mode="bilinear")[:, 0] > 0
    both, either = (full & (truth.masks > 0)).sum((1, 2)), (full | (truth.masks > 0)).sum((1, 2))
    error = (answer.scores - both / either).square()
    torch.testing.assert_close(logged["train/score_loss"], ((error[0] + error[1]) / 2 + error[2] + error[3]) / 3)


def test_clicks_as_sam_was_trained(batch: TripletBatch) -> None:
    start = MixedPrompts([BoxPrompts(max_shift=2), PointPrompts()])
    prompts = ClickPrompts(start=start, corrections=3, blank=1, eval_corrections=2)
    module = MedSAMModule(model(), tuning=FullTuning(freeze=()), prompts=prompts, score_weight=1.0)
    answers = module(batch, epoch=3)
    assert len(answers) == 1 + 3 + 1
    loss, _ = step(module, batch)
    loss.backward()
    learnt = {name for name, p in module.model.prompt_encoder.named_parameters() if p.grad is not None}
    assert {"mask_embed.conv1.weight", "point_embed.1.weight"} <= learnt
    first, second = module(batch, epoch=3), module(batch, epoch=3)
    assert all(torch.equal(a.logits, b.logits) for a, b in zip(first, second, strict=True)), "nothing is left to chance"
    assert not torch.equal(module(batch, epoch=4)[-1].logits, first[-1].logits)
    module.eval()
    assert len(module(batch)) == 1 + 2
    assert len(module.predict_masks(batch).masks) == 4


@pytest.mark.parametrize(
    "arguments", [{"score_weight": -1.0}, {"lr": 0.0}, {"warmup_steps": -1}, {"betas": (0.9, 1.0)}]
)
def test_arguments_out_of_range(arguments: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(arguments))):
        MedSAMModule(model(), **arguments)


def test_a_batch_without_targets_predicts_nothing(batch: TripletBatch) -> None:
    empty = TripletBatch([], [], torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4), [], [], [], [], [])
    prediction = MedSAMModule(model()).eval().predict_masks(empty)
    assert (prediction.masks, len(prediction.boxes), len(prediction.points)) == ([], 0, 0)
    loss, _ = step(module := MedSAMModule(model()), empty)
    loss.backward()
    assert loss == 0 and all(p.grad is not None for p in module.parameters() if p.requires_grad)
