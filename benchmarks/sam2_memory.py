"""Does a tiny SAM2 learn, from random weights, to follow things through volumes that it has not seen?

python benchmarks/sam2_memory.py --data FOLDER     # the test data; --quick makes volumes of its own, in a minute

The commands that a user would give: shards of real volumes in several directions, `trainer fit` with
recipes/sam2/tiny.yaml, and `trainer evaluate --volume` on volumes that were held out, before and after: the true mask
of the middle slice is given, and DSC is that of all other slices together. Beside it stands what the mask of the middle
slice scores when it is copied into every other one.

The last line is one JSON object:
  benchmark     "sam2_memory"
  quick         whether --quick was given
  device        what it ran on
  parameters    of the model
  steps         optimiser steps
  seconds       of the training
  volumes       for each held-out volume and direction its name, the number of objects, and their mean DSC on the slices
                that were not shown: start, learnt, copied
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch
import yaml
from measuring import finish, say

from data_shards.build import build
from data_shards.dataset import ShardDataset
from data_shards.scan import write_index
from data_shards.writer import ShardWriter
from trainer.cli import main as trainer
from trainer.models import SegmentationModel
from trainer.restore import instantiate

RECIPE = Path(__file__).parents[1] / "recipes/sam2/tiny.yaml"
AXES = ("axial", "coronal", "sagittal")
PERCENTILES, SOFT_TISSUE, AS_IT_IS = (
    {"kind": "percentiles"},
    {"kind": "window", "level": 40, "width": 400},
    {"kind": "none"},
)
ORGANS = {
    "spleen": 1,
    "right kidney": 2,
    "left kidney": 3,
    "gallbladder": 4,
    "liver": 5,
    "stomach": 6,
    "pancreas": 7,
    "aorta": 52,
}


@dataclass(frozen=True)
class Source:
    """A volume with its labels.

    Attributes:
        name: What it is called.
        image: Its file, below the data's folder.
        mask: That of its labels.
        labels: Their values by term; none takes every value there is, by number.
        intensity: As a spec says it.
        axes: In which directions it is cut.
    """

    name: str
    image: str
    mask: str
    labels: dict[str, int]
    intensity: dict[str, Any]
    axes: tuple[str, ...] = AXES


def sources(held_out: str) -> tuple[list[Source], list[Source]]:
    """Volumes to learn from, and those that are held out.

    Args:
        held_out: ``lesion and cord``, or ``abdomen``.
    """
    folder = "ct_lesion_recist_npz/CT_Lesion_"
    lesions = [
        Source(
            f"CT lesion {name[:6]}", f"{folder}{name}.npz", f"{folder}{name}.npz", {"lesion": 1}, AS_IT_IS, ("axial",)
        )
        for name in ("000001_02_01_008-023", "000009_03_01_036-048")
    ]
    folder = "mr_spinal_cord_nifti/"
    cords = [
        Source(f"cord MR {name}", f"{folder}{image}.nii.gz", f"{folder}{mask}.nii.gz", {"spinal cord": 1}, PERCENTILES)
        for name, image, mask in (("T1", "t1/t1w", "t1/t1w_seg-manual"), ("T2", "t2/t2", "t2/t2_seg-manual"))
    ]
    folder = "ct_abdomen_totalseg_nifti/example_"
    organs = ORGANS if held_out == "abdomen" else {}
    abdomen = Source("abdomen CT", f"{folder}ct_sm.nii.gz", f"{folder}seg.nii.gz", organs, SOFT_TISSUE)
    sarcomas = [
        Source(
            f"sarcoma {kind}", f"{stem}_image.nii.gz", f"{stem}_mask.nii.gz", {"soft tissue sarcoma": 1}, PERCENTILES
        )
        for kind, stem in (
            ("PET 1", "pet_sarcoma_nifti/STS_001_PET"),
            ("PET 2", "pet_sarcoma_nifti/STS_002_PET"),
            ("MR", "mr_sarcoma_nifti/STS_002_MR_T1"),
        )
    ]
    folder, tumor = "mr_brain_tumor_nrrd/brain1_", {"brain tumor": 1}
    brain = Source("brain MR", f"{folder}image.nrrd", f"{folder}label.nrrd", tumor, PERCENTILES, ("axial",))
    if held_out == "abdomen":
        return [*lesions, *cords, *sarcomas, brain], [abdomen]
    return [lesions[0], cords[0], abdomen, *sarcomas, brain], [lesions[1], cords[1]]


def drifting(folder: Path) -> tuple[list[Source], list[Source]]:
    """Volumes with a bright ball and a dark rod that leans: two to learn from, one held out."""
    z, y, x = np.mgrid[:16, :48, :40]
    made = []
    for number in range(3):
        ball = (z - 8) ** 2 + ((y - 16) / 1.5) ** 2 + ((x - 12 - 2 * number) / 1.5) ** 2 < 36
        rod = (y - 34) ** 2 + (x - 16 - z / 2 - 3 * number) ** 2 < 25
        image = np.random.default_rng(number).normal(120, 5, z.shape) + 90 * ball - 90 * rod
        labels = (ball + 2 * rod).astype(np.uint8)
        for name, array in (("image", image.clip(0, 255).astype(np.uint8)), ("mask", labels)):
            affine = np.diag([-1.0, -1.0, 2.0, 1.0])
            nibabel.save(nibabel.Nifti1Image(array.transpose(2, 1, 0), affine), folder / f"{name}{number}.nii.gz")
        terms = {"ball": 1, "rod": 2}
        made.append(
            Source(f"drifting {number}", f"image{number}.nii.gz", f"mask{number}.nii.gz", terms, AS_IT_IS, ("axial",))
        )
    return made[:2], made[2:]


def write_shards(data: Path, learnt: Iterable[Source], folder: Path) -> Path:
    """Shards of some volumes in all their directions, in one folder."""
    out = folder / "train"
    with ShardWriter(out, 1000, 2**28) as writer:
        for source in learnt:
            labels = source.labels or _every_label(data / source.mask)
            for axis in source.axes:
                name = f"{source.name} {axis}".replace(" ", "-")
                spec = {
                    "dataset": name, "modality": source.name.split()[1], "intensity": source.intensity,
                    "cases": [
                        {"id": name, "image": source.image, "mask": source.mask, "patient": name, "split": "train"}
                    ],
                    "targets": [{"term": term, "value": value} for term, value in labels.items()],
                    "slices": {"axis": axis, "keep": "all", "min_area": 40}, "split": {"kind": "explicit"},
                    "licence": "test", "cite": "nobody",
                }  # fmt: skip
                path = folder / f"{name}.yaml"
                path.write_text(yaml.safe_dump(spec))
                with contextlib.redirect_stdout(io.StringIO()):
                    build(path, folder / name, root=data)
                shards = ShardDataset(folder / name / "train")
                for position in range(len(shards)):
                    triplet = shards[position]
                    writer.write(triplet.key, triplet.encode())
    write_index(out)
    return out


def _every_label(path: Path) -> dict[str, int]:
    values = np.unique(np.asarray(nibabel.load(path).dataobj))
    return {f"structure {int(value)}": int(value) for value in values if value}


def command(*arguments: object) -> None:
    """Run a command of `trainer`; its output goes to stderr."""
    with contextlib.redirect_stdout(sys.stderr):
        code = trainer([str(argument) for argument in arguments])
    if code:
        raise SystemExit(f"sam2_memory: trainer {arguments[0]} ended with {code}")


def evaluate(
    data: Path, held_out: Sequence[Source], folder: Path, model: Sequence[object]
) -> dict[tuple[str, str], Any]:
    """Scores of held-out volumes by name and direction."""
    found = {}
    for source in held_out:
        for axis in source.axes:
            out = folder / f"{source.name} {axis} {len(list(folder.iterdir()))}"
            labels = ",".join(f"{value}={term}" for term, value in source.labels.items())
            rule = {"percentiles": "percentiles", "none": "none", "window": "window:-160,240"}[source.intensity["kind"]]
            files = ("--volume", data / source.image, "--truth", data / source.mask, "--labels", labels)
            command(
                "evaluate",
                *files,
                *model,
                "--prompt",
                "mask",
                "--axis",
                axis,
                "--intensity",
                rule,
                "--device",
                "cpu",
                "--out",
                out,
            )
            with (out / "scores.csv").open(newline="") as handle:
                found[source.name, axis] = list(csv.DictReader(handle))
    return found


def mean(rows: Sequence[dict[str, str]], column: str) -> float:
    return float(np.mean([float(row[column]) for row in rows]))


def run(
    data: Path, parts: tuple[list[Source], list[Source]], folder: Path, changes: Sequence[object]
) -> dict[str, Any]:
    """Train, and compare before and after."""
    learnt, held_out = parts
    say("shards")
    shards = write_shards(data, learnt, folder)
    evaluations = folder / "evaluations"
    evaluations.mkdir()
    torch.manual_seed(0)
    before = evaluate(data, held_out, evaluations, ("--recipe", RECIPE))
    started = time.perf_counter()
    where = ("--data.init_args.train", shards, "--data.init_args.val", "null", "--data.init_args.test", "null")
    command("fit", "-c", RECIPE, *where, "--trainer.default_root_dir", folder / "run", *changes)
    seconds = time.perf_counter() - started
    after = evaluate(data, held_out, evaluations, ("--run", folder / "run"))
    volumes = [
        {
            "name": f"{name}, {axis}",
            "objects": len(rows),
            "start": mean(before[name, axis], "dsc_unprompted"),
            "learnt": mean(rows, "dsc_unprompted"),
            "copied": mean(rows, "copy_dsc_unprompted"),
        }
        for (name, axis), rows in after.items()
    ]
    return {"seconds": seconds, "volumes": volumes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="volumes of its own and a few steps, under a minute")
    parser.add_argument("--data", type=Path, help="folder of the test data")
    parser.add_argument("--held-out", choices=("lesion and cord", "abdomen"), default="lesion and cord")
    parser.add_argument("--steps", type=int, default=None, help="optimiser steps (default: the recipe's)")
    values = parser.parse_args()
    if values.data is None and not values.quick:
        raise SystemExit("sam2_memory: --data FOLDER names the test data; --quick makes volumes of its own")
    recipe = yaml.safe_load(RECIPE.read_text())
    steps = values.steps or (4 if values.quick else recipe["trainer"]["max_steps"])
    changes: list[object] = ["--trainer.max_steps", steps, "--model.init_args.warmup_steps", min(100, steps // 2)]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if values.quick:
            (folder / "data").mkdir()
            found = run(folder / "data", drifting(folder / "data"), folder, changes)
        else:
            found = run(values.data, sources(values.held_out), folder, changes)
    model = instantiate(recipe["model"]["init_args"]["model"], SegmentationModel, str(RECIPE))
    for row in found["volumes"]:
        print(f"{row['name']:<28} start {row['start']:.3f}  learnt {row['learnt']:.3f}  copied {row['copied']:.3f}")
    finish(
        {
            "benchmark": "sam2_memory",
            "quick": values.quick,
            "device": "CPU",
            "parameters": sum(p.numel() for p in model.parameters()),
            "steps": steps,
            **found,
        }
    )


if __name__ == "__main__":
    main()
