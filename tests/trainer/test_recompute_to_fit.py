"""As few blocks are computed twice as a memory asks for, and nothing of what is learnt changes."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from data_shards.datamodule import TripletDataModule
from data_shards.errors import UserError
from trainer.callbacks import RecomputeToFit
from trainer.models import MedSAM
from trainer.models.medsam import ViT
from trainer.models.recomputing import is_recomputed, recomputed_for_now
from trainer.modules import MedSAMModule
from trainer.plan.activations import pass_bytes
from trainer.plan.memory import GIB, RESERVE, Sharing, parts
from trainer.plan.recompute import fewest

SHAPE = ViT(width=64, depth=4, heads=2, global_blocks=(1, 3), window=4)


class Losses(Callback):
    """Keeps what every step cost."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        self.values.append(float(outputs["loss"]))


def module_of(**arguments: Any) -> MedSAMModule:
    torch.manual_seed(0)
    return MedSAMModule(MedSAM(SHAPE, 128, weights=None, **arguments))


def trained(
    module: MedSAMModule, shards: Path, root: Path, callback: RecomputeToFit | None, **data: Any
) -> list[float]:
    losses = Losses()
    trainer = Trainer(
        accelerator="cpu", max_steps=2, logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, default_root_dir=root, callbacks=[losses, *([callback] if callback else [])],
        use_distributed_sampler=False,
    )  # fmt: skip
    batches = {"batch_size": 2, "micro_batch_size": 2, "seed": 0, "targets_per_image": 1, **data}
    trainer.fit(module, datamodule=TripletDataModule(train=str(shards / "train"), **batches))
    return losses.values


def needs(module: MedSAMModule, count: int) -> int:
    """Bytes of a step of two images with so many blocks computed twice."""
    blocks = module.model.block_kinds()["image_encoder"]
    with recomputed_for_now(blocks[:count]):
        activations = pass_bytes(module, partial(module.rehearse, 2, 1))
    return sum(parts(module, False, Sharing("alone"), activations).values())


def test_as_few_as_a_memory_asks_for(tiny_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    by_count = [needs(module_of(), count) for count in range(5)]
    assert by_count == sorted(by_count, reverse=True) and len({*by_count}) == 5
    plain = trained(module_of(), tiny_shards, tmp_path, None)
    for count in (0, 1, 3):
        module, callback = module_of(), RecomputeToFit(memory_gib=by_count[count] / (1 - RESERVE) / GIB + 1e-7)
        assert trained(module, tiny_shards, tmp_path, callback) == plain
        twice = [is_recomputed(block) for block in module.model.block_kinds()["image_encoder"]]
        assert (callback.recomputed, twice) == (count, [number < count for number in range(4)])
        assert f"RecomputeToFit: {count} of 4 blocks are computed twice" in capsys.readouterr().out


def test_what_cannot_fit_or_is_not_known_is_one_line(
    tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"all 4 blocks computed twice .*micro_batch_size"):
        trained(module_of(), tiny_shards, tmp_path, RecomputeToFit(memory_gib=1e-3))
    with pytest.raises(UserError, match="set the model's checkpoint_activations to false"):
        trained(module_of(checkpoint_activations=True), tiny_shards, tmp_path, RecomputeToFit(memory_gib=8))
    with pytest.raises(UserError, match="targets_per_image"):
        trained(module_of(), tiny_shards, tmp_path, RecomputeToFit(memory_gib=8), targets_per_image=None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="there is no GPU"):
        trained(module_of(), tiny_shards, tmp_path, RecomputeToFit())
    for wrong in ({"memory_gib": 0.0}, {"memory_gib": float("nan")}, {"prompts": 0}):
        with pytest.raises(UserError, match=r"above 0|1 or more"):
            RecomputeToFit(**wrong)


@pytest.mark.parametrize(("room", "expected"), [(100, 0), (99, 1), (50, 5), (41, 6), (40, 6), (1, 10)])
def test_the_fewest_are_found_without_trying_all(room: int, expected: int) -> None:
    asked: list[int] = []

    def taken(count: int) -> int:
        asked.append(count)
        return 100 - 10 * count

    count, bytes_ = fewest(taken, 10, room)
    assert count == expected and bytes_ == 100 - 10 * count
    assert len(asked) <= 6
