"""What SAM3Module asks, learns from, answers and records; every recipe of SAM3 at tiny size."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from tiny_sam3 import SHAPE, SIDE, make
from torch import Tensor

from data_shards.batch import Sample, TripletBatch, collate
from data_shards.errors import UserError
from data_shards.triplet import Provenance, Target, Triplet
from trainer.losses import ObjectSets, SetPredictionLoss
from trainer.modules import SAM3Module
from trainer.modules.concepts import objects_of, without_overlaps
from trainer.prompts import Exemplars, Wording, concepts_of
from trainer.prompts.concepts import drawn_terms
from trainer.prompts.exemplars import ALONE
from trainer.tuning import FullTuning

REPOSITORY = Path(__file__).parents[2]
RECIPES = sorted((REPOSITORY / "recipes/sam3").glob("*.yaml"))


def box_mask(x0: int, y0: int, x1: int, y1: int) -> np.ndarray:
    mask = np.zeros((40, 60), np.uint8)
    mask[y0 : y1 + 1, x0 : x1 + 1] = 1
    return mask


def make_batch() -> TripletBatch:
    """Two images of 40 × 60 px: nuclei as instances and a stroma; then nothing but an absent nucleus."""
    origin = Provenance("toy", "p", "v", "microscopy", "0" * 64)
    targets = (
        Target.from_mask(box_mask(0, 0, 59, 39), "stroma"),
        Target.from_mask(box_mask(6, 4, 17, 11), "nucleus", kind="instance"),
        Target.from_mask(box_mask(30, 20, 41, 39), "nucleus", kind="instance"),
    )
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 255, (2, 40, 60), dtype=np.uint8)
    first = Triplet("a", pictures[0], targets, ("nucleus", "stroma", "gland"), origin)
    second = Triplet("b", pictures[1], (), ("nucleus",), replace(origin, modality="CT"))
    return collate([Sample(3, first, (0, 1, 2), absent=("gland",)), Sample(8, second, (), absent=("nucleus",))])


def module(**arguments: Any) -> SAM3Module:
    made = SAM3Module(make(), **arguments)
    made.log_dict = lambda *given, **named: None  # type: ignore[method-assign] # no trainer is attached
    return made


def truth_of(made: SAM3Module, batch: TripletBatch) -> ObjectSets:
    return objects_of(batch, concepts_of(batch), made.model.preprocessing, made._side(), made.device)


def test_the_truth_is_what_the_masks_say() -> None:
    batch = make_batch()
    concepts = concepts_of(batch)
    assert [(c.image, c.term, c.rows) for c in concepts] == [
        (0, "stroma", (0,)),
        (0, "nucleus", (1, 2)),
        (0, "gland", ()),
        (1, "nucleus", ()),
    ]
    truth = truth_of(module(), batch)
    assert truth.counts == [1, 2, 0, 0]
    # the second nucleus fills columns 30 to 41 of 60 and rows 20 to 39 of 40, both ends included
    expected = torch.tensor([[0.5, 0.5, 1, 1], [0.2, 0.2, 0.2, 0.2], [0.6, 0.75, 0.2, 0.5]])
    torch.testing.assert_close(truth.boxes, expected)
    assert truth.masks.shape == (3, 32, 32) and truth.semantic.shape == (4, 32, 32)
    torch.testing.assert_close(truth.masks.mean((1, 2)), torch.tensor([1.0, 0.04, 0.1]), atol=0.02, rtol=0)
    torch.testing.assert_close(truth.semantic[1], (truth.masks[1] + truth.masks[2]).clamp(max=1))
    assert truth.semantic[2:].sum() == 0
    at_target = truth_of(module(loss=SetPredictionLoss(mask_at="target")), batch)
    assert at_target.masks.shape == (3, SIDE, SIDE)


def test_a_step_learns_from_all_concepts_and_from_none() -> None:
    made = module(loss=SetPredictionLoss(mask_weight=200.0, dice_weight=10.0, padded_queries=20)).train()
    loss = made.training_step(make_batch(), 0)
    loss.backward()
    assert math.isfinite(loss.item()) and loss.item() > 0
    missing = [name for name, p in made.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing
    empty = collate([])
    nothing = made.training_step(empty, 0)
    assert nothing.item() == 0 and nothing.requires_grad


def test_what_no_gradient_reaches_is_frozen() -> None:
    frozen = {n for n, p in module().model.named_parameters() if not p.requires_grad} - set(make().fixed)
    parts = {name.rsplit(".", 1)[0] for name in frozen}
    assert {"mask_decoder.instance_projection", "geometry_encoder.boxes_direct_project"} <= parts
    assert "mask_decoder.semantic_projection" not in parts and "geometry_encoder.final_proj" not in parts
    shown = module(loss=SetPredictionLoss(mask_weight=1.0), exemplars=Exemplars())
    assert not {n for n, p in shown.model.named_parameters() if not p.requires_grad} - set(make().fixed)


def test_without_a_mask_term_masks_cost_nothing() -> None:
    made = module(loss=SetPredictionLoss(semantic_weight=0.0, semantic_dice_weight=0.0)).train()
    made.training_step(make_batch(), 0).backward()
    assert all(p.grad is None for n, p in made.model.mask_decoder.named_parameters())
    assert all(p.grad is not None for n, p in made.named_parameters() if p.requires_grad)


def test_exemplars_show_an_instance_of_what_is_there() -> None:
    batch = make_batch()
    concepts = concepts_of(batch)
    made = module(exemplars=Exemplars(share=1.0, boxes=1, alone=1.0, seed=5))
    truth, asked = truth_of(made, batch), made._asked(concepts, 0)
    shown = made.exemplars.show(asked, concepts, truth, epoch=0)
    assert shown.texts == [ALONE, ALONE, "gland", "nucleus"]
    assert shown.box_labels.tolist() == [[1], [1], [-1], [-1]]
    assert torch.equal(shown.boxes[0, 0], truth.boxes[0])
    assert any(torch.equal(shown.boxes[1, 0], truth.boxes[row]) for row in (1, 2))
    drawn = {tuple(made.exemplars.show(asked, concepts, truth, e).boxes[1, 0].tolist()) for e in range(12)}
    assert len(drawn) == 2  # both instances, in turn
    assert torch.equal(made.exemplars.show(asked, concepts, truth, 0).boxes, shown.boxes)
    never = Exemplars(share=0.0).show(asked, concepts, truth, 0)
    assert never.texts == asked.texts and (never.box_labels == -1).all()


def test_points_lie_on_their_instance() -> None:
    batch = make_batch()
    concepts = concepts_of(batch)
    made = SAM3Module(make(points=True), exemplars=Exemplars(share=1.0, boxes=0, points=1))
    truth, asked = truth_of(made, batch), made._asked(concepts, 0)
    for epoch in range(5):
        shown = made.exemplars.show(asked, concepts, truth, epoch)
        assert shown.boxes is None and shown.point_labels.tolist() == [[1], [1], [-1], [-1]]
        for p in (0, 1):
            x, y = (shown.points[p, 0] * 32).long().tolist()
            assert truth.semantic[p, y, x] > 0.5
    with pytest.raises(UserError, match=r"model\.init_args\.points"):
        SAM3Module(make(), exemplars=Exemplars(points=1))


def answered(made: SAM3Module, masks: dict[str, tuple[int, int, int, int]], sure: dict[str, float]) -> None:
    """Let the model answer each text with a box in native pixels of 40 × 60, and with a confidence."""

    def decode(features: object, asked: Any) -> tuple[Tensor, Tensor]:
        side = made.model.mask_side
        logits = torch.full((len(asked), 1, side, side), -5.0)
        for p, text in enumerate(asked.texts):
            x0, y0, x1, y1 = masks[text]
            logits[p, 0, y0 * side // 40 : y1 * side // 40, x0 * side // 60 : x1 * side // 60] = 5.0
        return logits, torch.tensor([[sure[text]] for text in asked.texts])

    made.model.decode = decode  # type: ignore[method-assign]


def test_an_evaluation_scores_terms_and_notes_what_was_said_of_absent_ones() -> None:
    made = module(threshold=0.5).eval()
    answered(
        made,
        {"stroma": (0, 0, 60, 40), "nucleus": (30, 20, 42, 40), "gland": (0, 0, 30, 20)},
        {"stroma": 0.9, "nucleus": 0.3, "gland": 0.8},
    )
    batch = make_batch().by_term()
    prediction = made.evaluation_step(batch)
    scores = {row.term: row for _, row in made.scores}
    assert scores["stroma"].dsc == pytest.approx(1.0)
    union, answer = 12 * 8 + 12 * 20, int(prediction.masks[1].sum())
    assert scores["nucleus"].dsc == pytest.approx(
        2 * answer / (answer + union), abs=0.03
    )  # of both, scored though unsure
    found = {(a.key, a.term): (a.present, round(a.confidence, 3), a.area_px > 0) for _, a in made.answers}
    assert found == {
        ("a", "stroma"): (True, 0.9, True),
        ("a", "nucleus"): (True, 0.3, False),
        ("a", "gland"): (False, 0.8, True),
        ("b", "nucleus"): (False, 0.3, False),
    }
    assert [a.area_px for _, a in made.answers if a.term == "gland"] == [pytest.approx(600, abs=80)]
    predicted = made.predict_step(batch, 0)
    assert [bool(mask.any()) for mask in predicted.masks] == [True, False]


def test_overlaps_go_to_the_surest_term() -> None:
    logits = torch.full((3, 4, 4), -3.0)
    logits[0, :, :3], logits[1, :, 2:], logits[2] = 3.0, 2.0, 4.0
    resolved = without_overlaps(list(logits), torch.tensor([0.5, 0.9, 0.1]), torch.tensor([0, 0, 1]))
    masks = torch.stack([mask > 0 for mask in resolved])
    assert masks[0].sum() == 8 and masks[1].sum() == 8 and not (masks[0] & masks[1]).any()
    assert masks[2].all()  # another image
    equal = without_overlaps(list(logits[:2].clamp(max=1)), torch.tensor([0.5, 0.5]), torch.tensor([0, 0]))
    assert equal[0][:, :3].all() and not equal[1][:, :3].any()  # of equals the first, on every device


def test_semantic_answers_come_from_the_semantic_head() -> None:
    made = module(answer="semantic").eval()
    batch = make_batch().by_term()
    prediction = made.predict_masks(batch)
    features = made._encode(batch)
    found = made.model.detect(features, made._asked(concepts_of(batch), None))
    torch.testing.assert_close(prediction.scores, found.presence[-1][:2].sigmoid())
    native = made.model.preprocessing.to_native(found.semantic[:1], 40, 60)[0] > 0
    assert torch.equal(prediction.masks[0], native)


def test_instances_are_all_that_reach_the_threshold() -> None:
    made = module(threshold=0.0).eval()
    batch = make_batch().by_term()
    found = made.instances(batch, [["nucleus", "stroma"], []])
    assert [(one.image, one.term) for one in found] == [(0, "nucleus"), (0, "stroma")]
    assert all(len(one.masks) == SHAPE.queries and one.masks.shape[1:] == (40, 60) for one in found)
    made.threshold = 1.0
    assert [len(one.masks) for one in made.instances(batch, [["nucleus"], ["nucleus"]])] == [0, 0]


def test_a_batch_of_absent_terms_alone_is_asked_too() -> None:
    made = module().eval()
    batch = collate(
        [
            Sample(
                8,
                Triplet("b", np.zeros((40, 60), np.uint8), (), ("x",), make_batch().provenances[1]),
                (),
                absent=("x",),
            )
        ]
    )
    made.evaluation_step(batch.by_term())
    assert [(a.term, a.present) for _, a in made.answers] == [("x", False)] and not made.scores


def test_wordings_are_drawn_in_training_alone() -> None:
    batch = make_batch()
    batch.synonyms = [("connective tissue",), (), ()]
    made = module(wording=Wording(synonyms=1.0, templates=["{term} in {modality}"], seed=1))
    concepts = concepts_of(batch)
    assert made._asked(concepts, 0).texts[0] == "connective tissue in microscopy"
    assert made._asked(concepts, None).texts[0] == "stroma in microscopy"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"threshold": 1.5}, "threshold"), ({"lr": 0.0}, "lr is above 0"), ({"tuning": FullTuning()}, "prompt_encoder")],
)
def test_mistakes_are_one_line(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        SAM3Module(make(), **arguments)


def small(recipe: Path, shards: Path, run: Path, **trainer: Any) -> dict[str, Any]:
    """A recipe at the size of the tests, with random weights, on the shapes."""
    content: dict[str, Any] = yaml.safe_load(recipe.read_text())
    arguments = content["model"]["init_args"]
    sizes = {name: list(value) if isinstance(value, tuple) else value for name, value in vars(SHAPE).items()}
    arguments["model"]["init_args"] |= {"weights": None, "image_size": SIDE, "shape": sizes}
    data = {"batch_size": 4, "micro_batch_size": 2, "num_workers": 0, "evaluated_negatives": 1}
    splits = {split: str(shards / split) for split in ("train", "val", "test")}
    content["data"]["init_args"] |= {**data, **splits}
    content["trainer"] |= {
        "default_root_dir": str(run),
        "max_epochs": 2,
        "log_every_n_steps": 1,
        "accelerator": "cpu",
        "precision": "32-true",
        **trainer,
    }
    content["checkpoint"] = {**content["checkpoint"], "every_n_steps": 1, "monitor": "val/dsc"}
    return content


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_trains_and_is_evaluated(
    recipe: Path, shape_shards: Path, tmp_path: Path, trainer_command: Any
) -> None:
    pytest.importorskip("open_clip")
    content = small(recipe, shape_shards, tmp_path / "run", num_sanity_val_steps=-1)
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe.read_text().split("\n\n")[0] + "\n\n" + yaml.safe_dump(content))
    code, _, error = trainer_command("fit", "-c", path)
    assert code == 0, error
    with (tmp_path / "run/trace.csv").open() as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file)]
    assert len(losses) == 8 and all(math.isfinite(loss) for loss in losses)
    code, _, error = trainer_command("test", "-c", path, "--ckpt_path", "best")
    assert code == 0, error
    folder = tmp_path / "run/evaluation/tuned"
    rates = json.loads((folder / "presence.json").read_text())["groups"][0]
    assert rates["present"] == 8 and rates["absent"] == 2
    record = json.loads((folder / "evaluation.json").read_text())
    assert record["prompts"]["kind"] == "Text" and record["targets"] == 8
    if recipe.stem != "tiny":
        assert (folder / "synonyms.json").is_file() and (folder / "boxes_given.json").is_file()


def test_a_run_goes_on_bit_by_bit(shape_shards: Path, tmp_path: Path, trainer_command: Any) -> None:
    pytest.importorskip("open_clip")
    overlay = {"wording": {"class_path": "trainer.prompts.Wording", "init_args": {"synonyms": 0.5}}}
    states = []
    for name, stops in (("whole", (4,)), ("parts", (3, 4))):
        content = small(RECIPES[0].with_name("tiny.yaml"), shape_shards, tmp_path / name, max_steps=4)
        content["model"]["init_args"] |= overlay
        content["model"]["init_args"]["model"]["init_args"] |= {"dropout": 0.3, "drop_path": 0.3}
        content["model"]["init_args"]["loss"]["init_args"]["mask_points"] = 20
        path = tmp_path / f"{name}.yaml"
        path.write_text("# Does it go on?\n" + yaml.safe_dump(content))
        for number, stop in enumerate(stops):
            more = ("--ckpt_path", "last") if number else ()
            code, _, error = trainer_command("fit", "-c", path, "--trainer.max_steps", stop, *more)
            assert code == 0, error
        states.append(torch.load(tmp_path / name / "checkpoints/last.ckpt", weights_only=True)["state_dict"])
    assert all(torch.equal(states[0][name], tensor) for name, tensor in states[1].items())


def test_clips_are_refused(shape_shards: Path, tmp_path: Path, trainer_command: Any) -> None:
    content = small(RECIPES[0].with_name("tiny.yaml"), shape_shards, tmp_path / "run")
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    code, _, error = trainer_command("fit", "-c", path, "--data.init_args.clip_length", "2")
    assert code == 2 and "clip_length 2" in error and "Traceback" not in error


def test_some_terms_of_an_image_are_drawn_anew_each_epoch() -> None:
    batch = make_batch()
    concepts = concepts_of(batch)
    assert drawn_terms(concepts, None, 0) == concepts == drawn_terms(concepts, 2, 0)
    drawn = [drawn_terms(concepts, 1, epoch) for epoch in range(10)]
    assert {part[0].term for part in drawn} == {"stroma", "nucleus"}
    assert all([c.term for c in part[1:]] == ["gland", "nucleus"] for part in drawn)  # absent ones stay
    assert drawn_terms(concepts, 1, 3) == drawn[3]


def test_a_part_of_the_instances_is_refused(shape_shards: Path, tmp_path: Path, trainer_command: Any) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(small(RECIPES[0].with_name("tiny.yaml"), shape_shards, tmp_path / "run")))
    code, _, error = trainer_command("fit", "-c", path, "--data.init_args.targets_per_image", "1")
    assert code == 2 and "terms_per_image" in error and "Traceback" not in error
