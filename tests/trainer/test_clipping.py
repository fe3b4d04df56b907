"""Gradient norms and clipping: over shards as in one process, beside a loss scaler, and logged without waiting."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradient_ranks
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn

from data_shards.errors import UserError
from trainer.modules import optimization
from trainer.modules.optimization import clip_to_norm, clip_to_value, gradient_norm, guard_gradients


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two ranks found."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.start_processes(
        gradient_ranks.rank_main,
        args=(gradient_ranks.free_port(), str(folder)),
        nprocs=gradient_ranks.RANKS,
        start_method="fork",  # a new interpreter would take longer to import everything than the test
    )
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(gradient_ranks.RANKS)]


def alone() -> list[Tensor]:
    """Gradients of the same step in one process."""
    model = gradient_ranks.network()
    gradient_ranks.backward(model)
    return gradient_ranks.gradients(model)


def test_in_one_process_norm_and_clipping_are_pytorchs() -> None:
    for limit in (0.5, 1e6):
        ours, model = alone(), gradient_ranks.network()
        gradient_ranks.backward(model)
        expected = nn.utils.clip_grad_norm_(model.parameters(), limit)
        norm = gradient_norm(ours)
        assert float(norm) == pytest.approx(float(expected), rel=1e-6)
        clip_to_norm(ours, limit, norm)
        for mine, theirs in zip(ours, gradient_ranks.gradients(model), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=0)
    ours, model = alone(), gradient_ranks.network()
    gradient_ranks.backward(model)
    nn.utils.clip_grad_value_(model.parameters(), 0.5)
    clip_to_value(ours, 0.5)
    assert all(torch.equal(*pair) for pair in zip(ours, gradient_ranks.gradients(model), strict=True))


@pytest.mark.parametrize("how", ["sharded", "replicated and sharded"])
def test_over_shards_norm_and_clipped_gradients_are_those_of_one_process(how: str, ranks: list[dict[str, Any]]) -> None:
    expected = gradient_norm(alone())
    assert float(expected) > 5, "or nothing would be clipped"
    for clip in ("norm", "value"):
        clipped = alone()
        clip_to_norm(clipped, 0.5, expected) if clip == "norm" else clip_to_value(clipped, 0.5)
        for rank in ranks:
            norm, found, after = rank[f"{how} {clip}"]
            assert float(norm) == pytest.approx(float(expected), rel=1e-6)
            for mine, theirs in zip(found, clipped, strict=True):
                torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-8)
            assert float(after) == pytest.approx(float(gradient_norm(clipped)), rel=1e-5)
            assert clip == "value" or float(after) == pytest.approx(0.5, rel=1e-5)
        assert ranks[0][f"{how} {clip}"][0] == ranks[1][f"{how} {clip}"][0], "the same to the last bit"


def test_parts_that_are_still_to_be_summed_are_summed_first(ranks: list[dict[str, Any]]) -> None:
    # summed: (9, 12); sharded: (3, 4) here and (6, 8) there
    for rank in ranks:
        assert float(rank["sums"]) == pytest.approx((225 + 25 + 100) ** 0.5)
        assert float(rank["none"]) == 0.0


class Line(LightningModule):
    """Learns to multiply; its gradients are large."""

    def __init__(self, fused: bool = False) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)
        nn.init.constant_(self.layer.weight, 0.5)
        self.fused = fused
        self.taken: list[Tensor] = []
        """Gradients of each step as the optimiser takes them."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return (10 * self.layer(batch)).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3, fused=self.fused)

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        guard_gradients(self, optimizer, gradient_clip_val, gradient_clip_algorithm)
        self.taken.append(torch.cat([parameter.grad.flatten() for parameter in self.parameters()]))


class Watch(Callback):
    """Keeps what was logged."""

    def __init__(self) -> None:
        self.logged: list[float | None] = []
        self.all: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        value = trainer.callback_metrics.get("train/grad_norm")
        self.logged.append(None if value is None else float(value))
        self.all.append({name: float(each) for name, each in trainer.callback_metrics.items()})


def fit(
    tmp_path: Path,
    fused: bool = False,
    module: LightningModule | None = None,
    watch: Watch | None = None,
    **arguments: Any,
) -> tuple[list[Tensor], list[float | None]]:
    """Gradients of four steps as they were learnt from, and the norms that were logged after each batch."""
    torch.manual_seed(0)
    module, watch = module or Line(fused), watch or Watch()
    trainer = Trainer(
        accelerator="cpu",
        max_steps=4,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        callbacks=[watch],
        **{"log_every_n_steps": 1, **arguments},
    )
    batches = torch.randn(8, 3, 4, generator=torch.Generator().manual_seed(2))
    trainer.fit(module, torch.utils.data.DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    return module.taken, watch.logged


def norms(gradients: list[Tensor]) -> list[float]:
    return [float(gradient.norm()) for gradient in gradients]


@pytest.mark.filterwarnings("ignore")
def test_training_clips_and_logs_the_norm_before(tmp_path: Path) -> None:
    free, logged = fit(tmp_path)
    assert len(free) == 4 and min(norms(free)) > 10
    assert logged == pytest.approx(norms(free)), "without clipping the norm is logged all the same"
    clipped, before = fit(tmp_path, gradient_clip_val=1.0)
    assert norms(clipped) == pytest.approx([1.0] * 4, rel=1e-5)
    assert before[0] == pytest.approx(logged[0])
    wide, _ = fit(tmp_path, gradient_clip_val=1e9)
    assert all(torch.equal(*pair) for pair in zip(wide, free, strict=True))
    by_value, before = fit(tmp_path, gradient_clip_val=3.0, gradient_clip_algorithm="value")
    assert torch.equal(by_value[0], free[0].clamp(-3, 3))
    assert before[0] == pytest.approx(logged[0])


@pytest.mark.filterwarnings("ignore")
def test_the_norm_is_computed_only_where_it_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def counted(gradients: Any) -> Tensor:
        asked.append(len(gradients))
        return gradient_norm(gradients)

    monkeypatch.setattr(optimization, "gradient_norm", counted)
    assert fit(tmp_path, log_every_n_steps=3)[1][:2] == [None, None]
    assert len(asked) == 1, "at the third of four steps"
    asked.clear()
    fit(tmp_path, log_every_n_steps=3, gradient_clip_val=1.0)
    assert len(asked) == 4, "clipping needs it at each"
    asked.clear()
    fit(tmp_path, log_every_n_steps=0, gradient_clip_val=1.0, gradient_clip_algorithm="value")
    assert not asked


class Parts(Line):
    """A model of two parts, one of which learns slower, and something that gets no gradient."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.ModuleDict({"encoder": nn.Linear(4, 3), "head": nn.Linear(3, 1), "idle": nn.Linear(2, 2)})
        del self.layer

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return (10 * self.model["head"](self.model["encoder"](batch))).square().mean()

    def configure_optimizers(self) -> Any:
        groups = [
            {"params": [self.model["encoder"].weight], "lr": 1e-4},
            {"params": [self.model["encoder"].bias], "lr": 2e-4},
            {"params": [*self.model["head"].parameters(), *self.model["idle"].parameters()], "lr": 1e-3},
        ]
        optimizer = torch.optim.AdamW(groups)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        before = {
            name: [p.grad.clone() for p in part.parameters() if p.grad is not None] for name, part in self.parts()
        }
        self.before = {name: float(nn.utils.get_total_norm(found)) if found else 0.0 for name, found in before.items()}
        guard_gradients(self, optimizer, gradient_clip_val, gradient_clip_algorithm)
        self.taken.append(torch.cat([p.grad.flatten() for p in self.parameters() if p.grad is not None]))

    def parts(self) -> Any:
        return self.model.items()


@pytest.mark.filterwarnings("ignore")
def test_norms_before_clipping_and_rates_are_logged_for_each_part(tmp_path: Path) -> None:
    module, watch = Parts(), Watch()
    taken, _ = fit(tmp_path, module=module, watch=watch, gradient_clip_val=1.0)
    assert norms(taken) == pytest.approx([1.0] * 4, rel=1e-5)
    last = watch.all[-1]
    assert {name: last[f"train/grad_norm/{name}"] for name in module.before} == pytest.approx(module.before)
    assert module.before["idle"] == 0.0 and module.before["encoder"] > 1
    total = sum(last[f"train/grad_norm/{name}"] ** 2 for name in module.before) ** 0.5
    assert last["train/grad_norm"] == pytest.approx(total)
    for step, row in enumerate(watch.all):  # the rate that the step learnt at, not the next one's
        assert row["train/lr"] == pytest.approx(1e-3 / (1 + step))
        assert row["train/lr/encoder"] == pytest.approx(2e-4 / (1 + step))


@pytest.mark.filterwarnings("ignore")
def test_logging_changes_nothing_that_is_learnt(tmp_path: Path) -> None:
    often, seldom = (fit(tmp_path, module=Parts(), log_every_n_steps=n, gradient_clip_val=1.0)[0] for n in (1, 100))
    assert all(torch.equal(*pair) for pair in zip(often, seldom, strict=True))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("limit", [None, 1.0])
def test_beside_a_loss_scaler_true_gradients_are_clipped(limit: float | None, fused: bool, tmp_path: Path) -> None:
    """Lightning leaves the scale in the gradients of fused optimisers; their step takes it out."""
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    found, logged = fit(tmp_path, fused, plugins=[plugin], gradient_clip_val=limit)
    assert scaler.get_scale() == 16.0, "no step was skipped"
    expected, expected_norms = fit(tmp_path, gradient_clip_val=limit)
    assert logged == pytest.approx(expected_norms, rel=0.01)
    assert norms(found) == pytest.approx(norms(expected), rel=0.01)


@pytest.mark.filterwarnings("ignore")
def test_in_bf16_and_accumulated_the_norm_is_that_of_the_step(tmp_path: Path) -> None:
    low, logged = fit(tmp_path, precision="bf16-mixed", gradient_clip_val=1.0)
    assert norms(low) == pytest.approx([1.0] * 4, rel=1e-5)
    assert logged == pytest.approx(fit(tmp_path, gradient_clip_val=1.0)[1], rel=0.02)
    twice, logged = fit(tmp_path, gradient_clip_val=1.0, accumulate_grad_batches=2)
    assert norms(twice) == pytest.approx([1.0] * 4, rel=1e-5)
    assert len(logged) == 8 and logged[0] is None


@pytest.mark.filterwarnings("ignore")
def test_a_negative_limit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"trainer.gradient_clip_val -1.0: above 0, or null"):
        fit(tmp_path, gradient_clip_val=-1.0)


def test_a_recipes_limit_and_schedule_reach_the_optimiser(
    tiny_recipe: Path, trainer_command: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    """Each step's norm is logged, and the last step learns at the cooled-down rate."""
    module = ("--model.init_args.schedule", "inverse_sqrt", "--model.init_args.timescale", 2)
    module += ("--model.init_args.cooldown_steps", 2, "--model.init_args.model.init_args.image_size", 32)
    code, _, err = trainer_command("fit", "-c", tiny_recipe, *module, "--trainer.gradient_clip_val", 0.001)
    assert code == 0, err
    rows = [row for file in (tmp_path / "run/logs").glob("*/metrics.csv") for row in csv.DictReader(file.open())]
    norms = [float(row["train/grad_norm"]) for row in rows if row.get("train/grad_norm")]
    assert len(norms) == 4 and min(norms) > 0.001
    content = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
    (optimizer,), (scheduler,) = content["optimizer_states"], content["lr_schedulers"]
    assert scheduler["_last_lr"] == [0.0] * len(scheduler["_last_lr"]), "after the last of four steps"
    moments = [state["exp_avg"] for state in optimizer["state"].values()]
    assert float(gradient_norm(moments)) < 0.001, "averages of clipped gradients"
