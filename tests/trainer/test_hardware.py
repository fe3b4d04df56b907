"""GPUs by name, and against Lightning's table where that has the same."""

from __future__ import annotations

import pytest
import torch
from lightning.fabric.utilities import throughput

from data_shards.errors import UserError
from trainer.hardware import GPUS, gpu_called, gpu_named, this_gpu


@pytest.mark.parametrize(
    ("called", "name"),
    [
        ("NVIDIA A100-SXM4-80GB", "A100-80GB"),
        ("NVIDIA A100 80GB PCIe", "A100-80GB-PCIe"),
        ("NVIDIA A100-SXM4-40GB", "A100-40GB"),
        ("NVIDIA H100 80GB HBM3", "H100-80GB"),
        ("NVIDIA H100 PCIe", "H100-80GB-PCIe"),
        ("NVIDIA H100 NVL", "H100-NVL-94GB"),
        ("NVIDIA H200", "H200-141GB"),
        ("NVIDIA L40S", "L40S-48GB"),
        ("NVIDIA L4", "L4-24GB"),
        ("NVIDIA A10", "A10-24GB"),
        ("NVIDIA RTX A6000", "RTX-A6000-48GB"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX-6000-Ada-48GB"),
        ("NVIDIA GeForce RTX 4090", "RTX-4090-24GB"),
        ("Tesla V100-SXM2-32GB", "V100-32GB"),
        ("Tesla T4", "T4-16GB"),
        ("NVIDIA L40", None),
        ("NVIDIA A10G", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("", None),
    ],
)
def test_what_torch_calls_them(called: str, name: str | None) -> None:
    found = gpu_called(called)
    assert (found.name if found else None) == name


def test_names() -> None:
    assert gpu_named("h100-80gb") is GPUS["H100-80GB"]
    for wrong, hint in (("H100", "did you mean 'H100-80GB'?"), ("A100-80", "did you mean 'A100-80GB'?")):
        with pytest.raises(UserError, match=f"no GPU is known as '{wrong}'; {hint}".replace("?", r"\?")):
            gpu_named(wrong)
    assert all(name == gpu.name and f"{gpu.memory_gb:g}GB" in name for name, gpu in GPUS.items())


@pytest.mark.parametrize(
    ("name", "chip", "kind"),
    [
        ("A100-80GB", "a100", torch.bfloat16),
        ("H100-80GB", "h100 sxm", torch.bfloat16),
        ("H100-80GB-PCIe", "h100 pcie", torch.bfloat16),
        ("L4-24GB", "l4", torch.bfloat16),
        ("V100-32GB", "v100 sxm", torch.float16),
        ("T4-16GB", "t4", torch.float16),
    ],
)
def test_peaks_are_those_of_lightnings_table(name: str, chip: str, kind: torch.dtype) -> None:
    known = throughput._CUDA_FLOPS[chip]
    assert GPUS[name].bf16_tflops == pytest.approx(known[kind] / 1e12, rel=0.01)
    assert GPUS[name].fp32_tflops == pytest.approx(known[torch.float32] / 1e12, rel=0.01)


def test_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert this_gpu() is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    assert this_gpu() is GPUS["H200-141GB"]
