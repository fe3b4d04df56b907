"""The average of weights: its value by hand, in checkpoints, in validations and evaluations, and over resumes."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradient_ranks
import pytest
import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from data_shards.errors import UserError
from trainer.callbacks import EMA, RunCheckpoint
from trainer.callbacks.ema import EvaluateAverage
from trainer.restore import restore
from trainer.run import Run
from trainer.scores import read_scores

Command = Callable[..., tuple[int, str, str]]
pytestmark = pytest.mark.filterwarnings("ignore")


class Line(LightningModule):
    """One layer learns, one is frozen; a step's gradient is the mean of its batch."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.frozen = nn.Linear(3, 1, bias=False), nn.Linear(3, 1)
        self.frozen.requires_grad_(False)
        nn.init.zeros_(self.layer.weight)
        self.validated: list[Tensor] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.layer(BATCHES[self.trainer.global_step]).mean()  # a plain loader would begin again after a resume

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.validated.append(self.layer.weight.detach().clone())
        self.log("val/dsc", self.layer.weight.abs().sum())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1.0)


class Watch(Callback):
    """Keeps the weights after every batch."""

    def __init__(self) -> None:
        self.weights: list[Tensor] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.weights.append(pl_module.get_parameter("layer.weight").detach().clone())


BATCHES = torch.randn(12, 4, 3, generator=torch.Generator().manual_seed(0))


def fit(folder: Path, *callbacks: Callback, steps: int = 4, resume: str | None = None, **arguments: Any) -> Line:
    module = Line()
    trainer = Trainer(
        accelerator="cpu",
        max_steps=steps,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=folder,
        callbacks=[*callbacks],
        **arguments,
    )
    loaders = [torch.utils.data.DataLoader(BATCHES[part], batch_size=None) for part in (slice(None), slice(1))]  # type: ignore[arg-type]
    trainer.fit(module, *loaders, ckpt_path=resume, weights_only=True)
    return module


def saved(folder: Path, name: str = "last") -> dict[str, Any]:
    content: dict[str, Any] = torch.load(folder / f"{name}.ckpt", weights_only=True)
    return content


def by_hand(weights: list[Tensor], decays: list[float]) -> Tensor:
    average = torch.zeros(1, 3)
    for weight, decay in zip(weights, decays, strict=True):
        average = decay * average + (1 - decay) * weight
    return average


@pytest.mark.parametrize(
    ("arguments", "decays"),
    [
        ({"decay": 0.9, "warmup": False}, [0.9] * 4),
        ({"decay": 0.25}, [1 / 10, 2 / 11, 3 / 12, 0.25]),
        ({}, [1 / 10, 2 / 11, 3 / 12, 4 / 13]),
        ({"decay": 0.0}, [0.0] * 4),
    ],
)
def test_the_average_is_that_by_hand(arguments: dict[str, Any], decays: list[float], tmp_path: Path) -> None:
    watch = Watch()
    module = fit(tmp_path, EMA(**arguments), watch, RunCheckpoint(dirpath=str(tmp_path)))
    content = saved(tmp_path)
    assert content["average"]["weights"].keys() == {"layer.weight"}, "what is frozen is not averaged"
    torch.testing.assert_close(content["average"]["weights"]["layer.weight"], by_hand(watch.weights, decays))
    assert torch.equal(content["state_dict"]["layer.weight"], watch.weights[-1])
    assert torch.equal(module.layer.weight, watch.weights[-1]), "a fit ends with the weights that it learnt"


def test_accumulated_batches_count_as_one_step(tmp_path: Path) -> None:
    watch = Watch()
    fit(tmp_path, EMA(0.9, warmup=False), watch, RunCheckpoint(dirpath=str(tmp_path)), accumulate_grad_batches=3)
    content = saved(tmp_path)
    assert content["average"]["steps"] == 4
    expected = by_hand(watch.weights[2::3], [0.9] * 4)
    torch.testing.assert_close(content["average"]["weights"]["layer.weight"], expected)


def test_the_weights_learn_as_without_an_average(tmp_path: Path) -> None:
    alone = fit(tmp_path, val_check_interval=2, enable_checkpointing=False)
    beside = fit(tmp_path, EMA(), val_check_interval=2, enable_checkpointing=False)
    assert torch.equal(alone.layer.weight, beside.layer.weight)


def test_validation_scores_the_average_and_the_best_is_kept_by_it(tmp_path: Path) -> None:
    watch, folder = Watch(), tmp_path / "checkpoints"
    best = RunCheckpoint(monitor="val/dsc", mode="min", dirpath=str(folder))
    # named last, as a recipe may: checkpoints are written after it all the same
    module = fit(tmp_path, best, watch, EMA(0.5, warmup=False), val_check_interval=1)
    averages = [by_hand(watch.weights[: n + 1], [0.5] * (n + 1)) for n in range(4)]
    for found, expected in zip(module.validated, averages, strict=True):
        torch.testing.assert_close(found, expected)
    smallest = min(range(4), key=lambda n: float(averages[n].abs().sum()))
    (path,) = folder.glob("best-*.ckpt")
    assert path.stem == f"best-{smallest + 1:06d}"
    content = saved(folder, path.stem)
    assert torch.equal(content["average"]["weights"]["layer.weight"], module.validated[smallest])
    assert torch.equal(content["state_dict"]["layer.weight"], watch.weights[smallest])


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_resumed_is_undisturbed_to_the_last_bit(stop: int, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    fit(whole, EMA(0.8), RunCheckpoint(1, dirpath=str(whole)), val_check_interval=1)
    fit(parts, EMA(0.8), RunCheckpoint(1, dirpath=str(parts)), val_check_interval=1, steps=stop)
    before = saved(parts)
    fit(parts, EMA(0.8), RunCheckpoint(1, dirpath=str(parts)), val_check_interval=1, resume=str(parts / "last.ckpt"))
    ours, theirs = saved(parts), saved(whole)
    assert not torch.equal(before["average"]["weights"]["layer.weight"], ours["average"]["weights"]["layer.weight"])
    assert torch.equal(ours["average"]["weights"]["layer.weight"], theirs["average"]["weights"]["layer.weight"])
    assert torch.equal(ours["state_dict"]["layer.weight"], theirs["state_dict"]["layer.weight"])
    assert ours["average"]["steps"] == 4


@pytest.mark.parametrize(
    ("saved_with", "now", "message"),
    [
        ([EMA(0.9)], [], "EMA of decay 0.9, warmup True in checkpoint .*last.ckpt, now no EMA"),
        ([EMA(0.9)], [EMA(0.99)], "EMA of decay 0.9, warmup True in .*, now EMA of decay 0.99, warmup True"),
        ([], [EMA(0.9)], "no EMA in checkpoint .*, now EMA of decay 0.9"),
    ],
)
def test_another_average_is_refused(
    saved_with: list[Callback], now: list[Callback], message: str, tmp_path: Path
) -> None:
    from trainer.callbacks.ema import check_average

    fit(tmp_path, *saved_with, RunCheckpoint(dirpath=str(tmp_path)))
    with pytest.raises(UserError, match=message):
        check_average(saved(tmp_path), now, tmp_path / "last.ckpt")
    if now:
        with pytest.raises(UserError, match=message):
            fit(tmp_path, *now, resume=str(tmp_path / "last.ckpt"), steps=5)


def test_a_validation_that_breaks_down_leaves_the_weights(tmp_path: Path) -> None:
    class Broken(Line):
        def validation_step(self, batch: Tensor, batch_idx: int) -> None:
            self.seen = self.layer.weight.detach().clone()
            raise RuntimeError("broken")

    module, ema, watch = Broken(), EMA(0.5, warmup=False), Watch()
    trainer = Trainer(
        accelerator="cpu", max_steps=4, logger=False, enable_progress_bar=False, enable_model_summary=False,
        num_sanity_val_steps=0, enable_checkpointing=False, val_check_interval=2, callbacks=[ema, watch],
        default_root_dir=tmp_path,
    )  # fmt: skip
    loader: Any = torch.utils.data.DataLoader(BATCHES, batch_size=None)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="broken"):
        trainer.fit(module, loader, loader)
    torch.testing.assert_close(module.seen, by_hand(watch.weights, [0.5, 0.5]))
    assert torch.equal(module.layer.weight, watch.weights[-1])
    assert torch.equal(ema.average["layer.weight"], module.seen)


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_a_decay_out_of_range_is_refused(decay: float) -> None:
    with pytest.raises(UserError, match=r"EMA's decay is in \[0, 1\)"):
        EMA(decay)


def average_on_a_rank(rank: int, port: int, out: str) -> None:
    """Average a sharded model over three steps, save it, and load it into a fresh one."""
    import os

    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    torch.manual_seed(0)
    module: Any = Line()
    fully_shard(module.layer)
    trainer: Any = SimpleNamespace(global_step=0)
    ema = EMA(0.5, warmup=False)
    ema.on_train_start(trainer, module)
    optimizer = torch.optim.SGD(module.layer.parameters(), lr=1.0)
    for step in range(3):
        module.layer(BATCHES[step]).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        trainer.global_step += 1
        ema.on_train_batch_end(trainer, module)
    checkpoint: dict[str, Any] = {}
    ema.on_save_checkpoint(trainer, module, checkpoint)
    fresh: Any = Line()
    fully_shard(fresh.layer)
    EvaluateAverage(checkpoint["average"]["weights"]).on_test_start(trainer, fresh)
    loaded = fresh.layer.weight.full_tensor()
    torch.save((checkpoint["average"]["weights"]["layer.weight"].full_tensor(), loaded), Path(out) / f"rank{rank}.pt")
    dist.destroy_process_group()


def test_shards_are_averaged_saved_and_loaded(tmp_path: Path) -> None:
    torch.multiprocessing.start_processes(
        average_on_a_rank, args=(gradient_ranks.free_port(), str(tmp_path)), nprocs=2, start_method="fork"
    )
    watch = Watch()
    fit(tmp_path, watch, steps=3, enable_checkpointing=False)
    for rank in range(2):
        average, loaded = torch.load(tmp_path / f"rank{rank}.pt")
        torch.testing.assert_close(average, by_hand(watch.weights, [0.5] * 3))
        assert torch.equal(average, loaded)


@pytest.fixture(scope="module")
def averaged(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe of a run that keeps an average, trained for three steps and validated after each."""
    from trainer.cli import main

    folder = tmp_path_factory.mktemp("averaged")
    content = yaml.safe_load((tiny_run.parent / "tiny.yaml").read_text())
    content["model"]["init_args"]["model"]["init_args"]["image_size"] = 32
    content["model"]["init_args"]["lr"] = 2.0e-6
    content["data"]["init_args"]["val"] = content["data"]["init_args"]["test"]
    content["trainer"] |= {
        "default_root_dir": str(folder / "run"),
        "max_steps": 3,
        "val_check_interval": 2,
        "callbacks": [{"class_path": "trainer.callbacks.EMA", "init_args": {"decay": 0.9, "warmup": False}}],
    }
    recipe = folder / "averaged.yaml"
    recipe.write_text("# Is it averaged?\n" + yaml.safe_dump(content))
    assert main(["fit", "-c", str(recipe)]) == 0
    return recipe


def test_evaluations_and_exports_take_the_average_unless_the_raw_weights_are_asked_for(
    averaged: Path, trainer_command: Command
) -> None:
    run = Run(averaged.parent / "run")
    logged = [row for file in run.root.glob("logs/*/metrics.csv") for row in csv.DictReader(file.open())]
    validated = [float(row["val/dsc"]) for row in logged if row.get("val/dsc")][-1]
    rows = {}
    for weights in (None, "average", "raw"):
        asked = () if weights is None else ("--weights", weights)
        code, _, err = trainer_command("test", "-c", averaged, "--ckpt_path", "last", *asked)
        assert code == 0, err
        rows[weights] = read_scores(run.evaluation("tuned") / "per_case.csv")
    scored = [sum(score.dsc for score in rows[weights]) / len(rows[weights]) for weights in (None, "average", "raw")]
    assert rows[None] == rows["average"] != rows["raw"]
    assert scored[0] == pytest.approx(validated, abs=1e-6), "what the validation in the fit scored"
    shown = [
        trainer_command("validate", "-c", averaged, "--ckpt_path", "last", "--weights", weights)[1]
        for weights in ("average", "raw")
    ]
    assert "val/dsc" in shown[0] and shown[0] != shown[1]
    predicted = {}
    for weights in ("average", "raw"):
        assert trainer_command("predict", "-c", averaged, "--ckpt_path", "last", "--weights", weights)[0] == 0
        predicted[weights] = (run.root / "predictions/rank-0.jsonl").read_text()
    assert predicted["average"] != predicted["raw"]
    content = saved(run.checkpoints)
    average, raw = restore(run).state_dict(), restore(run, weights="raw").state_dict()
    assert all(torch.equal(raw[name], tensor) for name, tensor in content["state_dict"].items())
    assert all(torch.equal(average[name], tensor) for name, tensor in content["average"]["weights"].items())
    names = content["average"]["weights"].keys()
    assert sum(not torch.equal(average[name], raw[name]) for name in names) > len(names) / 2
    assert all(torch.equal(average[name], raw[name]) for name in raw.keys() - names)


def test_a_run_that_goes_on_is_undisturbed_to_the_last_bit(
    averaged: Path, trainer_command: Command, tmp_path: Path
) -> None:
    parts = ("fit", "-c", averaged, "--trainer.default_root_dir", tmp_path)
    assert trainer_command(*parts, "--trainer.max_steps", 1)[0] == 0
    assert trainer_command(*parts, "--ckpt_path", "last", "--data.init_args.micro_batch_size", 2)[0] == 0
    ours, theirs = saved(Run(tmp_path).checkpoints), saved(averaged.parent / "run/checkpoints")
    for found, expected in (
        (ours["state_dict"], theirs["state_dict"]),
        (ours["average"]["weights"], theirs["average"]["weights"]),
    ):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_what_was_scored_is_recorded(averaged: Path, trainer_command: Command) -> None:
    record = averaged.parent / "run/evaluation/tuned/evaluation.json"
    for asked, expected in (((), "average"), (("--weights", "raw"), "raw")):
        assert trainer_command("test", "-c", averaged, "--ckpt_path", "last", *asked)[0] == 0
        assert json.loads(record.read_text())["weights"] == expected
    assert trainer_command("test", "-c", averaged)[0] == 0
    untouched = averaged.parent / "run/evaluation/untouched/evaluation.json"
    assert json.loads(untouched.read_text())["weights"] is None


def test_mistakes_are_one_line(averaged: Path, tiny_run: Path, tiny_recipe: Path, trainer_command: Command) -> None:
    last = tiny_run / "checkpoints/last.ckpt"
    code, _, err = trainer_command("test", "-c", tiny_recipe, "--ckpt_path", last, "--weights", "average")
    assert (code, err.count("\n")) == (2, 1), err
    assert f"checkpoint {last}: it has no average of the weights" in err
    longer = ("fit", "-c", averaged, "--ckpt_path", "last", "--trainer.max_steps", 4)
    code, _, err = trainer_command(*longer, "--trainer.callbacks", "null")
    assert (code, err.count("\n")) == (2, 1), err
    assert "cannot go on with another trainer.callbacks: EMA of decay 0.9, warmup False in checkpoint" in err
    code, _, err = trainer_command("test", "-c", averaged, "--weights", "last")
    assert (code, err.count("\n")) == (2, 1), err
    assert "weights" in err
