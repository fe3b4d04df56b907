"""What a text-prompted model makes of other words for the same thing, and of a box beside the text or in its place.

Shapes: P prompts, H W native height and width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from data_shards.batch import TripletBatch
from data_shards.errors import UserError
from trainer.callbacks.probes import SampleProbe
from trainer.metrics import overlap
from trainer.models import SegmentationModel
from trainer.prompts.concepts import Concept, ConceptPrompts, concepts_of
from trainer.prompts.exemplars import ALONE
from trainer.prompts.wording import Wording
from trainer.run import write_json
from trainer.scores import UNKNOWN, write_table

WORSE = 0.05
"""Loss of DSC from which a wording counts as worse, as a target does in the record of validations."""
AT_ONCE = 8
"""Prompts decoded together: each takes features of its own."""
WORST = 10
"""Wordings that ``synonyms.json`` names."""


@dataclass(frozen=True)
class SaidInOtherWords:
    """What came of the wordings of one concept in one image.

    Attributes:
        key: Sample key.
        term: Clinical term.
        canonical: What came of the text that an evaluation asks.
        others: What came of every other one.
    """

    key: str
    term: str
    canonical: Asked
    others: tuple[Asked, ...]


@dataclass(frozen=True)
class Asked:
    """What came of one wording.

    Attributes:
        text: What was asked.
        dsc: DSC of the most confident answer, at native resolution.
        confidence: Its confidence.
    """

    text: str
    dsc: float
    confidence: float


def ask(
    model: SegmentationModel, features: Any, prompts: ConceptPrompts, image: Tensor, truths: Tensor
) -> list[tuple[float, float]]:
    """Ask about one image and score the most confident answers.

    Args:
        model: The model.
        features: Its features of the image.
        prompts: What is asked, P times about image 0.
        image: (C, H, W) at native size.
        truths: (P, H, W) bool on the model's device.

    Returns:
        For each prompt DSC at native resolution, and the confidence.
    """
    found: list[tuple[float, float]] = []
    for start in range(0, len(prompts), AT_ONCE):
        part = _part(prompts, slice(start, start + AT_ONCE))
        logits, confidences = model.decode(features, part)
        masks = model.preprocessing.to_native(logits[:, 0], *image.shape[-2:]) > 0
        dsc, _ = overlap(masks, truths[start : start + AT_ONCE])
        found += zip(dsc.tolist(), confidences[:, 0].float().tolist(), strict=True)
    return found


def _part(prompts: ConceptPrompts, rows: slice) -> ConceptPrompts:
    boxes, labels = (None if tensor is None else tensor[rows] for tensor in (prompts.boxes, prompts.box_labels))
    return ConceptPrompts(prompts.image_index[rows], prompts.texts[rows], boxes, labels)


def present_concepts(batch: TripletBatch, image: int) -> list[Concept]:
    """The concepts of a batch that are in one image."""
    return [concept for concept in concepts_of(batch) if concept.image == image and concept.rows]


def truth_of(batch: TripletBatch, concept: Concept) -> Tensor:
    """All of a concept in one mask: (H, W) bool."""
    rows = concept.rows if concept.whole is None else (concept.whole,)
    return torch.stack([batch.masks[row] != 0 for row in rows]).any(dim=0)


def box_of(mask: Tensor) -> tuple[float, float, float, float]:
    """Tight box of a mask (H, W) with something in it: (cx, cy, w, h) as shares of its sides, whole pixels inside."""
    height, width = mask.shape
    rows, columns = mask.any(dim=1).nonzero()[:, 0], mask.any(dim=0).nonzero()[:, 0]
    top, bottom, left, right = (int(edge) for edge in (rows[0], rows[-1] + 1, columns[0], columns[-1] + 1))
    return (left + right) / 2 / width, (top + bottom) / 2 / height, (right - left) / width, (bottom - top) / height


class SynonymProbe(SampleProbe[SaidInOtherWords]):
    """Asks for concepts of ``trainer test`` in every other wording that is known of them, into ``synonyms.json``.

    Each image is encoded once. ``synonyms.csv`` has a row for each wording of each sample. What a concept may be called
    besides its canonical term is the module's `wording` to say.

    Args:
        samples: How many samples are probed, evenly spread over the split, with all of their concepts.
    """

    def __init__(self, samples: int = 64) -> None:
        _check(self, samples)
        super().__init__(samples)

    def probe(
        self, module: LightningModule, batch: TripletBatch, image: int
    ) -> dict[tuple[int, int], SaidInOtherWords]:
        """What came of each wording of each concept in one image."""
        model, wording = _of_text(self, module)
        concepts = present_concepts(batch, image)
        if not concepts:
            return {}
        said = [[text, *wording.others(c)] for text, c in zip(wording.say(concepts, None), concepts, strict=True)]
        texts = [text for some in said for text in some]
        features = model.encode(model.preprocessing.images([batch.images[image]], module.device))
        pairs = zip(concepts, said, strict=True)
        truths = torch.stack([truth_of(batch, concept) for concept, some in pairs for _ in some])
        prompts = ConceptPrompts(torch.zeros(len(texts), dtype=torch.int64, device=module.device), texts)
        answers = ask(model, features, prompts, batch.images[image], truths.to(module.device))
        asked = iter([Asked(text, *answer) for text, answer in zip(texts, answers, strict=True)])
        found = {}
        for concept, some in zip(concepts, said, strict=True):
            canonical, *others = (next(asked) for _ in some)
            place = concept.draw[0], concept.draw[1]
            found[place] = SaidInOtherWords(batch.keys[image], concept.term, canonical, tuple(others))
        return found

    def record(self, folder: Path, found: dict[tuple[int, int], SaidInOtherWords]) -> None:
        """Write the table and what it comes to."""
        rows = [
            (one.key, one.term, other.text, other.dsc, other.confidence, one.canonical.dsc)
            for one in found.values()
            for other in one.others
        ]
        write_table(folder / "synonyms.csv", ("key", "term", "wording", "dsc", "confidence", "canonical_dsc"), rows)
        counts = {"samples": len({position for position, _ in found}), "concepts": len(found), "wordings": len(rows)}
        write_json(folder / "synonyms.json", {**counts, "worse": WORSE, **_summary(rows)})
        if not rows:
            print("SynonymProbe: no concept that was probed has another wording")


def _summary(rows: Sequence[tuple[str, str, str, float, float, float]]) -> dict[str, Any]:
    """Means over all wordings of all samples, and the wordings that lose most; nothing where there is none."""
    if not rows:
        return {}
    lost: dict[tuple[str, str], list[float]] = {}
    for _, term, wording, dsc, _, canonical in rows:
        lost.setdefault((term, wording), []).append(canonical - dsc)
    means = {name: float(np.mean(values)) for name, values in lost.items()}
    ranked = sorted(means, key=lambda name: (-means[name], name))[:WORST]
    drops = np.array([row[5] - row[3] for row in rows])
    return {
        "dsc": {
            "canonical": round(float(np.mean([row[5] for row in rows])), 6),
            "others": round(float(np.mean([row[3] for row in rows])), 6),
        },
        "drop": round(float(drops.mean()), 6),
        "share_worse": round(float((drops > WORSE).mean()), 6),
        "worst": [
            {"term": term, "wording": wording, "n": len(lost[term, wording]), "drop": round(means[term, wording], 6)}
            for term, wording in ranked
        ],
    }


@dataclass(frozen=True)
class BoxGiven:
    """DSC of one concept in one image, asked in three ways.

    Attributes:
        dataset: Data set of the image.
        text: By its canonical term alone.
        text_and_box: By its term, with the true tight box as an exemplar.
        box: By that box alone.
    """

    dataset: str
    text: float
    text_and_box: float
    box: float


class BoxGivenProbe(SampleProbe[BoxGiven]):
    """Asks for concepts of ``trainer test`` by text, by text and box, and by box, into ``boxes_given.json``.

    Where a box helps much, a model knows the thing when it is shown, and not the word for it (the diagnosis of Medical
    SAM3). The box is the tight one around all of the concept in the image. Where it stands alone, the text is
    ``visual``, as in the official code. Each image is encoded once.

    Args:
        samples: How many samples are probed, evenly spread over the split, with all of their concepts.
    """

    def __init__(self, samples: int = 64) -> None:
        _check(self, samples)
        super().__init__(samples)

    def probe(self, module: LightningModule, batch: TripletBatch, image: int) -> dict[tuple[int, int], BoxGiven]:
        """DSC of each concept in one image, asked in three ways."""
        model, wording = _of_text(self, module)
        concepts = present_concepts(batch, image)
        if not concepts:
            return {}
        features = model.encode(model.preprocessing.images([batch.images[image]], module.device))
        truths = torch.stack([truth_of(batch, concept) for concept in concepts])
        boxes = model_boxes(model, [box_of(truth) for truth in truths], batch.images[image]).to(module.device)
        index = torch.zeros(len(concepts), dtype=torch.int64, device=module.device)
        labels = torch.ones(len(concepts), 1, dtype=torch.int64, device=module.device)
        text = ConceptPrompts(index, wording.say(concepts, None))
        both = replace(text, boxes=boxes[:, None], box_labels=labels)
        ways = (text, both, replace(both, texts=[ALONE] * len(concepts)))
        masks = truths.to(module.device)
        scores = [[dsc for dsc, _ in ask(model, features, way, batch.images[image], masks)] for way in ways]
        dataset = batch.provenances[image].dataset
        return {
            (concept.draw[0], concept.draw[1]): BoxGiven(dataset, *found)
            for concept, *found in zip(concepts, *scores, strict=True)
        }

    def record(self, folder: Path, found: dict[tuple[int, int], BoxGiven]) -> None:
        """Write the means."""
        rows = list(found.values())
        parts: dict[str, list[BoxGiven]] = {}
        for row in rows:
            parts.setdefault(row.dataset or UNKNOWN, []).append(row)
        samples = len({position for position, _ in found})
        datasets = {name: _means(parts[name]) for name in sorted(parts)}
        write_json(folder / "boxes_given.json", {"samples": samples, **_means(rows), "datasets": datasets})


def model_boxes(model: SegmentationModel, boxes: Sequence[tuple[float, float, float, float]], image: Tensor) -> Tensor:
    """Boxes (N, 4) as (cx, cy, w, h), from shares of an image (C, H, W) to shares of the model's input."""
    side = model.preprocessing.image_size
    height, width = model.preprocessing.input_size(*image.shape[-2:])
    return torch.tensor(boxes) * torch.tensor([width / side, height / side] * 2)


def _means(rows: Sequence[BoxGiven]) -> dict[str, Any]:
    means = {name: np.mean([getattr(row, name) for row in rows]) for name in ("text", "text_and_box", "box")}
    return {"concepts": len(rows), "dsc": {name: round(float(value), 6) for name, value in means.items()}}


def _check(probe: SampleProbe[Any], samples: int) -> None:
    if samples < 1:
        raise UserError(f"{type(probe).__name__}: samples is 1 or more, not {samples}")


def _of_text(probe: SampleProbe[Any], module: LightningModule) -> tuple[SegmentationModel, Wording]:
    """The model and its words.

    Raises:
        UserError: It takes none.
    """
    model, wording = getattr(module, "model", None), getattr(module, "wording", None)
    if not isinstance(model, SegmentationModel) or wording is None:
        raise UserError(
            f"trainer.callbacks: {type(probe).__name__} asks in words, and this model takes none: leave it out"
        )
    return model, wording
