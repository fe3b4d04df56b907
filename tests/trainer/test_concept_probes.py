"""Other words and given boxes, on a model whose every answer can be worked out by hand."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from data_shards.batch import Sample, TripletBatch, collate
from data_shards.datamodule import TripletDataModule
from data_shards.errors import UserError
from data_shards.scan import write_index
from data_shards.triplet import Provenance, Target, Triplet
from data_shards.writer import ShardWriter
from trainer.callbacks.concept_probes import (
    AT_ONCE,
    BoxGivenProbe,
    SynonymProbe,
    ask,
    box_of,
    model_boxes,
    present_concepts,
    truth_of,
)
from trainer.callbacks.evaluation import EvaluationRecord
from trainer.callbacks.probes import BoxJitterProbe
from trainer.models import SegmentationModel
from trainer.models.preprocessing import Preprocessing
from trainer.models.sam3 import SAM3, SAM3Shape
from trainer.modules.sam3 import SAM3Module
from trainer.modules.scoring import Prediction, ScoredModule
from trainer.presence import read_answers
from trainer.prompts.concepts import ConceptPrompts
from trainer.prompts.wording import Wording
from trainer.run import read_json
from trainer.scores import read_scores

SIDE = 40
SHIFTS = {"liver": 0, "hepar": 2, "jecur": 10, "spleen": 5, "lien": 5}
"""Rows by which the answer to a word lies too low; other words are answered with nothing."""
OTHERS = {"liver": ("hepar", "jecur"), "spleen": ("lien",), "bone": ()}
HIGH = 10
"""Rows that each thing takes: shifted by s of them, DSC is (10 − s) / 10."""


class Reader(SegmentationModel):
    """Answers a word with the bright rows, shifted as `SHIFTS` says; a box with the box, both with what is in both."""

    score_head, patch_embedding = "none", ()

    def __init__(self) -> None:
        super().__init__()
        self.preprocessing = Preprocessing(image_size=SIDE, resize="squash", scaling="centred")
        self.encoded: list[int] = []
        self.asked: list[ConceptPrompts] = []

    def encode(self, images: Tensor) -> Tensor:
        self.encoded.append(len(images))
        return images

    def decode(self, features: Tensor, prompts: ConceptPrompts) -> tuple[Tensor, Tensor]:
        self.asked.append(prompts)
        masks = torch.stack([self._answer(features, prompts, p) for p in range(len(prompts))])
        confidence = torch.tensor([[1 - 0.05 * SHIFTS.get(text, 20)] for text in prompts.texts])
        return masks[:, None].float() * 20 - 10, confidence

    def _answer(self, features: Tensor, prompts: ConceptPrompts, p: int) -> Tensor:
        text = prompts.texts[p]
        value = 2 * LEVELS[text] / 255 - 1 if text in LEVELS else 9.0
        rows = features[int(prompts.image_index[p]), 0].sub(value).abs() < 0.02
        worded = rows.roll(SHIFTS.get(text, 0), dims=0)
        if prompts.boxes is None:
            return worded
        assert prompts.box_labels is not None and prompts.box_labels[p].tolist() == [1]
        cx, cy, w, h = (prompts.boxes[p, 0] * SIDE).tolist()
        box = torch.zeros(SIDE, SIDE, dtype=torch.bool)
        box[round(cy - h / 2) : round(cy + h / 2), round(cx - w / 2) : round(cx + w / 2)] = True
        return box if text == "visual" else box & worded

    @property
    def mask_side(self) -> int:
        return SIDE

    def at_size(self, image_size: int) -> SegmentationModel:
        raise NotImplementedError


LEVELS = {"liver": 100, "hepar": 100, "jecur": 100, "spleen": 200, "lien": 200}


class Namer(ScoredModule):
    """What the probes need of a module that is asked in words."""

    def __init__(self) -> None:
        super().__init__()
        self.model, self.wording = Reader(), Wording()

    def predict_masks(self, batch: TripletBatch) -> Prediction:
        count = len(batch.masks)
        masks = [mask != 0 for mask in batch.masks]
        return Prediction(
            masks, torch.ones(count), torch.zeros(count, 4), torch.zeros(count, 0, 2), torch.zeros(count, 0)
        )


def triplet(number: int) -> Triplet:
    """Liver and spleen in two data sets; the third sample has a thing without other names, the fourth nothing."""
    image = np.zeros((SIDE, SIDE), np.uint8)
    image[4 : 4 + HIGH, 2:38], image[22 : 22 + HIGH, 2:38] = 100, 200
    terms = {0: ("liver", "spleen"), 1: ("spleen",), 2: ("bone",), 3: ()}[number]
    levels = {**LEVELS, "bone": 100}
    targets = tuple(Target.from_mask(image == levels[term], term, OTHERS[term]) for term in terms)
    origin = Provenance(f"set {number % 2}", f"p{number}", f"v{number}", "CT", "0" * 64)
    return Triplet(f"s-{number}", image, targets, ("kidney",), origin)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("words") / "test"
    with ShardWriter(folder, 50, 2**20) as writer:
        for number in range(4):
            sample = triplet(number)
            writer.write(sample.key, sample.encode())
    write_index(folder)
    return folder


def score(
    shards: Path, root: Path, callbacks: Sequence[Callback], module: Any = None, ranks: int = 1, data: Any = None
) -> Any:
    module = module or Namer()
    trainer = Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy="ddp_fork" if ranks > 1 else "auto",
        default_root_dir=str(root),
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=list(callbacks),
    )
    data = data or TripletDataModule(test=str(shards), micro_batch_size=2, batch_size=2)
    trainer.test(module, datamodule=data, verbose=False)
    return module


def test_every_wording_is_scored(shards: Path, tmp_path: Path) -> None:
    module = score(shards, tmp_path, [SynonymProbe()])
    folder = tmp_path / "evaluation" / "untouched"
    with (folder / "synonyms.csv").open(newline="") as handle:
        rows = list(csv.DictReader(handle))
    assert [(row["key"], row["term"], row["wording"]) for row in rows] == [
        ("s-0", "liver", "hepar"),
        ("s-0", "liver", "jecur"),
        ("s-0", "spleen", "lien"),
        ("s-1", "spleen", "lien"),
    ]
    assert [float(row["dsc"]) for row in rows] == pytest.approx([0.8, 0, 0.5, 0.5], abs=1e-4)
    assert [float(row["canonical_dsc"]) for row in rows] == pytest.approx([1, 1, 0.5, 0.5], abs=1e-4)
    assert [float(row["confidence"]) for row in rows] == pytest.approx([0.9, 0.5, 0.75, 0.75], abs=1e-4)
    found = read_json(folder / "synonyms.json")
    assert (found["samples"], found["concepts"], found["wordings"]) == (3, 4, 4)
    assert found["dsc"] == pytest.approx({"canonical": 0.75, "others": 0.45}, abs=1e-4)
    assert found["drop"] == pytest.approx(0.3, abs=1e-4) and found["share_worse"] == 0.5
    assert [(one["term"], one["wording"], one["n"]) for one in found["worst"]] == [
        ("liver", "jecur", 1),
        ("liver", "hepar", 1),
        ("spleen", "lien", 2),
    ]
    assert found["worst"][0]["drop"] == pytest.approx(1, abs=1e-4)
    assert module.model.encoded == [1, 1, 1], "each image once"


def test_text_against_box(shards: Path, tmp_path: Path) -> None:
    module = score(shards, tmp_path, [BoxGivenProbe()])
    found = read_json(tmp_path / "evaluation" / "untouched" / "boxes_given.json")
    # liver: 1, 1, 1; spleen, 5 rows too low: 0.5, half of the box 2/3, 1; bone: the model has no word for it: 0, 0, 1
    means = {"text": (1 + 0.5 + 0.5) / 4, "text_and_box": (1 + 2 * 2 / 3) / 4, "box": 1.0}
    assert found["samples"] == 3 and found["concepts"] == 4
    assert found["dsc"] == pytest.approx(means, abs=1e-4)
    assert found["datasets"]["set 1"]["dsc"] == pytest.approx({"text": 0.5, "text_and_box": 2 / 3, "box": 1}, abs=1e-4)
    assert [part["concepts"] for part in found["datasets"].values()] == [3, 1]
    assert module.model.encoded == [1, 1, 1]
    assert [set(asked.texts) for asked in module.model.asked[:3]] == [{"liver", "spleen"}] * 2 + [{"visual"}]


def test_two_ranks_find_what_one_does(shards: Path, tmp_path: Path) -> None:
    if torch.cuda.is_initialized():
        pytest.skip("ranks are forked, which CUDA does not allow once it is in use")
    for ranks in (1, 2):
        module = Namer()
        module.weight = torch.nn.Parameter(torch.zeros(1))  # DDP wants one
        score(shards, tmp_path / str(ranks), [SynonymProbe(), BoxGivenProbe()], module, ranks)
    for name in ("synonyms.csv", "synonyms.json", "boxes_given.json"):
        one, two = ((tmp_path / ranks / "evaluation" / "untouched" / name).read_bytes() for ranks in ("1", "2"))
        assert one == two, name


def test_fewer_samples_are_evenly_spread(shards: Path, tmp_path: Path) -> None:
    score(shards, tmp_path, [SynonymProbe(samples=2)])
    assert read_json(tmp_path / "evaluation/untouched/synonyms.json")["samples"] == 2
    with (tmp_path / "evaluation/untouched/synonyms.csv").open() as handle:
        assert {row["key"] for row in csv.DictReader(handle)} == {"s-0"}, "the third has no other name"


def test_where_nothing_has_another_name_that_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with ShardWriter(tmp_path / "test", 50, 2**20) as writer:
        writer.write("s-2", triplet(2).encode())
    write_index(tmp_path / "test")
    score(tmp_path / "test", tmp_path / "run", [SynonymProbe()])
    assert "no concept that was probed has another wording" in capsys.readouterr().out
    found = read_json(tmp_path / "run/evaluation/untouched/synonyms.json")
    assert found["wordings"] == 0 and "dsc" not in found


def test_many_prompts_are_asked_in_turns() -> None:
    model, image = Reader(), torch.from_numpy(triplet(0).image)[None]
    features = model.encode(model.preprocessing.images([image]))
    texts = ["liver", "hepar", "spleen", "jecur"] * 5
    truths = torch.stack([image[0] == LEVELS[text] for text in texts])
    found = ask(model, features, ConceptPrompts(torch.zeros(20, dtype=torch.int64), texts), image, truths)
    assert [len(asked) for asked in model.asked] == [AT_ONCE, AT_ONCE, 4]
    assert [dsc for dsc, _ in found] == pytest.approx([1, 0.8, 0.5, 0] * 5, abs=1e-4)


def test_boxes_hold_whole_pixels() -> None:
    mask = torch.zeros(10, 20, dtype=torch.bool)
    mask[2:5, 6:16] = True
    assert box_of(mask) == pytest.approx((11 / 20, 3.5 / 10, 0.5, 0.3))
    model = Reader()
    boxes = [(0.5, 0.5, 1.0, 1.0)]
    assert model_boxes(model, boxes, torch.zeros(1, 10, 20)).tolist() == [[0.5, 0.5, 1, 1]], "squashed"
    model.preprocessing = Preprocessing(image_size=SIDE)
    assert model_boxes(model, boxes, torch.zeros(1, 10, 20)).tolist() == [[0.5, 0.25, 1, 0.5]], "padded below"


def test_all_of_a_concept_is_its_truth() -> None:
    image = np.zeros((8, 8), np.uint8)
    masks = [np.zeros((8, 8), np.uint8) for _ in range(3)]
    masks[0][0:2], masks[1][4:6], masks[2][0:7] = 1, 1, 1
    parts = tuple(Target.from_mask(mask, "cell", kind="instance") for mask in masks[:2])
    origin = Provenance("s", "p", "v", "CT", "0" * 64)

    def batch_of(*targets: Target) -> TripletBatch:
        one = Triplet("k", image, targets, ("nerve",), origin)
        return collate([Sample(0, one, tuple(range(len(targets))), absent=("nerve",))])

    batch = batch_of(*parts)
    (concept,) = present_concepts(batch, 0)
    assert truth_of(batch, concept).numpy().tolist() == ((masks[0] + masks[1]) > 0).tolist()
    batch = batch_of(*parts, Target.from_mask(masks[2], "cell"))
    (concept,) = present_concepts(batch, 0)
    assert truth_of(batch, concept).numpy().tolist() == (masks[2] > 0).tolist()


def test_mistakes_are_one_line(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="take BoxGivenProbe"):
        score(shards, tmp_path, [BoxJitterProbe()])
    for kind in (SynonymProbe, BoxGivenProbe):
        with pytest.raises(UserError, match=f"{kind.__name__}: samples is 1 or more, not 0"):
            kind(samples=0)
        module = Namer()
        module.wording = None  # type: ignore[assignment]
        with pytest.raises(UserError, match=f"{kind.__name__} asks in words"):
            score(shards, tmp_path, [kind()], module)


def test_the_probes_and_the_evaluation_of_sam3_agree(tmp_path: Path) -> None:
    shape = SAM3Shape(
        width=32, depth=2, heads=2, mlp=64, global_blocks=(1,), window=4, pretrained_size=56,
        text_width=32, text_depth=1, text_heads=2, text_mlp=64, context=8,
        hidden=32, hidden_heads=4, hidden_mlp=64, geometry_layers=1, encoder_layers=1, decoder_layers=2, queries=5,
    )  # fmt: skip
    with ShardWriter(tmp_path / "external-toy", 50, 2**20) as writer:
        for number in range(4):
            writer.write(f"s-{number}", triplet(number).encode())
    write_index(tmp_path / "external-toy")
    torch.manual_seed(0)
    module = SAM3Module(SAM3(shape, 112, weights=None), threshold=0.0)
    module.model._tokenizer = letters
    data = TripletDataModule(test=str(tmp_path / "external-toy"), micro_batch_size=2, evaluated_negatives=2)
    score(tmp_path, tmp_path / "run", [EvaluationRecord(), SynonymProbe(), BoxGivenProbe()], module, data=data)
    folder = tmp_path / "run" / "evaluation" / "untouched-external-toy"
    scores = read_scores(folder / "per_case.csv")
    assert [(one.key, one.term) for one in scores] == [
        ("s-0", "liver"), ("s-0", "spleen"), ("s-1", "spleen"), ("s-2", "bone"),
    ]  # fmt: skip
    by_text = read_json(folder / "boxes_given.json")["dsc"]["text"]
    assert by_text == pytest.approx(np.mean([one.dsc for one in scores]), abs=1e-4)
    answers = read_answers(folder / "presence.csv")
    assert [(one.key, one.term) for one in answers if not one.present] == [(f"s-{n}", "kidney") for n in range(4)]
    assert sum(one.present for one in answers) == 4
    rates = read_json(folder / "presence.json")["groups"][0]
    assert (rates["present"], rates["absent"], rates["found"], rates["false_positives"]) == (4, 4, 1.0, 1.0)
    with (folder / "synonyms.csv").open(newline="") as handle:
        row = next(csv.DictReader(handle))
    assert float(row["canonical_dsc"]) == pytest.approx(scores[0].dsc, abs=1e-4)


def tokens_of(texts: Any) -> tuple[Tensor, Tensor]:
    """Tokens without a vocabulary."""
    rows = [([49406] + [ord(letter) for letter in text[:6]] + [49407] + [0] * 8)[:8] for text in texts]
    tokens = torch.tensor(rows)
    return tokens, tokens != 0


letters: Any = tokens_of
