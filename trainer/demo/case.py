"""One visitor's image, with the objects that were shown on it and the masks that a model found.

Shapes: D slices, H W native height and width.
"""

from __future__ import annotations

import re
import shutil
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from data_shards.errors import UserError
from trainer.demo.uploads import Upload
from trainer.volumes.asked import Asked
from trainer.volumes.scan import Scan, open_scan
from trainer.volumes.scan_intensity import parse_intensity

Box = tuple[float, float, float, float]
Point = tuple[float, float, int]
_STEPS = 50
"""That can be undone."""
_SEEN = 4
"""Slices whose features are kept, so that a second prompt on one is quick."""
_MOST_OBJECTS = 64


@dataclass(frozen=True)
class Shown:
    """How an object is shown on a slice: see `Asked`."""

    box: Box | None = None
    points: tuple[Point, ...] = ()

    def __bool__(self) -> bool:
        return self.box is not None or bool(self.points)


@dataclass(frozen=True)
class Answer:
    """What a model found on a slice: a mask as COCO run lengths, and its own estimate of it."""

    rle: dict[str, Any]
    score: float

    @classmethod
    def of(cls, mask: np.ndarray, score: float) -> Answer:
        """From a mask (H, W) bool."""
        return cls(coco_mask.encode(np.asfortranarray(mask.astype(np.uint8))), float(score))

    @property
    def mask(self) -> np.ndarray:
        """(H, W) bool."""
        mask: np.ndarray = coco_mask.decode(self.rle).astype(bool)
        return mask

    @property
    def area(self) -> int:
        """Pixels."""
        return int(coco_mask.area(self.rle))


@dataclass(frozen=True)
class Drawn:
    """One object.

    Attributes:
        name: What it is called.
        colour: Number of its colour.
        shown: How it is shown, by slice.
        answers: What was found, by slice.
        anchor: The slice on which it was shown last: it is followed from there.
    """

    name: str
    colour: int
    shown: Mapping[int, Shown] = field(default_factory=dict)
    answers: Mapping[int, Answer] = field(default_factory=dict)
    anchor: int | None = None

    @property
    def voxels(self) -> int:
        """In all slices."""
        return sum(answer.area for answer in self.answers.values())

    @property
    def untouched(self) -> bool:
        """Whether it is as it was made: nothing shown, nothing found, no name of the visitor's."""
        return not self.answers and not self.shown and re.fullmatch(r"object \d+", self.name) is not None

    def asked(self, number: int) -> Asked:
        """As it is shown on a slice."""
        shown = self.shown[number]
        return Asked(self.name, number, shown.box, shown.points)

    def shows(self, number: int, shown: Shown) -> Drawn:
        """The same, shown otherwise on a slice; where nothing is shown any more, nothing is found."""
        others = {key: one for key, one in self.shown.items() if key != number}
        answers = self.answers if shown else {key: one for key, one in self.answers.items() if key != number}
        anchor = number if shown else max(others, default=None)
        return replace(self, shown={**others, number: shown} if shown else others, answers=answers, anchor=anchor)

    def found(self, number: int, answer: Answer) -> Drawn:
        """The same with another mask on a slice; an empty one is none."""
        others = {key: one for key, one in self.answers.items() if key != number}
        return replace(self, answers={**others, number: answer} if answer.area else others)


@dataclass(frozen=True)
class Scene:
    """All objects, and which of them prompts belong to."""

    objects: tuple[Drawn, ...] = (Drawn("object 1", 0),)
    active: int = 0

    def put(self, drawn: Drawn, place: int | None = None) -> Scene:
        """The same with another state of one object, by default the active one."""
        place = self.active if place is None else place
        return replace(self, objects=(*self.objects[:place], drawn, *self.objects[place + 1 :]))

    @property
    def current(self) -> Drawn:
        """The active object."""
        return self.objects[self.active]


class Case:
    """An opened image; close it.

    Args:
        upload: What to open.
        folder: The visitor's own, removed with the case; None for an image that is not theirs.
        intensity: See `open_scan`.
        fill: See `open_scan`.
        check: Called with the number of voxels; raises if they are too many.

    Attributes:
        scan: The image.
        name: What the visitor calls it.
        slice: The one on show.
        scene: The objects.
        lock: Held by whoever reads the scan or changes the scene.
        stopped: Set to end what is being computed.
        notes: What the visitor should be told, one line each.
        score: What a model's estimate of a mask is called.

    Raises:
        UserError: It cannot be read.
    """

    score = "predicted IoU"

    def __init__(
        self,
        upload: Upload,
        folder: Path | None,
        intensity: str | None = None,
        fill: float | None = None,
        check: Callable[[int], None] | None = None,
    ) -> None:
        self.folder, self.name = folder, upload.name
        self.scan: Scan = open_scan(upload.path, intensity=intensity, reader_options=upload.reader, fill=fill)
        self.notes = (*upload.notes, *self.scan.notes)
        self.slice, self.scene = len(self.scan) // 2, Scene()
        self.lock, self.stopped = threading.RLock(), threading.Event()
        self.closed = False
        self._own = Path(tempfile.mkdtemp(prefix="sam-trainer-demo-"))
        self._past: list[Scene] = []
        self._seen: OrderedDict[int, Any] = OrderedDict()
        if check is not None:
            try:
                check(len(self.scan) * self.scan.size[0] * self.scan.size[1])
            except BaseException:
                self.close()
                raise

    @property
    def spacing(self) -> tuple[float, float, float] | None:
        """Millimetres between slices, rows and columns, where they are known."""
        return None if self.scan.flat else self.scan.spacing

    @property
    def hounsfield(self) -> bool:
        """Whether windows make sense: values of more than 8 bits, in grey."""
        values = self.scan.raw(self.slice)
        return values.ndim == 2 and values.dtype != np.uint8 and not self.scan.flat

    def window(self, intensity: str | None) -> None:
        """Show the image, to visitor and model, by another intensity rule; masks stay.

        Raises:
            UserError: It is no rule.
        """
        with self.lock:
            rule = parse_intensity(intensity)
            notes = self.scan.notes
            self.scan.fit(rule)
            self.scan.notes = notes
            self._seen.clear()

    def features(self, number: int, see: Callable[[], Any]) -> Any:
        """What a model has seen on a slice, looked at once while it is among the last few."""
        if number not in self._seen:
            self._seen[number] = see()
        self._seen.move_to_end(number)
        while len(self._seen) > _SEEN:
            self._seen.popitem(last=False)
        return self._seen[number]

    def change(self, scene: Scene) -> None:
        """Take another state, which can be undone."""
        self._past = [*self._past[-_STEPS + 1 :], self.scene]
        self.scene = scene

    def undo(self) -> bool:
        """Take the state before; False where there is none."""
        if self._past:
            self.scene = self._past.pop()
            return True
        return False

    def add(self, name: str = "") -> None:
        """Begin another object."""
        objects = self.scene.objects
        if len(objects) >= _MOST_OBJECTS:
            raise UserError(f"there are {len(objects)} objects already: delete one")
        name = self._free(name or f"object {len(objects) + 1}")
        colour = max(one.colour for one in objects) + 1 if objects else 0
        self.change(Scene((*objects, Drawn(name, colour)), len(objects)))

    def rename(self, place: int, name: str) -> None:
        """Call an object something else.

        Raises:
            UserError: The name is empty or taken.
        """
        name = re.sub(r"\s+", " ", name).strip()[:64]
        if not name:
            raise UserError("an object needs a name")
        if any(one.name == name for k, one in enumerate(self.scene.objects) if k != place):
            raise UserError(f"two objects cannot both be called '{name}'")
        self.change(self.scene.put(replace(self.scene.objects[self._at(place)], name=name), place))

    def activate(self, place: int) -> None:
        """Let prompts belong to another object."""
        self.scene = replace(self.scene, active=self._at(place))

    def remove(self, place: int) -> None:
        """Delete an object; one is always there."""
        place = self._at(place)
        left = (*self.scene.objects[:place], *self.scene.objects[place + 1 :])
        if not left:
            left = (Drawn("object 1", 0),)
        active = self.scene.active - (self.scene.active >= place and self.scene.active > 0)
        self.change(Scene(left, min(active, len(left) - 1)))

    def clear(self) -> None:
        """Take the prompts and the mask of the active object from the slice on show."""
        drawn = self.scene.current.shows(self.slice, Shown())
        self.change(self.scene.put(drawn.found(self.slice, Answer.of(np.zeros(self.scan.size, bool), 0.0))))

    def filled(self) -> list[int]:
        """Slices with any mask, ascending."""
        return sorted({number for one in self.scene.objects for number in one.answers})

    def masks(self, number: int) -> np.ndarray:
        """Masks (N, H, W) bool of all objects on a slice."""
        blank = np.zeros(self.scan.size, bool)
        answers = [one.answers.get(number) for one in self.scene.objects]
        return np.stack([blank if answer is None else answer.mask for answer in answers])

    def scratch(self) -> Path:
        """An empty folder, removed with the case."""
        return Path(tempfile.mkdtemp(dir=self._own))

    def close(self) -> None:
        """Let go of files and memory; what is being computed ends."""
        self.stopped.set()
        with self.lock:
            if not self.closed:
                self.closed = True
                self.scan.close()
                self._seen.clear()
                for folder in (self.folder, self._own):
                    if folder is not None:
                        shutil.rmtree(folder, ignore_errors=True)

    def _at(self, place: int) -> int:
        if not 0 <= place < len(self.scene.objects):
            raise UserError("this object is no longer there")
        return place

    def _free(self, name: str) -> str:
        """A name that no object has yet."""
        taken, number, found = {one.name for one in self.scene.objects}, 1, name
        while found in taken:
            number += 1
            found = f"{name} ({number})" if not name.startswith("object ") else f"object {number}"
        return found
