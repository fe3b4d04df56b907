"""Running a protocol: every model on the same cases, what is done already not again.

Shapes: D slices, H W native height and width.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch

from data_shards.errors import UserError
from data_shards.progress import progress
from data_shards.triplet import Triplet
from trainer.callbacks.panels import to_uint8
from trainer.evaluation.answers import (
    Score,
    answers,
    asked_of,
    dense,
    encoded,
    follow,
    score_image,
    score_sequence,
)
from trainer.evaluation.cases import ImageCase, Part, SequenceCase, ShardStack, Thing, places_of, read_image
from trainer.evaluation.jobs import Job, jobs_of, still_valid
from trainer.evaluation.noise import moved
from trainer.evaluation.protocol import COPY, DIRECT, TRUTH, Kind, Loaded, SetSpec
from trainer.evaluation.rows import Place, Row, Table
from trainer.evaluation.selection import Object, Selected, select
from trainer.evaluation.sources import Models
from trainer.evaluation.words import find, find_in_slices
from trainer.report.panels import Panel, save_panels
from trainer.volumes.asked import Asked


@dataclass
class Evaluation:
    """A protocol that is being run.

    Attributes:
        loaded: The protocol.
        out: Folder of the results.
        models: Its models.
        selected: Its sets.
        jobs: What there is to do.
        table: Rows that count; some may be of cases that this call does not ask for.
        left_aside: How many earlier rows do not count, and why, in words; empty where all do.
    """

    loaded: Loaded
    out: Path
    models: Models
    selected: list[Selected]
    jobs: list[Job]
    table: Table
    left_aside: str = ""
    _known: set[tuple[str, str, str, Place]] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._note(self.table.rows)

    def run(self) -> int:
        """Answer what is not answered yet; returns the number of cases that were computed, over all models."""
        computed = 0
        with progress() as bar:
            for job in self.jobs:
                how = "" if job.initial in ("", job.model) else " by text" if job.in_words else f" from {job.initial}"
                name = f"{job.model}{how} · {job.selected.spec.title} ({job.selected.spec.kind})"
                task = bar.add_task(name, total=job.selected.cases)
                for work in self._work(job):
                    if work is not None:
                        self._add(work())
                        computed += 1
                    bar.advance(task)
        return computed

    def panel(self, job: Job, thing: Object) -> Path:
        """Where the picture of an object is kept."""
        name = hashlib.sha256("\n".join(map(str, thing)).encode()).hexdigest()[:12]
        return self.out / "panels" / f"{job.made_by[0.0]}-{name}.npz"

    def _add(self, rows: list[Row]) -> None:
        new = [row for row in rows if (row.model, row.initial, row.made_by, row.place) not in self._known]
        self.table.add(new)
        self._note(new)

    def _note(self, rows: Sequence[Row]) -> None:
        self._known |= {(row.model, row.initial, row.made_by, row.place) for row in rows}

    def _done(self, job: Job, things: Sequence[Object]) -> bool:
        title = job.selected.spec.title
        marks = job.made_by.values()
        wanted = {(job.model, job.initial, mark, (title, *thing)) for thing in things for mark in marks}
        if job.copied:
            wanted |= {(COPY, job.copy_of, job.copied_by, (title, *thing)) for thing in things}
        shown = [thing for thing in things if thing in job.selected.pictures]
        return wanted <= self._known and all(self.panel(job, thing).is_file() for thing in shown)

    def _work(self, job: Job) -> Iterator[Callable[[], list[Row]] | None]:
        """For each case what computes it; None where that is done."""
        for image in job.selected.images:
            objects = job.selected.in_image(image)
            yield None if self._done(job, objects) else lambda image=image: self._image(job, image)  # type: ignore[misc]
        for case, things in job.selected.sequences:
            objects = [(case.key, thing.term, -1) for thing in things]
            done = self._done(job, objects)
            yield None if done else lambda case=case, things=things: self._sequence(job, case, things)  # type: ignore[misc]

    def _image(self, job: Job, case: ImageCase) -> list[Row]:
        """Answer all targets of an image, or all of its terms."""
        spec, shards = job.selected.spec, job.selected.shards
        triplet, things = shards[case.position], job.selected.in_image(case)
        places = [places_of(triplet.targets, term) if spec.by_term else [place] for _, term, place in things]
        drawn = [[triplet.targets[place].mask() != 0 for place in some] for some in places]
        truths = [np.logical_or.reduce(masks) for masks in drawn]
        if job.in_words:
            module, start = self.models.in_words(job.model), time.perf_counter()
            absent = absent_terms(triplet, spec, case.position)
            things, nothing = [*things, *((case.key, term, -1) for term in absent)], np.zeros(truths[0].shape, bool)
            truths = [*truths, *(nothing for _ in absent)]
            found = find(module, shards, case.position, [term for _, term, _ in things], self.loaded.protocol.precision)
            answered = {0.0: (list(found), (time.perf_counter() - start) / len(things))}
            asked: list[list[Asked]] = [[] for _ in things]
        else:
            asked = [[asked_of(mask, "", 0, spec) for mask in masks] for masks in drawn]
            answered = self._answered(job, case, places, drawn, asked)
        rows = []
        for level, (masks, seconds) in answered.items():
            for thing, truth, mask, some in zip(things, truths, masks, asked, strict=True):
                score = score_image(mask, truth, triplet.provenance.spacing, spec)
                rows.append(_row(job, (case.position, triplet.provenance.axis), thing, score, seconds, level))
                if thing in job.selected.pictures and not level:
                    self._keep(job, thing, to_uint8(read_image(shards, case.position).numpy()), truth, mask, some)
        return rows

    def _answered(
        self,
        job: Job,
        case: ImageCase,
        places: list[list[int]],
        drawn: list[list[np.ndarray]],
        asked: list[list[Asked]],
    ) -> dict[float, tuple[list[np.ndarray], float]]:
        """For each level of noise the masks of an image's objects, and seconds an object; it is encoded once."""
        protocol, model, found = self.loaded.protocol, self.models[job.model], {}
        image = read_image(job.selected.shards, case.position)
        owners = np.repeat(range(len(asked)), list(map(len, asked)))
        start = time.perf_counter()
        features = encoded(model, image, protocol.precision)
        encoding = time.perf_counter() - start
        size = (int(image.shape[1]), int(image.shape[2]))
        terms = job.selected.shards.index.targets(case.position)
        for level in job.made_by:
            flat = [
                moved(one, mask, level, (case.key, terms[place][0], place))
                for some, masks, spots in zip(asked, drawn, places, strict=True)
                for one, mask, place in zip(some, masks, spots, strict=True)
            ]
            start = time.perf_counter()
            parts = answers(model, features, size, flat, protocol.at_once, protocol.precision)
            seconds = (encoding + time.perf_counter() - start) / len(asked)
            found[level] = ([parts[owners == owner].any(0) for owner in range(len(asked))], seconds)
        return found

    def _sequence(self, job: Job, case: SequenceCase, things: Sequence[Thing]) -> list[Row]:
        """Follow all objects of a volume or video; those with the same ends together."""
        stack = ShardStack(job.selected.shards, case.positions, case.key)
        groups: dict[tuple[int, int], list[Thing]] = {}
        for thing in things:
            groups.setdefault((thing.first, thing.last), []).append(thing)
        rows: list[Row] = []
        for (first, last), some in groups.items():
            part = Part(stack, first, last)
            for level in job.made_by:
                rows += self._found(job, part, some) if job.in_words else self._followed(job, part, some, level)
        return rows

    def _found(self, job: Job, part: Part, things: Sequence[Thing]) -> list[Row]:
        """Ask for terms in every slice."""
        module, start = self.models.in_words(job.model), time.perf_counter()
        found = find_in_slices(module, part, [thing.term for thing in things], self.loaded.protocol.precision)
        seconds = (time.perf_counter() - start) / len(things)
        pairs = zip(things, found, strict=True)
        return [self._scored(job, part, thing, dense(slices), seconds) for thing, slices in pairs]

    def _followed(self, job: Job, part: Part, things: Sequence[Thing], level: float) -> list[Row]:
        """Follow objects from the slice on which they are shown."""
        spec, protocol, stack = job.selected.spec, self.loaded.protocol, part.whole
        asked = []
        for thing in things:
            truth = stack.truth(thing.term, thing.shown)
            one = asked_of(truth, thing.term, thing.shown - part.first, spec)
            if job.initial == TRUTH and one.mask is None:
                one = Asked(one.name, one.slice, mask=truth)
            asked.append(moved(one, truth, level, (stack.name, thing.term, -1)))
        model = self.models[job.model]
        initial = None if job.initial in (TRUTH, DIRECT) else self.models[job.initial]
        start = time.perf_counter()
        found = follow(model, part, asked, initial, protocol.at_once, protocol.precision)
        seconds = (time.perf_counter() - start) / len(things)
        rows = []
        for thing, one, slices in zip(things, asked, found, strict=True):
            prediction = dense(slices)
            rows.append(self._scored(job, part, thing, prediction, seconds, level))
            if not level:
                repeated = np.broadcast_to(prediction[one.slice], prediction.shape)
                score = score_sequence(repeated, part.truth(thing.term), part, thing, spec)
                named = (stack.name, thing.term, -1)
                rows.append(_row(job, (stack.positions[0], stack.plane), named, score, 0.0, 0.0, thing, copy=True))
        return rows

    def _scored(
        self, job: Job, part: Part, thing: Thing, prediction: np.ndarray, seconds: float, level: float = 0.0
    ) -> Row:
        """The row of an object in a volume or video, whose picture may be kept."""
        stack, truth = part.whole, part.truth(thing.term)
        named = (stack.name, thing.term, -1)
        if named in job.selected.pictures and not level:
            number = _looked_at(thing)
            key = f"{stack.name}, slice {number} (shown: {thing.shown})"
            place = number - part.first
            self._keep(job, named, to_uint8(stack.image(number).numpy()), truth[place], prediction[place], [], key)
        score = score_sequence(prediction, truth, part, thing, job.selected.spec)
        return _row(job, (stack.positions[0], stack.plane), named, score, seconds, level, thing)

    def _keep(
        self,
        job: Job,
        thing: Object,
        image: np.ndarray,
        truth: np.ndarray,
        mask: np.ndarray,
        asked: Sequence[Asked],
        key: str = "",
    ) -> None:
        """Keep an object as a picture; prompts of another slice are not drawn, nor are several boxes."""
        boxes = [one.box for one in asked if one.box is not None]
        box = np.array(boxes[0] if len(boxes) == 1 else (np.nan,) * 4, np.float32)
        points = np.array([point for one in asked for point in one.points], np.float32).reshape(-1, 3)
        panel = Panel(key or thing[0], thing[1], image, truth.astype(np.uint8), mask.astype(np.uint8), box, points)
        save_panels(self.panel(job, thing), [panel])


def prepare(loaded: Loaded, out: Path, only: Kind | None, limit: int | None, device: torch.device) -> Evaluation:
    """Choose the cases and find out what is left to do; no model is made yet.

    Args:
        loaded: The protocol.
        out: Folder of the results.
        only: Sets of this kind alone.
        limit: Most images, volumes or videos of each set.
        device: Where models compute.

    Raises:
        UserError: A folder, run or recipe is missing, a set has no cases, a model cannot be asked as a set asks, or
            results of something else are in the way.
    """
    protocol, models = loaded.protocol, Models(loaded, device)
    for name in loaded.models:  # what is missing is said before any shard is opened
        models.identity(name)
    specs = [spec for spec in protocol.sets if only in (None, spec.kind)]
    if not specs:
        raise UserError(f"{loaded.path}: it has no set of kind {only}")
    models.check(specs)
    chosen = [select(spec, limit, protocol.pictures, str(loaded.path)) for spec in specs]
    jobs = jobs_of(loaded, models, chosen)
    kept, left_aside = still_valid(loaded, out, jobs)
    return Evaluation(loaded, out, models, chosen, jobs, Table(out / "per_case.csv", kept), left_aside)


def _row(
    job: Job,
    source: tuple[int, str],
    thing: Object,
    score: Score,
    seconds: float,
    level: float,
    place: Thing | None = None,
    copy: bool = False,
) -> Row:
    """One object's row; the source is the position of its image, or of the first slice, and their plane."""
    spec, index = job.selected.spec, job.selected.shards.index
    position, plane = source
    steps = float((index.row_spacing if spec.kind == "2d" else index.slice_spacing)[position])
    return Row(
        model=COPY if copy else job.model,
        initial=job.copy_of if copy else job.initial,
        set=spec.title,
        kind=spec.kind,
        prompt=job.prompt,
        dataset=str(index.datasets[index.dataset[position]]),
        modality=str(index.modalities[index.modality[position]]),
        case=thing[0],
        term=thing[1],
        target=thing[2],
        shown=place.shown if place else -1,
        first=place.first if place else -1,
        slices=place.last - place.first + 1 if place else 1,
        seconds=seconds,
        made_by=job.copied_by if copy else job.made_by[level],
        plane=plane,
        spacing=steps if np.isfinite(steps) else None,
        noise=level,
        **asdict(score),
    )


def absent_terms(triplet: Triplet, spec: SetSpec, position: int) -> list[str]:
    """Terms that were looked for in an image and are not there: as many as a set asks for, by turns."""
    there = {target.term for target in triplet.targets}
    gone = [term for term in triplet.looked_for if term not in there and (spec.terms is None or term in spec.terms)]
    start = position % len(gone) if gone else 0
    return [*gone[start:], *gone[:start]][: spec.negatives]


def _looked_at(thing: Thing) -> int:
    """The slice of a picture: towards the end, where following is hardest, and never the one that was shown."""
    number = thing.first + round(0.75 * (thing.last - thing.first))
    return number if number != thing.shown else thing.last
