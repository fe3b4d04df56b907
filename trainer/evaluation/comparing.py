"""Models side by side on the objects that all of them answered: medians, quartiles and paired tests.

Shapes: N objects, or volumes where those are counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from data_shards.errors import UserError, counted, nearest
from trainer.evaluation.columns import Answer, Column, Place
from trainer.evaluation.paired import Cell, Test, spread, tested, values_of
from trainer.evaluation.protocol import TEXT
from trainer.evaluation.thirds import thirds
from trainer.report.statistics import holm
from trainer.scores import UNKNOWN

METRICS = {"dsc": "DSC", "iou": "IoU", "nsd": "NSD", "hd95": "HD95", "dsc_unprompted": "DSC, other slices"}
"""Scores that can be compared, and what the tables call them."""
USUAL = ("dsc", "nsd")
"""Those that are compared where none is named."""
GROUPINGS = {
    "dataset": "data set",
    "modality": "modality",
    "term": "term",
    "set": "set",
    "tolerance": "tolerance",
    "plane": "plane",
    "size": "size of the target",
}
"""What rows can be of, and what the tables call it."""
LOWER_IS_BETTER = ("hd95",)
ALL = ("all",)
ALPHA = 0.05
"""Adjusted p below which a difference gets its mark."""
Asking = tuple[str, str, tuple[str, ...]]
"""Kind of the cases, prompt, and whose first masks there are."""


@dataclass(frozen=True)
class Line:
    """A row of a table.

    Attributes:
        metric: The score.
        group: What its objects have in common, one word for each grouping; `ALL` for all.
        objects: Number of objects.
        cases: Number of images or volumes that they are in.
        volumes: Number of volumes that those are of; an image that was cut from none counts itself.
        cells: One for each column.
        tests: One for each pair of columns.
    """

    metric: str
    group: tuple[str, ...]
    objects: int
    cases: int
    volumes: int
    cells: dict[str, Cell]
    tests: list[Test]


@dataclass(frozen=True)
class Table:
    """The cases of one kind that are asked in one way.

    Attributes:
        asking: How they are asked; empty strings where a table does not say.
        sets: Names of the sets.
        columns: Names of the models.
        reference: The column that the others are tested against; None where it answered none of these cases.
        by: What the rows are of.
        each: What counts as one score: ``object`` or ``volume``.
        lines: The rows.
        objects: Number of objects that all columns answered.
        left_out: Number of objects that some columns answered, but not all.
        lacking: How many of these a column lacks.
        absent: Columns that have no such cases at all.
        without: For a metric the number of objects that are left out of it, since a column has no such score.
        tolerances: Distances that NSD forgives.
    """

    asking: Asking
    sets: tuple[str, ...]
    columns: tuple[str, ...]
    reference: str | None
    by: tuple[str, ...]
    each: str
    lines: list[Line]
    objects: int
    left_out: int
    lacking: dict[str, int]
    absent: tuple[str, ...]
    without: dict[str, int]
    tolerances: tuple[str, ...]

    @property
    def metrics(self) -> list[str]:
        """Scores that the table has, in order."""
        return list(dict.fromkeys(line.metric for line in self.lines))

    @property
    def tests(self) -> int:
        """Number of tests that the correction is for."""
        return sum(test.p_value is not None for line in self.lines for test in line.tests)


def compare_columns(
    columns: Sequence[Column],
    reference: str | None = None,
    by: Sequence[str] = ("modality",),
    metrics: Sequence[str] | None = None,
    each: str = "object",
) -> list[Table]:
    """Compare what every column answered; cases of other kinds, or asked in other ways, have a table of their own.

    Args:
        columns: At least two.
        reference: Name of the column that the others are tested against; by default the first of each table.
        by: What the rows are of; `GROUPINGS` has them.
        metrics: Scores to compare; by default `USUAL`, as far as all columns have them.
        each: ``object``, or ``volume`` for the mean of each volume's objects, since those are not independent.

    Raises:
        UserError: There is no such column, the columns have no object in common, their truths differ, or one lacks a
            score.
    """
    names = [column.name for column in columns]
    if len(names) < 2:
        raise UserError(f"one model alone ({', '.join(names)}): name another NAME=PATH to compare it with")
    for name in by:
        if not any(getattr(answer, name) for column in columns for answer in column.answers):
            raise UserError(f"--by {name}: {columns[0].path} does not say it; its rows have dataset, modality and term")
    if reference is not None and reference not in names:
        raise UserError(f"--reference: there is no column '{reference}'{nearest(reference, names)}")
    tables = [_table(names, *section, reference, tuple(by), metrics, each) for section in _sections(columns).items()]
    if not any(table.objects for table in tables):
        raise UserError(_nothing_common(columns))
    for metric in metrics or ():
        if not any(metric in table.metrics for table in tables):
            raise UserError(f"--metric {metric}: no table has it: {columns[0].path} has {_scores_of(columns[0])}")
    return tables


def _sections(columns: Sequence[Column]) -> dict[Asking, dict[str, dict[Place, Answer]]]:
    """Answers by how their set was asked and by column, in the order of the tables; sets asked alike are together.

    Who was asked by text stands beside who was shown the same terms, since a prompt is all that tells them apart.
    """
    prompts: dict[tuple[str, str, bool], set[str]] = {}
    for answer in (answer for column in columns for answer in column.answers):
        prompts.setdefault((answer.kind, answer.set, answer.target < 0), set()).add(answer.prompt)

    def prompt_of(answer: Answer) -> str:
        every = prompts[answer.kind, answer.set, answer.target < 0]
        return " or ".join(sorted(every)) if TEXT in every else answer.prompt

    ways: dict[tuple[str, str, str], set[str]] = {}
    for answer in (answer for column in columns for answer in column.answers):
        ways.setdefault((answer.kind, prompt_of(answer), answer.set), set()).add(answer.way)
    found: dict[Asking, dict[str, dict[Place, Answer]]] = {}
    for column in columns:
        for answer in column.answers:
            prompt = prompt_of(answer)
            way = tuple(sorted(ways[answer.kind, prompt, answer.set] - {""}))
            section = found.setdefault((answer.kind, prompt, way), {})
            section.setdefault(column.name, {})[answer.place] = answer
    return found


def _check_truth(aligned: dict[str, list[Answer]]) -> None:
    """Refuse objects that are called alike, and are not the same.

    Raises:
        UserError: Term, size or slices of an object differ.
    """
    for first, one, name, other in _beside_the_first(aligned):
        if one.truth != other.truth:
            raise UserError(
                f"not the same cases: target {one.target} of {one.case} is {one.truth} in {first}, and "
                f"{other.truth} in {name}; score both on the same shards"
            )


def _beside_the_first(aligned: dict[str, list[Answer]]) -> Iterator[tuple[str, Answer, str, Answer]]:
    """Each answer of the first column beside those of the others: both names, both answers."""
    (first, theirs), *others = aligned.items()
    for name, mine in others:
        for one, other in zip(theirs, mine, strict=True):
            yield first, one, name, other


def _table(
    names: Sequence[str],
    asking: Asking,
    answers: dict[str, dict[Place, Answer]],
    reference: str | None,
    by: tuple[str, ...],
    metrics: Sequence[str] | None,
    each: str,
) -> Table:
    every = set().union(*answers.values())
    common = sorted(every.intersection(*answers.values())) if len(answers) > 1 else []
    aligned = {name: [mine[place] for place in common] for name, mine in answers.items()}
    _check_truth(aligned)
    default = next(iter(answers))
    against = default if reference is None else reference if reference in answers else None
    lines, without = _lines(aligned, against, by, metrics, each)
    first = next(iter(aligned.values()))
    return Table(
        asking=asking,
        sets=tuple(dict.fromkeys(place[0] for place in sorted(every) if place[0])),
        columns=tuple(answers),
        reference=against,
        by=by,
        each=each,
        lines=_marked(lines, against),
        objects=len(common),
        left_out=len(every) - len(common),
        lacking={name: len(every) - len(mine) for name, mine in answers.items() if len(mine) < len(every)},
        absent=tuple(name for name in names if name not in answers),
        without=without,
        tolerances=tuple(sorted({answer.tolerance for answer in first if answer.tolerance})),
    )


def _lines(
    aligned: dict[str, list[Answer]],
    reference: str | None,
    by: tuple[str, ...],
    metrics: Sequence[str] | None,
    each: str,
) -> tuple[list[Line], dict[str, int]]:
    """The rows without marks, and how many objects each metric leaves out."""
    lines: list[Line] = []
    without: dict[str, int] = {}
    count = len(next(iter(aligned.values())))
    for metric in metrics or USUAL:
        having = {name: {n for n, one in enumerate(mine) if metric in one.scores} for name, mine in aligned.items()}
        lacking = [name for name, places in having.items() if not places]
        if metrics and lacking and len(lacking) < len(having):
            raise UserError(f"--metric {metric}: {lacking[0]} has no such score: leave it out, or score that again")
        places = sorted(set.intersection(*having.values()))
        if places:
            chosen = {name: [mine[place] for place in places] for name, mine in aligned.items()}
            if metric == "nsd":
                _check_tolerances(chosen)
            lines += [_line(metric, group, part, reference, each) for group, part in _groups(chosen, by)]
        if len(places) < count:
            without[metric] = count - len(places)
    return lines, without


def _check_tolerances(aligned: dict[str, list[Answer]]) -> None:
    for first, one, name, other in _beside_the_first(aligned):
        if one.tolerance != other.tolerance:
            raise UserError(
                f"NSD of {first} forgives {one.tolerance or 'an unknown distance'}, that of {name} "
                f"{other.tolerance or 'an unknown distance'}: score both alike, or leave it out: --metric dsc"
            )


def _groups(
    aligned: dict[str, list[Answer]], by: Sequence[str]
) -> Iterable[tuple[tuple[str, ...], dict[str, list[Answer]]]]:
    """The rows' objects: one row for each group that there is, then one for all if there are several."""
    places: dict[tuple[str, ...], list[int]] = {}
    beside = list(zip(*aligned.values(), strict=True))
    sizes = thirds([_size(answers) for answers in beside]) if "size" in by else {}
    third = {place: name for name, some in sizes.items() for place in some}
    for place, answers in enumerate(beside):
        words = (third.get(place, UNKNOWN) if name == "size" else _known(answers, name) for name in by)
        places.setdefault(tuple(words), []).append(place)
    rank = {name: number for number, name in enumerate(sizes)}  # sizes rise, other words go by the alphabet
    for group in sorted(places, key=lambda words: [(rank.get(word, -1), word) for word in words]):
        yield group, {name: [mine[place] for place in places[group]] for name, mine in aligned.items()}
    if len(places) > 1:
        yield ALL, aligned


def _size(answers: Sequence[Answer]) -> tuple[float | None, str]:
    """How large an object is, by the first table that says it: those of earlier versions do not."""
    return next(((one.extent, one.size) for one in answers if one.extent is not None), (None, ""))


def _known(answers: Sequence[Answer], name: str) -> str:
    """What an object belongs to, by the first table that says it: those of earlier versions lack the data set."""
    found = [getattr(answer, name) for answer in answers]
    return next((value for value in found if value not in ("", UNKNOWN)), UNKNOWN)


def _line(
    metric: str, group: tuple[str, ...], aligned: dict[str, list[Answer]], reference: str | None, each: str
) -> Line:
    answers = next(iter(aligned.values()))
    values = {name: values_of(mine, metric, each) for name, mine in aligned.items()}
    cells = {name: spread(mine) for name, mine in values.items()}
    others = [name for name in values if name != reference]
    pairs = [(name, reference) for name in others if reference is not None]
    pairs += [(later, earlier) for earlier, later in combinations(others, 2)]
    tests = [tested(column, against, values) for column, against in pairs]
    cases = len({(answer.set, answer.case) for answer in answers})
    return Line(metric, group, len(answers), cases, len({answer.volume for answer in answers}), cells, tests)


def _marked(lines: Sequence[Line], reference: str | None) -> list[Line]:
    """The rows with adjusted p-values and marks."""
    adjusted = iter(holm([test.p_value for line in lines for test in line.tests]))
    marked = []
    for line in lines:
        tests = [replace(test, p_holm=next(adjusted)) for test in line.tests]
        beaten = _beaten(tests, line.metric)
        cells = {
            name: replace(cell, star=reference in beaten[name], dagger=beaten[name] >= line.cells.keys() - {name})
            for name, cell in line.cells.items()
        }
        marked.append(replace(line, cells=cells, tests=tests))
    return marked


def _beaten(tests: Sequence[Test], metric: str) -> dict[str, set[str]]:
    """For each column those that it is significantly better than."""
    found: dict[str, set[str]] = {name: set() for test in tests for name in (test.column, test.against)}
    for test in tests:
        if test.p_holm is not None and test.p_holm < ALPHA:
            higher = (test.effect > 0) != (metric in LOWER_IS_BETTER)
            better, worse = (test.column, test.against) if higher else (test.against, test.column)
            found[better].add(worse)
    return found


def _scores_of(column: Column) -> str:
    return ", ".join(metric for metric in METRICS if any(metric in answer.scores for answer in column.answers))


def _nothing_common(columns: Sequence[Column]) -> str:
    """Why there is no table."""
    sizes = [f"{column.name} has {counted(len(column.answers), 'object')}" for column in columns]
    sets = [", ".join(dict.fromkeys(answer.set for answer in column.answers)) for column in columns]
    named = f" (their sets are called {' and '.join(dict.fromkeys(sets))})" if len({*sets}) > 1 else ""
    return f"no object was answered by all: {'; '.join(sizes)}{named}; score them on the same split"
