"""Prompts to masks: the same functions as `trainer predict --volume` uses, one slice at a time.

Shapes: N objects, H W native height and width.
"""

from __future__ import annotations

import argparse
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from data_shards.errors import UserError
from trainer.demo.case import Answer, Case, Drawn, Scene, Shown
from trainer.models import SAM3
from trainer.segment.loading import Loaded
from trainer.segment.session import Session
from trainer.segment.texts import Terms, find_terms
from trainer.volumes.asked import Asked, check_asked
from trainer.volumes.propagation import Precision, answer, look, propagate


class Answering:
    """A model that visitors ask, one at a time.

    Args:
        loaded: The model.
        device: Where it computes.
        precision: ``bf16-mixed`` is for GPUs.
        margin: See `propagate`.
        modality: What images are, for a wording that says it.
    """

    def __init__(
        self,
        loaded: Loaded,
        device: torch.device,
        precision: Precision = "32-true",
        margin: int = 0,
        modality: str = "",
    ) -> None:
        self.loaded, self.device, self.precision, self.margin = loaded, device, precision, margin
        self.modality = modality
        self._lock = threading.Lock()

    @property
    def words(self) -> bool:
        """Whether it is asked in words, which is SAM3; else by boxes and points."""
        return isinstance(self.loaded.model, SAM3)

    @property
    def memory(self) -> bool:
        """Whether it follows objects by what it remembers, which is SAM2."""
        return hasattr(self.loaded.model, "look")

    def show(self, case: Case, shown: Shown) -> float:
        """Ask about the active object as it is shown on the slice on show; return the seconds that it took.

        Raises:
            UserError: The prompt does not fit the image.
        """
        number = case.slice
        drawn = case.scene.current.shows(number, shown)
        if not shown:
            case.clear()
            return 0.0
        asked = [drawn.asked(number)]
        check_asked(asked, case.scan, number, number)
        model, started = self.loaded.model, time.perf_counter()
        with self._lock, torch.no_grad():
            features = case.features(number, lambda: look(model, case.scan, number, self.precision))
            masks, scores = answer(model, case.scan, asked, features, self.precision)
        case.change(case.scene.put(drawn.found(number, Answer.of(masks[0], scores[0]))))
        return time.perf_counter() - started

    def find(self, case: Case, term: str, instances: bool = False) -> tuple[int, float]:
        """Find a term on the slice on show; each instance is an object if wanted.

        Returns:
            How many objects were found, and the seconds that it took.

        Raises:
            UserError: The term is empty, or the model is not asked in words.
        """
        started = time.perf_counter()
        names, found = self._terms(case, term, case.slice, instances)
        case.change(_merged(case.scene, names, *found))
        return int(found[1].any(axis=(1, 2)).sum()), time.perf_counter() - started

    def find_all(self, case: Case, term: str, first: int, last: int) -> Iterator[int]:
        """Find a term on slices from first to last, its instances united; yield how many are done."""
        for done, number in enumerate(range(first, last + 1)):
            if case.stopped.is_set():
                return
            with case.lock:
                names, found = self._terms(case, term, number, False)
                if done == 0:
                    case.change(case.scene)  # all of it is undone at once
                case.scene = _merged(case.scene, names, *found)
            yield done + 1

    def follow(self, case: Case, first: int, last: int) -> Iterator[int]:
        """Follow all objects that are shown from their slices through first to last; yield how many slices are done.

        Slices on which an object was shown keep what was answered there.

        Raises:
            UserError: Nothing is shown, or on slices that are not wanted.
        """
        with case.lock:
            asked = self.asked(case)
            if not asked:
                raise UserError("nothing to follow: show an object by a box or a point first")
            slices = propagate(
                self.loaded.model, case.scan, asked, first=first, last=last, margin=self.margin,
                precision=self.precision,
            )  # fmt: skip
            case.change(case.scene)  # all of it is undone at once
        names, done = [one.name for one in asked], 0
        while not case.stopped.is_set():
            with case.lock, self._lock:
                if case.closed:
                    return
                found = next(slices, None)
                if found is None:
                    return
                case.scene = _followed(case.scene, names, *found)
            done += 1
            yield done

    def asked(self, case: Case) -> list[Asked]:
        """The objects that are shown, each on the slice where it was shown last."""
        return [one.asked(one.anchor) for one in case.scene.objects if one.anchor is not None]

    def _terms(
        self, case: Case, term: str, number: int, instances: bool
    ) -> tuple[list[str], tuple[int, np.ndarray, np.ndarray]]:
        term = " ".join(term.split())[:200]
        if not term:
            raise UserError("say in words what to find, such as liver")
        terms = Terms((term,), instances, self.modality)
        terms.check(self.loaded, None)
        values = argparse.Namespace(precision=self.precision)
        session = Session(values, case.scan, self.device, number, number)
        with self._lock, quiet_bar() as bar:
            names, slices = find_terms(session, self.loaded, terms, bar)
            (found,) = slices
        return names, found


def quiet_bar() -> Any:
    """A bar that is not drawn: the page has its own."""
    from rich.progress import Progress

    return Progress(disable=True)


def _merged(scene: Scene, names: Sequence[str], number: int, masks: np.ndarray, scores: np.ndarray) -> Scene:
    """The objects of a term, new ones where there are none of that name; one without anything makes room."""
    for name, mask, score in zip(names, masks, scores, strict=True):
        known = [place for place, one in enumerate(scene.objects) if one.name == name]
        blank = [k for k, one in enumerate(scene.objects) if one.untouched]
        if known:
            place, drawn = known[0], scene.objects[known[0]]
        elif blank:
            place, drawn = blank[0], replace(scene.objects[blank[0]], name=name)
        else:
            place = len(scene.objects)
            drawn = Drawn(name, max(one.colour for one in scene.objects) + 1)
        scene = scene.put(drawn.found(number, Answer.of(mask, score)), place)
    return scene


def _followed(scene: Scene, names: Sequence[str], number: int, masks: np.ndarray, scores: np.ndarray) -> Scene:
    """What was found of objects on a slice; those that were deleted meanwhile are left out."""
    for name, mask, score in zip(names, masks, scores, strict=True):
        for place, one in enumerate(scene.objects):
            if one.name == name and (number not in one.shown or number == one.anchor):
                scene = scene.put(one.found(number, Answer.of(mask, score)), place)
    return scene
