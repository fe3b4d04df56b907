"""How fast are shards built and read? Prints slices built a second by workers, and samples decoded a second by codec.

python benchmarks/shards.py            # some 30 s on two cores; figures mean something on an idle machine only
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import nibabel
import numpy as np
import yaml
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


def write_volumes(folder: Path, count: int) -> None:
    """Write volumes of 80 × 320 × 320 int16 that look like noisy soft tissue, and labels of half of them."""
    for number in range(count):
        rng = np.random.default_rng(number)
        smooth = ndimage.gaussian_filter(rng.normal(0, 1, (80, 320, 320)), 2)
        image = (smooth / smooth.std() * 200 + rng.normal(0, 20, smooth.shape)).astype(np.int16)
        labels = (ndimage.gaussian_filter(rng.normal(0, 1, smooth.shape), 8) > 0.02).astype(np.uint8)
        for name, array in (("imgs", image), ("gts", labels)):
            (folder / name).mkdir(exist_ok=True)
            file = nibabel.Nifti1Image(array.transpose(2, 1, 0), np.diag([-1.0, -1.0, 3.0, 1.0]))
            nibabel.save(file, folder / name / f"P{number:02d}.nii")


def files(corpus: Path) -> dict[str, bytes]:
    return {str(path.relative_to(corpus)): path.read_bytes() for path in corpus.rglob("*") if path.is_file()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--volumes", type=int, default=16, help="at least 10, for the three splits (default: 16)")
    count = parser.parse_args().volumes
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_volumes(folder, count)
        for codec in ("png", "zstd"):
            spec = folder / f"{codec}.yaml"
            spec.write_text(yaml.safe_dump({**SPEC, "shards": {"codec": codec}}))
            corpora = []
            for workers in (1, 2):
                result = build(spec, folder / f"{codec}{workers}", workers=workers)
                rate = result.effort.slices / result.effort.seconds
                print(f"built, {codec}, {workers} worker{'s' * (workers > 1)}: {rate:.0f} slices/s", flush=True)
                corpora.append(files(result.out))
            assert corpora[0] == corpora[1], "the number of workers changed the bytes"
            dataset = ShardDataset(folder / f"{codec}1" / "train")
            start = time.perf_counter()
            for triplet in dataset:
                for target in triplet.targets:
                    target.mask()
            rate = len(dataset) / (time.perf_counter() - start)
            size = sum(len(data) for path, data in corpora[0].items() if path.endswith(".tar")) / 1e6
            print(f"read, {codec}: {rate:.0f} samples/s with their masks, {size:.1f} MB")


if __name__ == "__main__":
    main()
