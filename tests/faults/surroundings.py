"""What happens around a run: its disk fills up, its data change, its folder vanishes, a batch is poisoned."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cases import ONE, SAME, SHARDED, TWO, WORKERS, Case, after, told
from corpus import write_shards
from harness import TIMEOUT, Lane, Process, Variant, compare, finish, left_by, wait_for

FULL = "No space left on device"


def full(variant: Variant, fault: dict[str, Any], word: str) -> Callable[[Lane], str]:
    """Let files not grow any more, or no new ones be written, on the first rank; then make room."""

    def strike(lane: Lane) -> str:
        lane.undisturbed(variant)
        lane.anew()
        ended = lane.run(variant, {0: fault})
        ended.check_quiet()
        assert set(ended.codes) == {2}, (ended.codes, ended.lines)
        said = [line for line in ended.errors if "lost another rank" not in line]
        assert said and all(word in line or FULL in line for line in said), ended.lines
        return after(lane, variant, ended, f"stopped: {told(said[0].removeprefix('trainer: error: '), lane)}")

    return strike


def small_disk(variant: Variant, size: int, ballast: int) -> Callable[[Lane], str]:
    """A disk (tmpfs) that is too small, or that something else fills up meanwhile; then there is room."""

    def strike(lane: Lane) -> str:
        lane.undisturbed(variant)
        lane.anew()
        disk = lane.home / "disk"
        disk.mkdir(exist_ok=True)
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", disk], capture_output=True)
        if mounted.returncode:
            return "left out: no disk can be mounted here"
        try:
            (disk / "run").mkdir()
            lane.root.symlink_to(disk / "run")
            processes = lane.start(variant, {0: holding(lane, ballast)} if ballast else None)
            if ballast:
                with held(lane, processes[0]):
                    fill(disk)
            ended = finish(processes)
            ended.check_quiet()
            assert set(ended.codes) == {2}, (ended.codes, ended.lines)
            said = [line for line in ended.errors if "lost another rank" not in line]
            assert said and all(FULL in line for line in said), ended.lines
            (disk / "ballast").unlink(missing_ok=True)
            subprocess.run(["mount", "-o", "remount,size=1g", disk], check=True)
            return after(lane, variant, ended, f"stopped: {told(said[0].removeprefix('trainer: error: '), lane)}")
        finally:
            lane.root.unlink(missing_ok=True)
            subprocess.run(["umount", "-l", disk], check=True)

    return strike


def holding(lane: Lane, moment: int) -> dict[str, Any]:
    """Let a run wait after a batch, an even number of them, for what comes from outside: it may end before that."""
    held = str(lane.home / "held")
    return {"at": "hook", "hook": "on_train_batch_start", "step": moment // 2, "do": "hold", "held": held}


@contextmanager
def held(lane: Lane, process: Process) -> Iterator[None]:
    """While a run waits that was told to."""
    place = lane.home / "held"
    end = time.monotonic() + TIMEOUT
    while not place.exists():
        assert process.running and time.monotonic() < end, process.said
        time.sleep(0.001)
    yield
    place.unlink()


def fill(disk: Path) -> None:
    """Leave no byte of a disk."""
    with (disk / "ballast").open("wb", buffering=0) as file:
        for block in (2**20, 2**12):
            try:
                while True:
                    file.write(bytes(block))
            except OSError:
                continue


def full_disks(rng: random.Random) -> Iterator[Case]:
    """At checkpoints, traces, tables and the run's record."""
    kind = "full disk"
    at = {"at": "hook", "hook": "on_train_batch_start", "do": "full"}
    for variant in (ONE, TWO, SHARDED):
        fault = {**at, "step": 3, "bytes": 3_000_000}
        yield Case(
            kind,
            f"{variant.name}: a file cannot grow beyond 3 MB, from step 3",
            full(variant, fault, "File too large"),
            variant is ONE,
        )
    fault = {"at": "hook", "hook": "on_validation_batch_end", "step": 6, "do": "full", "bytes": 700}
    yield Case(
        kind,
        f"{ONE.name}: a file cannot grow beyond 700 bytes, from the validation after step 6",
        full(ONE, fault, "File too large"),
    )
    for path in (
        "recipe.yaml",
        "validation.csv",
        "last.csv",
        "/trace",
        "metrics.csv",
        "run.json",
        ".ckpt.partial",
        ".ckpt.json",
        "last.ckpt.link",
        "panels",
    ):
        nth = 2 if path in ("/trace", "metrics.csv", ".ckpt.partial", ".ckpt.json", "last.ckpt.link") else 1
        fault = {"at": "file", "path": path, "nth": nth, "do": "enospc"}
        yield Case(kind, f"{ONE.name}: {path} cannot be opened, from its change {nth} on", full(ONE, fault, FULL))
    megabyte = 2**20
    yield Case(kind, f"{ONE.name}: a disk of 45 MB (tmpfs)", small_disk(ONE, 45 * megabyte, 0))
    yield Case(kind, f"{SHARDED.name}: a disk of 45 MB (tmpfs)", small_disk(SHARDED, 45 * megabyte, 0))
    for moment in (4, 14):
        yield Case(
            kind,
            f"{ONE.name}: a disk (tmpfs) that fills up after batch {moment}",
            small_disk(ONE, 300 * megabyte, moment),
        )


def changed(
    variant: Variant, moment: int, change: Callable[[Path], None], words: tuple[str, ...]
) -> Callable[[Lane], str]:
    """Change the shards under a run: it tells what changed, or ends as it would have; put back, it goes on."""

    def strike(lane: Lane) -> str:
        lane.undisturbed(variant)
        lane.anew()
        kept = lane.home / "kept"
        shutil.copytree(lane.shards, kept)
        try:
            processes = lane.start(variant)
            wait_for(processes[0], lane.root, moment)
            change(lane.shards / "train")
            ended = finish(processes)
            ended.check_quiet()
            if set(ended.codes) == {0}:
                compare(left_by(lane.root), lane.expected[variant.name])
                return f"ended {SAME}: what it reads was open"
            assert set(ended.codes) == {2}, (ended.codes, ended.lines)
            said = [line for line in ended.errors if "lost another rank" not in line]
            assert said and any(word in said[0] for word in words) and "train/" in said[0], ended.lines
        finally:
            shutil.rmtree(lane.shards)
            kept.rename(lane.shards)
        return after(lane, variant, ended, f"stopped: {told(said[0].removeprefix('trainer: error: '), lane)}")

    return strike


def lose_shards(folder: Path) -> None:
    for path in sorted(folder.glob("*.tar"))[2:]:
        path.unlink()


def cut_shards(folder: Path) -> None:
    for path in sorted(folder.glob("*.tar"))[1:]:
        os.truncate(path, path.stat().st_size // 8)


def flip_shards(folder: Path) -> None:
    for path in folder.glob("*.tar"):
        content = bytearray(path.read_bytes())
        for place in range(1300, len(content), 1000):
            content[place] ^= 16
        path.write_bytes(content)


def build_again(folder: Path) -> None:
    """Put another corpus in the place of the first, file by file, as a build does."""
    other = write_shards(folder.parent.parent / "other", first=100)
    for path in sorted((other / "train").iterdir()):
        path.replace(folder / path.name)
    shutil.rmtree(other)


def build_in_place(folder: Path) -> None:
    """Write another corpus over the first."""
    other = write_shards(folder.parent.parent / "other", first=100)
    for path in sorted((other / "train").iterdir()):
        (folder / path.name).write_bytes(path.read_bytes())
    shutil.rmtree(other)


def data(rng: random.Random) -> Iterator[Case]:
    """Shards that go, shrink, change, or are built again while a run reads them."""
    words = ("changed while it was in use", "cannot be read (No such file", "its bytes changed since the build")
    for what, change in (
        ("shards removed", lose_shards),
        ("shards cut off", cut_shards),
        ("shards with flipped bits", flip_shards),
        ("built again, files replaced", build_again),
        ("built again, written over", build_in_place),
    ):
        for variant, moment in (
            (ONE, 1),
            (ONE, rng.randint(3, 14)),
            (WORKERS, rng.randint(1, 6)),
            (TWO, rng.randint(2, 10)),
        ):
            strike = changed(variant, moment, change, words)
            quick = what.startswith("built again, written") and variant is ONE and moment == 1
            yield Case("data under a run", f"{variant.name}: {what} after batch {moment}", strike, quick)


def vanished(name: str, moment: int) -> Callable[[Lane], str]:
    """Move the run's folder, or one in it, away, and back again."""

    def strike(lane: Lane) -> str:
        lane.undisturbed(ONE)
        lane.anew()
        processes = lane.start(ONE, {0: holding(lane, moment)})
        place, away = lane.root / name, lane.home / "away"
        with held(lane, processes[0]):
            place.rename(away)
        ended = finish(processes)
        if place.exists():  # what was made anew after that
            shutil.rmtree(place)
        away.rename(place)
        if set(ended.codes) == {0}:
            raise AssertionError(ended.lines)
        line = ended.stopped_by()
        return after(lane, ONE, ended, f"stopped: {told(line, lane)}")

    return strike


def poisoned(variant: Variant, hook: str, do: str) -> Callable[[Lane], str]:
    """A loss, or a rank's gradient, that is no number: the step is left out, and named in a file."""

    def strike(lane: Lane) -> str:
        lane.anew()
        nan = {
            rank: {"at": "hook", "hook": hook, "step": 4, "do": do} for rank in range(variant.ranks - 1, variant.ranks)
        }
        ended = lane.run(variant, nan)
        ended.check_quiet()
        assert set(ended.codes) == {0}, ended.lines
        files = sorted((lane.root / "forensics").iterdir())
        assert files, "no forensic file"
        said = next(line for line in ended.lines if "finite" in line or "nan" in line.lower())
        left = left_by(lane.root)
        assert left["step"] == 12 and all(tensor.isfinite().all() for tensor in left["weights"].values())
        return f"went on without that step: {told(said, lane)}"

    return strike


def others(rng: random.Random) -> Iterator[Case]:
    """Vanished folders and poisoned batches."""
    for name in ("", "checkpoints", "logs"):
        yield Case("vanished folder", f"{name or 'the run'} after batch 6", vanished(name, 6))
    for variant in (ONE, TWO, SHARDED):
        what = f"{variant.name}, the last rank's"
        yield Case("NaN", f"{what} gradient in step 4", poisoned(variant, "on_before_optimizer_step", "nan gradient"))
        if variant is not SHARDED:  # which keeps the function that is exchanged here
            yield Case("NaN", f"{what} loss in step 4", poisoned(variant, "on_train_batch_start", "nan"))
