"""The checks of what must not be in two places: patients, volumes and pixels.

Shapes: N samples that were looked at, over all splits.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from data_shards.errors import counted
from data_shards.lint.findings import corpus_check
from data_shards.lint.survey import Corpus, Hit, first_of
from data_shards.triplet import SPLIT_UNITS


@corpus_check("patient-in-splits", "error", "A patient is in two splits: scores will flatter.")
def patient_in_splits(corpus: Corpus) -> Iterator[Hit]:
    """Look for patients in several splits, by the whole index."""
    if not corpus.leaks_by_design:
        yield from _shared(corpus, "patient", "patients", "split by patient")


@corpus_check("volume-in-splits", "error", "Slices of one volume are in two splits: scores will flatter.")
def volume_in_splits(corpus: Corpus) -> Iterator[Hit]:
    """Look for volumes in several splits, by the whole index."""
    if not corpus.leaks_by_design:
        yield from _shared(corpus, "volume", "volumes", "split by patient, and cut no volume")


@corpus_check("patients-shared", "note", "The corpus has every patient in every split, as its manifest says.")
def patients_shared(corpus: Corpus) -> Iterator[Hit]:
    """Say of a corpus of slabs what its scores are worth."""
    shared = sum(1 for _ in _shared(corpus, "patient", "patients", "")) if corpus.leaks_by_design else 0
    if shared:
        message = f"{shared:,} patients are in several splits, by design (split 'slabs'): scores do not generalise"
        yield Hit(message.replace("1 patients are", "1 patient is") if shared == 1 else message, value=shared)


@corpus_check("unknown-patients", "note", "Patients are not known: images of one may be in several splits.")
def unknown_patients(corpus: Corpus) -> Iterator[Hit]:
    """Count the samples that were split by image or series, or that name no patient."""
    apart = (corpus.rows["split_unit"] != SPLIT_UNITS.index("patient")) | (corpus.patient < 0)
    for number, part in enumerate(corpus.parts):
        count = int((apart & (corpus.split == number)).sum())
        if count:
            what = counted(count, "sample")
            message = f"the patient of {what} is not known: name patients in the spec if the source tells them"
            yield Hit(message, split=part.name, value=count)


@corpus_check("duplicate-across-splits", "error", "The same pixels are in two splits: scores will flatter.")
def duplicate_across_splits(corpus: Corpus) -> Iterator[Hit]:
    """Compare the hashes of all pixels; images without content are alike by nature."""
    same = copies(corpus)
    # The first sample with these pixels is in the first of its splits.
    for row in np.flatnonzero(corpus.split != corpus.split[same]).tolist():
        where = corpus.place(int(same[row]))
        message = f"the same pixels as '{where.key}' in split '{where.split}': keep one of the two"
        yield Hit(message, row, other=int(same[row]))


@corpus_check("duplicate-across-patients", "warning", "Two patients of a split have the same pixels.")
def duplicate_across_patients(corpus: Corpus) -> Iterator[Hit]:
    """Compare the hashes of all pixels inside of each split."""
    rows, patient = np.arange(len(corpus.split)), corpus.patient
    same = first_of(copies(corpus).astype(np.int64) * len(corpus.parts) + corpus.split)
    apart = (same != rows) & (patient >= 0) & (patient[same] >= 0) & (patient != patient[same])
    for row in np.flatnonzero(apart).tolist():
        where = corpus.place(int(same[row]))
        message = f"the same pixels as '{where.key}' of another patient: keep one, or correct the patient"
        yield Hit(message, row, other=int(same[row]))


def copies(corpus: Corpus) -> np.ndarray:
    """Return the first sample with the same pixels as each (N,); itself for those without content."""
    if not len(corpus.split):
        return np.zeros(0, np.int64)
    _, numbers = np.unique(corpus.rows["content"][:, 0], return_inverse=True)
    _, others = np.unique(corpus.rows["content"][:, 1], return_inverse=True)
    both = numbers.astype(np.int64) * (int(others.max()) + 1) + others
    return first_of(np.where(corpus.rows["plain"], -1, both))


def _shared(corpus: Corpus, column: str, table: str, remedy: str) -> Iterator[Hit]:
    """Yield a hit, in the later split, for each patient or volume that is in several."""
    seen: dict[tuple[str, str], str] = {}
    for part in corpus.parts:
        index = part.index
        pairs = index.dataset.astype(np.int64) * len(getattr(index, table)) + getattr(index, column)
        found, counts = np.unique(pairs, return_counts=True)
        for pair, count in zip(found.tolist(), counts.tolist(), strict=True):
            dataset, number = divmod(pair, len(getattr(index, table)))
            name = str(getattr(index, table)[number])
            if not name:
                continue
            first = seen.setdefault((str(index.datasets[dataset]), name), part.name)
            if first != part.name:
                message = f"{column} {name} ({counted(count, 'sample')} here) is in split '{first}' too: {remedy}"
                yield Hit(message, split=part.name, value=count)
