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
from torch import Tensor

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
