"""What is known of a run whose weights are exported: from its folder, and from the manifests of its shards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data_shards import manifest as manifests
from data_shards.dataset import ShardDataset
from data_shards.errors import UserError
from data_shards.index import INDEX_NAME, Index
from data_shards.spec import Hasher
from trainer.export.companions.given import Given
from trainer.export.companions.travelling import last_part, without_paths
from trainer.report.data import Evaluation, RunData, read_run
from trainer.report.traces import read_order
from trainer.restore import recipe_of
from trainer.run import Run

UNKNOWN_DATA = "the shards are not where the run had them"
CHANGED_DATA = "the shards have changed since the run"


@dataclass(frozen=True)
class SplitFacts:
    """One split of a run.

    Attributes:
        name: What the run used it as: ``train``, ``val``, ``test``, or the name of an evaluation of another set.
        folder: Last part of its folder's path.
        sha256: Hash of its index, as the run recorded it.
        samples: Images, as the run recorded it.
        why: Why nothing below is known; empty where it is.
        patients: Patients by hash; where none is known, a case stands for one.
        volumes: Cases.
        targets: Masks by term.
        absent: Images in which a term was looked for and is not, by term.
        modalities: Images by modality.
        datasets: Images by data set.
    """

    name: str
    folder: str
    sha256: str | None
    samples: int | None
    why: str = ""
    patients: int | None = None
    volumes: int | None = None
    targets: Mapping[str, int] = field(default_factory=dict)
    absent: Mapping[str, int] = field(default_factory=dict)
    modalities: Mapping[str, int] = field(default_factory=dict)
    datasets: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class DataSetFacts:
    """One data set of a run, as the manifest of its shards describes it; empty where there is none.

    Attributes:
        name: As shards name it.
        manifest: Content of ``manifest.json``, or empty.
        intensity: Rule by which intensities were stored, as the spec had it; else that of one of its samples.
        sampled: Whether `intensity` is that of one sample.
    """

    name: str
    manifest: Mapping[str, Any] = field(default_factory=dict)
    intensity: Mapping[str, Any] = field(default_factory=dict)
    sampled: bool = False

    def said(self, key: str) -> str:
        """A text of the manifest, such as its ``licence``, or of what its spec says of itself; empty if it has none."""
        about = self.manifest.get("about") or {}
        return without_paths(str(self.manifest.get(key) or about.get(key) or "").strip(), addresses=True)

    @property
    def own_key(self) -> bool | None:
        """Whether identifiers were hashed with a key of its own, and not with the data set's name; None: not known."""
        check = self.manifest.get("salt_check")
        return None if check is None else check != Hasher(self.name)("salt", "")


@dataclass(frozen=True)
class Facts:
    """Everything that what travels with an export is made of.

    Attributes:
        run: What the run's folder holds.
        recipe: Its resolved recipe.
        shown: Images that were shown in training, repeats included; None if there is no trace.
        splits: By what they were used as.
        datasets: In the order of the alphabet.
        given: What a person said.
    """

    run: RunData
    recipe: Mapping[str, Any]
    shown: int | None
    splits: tuple[SplitFacts, ...]
    datasets: tuple[DataSetFacts, ...]
    given: Given = field(default_factory=Given)

    def node(self, name: str) -> tuple[str, Mapping[str, Any]]:
        """Class, without its packages, and arguments of ``model`` or ``tuning`` in the recipe; empty if it has none."""
        found = ((self.recipe.get("model") or {}).get("init_args") or {}).get(name) or {}
        return str(found.get("class_path") or "").rpartition(".")[2], found.get("init_args") or {}

    def split(self, name: str) -> SplitFacts | None:
        """A split by its name."""
        return next((split for split in self.splits if split.name == name), None)

    def scored(self) -> list[Evaluation]:
        """Evaluations of what was trained: the run's own first, then those of other sets."""
        found = [self.run.after] if self.run.after else []
        return found + [one for one in self.run.others if one.record.get("step")]


def gather(run: Run, given: Given | None = None) -> Facts:
    """Read everything.

    Raises:
        UserError: A file of the run is damaged.
    """
    data = read_run(run)
    order = read_order(run.root)
    splits, datasets = _splits(data)
    return Facts(
        run=data,
        recipe=recipe_of(run),
        shown=sum(map(len, order.values())) or None,
        splits=tuple(splits),
        datasets=tuple(datasets),
        given=given or Given(),
    )


def _splits(data: RunData) -> tuple[list[SplitFacts], list[DataSetFacts]]:
    recorded = {name: split for name, split in (data.record.get("data") or {}).items() if split}
    for evaluation in (data.after, data.before):
        for name, split in ((evaluation.record.get("data") or {}) if evaluation else {}).items():
            recorded.setdefault(name, split)
    for evaluation in data.others:
        other = (evaluation.record.get("data") or {}).get("test")
        if other and other not in recorded.values():
            recorded[evaluation.name.partition("-")[2] or evaluation.name] = other
    splits: list[SplitFacts] = []
    datasets: dict[str, DataSetFacts] = {}
    for name, split in recorded.items():
        found, of = _split(name, split)
        splits.append(found)
        for dataset in of:
            known = datasets.get(dataset.name)
            datasets[dataset.name] = dataset if known is None or not known.manifest else known
    return splits, [datasets[name] for name in sorted(datasets)]


def _split(name: str, recorded: Mapping[str, Any]) -> tuple[SplitFacts, list[DataSetFacts]]:
    folder, sha256 = str(recorded.get("folder") or ""), recorded.get("index_sha256")
    found = SplitFacts(name, last_part(folder), sha256, recorded.get("samples"), UNKNOWN_DATA)
    if not folder or not (Path(folder) / INDEX_NAME).is_file():
        return found, []
    index = Index.load(folder, check=False)
    if sha256 is not None and index.sha256 != sha256:
        return SplitFacts(name, last_part(folder), sha256, found.samples, CHANGED_DATA), []
    absent = {str(term): int(count) for term, count in zip(index.terms, index.absent, strict=True) if count > 0}
    split = SplitFacts(
        name=name,
        folder=found.folder,
        sha256=sha256,
        samples=len(index),
        patients=len(index.patients),
        volumes=None if index.is_old else len(index.volumes),
        targets=_counted(index.terms, index.target_term),
        absent=absent,
        modalities=_counted(index.modalities, index.modality),
        datasets={} if index.is_old else _counted(index.datasets, index.dataset),
    )
    return split, [_dataset(one, Path(folder), index) for one in split.datasets]


def _counted(names: np.ndarray, numbers: np.ndarray) -> dict[str, int]:
    counts = Counter(numbers.tolist())
    return {str(name): counts[number] for number, name in enumerate(names) if counts[number]}


def _dataset(name: str, folder: Path, index: Index) -> DataSetFacts:
    """What the manifest in a split's folder, or in that above it, says of a data set; else what a sample says."""
    for place in (folder, folder.resolve().parent):
        manifest = manifests.read(place)
        if manifest is not None and manifest.get("dataset") == name:
            return DataSetFacts(name, manifest, dict(manifest["spec"].get("intensity") or {}))
    first = int(np.flatnonzero(index.dataset == index.datasets.tolist().index(name))[0])
    try:
        return DataSetFacts(name, {}, dict(ShardDataset(folder)[first].provenance.intensity), sampled=True)
    except UserError:  # a shard is gone, and nothing else is known of it
        return DataSetFacts(name)
