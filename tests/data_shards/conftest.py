from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from toy import make_inputs

from data_shards.build import build


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of four patients, two in each split; not to be changed."""
    folder = tmp_path_factory.mktemp("built")
    build(make_inputs(folder / "in", slices={"keep": "all"}), folder / "toy")
    return folder / "toy"


@pytest.fixture
def corpus(built: Path, tmp_path: Path) -> Path:
    """A copy of `built` that a test may damage."""
    shutil.copytree(built, tmp_path / "corpus")
    return tmp_path / "corpus"
