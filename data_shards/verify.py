"""Checks a corpus against itself: every byte, every sample, and that nothing leaks between splits."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from data_shards import manifest as manifests
from data_shards.corpus import split_folders
from data_shards.dataset import ShardDataset
from data_shards.errors import UserError
from data_shards.index import INDEX_NAME
from data_shards.progress import progress
from data_shards.sources import file_sha256
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
            f"{self.samples:,} samples, {self.targets:,} targets in {self.splits} splits, "
            f"{self.bytes / 1e6:.1f} MB at {rate:.0f} MB/s"
        )


def verify(folder: str | Path) -> Verification:
    """Check a corpus or one split of it. Writes nothing.

    Raises:
        UserError: There is no corpus.
    """
    folder, start = Path(folder), time.perf_counter()
    folders = split_folders(folder)
    manifest = manifests.read(folder) or {}
    result = Verification(splits=len(folders))
    seen = _Seen(leaks_by_design=(manifest.get("spec") or {}).get("split", {}).get("kind") == "slabs")
    with progress() as bar:
        for name, path in folders.items():
            try:
                dataset = ShardDataset(path, check=False)
            except UserError as error:
                result.problems.append(str(error))
                continue
            recorded = manifest.get("splits", {}).get(name, {}).get("index_sha256")
            if recorded not in (None, dataset.index.sha256):
                result.problems.append(f"{path}: the index is not the one that the manifest records: build again")
            task = bar.add_task(f"verify {name}", total=len(dataset))
            result.problems += _check_split(name, dataset, seen, result, partial(bar.advance, task))
            dataset.close()
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
    for shard, size, recorded in zip(index.shard_names, index.shard_sizes, index.shard_sha256, strict=True):
        path = dataset.folder / str(shard)
        present.append(path.is_file())
        if present[-1]:
            result.bytes += int(size)
            if file_sha256(path) != recorded:
                yield f"{path}: its SHA-256 is not the recorded one: copy it again, or build the corpus again"
    for number in range(len(dataset)):
        advance()
        if not present[index.shard[number]]:
            continue
        place = f"{dataset.folder / str(index.shard_names[index.shard[number]])}: sample '{index.key(number)}'"
        result.samples += 1
        try:
            triplet = dataset[number]
            found = [*_check_sample(triplet), *_check_index(dataset, number, triplet), *seen.add(name, triplet)]
        except UserError as error:
            yield str(error).partition(": run `")[0]
            continue
        result.targets += len(triplet.targets)
        yield from (f"{place}: {problem}" for problem in found)


def _strays(dataset: ShardDataset) -> Iterator[str]:
    """Yield the files beside the shards that the index does not know: a glob over the folder would read them too."""
    known = {INDEX_NAME, *map(str, dataset.index.shard_names)}
    for path in sorted(dataset.folder.iterdir()):
        if path.name not in known and (not path.name.startswith(".") or path.suffix == ".partial"):
            yield f"{path}: not part of the corpus: move it away"


def _check_sample(triplet: Triplet) -> Iterator[str]:
    """Yield what is wrong inside one sample."""
    for target in triplet.targets:
        if target.term not in triplet.looked_for:
            yield f"'{target.term}' has a target but was not looked for"
        if target.size != triplet.image.shape[:2]:
            yield f"the mask of '{target.term}' has size {target.size}, its image {triplet.image.shape[:2]}"
            continue
        try:
            fresh = Target.from_mask(target.mask(), target.term)
        except UserError as error:
            yield str(error)
            continue
        if fresh.box != target.box:
            yield f"the box of '{target.term}' is {target.box}, that of its mask {fresh.box}"
        if fresh.area != target.area:
            yield f"the area of '{target.term}' is {target.area}, that of its mask {fresh.area}"


def _check_index(dataset: ShardDataset, number: int, triplet: Triplet) -> Iterator[str]:
    """Yield where the index says something else than the sample."""
    index = dataset.index
    if index.targets(number) != [(target.term, target.area) for target in triplet.targets]:
        yield "the index lists other targets"
    owner = (str(index.patients[index.patient[number]]), str(index.modalities[index.modality[number]]))
    if owner != (triplet.provenance.patient, triplet.provenance.modality):
        yield "the index lists another patient or modality"


class _Seen:
    """What was met so far, over all splits."""

    def __init__(self, leaks_by_design: bool) -> None:
        self._leaks_by_design = leaks_by_design
        self._keys: dict[str, str] = {}
        self._slices: dict[tuple[str, str, int], str] = {}
        self._patients: dict[str, set[str]] = {}

    def add(self, split: str, triplet: Triplet) -> Iterator[str]:
        """Yield what a sample repeats."""
        if triplet.key in self._keys:
            yield f"the key was already in split '{self._keys[triplet.key]}'"
        self._keys[triplet.key] = split
        origin = triplet.provenance
        self._patients.setdefault(origin.patient, set()).add(split)
        if origin.slice_index is not None:
            place = (origin.volume, origin.axis, origin.slice_index)
            if self._slices.setdefault(place, split) != split:
                yield f"the same slice is in split '{self._slices[place]}'"

    def shared_patients(self) -> Iterator[str]:
        """Yield the patients in several splits, unless the corpus is made so."""
        for patient, splits in self._patients.items():
            if len(splits) > 1 and not self._leaks_by_design:
                yield f"patient {patient} is in splits {', '.join(sorted(splits))}: split by patient"
