"""A training step does not wait for the device: counted on tensors that pretend to be on a GPU."""

from __future__ import annotations

import traceback
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from data_shards.batch import Sample, TripletBatch, collate
from data_shards.datamodule import TripletDataModule
from data_shards.dataset import ShardDataset
from trainer.callbacks import progress
from trainer.losses import SetPredictionLoss
from trainer.models import SAM3, LiteMedSAM, MedSAM
from trainer.models.medsam import ViT
from trainer.models.preprocessing import with_lost
from trainer.modules import MedSAMModule, SAM2Module, SAM3Module
from trainer.modules.medsam import per_image_mean, per_image_means
from trainer.modules.optimization import RateSchedule, adamw, guard_gradients
from trainer.modules.tuned import TunedModule
from trainer.profile.rehearsed import GPU, Pretended, autocast_on_gpu, moved_to_gpu
from trainer.prompts import (
    BoxPrompts,
    ClickPrompts,
    Exemplars,
    GivenMaskPrompts,
    MaskPrompts,
    MixedPrompts,
    PointPrompts,
    Prompter,
    SAM2BoxPrompts,
)

SIDE = 64
PROMPTS: dict[str, Prompter] = {
    "boxes": BoxPrompts(),
    "points": PointPrompts(positive=2, negative=1),
    "masks": MaskPrompts(),
    "mixed": MixedPrompts([BoxPrompts(), PointPrompts()], seed=3),
    "clicks": ClickPrompts(corrections=2, blank=2),
}


@pytest.fixture
def batch(tiny_shards: Path) -> TripletBatch:
    """Four images, one of them with its target twice."""
    shards = ShardDataset(tiny_shards / "train")
    chosen = [(0, (0, 0)), (5, (0,)), (9, (0,)), (2, (0,))]
    return collate([Sample(position, shards[position], targets) for position, targets in chosen])


def waits_of(module: TunedModule, batch: TripletBatch) -> list[str]:
    """Where a training step of a module waits."""
    module.log_dict = lambda *given, **named: None
    module.train()
    fakes, half = FakeTensorMode(allow_non_fake_inputs=True), autocast_on_gpu(True)
    with fakes, moved_to_gpu(module), Pretended() as pretended, half:
        loss = module.training_step(batch.to(GPU, non_blocking=True), 0)
    assert isinstance(loss, Tensor) and loss.device.type == "cuda" and loss.requires_grad
    return [f"{wait.call} {wait.place}" for wait in pretended.waits]


def medsam(**arguments: Any) -> MedSAM:
    return MedSAM(ViT(width=32, depth=2, heads=2, global_blocks=(1,), window=3), SIDE, weights=None, **arguments)


@pytest.mark.parametrize(("name", "input_like"), [*((name, "medsam") for name in PROMPTS), ("boxes", "sam")])
def test_a_step_of_medsam_waits_for_nothing(name: str, input_like: Any, batch: TripletBatch) -> None:
    assert waits_of(MedSAMModule(medsam(input_like=input_like), prompts=PROMPTS[name], score_weight=1.0), batch) == []


def test_a_step_of_litemedsam_waits_for_nothing(batch: TripletBatch) -> None:
    assert waits_of(MedSAMModule(LiteMedSAM(SIDE, weights=None)), batch) == []


SAM2_PROMPTS: dict[str, Prompter] = {
    "boxes": SAM2BoxPrompts(),
    "given": GivenMaskPrompts(),
    "mixed": MixedPrompts([GivenMaskPrompts(), BoxPrompts(), PointPrompts()], seed=3),
    "clicks": ClickPrompts(corrections=2, blank=0, mask=False),
}


@pytest.mark.parametrize("name", list(SAM2_PROMPTS))
def test_a_step_of_sam2_through_its_memory_waits_for_nothing(name: str, tmp_path: Path) -> None:
    tiny = pytest.importorskip("tiny_sam2", reason="needs sam2")
    clips = tiny.clips(tiny.write_volumes(tmp_path / "train", range(2)), [0, 6], 3).by_term()
    module = SAM2Module(tiny.make(), prompts=SAM2_PROMPTS[name], corrected_frames=2 if name == "clicks" else 1)
    assert waits_of(module, clips) == []


def test_a_step_of_sam2_on_images_waits_for_nothing(batch: TripletBatch) -> None:
    tiny = pytest.importorskip("tiny_sam2", reason="needs sam2")
    assert waits_of(SAM2Module(tiny.make(), memory=False), batch.by_term()) == []


@pytest.mark.parametrize(("native", "side"), [((90, 70), (16, 16)), ((16, 90), (16, 32)), ((16, 16), (32, 16))])
def test_masks_that_a_grid_misses_are_found_without_asking_which(native: Any, side: Any) -> None:
    masks = torch.zeros(4, 1, *native)
    masks[0, 0, 3:9, 5:9] = 1
    masks[1, 0, 1, 1] = masks[2, 0, -1, 8] = 1  # the last one stays empty
    resized = F.interpolate(masks, side, mode="nearest-exact")
    old = resized.clone()
    lost = (resized.flatten(1).amax(1) == 0) & (masks.flatten(1).amax(1) > 0)
    old[lost] = F.adaptive_max_pool2d(masks[lost], side)
    assert lost.any() == (native != (16, 16))
    for wait in (True, False):
        assert torch.equal(with_lost(resized.clone(), masks, wait), old)


def test_means_by_image_are_those_of_each_value_alone() -> None:
    values = {"loss": torch.randn(5, requires_grad=True), "dice": torch.randn(5, dtype=torch.float64)}
    index = torch.tensor([4, 1, 1, 4, 4])
    for images in (None, 1.75):
        found = per_image_means(values, index, images)
        for name, value in values.items():
            both = [value[index == image].mean() for image in (1, 4)]
            torch.testing.assert_close(found[name], torch.stack(both).sum() / (images or 2))
            assert torch.equal(found[name], per_image_mean(value, index, images))


@pytest.mark.parametrize("exemplars", [None, Exemplars(share=1.0, boxes=1, points=1)], ids=["text", "exemplars"])
def test_a_step_of_sam3_waits_once_for_the_match(exemplars: Exemplars | None) -> None:
    pytest.importorskip("open_clip")
    import test_sam3_module
    import tiny_sam3

    points = exemplars is not None
    model = SAM3(tiny_sam3.SHAPE, tiny_sam3.SIDE, weights=None, points=points, checkpoint_activations=True)
    loss = SetPredictionLoss(mask_weight=1.0, dice_weight=1.0, mask_chunk=2)
    waits = waits_of(SAM3Module(model, loss=loss, exemplars=exemplars), test_sam3_module.make_batch())
    assert len(waits) == 1
    assert waits[0].startswith("copies to the host trainer/losses/matching.py:")


@pytest.mark.parametrize("by", ["norm", "value"])
def test_an_optimiser_step_waits_for_nothing(by: str) -> None:
    """Clipping, fused AdamW and the schedule; at a step that is logged too."""
    logged: dict[str, Any] = {}
    module: Any = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.LayerNorm(8), torch.nn.Linear(8, 1))
    with FakeTensorMode(allow_non_fake_inputs=True), moved_to_gpu(module), Pretended() as pretended:
        for parameter in module.parameters():
            parameter.grad = torch.ones_like(parameter)
        made = adamw([{"params": list(module.parameters()), "lr": 1e-3}], (0.9, 0.999), RateSchedule("cosine", 2), 9)
        optimizer = made["optimizer"]
        for step in range(3):
            trainer = SimpleNamespace(log_every_n_steps=2, global_step=step, precision_plugin=None)
            module.trainer, module.log = trainer, lambda name, value, **_: logged.update({name: value})
            module.log_dict = lambda values, **_: logged.update(values)
            guard_gradients(module, optimizer, 1.0, by)
            optimizer.step()
            made["lr_scheduler"]["scheduler"].step()
    assert optimizer.param_groups[0]["fused"]
    assert logged["train/grad_norm"].device.type == "cuda"
    assert pretended.waits == []


class Reads(TorchDispatchMode):
    """Notes where values of tensors are read, but for the optimiser's own counters, and for what lies on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in ("_local_scalar_dense", "nonzero", "_unique2"):
            frames = [frame for frame in traceback.extract_stack() if "/tests/" not in frame.filename]
            told = any("/torch/optim/" in frame.filename or frame.name == "training_step" for frame in frames)
            if not told:
                ours = [f for f in frames if "/trainer/" in f.filename or "/lightning/" in f.filename]
                self.lines.append(f"{ours[-1].filename}: {ours[-1].line}")
        return func(*args, **(kwargs or {}))


class Watched(Callback):
    """Counts the reads from the second step on, batch by batch."""

    def __init__(self) -> None:
        self.reads = Reads()
        self.steps = 0
        self.within, self.watches = ExitStack(), False

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == 1 and not self.watches:
            self.within.enter_context(self.reads)
            self.watches = True

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.steps += 1

    def on_train_end(self, trainer: Any, *_: Any) -> None:
        self.within.close()


def test_lightning_reads_no_value_between_logged_steps(
    tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loop, what is logged, clipping and the schedule: nothing asks for a number on the way."""
    monkeypatch.setattr(progress, "READ_EVERY", 1e9)  # then the bar reads at the first step and at the last alone
    data = TripletDataModule(train=str(tiny_shards / "train"), batch_size=2, num_workers=0)
    watched = Watched()
    module = MedSAMModule(medsam(), schedule="cosine", warmup_steps=1)
    trainer = Trainer(
        max_steps=6, accelerator="cpu", logger=CSVLogger(tmp_path), log_every_n_steps=100, gradient_clip_val=1.0,
        callbacks=[watched, progress.RunBar()], enable_checkpointing=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, data)
    assert watched.steps >= 6
    shown = watched.reads.lines
    assert 0 < len([line for line in shown if "progress.py" in line]) < watched.steps, "the bar, at the end"
    assert [line for line in shown if "progress.py" not in line] == []
