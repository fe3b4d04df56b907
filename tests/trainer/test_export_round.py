"""A fine-tuned LiteMedSAM goes round: exported, asked there about held-out slices, taken back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from data_shards.errors import UserError
from trainer.export import EXPORTERS, Exporter
from trainer.export.gate import real_samples
from trainer.models import LiteMedSAM
from trainer.prompts import Prompts
from trainer.restore import restore
from trainer.run import Run

FORMATS = ("litemedsam", "monai", "onnx", "torch-export")


def test_every_format_that_can_hold_it_is_tried():
    model = LiteMedSAM(64, weights=None)

    def holds(exporter: Exporter) -> bool:
        try:
            return exporter.accepts(model)
        except UserError:  # says why not
            return False

    assert tuple(name for name, exporter in EXPORTERS.items() if holds(exporter)) == FORMATS


@pytest.fixture(scope="module")
def tuned(tiny_run: Path) -> LiteMedSAM:
    model = restore(Run(tiny_run)).model
    assert isinstance(model, LiteMedSAM)
    return model


def logits_of(model: LiteMedSAM, batch) -> torch.Tensor:
    boxes, _ = model.preprocessing.boxes(batch.boxes, batch.sizes)
    features = model.encode(model.preprocessing.images(batch.images))
    return model.decode(features, Prompts(batch.image_index, boxes))[0][:, 0]


def same_masks(found: torch.Tensor, ours: torch.Tensor) -> None:
    """Of a run that learnt for some steps nothing may be above 0: masks are cut at the median."""
    cut = ours.median()
    sure = (ours - cut).abs() > 1e-3
    assert torch.equal((found > cut)[sure], (ours > cut)[sure])
    assert sure.float().mean() > 0.95


@torch.no_grad()
@pytest.mark.parametrize("name", FORMATS)
def test_held_out_slices_have_the_same_masks_there(name, tuned, copied_run, tiny_shards, tmp_path, trainer_command):
    exporter = EXPORTERS[name]
    package = exporter.package.replace("-", "_")
    pytest.importorskip(package)
    out = tmp_path / f"out{exporter.suffix}"
    code, _, err = trainer_command("export", copied_run, "--to", name, "--out", out, "--samples", 1)
    assert code == 0, err
    exporter = exporter.for_model(tuned)
    there = tuned if exporter.image_size == tuned.preprocessing.image_size else tuned.at_size(exporter.image_size)
    consumer = exporter.load(out)
    for batch in real_samples(str(tiny_shards / "test"), 5):
        images = there.preprocessing.images(batch.images)
        boxes, _ = there.preprocessing.boxes(batch.boxes, batch.sizes)
        if exporter.asks == "prompts":
            (found,) = consumer(images, [Prompts(batch.image_index, boxes)])
        else:
            found = consumer(images, boxes)
        same_masks(found, logits_of(there, batch))
    back = LiteMedSAM(tuned.preprocessing.image_size, weights=str(out)).eval()
    for batch in real_samples(str(tiny_shards / "test"), 5):
        assert torch.equal(logits_of(back, batch), logits_of(tuned, batch))
