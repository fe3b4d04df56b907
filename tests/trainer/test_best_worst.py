"""The best, the median and the worst target of an evaluation are kept as pictures, whatever the order and the ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import forked_ranks
import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from data_shards.batch import TripletBatch
from data_shards.datamodule import TripletDataModule
from data_shards.scan import write_index
from data_shards.triplet import Provenance, Target, Triplet
from data_shards.writer import ShardWriter
from trainer.callbacks import panels
from trainer.callbacks.panels import RankKeeper
from trainer.modules.scoring import Prediction, ScoredModule
from trainer.report.panels import Panel, load_panels, save_panels
from trainer.scores import read_scores, write_scores

COUNT = 21
"""Samples: odd, so that one is repeated to make two ranks even."""
RISING = [number / COUNT for number in range(COUNT)]
MIXED = [(number * 8 % COUNT) / COUNT for number in range(COUNT)]
"""How good each is: the better the later, as where data sets follow each other; or in any order."""


def sample(number: int) -> Triplet:
    """A square on noise, in grey or, every third one, in colour."""
    shape = (40, 50, 3) if number % 3 == 0 else (40, 50)
    image = np.random.default_rng(number).integers(0, 256, shape, dtype=np.uint8)
    mask = np.zeros((40, 50), np.uint8)
    mask[5:35, 10:40] = 1
    origin = Provenance("set", f"p{number}", f"v{number}", "CT", "0" * 64)
    return Triplet(f"test-{number:02}", image, (Target.from_mask(mask, "cyst"),), ("cyst",), origin)


class Partial(ScoredModule):
    """Finds as many rows of the truth as it is told for each sample."""

    def __init__(self, good: list[float]) -> None:
        super().__init__()
        self.nothing = torch.nn.Parameter(torch.zeros(1))
        self.good = good

    def predict_masks(self, batch: TripletBatch) -> Prediction:
        """Masks, asked with a box and a point."""
        masks = []
        for (position, _), truth in zip(batch.identities, batch.masks, strict=True):
            mask = truth.bool().clone()
            mask[5 + round(30 * self.good[position]) :] = False
            masks.append(mask)
        count = len(masks)
        points = torch.tensor([[[3.0, 4.0], [torch.nan, torch.nan]]]).repeat(count, 1, 1)
        return Prediction(masks, torch.zeros(count), batch.boxes.clone(), points, torch.tensor([[1, -1]] * count))


class Keep(Callback):
    """What the record of an evaluation does with a `RankKeeper`."""

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin."""
        self.keeper = RankKeeper()

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Prediction, batch: TripletBatch, batch_idx: int
    ) -> None:
        """Keep every target."""
        for q in range(len(batch.masks)):
            self.keeper.keep(batch, outputs, q)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write what is gathered."""
        assert isinstance(pl_module, ScoredModule)
        scores = pl_module.gathered_scores()
        kept = self.keeper.gathered(scores, trainer.test_dataloaders.dataset.shards)
        if trainer.is_global_zero:
            root = Path(trainer.default_root_dir)
            save_panels(root / "panels.npz", kept)
            write_scores(root / "per_case.csv", scores)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("shards")
    with ShardWriter(root / "test", 50, 2**20) as writer:
        for number in range(COUNT):
            writer.write(f"test-{number:02}", sample(number).encode())
    write_index(root / "test")
    return str(root / "test")


def score(shards: str, root: str, good: list[float], ranks: int = 1) -> None:
    """Evaluate on some ranks."""
    options: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy="ddp" if ranks > 1 else "auto",
        default_root_dir=root,
        callbacks=[Keep()],
        **options,
    )
    trainer.test(Partial(good), datamodule=TripletDataModule(test=shards, micro_batch_size=2), verbose=False)


def check(root: Path, good: list[float]) -> None:
    """Worst, median and best of the table are the pictures, with what was predicted and asked."""
    rows = sorted(read_scores(root / "per_case.csv"), key=lambda row: row.dsc)
    assert len(rows) == COUNT
    kept: list[Panel] = load_panels(root / "panels.npz")
    assert [panel.key for panel in kept] == [rows[place].key for place in (0, COUNT // 2, COUNT - 1)]
    for panel, place in zip(kept, (0, COUNT // 2, COUNT - 1), strict=True):
        number = int(panel.key[-2:])
        assert sorted(good)[place] == good[number]
        assert panel.dsc == pytest.approx(rows[place].dsc, abs=1e-6)
        assert np.array_equal(panel.image, sample(number).image)
        assert (panel.target, panel.term) == (0, "cyst")
        assert panel.box.tolist() == [10, 5, 39, 34] and panel.points.tolist() == [[3, 4, 1]]


@pytest.mark.parametrize("good", [RISING, RISING[::-1], MIXED])
def test_best_median_and_worst_are_kept_in_whatever_order_they_come(
    shards: str, tmp_path: Path, good: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(panels, "IN_MEMORY", 1000)  # a temporary file takes what is more
    score(shards, str(tmp_path), good)
    check(tmp_path, good)


def test_two_ranks_keep_what_one_keeps(shards: str, tmp_path: Path) -> None:
    forked_ranks.run(score, tmp_path, 2, shards=shards, good=MIXED)
    check(tmp_path, MIXED)


def test_of_one_target_there_is_one_picture_and_of_none_none(shards: str) -> None:
    class One:
        identities, keys, terms = [(0, 0)], ["test-00"], ["cyst"]
        image_index, masks = torch.tensor([0]), [torch.ones(40, 50)]

    from data_shards.dataset import ShardDataset
    from trainer.scores import CaseScore

    keeper = RankKeeper()
    asked = {"boxes": torch.zeros(1, 4), "points": torch.zeros(1, 0, 2), "labels": torch.zeros(1, 0)}
    keeper.keep(One(), Prediction([torch.ones(40, 50)], torch.zeros(1), **asked), 0)  # type: ignore[arg-type]
    dataset = ShardDataset(shards)
    row = CaseScore("test-00", 0, "cyst", "CT", 2000, 1.0, 1.0)
    assert [panel.dsc for panel in keeper.gathered([row], dataset)] == [1.0]
    assert keeper.gathered([], dataset) == []
