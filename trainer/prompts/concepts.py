"""Concepts: what a text-prompted model is asked, once for each term of each image.

Shapes: P prompts, B images, N box exemplars a prompt, K point exemplars a prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from data_shards.batch import TripletBatch
from data_shards.seed import run_seed, stream
from data_shards.vocabulary import synonyms
from trainer.prompts.base import bucket_of


@dataclass(frozen=True)
class Concept:
    """A term that is asked about in one image of a batch.

    Attributes:
        image: Place of the image in the batch.
        term: Clinical term.
        rows: Which of the batch's targets are instances of it; none where the term was looked for and is absent.
        whole: Which of the batch's targets is all of it in one mask; None where the union of `rows` is.
        synonyms: Other names of it.
        modality: Modality of the image; empty where it is not known.
        plane: Anatomical plane of the slice; empty for a plain image.
        draw: What randomness may depend on: (position of the image in its corpus, number of the concept in the image),
            and where the image was drawn before in the epoch the number of the repeat.
    """

    image: int
    term: str
    rows: tuple[int, ...]
    whole: int | None
    synonyms: tuple[str, ...]
    modality: str
    plane: str
    draw: tuple[int, ...]


def concepts_of(batch: TripletBatch) -> list[Concept]:
    """The concepts of a batch: each term of an image once, what is there before what is absent.

    A term with instances is asked for as these, and its semantic mask, if there is one, is all of it; a term that has
    only semantic masks is asked for as one instance.
    """
    terms: dict[tuple[int, str], list[int]] = {}
    for row, (image, term) in enumerate(zip(batch.image_index.tolist(), batch.terms, strict=True)):
        terms.setdefault((image, term), []).append(row)
    for image, term in zip(batch.absent_index.tolist(), batch.absent_terms, strict=True):
        terms.setdefault((image, term), [])
    numbers = [0] * len(batch)
    found = []
    for (image, term), rows in sorted(terms.items(), key=lambda item: (item[0][0], not item[1])):
        instances = [row for row in rows if batch.kinds and batch.kinds[row] == "instance"]
        wholes = [row for row in rows if row not in instances]
        given = batch.synonyms[rows[0]] if rows and batch.synonyms else synonyms(term, ())
        origin = batch.provenances[image]
        repeat = batch.repeats[image] if batch.repeats else 0
        draw = (batch.positions[image], numbers[image], *([repeat] if repeat else []))
        numbers[image] += 1
        found.append(
            Concept(
                image=image,
                term=term,
                rows=tuple(instances or wholes),
                whole=wholes[0] if len(wholes) == 1 else None,
                synonyms=given,
                modality=origin.modality,
                plane=origin.axis,
                draw=draw,
            )
        )
    return found


def drawn_terms(concepts: Sequence[Concept], count: int | None, epoch: int) -> list[Concept]:
    """Draw some of the terms that each image shows; absent ones stay.

    Args:
        concepts: The concepts of a batch.
        count: How many of an image's terms are wanted; None is all.
        epoch: The epoch: what is drawn is a pure function of it, the run's seed and the sample.
    """
    if count is None:
        return list(concepts)
    kept: set[int] = set()
    for image in {concept.image for concept in concepts}:
        shown = [place for place, concept in enumerate(concepts) if concept.image == image and concept.rows]
        if len(shown) > count:
            draw = concepts[shown[0]].draw
            generator = stream(run_seed(None), "terms", epoch, draw[0], *draw[2:])
            shown = [shown[place] for place in generator.choice(len(shown), size=count, replace=False)]
        kept.update(shown)
    return [concept for place, concept in enumerate(concepts) if place in kept or not concept.rows]


@dataclass(frozen=True)
class ConceptPrompts:
    """What a text-prompted model is asked.

    Attributes:
        image_index: (P,) int64, the image in the batch that each prompt asks about.
        texts: P texts.
        boxes: (P, N, 4) exemplars as (cx, cy, w, h), shares of the input's side; None is text alone.
        box_labels: (P, N) int64, 1 where a box shows the concept, 0 where it shows something else, −1 for padding.
        points: (P, K, 2) exemplars as (x, y), shares of the input's side; None is none.
        point_labels: (P, K) int64, as `box_labels`.
    """

    image_index: Tensor
    texts: Sequence[str]
    boxes: Tensor | None = None
    box_labels: Tensor | None = None
    points: Tensor | None = None
    point_labels: Tensor | None = None

    def __len__(self) -> int:
        return len(self.texts)

    def to(self, device: torch.device | str) -> ConceptPrompts:
        """Move the tensors, without waiting for it."""
        return replace(self, **{name: value.to(device, non_blocking=True) for name, value in self._tensors.items()})

    def padded(self) -> ConceptPrompts:
        """So many that few numbers occur (`bucket_of`): the first is asked again, at the end."""
        more = bucket_of(len(self)) - len(self)
        if not more:
            return self
        longer = {name: torch.cat([v, v[:1].expand(more, *v.shape[1:])]) for name, v in self._tensors.items()}
        return replace(self, texts=[*self.texts, *[self.texts[0]] * more], **longer)

    @property
    def _tensors(self) -> dict[str, Any]:
        names = ("image_index", "boxes", "box_labels", "points", "point_labels")
        return {name: value for name in names if (value := getattr(self, name)) is not None}
