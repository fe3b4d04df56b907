"""Runs that break down, or are killed at any moment, and go on with other ranks, workers and micro-batches.

The suite kills once; ``SAM_TRAINER_KILLS=20 pytest tests/trainer/test_resume.py`` kills twenty times.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import slow_training
import torch

from data_shards.dataset import ShardDataset
from data_shards.errors import UserError
from data_shards.order import Sampling, epoch_order
from data_shards.scan import write_index
from data_shards.triplet import Provenance, Target, Triplet
from data_shards.writer import ShardWriter
from trainer.report.traces import decode_keys, encode_keys, read_order

COUNT, BATCH, EPOCHS = 123, 8, 2
STEPS = COUNT // BATCH
KILLS = int(os.environ.get("SAM_TRAINER_KILLS", "1"))


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kills") / "train"
    mask = np.zeros((8, 9), np.uint8)
    mask[2:4, 3:7] = 1
    with ShardWriter(folder, 50, 2**20) as writer:
        for number in range(COUNT):
            image = np.full((8, 9), number, np.uint8)
            origin = Provenance("kills", f"p{number}", f"v{number}", "CT", "0" * 64)
            key = f"kills-{number:03d}"
            writer.write(key, Triplet(key, image, (Target.from_mask(mask, "disc"),), ("disc",), origin).encode())
    write_index(folder)
    return folder


def start(shards: Path, root: Path, **options: Any) -> subprocess.Popen[str]:
    arguments = {"shards": str(shards), "root": str(root), "epochs": EPOCHS, "every": 3, "seconds": 0.0, **options}
    command = [sys.executable, str(Path(__file__).parent / "slow_training.py"), json.dumps(arguments)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        start_new_session=True,  # its ranks and workers die with it
    )


def lines(root: Path) -> int:
    trace = root / "trace.csv"
    return trace.read_bytes().count(b"\n") if trace.exists() else 0


def kill_at(process: subprocess.Popen[str], root: Path, count: int) -> bool:
    """Kill a run with all of its processes when its trace has so many lines; False if it ended before."""
    deadline = time.monotonic() + 120
    while process.poll() is None and lines(root) < count and time.monotonic() < deadline:
        time.sleep(0.001)
    alive = process.poll() is None
    if alive:
        os.killpg(process.pid, signal.SIGKILL)
    shown = process.communicate()[0]
    assert alive or process.returncode == 0, shown
    return alive


def expected(shards: Path) -> dict[tuple[int, int], list[str]]:
    """The samples of every step, from the definition of the order alone."""
    index = ShardDataset(shards).index
    return {
        (epoch, epoch * STEPS + step): [
            index.key(position) for position in epoch_order(COUNT, 3, epoch)[step * BATCH : (step + 1) * BATCH]
        ]
        for epoch in range(EPOCHS)
        for step in range(STEPS)
    }


@pytest.mark.parametrize("workers", [0, 2, 4])
@pytest.mark.parametrize("micro", [8, 2], ids=["plain", "accumulated"])
@pytest.mark.parametrize(
    "crashes",
    [(5,), (STEPS,), (STEPS + 4,), (STEPS, STEPS + 4), (4, 9, STEPS, STEPS + 1, 2 * STEPS - 1)],
    ids=["in mid-epoch", "at its end", "in the next", "at its end and in the next", "again and again"],
)
def test_after_a_crash_a_run_goes_on_with_the_next_sample(
    crashes: tuple[int, ...], micro: int, workers: int, shards: Path, undisturbed: str, tmp_path: Path
) -> None:
    arguments = {"shards": str(shards), "root": str(tmp_path), "ranks": 1, "micro": micro, "epochs": EPOCHS, "every": 1}
    for crash in crashes:
        with pytest.raises(RuntimeError, match="crash"):
            slow_training.main(**arguments, workers=workers, crash=crash)
    weight = slow_training.main(**arguments, workers=workers)
    assert read_order(tmp_path) == expected(shards)
    assert weight == pytest.approx(float(undisturbed.rpartition(" ")[2]), rel=1e-6)
    counted = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)["loops"]["fit_loop"]
    passes = BATCH // micro
    assert counted["epoch_loop.batch_progress"]["total"]["ready"] == EPOCHS * STEPS * passes
    assert counted["epoch_loop.batch_progress"]["current"]["ready"] == STEPS * passes
    assert counted["epoch_progress"]["total"]["ready"] == EPOCHS


@pytest.mark.parametrize(
    "hook", ["on_train_epoch_start", "on_before_zero_grad", "on_after_backward", "on_train_batch_end"]
)
@pytest.mark.parametrize("crash", [4, STEPS], ids=["in an epoch", "at its end"])
@pytest.mark.parametrize("by_steps", [False, True], ids=["max_epochs", "max_steps"])
def test_a_checkpoint_of_any_moment_goes_on_after_its_last_step(
    by_steps: bool, crash: int, hook: str, shards: Path, undisturbed: str, tmp_path: Path
) -> None:
    """A batch may have been handed out, or an epoch begun, that nothing was learnt from yet."""
    if hook == "on_train_epoch_start" and crash == 4:
        pytest.skip("no epoch begins there")
    arguments = {"shards": str(shards), "root": str(tmp_path), "ranks": 1, "workers": 0, "every": 99}
    end = {"epochs": 0, "trainer_arguments": {"max_steps": EPOCHS * STEPS}} if by_steps else {"epochs": EPOCHS}
    with pytest.raises(RuntimeError, match="crash"):
        slow_training.main(**arguments, **end, micro=2, crash=crash, hook=hook, rescue=True)
    assert torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)["global_step"] == crash
    weight = slow_training.main(**arguments, **end, micro=4)
    assert read_order(tmp_path) == expected(shards)
    assert weight == pytest.approx(float(undisturbed.rpartition(" ")[2]), rel=1e-6)


def test_limited_epochs_go_on_as_they_were(shards: Path, tmp_path: Path) -> None:
    limit = {"trainer_arguments": {"limit_train_batches": 12}}  # three steps of four micro-batches
    arguments = {"shards": str(shards), "ranks": 1, "workers": 0, "micro": 2, "epochs": 4, "every": 1}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    slow_training.main(root=str(whole), **arguments, **limit)
    for crash in (2, 3, 7, 9):
        with pytest.raises(RuntimeError, match="crash"):
            slow_training.main(root=str(parts), **arguments, **limit, crash=crash)
    with pytest.raises(
        UserError, match=r"cannot resume: an epoch had 3 steps, now 15: set trainer\.limit_train_batches"
    ):
        slow_training.main(root=str(parts), **arguments)
    slow_training.main(root=str(parts), **arguments, **limit)
    orders = [read_order(root) for root in (whole, parts)]
    assert orders[0] == orders[1] and len(orders[0]) == 12
    assert [epoch for epoch, _ in orders[0]] == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
    for limit_given, part in (
        (6, "6 batches are no whole steps of 4: choose a multiple of 4"),
        (0.5, "30 batches are no"),
    ):
        with pytest.raises(UserError, match=part):
            slow_training.main(
                root=str(tmp_path / "no"), **arguments, trainer_arguments={"limit_train_batches": limit_given}
            )
    with pytest.raises(UserError, match="overfit_batches is not supported"):
        slow_training.main(root=str(whole), **arguments, trainer_arguments={"overfit_batches": 4})


def test_another_order_is_refused_at_an_epochs_end_too(shards: Path, tmp_path: Path) -> None:
    arguments = {"shards": str(shards), "root": str(tmp_path), "ranks": 1, "workers": 0, "micro": 2, "every": 1}
    with pytest.raises(RuntimeError, match="crash"):
        slow_training.main(**arguments, epochs=2, crash=STEPS)
    with pytest.raises(UserError, match="cannot resume: the samples were chosen or weighted in another way"):
        slow_training.main(**arguments, epochs=2, sampling=Sampling(power=0.5))


def test_keys_with_spaces_are_traced() -> None:
    keys = ["a b/c 100%-017", "plain", "x%20y"]
    assert decode_keys(encode_keys(keys)) == keys and encode_keys(keys).count(" ") == 2


def test_steps_that_were_not_saved_are_taken_again(shards: Path, tmp_path: Path) -> None:
    arguments = {"shards": str(shards), "root": str(tmp_path), "ranks": 1, "epochs": EPOCHS, "workers": 0}
    for crash, micro in ((8, 2), (11, 8), (STEPS + 6, 4)):
        with pytest.raises(RuntimeError, match="crash"):
            slow_training.main(**arguments, micro=micro, every=5, crash=crash)
    slow_training.main(**arguments, micro=1, every=5)
    assert read_order(tmp_path) == expected(shards)
    steps = [line.split(",")[2] for line in (tmp_path / "trace.csv").read_text().splitlines()[1:]]
    assert steps.count("6") == 4 + 1 and steps.count("3") == 4, "steps 5 to 7 were done twice, and only the last counts"


@pytest.fixture(scope="module")
def undisturbed(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """What a run says that nobody kills, and that its trace is the order as it is defined."""
    root = tmp_path_factory.mktemp("undisturbed")
    process = start(shards, root, ranks=1, workers=0, micro=2)
    shown = process.communicate(timeout=120)[0]
    assert process.returncode == 0, shown
    assert read_order(root) == expected(shards)
    return shown


@pytest.mark.parametrize("trial", range(KILLS))
def test_killed_anywhere_a_run_goes_on_with_other_ranks(
    trial: int, shards: Path, undisturbed: str, tmp_path: Path
) -> None:
    rng = random.Random(trial)
    before, after = rng.sample([1, 2, 4], 2)
    kills = 0
    for ranks in (before, after) if rng.random() < 0.5 else (before,):
        micro = rng.choice([size for size in (1, 2, 4) if BATCH % (size * ranks) == 0])
        passes = BATCH // (micro * ranks)
        moment = lines(tmp_path) + rng.randint(1, int(STEPS * EPOCHS * 0.6) * passes)
        options = {"ranks": ranks, "workers": rng.choice([0, 2]), "micro": micro, "every": rng.choice([1, 2, 3, 5])}
        kills += kill_at(start(shards, tmp_path, seconds=0.01, **options), tmp_path, moment)
    assert kills
    last = after if ranks == before else rng.choice([size for size in (1, 2, 4) if size != ranks])
    micro = rng.choice([size for size in (1, 2, 4) if BATCH % (size * last) == 0])
    process = start(shards, tmp_path, ranks=last, workers=rng.choice([0, 2]), micro=micro)
    shown = process.communicate(timeout=240)[0]
    assert process.returncode == 0, shown
    found = read_order(tmp_path)
    assert found == expected(shards), "the samples of every step, in the global order"
    for epoch in range(EPOCHS):
        seen = Counter(key for (number, _), keys in found.items() if number == epoch for key in keys)
        assert len(seen) == STEPS * BATCH and set(seen.values()) == {1}
    assert shown.splitlines()[-1].split(",")[0] == undisturbed.splitlines()[-1].split(",")[0]
    weights = [float(text.splitlines()[-1].rpartition(" ")[2]) for text in (shown, undisturbed)]
    assert weights[0] == pytest.approx(weights[1], rel=1e-5)
