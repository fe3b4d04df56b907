"""Merges the parts of a build, wherever they were built, to the corpus that one build would have made."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_shards import manifest as manifests
from data_shards.blocks import Built, get_block
from data_shards.corpus import PARTS, existing, may_stay
from data_shards.errors import UserError
from data_shards.join import join
from data_shards.plan import difference, plan_sha256, read_plan
from data_shards.stage import OLD, locked, read_json, settle, swap, work_folder, workspace, writing

PART_NAME = "part.json"


@dataclass(frozen=True)
class Part:
    """One part of a build on disk.

    Attributes:
        folder: Where it lies.
        number: Which one it is, from 1.
        of: How many there are.
    """

    folder: Path
    number: int
    of: int

    def __str__(self) -> str:
        return f"part {self.number}/{self.of}"

    @property
    def busy(self) -> str:
        """What to say if another process holds it."""
        return f"{self.folder}: {self} is being built by another process: wait for it"

    @property
    def finished(self) -> dict[str, Any]:
        """What the part says of itself once all its blocks are there; until then empty."""
        content = read_json(self.folder / PART_NAME)
        return content if isinstance(content, dict) else {}

    def plan(self) -> dict[str, Any]:
        """Return the plan that the part was built from.

        Raises:
            UserError: The part is not finished.
        """
        plan = read_plan(self.folder)
        if plan is None or self.finished.get("plan_sha256") != plan_sha256(plan):
            raise UserError(f"{self.folder}: {self} is not finished: {self.again}")
        return plan

    @property
    def again(self) -> str:
        """What to do to get it."""
        return f"run `data-shards build` with --part {self.number}/{self.of}"


def part_folder(out: Path, number: int, of: int) -> Part:
    """Return a part of the corpus `out`."""
    return Part(out / PARTS / f"{number}-of-{of}", number, of)


def merge(
    folders: Sequence[str | Path], out: str | Path | None = None, overwrite: bool = False, keep_parts: bool = False
) -> tuple[Path, dict[str, Any], bool]:
    """Make a corpus of its parts, which go when it is in its place.

    Args:
        folders: Folders of corpora that are in parts, or of single parts.
        out: Folder of the corpus; by default the one folder given.
        overwrite: Replace a corpus that was built from something else.
        keep_parts: Leave the parts where they are.

    Returns:
        Folder of the corpus, its manifest, and whether it was there already.

    Raises:
        UserError: A part is missing, unfinished, damaged or from another plan; one line says which.
    """
    places = [Path(folder) for folder in folders]
    target = Path(out) if out is not None else places[0]
    if out is None and (len(places) > 1 or _as_part(places[0]) is not None):
        raise UserError("several folders, or a single part: say with --out where the corpus shall be")
    settle(target)
    if out is None and not (target / PARTS).exists():
        found = existing(target, False)
        if found is not None:  # merged already
            may_stay(target, found, found, False)
            return target, found, True
    parts = _complete([part for place in places for part in _parts(place)], places)
    with ExitStack() as stack:
        stack.enter_context(writing(target))
        for part in parts:
            stack.enter_context(locked(part.folder, part.busy))
        plan = _common_plan(parts)
        blocks = _blocks(plan, parts)
        found = existing(target, overwrite)
        sources = [item["source"] for block in blocks for item in block.record["cases"]]
        reused = found is not None and may_stay(target, found, manifests.origin(plan["header"], sources), overwrite)
        if found is None or not reused:
            found = _make(target, plan, blocks, keep_parts)
        if not keep_parts:
            _remove(parts)
    return target, found, reused


def _make(out: Path, plan: Mapping[str, Any], blocks: Sequence[Built], keep_parts: bool) -> dict[str, Any]:
    """Put the corpus in its place; parts that lie there move aside with what else does, and come back if wanted."""
    work = work_folder(out)
    with workspace(work, f"{out}: another build of it is running: wait for it", lambda: None):
        content = join(plan, blocks, work, own=False)
        swap(work, out)
        if keep_parts and (work / OLD / PARTS).exists():
            (work / OLD / PARTS).rename(out / PARTS)
        shutil.rmtree(work, ignore_errors=True)
    return content


def _remove(parts: Sequence[Part]) -> None:
    """Remove parts, and the folders in which nothing else lies."""
    for part in parts:
        shutil.rmtree(part.folder, ignore_errors=True)
        if part.folder.parent.name == PARTS:
            for folder in (part.folder.parent, part.folder.parent.parent):
                with suppress(OSError):
                    folder.rmdir()


def _as_part(folder: Path) -> Part | None:
    match = re.fullmatch(r"(\d+)-of-(\d+)", folder.resolve().name)
    return Part(folder, int(match[1]), int(match[2])) if match else None


def _parts(folder: Path) -> Iterator[Part]:
    """Yield the part that a folder is, or those that it holds."""
    single = _as_part(folder)
    if single is not None:
        yield single
        return
    found = [part for path in sorted((folder / PARTS).glob("*-of-*")) if (part := _as_part(path)) is not None]
    if not found:
        raise UserError(
            f"{folder}: no parts here: run `data-shards build SPEC.yaml --out {folder} --part 1/N` and so on"
        )
    yield from found


def _complete(parts: Sequence[Part], places: Sequence[Path]) -> list[Part]:
    """Return the parts in their order.

    Raises:
        UserError: They are not 1 to N, each once.
    """
    where = ", ".join(map(str, places))
    counts = sorted({part.of for part in parts})
    if len(counts) > 1:
        raise UserError(
            f"{where}: parts of {' and of '.join(map(str, counts))} are mixed: "
            f"remove those that are not wanted, as {parts[0].folder}"
        )
    by_number: dict[int, Part] = {}
    for part in parts:
        if part.number in by_number:
            raise UserError(f"{part} is there twice: in {by_number[part.number].folder} and {part.folder}: give one")
        by_number[part.number] = part
    missing = [Part(places[0], number, counts[0]) for number in range(1, counts[0] + 1) if number not in by_number]
    if missing:
        more = f", and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(f"{where}: {missing[0]} is missing{more}: {missing[0].again}")
    return [by_number[number] for number in sorted(by_number)]


def _common_plan(parts: Sequence[Part]) -> dict[str, Any]:
    """Return the one plan of all parts.

    Raises:
        UserError: A part is not finished, or was built from another plan.
    """
    first = parts[0].plan()
    for part in parts[1:]:
        different = difference(first, part.plan())
        if different:
            raise UserError(
                f"{part.folder}: {part} was built from something else than {parts[0]}; what differs: {different}: "
                f"build the wrong one again with the spec and files of the others; what still fits is kept"
            )
    return first


def _blocks(plan: Mapping[str, Any], parts: Sequence[Part]) -> list[Built]:
    """Return all blocks of a plan.

    Raises:
        UserError: One is missing or damaged.
    """
    blocks = []
    for number, item in enumerate(plan["blocks"]):
        part = parts[number % len(parts)]
        try:
            blocks.append(get_block(part.folder, item["name"]))
        except UserError as error:
            raise UserError(f"{error}: {part.again}") from None
    return blocks
