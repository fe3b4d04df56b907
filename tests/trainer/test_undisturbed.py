"""A training with all that goes with it: killed anywhere it ends as if nothing had been, and ranks agree."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from encoders import make
from lightning.pytorch import Callback, Trainer, seed_everything

from data_shards.datamodule import TripletDataModule
from trainer.callbacks import EMA, RunCheckpoint, SampleTrace, ValidationPanels, ValidationRecord
from trainer.modules import MedSAMModule
from trainer.prompts import BoxPrompts, ClickPrompts, MaskPrompts, MixedPrompts, Prompter
from trainer.run import Run
from trainer.tuning import FullTuning, LoRATuning, Tuning

pytestmark = pytest.mark.filterwarnings("ignore")


class Kill(Callback):
    """Breaks down in a hook at a step."""

    def __init__(self, step: int, hook: str) -> None:
        self.step = step
        setattr(self, hook, self._kill)

    def _kill(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.step and not trainer.sanity_checking:
            raise RuntimeError("killed")


def fit(
    shards: Path,
    root: Path,
    *callbacks: Callback,
    every: int = 1,
    micro: int = 2,
    prompts: Prompter | None = None,
    tuning: Tuning | None = None,
    **arguments: Any,
) -> dict[str, Any]:
    """Train for two epochs of three steps, from the last checkpoint or from the start; what is left of it."""
    seed_everything(0)
    run = Run(root)
    run.root.mkdir(exist_ok=True)
    last = run.checkpoints / "last.ckpt"
    module = MedSAMModule(
        make("medsam").train(),
        tuning,
        prompts or ClickPrompts(corrections=1, blank=1, eval_corrections=1),
        score_weight=1.0,
        lr=1e-3,
        schedule="cosine",
        warmup_steps=2,
    )
    folders: dict[str, Any] = {"train": str(shards / "train"), "val": str(shards / "test")}
    trainer = Trainer(
        **{"devices": 1, "max_epochs": 2, "gradient_clip_val": 0.1, "num_sanity_val_steps": -1, **arguments},
        accelerator="cpu",
        default_root_dir=root,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[
            RunCheckpoint(every, monitor="val/dsc", dirpath=str(run.checkpoints)),
            *(SampleTrace(), ValidationRecord(), ValidationPanels(2), EMA(0.9)),
            *callbacks,
        ],
    )
    data = TripletDataModule(**folders, batch_size=4, micro_batch_size=micro, seed=0)
    trainer.fit(module, datamodule=data, ckpt_path=str(last) if last.exists() else None, weights_only=True)
    return left_by(run)


def left_by(run: Run) -> dict[str, Any]:
    content = torch.load(run.checkpoints / "last.ckpt", weights_only=True)
    rows: dict[tuple[str, str], str] = {}
    with run.trace.open(newline="") as handle:
        for row in csv.DictReader(handle):  # a step that was taken again: its last attempt counts
            rows[row["step"], row["batch"]] = row["loss"]
    return {
        "trace": rows,
        "validations": run.validations.read_text(),
        "untouched": (run.validation / "untouched.csv").read_text(),
        "best": sorted(path.name for path in run.checkpoints.glob("best-*")),
        "weights": content["state_dict"],
        "average": content["average"]["weights"],
    }


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for name in ("trace", "validations", "untouched", "best"):
        assert found[name] == expected[name], name
    for name in ("weights", "average"):
        assert all(torch.equal(tensor, found[name][key]) for key, tensor in expected[name].items()), name


HALVES: dict[str, Any] = {"val_check_interval": 2}
"""A validation after two micro-batches of an epoch, so after each step."""


@pytest.fixture(scope="module")
def undisturbed(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    root = tmp_path_factory.mktemp("undisturbed")
    return {
        "epochs": fit(tiny_shards, root / "epochs"),
        "steps": fit(tiny_shards, root / "steps", **HALVES),
    }


@pytest.mark.parametrize(
    ("validated", "kills", "every"),
    [
        ("epochs", [("on_validation_batch_end", 3)], 1),
        ("epochs", [("on_train_batch_start", 3), ("on_train_batch_start", 4)], 1),
        ("epochs", [("on_validation_start", 6)], 4),
        ("epochs", [("on_train_end", 6)], 2),
        ("steps", [("on_validation_start", 2), ("on_train_batch_start", 2), ("on_train_epoch_start", 3)], 1),
        ("steps", [("on_train_batch_start", 5)], 2),
    ],
)
def test_killed_and_gone_on_it_leaves_what_it_would_have_left(
    validated: str,
    kills: list[tuple[str, int]],
    every: int,
    undisturbed: dict[str, dict[str, Any]],
    tiny_shards: Path,
    tmp_path: Path,
) -> None:
    """A validation that a kill cut off is done again, and the best is known to the run that goes on."""
    arguments = HALVES if validated == "steps" else {}
    for hook, step in kills:
        with pytest.raises(RuntimeError, match="killed"):
            fit(tiny_shards, tmp_path / "run", Kill(step, hook), every=every, **arguments)
    assert_same(fit(tiny_shards, tmp_path / "run", every=every, **arguments), undisturbed[validated])


RANKS: dict[str, Any] = {"devices": 2, "strategy": "ddp_fork"}


def test_two_ranks_learn_what_one_does(tiny_shards: Path, tmp_path: Path) -> None:
    if torch.cuda.is_initialized():
        pytest.skip("ranks are forked, which CUDA does not allow once it is in use")
    prompts = MixedPrompts([BoxPrompts(2), MaskPrompts()])
    one, two = (
        fit(tiny_shards, tmp_path / name, prompts=prompts, tuning=LoRATuning(2), micro=1, max_epochs=1, **ranks)
        for name, ranks in (("one", {}), ("two", RANKS))
    )
    assert two["best"] == one["best"] and len(two["validations"].splitlines()) == len(one["validations"].splitlines())
    for name in ("weights", "average"):
        for key, tensor in one[name].items():
            torch.testing.assert_close(two[name][key], tensor, atol=5e-5, rtol=0)


def test_a_prompt_encoder_that_learns_on_ranks_is_told_what_it_takes(tiny_shards: Path, tmp_path: Path) -> None:
    if torch.cuda.is_initialized():
        pytest.skip("ranks are forked, which CUDA does not allow once it is in use")
    whole: dict[str, Any] = {"tuning": FullTuning(freeze=[]), "prompts": BoxPrompts(2), "micro": 1, "max_epochs": 1}
    with pytest.raises(Exception, match="set it to ddp_find_unused_parameters_true, or freeze prompt_encoder"):
        fit(tiny_shards, tmp_path / "refused", **whole, **RANKS)
    fit(tiny_shards, tmp_path / "taken", **whole, **{**RANKS, "strategy": "ddp_fork_find_unused_parameters_true"})
