"""`trainer launch` and `trainer jobs` on a real SLURM of two virtual nodes: preempted, requeued, and as undisturbed."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "faults"))  # as the processes that run the commands have it

from corpus import write_recipe
from harness import Lane, Variant, compare, lane, left_by, lines
from rig import Slurm

from data_shards.build import build
from trainer.cli import main

PATIENCE = 180.0
TRAINING = Variant("DDP, 2 ranks", ranks=2, options=(("trainer.max_epochs", 4),))
ENDLESS = Variant("endless", ranks=2, options=(("trainer.max_epochs", 10_000),))
CLUSTER = {"kind": "slurm", "hours": 0.25, "partition": "tests", "signal_seconds": 60}
Command = Callable[..., str]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lane]:
    with lane(tmp_path_factory.mktemp("here")) as made:
        yield made


@pytest.fixture
def cluster(tmp_path: Path) -> Path:
    path = tmp_path / "cluster.yaml"
    path.write_text(
        "# Two virtual nodes of this machine.\n"
        + yaml.safe_dump({"trainer": {"num_nodes": 2, "devices": 1}, "cluster": CLUSTER})
    )
    return path


@pytest.fixture
def trainer(capfd: pytest.CaptureFixture[str]) -> Command:
    """What a command of trainer says on standard output; it succeeds."""

    def run(*arguments: object) -> str:
        capfd.readouterr()
        code = main([str(argument) for argument in arguments])
        said = capfd.readouterr()
        assert code == 0, said.out + said.err
        return said.out

    return run


def wait(ready: Callable[[], Any], told: Callable[[], str], seconds: float = PATIENCE) -> None:
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end, told()
        time.sleep(0.02)


def number_of(said: str) -> str:
    """The job's number in what `trainer launch` says."""
    return said.split(" as ")[1].split(":")[0]


def log_of(root: Path) -> str:
    logs = sorted(root.glob("jobs/*/log*.txt"))
    return "\n".join(path.read_text(errors="replace") for path in logs)


def let_go_on(slurm: Slurm, number: str, told: Callable[[], str]) -> None:
    """Spare a requeued job the two minutes that SLURM lets it wait."""
    wait(lambda: slurm.job(number).get("JobState") == "PENDING", told)
    time.sleep(2)  # before that its nodes would not take it again
    slurm.run("scontrol", "update", f"jobid={number}", "StartTime=now", check=True)


def launch_training(trainer: Command, variant: Variant, place: Lane, root: Path, cluster: Path) -> str:
    recipe = write_recipe(cluster.parent / "recipe.yaml", variant.recipe(place.shards, root))
    return number_of(trainer("launch", recipe, "--cluster", cluster))


def test_a_training_on_two_nodes_is_preempted_twice_and_ends_as_undisturbed(
    slurm: Slurm, place: Lane, cluster: Path, trainer: Command, tmp_path: Path
) -> None:
    expected = place.undisturbed(TRAINING)
    root = tmp_path / "it's a run"
    number = launch_training(trainer, TRAINING, place, root, cluster)

    def told() -> str:
        return f"{slurm.job(number)}\n{log_of(root)}"

    wait(lambda: lines(root) > 5, told)
    slurm.run("scontrol", "requeue", number, check=True)  # SIGTERM to everything; as an operator or preemption does
    let_go_on(slurm, number, told)
    first = lines(root)
    assert "stopped by SIGTERM at step" in log_of(root)
    wait(lambda: lines(root) > first + 5, told)
    slurm.run("scancel", "--signal=USR1", number, check=True)  # to the tasks alone, as at the time limit
    let_go_on(slurm, number, told)
    assert "stopped by SIGUSR1 at step" in log_of(root)
    wait(lambda: slurm.job(number).get("JobState") not in ("PENDING", "RUNNING", "COMPLETING"), told)
    job, log = slurm.job(number), log_of(root)
    assert (job["JobState"], job["Restarts"], job["NumNodes"]) == ("COMPLETED", "2", "2"), told()
    assert log.count("going on from") == 2 and "Traceback" not in log, log
    assert not list(root.rglob("hpc_*"))
    compare(left_by(root), expected)


def test_jobs_lists_tails_and_cancels_for_good(
    slurm: Slurm, place: Lane, cluster: Path, trainer: Command, tmp_path: Path
) -> None:
    root = tmp_path / "run"
    number = launch_training(trainer, ENDLESS, place, root, cluster)

    def told() -> str:
        return f"{slurm.job(number)}\n{log_of(root)}"

    wait(lambda: lines(root) > 2, told)
    (line,) = [line for line in trainer("jobs", root).splitlines() if line.startswith(number)]
    assert "running" in line
    assert trainer("jobs", "tail", root, "-n", 1).strip()
    assert f"cancelled {number}" in trainer("jobs", "cancel", root)
    wait(lambda: slurm.job(number).get("JobState") == "CANCELLED", told)
    wait(lambda: not slurm.run("squeue", "-h").strip(), told)
    job = slurm.job(number)
    assert (job["JobState"], job["Restarts"]) == ("CANCELLED", "0"), "its script brought it back to life"
    assert "stopped by SIGTERM at step" in log_of(root)
    assert "ended" in trainer("jobs", root)


def write_spec(folder: Path) -> Path:
    """A spec of four small volumes."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(4):
        mask = np.zeros((20, 24, 6), np.uint8)
        mask[4 + number : 12, 5:15, 1:5] = 1
        image = (rng.normal(80, 12, mask.shape) + 90 * mask).clip(0, 255).astype(np.uint8)
        for name, array in (("image", image), ("mask", mask)):
            nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), folder / f"{name}{number}.nii.gz")
    spec = {
        "dataset": "four",
        "modality": "MR",
        "cases": [
            {
                "image": f"image{n}.nii.gz",
                "mask": f"mask{n}.nii.gz",
                "patient": f"p{n}",
                "split": "test" if n else "train",
            }
            for n in range(4)
        ],
        "targets": [{"term": "block", "value": 1}],
        "intensity": {"kind": "none"},
        "split": {"kind": "explicit"},
        "licence": "none",
        "cite": "nobody",
    }
    (folder / "four.yaml").write_text(yaml.safe_dump(spec))
    return folder / "four.yaml"


def test_shards_are_built_by_an_array_and_merged(slurm: Slurm, cluster: Path, trainer: Command, tmp_path: Path) -> None:
    spec = write_spec(tmp_path / "source")
    build(spec, tmp_path / "alone", root=spec.parent)
    out = tmp_path / "corpus"
    said = trainer("launch", "build", spec, "--out", out, "--root", spec.parent, "--parts", 2, "--cluster", cluster)
    array, merge = (number_of(line) for line in said.splitlines() if line.startswith("submitted"))

    def told() -> str:
        return f"{slurm.job(merge)}\n" + "\n".join(path.read_text() for path in tmp_path.glob("corpus.jobs/*/log*"))

    wait(lambda: slurm.job(merge).get("JobState") not in ("PENDING", "RUNNING", "COMPLETING"), told)
    assert slurm.job(merge)["JobState"] == "COMPLETED", told()
    assert {slurm.job(f"{array}_{task}")["JobState"] for task in (1, 2)} == {"COMPLETED"}
    assert files_in(out) == files_in(tmp_path / "alone")


def files_in(corpus: Path) -> dict[str, bytes]:
    return {str(path.relative_to(corpus)): path.read_bytes() for path in corpus.rglob("*") if path.is_file()}
