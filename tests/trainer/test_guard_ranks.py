"""Two ranks: what is bad on one is skipped by both, and who keeps the others waiting is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from faulty import LAYER, Fault, assert_equal, assert_learnt, fit, rank_main, rows
from world_ranks import run as run_ranks

from data_shards.batch import TripletBatch
from trainer.callbacks import RankTimes, StepGuard
from trainer.run import Run

pytestmark = pytest.mark.filterwarnings("ignore")


def train(shards: Path, root: Path, strategy: str, fault: Fault, **guard: Any) -> tuple[dict[int, Any], list[str]]:
    """Three epochs of three steps, two micro-batches of an image on each rank: what was found, and lines of stderr."""
    if torch.cuda.is_initialized():
        pytest.skip("ranks are forked, which CUDA does not allow once it is in use")
    run_ranks(root, 2, target=rank_main, shards=str(shards), strategy=strategy, fault=fault, guard=guard)
    return torch.load(root / "found.pt"), (root / "said.txt").read_text().splitlines()


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_what_is_bad_on_one_rank_is_skipped_by_both(strategy: str, tiny_shards: Path, tmp_path: Path) -> None:
    passes: list[int] = []

    def fault(step: int, rank: int, batch: TripletBatch) -> str:
        passes.append(step)
        second = passes.count(step) % 2 == 0  # of two micro-batches; the second passes come after both
        return "layer" if rank == 1 and step in (1, 4, 5) and second else ""

    def alone(step: int, rank: int, batch: TripletBatch) -> str:
        return "layer" if step in (1, 4, 5) else ""

    found, said = train(tiny_shards, tmp_path / "two", strategy, fault, rollback_after=2, rollbacks=2)
    expected = fit(tiny_shards, tmp_path / "one", StepGuard(rollback_after=2), alone, epochs=3, micro=1)
    for step in (2, 5):
        for name in ("weights", "moments", "average"):
            assert_equal(found[step][name], found[step - 1][name])
    for name in ("weights", "moments", "average"):
        assert_equal(found[6][name], found[4][name])
        for step in range(1, 10):
            torch.testing.assert_close(found[step][name], expected[step][name], rtol=1e-4, atol=1e-6)
    assert_learnt(found[2], found[3])
    assert_learnt(found[6], found[7])
    reports = sorted(path.name for path in Run(tmp_path / "two").forensics.iterdir())
    assert reports == [f"step-00000{step}-rank1.json" for step in (1, 4, 5)], "the first rank had no part in it"
    content = json.loads((Run(tmp_path / "two").forensics / reports[0]).read_text())
    traced = {row["batch"]: row for row in rows(tmp_path / "two/trace-rank1.csv") if row["step"] == "1"}
    good, bad = content["batches"]
    assert content["rank"] == 1 and not good["at_fault"] and traced[str(good["batch"])]["loss"] != "nan"
    assert [sample["key"] for sample in bad["samples"]] == traced[str(bad["batch"])]["keys"].split()
    assert traced[str(bad["batch"])]["loss"] == "nan"
    assert bad["second_pass"]["layer"]["name"] == LAYER
    assert content["bad_gradients"]["count"] > 0
    assert all(row["loss"] != "nan" for row in rows(Run(tmp_path / "two").trace))
    assert sum(f"on {bad['samples'][0]['key']}: the step is skipped" in line for line in said) == 1
    assert sum("2 bad steps in a row up to step 5" in line for line in said) == 1


def test_a_slow_rank_is_named(tiny_shards: Path, tmp_path: Path) -> None:
    _, said = train(tiny_shards, tmp_path, "ddp", lambda step, rank, batch: "sleep" if rank else "")
    found = rows(Run(tmp_path).ranks)
    assert [(row["step"], row["rank"]) for row in found] == [
        (str(step), rank) for step in range(1, 10) for rank in "01"
    ]
    names = ("data_wait_seconds", "forward_seconds", "step_seconds")
    for first, second in zip(found[::2], found[1::2], strict=True):
        assert float(second["forward_seconds"]) >= 0.6 > 0.4 > float(second["data_wait_seconds"]), "two passes of 0.3 s"
        assert float(first["forward_seconds"]) < float(second["forward_seconds"])
        for waiting, forward, whole in ([float(row[name]) for name in names] for row in (first, second)):
            assert min(waiting, forward) >= 0 and waiting + forward <= whole
    logged = torch.load(tmp_path / "found.pt")[9]["logged"]
    own = [float(row["data_wait_seconds"]) + float(row["forward_seconds"]) for row in found[-2:]]
    assert logged["train/straggler"] == pytest.approx(max(own) / (sum(own) / 2), rel=1e-3)
    lines = [line for line in said if "is slow" in line]
    assert len(lines) == 1 and lines[0].startswith("rank 1 on ") and str(Run(tmp_path).ranks) in lines[0]


def test_a_rank_alone_writes_no_table(tiny_shards: Path, tmp_path: Path) -> None:
    found = fit(tiny_shards, tmp_path, None, lambda step, rank, batch: "", epochs=1, callbacks=[RankTimes()])
    assert not Run(tmp_path).ranks.exists() and "train/straggler" not in found[3]["logged"]
