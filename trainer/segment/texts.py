"""Terms instead of prompts: SAM3 is asked for each of them in each slice.

Shapes: N objects, M instances in a slice, H W native height and width.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from pycocotools import mask as coco_mask
from rich.progress import Progress

from data_shards.batch import TripletBatch
from data_shards.errors import UserError
from data_shards.triplet import Provenance
from trainer.callbacks.volumes import LINKED, VolumeRecord
from trainer.modules.sam3 import SAM3Module
from trainer.segment.loading import Loaded
from trainer.segment.session import Session
from trainer.volumes.asked import check_limits
from trainer.volumes.linking import SliceObjects, distinct, link
from trainer.volumes.propagation import Found

UNITED = "slice-wise, a term's instances united"
"""How masks were made of answers, as a record says it, beside `LINKED`."""
LINKING = VolumeRecord().linking
"""How instances become objects: as in `trainer predict -c RECIPE`, where its recipe says nothing else."""


@dataclass(frozen=True)
class Terms:
    """What is asked for.

    Attributes:
        names: The terms, each once.
        instances: Whether each instance is an object of its own; else all of a term are one.
        modality: What images are, for a wording that says it; empty where it is not known.
    """

    names: tuple[str, ...]
    instances: bool
    modality: str

    @classmethod
    def of(cls, values: argparse.Namespace) -> Terms | None:
        """What ``--text`` asks for; None where it is not given.

        Raises:
            UserError: A term is empty or there twice, the threshold is none, or an option of it comes without it.
        """
        names = tuple(text.strip() for text in values.text)
        if not names:
            if values.instances or values.threshold is not None or values.modality:
                raise UserError("--instances, --threshold and --modality belong to --text: name what to find")
            return None
        if not all(names):
            raise UserError("--text: a term is empty: name what to find")
        twice = [name for place, name in enumerate(names) if name in names[:place]]
        if twice:
            raise UserError(f"--text {twice[0]}: is given twice: leave one out")
        if values.threshold is not None and not 0 <= values.threshold <= 1:
            raise UserError(f"--threshold {values.threshold:g}: a confidence is in 0 to 1")
        return cls(names, values.instances, values.modality or "")

    def check(self, loaded: Loaded, threshold: float | None) -> None:
        """See that a model understands words, and set its threshold where one is given.

        Raises:
            UserError: It does not.
        """
        module = loaded.module
        if not isinstance(module, SAM3Module):
            raise UserError(
                f"--text asks in words, which only SAM3 understands, not {type(loaded.model).__name__}: show objects "
                "by boxes, points or masks"
            )
        _ = module.model.tokenizer  # read now: not when the first volume has been opened
        if threshold is not None:
            module.threshold = threshold

    def describe(self, loaded: Loaded) -> dict[str, Any]:
        """What is asked, and what becomes of the answers, as JSON."""
        module = loaded.module
        assert isinstance(module, SAM3Module)
        return {
            "method": LINKED if self.instances else UNITED,
            "prompts": [{"text": name} for name in self.names],
            "wording": module.wording.describe(),
            "modality": self.modality,
            "threshold": module.threshold,
            "linking": asdict(LINKING) if self.instances else None,
        }


def add_text_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of what is asked in words."""
    texts = parser.add_argument_group("what is asked for in words (SAM3)")
    texts.add_argument(
        "--text", action="append", default=[], metavar="TERM", help="find this in each slice; may be given repeatedly"
    )
    texts.add_argument(
        "--threshold", type=float, metavar="P", help="confidence from which an answer counts (default: the recipe's)"
    )
    texts.add_argument(
        "--instances", action="store_true",
        help="each instance is an object of its own, linked through the slices by overlap (default: all of a term "
        "are one)",
    )  # fmt: skip
    texts.add_argument("--modality", metavar="CT", help="what the images are, where the run's wording says it")


def find_terms(
    session: Session, loaded: Loaded, terms: Terms, bar: Progress | None = None
) -> tuple[list[str], Iterator[Found]]:
    """Ask for terms in all slices that are wanted.

    Args:
        session: The volume.
        loaded: SAM3; see `Terms.check`.
        terms: What is asked for.
        bar: Where the slices are counted; one of its own by default.

    Returns:
        Names of the N objects, and for each slice its number, masks (N, H, W) bool and confidences (N,). A term of
        which nothing is found is an object that is nowhere.

    Raises:
        UserError: The slices that are wanted are not there.
    """
    check_limits(session.scan, session.first, session.last)
    started = time.perf_counter()
    slices: dict[str, list[SliceObjects]] = {name: [] for name in terms.names}
    for number in session.counted(range(session.first, session.last + 1), bar):
        for name, found in _answers(session, loaded, terms, number).items():
            slices[name].append(found)
    names: list[str] = []
    rows: dict[str, tuple[int, list[np.ndarray]]] = {}
    for name, some in slices.items():
        numbers = _numbered(some, terms.instances)
        count = max((int(one.max(initial=0)) for one in numbers), default=0)
        rows[name] = (len(names), numbers)
        names += [f"{name} {k}" for k in range(1, count + 1)] if terms.instances and count else [name]
    session.seconds = time.perf_counter() - started
    return names, _painted(session, slices, rows, len(names))


@torch.no_grad()
def _answers(session: Session, loaded: Loaded, terms: Terms, number: int) -> dict[str, SliceObjects]:
    """The instances of each term in one slice."""
    module, scan = loaded.module, session.scan
    assert isinstance(module, SAM3Module)
    origin = Provenance(
        "", "", "", terms.modality, "", axis="" if scan.flat else scan.axis, slice_index=None if scan.flat else number
    )
    batch = TripletBatch(
        images=[scan.image(number)],
        masks=[],
        image_index=torch.zeros(0, dtype=torch.int64),
        boxes=torch.zeros(0, 4),
        terms=[],
        keys=[str(number)],
        positions=[number],
        target_index=[],
        provenances=[origin],
    )
    mixed = session.values.precision == "bf16-mixed"
    with torch.autocast(session.device.type, torch.bfloat16) if mixed else nullcontext():
        found = module.instances(batch, [terms.names])
    return {
        one.term: SliceObjects.encoded(number, one.masks.cpu().numpy(), one.confidences.float().cpu().numpy())
        for one in found
    }


def _numbered(slices: list[SliceObjects], instances: bool) -> list[np.ndarray]:
    """For each slice (M,) numbers of the objects that its instances belong to, from 1; 0 is left out."""
    if not instances:
        return [np.ones(len(found.rles), np.int64) for found in slices]
    kept = [distinct(found, LINKING.same) for found in slices]
    linked = link(
        [found.subset(places) for found, places in zip(slices, kept, strict=True)],
        LINKING.least_overlap,
        LINKING.gap,
        LINKING.min_slices,
    )
    numbered = []
    for found, places, numbers in zip(slices, kept, linked, strict=True):
        every = np.zeros(len(found.rles), np.int64)
        every[places] = numbers
        numbered.append(every)
    return numbered


def _painted(
    session: Session,
    slices: Mapping[str, Sequence[SliceObjects]],
    rows: Mapping[str, tuple[int, Sequence[np.ndarray]]],
    count: int,
) -> Iterator[Found]:
    """Masks and confidences of all objects, slice by slice; an object's confidence is its most confident instance's."""
    for place, number in enumerate(range(session.first, session.last + 1)):
        masks, scores = np.zeros((count, *session.scan.size), bool), np.zeros(count, np.float32)
        for name, (first, numbers) in rows.items():
            found = slices[name][place]
            for rle, object_number, score in zip(found.rles, numbers[place], found.confidences, strict=True):
                if object_number:
                    row = first + int(object_number) - 1
                    masks[row] |= coco_mask.decode(rle).astype(bool)
                    scores[row] = max(scores[row], float(score))
        yield number, masks, scores
