"""How the work of a build is cut into blocks, which decides the shards whoever builds them.

A block is a few cases that follow each other, and ends their last shard. The plan follows from the spec, the cases and
the sizes of their files: not from the order of the cases, the number of workers, or the part of the work asked for.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

from data_shards import manifest as manifests
from data_shards.convert import Conversion
from data_shards.errors import UserError
from data_shards.index import INDEX_VERSION
from data_shards.spec import Hasher, Spec
from data_shards.stage import read_json

PLAN_NAME = "plan.json"
BLOCK_BYTES = 64 * 2**20
"""Bytes of images in a block: half to all of it on average, at most twice it unless one case alone is larger."""


@dataclass(frozen=True)
class Block:
    """Cases that are built together.

    Attributes:
        name: Hash of all that decides its bytes but the content of the files; the name of its folder.
        cases: The cases, sorted by the hash of their volume.
        places: Hash of the paths of each case's files.
        sizes: Bytes of each case's images.
    """

    name: str
    cases: tuple[Conversion, ...]
    places: tuple[str, ...]
    sizes: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes of all images."""
        return sum(self.sizes)


@dataclass(frozen=True)
class Plan:
    """The whole work.

    Attributes:
        header: What the manifest says of the origin of the corpus, before any file is read.
        splits: Names of the splits, in the order in which they are shown.
        skipped: Number of cases that the spec leaves out because they have no mask.
        blocks: The blocks, in the order of their shards.
    """

    header: Mapping[str, Any]
    splits: tuple[str, ...]
    skipped: int
    blocks: tuple[Block, ...]

    @classmethod
    def of(cls, spec: Spec, hasher: Hasher, cases: Sequence[Conversion], skipped: int = 0) -> Plan:
        """Plan the work on all cases of a spec; their order does not matter.

        Args:
            spec: The spec.
            hasher: Its hash of identifiers.
            cases: The cases.
            skipped: Number of cases left out.

        Raises:
            UserError: A file vanished.
        """
        header = manifests.header(spec, hasher, [case.source for case in cases])
        names = spec.split.split_names([case.source for case in cases])
        groups: dict[tuple[str, ...], list[Conversion]] = {}
        for case in sorted(cases, key=lambda case: case.volume):
            groups.setdefault(case.rule.splits, []).append(case)
        ranked = sorted(groups, key=lambda splits: [names.index(name) for name in splits])
        blocks = tuple(
            Block(_fingerprint(header, block), block, tuple(_places(case, hasher) for case in block), sizes)
            for splits in ranked
            for block, sizes in _cut(groups[splits], spec.shards.max_samples)
        )
        return cls(header, tuple(names), skipped, blocks)

    def part(self, number: int, of: int) -> tuple[Block, ...]:
        """Return every `of`-th block, from the `number`-th (from 1) on."""
        return self.blocks[number - 1 :: of]

    @cached_property
    def record(self) -> dict[str, Any]:
        """The plan as JSON: without identifiers and paths."""
        blocks = [{"name": block.name, "cases": len(block.cases), "bytes": block.size} for block in self.blocks]
        content = {"header": self.header, "splits": self.splits, "skipped": self.skipped, "blocks": blocks}
        # As it will be read: one that was read must be equal to one that was made.
        return dict(json.loads(json.dumps(content)))


def plan_sha256(record: Mapping[str, Any]) -> str:
    """Return the hash that names a plan."""
    return hashlib.sha256(_canonical(record)).hexdigest()


def read_plan(folder: Path) -> dict[str, Any] | None:
    """Return the record of the plan in a folder; None if there is none, or not a whole one."""
    content = read_json(folder / PLAN_NAME)
    whole = isinstance(content, dict) and content.keys() == {"header", "splits", "skipped", "blocks"}
    return content if whole else None


def difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """Say in what two plans differ; empty if they are the same."""
    before, now = one["header"], other["header"]
    found = manifests.header_differences(before, now)
    for name in ("versions", "about", "notes"):
        if before.get(name) != now.get(name):
            found += manifests.keys_that_differ(before.get(name), now.get(name), name)
    if not found and one != other:
        found = ["the cases, or the sizes of their files"]
    return ", ".join(found)


def _cut(cases: Sequence[Conversion], most: int) -> Iterator[tuple[tuple[Conversion, ...], tuple[int, ...]]]:
    """Yield (cases, bytes of each) of the blocks of cases that are sorted by their hash, at most so many in each.

    Cases whose hashes begin with the same bits make a block. So a case that is added, left out or repaired changes its
    own block, and hardly ever another one: what was built of the others stays good.
    """
    sizes = [_size(case) for case in cases]
    bits, total = 0, sum(sizes)
    while total > BLOCK_BYTES << bits or len(cases) > most << bits:
        bits += 1
    numbered = zip(cases, sizes, strict=True)
    for _, group in groupby(numbered, key=lambda pair: int(pair[0].volume, 16) >> (64 - bits)):
        block = list[tuple[Conversion, int]]()
        for pair in group:
            if block and (len(block) >= most or sum(size for _, size in block) + pair[1] > 2 * BLOCK_BYTES):
                yield _turned(block)
                block = []
            block.append(pair)
        yield _turned(block)


def _turned(pairs: Sequence[tuple[Conversion, int]]) -> tuple[tuple[Conversion, ...], tuple[int, ...]]:
    return tuple(case for case, _ in pairs), tuple(size for _, size in pairs)


def _size(case: Conversion) -> int:
    try:
        return case.size()
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror})") from error


def _places(case: Conversion, hasher: Hasher) -> str:
    return hasher("files", "\n".join(map(str, (case.source.image, *_masks(case)))))


def _fingerprint(header: Mapping[str, Any], cases: Sequence[Conversion]) -> str:
    """Return the hash of what decides the bytes of a block, but for the content of the files."""
    owners = [
        {
            "volume": case.volume,
            "patient": case.patient,
            "splits": case.rule.splits,
            "mask_names": case.mask_names,
            **manifests.conditions(case.source),
        }
        for case in cases
    ]
    decisive = {name: header[name] for name in ("format_version", "spec_sha256", "salt_check", "versions")}
    return hashlib.sha256(_canonical({**decisive, "index": INDEX_VERSION, "cases": owners})).hexdigest()[:16]


def _masks(case: Conversion) -> list[Path]:
    return [path for name in sorted(case.source.masks) for path in case.source.masks[name]]


def _canonical(content: Any) -> bytes:
    return json.dumps(content, sort_keys=True).encode()
