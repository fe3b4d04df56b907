"""How fast are samples read, and does a training step wait for them?

python benchmarks/loader.py            # some six minutes on two cores; figures mean something on an idle machine

The samples are real slices of 512 × 512 with 3.4 targets on average (see `benchmarks/samples.py`), stored as grey PNG,
as grey npy.zst, and as the reference MedSAM preparation has them: resized to 1024 × 1024 RGB PNG. All are lossless.
Figures are medians over rounds in which all run in turn, with the files in the page cache, one thread a process and
batches of 8.

The last line is one JSON object:
  benchmark           "loader"
  quick               whether --quick was given
  cores               of this machine
  samples             {"native", "large"}: number of samples in the shards of 512 and of 1024 pixels
  content             {"noise", "targets_per_sample", "mask_characters", "kilobytes_per_sample"}: what is read
  samples_per_second  by what is stored: "png", "zstd", "png_1024" (our shards), "reference_1024" (an image PNG and a
                      label map PNG in two folders, and PyTorch's loader, as the reference has it):
    decode              members in memory → image and masks, one core
    read                `ShardDataset[i]` and its masks, in the order of an epoch, one core
    loader              batches from `TripletLoader`, one core, no workers
    loader_per_cpu      the same, by seconds of processor time: hardly changed by what else runs on the machine
    two_workers         batches from `TripletLoader` with two workers, all together
  ratio_to_png_1024   {"png", "zstd"}: `loader` divided by that of "png_1024"
  ratio_to_reference  {"png", "zstd"}: `loader` divided by that of "reference_1024"
  ratio               that of "zstd"
  bar                 {"samples_per_second_per_core", "needed", "met"}: `loader` of "zstd"
  wait_share          share of a training's time that is spent waiting for the next batch, but for the first of an
                      epoch, with zstd and two workers, by milliseconds a step takes for each of its 8 images. The step
                      is a product of matrices that keeps the main process busy. No model is that fast on a CPU: 30 ms
                      suits a small model on a GPU, 7 ms is MedSAM's training at 45 % of an H200
  wait_bar            {"share", "needed", "met"}: `wait_share` at 30 ms
  readers             other readers on the same shards: see `benchmarks/readers.py`
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import arguments, finish, medians, say
from PIL import Image
from readers import BATCH, SHARDS, epochs, measure, report
from samples import CODECS, NOISE, encoded, slices, targets_of, write_reference, write_shards
from torch.utils.data import DataLoader, Dataset

from data_shards.dataset import ShardDataset
from data_shards.loader import SampleView, TripletLoader
from data_shards.sampler import GlobalOrderSampler, epoch_order
from data_shards.triplet import Triplet

NEEDED = 1000
"""Lossless samples a second and core."""
WAIT_NEEDED = 0.01
STEP_MS = (30, 7)
"""Milliseconds that a step takes for each of its images; the first one is what the bar is about."""


class ReferenceFiles(Dataset[dict[str, Any]]):
    """What the reference preparation stores: a folder of images and one of label maps."""

    def __init__(self, folder: Path) -> None:
        self.images, self.labels = (sorted((folder / name).iterdir()) for name in ("imgs", "gts"))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, number: int) -> dict[str, Any]:
        """Return the image (3, 1024, 1024), the masks (1024, 1024) of its labels, and the name."""
        image = np.asarray(Image.open(self.images[number]))
        labels = np.asarray(Image.open(self.labels[number]))
        masks = [torch.from_numpy(labels == label) for label in np.unique(labels)[1:]]
        pixels = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
        return {"key": self.images[number].stem, "image": pixels, "masks": masks}


def gather(samples: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "keys": [sample["key"] for sample in samples],
        "images": [sample["image"] for sample in samples],
        "masks": [mask for sample in samples for mask in sample["masks"]],
    }


def ours(folder: Path, workers: int) -> TripletLoader:
    shards = ShardDataset(folder)
    return TripletLoader(SampleView(shards), GlobalOrderSampler(len(shards), BATCH, BATCH, 0, 1, 0), workers)


def reference(folder: Path, workers: int) -> DataLoader[dict[str, Any]]:
    return DataLoader(
        ReferenceFiles(folder), BATCH, True, num_workers=workers, collate_fn=gather, persistent_workers=workers > 0
    )


def decoding(folder: Path) -> Callable[[], int]:
    dataset = ShardDataset(folder)
    members = [dataset.read(number) for number in range(min(len(dataset), 100))]

    def run() -> int:
        for item in members:
            for target in Triplet.decode("any", item).targets:
                target.mask()
        return len(members)

    return run


def reading(folder: Path) -> Callable[[], int]:
    dataset = ShardDataset(folder)

    def run() -> int:
        for number in epoch_order(len(dataset), 0, 0):
            for target in dataset[number].targets:
                target.mask()
        return len(dataset)

    return run


def counted(run: Callable[[], int], seconds: list[float]) -> Callable[[], int]:
    """Return `run`, which also notes its processor time a sample."""

    def measured() -> int:
        start = time.process_time()
        count = run()
        seconds.append((time.process_time() - start) / count)
        return count

    return measured


def rates_of(folders: dict[str, Path], repeats: int) -> dict[str, dict[str, float]]:
    """Return the result's `samples_per_second`."""
    seconds: dict[str, list[float]] = {kind: [] for kind in folders}
    runs: dict[tuple[str, str], Callable[[], int]] = {}
    opened: list[Any] = []
    for kind, folder in folders.items():
        make = reference if kind == "reference_1024" else ours
        if make is ours:
            runs[kind, "decode"], runs[kind, "read"] = decoding(folder), reading(folder)
        runs[kind, "loader"] = counted(epochs(make(folder, 0)), seconds[kind])
        opened.append(make(folder, 2))
        runs[kind, "two_workers"] = epochs(opened[-1])
    rates = medians(runs, repeats)
    for loader in opened:  # workers that are started later would inherit what belongs to these, and complain
        if isinstance(loader, TripletLoader):
            loader.close()
        else:
            loader._iterator._shutdown_workers()
            loader._iterator = None
    result: dict[str, dict[str, float]] = {kind: {} for kind in folders}
    for (kind, name), rate in rates.items():
        result[kind][name] = rate
    for kind, values in seconds.items():
        result[kind]["loader_per_cpu"] = 1 / statistics.median(values[1:])
    return result


def wait_share(folder: Path, step_ms: float, seconds: float) -> float:
    """Train for a while, so to speak: the share of the time that the main process waits for batches.

    Args:
        folder: The shards.
        step_ms: Milliseconds a step takes for each image of a batch.
        seconds: Length of the training.
    """
    loader, left = ours(folder, 2), torch.ones(256, 256) / 256
    epoch, waited, total = 0, 0.0, 0.0
    while total < seconds:
        loader.sampler.set_epoch(epoch)  # type: ignore[union-attr]
        batches = iter(loader)
        next(batches)  # an epoch here has a few batches; in a training its first is one of thousands
        while True:
            start = time.perf_counter()
            if next(batches, None) is None:
                break
            got = time.perf_counter()
            end = got + step_ms / 1000 * BATCH
            while time.perf_counter() < end:
                left = left @ left
            waited += got - start
            total += time.perf_counter() - start
        epoch += 1
    loader.close()
    return waited / total


def prepare(folder: Path, distinct: int, native: int, large: int) -> tuple[dict[str, Path], dict[str, Any]]:
    """Write what is read: the folders by what is stored, and the result's `content`."""
    say("making shards")
    sources = slices(distinct)
    few = sources[: max(5, distinct // 5)]  # large ones take long to encode
    members = {
        kind: [encoded(item, kind) for item in (few if form == "large" else sources)]
        for kind, (form, _) in CODECS.items()
    }
    folders = {}
    for kind, items in members.items():
        count = large if kind == "png_1024" else native
        folders[kind] = write_shards(folder / kind, items, count, -(-count // SHARDS))
    folders["reference_1024"] = write_reference(folder / "reference_1024", few, large)
    targets, characters = targets_of(members["zstd"])
    sizes = {kind: statistics.mean(sum(map(len, item.values())) for item in items) for kind, items in members.items()}
    content = {
        "noise": NOISE,
        "targets_per_sample": targets,
        "mask_characters": characters,
        "kilobytes_per_sample": {kind: size / 1000 for kind, size in sizes.items()},
    }
    return folders, content


def main() -> None:
    values = arguments(__doc__, samples=0)
    torch.set_num_threads(1)
    native = values.samples or (96 if values.quick else 1000)
    large = max(BATCH, native // (4 if values.quick else 8) // BATCH * BATCH)
    repeats, seconds = (2, 2.0) if values.quick else (5, 10.0)
    with tempfile.TemporaryDirectory() as name:
        folders, content = prepare(Path(name), 10 if values.quick else 50, native, large)
        print(
            f"KB a sample: {', '.join(f'{kind} {size:.0f}' for kind, size in content['kilobytes_per_sample'].items())}"
        )
        rates = rates_of(folders, repeats)
        for kind, row in rates.items():
            print(f"{kind + ', samples/s':28}" + ", ".join(f"{what} {rate:.0f}" for what, rate in row.items()))
        say("waits of a training")
        waits = {str(step): wait_share(folders["zstd"], step, seconds) for step in STEP_MS}
        print(", ".join(f"a step of {step} ms an image waits {share:.2%}" for step, share in waits.items()))
        readers = measure(folders, repeats)
    report(readers)
    ratios = {
        ratio: {kind: rates[kind]["loader"] / rates[base]["loader"] for kind in ("png", "zstd")}
        for base, ratio in (("png_1024", "ratio_to_png_1024"), ("reference_1024", "ratio_to_reference"))
    }
    speed, wait = rates["zstd"]["loader"], waits[str(STEP_MS[0])]
    finish(
        {
            "benchmark": "loader",
            "quick": values.quick,
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "samples": {"native": native, "large": large},
            "content": content,
            "samples_per_second": rates,
            **ratios,
            "ratio": ratios["ratio_to_reference"]["zstd"],
            "bar": {"samples_per_second_per_core": speed, "needed": NEEDED, "met": speed >= NEEDED},
            "wait_share": waits,
            "wait_bar": {"share": wait, "needed": WAIT_NEEDED, "met": wait < WAIT_NEEDED},
            "readers": readers,
        },
        values.save,
    )


if __name__ == "__main__":
    main()
