"""``manifest.json`` of a corpus: what it was built from, and what is in it.

No identifier, path or date enters it, so that equal builds are equal bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from data_shards.convert import Conversion
from data_shards.errors import UserError
from data_shards.index import Index
from data_shards.sources import Source
from data_shards.spec import Hasher, Spec
from data_shards.splits import check_name
from data_shards.stage import write_json
from data_shards.strict import read_json
from data_shards.triplet import FORMAT_VERSION

MANIFEST_NAME = "manifest.json"
_PACKAGES = (
    *("nibabel", "numpy", "openslide-python", "pillow", "pycocotools", "pydicom", "python-gdcm", "SimpleITK", "scipy"),
    *("tifffile", "zstandard", "sam-trainer"),
)
"""Packages that decide the bytes of a shard."""
_MAX_BYTES = 2**30
"""Bytes of the largest manifest that is read: some millions of sources."""
_RECORDED = ("split", "looked_for")
_COMPARED = ("format_version", "spec", "spec_sha256", "salt_check")


def header(spec: Spec, hasher: Hasher, sources: Sequence[Source]) -> dict[str, Any]:
    """Return what a manifest says of the origin of a corpus before any file is read.

    Args:
        spec: The recipe.
        hasher: Its hash of identifiers.
        sources: The cases.
    """
    return {
        "format_version": FORMAT_VERSION,
        "spec": spec.record(),
        "spec_sha256": spec.sha256(),
        "salt_check": hasher("salt", ""),
        "dataset": spec.dataset,
        "modality": spec.modality,
        "licence": spec.licence,
        "cite": spec.cite,
        "about": {
            "title": spec.title,
            "homepage": spec.homepage,
            "papers": list(spec.papers),
            "expected": None if spec.expected is None else asdict(spec.expected),
            "verified": spec.verified,
            "notes": spec.notes,
        },
        "notes": list(_notes(spec, sources)),
        "versions": {name: _version(name) for name in _PACKAGES},
    }


def origin(header: Mapping[str, Any], sources: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the part of a manifest that says what a corpus is made from; equal parts need no new build.

    Args:
        header: As from `header`.
        sources: What `source` returned for each case.
    """
    compared = {name: header[name] for name in _COMPARED}
    return {**compared, "sources": sorted(sources, key=lambda item: str(item["volume"]))}


def source(case: Conversion) -> dict[str, Any]:
    """Return what a manifest says of a case whose files have been hashed."""
    return {
        **case.record(),
        **{name: value for name, value in conditions(case.source).items() if name not in _RECORDED},
    }


def conditions(source: Source) -> dict[str, Any]:
    """Return what a spec says of a case apart from who and where it is, unless it is as by default."""
    public = [item for item in fields(source) if item.name not in ("id", "patient", "image", "masks")]
    return {item.name: value for item in public if (value := getattr(source, item.name)) != item.default}


def make(
    header: Mapping[str, Any],
    sources: Iterable[Mapping[str, Any]],
    indices: Mapping[str, Index],
    dropped: Mapping[str, int],
    left_out: Mapping[str, int],
) -> dict[str, Any]:
    """Return the manifest of a corpus.

    Args:
        header: As from `header`.
        sources: What `source` returned for each case.
        indices: The index of each split.
        dropped: Number of targets that were too small or at the border, by term.
        left_out: Number of what else is not in the corpus, by the reason.
    """
    return {
        **origin(header, sources),
        **{name: value for name, value in header.items() if name not in _COMPARED},
        "splits": {name: describe(index) for name, index in indices.items()},
        "dropped_targets": dict(sorted(dropped.items())),
        "left_out": dict(sorted(left_out.items())),
    }


def _notes(spec: Spec, sources: Sequence[Source]) -> Iterator[str]:
    """Yield what a user of the corpus must know."""
    if spec.split.shares_patients:
        yield f"split '{spec.split.kind}': every patient is in every split, by design; scores do not generalise"
    unknown = sum(not source.patient_known for source in sources)
    if unknown:
        cases = "no patient is known" if unknown == len(sources) else f"the patient of {unknown} cases is not known"
        cases = cases.replace(" 1 cases", " 1 case")
        yield f"{cases}: split by image or series, and those of one patient may be in several splits"


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
    write_json(folder / MANIFEST_NAME, manifest)


def read(folder: Path) -> dict[str, Any] | None:
    """Read the manifest of a corpus; None if it has none.

    Raises:
        UserError: It is damaged.
    """
    path = folder / MANIFEST_NAME
    if not path.is_file():
        return None
    try:
        content = read_json(path.read_bytes(), _MAX_BYTES)
        _check(content)
    except (OSError, UserError) as error:
        raise UserError(f"{path}: damaged manifest ({error}): build the corpus again with --overwrite") from error
    return dict(content)


def _check(content: dict[str, Any]) -> None:
    """Raise a `UserError` unless a manifest has the parts that are relied on: its splits name folders to look into."""
    for name in ("splits", "spec"):
        if not isinstance(content.get(name), dict):
            raise UserError(f"'{name}' must be a mapping")
    for name, split in content["splits"].items():
        check_name(name)
        if not isinstance(split, dict):
            raise UserError(f"split '{name}' must be a mapping")
    sources = content.get("sources")
    if not isinstance(sources, list) or not all(
        isinstance(source, dict) and isinstance(source.get("volume"), str) for source in sources
    ):
        raise UserError("a source has no volume")


def header_differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Say in what two origins differ, whatever their cases."""
    result = []
    if old.get("format_version") != new["format_version"]:
        result.append(f"the format ({old.get('format_version')}, now {new['format_version']})")
    result += keys_that_differ(old.get("spec"), new["spec"], "the spec")
    if old.get("salt_check") != new["salt_check"]:
        result.append("the salt")
    return result


def keys_that_differ(old: Any, new: Any, what: str) -> list[str]:
    """Name the keys of two records that differ, as ``'slices' in the spec``."""
    if not isinstance(old, Mapping) or not isinstance(new, Mapping):
        return [what]
    return [f"'{name}' in {what}" for name in sorted({*old, *new}) if old.get(name) != new.get(name)]


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Say in what the origin of an existing corpus differs from that of the one asked for."""
    result = header_differences(old, new)
    if "the salt" in result:
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
