"""What a device can do: matrix products measured on the spot, and its memory."""

from __future__ import annotations

import os
import platform
import time
from pathlib import Path
from typing import Any

import torch

from trainer.hardware import this_gpu
from trainer.profile.sections import settle

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SIDES = {"cuda": (4096, 8192), "cpu": (512, 1024)}
"""Sides of the square matrices that are tried."""


def short(precision: str) -> str:
    """What matrices are multiplied in at a precision of Lightning's: ``bf16``, ``fp16`` or ``fp32``."""
    return "bf16" if precision.startswith("bf16") else "fp16" if precision.startswith("16") else "fp32"


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """The best rate of a device in square matrix products, in 10¹² FLOP/s: half a second or so.

    Args:
        device: The device.
        dtype: Of the matrices; fp32 ones are multiplied as `torch.set_float32_matmul_precision` says.
    """
    best = 0.0
    for side in SIDES[device.type if device.type in SIDES else "cpu"]:
        one, other = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        one @ other
        for _ in range(4):
            settle(device)
            started = time.perf_counter()
            one @ other
            one @ other
            settle(device)
            best = max(best, 4 * side**3 / (time.perf_counter() - started) / 1e12)
    return best


def described(device: torch.device, precision: str) -> dict[str, Any]:
    """A device as JSON: its name, its rates in 10¹² FLOP/s, and its memory in bytes where it has its own.

    Args:
        device: The device.
        precision: Lightning's word for what the training computes in.
    """
    rates = {name: matmul_rate(device, DTYPES[name]) for name in dict.fromkeys((short(precision), "bf16", "fp32"))}
    found: dict[str, Any] = {"kind": device.type, "name": _processor(), "matmul_tflops": rates}
    found |= {"memory_bytes": None, "sheet_tflops": None, "cores": cores(), "threads": torch.get_num_threads()}
    if device.type == "cuda":
        from trainer.callbacks.throughput import peak_of

        found["name"] = torch.cuda.get_device_name(device)
        found["memory_bytes"] = torch.cuda.get_device_properties(device).total_memory
        found["sheet_tflops"] = peak_of(this_gpu(), precision)
    return found


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processor() -> str:
    """The processor's name, and how many threads compute."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{named[0] if named else platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
