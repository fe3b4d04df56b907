"""Real weights, and the real slices that they are tried on."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
import yaml
from copied_runs import copied
from torch import Tensor

from data_shards.build import build
from trainer.models import LiteMedSAM


@pytest.fixture(scope="session")
def untouched() -> LiteMedSAM:
    """LiteMedSAM with its released weights at 256 px, in evaluation mode; not to be changed."""
    return LiteMedSAM().eval()


@pytest.fixture(scope="session")
def small(untouched: LiteMedSAM) -> LiteMedSAM:
    """`untouched` at 64 px; not to be changed, but copied."""
    return untouched.at_size(64)


@pytest.fixture(scope="session")
def template() -> np.ndarray:
    """The T1 template that nilearn ships: (197, 233, 189) uint8, axes x, y, z."""
    spec = importlib.util.find_spec("nilearn")  # its code is not needed
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("no MR template: nilearn is not installed")
    data = Path(next(iter(spec.submodule_search_locations))) / "datasets" / "data"
    return np.asarray(nibabel.load(data / "mni_icbm152_t1_tal_nlin_sym_09a_converted.nii.gz").dataobj)


@pytest.fixture(scope="session")
def real_slice(template: np.ndarray) -> Callable[[str], Tensor]:
    """Real slices by name, (1, H, W) at native size and dtype; where CT is missing, the test is skipped."""

    def read(name: str) -> Tensor:
        if name == "mr axial":
            return torch.from_numpy(template[:, :, 90].T.copy())[None]
        if name == "mr sagittal":
            return torch.from_numpy(template[110].T.copy())[None]
        default = Path(__file__).parents[3] / "shared" / "data"
        folder = Path(os.environ.get("SAM_TRAINER_TEST_DATA", default))
        paths = sorted((folder / "ct_lesion_recist_npz").glob("*.npz"))
        if not paths:
            pytest.skip("no real CT: set SAM_TRAINER_TEST_DATA")
        with np.load(paths[0], allow_pickle=False) as content:
            volume = content["imgs"]
        return torch.from_numpy(volume[len(volume) // 2].copy())[None]

    return read


@pytest.fixture(scope="session")
def shape_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of slices with a bright disc, a dark square, or both: 10 to train on, 5 to validate, 5 to test."""
    folder = tmp_path_factory.mktemp("shapes")
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:48, :40]
    labels = np.zeros((20, 48, 40), np.uint8)
    for z in range(20):
        if z % 4 != 1:
            labels[z][(rows - 14 - z % 3) ** 2 + (columns - 12) ** 2 < 49] = 1
        if z % 4 != 2:
            labels[z, 28:42, 20 + z % 3 : 34] = 2
    image = rng.normal(120, 5, labels.shape) + 90 * (labels == 1) - 90 * (labels == 2)
    for number, part in enumerate(np.split(np.arange(20), [10, 15])):
        for name, array in (("image", image.clip(0, 255).astype(np.uint8)), ("mask", labels)):
            affine = np.diag([-1.0, -1.0, 2.0, 1.0])
            nibabel.save(nibabel.Nifti1Image(array[part].transpose(2, 1, 0), affine), folder / f"{name}{number}.nii.gz")
    splits = ("train", "val", "test")
    spec = {
        "dataset": "shapes",
        "modality": "MR",
        "cases": [
            {"image": f"image{n}.nii.gz", "mask": f"mask{n}.nii.gz", "patient": f"p{n}", "split": split}
            for n, split in enumerate(splits)
        ],
        "targets": [{"term": "disc", "synonyms": ["round thing"], "value": 1}, {"term": "square", "value": 2}],
        "intensity": {"kind": "none"},
        "split": {"kind": "explicit"},
        "licence": "none",
        "cite": "nobody",
    }
    (folder / "shapes.yaml").write_text(yaml.safe_dump(spec))
    build(folder / "shapes.yaml", folder / "shards", root=folder)
    return folder / "shards"


@pytest.fixture
def copied_run(tiny_run: Path, tmp_path: Path) -> Path:
    """A copy of the tiny run, without its exports."""
    return copied(tiny_run, tmp_path / "copied")
