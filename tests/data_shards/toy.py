"""Small volumes and specs that the tests of `data_shards` share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import yaml

from data_shards.errors import CommandParser, run_command

# LPS: array axes (x, y, z) run to the patient's left, back and head; voxels of 0.5 × 0.75 × 2 mm.
LPS_AFFINE = np.diag([-0.5, -0.75, 2.0, 1.0])
SHAPE = (10, 24, 20)


def save_nifti(path: Path, array: np.ndarray, affine: np.ndarray = LPS_AFFINE) -> Path:
    """Write an array (Z, Y, X)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array.transpose(2, 1, 0), affine), path)
    return path


def make_case(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return an image (Z, Y, X) int16, and labels uint8: a block of 1 in slices 2–7, a single pixel of 2 in slice 4."""
    rng = np.random.default_rng(seed)
    image = rng.integers(-200, 300, SHAPE).astype(np.int16)
    labels = np.zeros(SHAPE, np.uint8)
    labels[2:8, 5:15, 6 : 9 + seed % 5] = 1
    labels[4, 20, 18] = 2
    return image, labels


def base_spec() -> dict:
    return {
        "dataset": "toy",
        "modality": "CT",
        "cases": [{"image": "imgs/{id}.nii.gz", "mask": "gts/{id}_seg.nii.gz", "patient": "^(PAT[0-9]+)_"}],
        "targets": [
            {"term": "left kidney", "synonyms": ["kidney, left"], "value": 1},
            {"term": "kidney cyst", "value": 2},
        ],
        "intensity": {"kind": "window", "level": 40, "width": 400},
        "split": {"kind": "patients", "fractions": {"train": 0.5, "test": 0.5}, "seed": 3},
        "licence": "test",
        "cite": "nobody",
    }


def make_inputs(folder: Path, cases: int = 4, **changes: object) -> Path:
    """Write `cases` cases of as many patients, and a spec with some keys changed (None removes); return the spec."""
    for number in range(cases):
        image, labels = make_case(number)
        save_nifti(folder / "imgs" / f"PAT{number}_scan.nii.gz", image)
        save_nifti(folder / "gts" / f"PAT{number}_scan_seg.nii.gz", labels)
    return write_spec(folder / "toy.yaml", **changes)


def write_spec(path: Path, **changes: object) -> Path:
    spec = {name: value for name, value in {**base_spec(), **changes}.items() if value is not None}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(spec))
    return path


def command_of(module: Any, name: str, capsys: Any) -> Callable[..., tuple[int, str, str]]:
    """Return a function that runs a command of `data-shards` by its module: (exit code, stdout, stderr)."""
    parser = CommandParser(prog=f"data-shards {name}")
    module.add_arguments(parser)

    def command(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = run_command(lambda: module.run(parser.parse_args(list(map(str, arguments)))), "data-shards")
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return command
