"""The process of the fuzz: damages files, reads them, and writes down what happened, one line a mutant.

Usage: ``fuzz_worker.py SEEDS KIND FIRST STOP LOG``. The folder SEEDS is that of `test_fuzz.plant`.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import resource
import shutil
import signal
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mutate
import numpy as np
from mutate import Rng
from mutate_dicom import damage_dicom
from rich.console import Console

from data_shards.dataset import ShardDataset
from data_shards.errors import UserError
from data_shards.index import INDEX_NAME
from data_shards.inspect import open_splits, show_corpus
from data_shards.readers import Ground, read_drawing, read_mask, read_volume
from data_shards.scan import write_index
from data_shards.verify import verify

CPU_SECONDS, SECONDS = 5, 60
"""Of work and of waiting, after which a mutant is taken to hang; a machine may be busy with something else."""
MEMORY = 4 * 2**30


COUNTS, REASONS = Counter[str](), Counter[str]()
"""How many calls came back, and how those that did not were refused."""


class Finding(Exception):  # noqa: N818  # it is what is looked for
    """What must not happen."""


def allowed(call: Callable[[], Any], *names: str) -> Any:
    """Call; a `UserError` on one line that has one of the names is fine and gives None."""
    try:
        result = call()
        COUNTS["read"] += 1
        return result
    except UserError as error:
        check_line(str(error), *names)
        COUNTS["refused"] += 1
        REASONS[re.sub(r"[\d.]+|'[^']*'|/\S+", "*", str(error))[:90]] += 1
        return None


def check_line(line: str, *names: str) -> None:
    if not any(name in line for name in names):
        raise Finding(f"the message does not name {' or '.join(names)}: {line}")
    if re.search("[\x00-\x1f\x7f-\x9f\u2028-\u202e\ud800-\udfff]", line):
        raise Finding(f"the message is not one line of text: {line}")


def check_split(folder: Path) -> None:
    """Read all that a folder of shards holds, in every way."""
    dataset = allowed(lambda: ShardDataset(folder, check=False), str(folder))
    for number in range(len(dataset) if dataset else 0):
        triplet = allowed(lambda number=number: dataset[number], str(folder))
        if triplet is None:
            # the message names the sample too
            with contextlib.suppress(UserError):
                dataset[number]
            try:
                dataset[number]
            except UserError as error:
                check_line(str(error), f"sample '{dataset.index.key(number)}'")
            continue
        for target in triplet.targets:
            mask = allowed(target.mask, f"mask of '{target.term}'")
            if mask is not None and mask.shape != triplet.image.shape[:2]:
                raise Finding(f"the mask has shape {mask.shape}, the image {triplet.image.shape}")
    if dataset:
        dataset.close()
    check_corpus(folder)


def check_corpus(folder: Path) -> None:
    result = allowed(lambda: verify(folder), str(folder))
    for problem in result.problems if result else ():
        check_line(problem, str(folder), "patient ")


def show(folder: Path) -> None:
    show_corpus(open_splits(folder), Console(file=io.StringIO(), width=80))


def shard(seeds: Path, work: Path, rng: Rng) -> None:
    """A damaged shard under its old index, and under a new one."""
    source = mutate.pick(rng, sorted(seeds.glob("corpus/*")))
    if not source.is_dir():
        source = seeds / "corpus" / "train"
    shutil.copytree(source, work / "train")
    path = mutate.pick(rng, sorted((work / "train").glob("*.tar")))
    path.write_bytes(mutate.damage_shard(path, rng, seeds / "marker"))
    check_split(work / "train")
    (work / "train" / INDEX_NAME).unlink()
    if allowed(lambda: write_index(work / "train"), str(work / "train")) is not None:
        check_split(work / "train")
        if rng.random() < 0.1:
            allowed(lambda: show(work / "train"), str(work / "train"))


def index(seeds: Path, work: Path, rng: Rng) -> None:
    """A damaged index."""
    shutil.copytree(seeds / "corpus" / "train", work / "train")
    path = work / "train" / INDEX_NAME
    path.write_bytes(mutate.damage_zip(path.read_bytes(), rng, seeds / "marker"))
    check_split(work / "train")
    if rng.random() < 0.1:
        allowed(lambda: show(work / "train"), str(work / "train"))


def manifest(seeds: Path, work: Path, rng: Rng) -> None:
    """A damaged manifest."""
    shutil.copytree(seeds / "corpus", work / "corpus")
    path = work / "corpus" / "manifest.json"
    path.write_bytes(mutate.damage_json(path.read_bytes(), rng))
    allowed(lambda: open_splits(work / "corpus"), str(work))
    if rng.random() < 0.3:
        check_corpus(work / "corpus")


_DAMAGE: dict[str, Callable[[bytes, Rng], bytes]] = {
    ".json": mutate.damage_json,
    ".png": mutate.damage_png,
    ".gz": mutate.damage_gzip,
    ".dcm": damage_dicom,
}


def files(seeds: Path, work: Path, rng: Rng, pattern: str) -> None:
    """A damaged file of another format: as an image, as a mask, and as a drawing over a sound image."""
    source = mutate.pick(rng, [path for path in sorted(seeds.glob(pattern)) if path.suffix not in (".raw", ".zraw")])
    folder = work / "in"
    if source.is_dir():
        shutil.copytree(source, folder)
        path = mutate.pick(rng, sorted(folder.iterdir()))
    else:
        folder.mkdir()
        for other in source.parent.glob(f"{source.name.partition('.')[0]}.*"):  # a header and its data
            shutil.copy(other, folder)
        path = mutate.pick(rng, sorted(folder.iterdir()))
    if path.suffix == ".npz":
        data = mutate.damage_zip(path.read_bytes(), rng, seeds / "marker")
    else:
        data = _DAMAGE.get(path.suffix, mutate.damage)(path.read_bytes(), rng)
    path.write_bytes(data)
    what = folder if source.is_dir() else folder / source.name
    names = (str(folder), path.name)
    drawn = source.name.startswith(("seg", "regions")) or source.suffix == ".json"
    if not drawn:
        read: Callable[[], Any] = lambda: read_volume(what)  # noqa: E731
        allowed(read, *names)
        allowed(lambda: read_mask(what), *names)
    ground = seeds / "ground" / ("series" if source.suffix == ".dcm" else "a.png")
    if drawn or rng.random() < 0.3:
        allowed(lambda: read_drawing(what, Ground(ground, _ground(ground))), *names, ground.name)


def _ground(path: Path) -> Any:
    if path not in _GROUNDS:
        _GROUNDS[path] = read_volume(path)
    return _GROUNDS[path]


_GROUNDS: dict[Path, Any] = {}


def broken(number: int) -> None:
    """What must not happen, to see that it is found."""
    if number == 0:
        raise ValueError("x")
    if number == 1:
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        signal.pause()
    elif number == 6:
        signal.setitimer(signal.ITIMER_PROF, 0.3)
        while True:
            pass
    elif number == 2:
        os.abort()
    elif number == 3:
        bytes(5 * 2**30)
    elif number == 4:
        check_line("a message without a name", "a.tar")
    elif number == 5:
        sys.exit(0)


KINDS: dict[str, Callable[[Path, Path, Rng], None]] = {
    "shard": shard,
    "index": index,
    "manifest": manifest,
    "dicom": lambda seeds, work, rng: files(seeds, work, rng, "dicom/*"),
    "files": lambda seeds, work, rng: files(seeds, work, rng, "files/*"),
}


def main(seeds: Path, kind: str, first: int, stop: int, log: Path) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for alarm in (signal.SIGALRM, signal.SIGPROF):
        signal.signal(alarm, signal.SIG_DFL)  # ends the process, wherever it hangs
    warnings.simplefilter("ignore")
    work = seeds / f"work-{kind}"
    with log.open("a", buffering=1) as lines:
        for number in range(first, stop):
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir()
            lines.write(f"start {number}\n")
            signal.setitimer(signal.ITIMER_REAL, SECONDS)
            signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            try:
                if kind == "broken":
                    broken(number)
                else:
                    KINDS[kind](seeds, work, np.random.default_rng([number, *kind.encode()]))
                grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
                outcome = "ok" if grown < 1_500_000 else f"BAD it took {grown / 1e6:.1f} GB"
            except BaseException as error:
                place = traceback.extract_tb(error.__traceback__)[-1]
                text = f"{type(error).__name__}: {error} ({place.filename}:{place.lineno})"
                outcome = "BAD " + " ".join(text.encode("ascii", "backslashreplace").decode().split())
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.setitimer(signal.ITIMER_PROF, 0)
            lines.write(f"end {number} {outcome}\n")
        lines.write(f"total {COUNTS['read']} read, {COUNTS['refused']} refused for {len(REASONS)} reasons\n")
    if "SAM_TRAINER_FUZZ_REASONS" in os.environ:
        print("\n".join(f"{count} {reason}" for reason, count in REASONS.most_common()))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), Path(sys.argv[5]))
