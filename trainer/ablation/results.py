"""What came out of an ablation: scores and costs of every cell, and how sure the differences are.

A target is the unit: its scores by several seeds are averaged first, since they are no independent observations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, fields, replace
from pathlib import Path

import numpy as np

from trainer.ablation.cells import FROM_SCRATCH, Cell
from trainer.ablation.running import Standing, evaluation, standing
from trainer.report import curves
from trainer.report.data import bytes_of
from trainer.report.records import Jitter, read_jitter, read_record, read_stages
from trainer.report.statistics import bootstrap_ci95, compare, holm
from trainer.scores import CaseScore, grouped, pair, read_scores, values_of, write_table

METRICS = ("dsc", "nsd")
"""What is reported; IoU is in each run's own tables."""
KINDS = ("all", "dataset", "modality")
"""What targets are grouped by."""
BYTES = 4
"""Of a parameter that learns: checkpoints keep those in fp32."""


@dataclass(frozen=True)
class Result:
    """One cell of one seed.

    Attributes:
        cell: The cell.
        standing: How far it is.
        scores: Of its evaluation; empty until it is finished.
        parameters: Parameters of the model.
        learning: Those that learnt.
        memory_gib: Most memory of the training, in GiB; of tensors on a GPU, or of the whole process on CPUs.
        on_gpu: Which of the two.
        images_per_second: Median over the training without its first logged step.
        fit_seconds: Seconds of the training over all attempts, with its start and its validations.
        checkpoint_bytes: The last checkpoint, from which a training goes on: weights and the optimiser's state.
        jitter: Scores with boxes that are off, where the recipe asks for them.
        hardware: What it ran on.
    """

    cell: Cell
    standing: Standing
    scores: tuple[CaseScore, ...] = ()
    parameters: int = 0
    learning: int = 0
    memory_gib: float | None = None
    on_gpu: bool = False
    images_per_second: float | None = None
    fit_seconds: float | None = None
    checkpoint_bytes: int | None = None
    jitter: Jitter | None = None
    hardware: str = ""


def read_result(cell: Cell) -> Result:
    """Read what a cell has left.

    Raises:
        UserError: A file of it is damaged.
    """
    how, run = standing(cell), cell.run
    result = Result(cell, how, parameters=cell.parameters, learning=cell.learning)
    folder, record = evaluation(cell), read_record(run.record)
    if how.state != "finished" or folder is None:
        return result
    result = replace(
        result,
        scores=read_scores(folder / "per_case.csv"),
        jitter=read_jitter(folder / "jitter.json"),
        parameters=(record.get("model") or {}).get("parameters") or cell.parameters,
        hardware=str(record.get("hardware") or ""),
    )
    if not cell.tuned:
        return result
    logged = curves.read_curves(run.root / "logs")
    return replace(
        result,
        learning=(record.get("model") or {}).get("trainable", cell.learning),
        memory_gib=curves.peak_memory_gib(logged),
        on_gpu=curves.on_gpu(logged),
        images_per_second=curves.images_per_second(logged),
        fit_seconds=read_stages(run.stages).get("fit"),
        checkpoint_bytes=bytes_of(run.newest_checkpoint()),
    )


@dataclass(frozen=True)
class Row:
    """A cell over its seeds.

    Attributes:
        name: The cell.
        results: One for each seed.
    """

    name: str
    results: tuple[Result, ...]

    @property
    def finished(self) -> tuple[Result, ...]:
        """Those that have scores."""
        return tuple(result for result in self.results if result.scores)

    @property
    def tuned(self) -> bool:
        """Whether anything was trained."""
        return self.results[0].cell.tuned

    @property
    def specialist(self) -> bool:
        """Whether its model learns from scratch."""
        return self.results[0].cell.specialist

    @property
    def method(self) -> str:
        """What is done: ``tuned``, ``untouched`` or ``from scratch``."""
        return FROM_SCRATCH if self.specialist else "tuned" if self.tuned else "untouched"

    def of_seed(self, seed: int) -> Result | None:
        """The result of a seed; of a cell that trains nothing, its one result for every seed."""
        return next((one for one in self.finished if one.cell.seed == seed or not self.tuned), None)

    def mean_of(self, name: str) -> float | None:
        """A cost over the finished seeds: the largest memory, the mean of others."""
        values = [value for one in self.finished if (value := getattr(one, name)) is not None]
        if not values:
            return None
        return float(max(values) if name == "memory_gib" else np.mean(values))

    def seed_means(self, metric: str) -> list[float]:
        """Mean score of each finished seed."""
        return [float(values.mean()) for one in self.finished if (values := values_of(one.scores, metric)).size]


@dataclass(frozen=True)
class Entry:
    """One metric of one cell in one group of targets; a row of ``results.csv``.

    Attributes:
        cell: The cell.
        seeds: Seeds that its scores are averaged over.
        kind: ``all``, ``dataset`` or ``modality``.
        group: The group, such as ``CT``.
        metric: One of `METRICS`.
        n: Targets.
        volumes: Volumes that these are in.
        mean: Mean over targets.
        mean_low: Lower end of its bootstrap 95 % interval.
        mean_high: Upper end.
        q1: Lower quartile.
        median: Median.
        q3: Upper quartile.
        pairs: Targets that the reference has scored too, with the same seeds.
        difference: Mean difference from the reference on those.
        difference_low: Lower end of its bootstrap 95 % interval.
        difference_high: Upper end.
        p: Two-sided Wilcoxon signed-rank test on those.
        p_holm: Corrected by Holm over all tests of this kind of group.
    """

    cell: str
    seeds: int
    kind: str
    group: str
    metric: str
    n: int
    volumes: int
    mean: float
    mean_low: float | None
    mean_high: float | None
    q1: float
    median: float
    q3: float
    pairs: int | None = None
    difference: float | None = None
    difference_low: float | None = None
    difference_high: float | None = None
    p: float | None = None
    p_holm: float | None = None


ENTRY_COLUMNS = tuple(column.name for column in fields(Entry))
COST_COLUMNS = (
    *("method", "parameters", "learning", "learning_share", "learning_bytes", "checkpoint_bytes"),
    *("peak_memory_gib", "memory_of", "images_per_second", "fit_seconds"),
)
"""Columns of ``results.csv`` after those of an `Entry`: the cell's costs, repeated in each of its rows."""
RUN_COLUMNS = ("cell", "seed", "state", "reason", "n", "dsc", "nsd", *COST_COLUMNS, "run", "recipe")
"""Columns of ``runs.csv``."""


@dataclass(frozen=True)
class Results:
    """Everything that the tables and the page show.

    Attributes:
        rows: The cells, in the order of the spec.
        entries: Their scores.
        reference: The cell that others are compared with.
    """

    rows: tuple[Row, ...]
    entries: tuple[Entry, ...]
    reference: str

    def entry(self, cell: str, metric: str, kind: str = "all", group: str = "all") -> Entry | None:
        """One of the entries."""
        wanted = (cell, metric, kind, group)
        return next((one for one in self.entries if (one.cell, one.metric, one.kind, one.group) == wanted), None)

    def groups(self, kind: str) -> list[str]:
        """Groups of a kind, in order."""
        return sorted({one.group for one in self.entries if one.kind == kind})

    @property
    def unfinished(self) -> list[Result]:
        """Cells without scores."""
        return [one for row in self.rows for one in row.results if not one.scores]


def collect(cells: Sequence[Cell], reference: str) -> Results:
    """Read and compare all cells.

    Args:
        cells: All of them.
        reference: Name of the one that others are compared with.

    Raises:
        UserError: A file is damaged.
    """
    read = [read_result(cell) for cell in cells]
    names = dict.fromkeys(one.cell.name for one in read)
    rows = {name: Row(name, tuple(one for one in read if one.cell.name == name)) for name in names}
    entries = [one for row in rows.values() for one in _entries(row, rows[reference])]
    return Results(tuple(rows.values()), tuple(_corrected(entries)), reference)


def pooled(results: Sequence[Result]) -> list[CaseScore]:
    """Scores of the targets that all of some results have, averaged over the results."""
    tables = [{(score.key, score.target): score for score in one.scores} for one in results]
    found = []
    for place, first in tables[0].items() if tables else ():
        scores = [table[place] for table in tables if place in table]
        if len(scores) == len(tables):
            nsd = [score.nsd for score in scores]
            found.append(
                replace(
                    first,
                    dsc=float(np.mean([score.dsc for score in scores])),
                    iou=float(np.mean([score.iou for score in scores])),
                    nsd=None if None in nsd else float(np.mean(nsd)),  # type: ignore[arg-type]
                )
            )
    return found


def _entries(row: Row, reference: Row) -> list[Entry]:
    """The scores of a cell in every group."""
    scores = pooled(row.finished)
    shared = _shared(row, reference)
    own, theirs = (grouped(pooled(side)) for side in shared) if shared[0] else ({}, {})
    found = []
    for (kind, group), targets in _groups(scores).items():
        for metric in METRICS:
            values = values_of(targets, metric)
            if not values.size:
                continue
            q1, median, q3 = (float(value) for value in np.percentile(values, [25, 50, 75]))
            low, high = bootstrap_ci95(values) or (None, None)
            volumes = len({(score.dataset, score.volume) for score in targets})
            entry = Entry(
                *(row.name, len(row.finished), kind, group, metric, len(values), volumes),
                *(float(values.mean()), low, high, q1, median, q3),
            )
            before, after = theirs.get((kind, group), []), own.get((kind, group), [])
            found.append(entry if row.name == reference.name else _compared(entry, before, after))
    return found


def _shared(row: Row, reference: Row) -> tuple[list[Result], list[Result]]:
    """Results of the seeds that both cells have finished: only these are compared."""
    trained = row if row.tuned else reference
    seeds = [one.cell.seed for one in trained.finished]
    both = [(row.of_seed(seed), reference.of_seed(seed)) for seed in seeds]
    pairs = [(one, other) for one, other in both if one is not None and other is not None]
    return [one for one, _ in pairs], [other for _, other in pairs]


def _groups(scores: Sequence[CaseScore]) -> dict[tuple[str, str], list[CaseScore]]:
    """All targets, then those of each data set and modality where there are several."""
    groups = {name: targets for name, targets in grouped(scores).items() if name[0] in KINDS}
    counts = {kind: sum(name[0] == kind for name in groups) for kind in KINDS}
    return {name: targets for name, targets in groups.items() if name[0] == "all" or counts[name[0]] > 1}


def _compared(entry: Entry, before: Sequence[CaseScore], after: Sequence[CaseScore]) -> Entry:
    """An entry with its difference from the reference."""
    scored = [(getattr(one, entry.metric), getattr(other, entry.metric)) for one, other in pair(before, after)]
    both = [(one, other) for one, other in scored if one is not None and other is not None]
    if not both:
        return entry
    found = compare(np.array([one for one, _ in both]), np.array([other for _, other in both]))
    low, high = found.gain_ci95 or (None, None)
    return replace(
        entry,
        pairs=found.count,
        difference=found.gain,
        difference_low=low,
        difference_high=high,
        p=found.p_value,
    )


def _corrected(entries: Sequence[Entry]) -> list[Entry]:
    """Entries with p-values corrected over all tests of their kind of group: one table is one family of tests."""
    adjusted: dict[int, float | None] = {}
    for kind in KINDS:
        places = [place for place, one in enumerate(entries) if one.kind == kind]
        adjusted |= dict(zip(places, holm([entries[place].p for place in places]), strict=True))
    return [replace(one, p_holm=adjusted[place]) for place, one in enumerate(entries)]


def costs(row: Row) -> dict[str, object]:
    """What a cell costs, by `COST_COLUMNS`; None where it was not measured."""
    results = row.finished or row.results
    last = results[-1]
    return {
        "method": row.method,
        "parameters": last.parameters,
        "learning": last.learning,
        "learning_share": last.learning / last.parameters if last.parameters and not row.specialist else None,
        "learning_bytes": last.learning * BYTES,
        "checkpoint_bytes": _whole(row.mean_of("checkpoint_bytes")),
        "peak_memory_gib": row.mean_of("memory_gib"),
        "memory_of": ("gpu" if last.on_gpu else "process") if row.mean_of("memory_gib") is not None else "",
        "images_per_second": row.mean_of("images_per_second"),
        "fit_seconds": row.mean_of("fit_seconds"),
    }


def _whole(value: float | None) -> int | None:
    return None if value is None else round(value)


def write_csv(out: Path, results: Results) -> None:
    """Write ``results.csv``, a row for each cell, group and metric, and ``runs.csv``, one for each cell and seed."""
    by_name: Mapping[str, dict[str, object]] = {row.name: costs(row) for row in results.rows}
    lines = [(*astuple(_written(one)), *by_name[one.cell].values()) for one in results.entries]
    write_table(out / "results.csv", (*ENTRY_COLUMNS, *COST_COLUMNS), lines)
    write_table(out / "runs.csv", RUN_COLUMNS, (_run_line(one) for row in results.rows for one in row.results))


def _written(entry: Entry) -> Entry:
    """An entry whose p-values keep their digits: six decimals would make nothing of small ones."""
    p, p_holm = (None if value is None else f"{value:.4g}" for value in (entry.p, entry.p_holm))
    return replace(entry, p=p, p_holm=p_holm)  # type: ignore[arg-type]


def _run_line(result: Result) -> tuple[object, ...]:
    means = [float(values.mean()) if (values := values_of(result.scores, name)).size else None for name in METRICS]
    cell, how = result.cell, result.standing
    return (
        *(cell.name, cell.seed if cell.tuned else "", how.state, how.reason, len(result.scores), *means),
        *costs(Row(cell.name, (result,))).values(),
        *(str(cell.root), str(cell.path)),
    )
