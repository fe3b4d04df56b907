"""Does parameter-efficient tuning of LiteMedSAM match full fine-tuning on real images, within half an hour of a laptop?

python benchmarks/ablation.py --data FOLDER --out FOLDER    # real images of eight modalities: half an hour on two cores
python benchmarks/ablation.py --data FOLDER --out FOLDER --save     # and put the tables into the results
python benchmarks/ablation.py --quick                       # slices of one brain, two cells, two steps: some minutes

It builds shards, and runs `trainer ablate recipes/ablations/peft_vs_full.yaml` on them: six ways of tuning and a U-Net
from scratch, two seeds, 30 steps of four images each, LiteMedSAM's released weights at 128 px, boxes as prompts. The
same command with the same --out goes on where it was stopped.

--data holds a folder for each of eight public sets (a few images of each are enough), named and laid out as the specs
in tests/data_shards/specs say: CT lesions, dermoscopy, polyps, vessels of the retina, nuclei in microscopy and in
pathology, sarcomas in PET, lungs in X-ray. Half of the patients of each are trained on, the others are scored; where no
patient is known an image stands for one. --quick reads the ICBM 152 template that nilearn carries instead.

What to read: whether any difference from full fine-tuning is beyond chance, and what a cell costs. 47 images are far
too few to say which way is better elsewhere: the benchmark is of the command, and of its time.

The last line is one JSON object:
  benchmark  "ablation"
  quick      whether --quick was given
  torch      its version
  images     {"train", "test"}: number of images
  targets    number of targets that are scored
  seconds    of `trainer ablate`, of all calls on this --out together; null where one of them was killed
  rows       a list of {"cell", "learning", "dsc", "nsd", "difference", "p_holm"}: parameters that learn, medians of DSC
             and NSD over all targets, mean difference of DSC from full fine-tuning and its p after Holm; null for the
             cell that the others are compared with
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from measuring import finish, say

from data_shards.build import build
from data_shards.dataset import ShardDataset
from data_shards.scan import write_index
from trainer.cli import main as trainer_command

ROOT = Path(__file__).parents[1]
SPEC = ROOT / "recipes" / "ablations" / "peft_vs_full.yaml"
RESULTS = Path(__file__).with_name("results") / "ablation.md"
SETS = (
    "ct_lesion_recist_npz", "dermoscopy_ham10000_jpg", "endoscopy_kvasir_polyp_jpg", "fundus_chasedb1_jpg",
    "microscopy_nuclei_dsb2018_png", "pathology_nuclei_dsb2018_png", "pet_sarcoma_nifti", "xray_chest_montgomery_png",
)  # fmt: skip
"""Folders of --data, and names of their specs."""
TEMPLATE = "icbm152_white_matter"
SPLITS = ("train", "test")
STEPS = 30


def build_shards(data: Path | None, out: Path) -> None:
    """Build shards of every set, and put those of one split into one folder with an index of its own."""
    if all((out / split / "index.npz").is_file() for split in SPLITS):
        return
    specs = [ROOT / "tests" / "data_shards" / "specs" / f"{name}.yaml" for name in SETS]
    if data is None:
        specs = [ROOT / "data_shards" / "catalogue" / f"{TEMPLATE}.yaml"]
    for split in SPLITS:
        shutil.rmtree(out / split, ignore_errors=True)
        (out / split).mkdir(parents=True)
    for path in specs:
        say(f"shards of {path.stem}")
        spec = yaml.safe_load(path.read_text(encoding="utf-8"))
        if data is not None:
            spec["cases"] = [{name: value for name, value in case.items() if name != "split"} for case in spec["cases"]]
            spec["split"] = {"kind": "patients", "fractions": dict.fromkeys(SPLITS, 0.5), "seed": 1}
            spec["slices"] = {"keep": "nonempty"}
        else:
            spec["split"] |= {"start": 70, "stop": 90, "thickness": 3}
        changed = out / f"{path.stem}.yaml"
        changed.write_text(yaml.safe_dump(spec), encoding="utf-8")
        corpus = out / path.stem
        shutil.rmtree(corpus, ignore_errors=True)
        build(changed, corpus, root=data / path.stem if data else None)
        for split in SPLITS:
            for tar in sorted((corpus / split).glob("*.tar")):
                shutil.copy(tar, out / split / f"{path.stem}-{tar.name}")
    for split in SPLITS:
        write_index(out / split)


def ablate(out: Path, quick: bool) -> tuple[list[dict[str, str]], float | None]:
    """Run the ablation; return the rows of its results, and the seconds of all calls unless one was killed."""
    # the probe of boxes that are off takes longer than the scores themselves
    shards = {split: str(out / "shards" / split) for split in SPLITS}
    init_args: dict[str, Any] = {**shards, "val": None}
    overlay: dict[str, Any] = {
        "data": {"init_args": init_args},
        "trainer": {"num_sanity_val_steps": 0, "callbacks": None},
    }
    if quick:
        overlay["model"] = {"init_args": {"model": {"init_args": {"image_size": 64}}}}
    data = out / "data.yaml"
    data.write_text(yaml.safe_dump(overlay), encoding="utf-8")
    folder = out / "ablation"
    taken, before = out / "seconds.json", 0.0
    if (folder / "cells").is_dir():
        before = json.loads(taken.read_text(encoding="utf-8")) if taken.is_file() else math.nan
    taken.unlink(missing_ok=True)  # comes back only if this call ends
    words = ["ablate", str(SPEC), "-c", str(data), "--out", str(folder), "--steps", str(2 if quick else STEPS)]
    if quick:
        words += ["--seeds", "0", "--only", "untouched", "full"]
    start = time.perf_counter()
    code = trainer_command(words)
    seconds = before + time.perf_counter() - start
    if code:
        sys.exit(f"the ablation ended with {code}: see the logs in {folder / 'cells'}")
    taken.write_text(json.dumps(seconds), encoding="utf-8")
    with (folder / "results.csv").open(newline="", encoding="utf-8") as handle:
        rows = [row for row in csv.DictReader(handle) if row["kind"] == "all"]
    return rows, None if math.isnan(seconds) else seconds


def shown(rows: Sequence[dict[str, str]]) -> list[dict[str, Any]]:
    """The rows of the last line."""
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        if not row["median"]:
            continue
        one = found.setdefault(row["cell"], {"cell": row["cell"], "learning": int(row["learning"])})
        one[row["metric"]] = float(row["median"])
        if row["metric"] == "dsc":
            for name in ("difference", "p_holm"):
                one[name] = float(row[name]) if row[name] else None
    return list(found.values())


def save(folder: Path, images: dict[str, int], targets: int, seconds: float | None) -> None:
    """Put the tables into the results, below what ran them."""
    tables = (folder / "results.md").read_text(encoding="utf-8").partition("\n## ")[2]
    took = f"{seconds / 60:.0f} minutes" if seconds is not None else "in several calls, so that its time is not known"
    version = torch.__version__.partition("+")[0]
    head = f"""\
# Ways of tuning LiteMedSAM, on real images of eight modalities

Written by `python benchmarks/ablation.py --data FOLDER --out FOLDER --save`, which runs `trainer ablate
recipes/ablations/peft_vs_full.yaml` for {STEPS} steps of four images; torch {version}, two CPU cores, {took}.
{images["train"]} images to train on, {images["test"]} others with {targets} targets to score: half of the patients of
each set. So few images show that the command works and what it costs; they do not say which way is better elsewhere.

"""
    RESULTS.write_text(f"{head}## {tables}", encoding="utf-8")


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="slices of one brain, two cells, two steps")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="folders of eight public data sets")
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="where shards, runs and tables go (default: nowhere)"
    )
    parser.add_argument("--save", action="store_true", help=f"put the tables into {RESULTS.name}")
    values = parser.parse_args()
    if not values.quick and not values.data:
        parser.error("--data: the folder of real images is needed, or give --quick")
    if values.quick and values.save:
        parser.error("--save: the results are of real images, and not of --quick")
    if values.data and (missing := [name for name in SETS if not (values.data / name).is_dir()]):
        parser.error(f"--data {values.data}: it has no folder {missing[0]}")
    return values


def main() -> None:
    values = arguments()
    with tempfile.TemporaryDirectory() as scratch:
        out = (values.out or Path(scratch)).resolve()
        build_shards(None if values.quick else values.data, out / "shards")
        indices = {split: ShardDataset(out / "shards" / split).index for split in SPLITS}
        images, targets = {split: len(index) for split, index in indices.items()}, len(indices["test"].target_term)
        rows, seconds = ablate(out, values.quick)
        if values.save:
            save(out / "ablation", images, targets, seconds)
        finish(
            {
                "benchmark": "ablation",
                "quick": values.quick,
                "torch": torch.__version__,
                "images": images,
                "targets": targets,
                "seconds": seconds,
                "rows": shown(rows),
            }
        )


if __name__ == "__main__":
    main()
