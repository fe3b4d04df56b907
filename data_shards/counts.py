"""What a corpus holds, counted from its indices alone: no shard is opened.

Shapes: N samples and T targets of a split, or of all splits together; G groups.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from data_shards.index import Index
from data_shards.order import Sampling
from data_shards.triplet import KINDS

VERSION = 1
"""Raised whenever a field of the record changes its meaning."""
POWERS = (1.0, 0.5, 0.0)
"""Of a group's size, to which its share may be proportional: as it is, square root, the same for each."""
QUANTILES = ("min", "p5", "median", "p95", "max")
_AT = np.array([0.0, 0.05, 0.5, 0.95, 1.0])


def count_corpus(indices: Mapping[str, Index]) -> dict[str, Any]:
    """Return the statistics of a corpus as plain values that JSON holds; what is not known is None.

    Args:
        indices: The index of each split.
    """
    splits = {name: _split(index) for name, index in indices.items()}
    patients = {patient for index in indices.values() for patient in index.patients.tolist()}
    return {
        "version": VERSION,
        "total": {
            **{
                name: sum(split[name] for split in splits.values()) for name in ("images", "targets", "shards", "bytes")
            },
            "patients": len(patients),
        },
        "outdated": [name for name, index in indices.items() if index.is_old],
        "splits": splits,
        "groups": _groups(indices),
        "images": _images(indices),
        "members": _members(indices),
        "terms": _terms(indices),
        "balance": {name: _balance(index) for name, index in indices.items()},
    }


def _split(index: Index) -> dict[str, Any]:
    each = np.diff(index.target_start)
    return {
        "images": len(index),
        "without_target": int((each == 0).sum()),
        "targets": len(index.target_term),
        **{kind: int((index.target_kind == number).sum()) for number, kind in enumerate(KINDS)},
        "targets_per_image": {**(_quantiles(each) or {}), "mean": float(each.mean())},
        "patients": len(index.patients),
        "volumes": None if index.is_old else len(index.volumes),
        "shards": len(index.shard_names),
        "bytes": int(index.shard_sizes.sum()),
        "foreign": bool(index.layout[0]),
        "index_sha256": index.sha256,
    }


def _groups(indices: Mapping[str, Index]) -> list[dict[str, Any]]:
    """Count the images of each modality in each data set, the largest first; an old index knows no data set."""
    found: dict[tuple[str, str | None], dict[str, int]] = {}
    for split, index in indices.items():
        pairs = index.modality.astype(np.int64) * len(index.datasets) + index.dataset
        for pair, count in zip(*np.unique(pairs, return_counts=True), strict=True):
            modality, dataset = divmod(int(pair), len(index.datasets))
            key = (str(index.modalities[modality]), None if index.is_old else str(index.datasets[dataset]))
            found.setdefault(key, {})[split] = int(count)
    rows = [
        {"modality": modality, "dataset": dataset, "images": sum(counts.values()), "splits": counts}
        for (modality, dataset), counts in found.items()
    ]
    return sorted(rows, key=lambda row: (-row["images"], row["modality"], row["dataset"] or ""))


def _images(indices: Mapping[str, Index]) -> dict[str, Any]:
    """Describe the images of all splits whose indices know them."""
    known = [index for index in indices.values() if not index.is_old]
    sizes, dtypes, channels = Counter[tuple[int, int]](), Counter[str](), Counter[int]()
    for index in known:
        pairs, counts = np.unique(index.height.astype(np.int64) << 32 | index.width, return_counts=True)
        for pair, count in zip(pairs.tolist(), counts.tolist(), strict=True):
            sizes[pair >> 32, pair & 0xFFFFFFFF] += count
        dtypes.update(_named(index.dtype, index.dtypes))
        channels.update(dict(enumerate(np.bincount(index.channels).tolist())))
    listed = sorted(sizes.items(), key=lambda item: (-item[1], item[0]))
    return {
        "unknown": sum(len(index) for index in indices.values() if index.is_old),
        "sizes": [{"height": height, "width": width, "images": count} for (height, width), count in listed],
        "height": _quantiles(_joined(known, "height")),
        "width": _quantiles(_joined(known, "width")),
        "channels": {str(number): count for number, count in sorted(channels.items()) if count},
        "dtypes": dict(dtypes.most_common()),
        "spacing": {name: _spacing(_joined(known, f"{name}_spacing")) for name in ("row", "column", "slice")},
    }


def _spacing(values: np.ndarray) -> dict[str, Any] | None:
    known = values[np.isfinite(values)]
    found = _quantiles(known)
    return None if found is None else {"known": len(known), **found}


def _named(numbers: np.ndarray, names: np.ndarray) -> dict[str, int]:
    """Count the entries of a table that an array points to."""
    counts = np.bincount(numbers, minlength=len(names)).tolist()
    return {name: count for name, count in zip(names.tolist(), counts, strict=True) if count}


def _members(indices: Mapping[str, Index]) -> dict[str, dict[str, int]]:
    """Count the members of each extension and their bytes."""
    counts, sizes = Counter[str](), Counter[str]()
    for index in indices.values():
        counts.update(_named(index.member_extension, index.extensions))
        # Sums of floats are exact up to 9 PB.
        total = np.bincount(index.member_extension, weights=index.member_size, minlength=len(index.extensions))
        sizes.update(dict(zip(index.extensions.tolist(), total.astype(np.int64).tolist(), strict=True)))
    return {name: {"members": count, "bytes": sizes[name]} for name, count in counts.most_common()}


def _terms(indices: Mapping[str, Index]) -> dict[str, Any]:
    """Describe the targets of each term; those of most images first."""
    numbers: dict[str, int] = {}
    places = [np.array([numbers.setdefault(term, len(numbers)) for term in index.terms.tolist()], np.int64)
              for index in indices.values()]  # fmt: skip
    empty = {"positives": 0, "absent": 0, "semantic": 0, "instance": 0}
    splits: list[dict[str, dict[str, Any]]] = [{name: dict(empty) for name in indices} for _ in numbers]
    terms, areas, pixels = [], [], []
    for (name, index), place in zip(indices.items(), places, strict=True):
        sample = np.repeat(np.arange(len(index)), np.diff(index.target_start))
        term = place[index.target_term]
        terms.append(term * len(KINDS) + index.target_kind)
        areas.append(index.target_area)
        pixels.append((index.height.astype(np.int64) * index.width)[sample])
        images = np.bincount(_distinct(sample * len(numbers) + term) % max(1, len(numbers)), minlength=len(numbers))
        kinds = np.bincount(terms[-1], minlength=len(numbers) * len(KINDS)).reshape(-1, len(KINDS))
        for local, number in enumerate(place.tolist()):
            entry = splits[number][name]
            entry["positives"] = int(images[number])
            entry["absent"] = int(index.absent[local]) if index.absent[local] >= 0 else None
            entry.update(zip(KINDS, kinds[number].tolist(), strict=True))
    measured = _measured(np.concatenate(terms), np.concatenate(areas), np.concatenate(pixels), len(numbers))
    rows = {term: {"splits": splits[number], **measured[number]} for term, number in numbers.items()}
    order = sorted(rows, key=lambda term: (-sum(split["positives"] for split in rows[term]["splits"].values()), term))
    return {term: rows[term] for term in order}


def _distinct(values: np.ndarray) -> np.ndarray:
    ordered = np.sort(values, kind="stable")  # nearly sorted already
    return ordered[np.concatenate([[True], ordered[1:] != ordered[:-1]])] if ordered.size else ordered


def _measured(terms: np.ndarray, areas: np.ndarray, pixels: np.ndarray, count: int) -> list[dict[str, Any]]:
    """Return the areas, in pixels and as a share of the image, of the targets and of the instances of each term."""
    area = _grouped(areas.astype(np.float64), terms, count * len(KINDS))
    known = pixels > 0
    share = _grouped(areas[known] / pixels[known], terms[known], count * len(KINDS))
    return [
        {
            kind: {"area": _row(area[number * len(KINDS) + place]), "share": _row(share[number * len(KINDS) + place])}
            for place, kind in enumerate(KINDS)
        }
        for number in range(count)
    ]


def _grouped(values: np.ndarray, groups: np.ndarray, count: int) -> np.ndarray:
    """Return the quantiles (G, 5) of the values of each group, NaN for a group without any; as `numpy.quantile`."""
    # Three times as fast as sorting by both at once: numbers of 16 bits are sorted in one pass.
    ordered = values[np.argsort(groups.astype(np.uint16) if count <= 2**16 else groups, kind="stable")]
    sizes = np.bincount(groups, minlength=count)
    starts = np.concatenate([[0], np.cumsum(sizes)])
    for group in np.flatnonzero(sizes > 1):
        ordered[starts[group] : starts[group + 1]].sort()
    result = np.full((count, len(_AT)), np.nan)
    some = sizes > 0
    place = starts[:-1][some, None] + _AT * (sizes[some, None] - 1)
    low = np.floor(place + 1e-9).astype(np.int64)
    high = np.minimum(low + 1, starts[1:][some, None] - 1)
    result[some] = ordered[low] + (place - low).clip(0, 1) * (ordered[high] - ordered[low])
    return result


def _quantiles(values: np.ndarray) -> dict[str, float] | None:
    return dict(zip(QUANTILES, np.quantile(values, _AT).tolist(), strict=True)) if values.size else None


def _row(quantiles: np.ndarray) -> dict[str, float] | None:
    return None if np.isnan(quantiles[0]) else dict(zip(QUANTILES, quantiles.tolist(), strict=True))


def _joined(indices: list[Index], name: str) -> np.ndarray:
    return np.concatenate([getattr(index, name) for index in indices]) if indices else np.zeros(0)


def _balance(index: Index) -> dict[str, Any]:
    """Say how unequal the groups of a split are, and what `sampling` would make of it."""
    result: dict[str, Any] = {}
    tables = {"modality": (index.modality, index.modalities), "dataset": (index.dataset, index.datasets)}
    for by, (numbers, names) in tables.items():
        if by == "dataset" and index.is_old:
            result[by] = None
            continue
        counts = _named(numbers, names)
        shares = {power: Sampling(by=by, power=power).shares(counts) for power in POWERS}  # type: ignore[arg-type]
        result[by] = {
            "ratio": max(counts.values()) / min(counts.values()),
            "groups": [
                {"name": name, "images": count, "shares": {str(power): shares[power][name] for power in POWERS}}
                for name, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))
            ],
        }
    return result
