"""Builds one block of a plan, or finds it built.

A block lies in ``FOLDER/blocks/NAME``: shards and an index for each of its splits, and ``block.json``. It gets its name
when it is whole and on disk, so that one that has its name need not be built again.
"""

from __future__ import annotations

import secrets
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data_shards import manifest as manifests
from data_shards.convert import Conversion
from data_shards.errors import UserError
from data_shards.index import INDEX_NAME, Index
from data_shards.plan import Block
from data_shards.scan import write_index
from data_shards.spec import Spec
from data_shards.stage import read_json, sync_folder, write_json
from data_shards.triplet import Triplet
from data_shards.workers import Report
from data_shards.writer import ShardWriter

BLOCKS = "blocks"
RECORD_NAME = "block.json"
_KEYS = {"name", "splits", "dropped", "left_out", "cases"}


@dataclass(frozen=True)
class Shard:
    """One shard of a block.

    Attributes:
        path: Where it lies.
        size: Its bytes.
        sha256: Its hash.
    """

    path: Path
    size: int
    sha256: str


@dataclass(frozen=True)
class Built:
    """A finished block on disk.

    Attributes:
        folder: Where it lies.
        record: Content of its ``block.json``.
    """

    folder: Path
    record: Mapping[str, Any]

    @property
    def splits(self) -> list[str]:
        """The splits of which it has samples."""
        return list(self.record["splits"])

    @property
    def slices(self) -> int:
        """Number of its samples."""
        return sum(int(split["slices"]) for split in self.record["splits"].values())

    def shards(self, split: str) -> Iterator[Shard]:
        """Yield the shards of a split."""
        for item in self.record["splits"][split]["shards"]:
            yield Shard(self.folder / split / item["name"], int(item["bytes"]), str(item["sha256"]))

    def index(self, split: str) -> Index:
        """Open the index of a split.

        Raises:
            UserError: It is damaged.
        """
        index = Index.load(self.folder / split, check=False)
        if index.sha256 != self.record["splits"][split]["index_sha256"]:
            raise UserError(f"{self.folder / split / INDEX_NAME}: changed since it was written")
        return index

    def problems(self) -> Iterator[str]:
        """Yield one line for each shard or index that is missing, or is not as recorded as far as its size tells."""
        for split in self.splits:
            try:
                self.index(split)
            except UserError as error:
                yield str(error)
            for shard in self.shards(split):
                try:
                    size = shard.path.stat().st_size
                except OSError as error:
                    yield f"{shard.path}: cannot be read ({error.strerror})"
                    continue
                if size != shard.size:
                    yield f"{shard.path}: has {size} bytes instead of {shard.size}"


def open_block(folder: Path, name: str) -> Built | None:
    """Return a finished block; None if it is not there, or its record is damaged."""
    record = read_json(folder / BLOCKS / name / RECORD_NAME)
    whole = isinstance(record, dict) and record.keys() == _KEYS and record["name"] == name
    return Built(folder / BLOCKS / name, record) if whole else None


def get_block(folder: Path, name: str) -> Built:
    """Return a block that must be there.

    Raises:
        UserError: It is not, or is damaged.
    """
    built = open_block(folder, name)
    if built is None:
        raise UserError(f"{folder / BLOCKS / name}: the block is missing or damaged: build it again")
    for problem in built.problems():
        raise UserError(f"{problem}: build it again")
    return built


def find_block(folder: Path, block: Block) -> Built | None:
    """Return a block that was finished earlier, if it is still what building it now would give.

    Files whose place, size and time are unchanged are trusted to be those that were read; others are hashed.

    Raises:
        UserError: A file of the block's cases cannot be read.
    """
    built = open_block(folder, block.name)
    if built is None or len(built.record["cases"]) != len(block.cases):
        return None
    if any(built.problems()):
        return None
    for case, place, item in zip(block.cases, block.places, built.record["cases"], strict=True):
        if item["place"] == place and item["stamp"] == _stamp(case):
            continue
        case.hash_files()
        if item["source"] != manifests.source(case):
            return None
    return built


def build_block(folder: Path, block: Block, spec: Spec, report: Report) -> None:
    """Build a block.

    Args:
        folder: Folder of the blocks' folder.
        block: The block.
        spec: The recipe; its cases do not matter.
        report: Told the bytes of images done, and the slices written.

    Raises:
        UserError: A file of a case is wrong.
        OSError: The disk refuses.
    """
    target = folder / BLOCKS / block.name
    hidden = target.with_name(f".{block.name}.{secrets.token_hex(4)}.partial")
    hidden.mkdir(parents=True)
    try:
        _fill(hidden, block, spec, report)
        if target.exists():
            shutil.rmtree(target)
        hidden.rename(target)
        sync_folder(target.parent)
    except BaseException:
        shutil.rmtree(hidden, ignore_errors=True)
        raise


def _fill(folder: Path, block: Block, spec: Spec, report: Report) -> None:
    """Write all that belongs into the folder of a block."""
    dropped, left_out, cases = Counter[str](), Counter[str](), list[dict[str, Any]]()
    done = written = 0
    with ExitStack() as stack:
        writers: dict[str, ShardWriter] = {}
        for original, place, size in zip(block.cases, block.places, block.sizes, strict=True):
            case = replace(original, expected=None, dropped=Counter(), left_out=Counter())
            stamp = _stamp(case)
            for seen, (split, sample) in enumerate(case.samples(spec), start=1):
                if sample is not None:
                    if split not in writers:
                        limits = (spec.shards.max_samples, spec.shards.max_bytes)
                        writers[split] = stack.enter_context(ShardWriter(folder / split, *limits))
                    writers[split].write(sample.key, _encoded(sample, case, spec))
                    written += 1
                report(done + (size * seen // case.expected if case.expected else 0), written)
            done += size
            report(done, written)
            dropped.update(case.dropped)
            left_out.update(case.left_out)
            cases.append({"place": place, "stamp": stamp, "source": manifests.source(case)})
    record = {
        "name": block.name,
        "splits": {split: _describe(write_index(folder / split)) for split in sorted(writers)},
        "dropped": _positive(dropped),
        "left_out": _positive(left_out),
        "cases": cases,
    }
    for split in writers:
        sync_folder(folder / split)
    write_json(folder / RECORD_NAME, record)


def _encoded(sample: Triplet, case: Conversion, spec: Spec) -> dict[str, bytes]:
    try:
        return sample.encode(spec.shards.codec)
    except UserError as error:
        raise UserError(f"{case.source.image}: {error}") from error


def _stamp(case: Conversion) -> Any:
    try:
        return case.stamp()
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror})") from error


def _describe(index: Index) -> dict[str, Any]:
    shards = zip(index.shard_names.tolist(), index.shard_sizes.tolist(), index.shard_sha256.tolist(), strict=True)
    return {
        "slices": len(index),
        "index_sha256": index.sha256,
        "shards": [{"name": name, "bytes": size, "sha256": digest} for name, size, digest in shards],
    }


def _positive(counts: Counter[str]) -> dict[str, int]:
    return {name: count for name, count in sorted(counts.items()) if count}
