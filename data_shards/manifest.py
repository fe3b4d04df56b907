"""``manifest.json`` of a corpus: what it was built from, and what is in it.

No identifier, path or date enters it, so that equal builds are equal bytes.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from data_shards.convert import Conversion
from data_shards.errors import UserError
from data_shards.index import Index
from data_shards.spec import Hasher, Spec
from data_shards.triplet import FORMAT_VERSION

MANIFEST_NAME = "manifest.json"
_PACKAGES = ("nibabel", "numpy", "pillow", "pycocotools", "sam-trainer")


def origin(spec: Spec, hasher: Hasher, cases: Sequence[Conversion]) -> dict[str, Any]:
    """Return the part of a manifest that says what a corpus is made from; equal parts need no new build.

    The files of the cases must have been hashed.
    """
    return {
        "format_version": FORMAT_VERSION,
        "spec": spec.record(),
        "spec_sha256": spec.sha256(),
        "salt_check": hasher("salt", ""),
        "sources": [
            {
                "volume": case.volume,
                "patient": case.patient,
                "split": case.source.split,
                "image_sha256": case.image_sha256,
                "mask_sha256": case.mask_sha256,
            }
            for case in cases
        ],
    }


def make(
    spec: Spec, hasher: Hasher, cases: Sequence[Conversion], indices: Mapping[str, Index], warnings: Sequence[str]
) -> dict[str, Any]:
    """Return the manifest of a corpus.

    Args:
        spec: The recipe.
        hasher: Its hash of identifiers.
        cases: The cases, converted.
        indices: The index of each split.
        warnings: What a user of the corpus must know, one line each.
    """
    dropped: Counter[str] = Counter()
    for case in cases:
        dropped.update(case.dropped)
    notes = list(warnings)
    if spec.split.shares_patients:
        notes.append(f"split '{spec.split.kind}': every patient is in every split, by design; scores do not generalise")
    return {
        **origin(spec, hasher, cases),
        "dataset": spec.dataset,
        "modality": spec.modality,
        "licence": spec.licence,
        "cite": spec.cite,
        "notes": notes,
        "splits": {name: describe(index) for name, index in indices.items()},
        "dropped_below_min_area": dict(sorted(dropped.items())),
        "versions": {name: _version(name) for name in _PACKAGES},
    }


def describe(index: Index) -> dict[str, Any]:
    """Return the counts of one split."""
    counts = np.bincount(index.target_term, minlength=len(index.terms))
    return {
        "slices": len(index),
        "targets": {str(term): int(count) for term, count in zip(index.terms, counts, strict=True)},
        "patients": len(index.patients),
        "shards": len(index.shard_names),
        "bytes": int(index.shard_sizes.sum()),
        "index_sha256": index.sha256,
    }


def write(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write the manifest of a corpus."""
    text = json.dumps(manifest, indent=2, ensure_ascii=False)
    (folder / MANIFEST_NAME).write_text(text + "\n", encoding="utf-8")


def read(folder: Path) -> dict[str, Any] | None:
    """Read the manifest of a corpus; None if it has none.

    Raises:
        UserError: It is damaged.
    """
    path = folder / MANIFEST_NAME
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not all(isinstance(content[name], dict) for name in ("splits", "spec")):
            raise TypeError("'splits' and 'spec' must be mappings")
        if not all("volume" in source for source in content["sources"]):
            raise TypeError("a source has no volume")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: damaged manifest ({error}): build the corpus again with --overwrite") from error
    return dict(content)


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Say in what the origin of an existing corpus differs from that of the one asked for."""
    result = []
    if old.get("format_version") != new["format_version"]:
        result.append(f"the format ({old.get('format_version')}, now {new['format_version']})")
    before, after = old.get("spec") or {}, new["spec"]
    result += [f"'{name}' in the spec" for name in sorted({*before, *after}) if before.get(name) != after.get(name)]
    if old.get("salt_check") != new["salt_check"]:
        result.append("the salt")
        return result
    was = {item["volume"]: item for item in old.get("sources", [])}
    now = {item["volume"]: item for item in new["sources"]}
    both = was.keys() & now.keys()
    for count, what in (
        (len(now.keys() - was.keys()), "added"),
        (len(was.keys() - now.keys()), "gone"),
        (sum(was[name] != now[name] for name in both), "changed"),
    ):
        if count:
            result.append(f"{count} case{'s' * (count > 1)} {what}")
    return result


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
