"""Runs every check over a corpus."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np

from data_shards import manifest as manifests
from data_shards.corpus import split_folders
from data_shards.errors import UserError, counted, nearest
from data_shards.inspect import spread
from data_shards.lint import scan
from data_shards.lint.findings import Report, SplitFacts
from data_shards.lint.survey import Corpus
from data_shards.lint.table import CHECKS


def lint(folder: str | Path, sample: int | None = None, workers: int = 1, ignore: Iterable[str] = ()) -> Report:
    """Look for what is wrong with a corpus or one split of it. Writes nothing.

    Args:
        folder: The corpus, or a split.
        sample: Look at so many samples only, evenly spread; what the index tells is checked for all.
        workers: Processes; the result does not depend on their number.
        ignore: Codes of checks that are not run.

    Raises:
        UserError: There is no corpus, its manifest is damaged, or a code is unknown.
    """
    start = time.perf_counter()
    for code in ignore:
        if code not in CHECKS:
            raise UserError(f"no check is called '{code}'{nearest(code, CHECKS)}")
    if sample is not None and sample < 1:
        raise UserError(f"{sample} samples cannot be looked at: give 1 or more")
    report = Report(str(folder), ignored=tuple(dict.fromkeys(ignore)))
    # What is in two splits is said of the later one: that should not be the one that is trained on.
    folders = dict(sorted(split_folders(folder).items(), key=lambda item: item[0] != "train"))
    opened = {name: scan.open_split(name, path, report.add) for name, path in folders.items()}
    datasets = {name: dataset for name, dataset in opened.items() if dataset is not None}
    numbers = _chosen([len(dataset) for dataset in datasets.values()], sample)
    for (name, dataset), mine in zip(datasets.items(), numbers, strict=True):
        report.splits[name] = SplitFacts(len(dataset), len(mine), dataset.index.sha256)
    report.splits.update({name: SplitFacts(0, 0, "") for name in folders if name not in datasets})
    report.splits = {name: report.splits[name] for name in folders}
    if report.linted < report.samples:
        looked = f"{report.linted:,} of {report.samples:,} samples, evenly spread,"
        report.remarks.append(f"Only {looked} were looked at; what the index tells was checked for all.")
    there = {
        name: scan.present(name, dataset, mine, report.add)
        for (name, dataset), mine in zip(datasets.items(), numbers, strict=True)
    }
    parts, rows = scan.scan(datasets, there, report.ignored, workers, report.add)
    for part in parts:
        report.splits[part.name] = replace(report.splits[part.name], linted=len(part.numbers))
    lost = sum(map(len, numbers)) - report.linted
    if lost:
        report.remarks.append(
            f"{counted(lost, 'sample')} could not be read, and {'was' if lost == 1 else 'were'} not looked at."
        )
    corpus = Corpus(parts, rows, _leaks_by_design(Path(folder)), report.remarks)
    for check in CHECKS.values() if parts else ():
        if check.scope == "corpus" and check.code not in report.ignored and check.find is not None:
            for hit in check.find(corpus):
                report.add(corpus.finding(check, hit))
    for dataset in datasets.values():
        dataset.close()
    report.sort()
    report.seconds = time.perf_counter() - start
    return report


def _chosen(sizes: list[int], wanted: int | None) -> list[np.ndarray]:
    """Return the numbers of the samples of each split to look at, evenly spread over all."""
    total, starts = sum(sizes), np.cumsum([0, *sizes])
    places = np.arange(total) if wanted is None or wanted >= total else np.array(spread(total, wanted), np.int64)
    cuts = np.searchsorted(places, starts)
    return [places[cuts[n] : cuts[n + 1]] - starts[n] for n in range(len(sizes))]


def _leaks_by_design(folder: Path) -> bool:
    split = ((manifests.read(folder) or {}).get("spec") or {}).get("split")
    return isinstance(split, dict) and split.get("kind") == "slabs"
