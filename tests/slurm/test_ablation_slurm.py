"""`trainer ablate --cluster` on a real SLURM: an array of cells; a cancelled one is run again; results are gathered."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "faults"))  # as the processes that run the commands have it

from corpus import recipe, write_recipe, write_shards
from harness import lines
from rig import Slurm
from test_slurm import CLUSTER, log_of, number_of, wait

from trainer.cli import main

STEPS = 150


def test_cells_run_as_an_array_and_a_cancelled_one_goes_on(
    slurm: Slurm, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shards, out = write_shards(tmp_path / "shards"), tmp_path / "out"
    content = recipe(shards, tmp_path / "elsewhere")
    content["data"]["init_args"]["test"] = str(shards / "val")
    base = write_recipe(tmp_path / "base.yaml", content)
    cluster, spec = tmp_path / "cluster.yaml", tmp_path / "two.yaml"
    settings = {"trainer": {"num_nodes": 1, "devices": 1}, "cluster": CLUSTER}
    cluster.write_text("# Two virtual nodes of this machine.\n" + yaml.safe_dump(settings))
    cells = {"slow": {"overrides": {"model": {"init_args": {"lr": 1.0e-4}}}}, "fast": None}
    keys = {"base": str(base), "budget": {"steps": STEPS}, "cells": cells}
    spec.write_text("# Does the rate matter?\n" + yaml.safe_dump(keys, sort_keys=False))
    command = ["ablate", str(spec), "--out", str(out), "--cluster", str(cluster)]
    slow, fast = (out / "cells" / name / "seed-0" for name in cells)

    def trainer(*more: str) -> str:
        capfd.readouterr()
        code = main([*command, *more])
        said = capfd.readouterr()
        assert code == 0, said.out + said.err
        return said.out

    def told() -> str:
        return slurm.run("squeue") + "\n".join(log_of(root) for root in (slow, fast))

    def ended() -> bool:
        return not slurm.run("squeue", "-h").strip()

    assert "2 tasks would train" in trainer("--dry-run")
    fit, score = (number_of(line) for line in trainer().splitlines() if line.startswith("submitted"))
    wait(lambda: lines(fast) > 4, told)
    slurm.run("scancel", f"{fit}_2", check=True)
    wait(lambda: slurm.job(f"{fit}_2").get("JobState") == "CANCELLED", told)
    wait(lambda: slurm.job(f"{score}_1").get("JobState") == "COMPLETED", told)
    slurm.run("scancel", score)  # what waited for the cancelled one
    wait(ended, told)
    states = {cell: row["state"] for cell, row in gathered(trainer("--report") and out).items()}
    assert states == {"slow": "finished", "fast": "begun"}
    before = lines(fast)
    assert 4 < before < 2 * STEPS

    done = lines(slow)
    assert sum(line.startswith("submitted") for line in trainer().splitlines()) == 2
    wait(ended, told)
    assert "going on from" in log_of(fast) and lines(slow) == done, "the cancelled one alone, from where it was"
    assert "nothing is left to do" in trainer()
    rows = gathered(trainer("--report") and out)
    assert {row["state"] for row in rows.values()} == {"finished"}
    assert all(float(row["dsc"]) >= 0 and int(row["checkpoint_bytes"]) > 0 for row in rows.values())
    assert "reaches a median DSC" in (out / "results.html").read_text()


def gathered(out: Path) -> dict[str, dict[str, str]]:
    return {row["cell"]: row for row in csv.DictReader((out / "runs.csv").open())}
