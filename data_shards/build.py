"""Builds a corpus of verified shards from a spec.

Layout: ``OUT/{split}/shard-000000.tar``, ``OUT/{split}/index.npz`` and ``OUT/manifest.json``.
"""

from __future__ import annotations

import fcntl
import glob
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from data_shards import manifest as manifests
from data_shards.convert import Conversion
from data_shards.errors import UserError
from data_shards.index import Index, write_index
from data_shards.progress import progress
from data_shards.sources import find_sources
from data_shards.spec import Hasher, Spec, load_spec
from data_shards.writer import ShardWriter


@dataclass(frozen=True)
class BuildResult:
    """What a build left on disk.

    Attributes:
        out: Folder of the corpus.
        reused: Whether it was there already.
        manifest: Content of its ``manifest.json``.
        warnings: What the user should know, one line each.
    """

    out: Path
    reused: bool
    manifest: dict[str, Any]
    warnings: tuple[str, ...] = ()


def build(
    spec_path: str | Path, out: str | Path, root: str | Path | None = None, overwrite: bool = False
) -> BuildResult:
    """Build a corpus, or find it built already from the same spec and files.

    Everything goes into a hidden folder beside `out`, which takes its place at the very end: an error leaves nothing.

    Args:
        spec_path: The spec (YAML).
        out: Folder of the corpus.
        root: Folder of the spec's relative paths; overrides its `root`.
        overwrite: Replace a corpus that was built from something else.

    Raises:
        UserError: The spec or a file is wrong, or `out` holds something else; one line.
    """
    spec_path, out = Path(spec_path), Path(out)
    spec = load_spec(spec_path)
    try:
        hasher = spec.hasher()
        cases = _cases(spec, spec_path, root, hasher)
    except UserError as error:
        raise error if str(spec_path) in str(error) else UserError(f"{spec_path}: {error}") from None
    existing = _existing(out, overwrite)
    if existing is not None:
        reused = _reuse(spec, hasher, cases, existing, out, overwrite)
        if reused is not None:
            return reused
    warnings = _shared_patients(spec, cases)
    with _staged(out) as folder:
        indices = _write(spec, cases, folder)
        content = manifests.make(spec, hasher, cases, indices, warnings)
        manifests.write(folder, content)
    return BuildResult(out, False, content, tuple(warnings))


def show(result: BuildResult, console: Console) -> None:
    """Print the table of a corpus and where it is."""
    table = Table()
    table.add_column("split")
    for name in ("slices", "targets", "patients", "MB"):
        table.add_column(name, justify="right")
    for name, split in result.manifest["splits"].items():
        numbers = (split["slices"], sum(split["targets"].values()), split["patients"])
        table.add_row(name, *(f"{number:,}" for number in numbers), f"{split['bytes'] / 1e6:.1f}")
    console.print(table)
    for term, count in result.manifest["dropped_below_min_area"].items():
        console.print(f"dropped {count} targets '{term}' below min_area")
    console.print(f"{'reused' if result.reused else 'built'} {result.out}", highlight=False, soft_wrap=True)


def _cases(spec: Spec, spec_path: Path, root: str | Path | None, hasher: Hasher) -> list[Conversion]:
    """Find the files and their splits; sorted by hash, so that samples come sorted by key."""
    sources = find_sources(spec, spec_path, root)
    rules = spec.split.assign(sources)
    cases = [Conversion.of(source, rule, hasher) for source, rule in zip(sources, rules, strict=True)]
    return sorted(cases, key=lambda case: case.volume)


def _existing(out: Path, overwrite: bool) -> dict[str, Any] | None:
    """Return the manifest of what is at `out`, empty if it is damaged and to be replaced; None where nothing is."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    try:
        found = manifests.read(out) if out.is_dir() else None
    except UserError:
        if overwrite:
            return {}
        raise
    if found is None:
        raise UserError(f"{out}: exists and is no corpus: choose another --out")
    return found


def _reuse(
    spec: Spec, hasher: Hasher, cases: Sequence[Conversion], existing: dict[str, Any], out: Path, overwrite: bool
) -> BuildResult | None:
    """Return the existing corpus if it is the one asked for and complete; None if it shall be replaced."""
    for case in cases:
        case.hash_files()
    different = manifests.differences(existing, manifests.origin(spec, hasher, cases))
    if not different:
        try:
            for name in existing["splits"]:
                Index.load(out / name)
            return BuildResult(out, True, existing)
        except UserError as error:
            different = [f"damage ({error})"]
    if not overwrite:
        raise UserError(
            f"{out}: holds another corpus; what differs: {', '.join(different)}: pass --overwrite to replace it"
        )
    return None


def _shared_patients(spec: Spec, cases: Sequence[Conversion]) -> list[str]:
    """Return a warning if whole cases of one patient go to different splits."""
    if spec.split.shares_patients:
        return []
    splits: dict[str, set[str | None]] = {}
    for case in cases:
        splits.setdefault(case.patient, set()).add(case.rule(0))
    shared = sum(len(names) > 1 for names in splits.values())
    if not shared:
        return []
    return [f"{shared} of {len(splits)} patients are in more than one split: scores will flatter"]


@contextmanager
def _staged(out: Path) -> Iterator[Path]:
    """Yield a hidden folder beside `out` that becomes `out` on success and is removed on any error."""
    place = out.resolve()  # a link stays a link, and the corpus lies where it points
    folder = place.with_name(f".{place.name}.{secrets.token_hex(6)}.partial")
    made = [parent for parent in place.parents if not parent.exists()]
    try:
        _sweep(place)
        folder.mkdir(parents=True)
        with ExitStack() as stack:
            with suppress(OSError):  # some file systems have no locks: there, nothing is ever swept
                stack.enter_context(_locked(folder))
            yield folder
            _swap(folder, place)
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        for parent in made:
            if parent.is_dir() and not any(parent.iterdir()):
                parent.rmdir()
        if isinstance(error, OSError):
            raise UserError(f"{out}: cannot be written ({error.strerror or error}): choose another --out") from error
        raise


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the lock on a folder that tells other builds that its own is alive.

    Raises:
        OSError: Someone else holds it, or the file system has no locks.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


def _sweep(out: Path) -> None:
    """Remove the hidden folders of builds of `out` that were killed: nobody holds their locks."""
    for folder in out.parent.glob(f".{glob.escape(out.name)}.*.partial"):
        with suppress(OSError), _locked(folder):
            shutil.rmtree(folder)


def _swap(folder: Path, out: Path) -> None:
    """Put the new corpus in the place of the old one, if any; the old one goes last."""
    if not out.exists():
        folder.rename(out)
        return
    old = folder.with_suffix(".old")
    out.rename(old)
    try:
        folder.rename(out)
    except OSError:
        old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _write(spec: Spec, cases: Sequence[Conversion], folder: Path) -> dict[str, Index]:
    """Write the shards and indices of all splits."""
    names = spec.split.split_names([case.source for case in cases])
    kept = dict.fromkeys(names, 0)
    with ExitStack() as stack:
        limits = (spec.shards.max_samples, spec.shards.max_bytes)
        writers = {name: stack.enter_context(ShardWriter(folder / name, *limits)) for name in names}
        bar = stack.enter_context(progress())
        task = bar.add_task("slices", total=None)
        for number, case in enumerate(cases):
            volume, labels = case.read(spec)
            done = int(bar.tasks[task].completed)
            expected = len(case.wanted(spec, _depth(labels.array.shape, spec.slices.axis)))
            # The cases to come are taken to be as deep as those so far.
            bar.update(task, total=(done + expected) * len(cases) // (number + 1))
            for split, triplet in case.samples(spec, volume, labels):
                if triplet is not None:
                    writers[split].write(triplet.key, triplet.encode())
                    kept[split] += 1
                bar.advance(task)
    for name, count in kept.items():
        if not count:
            raise UserError(f"split '{name}' got no slice: widen 'slices' or 'split' in the spec")
    return {name: write_index(folder / name) for name in names}


def _depth(shape: tuple[int, ...], axis: str) -> int:
    return shape[("axial", "coronal", "sagittal").index(axis)]
