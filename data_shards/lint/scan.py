"""Reads every sample once, in one process or several; what is found does not depend on their number.

A task leaves its rows and findings in files: they cross processes as plain arrays and JSON.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from data_shards import workers
from data_shards.dataset import ShardDataset
from data_shards.errors import UserError, counted
from data_shards.lint.findings import DAMAGED, MISSING, NO_INDEX, OLD_INDEX, UNREADABLE, Finding, Problem
from data_shards.lint.sample import ROW, Sample
from data_shards.lint.survey import Part
from data_shards.lint.table import CHECKS
from data_shards.progress import progress
from data_shards.stores.base import Found, shard_problem
from data_shards.workers import Report as Advance

_CHUNK = 2048
"""Samples of the largest task."""

Add = Callable[[Finding], None]


def open_split(name: str, folder: Path, add: Add) -> ShardDataset | None:
    """Open a split; None, and a finding, where its index cannot be read."""
    try:
        dataset = ShardDataset(folder, check=False)
    except UserError as error:
        add(NO_INDEX.finding(str(error), split=name))
        return None
    if dataset.index.is_old:
        message = f"volumes and spacings were not checked: run `data-shards index {folder}`"
        add(OLD_INDEX.finding(message, split=name))
    return dataset


def present(name: str, dataset: ShardDataset, numbers: np.ndarray, add: Add) -> np.ndarray:
    """Return those of some samples whose shard is there; each shard that is missing or of another size is a finding."""
    index = dataset.index
    there = np.array([(dataset.folder / str(shard)).is_file() for shard in index.shard_names])
    for shard in np.flatnonzero(~there).tolist():
        count = int((index.shard == shard).sum())
        what = counted(count, "sample")
        message = f"{index.shard_names[shard]} is missing, with {what}: copy it again, or build the corpus again"
        add(MISSING.finding(message, split=name, value=float(count)))
    for shard in np.flatnonzero(there).tolist():
        found = Found(True, (dataset.folder / str(index.shard_names[shard])).stat().st_size)
        problem = shard_problem(str(index.shard_names[shard]), found, int(index.shard_sizes[shard]))
        if problem:
            add(DAMAGED.finding(problem, split=name, value=float(found.size or 0)))
    return numbers[there[index.shard[numbers]]]


def scan(
    datasets: dict[str, ShardDataset], numbers: dict[str, np.ndarray], ignore: tuple[str, ...], count: int, add: Add
) -> tuple[list[Part], np.ndarray]:
    """Look at samples, one by one.

    Args:
        datasets: The splits.
        numbers: The samples to look at, in ascending order.
        ignore: Codes of the checks that are not run.
        count: Worker processes.
        add: Called with each finding, in the order of the samples.

    Returns:
        The splits, and what was kept of the samples that could be read: (N,) of type `ROW`, split after split.
    """
    total = sum(map(len, numbers.values()))
    size = max(1, min(_CHUNK, -(-total // (4 * max(1, count)))))
    with TemporaryDirectory(prefix="data-shards-lint-") as place:
        tasks: list[tuple[str, str, np.ndarray, tuple[str, ...], str]] = []
        for name, dataset in datasets.items():
            for start in range(0, len(numbers[name]), size):
                file = str(Path(place) / f"{len(tasks)}")
                tasks.append((name, str(dataset.folder), numbers[name][start : start + size], ignore, file))
        with progress() as bar:
            task = bar.add_task("lint", total=total)
            arguments = [values[1:] for values in tasks]
            workers.run(_look, arguments, count, lambda _, done, __: bar.update(task, completed=done))
        _open.cache_clear()
        parts, rows, filled = [], np.zeros(total, ROW), 0  # one array for all: there may be millions
        for name, dataset in datasets.items():
            read = [np.zeros(0, np.int64)]
            for file in (values[-1] for values in tasks if values[0] == name):
                numbers_read, kept = _collect(name, dataset, file, add)
                rows[filled : filled + len(kept)] = kept
                filled += len(kept)
                read.append(numbers_read)
            parts.append(Part(name, dataset, np.concatenate(read)))
    return parts, rows[:filled]


def look(sample: Sample, ignore: tuple[str, ...] = ()) -> list[tuple[str, Problem]]:
    """Run every check of one sample; return what they say, with their codes."""
    found = []
    for check in CHECKS.values():
        if check.scope == "sample" and check.code not in ignore and check.find is not None:
            found += [(check.code, problem) for problem in check.find(sample)]
    return found


def _look(folder: str, numbers: np.ndarray, ignore: tuple[str, ...], file: str, advance: Advance) -> None:
    """Look at some samples of a split, and write what is kept of them."""
    dataset = _open(folder)
    rows, read = np.zeros(len(numbers), ROW), np.ones(len(numbers), bool)
    lines = []
    for place, number in enumerate(numbers.tolist()):
        try:
            sample = Sample(dataset[number])
        except UserError as error:
            read[place] = False
            lines.append((number, UNREADABLE.code, *Problem(str(error).partition(": run `")[0])))
        else:
            rows[place] = sample.row()
            for code, problem in look(sample, ignore):
                term = problem.term or (sample.triplet.targets[problem.target].term if problem.target >= 0 else "")
                lines.append((number, code, *problem._replace(term=term)))
        advance(place + 1, 0)
    np.save(f"{file}.numbers.npy", numbers[read])
    np.save(f"{file}.rows.npy", rows[read])
    Path(f"{file}.json").write_text(json.dumps(lines), encoding="utf-8")


@lru_cache(maxsize=8)
def _open(folder: str) -> ShardDataset:
    return ShardDataset(folder, check=False)


def _collect(name: str, dataset: ShardDataset, file: str, add: Add) -> tuple[np.ndarray, np.ndarray]:
    """Pass on the findings of a task; return its samples and what was kept of them."""
    for number, code, message, target, value, term in json.loads(Path(f"{file}.json").read_text(encoding="utf-8")):
        where = {"split": name, "key": dataset.index.key(number), "number": number}
        value = None if value is None else float(value)
        add(CHECKS[code].finding(message, target=target, value=value, term=term, **where))
    return np.load(f"{file}.numbers.npy"), np.load(f"{file}.rows.npy")
