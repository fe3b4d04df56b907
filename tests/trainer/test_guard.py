"""Steps that must not be learnt from: skipped, looked into, gone back from; a run that goes on decides alike."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from faulty import LAYER, Fault, Faulty, assert_equal, assert_learnt, fit, rows
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.precision import MixedPrecision

from data_shards.batch import TripletBatch
from data_shards.dataset import ShardDataset
from data_shards.errors import UserError
from trainer.callbacks import StepGuard
from trainer.run import Run

pytestmark = pytest.mark.filterwarnings("ignore")


def at(*steps: int, kind: str = "layer") -> Fault:
    """Go wrong in every micro-batch of some steps."""
    return lambda step, rank, batch: kind if step in steps else ""


def trace(root: Path) -> dict[tuple[str, str], tuple[str, str]]:
    """Loss and keys of each batch; of one that was done twice, the last."""
    return {(row["step"], row["batch"]): (row["loss"], row["keys"]) for row in rows(Run(root).trace)}


def taken(after: dict[str, Any]) -> set[float]:
    """How many steps AdamW has counted."""
    return {float(value) for name, value in after["moments"].items() if name.endswith(" step")}


def report(root: Path, step: int) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((Run(root).forensics / f"step-{step:06d}-rank0.json").read_text())
    return content


@pytest.fixture(scope="module")
def undisturbed(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[int, dict[str, Any]], Path]:
    root = tmp_path_factory.mktemp("undisturbed")
    return fit(tiny_shards, root, StepGuard(), at()), root


def test_a_guard_that_finds_nothing_changes_nothing(
    undisturbed: tuple[dict[int, dict[str, Any]], Path], tiny_shards: Path, tmp_path: Path
) -> None:
    found = fit(tiny_shards, tmp_path, None, at())
    assert undisturbed[0][6]["logged"].pop("train/bad_steps") == 0
    assert_equal(found[6], undisturbed[0][6])
    assert trace(tmp_path) == trace(undisturbed[1])
    assert not Run(undisturbed[1]).forensics.exists()


@pytest.mark.parametrize("kind", ["layer", "gradient"])
def test_a_bad_step_is_skipped_and_all_else_goes_on(
    kind: str, undisturbed: tuple[dict[int, dict[str, Any]], Path], tiny_shards: Path, tmp_path: Path
) -> None:
    found = fit(tiny_shards, tmp_path, StepGuard(), at(2, kind=kind))
    expected = undisturbed[0]
    for name in ("weights", "moments", "average"):
        assert_equal(found[2][name], expected[2][name])
    for name in ("weights", "moments", "average"):
        assert_equal(found[3][name], found[2][name])
    assert [found[step]["rate"] for step in range(1, 7)] == [expected[step]["rate"] for step in range(1, 7)]
    assert [found[step]["logged"]["train/bad_steps"] for step in range(1, 7)] == [0, 0, 1, 1, 1, 1]
    assert_learnt(found[3], found[4])
    assert taken(found[6]) == {5.0}, "AdamW took five of six"
    assert all(tensor.isfinite().all() for tensor in found[6]["weights"].values())
    seen, order = trace(tmp_path), trace(undisturbed[1])
    assert {place: keys for place, (_, keys) in seen.items()} == {place: keys for place, (_, keys) in order.items()}
    assert {place[0] for place, (loss, _) in seen.items() if loss == "nan"} == ({"2"} if kind == "layer" else set())


def test_the_first_step_of_all_may_be_bad(tiny_shards: Path, tmp_path: Path) -> None:
    """AdamW has no state yet."""
    found = fit(tiny_shards, tmp_path, StepGuard(), at(0))
    assert found[1]["moments"] == {} and taken(found[6]) == {5.0}


def test_the_report_names_sample_shard_and_layer(
    undisturbed: tuple[dict[int, dict[str, Any]], Path],
    tiny_shards: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    batches = [keys.split() for (step, _), (_, keys) in sorted(trace(undisturbed[1]).items()) if step == "4"]
    key = batches[1][0]
    fit(
        tiny_shards, tmp_path, StepGuard(), lambda step, rank, batch: "layer" if step == 4 and key in batch.keys else ""
    )
    assert [path.name for path in Run(tmp_path).forensics.iterdir()] == ["step-000004-rank0.json"]
    found = report(tmp_path, 4)
    assert (found["why"], found["step"], found["epoch"], found["rank"]) == ("the loss is nan", 4, 1, 0)
    assert (found["step_loss"], found["gradient_norm"]) == ("nan", "nan")
    good, bad = found["batches"]
    assert good == {"batch": 2, "loss": good["loss"], "at_fault": False} and 0 < good["loss"] < 100
    assert (bad["batch"], bad["loss"], bad["at_fault"]) == (3, "nan", True)
    layer = {"name": LAYER, "output": "nan", "weights_are_finite": True}
    assert layer.items() <= bad["second_pass"]["layer"].items() and bad["second_pass"]["loss"] == "nan"
    assert bad["second_pass"]["layer"]["class"] == "Conv2d"
    dataset = ShardDataset(tiny_shards / "train")
    places = {str(name): number for number, name in enumerate(dataset.index.keys)}
    for sample, name in zip(bad["samples"], batches[1], strict=True):
        assert sample["key"] == name and sample["shard"] == dataset.shard(places[name])
        image = dataset[places[name]].image
        expected = {"min": image.min(), "max": image.max(), "dtype": "uint8", "nan_share": 0.0, "shape": [1, 48, 40]}
        assert sample["image"] == expected
    assert found["bad_gradients"]["count"] > 20 == len(found["bad_gradients"]["names"])
    assert all(name.startswith("model.") for name in found["bad_gradients"]["names"])
    first, last = capsys.readouterr().err.splitlines()
    assert first.startswith(f"the loss is nan at step 4 on {batches[1][0]}, {batches[1][1]}: the step is skipped; ")
    assert f"{LAYER} ({bad['second_pass']['layer']['class']}) gave nan first; " in first
    assert str(Run(tmp_path).forensics / "step-000004-rank0.json") in first
    assert f"`data-shards inspect {tiny_shards / 'train'} --sample '{key}' --png sample.png`" in first
    assert last == f"1 bad step was skipped: {Run(tmp_path).forensics}"


def test_what_a_second_pass_does_not_show_is_said(tiny_shards: Path, tmp_path: Path) -> None:
    fit(tiny_shards, tmp_path / "once", StepGuard(), at(1, kind="once"), epochs=1)
    for row in report(tmp_path / "once", 1)["batches"]:
        assert row["second_pass"]["layer"] == "not reproduced" and 0 < row["second_pass"]["loss"] < 100
    fit(tiny_shards, tmp_path / "gradient", StepGuard(), at(1, kind="gradient"), epochs=1)
    found = report(tmp_path / "gradient", 1)
    assert found["why"] in ("the gradients' norm is nan", "the gradients' norm is inf") and found["step_loss"] < 100
    assert [row["second_pass"]["layer"] for row in found["batches"]] == ["not reproduced"] * 2
    assert [row["second_pass"]["loss"] for row in found["batches"]] == [row["loss"] for row in found["batches"]]
    fit(tiny_shards, tmp_path / "off", StepGuard(forensics=False), at(1), epochs=1)
    assert not Run(tmp_path / "off").forensics.exists()


def test_a_second_pass_changes_nothing_that_comes_after(tiny_shards: Path, tmp_path: Path) -> None:
    looked, blind = (fit(tiny_shards, tmp_path / str(on), StepGuard(forensics=on), at(1, 4)) for on in (True, False))
    assert_equal(looked[6], blind[6])


def test_a_spike_is_bad_once_there_are_enough_good_losses(tiny_shards: Path, tmp_path: Path) -> None:
    guard = StepGuard(spike_factor=5.0, spike_window=3)
    found = fit(tiny_shards, tmp_path, guard, at(1, 5, kind="spike"), epochs=3)
    assert_learnt(found[1], found[2])  # the first three good ones are gathered
    assert_equal(found[6]["weights"], found[5]["weights"])
    assert [path.name for path in Run(tmp_path).forensics.iterdir()] == ["step-000005-rank0.json"]
    losses = [
        math.fsum(float(loss) for (n, _), (loss, _) in trace(tmp_path).items() if n == str(s)) / 2 for s in range(9)
    ]
    median = sorted(losses[2:5])[1]
    assert report(tmp_path, 5)["why"] == (
        f"the loss is {losses[5]:.6g}, {losses[5] / median:.3g} times the median of the last 3 good steps"
    )
    assert losses[5] / median > 5
    assert list(guard.state_dict()["losses"]) == pytest.approx(losses[6:9])
    assert [row["at_fault"] for row in report(tmp_path, 5)["batches"]] == [True, True]
    without = fit(tiny_shards, tmp_path / "without", StepGuard(), at(1, 5, kind="spike"), epochs=3)
    assert_learnt(without[5], without[6])


def test_after_bad_steps_in_a_row_training_goes_back(
    tiny_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = fit(tiny_shards, tmp_path, StepGuard(rollback_after=2), at(3, 4), epochs=3, every=2)
    assert_learnt(found[2], found[3])
    assert_equal(found[4]["weights"], found[3]["weights"])
    for name in ("weights", "moments", "average"):
        assert_equal(found[5][name], found[2][name])
    rates = {step: values["rate"] for step, values in found.items()}
    assert rates == {step: values["rate"] for step, values in fit(tiny_shards, tmp_path / "x", None, at(), 3).items()}
    assert_learnt(found[5], found[6])
    order = {place: keys for place, (_, keys) in trace(tmp_path).items()}
    assert order == {place: keys for place, (_, keys) in trace(tmp_path / "x").items()}
    line = next(line for line in capsys.readouterr().err.splitlines() if "in a row" in line)
    assert line.startswith("2 bad steps in a row up to step 4: weights and optimiser are those of ")
    assert "step-000002.ckpt again; samples and schedule go on" in line


def test_what_was_saved_among_bad_steps_is_not_gone_back_to(tiny_shards: Path, tmp_path: Path) -> None:
    """A run that ends, or is told to stop, saves its last step, be it a bad one, with the weights that led there."""
    first = fit(tiny_shards, tmp_path, StepGuard(rollback_after=2), at(3), epochs=3, every=2, max_steps=4)
    assert (Run(tmp_path).checkpoints / "last.ckpt").readlink().name == "step-000004.ckpt"
    found = fit(tiny_shards, tmp_path, StepGuard(rollback_after=2), at(4), epochs=3, every=2)
    for name in ("weights", "moments", "average"):
        assert_equal(found[5][name], first[2][name])
    assert_learnt(found[5], found[6])


@pytest.mark.parametrize(
    ("guard", "steps", "every", "expected"),
    [
        ({"rollback_after": 0}, (4,), 1, r"^the loss is nan at step 4 on \S+, .*: lower model.init_args.lr or look at"
         " these samples; the last checkpoint is from before$"),
        ({}, (1, 2, 3), 99, "^the loss is nan at step 1 on .*; 3 bad steps in a row, and no checkpoint to go back to"
         " yet: lower model.init_args.lr"),
        ({"rollback_after": 1, "rollbacks": 1}, (2, 4), 1, None),
        ({"rollback_after": 2, "rollbacks": 1}, (2, 3, 5, 6), 1, "^the loss is nan at step 5 on .*; going back to a"
         " checkpoint 1 time did not help: lower"),
        ({"rollback_after": 2, "rollbacks": 1}, (1, 2, 5, 6), 1, None),
        ({"rollback_after": 2, "rollbacks": 9}, (5, 6, 7, 8), 1, "^the loss is nan at step 5 on .*; no step after it"
         " was good: lower"),
        ({"rollback_after": 20}, range(9), 1, "^the loss is nan at step 0 on .*; no step after it was good: lower"),
        ({"rollback_after": 2}, (8,), 1, None),
    ],
)  # fmt: skip
def test_it_ends_with_one_line_where_nothing_helps(
    guard: dict[str, Any], steps: tuple[int, ...], every: int, expected: str | None, tiny_shards: Path, tmp_path: Path
) -> None:
    if expected is None:
        assert max(fit(tiny_shards, tmp_path, StepGuard(**guard), at(*steps), epochs=3, every=every)) == 9
        return
    with pytest.raises(UserError, match=expected):
        fit(tiny_shards, tmp_path, StepGuard(**guard), at(*steps), epochs=3, every=every)
    for path in Run(tmp_path).checkpoints.glob("*.ckpt"):
        state = torch.load(path, weights_only=True)["state_dict"]
        assert all(tensor.isfinite().all() for tensor in state.values())


@pytest.mark.parametrize("kill", [3, 5, 6, 8])
def test_a_run_that_goes_on_decides_alike(kill: int, tiny_shards: Path, tmp_path: Path) -> None:
    """Spikes and rollbacks before and after the kill: a median of fewer losses would skip other steps."""

    def fault(step: int, rank: int, batch: TripletBatch) -> str:
        return {2: "spike", 4: "spike", 6: "layer", 7: "spike", 10: "spike"}.get(step, "")

    def guard() -> StepGuard:
        return StepGuard(rollback_after=2, spike_factor=5.0, spike_window=2, forensics=False)

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    expected = fit(tiny_shards, whole, one := guard(), fault, epochs=4, every=2)
    with pytest.raises(RuntimeError, match="killed"):
        fit(tiny_shards, parts, guard(), fault, epochs=4, every=2, kill=kill)
    found = fit(tiny_shards, parts, two := guard(), fault, epochs=4, every=2)
    assert one.state_dict()["total"] == 5
    assert two.state_dict() == one.state_dict()
    assert trace(parts) == trace(whole)
    for name in ("weights", "moments", "average", "rate"):
        assert_equal(found[12][name], expected[12][name])


def test_a_run_that_goes_on_knows_what_did_not_help_before(tiny_shards: Path, tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"rollback_after": 2, "rollbacks": 1, "forensics": False}
    with pytest.raises(RuntimeError, match="killed"):
        fit(tiny_shards, tmp_path, StepGuard(**arguments), at(2, 3, 5, 6), epochs=3, kill=5)
    with pytest.raises(UserError, match=r"step 5 on .*; going back to a checkpoint 1 time did not help"):
        fit(tiny_shards, tmp_path, StepGuard(**arguments), at(2, 3, 5, 6), epochs=3)


def test_beside_a_loss_scaler_nothing_is_judged(tmp_path: Path) -> None:
    scaler = torch.amp.GradScaler("cpu")
    for plugin, expected in (
        (MixedPrecision("16-mixed", "cpu", scaler), False),
        (MixedPrecision("bf16-mixed", "cpu"), True),
    ):
        trainer = Trainer(accelerator="cpu", logger=False, plugins=[plugin], default_root_dir=tmp_path)
        guard, module = StepGuard(), Faulty(at())
        guard.on_train_start(trainer, module)
        assert guard.judges is expected and (module.judge is not None) is expected


@pytest.mark.parametrize(
    "arguments",
    [{"rollback_after": -1}, {"rollbacks": -1}, {"spike_factor": 1.0}, {"spike_factor": math.nan}, {"spike_window": 0}],
)
def test_arguments_out_of_range_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(arguments))):
        StepGuard(**arguments)
