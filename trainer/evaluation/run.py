"""Running a protocol: every model on the same cases, what is done already not again.

Shapes: D slices, H W native height and width.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from data_shards.dataset import ShardDataset
from data_shards.errors import UserError
from data_shards.progress import progress
from trainer.callbacks.panels import to_uint8
from trainer.evaluation.answers import Score, answer_image, asked_of, dense, follow, score_image, score_sequence
from trainer.evaluation.cases import (
    ImageCase,
    Part,
    SequenceCase,
    ShardStack,
    Thing,
    evenly,
    image_cases,
    read_image,
    sequence_cases,
    things_of,
)
from trainer.evaluation.protocol import COPY, DIRECT, OWN, TRUTH, Kind, Loaded, SetSpec, fingerprint
from trainer.evaluation.rows import Place, Row, Table, read
from trainer.evaluation.sources import Models, computed_by
from trainer.evaluation.text import left_aside_note
from trainer.report.panels import Panel, save_panels
from trainer.volumes.asked import Asked

Object = tuple[str, str, int]
"""Case, term, and position of the target in its image (−1 in a volume)."""


@dataclass(frozen=True)
class Selected:
    """The cases of a set that are evaluated.

    Attributes:
        spec: The set.
        shards: Its folder.
        images: Its images, of a set of images.
        sequences: Its volumes or videos, each with the objects that are followed.
        pictures: Objects that are kept as pictures.
        left_out: Objects that cannot be followed, as (case, term).
    """

    spec: SetSpec
    shards: ShardDataset
    images: list[ImageCase]
    sequences: list[tuple[SequenceCase, list[Thing]]]
    pictures: list[Object]
    left_out: list[tuple[str, str]]

    @property
    def cases(self) -> int:
        """Number of images, volumes or videos."""
        return len(self.images) + len(self.sequences)

    @property
    def objects(self) -> set[Object]:
        """What is asked for in these cases."""
        found = {(case.key, thing.term, -1) for case, things in self.sequences for thing in things}
        return found | {one for image in self.images for one in self.in_image(image)}

    def in_image(self, image: ImageCase) -> list[Object]:
        """What is asked for in an image."""
        targets = self.shards.index.targets(image.position)
        return [(image.key, targets[place][0], place) for place in image.targets]


@dataclass(frozen=True)
class Job:
    """One model on one set, with one kind of first mask.

    Attributes:
        selected: The set.
        model: Name of the model.
        initial: Who makes the first mask, by name; empty for images.
        made_by: Stands for all that the answers depend on; behind the dash for the versions that compute them.
        copied_by: The same for the baseline, which depends on the first mask alone.
    """

    selected: Selected
    model: str
    initial: str
    made_by: str
    copied_by: str

    @property
    def copy_of(self) -> str:
        """Whose first mask the baseline repeats."""
        return f"{DIRECT} to {self.model}" if self.initial == DIRECT else self.initial


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
                how = f" from {job.initial}" if job.initial not in ("", job.model) else ""
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
        return self.out / "panels" / f"{job.made_by}-{name}.npz"

    def _add(self, rows: list[Row]) -> None:
        new = [row for row in rows if (row.model, row.initial, row.made_by, row.place) not in self._known]
        self.table.add(new)
        self._note(new)

    def _note(self, rows: Sequence[Row]) -> None:
        self._known |= {(row.model, row.initial, row.made_by, row.place) for row in rows}

    def _done(self, job: Job, things: Sequence[Object]) -> bool:
        title = job.selected.spec.title
        wanted = {(job.model, job.initial, job.made_by, (title, *thing)) for thing in things}
        if job.initial:
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
        """Answer all targets of an image."""
        spec, shards, protocol = job.selected.spec, job.selected.shards, self.loaded.protocol
        triplet, image = shards[case.position], read_image(shards, case.position)
        targets = [triplet.targets[place] for place in case.targets]
        truths = [target.mask() != 0 for target in targets]
        asked = [asked_of(truth, str(row), 0, spec) for row, truth in enumerate(truths)]
        model = self.models[job.model]
        start = time.perf_counter()
        masks = answer_image(model, image, asked, protocol.at_once, protocol.precision)
        seconds = (time.perf_counter() - start) / len(targets)
        rows = []
        for place, target, truth, mask, one in zip(case.targets, targets, truths, masks, asked, strict=True):
            score = score_image(mask, truth, triplet.provenance.spacing, spec)
            thing = (case.key, target.term, place)
            rows.append(_row(job, case.position, thing, score, seconds, job.made_by))
            if thing in job.selected.pictures:
                self._keep(job, thing, to_uint8(image.numpy()), truth, mask, one, case.key)
        return rows

    def _sequence(self, job: Job, case: SequenceCase, things: Sequence[Thing]) -> list[Row]:
        """Follow all objects of a volume or video; those with the same ends together."""
        stack = ShardStack(job.selected.shards, case.positions, case.key)
        groups: dict[tuple[int, int], list[Thing]] = {}
        for thing in things:
            groups.setdefault((thing.first, thing.last), []).append(thing)
        rows: list[Row] = []
        for (first, last), some in groups.items():
            rows += self._followed(job, Part(stack, first, last), some)
        return rows

    def _followed(self, job: Job, part: Part, things: Sequence[Thing]) -> list[Row]:
        spec, protocol, stack = job.selected.spec, self.loaded.protocol, part.whole
        asked = []
        for thing in things:
            one = asked_of(stack.truth(thing.term, thing.shown), thing.term, thing.shown - part.first, spec)
            if job.initial == TRUTH and one.mask is None:
                one = Asked(one.name, one.slice, mask=stack.truth(thing.term, thing.shown))
            asked.append(one)
        model = self.models[job.model]
        initial = None if job.initial in (TRUTH, DIRECT) else self.models[job.initial]
        start = time.perf_counter()
        found = follow(model, part, asked, initial, protocol.at_once, protocol.precision)
        seconds = (time.perf_counter() - start) / len(things)
        rows = []
        for thing, one, slices in zip(things, asked, found, strict=True):
            prediction, truth = dense(slices), part.truth(thing.term)
            named = (stack.name, thing.term, -1)
            score = score_sequence(prediction, truth, part, thing, spec)
            rows.append(_row(job, stack.positions[0], named, score, seconds, job.made_by, thing))
            repeated = np.broadcast_to(prediction[one.slice], prediction.shape)
            score = score_sequence(repeated, truth, part, thing, spec)
            rows.append(_row(job, stack.positions[0], named, score, 0.0, job.copied_by, thing, COPY))
            if named in job.selected.pictures:
                number = _looked_at(thing)
                image = to_uint8(stack.image(number).numpy())
                key = f"{stack.name}, slice {number} (shown: {thing.shown})"
                place = number - part.first
                self._keep(job, named, image, truth[place], prediction[place], Asked(thing.term, number), key)
        return rows

    def _keep(
        self, job: Job, thing: Object, image: np.ndarray, truth: np.ndarray, mask: np.ndarray, one: Asked, key: str
    ) -> None:
        """Keep an object as a picture; prompts of another slice are not drawn."""
        box = np.array(one.box or (np.nan,) * 4, np.float32)
        points = np.array(one.points, np.float32).reshape(-1, 3)
        panel = Panel(key, thing[1], image, truth.astype(np.uint8), mask.astype(np.uint8), box, points)
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
        UserError: A folder, run or recipe is missing, a set has no cases, or results of something else are in the way.
    """
    protocol, models = loaded.protocol, Models(loaded, device)
    identities = {name: models.identity(name) for name in loaded.models}
    specs = [spec for spec in protocol.sets if only in (None, spec.kind)]
    if not specs:
        raise UserError(f"{loaded.path}: it has no set of kind {only}")
    chosen = [_selected(spec, limit, protocol.pictures, str(loaded.path)) for spec in specs]
    jobs: dict[tuple[str, str, str, str], Job] = {}
    for one in chosen:
        for model in loaded.models:
            for initial in one.spec.initials:
                name = model if initial == OWN else initial
                place = (one.spec.title, one.spec.kind, model, name)
                jobs.setdefault(place, _job(one, model, name, identities, protocol.precision))
    kept, left_aside = _still_valid(loaded, out, list(jobs.values()))
    return Evaluation(loaded, out, models, chosen, list(jobs.values()), Table(out / "per_case.csv", kept), left_aside)


def _selected(spec: SetSpec, limit: int | None, pictures: int, where: str) -> Selected:
    limits = [bound for bound in (spec.limit, limit) if bound is not None]
    most = min(limits) if limits else None
    try:
        shards = ShardDataset(spec.folder)
        if spec.kind == "2d":
            images = image_cases(shards.index, spec.terms, most)
            found = Selected(spec, shards, images, [], [], [])
            return replace(found, pictures=[found.in_image(image)[0] for image in evenly(images, pictures)])
        sequences, left_out = [], []
        for case in sequence_cases(shards.index, spec.terms, most):
            things, without = things_of(case, spec.kind, spec.extent == "volume")
            left_out += [(case.key, term) for term in without]
            if things:
                sequences.append((case, things))
    except UserError as error:
        raise UserError(f"{where}: set '{spec.title}': {error}") from None
    if not sequences:
        raise UserError(
            f"{where}: set '{spec.title}': every object of it is in one slice alone, so there is nothing to follow: "
            "kind 2d takes these, or set extent to volume"
        )
    followed = [(case.key, thing.term, -1) for case, things in sequences for thing in things]
    return Selected(spec, shards, [], sequences, evenly(followed, pictures), left_out)


def _job(selected: Selected, model: str, initial: str, identities: dict[str, dict[str, object]], precision: str) -> Job:
    """A job, with what its answers depend on; titles, limits and terms only say which cases are asked for."""
    spec = selected.spec
    asked = {
        "scores": ["dsc", "iou", "nsd", "hd95"],  # rows of an earlier version lack some
        "index": selected.shards.index.sha256,
        **{name: getattr(spec, name) for name in ("kind", "prompt", "margin", "extent", "tolerance", "unit")},
        "precision": precision,
    }
    first = identities.get(model if initial == DIRECT else initial, {})
    with_them = fingerprint(computed_by())
    return Job(
        selected,
        model,
        initial,
        made_by=f"{fingerprint(asked, identities[model], first, {'direct': initial == DIRECT})}-{with_them}",
        copied_by=f"{fingerprint(asked, COPY, first, {'direct': initial == DIRECT})}-{with_them}",
    )


def _still_valid(loaded: Loaded, out: Path, jobs: Sequence[Job]) -> tuple[list[Row], str]:
    """Rows of an earlier evaluation that this protocol would make again, and why others are left aside."""
    known: dict[tuple[str, ...], str] = {}
    for job in jobs:
        place = (job.selected.spec.title, job.selected.spec.kind)
        known[job.model, job.initial, *place] = job.made_by
        known[COPY, job.copy_of, *place] = job.copied_by
    here = {(job.selected.spec.title, job.selected.spec.kind) for job in jobs}
    others = {(spec.title, spec.kind) for spec in loaded.protocol.sets} - here
    names = {*loaded.models, COPY}
    kept, older, changed, unasked = [], 0, 0, 0
    for row in read(out / "per_case.csv"):
        mine = known.get((row.model, row.initial, row.set, row.kind), "")
        # sets that this call leaves out, with --only, are checked when their turn comes
        if mine == row.made_by or ((row.set, row.kind) in others and row.model in names):
            kept.append(row)
        elif not mine:
            unasked += 1
        elif mine.partition("-")[0] == row.made_by.partition("-")[0]:
            older += 1
        else:
            changed += 1
    return kept, left_aside_note(older, changed, unasked)


def _row(
    job: Job,
    position: int,
    thing: Object,
    score: Score,
    seconds: float,
    made_by: str,
    place: Thing | None = None,
    model: str = "",
) -> Row:
    spec, index = job.selected.spec, job.selected.shards.index
    return Row(
        model=model or job.model,
        initial=job.copy_of if model else job.initial,
        set=spec.title,
        kind=spec.kind,
        prompt=spec.prompt,
        dataset=str(index.datasets[index.dataset[position]]),
        modality=str(index.modalities[index.modality[position]]),
        case=thing[0],
        term=thing[1],
        target=thing[2],
        shown=place.shown if place else -1,
        first=place.first if place else -1,
        slices=place.last - place.first + 1 if place else 1,
        dsc=score.dsc,
        iou=score.iou,
        nsd=score.nsd,
        hd95=score.hd95,
        dsc_unprompted=score.dsc_unprompted,
        tolerance=score.tolerance,
        seconds=seconds,
        made_by=made_by,
    )


def _looked_at(thing: Thing) -> int:
    """The slice of a picture: towards the end, where following is hardest, and never the one that was shown."""
    number = thing.first + round(0.75 * (thing.last - thing.first))
    return number if number != thing.shown else thing.last
