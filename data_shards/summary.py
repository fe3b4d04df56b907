"""What the commands `build` and `merge` say on the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from data_shards.build import BuildResult, Effort, Job
from data_shards.display import make_table
from data_shards.index import Index
from data_shards.progress import clock

_MOST_TERMS = 30
"""Terms that are listed; a data set of every organ has hundreds."""
_MOST_REASONS = 12
_CASES_SHOWN = 5


def show(result: BuildResult, console: Console) -> None:
    """Print what was built, and where it is."""
    if result.part is not None:
        _show_part(result, console)
        return
    show_corpus(result.out, result.manifest, console)
    _show_effort(result.effort, console)
    console.print(f"{'reused' if result.reused else 'built'} {result.out}", highlight=False, soft_wrap=True)


def show_corpus(folder: Path, manifest: Mapping[str, Any], console: Console) -> None:
    """Print the tables of a corpus, and what is not in it."""
    table = make_table("split", "slices", "targets", "patients", "shards", "MB")
    for name, split in manifest["splits"].items():
        counts = (split["slices"], sum(split["targets"].values()), split["patients"], split["shards"])
        table.add_row(name, *(f"{count:,}" for count in counts), f"{split['bytes'] / 1e6:.1f}")
    console.print(table)
    _show_terms(folder, manifest, console)
    reason = _reason(manifest["spec"].get("slices") or {})
    for term, count in manifest.get("dropped_targets", {}).items():
        console.print(f"dropped {count:,} targets '{term}' {reason}", soft_wrap=True)
    left_out = sorted(manifest.get("left_out", {}).items(), key=lambda item: -item[1])
    for reason, count in left_out[:_MOST_REASONS]:
        console.print(f"left out: {count:,} {reason}", soft_wrap=True)
    if len(left_out) > _MOST_REASONS:
        console.print(f"… and {len(left_out) - _MOST_REASONS:,} more reasons; manifest.json has all")
    for note in manifest.get("notes", []):
        console.print(f"note: {note}", soft_wrap=True)
    expected = manifest.get("about", {}).get("expected")
    if expected is not None:
        splits = manifest["splits"].values()
        built = (sum(split["slices"] for split in splits), sum(sum(split["targets"].values()) for split in splits))
        pairs = zip(("images", "masks"), expected.values(), built, strict=True)
        known = [(name, count, found) for name, count, found in pairs if count is not None]
        told = ", ".join(f"{count:,} {name}" for name, count, _ in known)
        console.print(f"expected {told}: built {', '.join(f'{found:,}' for *_, found in known)}", soft_wrap=True)


def show_plan(job: Job, console: Console) -> None:
    """Print what a build would do."""
    plan, groups = job.plan, dict[str, tuple[int, int, int]]()
    for block in plan.blocks:
        name = " and ".join(block.cases[0].rule.splits)
        blocks, cases, size = groups.get(name, (0, 0, 0))
        groups[name] = (blocks + 1, cases + len(block.cases), size + block.size)
    table = make_table("split", "cases", "blocks", "MB of images")
    for name, (blocks, cases, size) in groups.items():
        table.add_row(name, f"{cases:,}", f"{blocks:,}", f"{size / 1e6:.1f}")
    console.print(table)
    for case in job.cases[:_CASES_SHOWN]:
        source = case.source
        console.print(f"{source.id}: patient {source.patient if source.patient_known else 'unknown'}", soft_wrap=True)
        console.print(f"  image {source.image}", soft_wrap=True)
        for name, paths in source.masks.items():
            files = ", ".join(map(str, paths[:3])) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")
            console.print(f"  mask {name + ' ' if name else ''}{files or '(none)'}", soft_wrap=True)
    if len(job.cases) > _CASES_SHOWN:
        console.print(f"… and {len(job.cases) - _CASES_SHOWN:,} more cases")
    if plan.skipped:
        console.print(f"left out: {plan.skipped:,} cases without a mask file")
    for note in plan.header["notes"]:
        console.print(f"note: {note}", soft_wrap=True)
    console.print("nothing was built")


def _show_part(result: BuildResult, console: Console) -> None:
    if result.manifest:
        console.print(f"reused {result.out}: the corpus is there already", soft_wrap=True)
        return
    _show_effort(result.effort, console)
    if not result.effort.blocks:
        console.print(f"{result.part} is empty: there are fewer blocks than parts")
    console.print(f"{'reused' if result.reused else 'built'} {result.out}", highlight=False, soft_wrap=True)


def _show_effort(effort: Effort, console: Console) -> None:
    if effort.resumed:
        console.print(f"resumed: {effort.resumed:,} of {effort.blocks:,} blocks were there")
    if effort.slices:
        rate = effort.slices / max(effort.seconds, 1e-9)
        workers = f", {effort.workers} workers" if effort.workers > 1 else ""
        console.print(f"{effort.slices:,} slices in {clock(effort.seconds)}, {rate:,.0f}/s{workers}")


def _show_terms(folder: Path, manifest: Mapping[str, Any], console: Console) -> None:
    """Print how many targets each term has, and how large they are."""
    areas: dict[str, list[np.ndarray]] = {}
    for split in manifest["splits"]:
        index = Index.load(folder / split, check=False)
        for number, term in enumerate(index.terms.tolist()):
            areas.setdefault(term, []).append(index.target_area[index.target_term == number])
    table = make_table("term", "targets", "median area (px)")
    for term in sorted(areas)[:_MOST_TERMS]:
        area = np.concatenate(areas[term])
        table.add_row(term, f"{len(area):,}", f"{np.median(area):,.0f}" if area.size else "")
    console.print(table)
    if len(areas) > _MOST_TERMS:
        console.print(f"… and {len(areas) - _MOST_TERMS:,} more terms: `data-shards inspect` lists them")


def _reason(slices: Mapping[str, Any]) -> str:
    """Say why the spec drops targets."""
    names = [name for name in ("min_area", "min_voxels") if slices.get(name, 1) > 1]
    reasons = [f"below {' or '.join(names)}"] if names else []
    return " or ".join([*reasons, *(["at the border"] if slices.get("border") == "drop" else [])])
