from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("torch", "nibabel", "matplotlib", "lightning", "numpy", "scipy", "jsonargparse", "rich", "nilearn", "PIL")


def loaded_by(code: str) -> set[str]:
    text = f"import sys\n{code}\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_the_command_starts_without_heavy_libraries() -> None:
    loaded = loaded_by("import data_shards.cli")
    assert "data_shards.cli" in loaded and not loaded & {*HEAVY, "trainer"}


@pytest.mark.parametrize("module", ["build", "verify", "inspect", "dataset"])
def test_no_torch_nor_pictures_before_they_are_needed(module: str) -> None:
    loaded = loaded_by(f"import data_shards.{module}")
    assert not loaded & {"torch", "nibabel", "matplotlib", "lightning", "trainer"}
