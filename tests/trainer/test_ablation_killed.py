"""An ablation of real processes, killed in the middle: what is missing goes on, what fails is said, the rest stands."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import yaml

from tests.conftest import REPOSITORY, tiny_content

STEPS = 24
PATIENCE = 240.0


def wait(ready: Callable[[], bool], process: subprocess.Popen[str], told: Callable[[], str]) -> None:
    end = time.monotonic() + PATIENCE
    while not ready():
        assert process.poll() is None and time.monotonic() < end, told()
        time.sleep(0.05)


def trace(root: Path) -> list[dict[str, str]]:
    path = root / "trace.csv"
    return list(csv.DictReader(path.open())) if path.is_file() else []


def test_an_ablation_killed_in_its_second_cell_goes_on(tiny_shards: Path, tmp_path: Path, trainer_command) -> None:
    """Untouched weights are scored, SIGKILL ends the training of ``full``, and ``broken`` cannot read its data."""
    base, spec, out = tmp_path / "base.yaml", tmp_path / "three.yaml", tmp_path / "out"
    content = tiny_content(tiny_shards, tmp_path / "elsewhere")
    content["model"]["init_args"]["model"]["init_args"]["image_size"] = 32
    base.write_text("# Does it run?\n" + yaml.safe_dump(content))
    damaged = tmp_path / "damaged"
    shutil.copytree(tiny_shards / "train", damaged)
    for shard in damaged.glob("*.tar"):
        shard.write_bytes(b"\x00" * shard.stat().st_size)
    cells = {
        "untouched": {"tuned": False},
        "full": None,
        "broken": {"overrides": {"data": {"init_args": {"train": str(damaged)}}}},
    }
    keys = {"base": str(base), "budget": {"steps": STEPS}, "reference": "full", "cells": cells}
    spec.write_text("# Does it go on?\n" + yaml.safe_dump(keys, sort_keys=False))
    command = [sys.executable, "-m", "trainer.cli", "ablate", str(spec), "--out", str(out)]
    log = tmp_path / "ablate.log"
    with log.open("w") as lines:
        first = subprocess.Popen(
            command, cwd=REPOSITORY, stdout=lines, stderr=subprocess.STDOUT, start_new_session=True, text=True
        )
    full = out / "cells/full/seed-0"
    note = full.with_name("seed-0.attempt.json")
    try:
        wait(lambda: len(trace(full)) > 8, first, log.read_text)
    finally:
        training = json.loads(note.read_text())["pid"] if note.is_file() else None
        os.killpg(first.pid, signal.SIGKILL)
        first.wait()
    code, _, err = trainer_command("ablate", spec, "--out", out)
    assert code == 2 and f"full, seed 0 is being run by process {training}" in err, "it lives in a session of its own"
    os.killpg(training, signal.SIGKILL)
    while Path(f"/proc/{training}").exists():
        time.sleep(0.05)
    (scored,) = (out / "cells/untouched/evaluation").glob("*/per_case.csv")
    made, seen = scored.stat().st_mtime_ns, trace(full)
    assert 8 < len(seen) < 2 * STEPS, "killed in the middle"

    code, _, err = trainer_command("ablate", spec, "--out", out)
    assert code == 1, err
    assert "1 cell of 3 finished before: skipped" in err and "full, seed 0: goes on" in err
    assert scored.stat().st_mtime_ns == made, "what was finished is not run again"
    said = full.with_name("seed-0.log").read_text()
    assert said.count("$ trainer fit") == 2 and "going on from" in said
    whole = trace(full)
    assert whole[0] == seen[0] and whole[0]["attempt"] == "0" and whole[-1]["attempt"] == "1"
    places = [(row["epoch"], row["batch"]) for row in whole]
    again = [row for row in whole if row["attempt"] == "1"]
    assert len(set(places)) == 2 * STEPS, "every micro-batch, two a step"
    assert len(again) < 2 * STEPS - 4 and len(places) - len(set(places)) <= 4, "but for what no checkpoint had, once"
    assert "broken, seed 0 FAILED: fit: " in err

    states = {row["cell"]: row for row in csv.DictReader((out / "runs.csv").open())}
    assert {name: row["state"] for name, row in states.items()} == {
        "untouched": "finished", "full": "finished", "broken": "failed",
    }  # fmt: skip
    assert "exit code" in states["broken"]["reason"]
    page = (out / "results.html").read_text()
    assert "broken, seed 0: FAILED in fit" in page and "reaches a median DSC" in page
