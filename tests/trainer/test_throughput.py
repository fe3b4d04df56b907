"""What a training says of its speed and memory: model FLOPs, MFU, peaks."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import family_training
import forked_ranks
import pytest
import torch
from family_training import start

from data_shards.batch import TripletBatch
from data_shards.errors import UserError
from trainer.callbacks import Memory, Throughput, memory, throughput
from trainer.callbacks.throughput import PassCost, peak_of
from trainer.flops import step_flops
from trainer.hardware import gpu_named


def count(root: str, ranks: int) -> None:
    """Count what a pass costs, in a process of its own: after a backward pass here, no fork could do one."""
    module = family_training.medsam()
    found = PassCost.of(module, 1)
    torch.save((found.image, found.prompt, step_flops(module, 2, 3).model), Path(root) / "cost.pt")


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, int, int]:
    """FLOPs of an image, of a prompt, and of a pass over two images with three prompts each."""
    root = tmp_path_factory.mktemp("cost")
    forked_ranks.run(count, root)
    found: tuple[int, int, int] = torch.load(root / "cost.pt")
    return found


def test_a_pass_is_linear_in_its_images_and_prompts(counted: tuple[int, int, int]) -> None:
    image, prompt, larger = counted
    assert image > 0 and prompt > 0
    assert 2 * image + 6 * prompt == pytest.approx(larger, rel=1e-4)


@pytest.mark.parametrize(("ranks", "strategy"), [(1, "auto"), (2, "fsdp2")])
def test_mfu_is_the_models_flops_over_the_devices(
    ranks: int, strategy: str, counted: tuple[int, int, int], tiny_shards: Path, tmp_path: Path
) -> None:
    """Whatever is sharded and compiled: every image of these shards has one target."""
    callbacks = [("CompileBlocks", {"backend": "eager"}), ("Throughput", {"peak_tflops": 2.0}), ("Memory", {})]
    found = start(
        "medsam", ranks, tiny_shards / "train", tmp_path, strategy=strategy, callbacks=callbacks, steps=2, micro=2
    )
    for each in found:
        metrics = each["metrics"]
        flops = metrics["train/mfu"] * 2.0e12 / (metrics["train/images_per_second"] / ranks)
        assert flops == pytest.approx(counted[0] + counted[1], rel=1e-5)
        assert 0.1 < metrics["train/cpu_memory_gib"] < 100
        assert metrics["train/cpu_memory_gib"] == found[0]["metrics"]["train/cpu_memory_gib"], "the largest of all"


def test_prompts_are_counted_as_each_family_asks_them() -> None:
    def batch(**fields: Any) -> Any:
        given = {"masks": [None] * 3, "image_index": torch.tensor([0, 1, 1]), "frames": 1, "objects": [0, 0, 1]}
        return SimpleNamespace(**{**given, **fields})

    medsam = family_training.medsam()
    assert medsam.asked(batch()) == 3
    cost = PassCost(image=100, prompt=7)
    whole = TripletBatch([torch.zeros(1, 2, 2)] * 2, [torch.zeros(2, 2)], torch.tensor([0]), torch.zeros(1, 4), ["a"],
                         ["k", "l"], [0, 1], [0], [])  # fmt: skip
    assert cost.of_batch(medsam, whole) == 207
    whole.masks.clear()
    assert cost.of_batch(medsam, whole) == 0, "nothing is asked, so nothing is computed"
    pytest.importorskip("sam2")
    sam2 = family_training.sam2()
    assert sam2.asked(batch(frames=2)) == 2, "an object in two frames of a clip is followed once"
    assert sam2.asked(batch()) == 3


def test_peaks_are_those_of_the_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    h100, v100 = gpu_named("H100-80GB"), gpu_named("V100-32GB")
    assert peak_of(None, "bf16-mixed") is None
    assert peak_of(h100, "bf16-mixed") == peak_of(h100, "16-mixed") == 989
    assert peak_of(h100, "32-true") == 494.5, "TF32"
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "highest")
    assert peak_of(h100, "32-true") == 67
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 0))
    assert peak_of(v100, "32-true") == 15.7


def trainer_of(**fields: Any) -> Any:
    return SimpleNamespace(**{"precision": "32-true", "is_global_zero": True, "datamodule": None, **fields})


def test_without_a_known_peak_nothing_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput, "this_gpu", lambda: None)
    monkeypatch.setattr(throughput, "step_flops", lambda *_: pytest.fail("counted for nothing"))
    callback = Throughput()
    callback.setup(trainer_of(), family_training.medsam(), "fit")
    assert callback._cost is None


def test_a_pass_that_cannot_be_counted_is_said_once_and_ends_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any) -> None:
        raise NotImplementedError("no rehearsal")

    monkeypatch.setattr(throughput, "step_flops", fail)
    callback = Throughput(peak_tflops=1.0)
    callback.setup(trainer_of(), family_training.medsam(), "fit")
    callback.setup(trainer_of(is_global_zero=False), family_training.medsam(), "fit")
    callback.setup(trainer_of(), family_training.medsam(), "test")
    assert callback._cost is None
    assert capsys.readouterr().err == "no train/mfu: what a pass costs cannot be counted (no rehearsal)\n"


@pytest.mark.parametrize("peak", [0.0, -1.0, float("nan"), float("inf")])
def test_an_impossible_peak_is_refused(peak: float) -> None:
    with pytest.raises(UserError, match="peak_tflops"):
        Throughput(peak_tflops=peak)


def test_a_gpus_peak_is_that_since_the_last_logged_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as it can be tried without one: what the allocator says is logged, and it begins anew."""
    said, peaks = [], iter([3 * 2**30, 2**30])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: next(peaks))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _: said.append("anew"))
    module: Any = SimpleNamespace(
        device=torch.device("cuda"), log=lambda name, value, **how: said.append((name, value, how["reduce_fx"]))
    )
    trainer: Any = SimpleNamespace(global_step=0, log_every_n_steps=2, world_size=1)
    callback = Memory()
    callback.on_train_start(trainer, module)
    for trainer.global_step in (0, 1, 2, 2, 3, 4):  # two passes a step at times
        callback.on_train_batch_end(trainer, module)
    assert said == [
        "anew", "anew", ("train/gpu_memory_gib", 3.0, "max"), "anew", ("train/gpu_memory_gib", 1.0, "max"),
    ]  # fmt: skip
    assert memory.peak_resident() > 50 * 2**20
