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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mutate
import numpy as np
from mutate import Rng
from mutate_dicom import damage_dicom
from rich.console import Console

from data_shards import reindex
from data_shards.counts import count_corpus
from data_shards.dataset import ShardDataset
from data_shards.errors import CommandParser, UserError
from data_shards.index import INDEX_NAME, Index
from data_shards.inspect import open_splits, show_corpus
from data_shards.lint.linter import lint
from data_shards.order import Sampling, make_order
from data_shards.readers import Ground, read_drawing, read_mask, read_volume
from data_shards.scan import write_index
from data_shards.stats import show as show_stats
from data_shards.stores import cache as caches
from data_shards.stores import fetch
from data_shards.triplet import Triplet
from data_shards.verify import verify
from data_shards.views import ClipView, SampleView, clip_starts, with_target

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


def check_split(folder: Path, truth: list[bytes] | None = None) -> None:
    """Read all that a folder of shards holds, in every way.

    Args:
        folder: The folder.
        truth: What its samples hold if they can be read, as `fingerprint` says it.
    """
    check_reads(allowed(lambda: ShardDataset(folder, check=False), str(folder)), str(folder), truth)
    check_corpus(folder)


def check_reads(dataset: ShardDataset | None, name: str, truth: list[bytes] | None = None) -> None:
    """Read every sample; those of a sound index come as they were, or are refused."""
    for number in range(len(dataset) if dataset else 0):
        assert dataset is not None
        triplet = allowed(lambda number=number: dataset[number], name)
        if triplet is None:
            # the message names the sample too
            with contextlib.suppress(UserError):
                dataset[number]
            try:
                dataset[number]
            except UserError as error:
                check_line(str(error), f"sample '{dataset.index.key(number)}'")
            continue
        if truth is not None and fingerprint(triplet) != truth[number]:
            raise Finding(f"sample '{triplet.key}' came with other content, and no word")
        for target in triplet.targets:
            mask = allowed(target.mask, f"mask of '{target.term}'")
            if mask is not None and mask.shape != triplet.image.shape[:2]:
                raise Finding(f"the mask has shape {mask.shape}, the image {triplet.image.shape}")
    if dataset:
        dataset.close()


def fingerprint(triplet: Triplet) -> bytes:
    return b"".join(triplet.encode("zstd").values())


def truth_of(folder: Path) -> list[bytes]:
    """Return what the samples of a sound folder hold."""
    if folder not in _TRUTHS:
        _TRUTHS[folder] = [fingerprint(triplet) for triplet in ShardDataset(folder)]
    return _TRUTHS[folder]


_TRUTHS: dict[Path, list[bytes]] = {}


def check_uses(folder: Path) -> None:
    """Use an index as the commands and the training do: what it says may be wrong, but leads nowhere."""
    index = allowed(lambda: Index.load(folder, check=False), str(folder))
    if index is None:
        return
    stats = count_corpus({"train": index})
    show_stats(stats, Console(file=io.StringIO(), width=80))
    for by in ("modality", "dataset"):
        order = allowed(lambda by=by: make_order(index, sampling=Sampling(by)), str(folder), "sampling")
        if order is not None and not all(0 <= place < len(index) for place in order(0, 3)[0]):
            raise Finding("the order leads out of the index")
    starts = allowed(lambda: clip_starts(index, 3, 1), str(folder))
    with_target(index, "instance")
    for number in range(len(index)):
        index.targets(number)
    dataset = allowed(lambda: ShardDataset(folder, check=False), str(folder))
    if dataset is None:  # its layout is damaged
        return
    if starts is not None and starts.any():
        allowed(lambda: ClipView(dataset, 3, negatives_per_image=1)[0, int(np.flatnonzero(starts)[0])], str(folder))
    allowed(lambda: SampleView(dataset, 1, negatives_per_image=2, kinds="semantic")[2, 0], str(folder))
    dataset.close()


def check_lint(folder: Path) -> None:
    report = allowed(lambda: lint(folder), str(folder))
    for finding in report.findings if report else ():
        check_line(finding.message, "")


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
    check_split(work / "train", truth_of(source))
    (work / "train" / INDEX_NAME).unlink()
    if allowed(lambda: write_index(work / "train"), str(work / "train")) is not None:
        check_split(work / "train")
        look(work / "train", rng)


def look(folder: Path, rng: Rng) -> None:
    """Now and then use a folder of shards in other ways than to read it."""
    if rng.random() < 0.1:
        allowed(lambda: show(folder), str(folder))
    if rng.random() < 0.1:
        check_lint(folder)
    if rng.random() < 0.3:
        check_uses(folder)


def index(seeds: Path, work: Path, rng: Rng, number: int) -> None:
    """A damaged index: of every second mutant one array, each in its turn."""
    shutil.copytree(seeds / "corpus" / "train", work / "train")
    path = work / "train" / INDEX_NAME
    turn = None if number % 2 else number // 2
    path.write_bytes(mutate.damage_zip(path.read_bytes(), rng, seeds / "marker", turn))
    check_split(work / "train")
    check_uses(work / "train")
    look(work / "train", rng)


def foreign(seeds: Path, work: Path, rng: Rng) -> None:
    """Damaged tars of other people, under the index that was theirs and under a new one; or a damaged index."""
    source = mutate.pick(rng, sorted(seeds.glob("foreign/*")))
    folder = work / source.name
    shutil.copytree(source, folder)
    path, what = mutate.pick(rng, sorted(folder.glob("*.tar"))), rng.random()
    if what < 0.6:
        path.write_bytes(mutate.damage_shard(path, rng, seeds / "marker"))
        check_split(folder, truth_of(source))
    else:
        path = folder / INDEX_NAME
        data = path.read_bytes()
        layout = what < 0.9
        path.write_bytes(mutate.damage_layout(data, rng) if layout else mutate.damage_zip(data, rng, seeds / "marker"))
        check_split(folder)
        check_uses(folder)
    if rng.random() < 0.5:
        path = folder / INDEX_NAME
        path.unlink()
    options = [mutate.pick(rng, _OPTIONS) for _ in range(int(rng.integers(3)))] if rng.random() < 0.5 else []
    parser = CommandParser()
    reindex.add_arguments(parser)
    values = parser.parse_args([str(folder), *(word for option in options for word in option)])
    with contextlib.redirect_stdout(io.StringIO()):
        done = allowed(lambda: reindex.run(values), str(folder), *(option[0] for option in options))
    if done is not None:
        check_split(folder)
        look(folder, rng)


_OPTIONS = (
    ("--image", "jpg"), ("--image", "txt"), ("--image", "../x"), ("--image", "mask.png"), ("--mask", "mask.png"),
    ("--mask", "mask.png=a\nb"), ("--mask", "seg.npy"), ("--text", "json"), ("--text", "txt"), ("--json", "json"),
    ("--json-term", "annotations"), ("--json-term", "\ud800"), ("--term", "x"), ("--term", "\x1b[31m"),
    ("--terms", "1=a,2=b,3="), ("--terms=-1=a",), ("--terms", "1=" + "x" * 5000), ("--instances",),
    ("--dataset", "\n"), ("--modality", "x" * 2000), ("--patient", "(.)"), ("--patient", "(a+)+$"), ("--patient", "("),
)  # fmt: skip


def cache(seeds: Path, work: Path, rng: Rng) -> None:
    """A damaged cache of remote shards, which is mended without a word; or damaged shards beneath it."""
    source, folder = seeds / "corpus" / "train", work / "train"
    shutil.copytree(source, folder)
    truth: list[bytes] | None = truth_of(source)
    url = f"file://{folder}" if rng.random() < 0.7 else "memory://fuzz/train"
    room = mutate.pick(rng, (None, None, None, None, 0.0, 1e-6))
    with _served(folder, url):
        check_reads(ShardDataset(url, cache=work / "cache"), url, truth)
    what = rng.random()
    if what < 0.7:
        kept = sorted(path for path in (work / "cache").rglob("*") if path.is_file())
        for place in rng.permutation(len(kept))[: int(rng.integers(1, 4))]:
            mutate.damage_place(kept[place], rng, seeds / "marker")
    if what > 0.5:
        path = mutate.pick(rng, sorted(folder.glob("*.tar")))
        path.write_bytes(mutate.damage_shard(path, rng, seeds / "marker"))
    if what > 0.75:
        path = folder / INDEX_NAME
        path.write_bytes(mutate.damage_zip(path.read_bytes(), rng, seeds / "marker"))
        truth = None
    refused = COUNTS["refused"]
    with _served(folder, url):
        for _ in range(2):
            dataset = allowed(lambda: ShardDataset(url, what < 0.5, work / "cache", room), url, str(work / "cache"))
            check_reads(dataset, url, truth)
    if what < 0.5 and COUNTS["refused"] > refused:
        raise Finding("sound shards are refused because of what the cache holds")


@contextlib.contextmanager
def _served(folder: Path, url: str) -> Iterator[None]:
    """Let the files of a folder be had under a URL."""
    import fsspec

    files = fsspec.filesystem("memory")
    if url.startswith("memory:"):
        for path in folder.iterdir():
            files.pipe_file(f"/fuzz/train/{path.name}", path.read_bytes())
    try:
        yield
    finally:
        files.store.clear()


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


KINDS: dict[str, Callable[[Path, Path, Rng, int], None]] = {
    "shard": lambda seeds, work, rng, _: shard(seeds, work, rng),
    "index": index,
    "foreign": lambda seeds, work, rng, _: foreign(seeds, work, rng),
    "cache": lambda seeds, work, rng, _: cache(seeds, work, rng),
    "manifest": lambda seeds, work, rng, _: manifest(seeds, work, rng),
    "dicom": lambda seeds, work, rng, _: files(seeds, work, rng, "dicom/*"),
    "files": lambda seeds, work, rng, _: files(seeds, work, rng, "files/*"),
}


def main(seeds: Path, kind: str, first: int, stop: int, log: Path) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for alarm in (signal.SIGALRM, signal.SIGPROF):
        signal.signal(alarm, signal.SIG_DFL)  # ends the process, wherever it hangs
    warnings.simplefilter("ignore")
    fetch._PAUSES = (0.0, 0.0, 0.0)
    caches._RESERVE = (0.0, 0)  # the disk of the tests may be nearly full
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
                    KINDS[kind](seeds, work, np.random.default_rng([number, *kind.encode()]), number)
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
