"""What a run cost: devices, time, memory, parameters and disk. Only what was measured."""

from __future__ import annotations

import math

import numpy as np

from trainer.report.data import RunData
from trainer.report.markup import Markup, duration, facts, paragraph, section, table

_MIB = 2**20


def cost_section(data: RunData) -> str:
    """Figures of the training, and the time by stage; a section named Time where nothing else was measured."""
    known = cost_facts(data)
    measured = any((data.device_hours(), data.peak_memory_gib(), data.checkpoint_bytes))
    stages = _stages(data.stages)
    if not measured:
        return section("Time", stages, key="cost" if stages else "")
    below = f'<div class="below">{stages}</div>' if stages else ""
    return section("Cost", facts(known), paragraph(_note(data), "note"), below, key="cost")


def cost_facts(data: RunData) -> list[tuple[str, str | None]]:
    """Names and values; None where something was not measured."""
    model, gpu = data.record.get("model") or {}, data.on_gpu()
    total, learning, hours = model.get("parameters"), model.get("trainable"), data.device_hours()
    share = f" of {millions(total)} ({learning / total:.2%})" if total and learning is not None else ""
    rate, memory = data.images_per_second(), data.peak_memory_gib()
    kept, newest = data.checkpoints, data.checkpoint_bytes
    return [
        ("GPU-hours" if gpu else "Processor-hours", None if hours is None else hours_text(hours)),
        ("Time to fit", duration(data.stages["fit"]) if "fit" in data.stages else None),
        ("Hardware", data.record.get("hardware")),
        ("Optimiser steps", f"{data.steps:,}" if data.steps else None),
        ("Images per second", None if rate is None else f"{rate:,.3g}"),
        ("Peak memory of a GPU" if gpu else "Peak memory of a process", None if memory is None else gib(memory)),
        ("Parameters that learn", None if learning is None else f"{millions(learning)}{share}".replace("%", "\u00a0%")),
        ("Newest checkpoint", None if newest is None else size(newest)),
        ("All checkpoints kept", size(kept) if kept and kept != newest else None),
        ("Waited for data", _share(data, "train/data_wait")),
        ("Use of the device (MFU)", _share(data, "train/mfu")),
    ]


def hours_text(hours: float) -> str:
    """Hours of devices: two digits, and three decimals at most."""
    return f"{hours:,.0f}" if hours >= 100 else f"{hours:.2g}" if hours >= 0.001 else "below 0.001"


def gib(memory: float) -> str:
    """Memory in GiB."""
    return f"{memory:,.3g} GiB"


def size(count: int) -> str:
    """Bytes as MiB or GiB, small ones as KiB."""
    if count >= 1024 * _MIB:
        return f"{count / 2**30:,.2f} GiB"
    return f"{count / _MIB:,.1f} MiB" if count >= _MIB / 10 else f"{count / 1024:,.1f} KiB"


def millions(number: int | None) -> str | None:
    """A count of parameters."""
    if number is None:
        return None
    return f"{number / 1e6:,.2f} M" if number >= 1e6 else f"{number:,}"


def _share(data: RunData, name: str) -> str | None:
    """Median of a share that was logged, without the first step's, in which everything warms up."""
    values = list(data.curves.get(name, {}).values())[1:]
    return f"{float(np.median(values)):.1%}".replace("%", "\u00a0%") if values else None


def _note(data: RunData) -> str:
    """What the figures are, and which were not recorded."""
    gpu, devices = data.on_gpu(), data.record.get("world_size")
    hours = "GPU-hours" if gpu else "Processor-hours"
    said = []
    if data.device_hours() is not None:
        kind = "GPU" if gpu else "process"
        said.append(
            f"{hours}: time to fit × {devices} {kind}{'' if devices == 1 else 'es' if kind == 'process' else 's'}, "
            "over all attempts, with validations."
        )
    if data.peak_memory_gib() is not None:
        said.append("Memory: of tensors, the fullest GPU's." if gpu else "Memory: the whole process, code included.")
    if data.images_per_second() is not None:
        said.append("Images per second: median of the training without its first logged step.")
    lacking = {
        hours: data.device_hours(),
        "peak memory": data.peak_memory_gib(),
        "images per second": data.images_per_second(),
        "the size of a checkpoint": data.checkpoint_bytes,
    }
    absent = [name for name, value in lacking.items() if value is None]
    return " ".join((*said, f"Not measured, or no longer there: {', '.join(absent)}." if absent else "")).strip()


def _stages(stages: dict[str, float]) -> str:
    """Time by stage."""
    if not stages:
        return ""
    total, longest = math.fsum(stages.values()), max(max(stages.values()), 1e-9)
    rows = [
        (name, Markup(f'<span class="bar" style="width:{7 * seconds / longest:.2f}rem"></span>'), duration(seconds))
        for name, seconds in stages.items()
    ]
    columns, foot = ("Stage", "Share", "Time"), ("total", Markup(""), duration(total))
    return table(columns, rows, label="Time by stage", words=(0, 1), foot=foot)
