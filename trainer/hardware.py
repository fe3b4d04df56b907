"""GPUs by their makers' data sheets: speed, memory and power; and what the machine at hand is and reaches.

Lightning's own table (`lightning.fabric.utilities.throughput`) is not taken: for some cards it has the rates of sparse
matrices, twice what a training can reach, and for others those without tensor cores; MFU would be off by as much.
"""

from __future__ import annotations

import os
import platform
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from data_shards.errors import UserError, nearest

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class GPU:
    """A GPU, as its data sheet has it.

    Attributes:
        name: As it is named here, such as ``H100-80GB``.
        memory_gb: Memory as the card is sold; some per cent of it are never there for a program.
        bf16_tflops: Peak of the tensor cores in bf16 with sums in fp32, dense, in 10¹² FLOP/s; in fp16 where a card has
            no bf16.
        fp32_tflops: Peak in fp32 without tensor cores, in 10¹² FLOP/s.
        watts: Power limit of the board.
        called: What torch calls it, as a regular expression.
    """

    name: str
    memory_gb: float
    bf16_tflops: float
    fp32_tflops: float
    watts: float
    called: str


_ALL = (
    GPU("A100-40GB", 40, 312, 19.5, 400, r"A100-SXM4-40GB"),
    GPU("A100-40GB-PCIe", 40, 312, 19.5, 250, r"A100-PCIE-40GB"),
    GPU("A100-80GB", 80, 312, 19.5, 400, r"A100-SXM4-80GB"),
    GPU("A100-80GB-PCIe", 80, 312, 19.5, 300, r"A100 80GB PCIe"),
    GPU("H100-80GB", 80, 989, 67, 700, r"H100 80GB HBM3"),
    GPU("H100-80GB-PCIe", 80, 756, 51, 350, r"H100 PCIe"),
    GPU("H100-NVL-94GB", 94, 835, 60, 400, r"H100 NVL"),
    GPU("H200-141GB", 141, 989, 67, 700, r"H200( SXM)?"),
    GPU("H200-NVL-141GB", 141, 835, 60, 600, r"H200 NVL"),
    GPU("B200-180GB", 180, 2250, 75, 1000, r"B200"),
    GPU("L4-24GB", 24, 121, 30.3, 72, r"L4"),
    GPU("L40S-48GB", 48, 362, 91.6, 350, r"L40S"),
    GPU("A10-24GB", 24, 125, 31.2, 150, r"A10"),
    GPU("A40-48GB", 48, 149.7, 37.4, 300, r"A40"),
    GPU("RTX-A6000-48GB", 48, 154.8, 38.7, 300, r"RTX A6000"),
    GPU("RTX-6000-Ada-48GB", 48, 364, 91.1, 300, r"RTX 6000 Ada Generation"),
    GPU("RTX-3090-24GB", 24, 71, 35.6, 350, r"GeForce RTX 3090"),
    GPU("RTX-4090-24GB", 24, 165.2, 82.6, 450, r"GeForce RTX 4090"),
    GPU("RTX-5090-32GB", 32, 209.5, 104.8, 575, r"GeForce RTX 5090"),
    GPU("V100-16GB", 16, 125, 15.7, 300, r"V100-SXM2-16GB"),
    GPU("V100-32GB", 32, 125, 15.7, 300, r"V100-SXM2-32GB"),
    GPU("T4-16GB", 16, 65, 8.1, 70, r"T4"),
)
GPUS: dict[str, GPU] = {gpu.name: gpu for gpu in _ALL}
"""By name; without a suffix it is the one with the fastest connector (SXM)."""


def gpu_named(name: str) -> GPU:
    """The GPU of a name of `GPUS`, in whatever case.

    Raises:
        UserError: There is none.
    """
    found = {known.lower(): gpu for known, gpu in GPUS.items()}.get(name.lower())
    if found is None:
        same = [known for known in GPUS if known.lower().startswith(f"{name.lower()}-")]
        hint = f"; did you mean '{same[0]}'?" if same else nearest(name, GPUS)
        raise UserError(f"no GPU is known as '{name}'{hint}")
    return found


def gpu_called(name: str) -> GPU | None:
    """The GPU that torch or its driver calls so; None if it is not known, or is a slice of one (MIG)."""
    plain = re.sub(r"^(NVIDIA|Tesla)\s+|^NVIDIA Tesla\s+", "", name.strip())
    return next((gpu for gpu in GPUS.values() if re.fullmatch(gpu.called, plain)), None)


def this_gpu() -> GPU | None:
    """This process's GPU; None without one, or where it is not known."""
    import torch

    return gpu_called(torch.cuda.get_device_name()) if torch.cuda.is_available() else None


def settle(device: torch.device) -> None:
    """Wait until a device has done all that it was told."""
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)


def matmul_rate(
    device: torch.device, dtype: torch.dtype, sides: Sequence[int], rounds: int = 4, repeats: int = 2
) -> float:
    """The best rate of a device in square matrix products, in 10¹² FLOP/s: what a model's use of it is held against.

    Args:
        device: The device.
        dtype: Of the matrices; fp32 ones are multiplied as `torch.set_float32_matmul_precision` says.
        sides: Sides of the matrices that are tried.
        rounds: How often each is measured, after one time to warm up.
        repeats: Products that are measured together.
    """
    import torch

    best = 0.0
    for side in sides:
        one, other = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        for round_ in range(rounds + 1):
            settle(device)
            started = time.perf_counter()
            for _ in range(repeats):
                one @ other
            settle(device)
            if round_:
                best = max(best, 2 * side**3 * repeats / (time.perf_counter() - started) / 1e12)
    return best


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processor() -> str:
    """The processor's name; its kind where the system does not say."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found.group(1).strip() if found else platform.processor() or platform.machine()
