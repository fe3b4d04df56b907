"""How fast are shards built and read? Prints slices built a second by workers, and samples decoded a second by codec.

python benchmarks/shards.py            # some 30 s on two cores; figures mean something on an idle machine only

The volumes are made here and look like noisy soft tissue: 80 × 320 × 320 voxels of int16, with labels of half of them.

The last line is one JSON object:
  benchmark          "shards"
  quick              whether --quick was given: fewer and thinner volumes
  volumes, slices    what was built
  built_per_second   slices built a second: {"png": {"1", "2"}, "zstd": {"1", "2"}}, by number of workers; two have
                     to be started first, which takes them some two seconds
  workers_ratio      {"png", "zstd"}: two workers' rate divided by one's
  read_per_second    {"png", "zstd"}: samples decoded a second with their masks, one core
  megabytes          {"png", "zstd"}: size of all shards, in 10^6 bytes
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import yaml
from measuring import arguments, finish, say
from scipy import ndimage

from data_shards.build import build
from data_shards.dataset import ShardDataset

SPEC = {
    "dataset": "benchmark",
    "modality": "CT",
    "cases": [{"image": "imgs/{id}.nii", "mask": "gts/{id}.nii", "patient": "{id}"}],
    "targets": [{"term": "liver", "value": 1}],
    "intensity": {"kind": "window", "name": "soft_tissue"},
    "split": {"kind": "medsam"},
}


def write_volumes(folder: Path, count: int, slices: int) -> None:
    """Write volumes of slices of 320 × 320 int16 that look like noisy soft tissue, and labels of half of them."""
    for number in range(count):
        rng = np.random.default_rng(number)
        smooth = ndimage.gaussian_filter(rng.normal(0, 1, (slices, 320, 320)), 2)
        image = (smooth / smooth.std() * 200 + rng.normal(0, 20, smooth.shape)).astype(np.int16)
        labels = (ndimage.gaussian_filter(rng.normal(0, 1, smooth.shape), 8) > 0.02).astype(np.uint8)
        for name, array in (("imgs", image), ("gts", labels)):
            (folder / name).mkdir(exist_ok=True)
            file = nibabel.Nifti1Image(array.transpose(2, 1, 0), np.diag([-1.0, -1.0, 3.0, 1.0]))
            nibabel.save(file, folder / name / f"P{number:02d}.nii")


def files(corpus: Path) -> dict[str, bytes]:
    return {str(path.relative_to(corpus)): path.read_bytes() for path in corpus.rglob("*") if path.is_file()}


def reading_rate(folder: Path) -> float:
    dataset = ShardDataset(folder)
    start = time.perf_counter()
    for triplet in dataset:
        for target in triplet.targets:
            target.mask()
    return len(dataset) / (time.perf_counter() - start)


def measure(folder: Path) -> dict[str, Any]:
    """Build and read the volumes of a folder with both codecs."""
    result: dict[str, Any] = {"slices": 0, "built_per_second": {}, "workers_ratio": {}, "read_per_second": {}}
    result["megabytes"] = {}
    for codec in ("png", "zstd"):
        spec = folder / f"{codec}.yaml"
        spec.write_text(yaml.safe_dump({**SPEC, "shards": {"codec": codec}}))
        corpora, built = [], {}
        for workers in (1, 2):
            made = build(spec, folder / f"{codec}{workers}", workers=workers)
            result["slices"] = made.effort.slices
            built[str(workers)] = rate = made.effort.slices / made.effort.seconds
            print(f"built, {codec}, {workers} worker{'s' * (workers > 1)}: {rate:.0f} slices/s", flush=True)
            corpora.append(files(made.out))
        assert corpora[0] == corpora[1], "the number of workers changed the bytes"
        rate = reading_rate(folder / f"{codec}1" / "train")
        size = sum(len(data) for path, data in corpora[0].items() if path.endswith(".tar")) / 1e6
        print(f"read, {codec}: {rate:.0f} samples/s with their masks, {size:.1f} MB", flush=True)
        result["built_per_second"][codec], result["workers_ratio"][codec] = built, built["2"] / built["1"]
        result["read_per_second"][codec], result["megabytes"][codec] = rate, size
    return result


def main() -> None:
    values = arguments(__doc__, volumes=0, slices=0)
    volumes, slices = (12, 64) if values.quick else (16, 80)
    volumes, slices = values.volumes or volumes, values.slices or slices
    with tempfile.TemporaryDirectory() as name:
        say("making volumes")
        write_volumes(Path(name), volumes, slices)
        result = measure(Path(name))
    finish({"benchmark": "shards", "quick": values.quick, "volumes": volumes, **result})


if __name__ == "__main__":
    main()
