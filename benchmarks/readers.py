"""How do other readers of WebDataset tars compare on the same shards: in speed, evenness over ranks and resuming?

python benchmarks/readers.py           # one or two minutes; `benchmarks/loader.py` measures the same and more

Every reader decodes the same members to the same tensors, in batches of 8; figures are medians over rounds in which all
run in turn, with the shards in the page cache and one thread. Read from the same shards:
  data_shards   ours: random access in the order of an epoch, through `TripletLoader`
  webdataset    its own pipeline: shards shuffled and split over ranks, a shuffle buffer of 1000; PyTorch's loader
  torchdata     the same pipeline in its `StatefulDataLoader`; its own tar reader left with its data pipes
  litdata       its `iter_webdataset_tar`, in the order of the tars: it has no shuffle; PyTorch's loader
A reader that is not installed is null in the result: pip install webdataset torchdata litdata

Evenness: one epoch on each of 3 ranks, in this process. Resuming: stopped after 60 % of the batches, gone on from the
reader's state in a new loader; where a reader has no state, by starting again and leaving out as many batches.

The last line is one JSON object:
  benchmark   "readers"
  quick       whether --quick was given
  samples     number of samples in the shards
  readers     by name, null where it is not installed:
    version                of the package; "" for ours
    samples_per_second     {"png", "zstd"}: on one core, no workers
    with_two_workers       {"png", "zstd"}: samples a second, all together
    slower_than_ours       {"png", "zstd"}: our samples a second on one core, divided by its own
    delivered_over_3_ranks what each rank got in one epoch; ours leaves what does not fill a step to other epochs
    unique_after_resume    different samples of that epoch, the part before the stop and the part after it together
    resume_seconds         from a new loader to its first batch after the stop
"""

from __future__ import annotations

import io
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zstandard
from measuring import arguments, finish, medians, say
from PIL import Image
from pycocotools import mask as coco_mask
from samples import encoded, slices, write_shards
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from data_shards.dataset import ShardDataset
from data_shards.loader import SampleView, TripletLoader
from data_shards.sampler import GlobalOrderSampler

BATCH = 8
SHARDS = 10
"""Not a multiple of 3: as in life, the shards do not divide by the ranks."""
RANKS = 3
STOP = 0.6
"""Share of the batches that are used before the stop."""
BUFFER = 1000
"""Samples in the shuffle buffer of `webdataset`, as in its documentation."""
CODECS = ("png", "zstd")


# --- what a user of the other readers would write


def decode(members: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tensors of one sample, as `data_shards.batch` has them."""
    record = json.loads(members["json"])
    if "image.png" in members:
        image = np.array(Image.open(io.BytesIO(members["image.png"])))
    else:
        image = np.load(io.BytesIO(zstandard.ZstdDecompressor().decompress(members["image.npy.zst"])))
    targets = record["targets"]
    masks = [coco_mask.decode({"size": target["size"], "counts": target["counts"]}) for target in targets]
    return {
        "key": members["__key__"],
        "image": torch.from_numpy(image[None]),
        "masks": [torch.from_numpy(mask) for mask in masks],
        "boxes": torch.tensor([target["box"] for target in targets], dtype=torch.float32),
        "terms": [target["term"] for target in targets],
    }


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Put samples into a batch."""
    counts = torch.tensor([len(sample["masks"]) for sample in samples])
    return {
        "keys": [sample["key"] for sample in samples],
        "images": [sample["image"] for sample in samples],
        "masks": [mask for sample in samples for mask in sample["masks"]],
        "image_index": torch.repeat_interleave(torch.arange(len(samples)), counts),
        "boxes": torch.cat([sample["boxes"] for sample in samples]),
        "terms": [term for sample in samples for term in sample["terms"]],
    }


class TarSamples(IterableDataset[dict[str, Any]]):
    """litdata's tar reader over the shards of this rank and this worker."""

    def __init__(self, paths: list[str]) -> None:
        self.paths = paths

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield decoded samples in the order of the tars."""
        from litdata import iter_webdataset_tar

        worker = get_worker_info()
        for path in self.paths[worker.id :: worker.num_workers] if worker else self.paths:
            yield from map(decode, iter_webdataset_tar(path))


def tars(folder: Path) -> list[str]:
    return [str(path) for path in sorted(folder.glob("*.tar"))]


def ours(folder: Path, workers: int, rank: int, world: int) -> TripletLoader:
    shards = ShardDataset(folder)
    sampler = GlobalOrderSampler(len(shards), BATCH * world, BATCH, rank, world, 0)
    return TripletLoader(SampleView(shards), sampler, workers, data_hash=shards.index.sha256)


def pipeline(folder: Path, rank: int, world: int) -> Any:
    import webdataset

    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world))  # where webdataset looks first
    dataset = webdataset.WebDataset(tars(folder), shardshuffle=SHARDS, nodesplitter=webdataset.split_by_node)
    return dataset.shuffle(BUFFER).map(decode).batched(BATCH, collation_fn=collate)


def by_webdataset(folder: Path, workers: int, rank: int, world: int) -> Any:
    dataset = pipeline(folder, rank, world)
    return DataLoader(dataset, batch_size=None, num_workers=workers, persistent_workers=workers > 0)


def by_torchdata(folder: Path, workers: int, rank: int, world: int) -> Any:
    from torchdata.stateful_dataloader import StatefulDataLoader

    dataset = pipeline(folder, rank, world)
    return StatefulDataLoader(dataset, batch_size=None, num_workers=workers, persistent_workers=workers > 0)


def by_litdata(folder: Path, workers: int, rank: int, world: int) -> Any:
    dataset = TarSamples(tars(folder)[rank::world])
    return DataLoader(
        dataset, batch_size=BATCH, collate_fn=collate, num_workers=workers, persistent_workers=workers > 0
    )


READERS: dict[str, tuple[Callable[[Path, int, int, int], Any], tuple[str, ...]]] = {
    "data_shards": (ours, ()),
    "webdataset": (by_webdataset, ("webdataset",)),
    "torchdata": (by_torchdata, ("torchdata", "webdataset")),
    "litdata": (by_litdata, ("litdata",)),
}
"""Loaders by name, called with folder, workers, rank and number of ranks; and the packages that they need."""


# --- what is measured


def keys(batch: Any) -> list[str]:
    return batch["keys"] if isinstance(batch, dict) else batch.keys


def epochs(loader: Any) -> Callable[[], int]:
    """Return what reads the next epoch and returns its number of samples."""
    epoch = -1

    def read() -> int:
        nonlocal epoch
        epoch += 1
        if isinstance(loader, TripletLoader):
            loader.sampler.set_epoch(epoch)
        return sum(len(keys(batch)) for batch in loader)

    return read


def delivered(make: Callable[..., Any], folder: Path) -> list[int]:
    """Return how many samples each rank gets in one epoch."""
    return [epochs(make(folder, 0, rank, RANKS))() for rank in range(RANKS)]


def resumed(make: Callable[..., Any], folder: Path) -> tuple[int, float]:
    """Stop an epoch and go on: (different samples, seconds to the first batch after the stop)."""
    loader = make(folder, 0, 0, 1)
    total = sum(1 for _ in make(folder, 0, 0, 1))
    used = round(STOP * total)
    seen = flat(islice(loader, used))
    state = loader.state_dict() if hasattr(loader, "state_dict") else None
    start = time.perf_counter()
    loader = make(folder, 0, 0, 1)
    if state is None:
        rest = islice(loader, used, None)
    else:
        loader.load_state_dict(state)
        rest = iter(loader)
    seen |= flat([next(rest)])
    seconds = time.perf_counter() - start
    return len(seen | flat(rest)), seconds


def flat(batches: Iterable[Any]) -> set[str]:
    return {key for batch in batches for key in keys(batch)}


def found(packages: tuple[str, ...]) -> str | None:
    """Return the version of the first package; None unless all are installed."""
    try:
        return ([version(package) for package in packages] or [""])[0]
    except PackageNotFoundError:
        return None


def measure(folders: Mapping[str, Path], repeats: int) -> dict[str, dict[str, Any] | None]:
    """Return the result's `readers`.

    Args:
        folders: Folders of shards by codec: those of `CODECS`.
        repeats: Rounds that count.
    """
    known = {name: found(packages) for name, (_, packages) in READERS.items()}
    runs = {
        (name, codec, workers): epochs(READERS[name][0](folders[codec], workers, 0, 1))
        for workers in (0, 2)
        for codec in CODECS
        for name, number in known.items()
        if number is not None
    }
    rates = medians(runs, repeats)
    result: dict[str, dict[str, Any] | None] = {}
    for name, number in known.items():
        if number is None:
            print(f"{name}: not measured: pip install {' '.join(READERS[name][1])}")
            result[name] = None
            continue
        say(f"{name}: ranks and resuming")
        make = READERS[name][0]
        unique, seconds = resumed(make, folders["zstd"])
        one, two = ({codec: rates[name, codec, workers] for codec in CODECS} for workers in (0, 2))
        result[name] = {
            "version": number,
            "samples_per_second": one,
            "with_two_workers": two,
            "slower_than_ours": {codec: rates["data_shards", codec, 0] / one[codec] for codec in CODECS},
            "delivered_over_3_ranks": delivered(make, folders["zstd"]),
            "unique_after_resume": unique,
            "resume_seconds": seconds,
        }
    os.environ.pop("RANK", None), os.environ.pop("WORLD_SIZE", None)
    return result


def report(readers: Mapping[str, dict[str, Any] | None]) -> None:
    """Print the result for people."""
    print(f"{'reader':24}{'png/s':>8}{'zstd/s':>8}{'2 workers':>16}   {'over 3 ranks':18}unique, after resume")
    for name, row in readers.items():
        if row is not None:
            one, two = row["samples_per_second"], row["with_two_workers"]
            ranks = "/".join(map(str, row["delivered_over_3_ranks"]))
            rates = "".join(f"{rate:8.0f}" for rate in (*one.values(), *two.values()))
            resume = f"{row['unique_after_resume']}, {row['resume_seconds']:.2f} s"
            print(f"{name + ' ' + row['version']:24}{rates}   {ranks:18}{resume}")


def main() -> None:
    values = arguments(__doc__, samples=0)
    torch.set_num_threads(1)
    count = values.samples or (96 if values.quick else 1000)
    say("making shards")
    sources = slices(10 if values.quick else 50)
    with tempfile.TemporaryDirectory() as name:
        folders = {
            codec: write_shards(
                Path(name) / codec, [encoded(item, codec) for item in sources], count, -(-count // SHARDS)
            )
            for codec in CODECS
        }
        result = measure(folders, repeats=2 if values.quick else 5)
    report(result)
    finish({"benchmark": "readers", "quick": values.quick, "samples": count, "readers": result})


if __name__ == "__main__":
    main()
