"""Checks a corpus against itself: every byte, every sample, and that nothing leaks between splits.

What is damaged is one line; the rest is checked all the same, without an index too.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from data_shards import manifest as manifests
from data_shards.codecs import IMAGE_EXTENSIONS
from data_shards.corpus import split_folders
from data_shards.dataset import ShardDataset
from data_shards.errors import UserError, counted
from data_shards.index import INDEX_NAME
from data_shards.progress import progress
from data_shards.sources import file_sha256
from data_shards.tars import open_tar, scan_shard, walk
from data_shards.triplet import Target, Triplet


@dataclass
class Verification:
    """What was found.

    Attributes:
        problems: One line each; none if the corpus is sound.
        splits: Number of splits.
        samples: Number of samples.
        targets: Number of targets.
        bytes: Size of the shards.
        seconds: Time taken.
    """

    problems: list[str] = field(default_factory=list)
    splits: int = 0
    samples: int = 0
    targets: int = 0
    bytes: int = 0
    seconds: float = 0.0

    def summary(self) -> str:
        """Return the counts on one line."""
        rate = self.bytes / 1e6 / max(self.seconds, 1e-9)
        return (
            f"{counted(self.samples, 'sample')}, {counted(self.targets, 'target')} in {counted(self.splits, 'split')}, "
            f"{self.bytes / 1e6:.1f} MB at {rate:.0f} MB/s"
        )


def verify(folder: str | Path) -> Verification:
    """Check a corpus or one split of it. Writes nothing.

    Raises:
        UserError: There is no corpus, or its manifest is damaged.
    """
    start = time.perf_counter()
    folders = split_folders(folder)
    folder = Path(folder)
    manifest = manifests.read(folder) or {}
    result = Verification(splits=len(folders))
    split = (manifest.get("spec") or {}).get("split")
    seen = _Seen(leaks_by_design=isinstance(split, dict) and split.get("kind") == "slabs")
    with progress() as bar:
        for name, path in folders.items():
            task = bar.add_task(f"verify {name}", total=None)
            advance = partial(bar.advance, task)
            try:
                dataset = ShardDataset(path, check=False)
            except UserError as error:
                result.problems += _check_without_index(name, path, str(error), seen, result, advance)
            else:
                recorded = manifest.get("splits", {}).get(name, {})
                if recorded.get("index_sha256") not in (None, dataset.index.sha256):
                    result.problems.append(f"{path}: the index is not the one that the manifest records: build again")
                elif not recorded.items() <= manifests.describe(dataset.index).items():
                    result.problems.append(f"{path}: the manifest states other counts than the index: build again")
                bar.update(task, total=len(dataset))
                result.problems += _check_split(name, dataset, seen, result, advance)
                dataset.close()
            result.problems += seen.lost_neighbours()
    if not manifest and set(folders.values()) != {folder}:
        result.problems.append(f"{folder}: has no {manifests.MANIFEST_NAME}: copy it again, or build the corpus again")
    if manifest:
        strays = {path.parent for path in folder.glob(f"*/{INDEX_NAME}")} - set(folders.values())
        result.problems += [f"{path}: the manifest lists no such split: move it away" for path in sorted(strays)]
    result.problems += seen.shared_patients()
    result.seconds = time.perf_counter() - start
    return result


def _check_split(
    name: str, dataset: ShardDataset, seen: _Seen, result: Verification, advance: Callable[[], object]
) -> Iterator[str]:
    """Yield the problems of one split."""
    index = dataset.index
    yield from index.missing()
    yield from _strays(dataset)
    present = []
    for number, shard in enumerate(index.shard_names):
        path = dataset.folder / str(shard)
        present.append(path.is_file())
        if present[-1]:
            result.bytes += path.stat().st_size
            yield from _check_shard(dataset, number, path, seen)
    for number in range(len(dataset)):
        advance()
        if not present[index.shard[number]]:
            seen.note(index.key(number))
            continue
        shard = dataset.folder / str(index.shard_names[index.shard[number]])
        try:
            triplet = dataset[number]
        except UserError as error:
            result.samples += 1
            seen.note(index.key(number))
            yield str(error).partition(": run `")[0]
            continue
        problems = _check_index(dataset, number, triplet)
        yield from _check_triplet(f"{shard}: sample '{triplet.key}'", name, triplet, seen, result, problems)


def _check_without_index(
    name: str, folder: Path, reason: str, seen: _Seen, result: Verification, advance: Callable[[], object]
) -> Iterator[str]:
    """Yield the problems of a split whose index cannot be used; its tars are read from end to end instead."""
    shards = sorted(folder.glob("*.tar"))
    read = "1 shard was" if len(shards) == 1 else f"{len(shards):,} shards were"
    yield f"{reason} (its {read} read without an index)" if shards else reason
    for path in shards:
        try:
            for key, members in scan_shard(path):
                advance()
                try:
                    triplet = Triplet.decode(key, {member.extension: member.data for member in members})
                except UserError as error:
                    result.samples += 1
                    seen.note(key)
                    yield f"{path}: {error}"
                    continue
                yield from _check_triplet(f"{path}: sample '{key}'", name, triplet, seen, result)
            result.bytes += path.stat().st_size
        except UserError as error:
            seen.note(None)
            yield f"{error}; what follows in this shard was not checked"


def _check_triplet(
    place: str, split: str, triplet: Triplet, seen: _Seen, result: Verification, more: Iterable[str] = ()
) -> Iterator[str]:
    """Count a sample and yield what is wrong in it or repeated by it."""
    result.samples += 1
    result.targets += len(triplet.targets)
    for problem in (*_check_sample(triplet), *more, *seen.add(split, triplet, place)):
        yield f"{place}: {problem}"


def _check_shard(dataset: ShardDataset, shard: int, path: Path, seen: _Seen) -> Iterator[str]:
    """Yield where a shard is not the one that the index describes."""
    index = dataset.index
    try:
        same = file_sha256(path) == index.shard_sha256[shard]
    except UserError as error:
        yield str(error)
        return
    if not same:
        yield f"{path}: its SHA-256 is not the recorded one: copy it again, or build the corpus again"
    listed = {}
    for number in map(int, np.flatnonzero(index.shard == shard)):
        listed[index.key(number)] = {(name, *span) for name, span in index.members(number).items()}
    found: dict[str, set[tuple[str, int, int]]] = {}
    known = {"json", *IMAGE_EXTENSIONS, *index.extensions.tolist()}
    try:
        with open_tar(path) as file:
            for entry in walk(file, path):
                if entry.extension in known:
                    found.setdefault(entry.key, set()).add((entry.extension, entry.offset, entry.size))
    except UserError as error:
        if same:  # otherwise it was said already that the shard is damaged
            yield str(error)
        return
    for key in sorted(found.keys() - listed.keys()):
        seen.note(key)
        yield f"{path}: sample '{key}' is in the tar but not in the index: build the corpus again"
    for key in sorted(listed.keys() & found.keys()):
        if same and listed[key] != found[key]:
            yield f"{path}: sample '{key}' lies elsewhere than the index says: build the corpus again"
    if same:
        for key in sorted(listed.keys() - found.keys()):
            yield f"{path}: sample '{key}' is in the index but not in the tar: build the corpus again"


def _strays(dataset: ShardDataset) -> Iterator[str]:
    """Yield the files beside the shards that the index does not know: a glob over the folder would read them too."""
    known = {INDEX_NAME, *map(str, dataset.index.shard_names)}
    for path in sorted(dataset.folder.iterdir()):
        if path.name not in known and (not path.name.startswith(".") or path.suffix == ".partial"):
            yield f"{path}: not part of the corpus: move it away"


def _check_sample(triplet: Triplet) -> Iterator[str]:
    """Yield what is wrong inside one sample."""
    whole: dict[str, list[Target]] = {}
    for target in triplet.targets:
        if target.term not in triplet.looked_for:
            yield f"'{target.term}' has a target but was not looked for"
        try:
            box, area = target.measure()
        except UserError as error:
            yield str(error)
            continue
        if box is None:
            yield f"the mask of '{target.term}' is empty"
        elif box != target.box:
            yield f"the box of '{target.term}' is {target.box}, that of its mask {box}"
        if area != target.area:
            yield f"the area of '{target.term}' is {target.area}, that of its mask {area}"
        whole.setdefault(target.term, []).append(target)
    for term, targets in whole.items():
        outside = _outside(targets)
        if outside:
            yield f"{outside} instances of '{term}' reach outside of the semantic target"


def _outside(targets: list[Target]) -> int:
    """Count the instances of one term that do not lie in its semantic targets, if there are any."""
    semantic = [target for target in targets if target.kind == "semantic"]
    instances = [target for target in targets if target.kind == "instance"]
    if not semantic or not instances:
        return 0
    inside = np.logical_or.reduce([target.mask() for target in semantic])
    # Pixels inside before each place, counted down the columns as the spans are.
    before = np.concatenate([[0], np.cumsum(inside.T)])
    count = 0
    for target in instances:
        starts, stops = target.spans()
        count += int((before[stops] - before[starts]).sum() != (stops - starts).sum())
    return count


def _check_index(dataset: ShardDataset, number: int, triplet: Triplet) -> Iterator[str]:
    """Yield where the index says something else than the sample."""
    index = dataset.index
    if index.targets(number) != [(target.term, target.area, target.kind) for target in triplet.targets]:
        yield "the index lists other targets"
    owner = (str(index.patients[index.patient[number]]), str(index.modalities[index.modality[number]]))
    if owner != (triplet.provenance.patient, triplet.provenance.modality):
        yield "the index lists another patient or modality"


class _Seen:
    """What was met so far, over all splits."""

    def __init__(self, leaks_by_design: bool) -> None:
        self._leaks_by_design = leaks_by_design
        self._keys: dict[str, str] = {}
        self._slices: dict[tuple[str, str, int, tuple[int, int] | None], str] = {}
        self._patients: dict[str, set[str]] = {}
        self._here: set[str | None] = set()
        self._wanted: dict[str, str] = {}

    def add(self, split: str, triplet: Triplet, place: str) -> Iterator[str]:
        """Yield what a sample repeats."""
        if triplet.key in self._keys:
            yield f"the key was already in split '{self._keys[triplet.key]}'"
        self._keys[triplet.key] = split
        self._here.add(triplet.key)
        origin = triplet.provenance
        self._patients.setdefault(origin.patient, set()).add(split)
        if origin.slice_index is not None:
            where = (origin.volume, origin.axis, origin.slice_index, origin.patch)
            if self._slices.setdefault(where, split) != split:
                yield f"the same slice is in split '{self._slices[where]}'"
        for side, key in (("previous", origin.previous), ("next", origin.next)):
            if key is not None:
                self._wanted.setdefault(key, f"{place}: its {side} slice '{key}' is not in this split")

    def note(self, key: str | None) -> None:
        """Note that a sample should be there, though nobody can read it; None for any number of them."""
        self._here.add(key)

    def lost_neighbours(self) -> list[str]:
        """Return the neighbours that samples of this split name and that are not in it; the next split begins."""
        lost = [problem for key, problem in self._wanted.items() if not self._here & {key, None}]
        self._here, self._wanted = set(), {}
        return lost

    def shared_patients(self) -> Iterator[str]:
        """Yield the patients in several splits, unless the corpus is made so."""
        for patient, splits in self._patients.items():
            if len(splits) > 1 and not self._leaks_by_design:
                yield f"patient {patient} is in splits {', '.join(sorted(splits))}: split by patient"
