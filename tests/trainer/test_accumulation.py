"""One optimiser step learns the same however its batch is cut: into micro-batches, and over ranks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import encoders
import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from data_shards.datamodule import TripletDataModule
from data_shards.scan import write_index
from data_shards.triplet import Provenance, Target, Triplet
from data_shards.writer import ShardWriter
from trainer.models import SegmentationModel
from trainer.modules import MedSAMModule
from trainer.modules.optimization import gradient_norm
from trainer.prompts import BoxPrompts

BATCH = 8
TARGETS = (1, 4, 2, 1, 3, 1, 5, 2)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As many images as a step takes, of two sizes, with one to five targets each."""
    folder = tmp_path_factory.mktemp("uneven") / "train"
    rng = np.random.default_rng(0)
    with ShardWriter(folder, 50, 2**20) as writer:
        for number, count in enumerate(TARGETS):
            height, width = (40, 48) if number % 2 else (56, 44)
            masks = np.zeros((count, height, width), np.uint8)
            for mask in masks:
                top, left = rng.integers(0, 20, 2)
                mask[top : top + rng.integers(6, 18), left : left + rng.integers(6, 18)] = 1
            image = (rng.integers(0, 80, (height, width)) + 100 * masks.any(0)).astype(np.uint8)
            origin = Provenance("uneven", f"p{number}", f"v{number}", "CT", "0" * 64)
            terms = tuple(f"block {n}" for n in range(count))
            targets = tuple(Target.from_mask(mask, term) for mask, term in zip(masks, terms, strict=True))
            key = f"uneven-{number:03d}"
            writer.write(key, Triplet(key, image, targets, terms, origin).encode())
    write_index(folder)
    return folder


class Keep(Callback):
    """Writes the gradients of a step, and how many passes it took."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        gradients = {name: p.grad for name, p in pl_module.named_parameters() if p.grad is not None}
        if trainer.is_global_zero:
            torch.save((gradients, trainer.accumulate_grad_batches), self.path)


@pytest.fixture(scope="module", autouse=True)
def double_precision() -> Iterator[None]:
    """In single precision rounding alone makes a difference of 2e-6, and a mistake could hide in it."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def in_double(model: Any) -> SegmentationModel:
    """The model, in training and in double precision; images and boxes come in single."""
    encode, decode = model.encode, model.decode
    model.encode = lambda images: encode(images.double())
    model.decode = lambda features, asked: decode(features, replace(asked, boxes=asked.boxes.double()))
    doubled: SegmentationModel = model.train().double()
    return doubled


def gradients_of(shards: Path, path: Path, family: str, micro: int, ranks: int = 1) -> tuple[dict[str, Tensor], int]:
    """The gradients of one step, through the real trainer, and the passes of each rank that it took."""
    module = MedSAMModule(in_double(encoders.make(family)), prompts=BoxPrompts(max_shift=3, seed=1))
    trainer = Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy="ddp_fork" if ranks > 1 else "auto",
        max_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Keep(path)],
        default_root_dir=path.parent,
    )
    data = TripletDataModule(train=str(shards), batch_size=BATCH, micro_batch_size=micro, seed=3)
    trainer.fit(module, datamodule=data)
    found: tuple[dict[str, Tensor], int] = torch.load(path)
    return found


@pytest.fixture(scope="module")
def whole(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Tensor]]:
    """The gradients of one step in one pass, by family."""
    found = {}
    for family in ("litemedsam", "medsam"):
        found[family], passes = gradients_of(shards, tmp_path_factory.mktemp("whole") / "step.pt", family, BATCH)
        assert passes == 1 and len(found[family]) > 50
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("family", "micro", "ranks"),
    [(family, micro, 1) for family in ("litemedsam", "medsam") for micro in (1, 2, 4)] + [("litemedsam", 2, 2)],
)
def test_a_step_in_parts_is_a_step_at_once(
    family: str, micro: int, ranks: int, shards: Path, whole: dict[str, dict[str, Tensor]], tmp_path: Path
) -> None:
    parts, passes = gradients_of(shards, tmp_path / "parts.pt", family, micro, ranks)
    assert passes == BATCH // (micro * ranks)
    expected = whole[family]
    assert parts.keys() == expected.keys()
    size = gradient_norm(list(expected.values()))
    assert float(size) > 0.01
    assert float(gradient_norm([parts[name] - expected[name] for name in expected]) / size) < 1e-12
