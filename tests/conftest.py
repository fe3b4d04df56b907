"""A tiny corpus and recipe on which whole commands run in seconds."""

from __future__ import annotations

import os
import signal

# Tiny tensors gain nothing from threads, and threads that wait for each other on a busy machine lose everything.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import yaml

from data_shards.build import build
from trainer.cli import main

REPOSITORY = Path(__file__).parents[1]

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder of real images; without it the test is skipped."""
    default = REPOSITORY / ".." / "shared" / "data"
    folder = Path(os.environ.get("SAM_TRAINER_TEST_DATA", default))
    if not folder.is_dir():
        pytest.skip("no real images: set SAM_TRAINER_TEST_DATA")
    return folder


@pytest.fixture(scope="session")
def tiny_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of one volume with a bright disc in noise: 12 slices to train on, 6 to test on, 48 × 40 px."""
    folder = tmp_path_factory.mktemp("tiny")
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:48, :40]
    masks = np.stack([(rows - 22 - z % 4) ** 2 + (columns - 20) ** 2 < (6 + z % 3) ** 2 for z in range(22)])
    image = rng.normal(80, 15, masks.shape) + 90 * masks
    for name, array in (("image", image.clip(0, 255).astype(np.uint8)), ("mask", masks.astype(np.uint8))):
        nibabel.save(
            nibabel.Nifti1Image(array.transpose(2, 1, 0), np.diag([-1.0, -1.0, 2.0, 1.0])), folder / f"{name}.nii.gz"
        )
    spec = {
        "dataset": "tiny",
        "modality": "MR",
        "cases": [{"id": "one", "patient": "one", "image": "image.nii.gz", "mask": "mask.nii.gz"}],
        "targets": [{"term": "disc", "value": 1}],
        "intensity": {"kind": "none"},
        "split": {"kind": "slabs", "start": 0, "stop": 22, "thickness": 8, "guard": 2, "names": ["train", "test"]},
        "licence": "none",
        "cite": "nobody",
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(spec))
    build(folder / "tiny.yaml", folder / "shards", root=folder)
    return folder / "shards"


def tiny_content(shards: Path, root: Path) -> dict[str, Any]:
    """A recipe with random weights at 64 px: four steps of four images."""
    return {
        "seed_everything": 0,
        "model": {
            "class_path": "trainer.modules.MedSAMModule",
            "init_args": {
                "model": {
                    "class_path": "trainer.models.LiteMedSAM",
                    "init_args": {"weights": None, "image_size": 64},
                },
                "tuning": {"class_path": "trainer.tuning.FullTuning", "init_args": {"layer_decay": 0.9}},
                "lr": 1.0e-3,
            },
        },
        "data": {
            "class_path": "data_shards.datamodule.TripletDataModule",
            "init_args": {
                "train": str(shards / "train"),
                "test": str(shards / "test"),
                "batch_size": 4,
                "micro_batch_size": 2,
            },
        },
        "trainer": {"default_root_dir": str(root), "max_steps": 4, "log_every_n_steps": 1, "accelerator": "cpu"},
        "checkpoint": {"every_n_steps": 1},
    }


@pytest.fixture(scope="session", autouse=True)
def autograd_started() -> None:
    """Some tests pretend to have a GPU; others, in the same process, fork ranks that go backward."""
    from trainer.rehearsal import start_autograd

    start_autograd()


@pytest.fixture
def tiny_recipe(tiny_shards: Path, tmp_path: Path) -> Path:
    """The tiny recipe as a file; its run goes to ``tmp_path / "run"``."""
    path = tmp_path / "tiny.yaml"
    path.write_text("# Does it run?\n" + yaml.safe_dump(tiny_content(tiny_shards, tmp_path / "run")))
    return path


@pytest.fixture(scope="session")
def tiny_run(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the tiny recipe, evaluated before and after; not to be changed."""
    folder = tmp_path_factory.mktemp("tiny-run")
    recipe = folder / "tiny.yaml"
    recipe.write_text("# Does it run?\n" + yaml.safe_dump(tiny_content(tiny_shards, folder / "run")))
    assert main(["test", "-c", str(recipe)]) == 0
    assert main(["fit", "-c", str(recipe)]) == 0
    assert main(["test", "-c", str(recipe), "--ckpt_path", "last"]) == 0
    return folder / "run"


@pytest.fixture
def trainer_command(capsys: pytest.CaptureFixture[str]) -> Command:
    """Run ``trainer …`` in this process: (exit code, stdout, stderr)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def trainer_process() -> Callable[..., subprocess.Popen[str]]:
    """Start ``trainer …`` as a process of its own."""

    def start(*arguments: object) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "trainer.cli", *map(str, arguments)]
        return subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=REPOSITORY,
            # a suite that runs in the background ignores Ctrl-C, and its children would inherit that
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )

    return start
