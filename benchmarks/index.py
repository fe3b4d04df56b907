"""How long does an index of a million samples take to open, to shuffle and to read a first batch from?

python benchmarks/index.py             # under two minutes; --quick measures the same with fewer repeats

1,000 samples of real slices of 512 × 512 (see `benchmarks/samples.py`) are stored as npy.zst in one shard. A million of
them are 1,000 hard links to that shard and an index that lists all: keys of their own, 3.4 targets each, 20,000
patients, 25,000 volumes of 40 slices, three modalities of 70, 25 and 5 %. Figures are medians over several fresh
processes, or over calls in one of them, with the files in the page cache.

The last line is one JSON object:
  benchmark            "index"
  quick                whether --quick was given
  samples, targets, shards  what the index lists
  file_mb              size of the index file, in 10^6 bytes
  open_seconds         `Index.load(check=False)`, in a process that has imported it
  open_checked_seconds `Index.load(check=True)`: every shard is looked at too
  rss_mb               by how much opening raises the process's most memory ever resident, in 10^6 bytes; pages of the
                       mapped file are part of it, and are shared by all processes of a machine
  rss_own_mb           the same without the pages of files
  first_batch_seconds  from the start of Python to the first 8 decoded samples: imports, opening, order, reading
  first_batch_without_imports_seconds  the same, from when all is imported
  datamodule_setup_seconds  `TripletDataModule.setup` and the making of its training loader, likewise
  shuffle_seconds      `epoch_order` of all samples
  weighted_seconds     {"make", "epoch"}: the making of an order by modality, and one epoch of it
  row_us               one sample at random: its key, members and targets as the index has them
  read_us              its bytes, checked
  getitem_us           `ShardDataset[i]`: its image and targets
  stats_seconds        `data-shards stats` of all, from the start of Python
  tar_seconds          to list as many samples from the tars themselves, with Python's `tarfile`: one shard's time times
                       their number
  ratio                `tar_seconds` divided by `open_seconds`
  bar                  by name {"value", "needed", "met"}: open_seconds, rss_mb, first_batch_seconds
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

BASE = 1000
"""Samples that are really stored."""
BATCH = 8
PER_PATIENT, PER_VOLUME = 50, 40
MODALITIES = {"CT": 0.7, "MR": 0.25, "US": 0.05}
BAR = {"open_seconds": 1.0, "rss_mb": 400.0, "first_batch_seconds": 5.0}


# --- the index


def write_base(folder: Path) -> None:
    """Write the shard that all others are links to, and its index."""
    from samples import encoded, slices, write_shards

    write_shards(folder, [encoded(source, "zstd") for source in slices(20)], BASE, BASE)


def grow(base: Path, folder: Path, count: int) -> None:
    """Write an index of `count` samples, a multiple of `BASE`, over links to the base's shard."""
    from data_shards.index import Index
    from data_shards.index_file import ARRAYS

    index, copies = Index.load(base), count // BASE
    folder.mkdir()
    names = [f"shard-{number:06d}.tar" for number in range(copies)]
    for name in names:
        os.link(base / str(index.shard_names[0]), folder / name)
    number = np.arange(count)
    grown: dict[str, np.ndarray] = {
        name: np.tile(getattr(index, name), copies)
        for name, (_, length) in ARRAYS.items()
        if length in "SNMT" and length
    }
    for name in ("member_start", "target_start"):
        grown[name] = np.append(0, np.cumsum(np.tile(np.diff(getattr(index, name)), copies)))
    edges = np.cumsum(list(MODALITIES.values()))[:-1] * copies
    grown |= {
        "shard_names": np.array(names),
        "shard": np.repeat(np.arange(copies), BASE),
        "raw_keys": np.char.mod("icbm-%09d", number).astype(bytes),
        "absent": index.absent * copies,
        "modalities": np.array(list(MODALITIES)),
        "modality": np.searchsorted(edges, number // BASE, side="right"),
        "patients": hashes(-(-count // PER_PATIENT)),
        "patient": number // PER_PATIENT,
        "volumes": hashes(-(-count // PER_VOLUME)),
        "volume": number // PER_VOLUME,
        "slice_index": number % PER_VOLUME,
        "following": np.where((number % PER_VOLUME == PER_VOLUME - 1) | (number == count - 1), -1, number + 1),
    }
    typed = {name: array.astype(getattr(index, name).dtype.type) for name, array in grown.items()}
    replace(index, folder=folder, **typed).save()


def hashes(count: int) -> np.ndarray:
    return np.char.mod("%016x", np.random.default_rng(0).permutation(count) + 2**60)


# --- what is measured, each in a process of its own


def measure_open(folder: Path) -> dict[str, float]:
    from data_shards.index import Index

    before, own_before = peak_mb(), own_mb()
    start = time.perf_counter()
    index = Index.load(folder, check=False)
    seconds = time.perf_counter() - start
    result = {"open_seconds": seconds, "rss_mb": peak_mb() - before, "rss_own_mb": own_mb() - own_before}
    return {**result, "samples": len(index), "targets": len(index.target_term), "shards": len(index.shard_names)}


def measure_checked(folder: Path) -> dict[str, float]:
    from data_shards.index import Index

    start = time.perf_counter()
    Index.load(folder, check=True)
    return {"open_checked_seconds": time.perf_counter() - start}


def measure_first_batch(folder: Path) -> dict[str, float]:
    from data_shards.dataset import ShardDataset
    from data_shards.loader import SampleView, TripletLoader
    from data_shards.sampler import GlobalOrderSampler

    start = time.perf_counter()
    shards = ShardDataset(folder)
    loader = TripletLoader(SampleView(shards), GlobalOrderSampler(len(shards), BATCH, BATCH, 0, 1, 0))
    assert len(next(iter(loader))) == BATCH
    return {"first_batch_without_imports_seconds": time.perf_counter() - start, "now": time.time()}


def measure_tar(folder: Path) -> dict[str, float]:
    import tarfile

    def listed(_: int) -> None:
        with tarfile.open(next(iter(sorted(folder.glob("*.tar"))))) as tar:
            assert len(tar.getmembers()) == 2 * BASE

    return {"tar_shard_seconds": median_of(listed, 5)}


def measure_datamodule(folder: Path) -> dict[str, float]:
    from data_shards.datamodule import TripletDataModule

    start = time.perf_counter()
    data = TripletDataModule(train=str(folder), batch_size=BATCH, micro_batch_size=BATCH, seed=0)
    data.setup("fit")
    data.train_dataloader()
    return {"datamodule_setup_seconds": time.perf_counter() - start}


def measure_orders(folder: Path) -> dict[str, float]:
    from data_shards.index import Index
    from data_shards.order import Sampling, epoch_order, make_order

    index = Index.load(folder, check=False)
    result = {"shuffle_seconds": median_of(lambda epoch: epoch_order(len(index), 0, epoch), 5)}
    result["make"] = median_of(lambda _: make_order(index, None, Sampling("modality")), 3)
    order = make_order(index, None, Sampling("modality"))
    result["epoch"] = median_of(lambda epoch: order(0, epoch), 3)
    return result


def measure_samples(folder: Path) -> dict[str, float]:
    from data_shards.dataset import ShardDataset

    dataset = ShardDataset(folder, check=False)
    index = dataset.index
    numbers = np.random.default_rng(1).integers(0, len(dataset), 500).tolist()

    def row(number: int) -> None:
        index.key(number), index.members(number), index.targets(number)

    def microseconds(call: Callable[[int], object]) -> float:
        for number in numbers[:20]:
            call(number)
        return median_of(lambda turn: call(numbers[turn]), len(numbers)) * 1e6

    return {
        "row_us": microseconds(row),
        "read_us": microseconds(dataset.read),
        "getitem_us": microseconds(dataset.__getitem__),
    }


MEASURES: dict[str, Callable[[Path], dict[str, float]]] = {
    "open": measure_open,
    "checked": measure_checked,
    "first_batch": measure_first_batch,
    "datamodule": measure_datamodule,
    "orders": measure_orders,
    "samples": measure_samples,
    "tar": measure_tar,
}

SEVERAL_CALLS = ("orders", "samples", "tar")
"""Those that are medians already."""


def median_of(call: Callable[[int], object], count: int) -> float:
    seconds = []
    for number in range(count):
        start = time.perf_counter()
        call(number)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def peak_mb() -> float:
    """Return the most memory ever resident, in 10^6 bytes."""
    # Linux hands the parent's peak down in `getrusage`, so its own figure is taken where there is one.
    return _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (
        1e6 if sys.platform == "darwin" else 1e3
    )


def own_mb() -> float:
    """Return the memory resident now that is no file's, in 10^6 bytes; 0 where the system does not tell."""
    return _status("RssAnon")


def _status(name: str) -> float:
    path = Path("/proc/self/status")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith(f"{name}:")), 0.0)


def in_fresh_process(what: str, folder: Path, repeats: int) -> dict[str, float]:
    """Return the medians of what a measure gives, and its seconds from the start of Python."""
    rows = []
    for _ in range(repeats):
        start = time.time()
        command = [sys.executable, __file__, "--measure", what, str(folder)]
        row = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
        rows.append({**row, "since_start": row.get("now", 0) - start})
    return {name: statistics.median(row[name] for row in rows) for name in rows[0]}


def measure(folder: Path, repeats: int) -> dict[str, Any]:
    """Return the figures of the result."""
    from measuring import say

    found: dict[str, float] = {}
    for what in MEASURES:
        say(f"measuring: {what}")
        found |= in_fresh_process(what, folder, 1 if what in SEVERAL_CALLS else repeats)
        if what == "first_batch":
            found["first_batch_seconds"] = found["since_start"]
    listing = found["tar_shard_seconds"] * found["shards"]
    names = (
        "open_seconds", "open_checked_seconds", "rss_mb", "rss_own_mb", "first_batch_seconds",
        "first_batch_without_imports_seconds", "datamodule_setup_seconds", "shuffle_seconds",
    )  # fmt: skip
    return {
        **{name: int(found[name]) for name in ("samples", "targets", "shards")},
        "file_mb": (folder / "index.npz").stat().st_size / 1e6,
        **{name: found[name] for name in names},
        "weighted_seconds": {"make": found["make"], "epoch": found["epoch"]},
        **{name: found[name] for name in ("row_us", "read_us", "getitem_us")},
        "stats_seconds": stats_seconds(folder),
        "tar_seconds": listing,
        "ratio": listing / found["open_seconds"],
        "bar": {
            name: {"value": found[name], "needed": needed, "met": found[name] < needed} for name, needed in BAR.items()
        },
    }


def stats_seconds(folder: Path) -> float:
    """Return how long `data-shards stats` takes, from the start of Python."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "data_shards.cli", "stats", str(folder)], check=True, capture_output=True)
    return time.perf_counter() - start


def main() -> None:
    if sys.argv[1:2] == ["--measure"]:  # one of the fresh processes
        print(json.dumps(MEASURES[sys.argv[2]](Path(sys.argv[3]))))
        return
    from measuring import arguments, finish, say

    values = arguments(__doc__, samples=1_000_000, repeats=0)
    with tempfile.TemporaryDirectory() as name:
        say("making the shard and the index")
        write_base(Path(name) / "base")
        start = time.perf_counter()
        grow(Path(name) / "base", Path(name) / "shards", max(BASE, values.samples // BASE * BASE))
        say(f"index written in {time.perf_counter() - start:.1f} s")
        result = measure(Path(name) / "shards", repeats=values.repeats or (3 if values.quick else 7))
    for key, value in result.items():
        print(f"{key:38}{json.dumps(value)}")
    finish({"benchmark": "index", "quick": values.quick, **result}, values.save)


if __name__ == "__main__":
    main()
