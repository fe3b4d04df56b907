"""Builds a corpus of verified shards from a spec, whole or in parts that are merged later.

Layout: ``OUT/{split}/shard-000000.tar``, ``OUT/{split}/index.npz`` and ``OUT/manifest.json``. Until all of that is
there, the finished blocks of a whole build lie in the hidden folder ``.OUT.partial`` beside it, and those of a part in
``OUT/parts/I-of-N``: a build that was stopped goes on from them.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from data_shards import manifest as manifests
from data_shards.blocks import BLOCKS, build_block, find_block, get_block
from data_shards.convert import Conversion
from data_shards.corpus import PARTS, existing, may_stay
from data_shards.errors import UserError, nearest
from data_shards.join import join
from data_shards.merge import PART_NAME, Part, part_folder
from data_shards.plan import BLOCK_BYTES, PLAN_NAME, Block, Plan, plan_sha256, read_plan
from data_shards.progress import Meter, progress
from data_shards.sources import find_sources
from data_shards.spec import Spec, load_spec
from data_shards.stage import locked, settle, swap, work_folder, workspace, write_json, writing
from data_shards.vocabulary import known, vocabulary
from data_shards.workers import cpus, run

_MOST_WORKERS = 4
"""Processes taken unless the user says otherwise: each holds a volume, and memory is not ours alone."""


@dataclass(frozen=True)
class Effort:
    """What it took to make blocks.

    Attributes:
        blocks: Number of blocks wanted.
        resumed: Those that were there.
        slices: Samples written.
        seconds: Time taken.
        workers: Processes.
    """

    blocks: int = 0
    resumed: int = 0
    slices: int = 0
    seconds: float = 0.0
    workers: int = 1


@dataclass(frozen=True)
class BuildResult:
    """What a build left on disk.

    Attributes:
        out: Folder of the corpus, or of the part.
        reused: Whether it was there already.
        manifest: Content of its ``manifest.json``; empty for a part.
        warnings: What the user should know, one line each.
        effort: What it took.
        part: The part that was built, or None for a whole corpus.
    """

    out: Path
    reused: bool
    manifest: dict[str, Any]
    warnings: tuple[str, ...] = ()
    effort: Effort = Effort()
    part: Part | None = None


@dataclass(frozen=True)
class Job:
    """What a spec asks for.

    Attributes:
        spec: The spec.
        cases: Its cases.
        plan: How they are cut into blocks.
    """

    spec: Spec
    cases: list[Conversion]
    plan: Plan


def prepare(spec_path: str | Path, root: str | Path | None = None) -> Job:
    """Read a spec, find its files and plan the work; no file of a case is read.

    Raises:
        UserError: The spec is wrong, or a file is missing.
    """
    spec_path = Path(spec_path)
    spec = load_spec(spec_path)
    try:
        hasher = spec.hasher()
        skipped: list[str] = []
        sources = find_sources(spec, spec_path, root, skipped)
        rules = spec.split.assign(sources)
        cases = [Conversion.of(source, rule, hasher) for source, rule in zip(sources, rules, strict=True)]
        _check_patients(spec, cases)
        return Job(spec, cases, Plan.of(spec, hasher, cases, len(skipped)))
    except UserError as error:
        raise error if str(spec_path) in str(error) else UserError(f"{spec_path}: {error}") from None


def build(
    spec_path: str | Path,
    out: str | Path,
    root: str | Path | None = None,
    overwrite: bool = False,
    workers: int | None = 1,
) -> BuildResult:
    """Build a corpus, go on with one that was stopped, or find it built already from the same spec and files.

    Args:
        spec_path: The spec (YAML).
        out: Folder of the corpus; it is whole, or as it was before.
        root: Folder of the spec's relative paths; overrides its `root`.
        overwrite: Replace a corpus that was built from something else.
        workers: Processes; 0 and 1 work in this one. None takes as many as the work is worth. The corpus is the same.

    Raises:
        UserError: The spec or a file is wrong, or `out` holds something else; one line.
    """
    out = Path(out)
    job = prepare(spec_path, root)
    settle(out)
    found = existing(out, overwrite)
    if found is not None and _is_the_one(job, job.cases, found, out, overwrite):
        _sweep(out)
        return BuildResult(out, True, found, tuple(_aged(job, found, out)))
    if (out / PARTS).exists():
        raise UserError(f"{out}: holds parts of a build: run `data-shards merge {out}`, or choose another --out")
    work = work_folder(out)
    blocks = job.plan.blocks
    with (
        writing(out),
        workspace(work, f"{out}: another build of it is running: wait for it", partial(_kept, work, len(blocks))),
    ):
        effort = _make(job, blocks, work, workers)
        try:
            content = join(job.plan.record, [get_block(work, block.name) for block in blocks], work, own=True)
        except UserError:
            shutil.rmtree(work / BLOCKS)  # no other spec has use for them
            raise
        swap(work, out)
        shutil.rmtree(work, ignore_errors=True)
    return BuildResult(out, False, content, tuple(surprises(content)), effort)


def build_part(
    spec_path: str | Path,
    out: str | Path,
    number: int,
    of: int,
    root: str | Path | None = None,
    overwrite: bool = False,
    workers: int | None = 1,
) -> BuildResult:
    """Build one part of a corpus into ``OUT/parts``, to be merged with the others, which others may build meanwhile.

    Args:
        spec_path: The spec (YAML).
        out: Folder of the corpus.
        number: Which part, from 1.
        of: How many there are.
        root: Folder of the spec's relative paths; overrides its `root`.
        overwrite: Build it though `out` holds a corpus that was built from something else; `merge` replaces that.
        workers: As of `build`.

    Raises:
        UserError: The spec or a file is wrong, or `out` holds something else; one line.
    """
    out, part = Path(out), part_folder(Path(out), number, of)
    if not 1 <= number <= of:
        raise UserError(f"part {number}/{of}: the first number goes from 1 to the second")
    job = prepare(spec_path, root)
    blocks = job.plan.part(number, of)
    own = [case for block in blocks for case in block.cases]
    found = existing(out, overwrite)
    if found is not None and _is_the_one(job, own, found, out, overwrite):
        return BuildResult(out, True, found, part=part)
    with writing(out), workspace(part.folder, part.busy, partial(_kept, part.folder, len(blocks))):
        content = {"plan_sha256": plan_sha256(job.plan.record), "part": number, "of": of}
        if part.finished != content:
            (part.folder / PART_NAME).unlink(missing_ok=True)
        effort = _make(job, blocks, part.folder, workers)
        if part.finished != content:
            write_json(part.folder / PART_NAME, content)
    return BuildResult(part.folder, effort.resumed == len(blocks) > 0, {}, (), effort, part)


def _check_patients(spec: Spec, cases: Sequence[Conversion]) -> None:
    """Raise if whole cases of one patient, or with one image, go to different splits."""
    if spec.split.shares_patients:
        return
    splits: dict[str, set[str]] = {}
    images: dict[Path, set[str]] = {}
    for case in cases:
        splits.setdefault(case.source.patient, set()).update(case.rule.splits)
        images.setdefault(case.source.image, set()).update(case.rule.splits)
    shared = [f"'{patient}' ({', '.join(sorted(names))})" for patient, names in splits.items() if len(names) > 1]
    if shared:
        more = f" and {len(shared) - 3} more" if len(shared) > 3 else ""
        raise UserError(
            f"split: patients in more than one split, which would flatter every score: {', '.join(shared[:3])}{more}: "
            "give all cases of a patient one split"
        )
    for image, names in images.items():
        if len(names) > 1:
            raise UserError(
                f"split: {image} is the image of cases in {' and '.join(sorted(names))}: give them one patient or split"
            )


def _is_the_one(job: Job, cases: Sequence[Conversion], found: dict[str, Any], out: Path, overwrite: bool) -> bool:
    """Return whether a corpus is the one asked for, of whose cases some are looked at; as `corpus.may_stay`."""
    known = {item["volume"]: item for item in found.get("sources", [])}
    with progress() as bar, ThreadPoolExecutor(cpus()) as pool:
        task = bar.add_task("compare files", total=len(cases))
        try:
            for _ in pool.map(Conversion.hash_files, cases):
                bar.advance(task)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    looked_at = {case.volume for case in cases}
    sources = [
        manifests.source(case) if case.volume in looked_at else known.get(case.volume, {"volume": case.volume})
        for case in job.cases
    ]
    return may_stay(out, found, manifests.origin(job.plan.header, sources), overwrite)


def _make(job: Job, blocks: Sequence[Block], folder: Path, workers: int | None) -> Effort:
    """Build those blocks that are not in a folder yet, and remove those that are no longer wanted."""
    record = job.plan.record
    if read_plan(folder) != record:
        write_json(folder / PLAN_NAME, record)
    (folder / BLOCKS).mkdir(exist_ok=True)
    wanted = {block.name for block in blocks}
    for path in (folder / BLOCKS).iterdir():
        if path.name not in wanted:
            shutil.rmtree(path, ignore_errors=True)
    missing = [block for block in blocks if find_block(folder, block) is None]
    size = sum(block.size for block in missing)
    if workers is None:
        workers = min(_MOST_WORKERS, cpus(), -(-size // BLOCK_BYTES))
    spec = replace(job.spec, cases=job.spec.cases[:1])  # the others are not sent to every worker
    resumed = len(blocks) - len(missing)
    with Meter(len(blocks), size) as meter:
        try:
            run(
                build_block,
                # The largest first, so that no worker is left alone with one at the end.
                [(folder, block, spec) for block in sorted(missing, key=lambda block: -block.size)],
                workers,
                lambda done, size, slices: meter.show(resumed + done, size, slices),
            )
        finally:
            for path in (folder / BLOCKS).glob(".*"):  # those of workers that were ended
                shutil.rmtree(path, ignore_errors=True)
    return Effort(len(blocks), resumed, meter.slices, meter.seconds, max(1, min(workers, len(missing))))


def _kept(folder: Path, wanted: int) -> str | None:
    """Say what a stopped build leaves for the next one; None if that is nothing."""
    count = sum(1 for path in (folder / BLOCKS).glob("[!.]*"))
    if not count:
        return None
    return f"{count} of {wanted} blocks are finished and kept in {folder}: the same command goes on from there"


def _sweep(out: Path) -> None:
    """Remove what a stopped build left beside a corpus that needs none."""
    work = work_folder(out)
    if work.exists():
        with suppress(OSError, UserError), locked(work, ""):
            shutil.rmtree(work)


def _aged(job: Job, found: dict[str, Any], out: Path) -> list[str]:
    """Return a warning if a corpus that stays was built with other versions of what reads and stores images."""
    was, now = found.get("versions") or {}, job.plan.header["versions"]
    changed = [f"{name} {was.get(name)} (now {now[name]})" for name in now if was.get(name) != now[name]]
    if not changed:
        return []
    return [f"{out} was built with {', '.join(changed)}: if that matters, remove it and build it again"]


def surprises(content: dict[str, Any]) -> list[str]:
    """Return what in a new corpus looks like a mistake in its spec, one line each.

    Args:
        content: Its manifest.
    """
    splits = content["splits"].values()
    terms = [target["term"] for target in content["spec"]["targets"]]
    found = [
        f"no sample has a target '{term}': is its name or value in the spec right?"
        for term in terms
        if not content["dropped_targets"].get(term) and not any(split["targets"].get(term) for split in splits)
    ]
    several = content["repeated_images"]["in_several_splits"]
    if several:
        found.append(f"{several:,} images are in several splits under different names: scores will flatter")
    concepts = [name for region in vocabulary().regions.values() for name in region]
    for term in terms:
        if not known(term):
            close = nearest(term, concepts)
            hint = close if close.startswith("; did") else ""
            found.append(f"term '{term}' is not in the vocabulary, and has no synonyms from there{hint}")
    return found + _uncounted(content)


def _uncounted(content: dict[str, Any]) -> list[str]:
    """Return a warning if a corpus holds something else than its publishers say."""
    expected = content["about"]["expected"]
    if expected is None:
        return []
    splits = content["splits"].values()
    images, masks = sum(item["slices"] for item in splits), sum(sum(item["targets"].values()) for item in splits)
    if images == expected["images"] and expected["masks"] in (None, masks):
        return []
    told = f"{expected['images']:,} images" + ("" if expected["masks"] is None else f", {expected['masks']:,} masks")
    return [f"expected {told}: built {images:,} and {masks:,}"]
