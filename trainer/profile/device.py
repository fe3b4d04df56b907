"""What a device can do: matrix products measured on the spot, and its memory."""

from __future__ import annotations

from typing import Any

import torch

from trainer.hardware import cores, matmul_rate, processor, this_gpu

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SIDES = {"cuda": (4096, 8192), "cpu": (512, 1024)}
"""Sides of the square matrices that are tried."""


def short(precision: str) -> str:
    """What matrices are multiplied in at a precision of Lightning's: ``bf16``, ``fp16`` or ``fp32``."""
    return "bf16" if precision.startswith("bf16") else "fp16" if precision.startswith("16") else "fp32"


def described(device: torch.device, precision: str) -> dict[str, Any]:
    """A device as JSON: its name, its rates in 10¹² FLOP/s, and its memory in bytes where it has its own.

    Args:
        device: The device.
        precision: Lightning's word for what the training computes in.
    """
    sides, names = SIDES.get(device.type, SIDES["cpu"]), dict.fromkeys((short(precision), "bf16", "fp32"))
    rates = {name: matmul_rate(device, DTYPES[name], sides) for name in names}
    name = f"{processor()}, {torch.get_num_threads()} threads"
    found: dict[str, Any] = {"kind": device.type, "name": name, "matmul_tflops": rates}
    found |= {"memory_bytes": None, "sheet_tflops": None, "cores": cores(), "threads": torch.get_num_threads()}
    if device.type == "cuda":
        from trainer.callbacks.throughput import peak_of

        found["name"] = torch.cuda.get_device_name(device)
        found["memory_bytes"] = torch.cuda.get_device_properties(device).total_memory
        found["sheet_tflops"] = peak_of(this_gpu(), precision)
    return found
