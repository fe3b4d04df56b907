"""Joins finished blocks to a corpus: shards numbered in the order of the plan, one index a split, the manifest.

What comes out does not depend on who built which block.
Shapes: S shards, N samples, T targets.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from data_shards import manifest as manifests
from data_shards.blocks import Built, Shard
from data_shards.convert import WITHOUT_TARGET
from data_shards.errors import UserError
from data_shards.index import Index
from data_shards.index_file import TABLES
from data_shards.progress import progress
from data_shards.sources import file_sha256
from data_shards.stage import CORPUS, sync_folder
from data_shards.workers import cpus
from data_shards.writer import shard_name


def join(plan: Mapping[str, Any], blocks: Sequence[Built], work: Path, own: bool) -> dict[str, Any]:
    """Make a corpus in a work folder.

    Args:
        plan: Record of the plan.
        blocks: Its blocks, in its order.
        work: The work folder.
        own: Whether the blocks were made for this corpus alone: their shards may be moved, and were checked. Otherwise
            they stay as they are, and every byte is checked.

    Returns:
        The manifest.

    Raises:
        UserError: A split has no sample, or a shard is not as it was when it was built.
        OSError: The disk refuses.
    """
    target = work / CORPUS
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    indices: dict[str, Index] = {}
    for split in plan["splits"]:
        filled = [block for block in blocks if split in block.splits]
        if not filled:
            raise UserError(_why_empty(split, blocks))
        folder = target / split
        folder.mkdir()
        _place([shard for block in filled for shard in block.shards(split)], folder, own)
        index = joined(folder, [block.index(split) for block in filled])
        index.save()
        indices[split] = Index.load(folder)
        sync_folder(folder)
    dropped, left_out = Counter[str](), Counter[str]()
    for block in blocks:
        dropped.update(block.record["dropped"])
        left_out.update(block.record["left_out"])
    if plan["skipped"]:
        left_out["cases without a mask file"] = plan["skipped"]
    sources = [item["source"] for block in blocks for item in block.record["cases"]]
    content = {
        **manifests.make(plan["header"], sources, indices, dropped, left_out),
        "repeated_images": _repeated(blocks),
    }
    manifests.write(target, content)
    return content


def _why_empty(split: str, blocks: Sequence[Built]) -> str:
    """Say why a split has no sample: nothing was found in its slices, or it got none."""
    without = sum(block.record["left_out"].get(WITHOUT_TARGET, 0) for block in blocks)
    dropped = sum(sum(block.record["dropped"].values()) for block in blocks)
    if any(block.splits for block in blocks) or not (without or dropped):
        return f"split '{split}' got no slice: widen 'slices' or 'split' in the spec"
    small = f", and {dropped:,} targets were dropped for their size or place" if dropped else ""
    return f"no sample has a target: {without:,} slices were read{small}: correct 'targets' or 'slices' in the spec"


def _repeated(blocks: Sequence[Built]) -> dict[str, int]:
    """Return how many images are there under several names: in several splits, and within one."""
    places: dict[str, list[tuple[str, ...]]] = {}
    for block in blocks:
        for item in block.record["cases"]:
            places.setdefault(item["source"]["image_sha256"], []).append(tuple(block.splits))
    several = [found for found in places.values() if len(found) > 1]
    across = sum(len(set(found)) > 1 for found in several)
    return {"in_several_splits": across, "in_one_split": len(several) - across}


def joined(folder: Path, indices: Sequence[Index]) -> Index:
    """Return the index of shards that were numbered anew, from those of the blocks that they came from.

    Args:
        folder: Folder of the shards.
        indices: The index of each block, in the order of the shards; at least one.
    """
    arrays: dict[str, np.ndarray] = {}
    tables: dict[str, dict[str, int]] = {name: {} for name in TABLES.values()}
    for name, table in TABLES.items():
        known = tables[table]
        for index in indices:
            for entry in getattr(index, table).tolist():
                known.setdefault(entry, len(known))
        numbers = [_renumbered(index, name, table, known) for index in indices]
        arrays[name] = np.concatenate(numbers)
        arrays[table] = np.array(list(known), dtype=str)
    arrays["absent"] = np.zeros(len(tables["terms"]), np.int64)
    for index in indices:
        np.add.at(arrays["absent"], [tables["terms"][term] for term in index.terms.tolist()], index.absent)
    shards = _starts([len(index.shard_names) for index in indices])
    numbers = [index.shard + start for index, start in zip(indices, shards, strict=True)]
    arrays["shard"] = np.concatenate(numbers).astype(np.int32)
    for kind in ("target", "member"):
        cuts = [getattr(index, f"{kind}_start") for index in indices]
        starts = _starts([int(cut[-1]) for cut in cuts])
        firsts = [cut[:-1] + start for cut, start in zip(cuts, starts, strict=True)]
        arrays[f"{kind}_start"] = np.append(np.concatenate(firsts), sum(int(cut[-1]) for cut in cuts)).astype(np.int64)
    samples = zip(indices, _starts([len(index) for index in indices]), strict=True)
    neighbours = [np.where(index.following < 0, -1, index.following + start) for index, start in samples]
    arrays["following"] = np.concatenate(neighbours).astype(np.int32)
    arrays["layout"] = indices[0].layout
    for item in fields(Index):
        if item.name not in ("folder", "sha256", *arrays):
            arrays[item.name] = np.concatenate([getattr(index, item.name) for index in indices])
    count = len(arrays["shard_names"])
    arrays["shard_names"] = np.array([shard_name(number) for number in range(count)], dtype=str)
    return Index(folder=folder, sha256="", **arrays)


def _renumbered(index: Index, name: str, table: str, known: Mapping[str, int]) -> np.ndarray:
    """Return an array of numbers of one table as numbers of the joint one."""
    numbers: np.ndarray = getattr(index, name)
    new = np.array([known[entry] for entry in getattr(index, table).tolist()], dtype=numbers.dtype)
    return new[numbers] if len(new) else numbers


def _starts(counts: Sequence[int]) -> list[int]:
    return list(accumulate(counts, initial=0))[:-1]


def _place(shards: Sequence[Shard], folder: Path, own: bool) -> None:
    """Put shards into a folder under their new names, and check those that others built."""
    targets = [folder / shard_name(number) for number in range(len(shards))]
    if own:
        for shard, target in zip(shards, targets, strict=True):
            _link(shard.path, target, move=True)
        return

    def copy(shard: Shard, target: Path) -> tuple[Shard, bool]:
        _link(shard.path, target, move=False)
        return shard, file_sha256(target) == shard.sha256

    with progress() as bar, ThreadPoolExecutor(min(8, cpus())) as pool:
        task = bar.add_task(f"merge {folder.name}", total=len(shards))
        try:
            for shard, good in pool.map(copy, shards, targets):
                if not good:
                    raise UserError(f"{shard.path}: its SHA-256 is not the recorded one: build this part again")
                bar.advance(task)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _link(path: Path, target: Path, move: bool) -> None:
    """Give a file a second name; where the file system has none, move or copy it."""
    try:
        target.hardlink_to(path)
        return
    except FileNotFoundError:
        raise
    except OSError:
        if move:
            path.rename(target)
            return
    with path.open("rb") as source, target.open("wb") as copy:
        shutil.copyfileobj(source, copy, 2**20)
        copy.flush()
        os.fsync(copy.fileno())
