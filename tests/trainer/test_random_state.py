"""What a model draws from the global generators is the same in a run that was killed as in one that was not."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor, nn

from data_shards.batch import TripletBatch
from data_shards.datamodule import TripletDataModule
from trainer.callbacks import RandomState, RunCheckpoint
from trainer.callbacks.random_state import KEY, reseed, restore, states
from trainer.run import Run

pytestmark = pytest.mark.filterwarnings("ignore")
CPU = torch.device("cpu")


class Noisy(LightningModule):
    """Drops out, and draws from Python's and NumPy's generators, without a seed of its own; validations draw too."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.layer, self.dropout = nn.Linear(8, 1, bias=False), nn.Dropout(0.5)
        nn.init.ones_(self.layer.weight)
        self.folder = folder

    def training_step(self, batch: TripletBatch, batch_idx: int) -> Tensor:
        means = torch.stack([image.float().mean() for image in batch.images]) / 255
        drawn = random.random() + np.random.rand() + random.gauss(0, 1) + np.random.randn()
        loss = self.layer(self.dropout(torch.ones(8))).sum() * (means.mean() + drawn)
        place = f"{self.trainer.global_step}/{batch_idx % 2}"  # two micro-batches a step
        with (self.folder / f"losses-{self.trainer.global_rank}").open("a") as file:
            file.write(f"{place} {loss.item().hex()} {','.join(batch.keys)}\n")
        return loss

    def validation_step(self, batch: TripletBatch, batch_idx: int) -> None:
        torch.rand(3), random.random(), np.random.rand()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.1)


class Kill(Callback):
    """Breaks down in a hook at a step."""

    def __init__(self, step: int, hook: str) -> None:
        self.step = step
        setattr(self, hook, self._kill)

    def _kill(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            raise RuntimeError("killed")


def fit(shards: Path, folder: Path, *callbacks: Callback, workers: int = 0, **arguments: Any) -> dict[str, Any]:
    """Train for two epochs of three steps, from the last checkpoint or the start; losses and weights."""
    folder.mkdir(exist_ok=True)
    seed_everything(1, verbose=False)
    last = Run(folder).checkpoints / "last.ckpt"
    trainer = Trainer(
        **{"devices": 1, "max_epochs": 2, **arguments},
        accelerator="cpu",
        num_sanity_val_steps=0,
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[RunCheckpoint(1, dirpath=str(last.parent)), RandomState(), *callbacks],
    )
    micro = 2 // trainer.world_size
    folders: dict[str, Any] = {"train": str(shards / "train"), "val": str(shards / "test")}
    data = TripletDataModule(**folders, batch_size=4, micro_batch_size=micro, num_workers=workers, seed=0)
    module = Noisy(folder)
    trainer.fit(module, datamodule=data, ckpt_path=str(last) if last.exists() else None, weights_only=True)
    saved = torch.load(last, weights_only=True)
    losses = [
        dict(line.split(" ", 1) for line in path.read_text().splitlines()) for path in sorted(folder.glob("losses-*"))
    ]
    return {"losses": losses, "weights": saved["state_dict"]["layer.weight"], "random": saved[KEY]["ranks"]}


@pytest.fixture(scope="module")
def undisturbed(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return fit(tiny_shards, tmp_path_factory.mktemp("undisturbed") / "run")


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("hook", "step"),
    [
        ("on_train_batch_start", 2),
        ("on_before_optimizer_step", 1),
        ("on_train_epoch_start", 3),
        ("on_validation_batch_end", 3),
        ("on_train_batch_start", 3),
        ("on_train_batch_start", 5),
    ],
    ids=["in an epoch", "in a step", "at its end", "in a validation", "after it", "in the next"],
)
def test_a_killed_run_draws_what_an_undisturbed_one_does(
    hook: str, step: int, workers: int, undisturbed: dict[str, Any], tiny_shards: Path, tmp_path: Path
) -> None:
    with pytest.raises(RuntimeError, match="killed"):
        fit(tiny_shards, tmp_path / "run", Kill(step, hook), workers=workers)
    torch.rand(7), random.random(), np.random.rand()
    found = fit(tiny_shards, tmp_path / "run", workers=workers)
    assert found["losses"] == undisturbed["losses"] and len(found["losses"][0]) == 6 * 2, "to the last bit"
    assert torch.equal(found["weights"], undisturbed["weights"])
    assert len(set(found["losses"][0].values())) == 12, "it does draw"


def test_in_the_middle_of_a_step_its_beginning_is_saved(
    undisturbed: dict[str, Any], tiny_shards: Path, tmp_path: Path
) -> None:
    """A checkpoint of that moment takes the step again."""

    class Save(Callback):
        def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if trainer.global_step == 1 and batch_idx == 2:
                trainer.save_checkpoint(tmp_path / "middle.ckpt", weights_only=False)
                raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        fit(tiny_shards, tmp_path / "run", Save())
    checkpoints = tmp_path / "run/checkpoints"
    (checkpoints / "last.ckpt").unlink()
    (tmp_path / "middle.ckpt").rename(checkpoints / "last.ckpt")
    assert fit(tiny_shards, tmp_path / "run")["losses"] == undisturbed["losses"]


def test_ranks_go_on_with_their_own(tiny_shards: Path, tmp_path: Path) -> None:
    if torch.cuda.is_initialized():
        pytest.skip("ranks are forked, which CUDA does not allow once it is in use")
    ranks: dict[str, Any] = {"devices": 2, "strategy": "ddp_fork", "max_epochs": 1}
    whole = fit(tiny_shards, tmp_path / "whole", SetApart(), **ranks)
    with pytest.raises(Exception, match="killed"):
        fit(tiny_shards, tmp_path / "parts", SetApart(), Kill(2, "on_train_batch_start"), **ranks)
    parts = fit(tiny_shards, tmp_path / "parts", SetApart(), **ranks)
    assert parts["losses"] == whole["losses"] and len(whole["losses"]) == 2
    assert torch.equal(parts["weights"], whole["weights"])
    first, second = whole["random"]
    assert not torch.equal(first["torch"], second["torch"]), "each has its own"


class SetApart(Callback):
    """Gives each rank other numbers when a training begins."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        torch.manual_seed(trainer.global_rank)


def test_states_are_plain_and_come_back(tmp_path: Path) -> None:
    random.seed(3), np.random.seed(4), torch.manual_seed(5)
    random.gauss(0, 1), np.random.randn()  # leaves a number for the next call
    torch.save(states(CPU), tmp_path / "states.pt")

    def draw() -> list[Any]:
        numbers = [random.gauss(0, 1), random.random(), np.random.randn(), np.random.rand()]
        return [*numbers, torch.rand(2).tolist()]

    expected = draw()
    restore(torch.load(tmp_path / "states.pt", weights_only=True), CPU)
    assert draw() == expected


def test_another_number_of_ranks_is_seeded_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "9")
    saved = {KEY: {"ranks": [states(CPU), states(CPU)]}}

    def draw(rank: int, step: int, world: int = 3) -> tuple[float, float, float]:
        strategy = SimpleNamespace(root_device=CPU)
        trainer: Any = SimpleNamespace(
            state=SimpleNamespace(fn="fit"), world_size=world, global_rank=rank, global_step=step, strategy=strategy
        )
        callback, module = RandomState(), LightningModule()
        callback.on_load_checkpoint(trainer, module, saved)
        callback.on_train_start(trainer, module)
        callback.on_train_batch_start(trainer, module, None, 0)
        return random.random(), np.random.rand(), torch.rand(1).item()

    drawn = [draw(rank, step) for rank in (0, 1, 2) for step in (4, 5)]
    assert len(set(drawn)) == 6, "by rank and step"
    reseed(9, 5, 1)
    assert drawn[3] == (random.random(), np.random.rand(), torch.rand(1).item()), "and by the seed alone"
    assert draw(0, 4, world=2) == draw(1, 4, world=2), "the states that were saved, which were the same"
    random.seed(0)
    callback, module = RandomState(), LightningModule()
    trainer: Any = SimpleNamespace(state=SimpleNamespace(fn="fit"), strategy=SimpleNamespace(root_device=CPU))
    callback.on_load_checkpoint(trainer, module, {})
    callback.on_train_batch_start(trainer, module, None, 0)
    expected = random.Random(0).random()
    assert random.random() == expected, "a checkpoint from before there were any changes nothing"


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_leaves_the_global_generator_alone(workers: int, tiny_shards: Path) -> None:
    data = TripletDataModule(train=str(tiny_shards / "train"), batch_size=4, micro_batch_size=2, num_workers=workers)
    data.setup("fit")
    before = torch.get_rng_state()
    keys = [batch.keys for batch in data.train_dataloader()]
    assert torch.equal(torch.get_rng_state(), before) and len(keys) == 6
    data.teardown("fit")
