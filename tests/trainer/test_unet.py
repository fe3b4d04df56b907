"""The specialist: its box is a channel, and it learns from scratch what a foundation model is tuned for."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor

from data_shards.batch import TripletBatch
from data_shards.datamodule import TripletDataModule
from data_shards.errors import UserError
from tests.conftest import tiny_content
from trainer.losses import DiceCrossEntropy
from trainer.metrics import overlap
from trainer.models import BoxUNet
from trainer.models.unet import box_channel, expected_iou
from trainer.modules import MedSAMModule
from trainer.prompts import BoxPrompts, Prompts
from trainer.scores import read_scores
from trainer.tuning import FullTuning, LoRATuning

pytest.importorskip("monai")
FEATURES = (8, 8, 16, 32, 64, 8)


def model(side: int = 64) -> BoxUNet:
    torch.manual_seed(0)
    return BoxUNet(side, FEATURES)


def asked(*boxes: tuple[float, ...], images: tuple[int, ...] | None = None) -> Prompts:
    return Prompts(torch.tensor(images or [0] * len(boxes)), boxes=torch.tensor(boxes, dtype=torch.float32))


def test_a_box_is_drawn_as_the_pixels_that_it_touches():
    drawn = box_channel(torch.tensor([[2.0, 3.0, 5.0, 7.0], [2.4, 3.2, 2.6, 3.4], [0.0, 0.0, 7.0, 7.0]]), 8)
    expected = np.zeros((8, 8))
    expected[3:8, 2:6] = 1
    assert drawn.shape == (3, 1, 8, 8)
    assert (drawn[0, 0].numpy() == expected).all()
    assert drawn[1, 0].nonzero().tolist() == [[3, 2]], "a box within a pixel is not lost"
    assert drawn[2].all()


def test_the_network_sees_image_and_box():
    """Its input is the image's channels and the box; each prompt has those of its own image."""
    unet, seen = model(), []
    unet.network.register_forward_hook(lambda _, given, __: seen.append(given[0]))
    images = torch.rand(2, 3, 64, 64)
    prompts = asked((4, 8, 20, 30), (0, 0, 64, 64), (40, 40, 60, 50), images=(1, 0, 1))
    with torch.no_grad():
        logits, scores = unet.decode(unet.encode(images), prompts)
    assert logits.shape == (3, 1, 64, 64) and scores.shape == (3, 1)
    (given,) = seen
    assert given.shape == (3, 4, 64, 64)
    assert torch.equal(given[:, :3], images[[1, 0, 1]])
    assert torch.equal(given[:, 3:], box_channel(prompts.boxes, 64))
    assert not torch.allclose(logits[0], logits[2]), "the same image, another box"


def test_the_released_size_is_monai_s():
    from monai.networks.nets import BasicUNet

    def size(network: torch.nn.Module) -> int:
        return sum(parameter.numel() for parameter in network.parameters())

    assert size(BoxUNet(64)) == size(BasicUNet(spatial_dims=2, in_channels=4, out_channels=1)) == 1_979_297


def test_expected_iou_is_that_of_masks_drawn_by_the_probabilities():
    logits = torch.linspace(-6, 6, 40_000).reshape(1, 1, 200, 200)
    truth = torch.bernoulli(logits.sigmoid(), generator=torch.Generator().manual_seed(0))
    _, iou = overlap(logits[:, 0] > 0, truth[:, 0])
    assert expected_iou(logits).item() == pytest.approx(iou.item(), abs=0.005)
    assert expected_iou(torch.full((1, 1, 4, 4), -9.0)).item() == 0


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (lambda: BoxUNet(72), "image_size 72: BoxUNet takes a multiple of 16"),
        (lambda: BoxUNet(64, (8, 8)), r"features \[8, 8\]: six numbers"),
        (lambda: MedSAMModule(model(), FullTuning(freeze=[]), score_weight=1.0), "BoxUNet predicts no IoU"),
        (lambda: MedSAMModule(model()), "'prompt_encoder' matches no parameter of BoxUNet"),
        (lambda: LoRATuning().apply(model()), "BoxUNet"),
        (
            lambda: model().decode(torch.zeros(1, 3, 64, 64), Prompts(torch.zeros(1, dtype=torch.int64))),
            "asked with boxes alone, not with no box",
        ),
        (
            lambda: model().decode(
                torch.zeros(1, 3, 64, 64),
                Prompts(torch.zeros(1, dtype=torch.int64), torch.zeros(1, 4), points=torch.zeros(1, 1, 2)),
            ),
            "asked with boxes alone, not with points",
        ),
    ],
)
def test_mistakes_are_one_line(made, said):
    with pytest.raises(UserError, match=said):
        made()


def test_without_monai_it_says_what_to_install(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "monai" else found(name))
    with pytest.raises(UserError, match="pip install 'monai"):
        BoxUNet(64)


def test_another_side_has_the_same_weights():
    unet = model()
    larger = unet.at_size(96)
    assert larger.preprocessing.image_size == larger.mask_side == 96
    for name, tensor in unet.state_dict().items():
        assert torch.equal(larger.state_dict()[name], tensor)


def test_it_learns_from_scratch(shape_shards):
    """Ninety steps of four images: held-out discs and squares are found better than their boxes alone would say."""
    data = TripletDataModule(str(shape_shards / "train"), test=str(shape_shards / "test"), batch_size=4, seed=0)
    data.setup("fit")
    data.setup("test")
    module = MedSAMModule(model(), FullTuning(freeze=[]), BoxPrompts(max_shift=1, seed=0), DiceCrossEntropy(), lr=3e-3)
    module.log_dict = lambda *_, **__: None  # type: ignore[method-assign]
    optimiser = torch.optim.AdamW(module.parameters(), lr=module.lr)
    training, held_out = (list(loader) for loader in (data.train_dataloader(), data.test_dataloader()))
    before = mean_dsc(module, held_out)
    for step in range(90):
        optimiser.zero_grad()
        module.training_step(training[step % len(training)], 0).backward()
        optimiser.step()
    after = mean_dsc(module, held_out)
    boxes = [overlap(box, truth)[0] for batch in held_out for box, truth in zip(*in_boxes(batch), strict=True)]
    assert before < 0.6 < float(torch.stack(boxes).mean()) < after
    assert after > 0.93


def mean_dsc(module: MedSAMModule, batches: list[TripletBatch]) -> float:
    module.eval()
    scores = [
        overlap(mask[None], truth[None] > 0)[0]
        for batch in batches
        for mask, truth in zip(module.predict_masks(batch).masks, batch.masks, strict=True)
    ]
    module.train()
    return float(torch.cat(scores).mean())


def in_boxes(batch: TripletBatch) -> tuple[list[Tensor], list[Tensor]]:
    """Each target's box, filled, and its mask."""
    truths = [mask[None] > 0 for mask in batch.masks]
    boxes = [torch.zeros_like(truth) for truth in truths]
    for filled, (x0, y0, x1, y1) in zip(boxes, batch.boxes.int().tolist(), strict=True):
        filled[:, y0 : y1 + 1, x0 : x1 + 1] = True
    return boxes, truths


def test_the_commands_train_score_and_refuse_to_export_it(tiny_shards: Path, tmp_path, trainer_command):
    content = tiny_content(tiny_shards, tmp_path / "run")
    content["model"]["init_args"] |= {
        "model": {"class_path": "trainer.models.BoxUNet", "init_args": {"image_size": 64, "features": list(FEATURES)}},
        "tuning": {"class_path": "trainer.tuning.FullTuning", "init_args": {"freeze": []}},
    }
    content["trainer"]["max_steps"] = 1
    recipe = tmp_path / "unet.yaml"
    recipe.write_text(yaml.safe_dump(content))
    assert trainer_command("fit", "-c", recipe)[0] == 0
    code, _, err = trainer_command("test", "-c", recipe, "--ckpt_path", "last")
    assert code == 0, err
    (scores,) = (tmp_path / "run/evaluation").glob("*/per_case.csv")
    assert len(read_scores(scores)) > 0
    asked = ("--to", "litemedsam", "--out", tmp_path / "x.pth", "--unverified")
    code, _, err = trainer_command("export", tmp_path / "run", *asked)
    assert code == 2
    assert "a BoxUNet cannot be exported to 'litemedsam'" in err
