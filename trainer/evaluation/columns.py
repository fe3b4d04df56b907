"""The columns of a comparison: what each model scored on each object, read from ``per_case.csv`` of either kind.

`trainer validate` and `trainer test` write a table of one model, `trainer evaluate` one of several.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from data_shards.errors import UserError, nearest
from trainer.evaluation import rows as evaluated
from trainer.evaluation.protocol import COPY, TEXT
from trainer.evaluation.tables import label
from trainer.scores import METRICS, UNKNOWN, CaseScore, read_scores, volume_of

TABLE = "per_case.csv"
BEST_FIRST = ("tuned", "untouched")
"""Evaluations of a run, of which the first that there is stands for the run."""
SCORES = ("dsc", "iou", "nsd", "hd95", "dsc_unprompted")
"""What tables of `trainer evaluate` have."""
_HERE = "give one per_case.csv, or the folder of a run or an evaluation that has one"

Place = tuple[str, str, int, str]
"""Which object: set, case, the target's position and, of volumes and videos, the term."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What one model scored on one object.

    Attributes:
        kind: ``2d``, ``3d`` or ``video``; empty in tables of `trainer test`.
        prompt: ``box``, ``point``, ``mask`` or ``text``; empty in tables of `trainer test`.
        way: Whose mask a model went on from: ``model`` is its own; empty for images, words and repeated first masks.
        set: Name of the set; empty in tables of `trainer test`.
        case: Key of the image or volume.
        target: Position of the target in its image; −1 for all of a term in a volume.
        term: Clinical term.
        dataset: Data set of the case.
        modality: Its modality.
        tolerance: Largest distance that NSD forgives, with its unit.
        truth: What else must be alike where two models answered the same object.
        scores: By the metric's name; those that the table has.
        plane: Anatomical plane of the slices; empty where the table does not say.
        extent: True volume or area of the object; None likewise.
        size: Unit of that; empty likewise.
    """

    kind: str
    prompt: str
    way: str
    set: str
    case: str
    target: int
    term: str
    dataset: str
    modality: str
    tolerance: str
    truth: str
    scores: dict[str, float]
    plane: str = ""
    extent: float | None = None
    size: str = ""

    @property
    def place(self) -> Place:
        """Which object this is about."""
        return self.set, self.case, self.target, self.term if self.target < 0 else ""

    @property
    def volume(self) -> tuple[str, str]:
        """The volume that the object is of, within its set; the image itself if its key names no slice."""
        return self.set, self.case if self.kind in ("3d", "video") else volume_of(self.case)


@dataclass(frozen=True)
class Column:
    """One model's answers.

    Attributes:
        name: What the tables call it.
        path: The table that it was read from.
        answers: Its answers; of two about one object asked in one way the later counts.
    """

    name: str
    path: Path
    answers: tuple[Answer, ...]


def read_columns(arguments: Sequence[str]) -> list[Column]:
    """Read ``NAME=PATH``, one model under that name, and ``PATH``, every model of a table under its own.

    Raises:
        UserError: There is no such table, it is damaged or empty, a name is there twice, or the tables are of two
            kinds.
    """
    found: list[Column] = []
    for argument in arguments:
        name, path = _named(argument)
        found += _columns(name, path)
    by_name: dict[str, Column] = {}
    for column in found:
        other = by_name.setdefault(column.name, column)
        if other is not column:
            raise UserError(
                f"two columns are called '{column.name}' ({other.path} and {column.path}): name them, as in "
                f"first={other.path.parent} second={column.path.parent}"
            )
    kinds = {column.answers[0].kind == "": column for column in found}
    if len(kinds) > 1:
        raise UserError(
            f"{kinds[True].path} is of `trainer test` and {kinds[False].path} of `trainer evaluate`: they ask in ways "
            "of their own, so they do not compare; let one of the two score all models"
        )
    return found


def choose(columns: Sequence[Column], names: Sequence[str]) -> list[Column]:
    """Those columns, in that order.

    Raises:
        UserError: There is no such column, or one is named twice.
    """
    known = {column.name: column for column in columns}
    for place, name in enumerate(names):
        if name not in known:
            raise UserError(f"--models: there is no column '{name}'{nearest(name, known)}")
        if name in names[:place]:
            raise UserError(f"--models names '{name}' twice")
    return [known[name] for name in names]


def _named(argument: str) -> tuple[str, Path]:
    """Name and path; what is before the sign is no name if it has a slash, or if all of it is a path."""
    name, sign, path = argument.partition("=")
    if not sign or "/" in name or Path(argument).exists():
        return "", Path(argument)
    if not name.strip() or not path:
        raise UserError(f"'{argument}': expected NAME=PATH; {_HERE}")
    return name.strip(), Path(path)


def _columns(name: str, path: Path) -> list[Column]:
    """The columns of a table, or of a run's evaluations."""
    if path.is_file():
        return _read(name, path, path.parent.name)
    if (path / TABLE).is_file():
        return _read(name, path / TABLE, path.resolve().name)
    if not path.exists():
        raise UserError(f"{path}: there is no such file or folder; {_HERE}")
    tables = {table.parent.name: table for table in sorted(path.glob(f"evaluation/*/{TABLE}"))}
    if not tables:
        raise UserError(f"{path}: it has no {TABLE}; `trainer test -c RECIPE` and `trainer evaluate PROTOCOL` make one")
    if not name:  # untouched stands before tuned, as in time
        order = sorted(tables, key=lambda one: (one != "untouched", one))
        return [column for one in order for column in _read("", tables[one], one)]
    best = next((one for one in BEST_FIRST if one in tables), None)
    if best is None and len(tables) > 1:
        raise UserError(f"{path}: it has the evaluations {', '.join(tables)}: name one, as {path}/evaluation/NAME")
    return _read(name, tables[best or next(iter(tables))], "")


def _read(name: str, path: Path, folder: str) -> list[Column]:
    headings = _headings(path)
    if "key" in headings:
        return [Column(name or folder, path, _filled(path, map(_scored, read_scores(path))))]
    if {"model", "initial", "case"} <= headings:
        return _models(name, path)
    raise UserError(f"{path}: this is no {TABLE} of `trainer test` or `trainer evaluate`: it has no column 'key'")


def _headings(path: Path) -> set[str]:
    try:
        with path.open(newline="", encoding="utf-8") as handle:
            return {*next(csv.reader(handle), [])}
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read ({error}); {_HERE}") from error


def _scored(score: CaseScore) -> Answer:
    """A row of `trainer test`."""
    found = {metric: getattr(score, metric) for metric in METRICS if getattr(score, metric) is not None}
    truth = f"'{score.term}' of {score.area_px} px"
    about = (score.key, score.target, _plain(score.term), _plain(score.dataset), _plain(score.modality))
    return Answer("", "", "", "", *about, score.tolerance, truth, found, "", score.area_px, "px")


def _models(name: str, path: Path) -> list[Column]:
    """A column for each model of a table of `trainer evaluate`; under a name one of them, without its baselines."""
    # prompts that are off have curves of their own, and absent terms nothing to overlap with
    rows = [row for row in evaluated.read(path) if not row.noise and not row.is_absent]
    models = list(dict.fromkeys(row.model for row in rows if row.model != COPY))
    if name and len(models) == 1:  # its own mask is then that of its new name
        old = models[0]
        rows = [
            replace(row, model=name, initial=name if row.initial == old else row.initial)
            for row in rows
            if row.model == old
        ]
    elif name and rows:
        if name not in models:
            raise UserError(
                f"{path}: it has the models {', '.join(models)}, and none is called '{name}': give the path without a "
                "name for all of them"
            )
        rows = [row for row in rows if row.model == name]
    lines: dict[str, list[Answer]] = {}
    for row in rows:
        lines.setdefault(_plain(label((row.model, row.initial))), []).append(_evaluated(row, path))
    if not lines:
        _filled(path, ())
    return [Column(title, path, _filled(path, answers)) for title, answers in lines.items()]


def _evaluated(row: evaluated.Row, path: Path) -> Answer:
    """A row of `trainer evaluate`."""
    values = {metric: getattr(row, metric) for metric in SCORES if metric in evaluated.COLUMNS}
    found = {metric: value for metric, value in values.items() if value is not None}
    if math.isnan(found.get("iou", 0.0)):  # of earlier versions
        del found["iou"]
    for metric, value in found.items():
        if not (math.isfinite(value) or (metric == "hd95" and value == math.inf)):  # infinite where a mask is empty
            raise UserError(f"{path}: {metric} of {row.term} in {row.case} is {value}; run the evaluation again")
    way = "" if row.model == COPY or row.initial == TEXT else "model" if row.initial == row.model else row.initial
    truth = f"'{row.term}' in {row.slices} slices from {row.first}, shown on {row.shown}"
    about = (row.case, row.target, _plain(row.term), _plain(row.dataset), _plain(row.modality))
    more = (_plain(row.plane) if row.plane else "", row.size_true, row.size_unit)
    return Answer(row.kind, row.prompt, way, row.set, *about, row.tolerance, truth, found, *more)


def _plain(value: str) -> str:
    """A value as tables can show it."""
    return "".join(sign if sign.isprintable() else "?" for sign in value) or UNKNOWN


def _filled(path: Path, answers: Iterable[Answer]) -> tuple[Answer, ...]:
    unique = {(answer.kind, answer.prompt, answer.place): answer for answer in answers}
    if not unique:
        raise UserError(f"{path}: it has no rows: nothing was scored; run the evaluation again")
    return tuple(unique.values())
