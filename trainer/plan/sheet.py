"""What a run will take and cost, on the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console

from trainer.plan.cost import told_hours
from trainer.plan.fits import MICRO, reserve, told
from trainer.plan.memory import MOST_IMAGES

_PARTS = {
    "weights": "weights",
    "gradients": "gradients",
    "adamw": "AdamW",
    "average": "EMA",
    "communication": {"ddp": "DDP's buckets", "fsdp2": "gathered blocks", "alone": ""},
    "activations": "activations",
}


def show_cost(plan: Mapping[str, Any], console: Console) -> None:
    """Print machine, memory by part, the largest pass, speed, hours, energy and disk."""
    rows = [
        ("machine", _machine(plan["machine"])),
        *_memory(plan),
        ("run", _run(plan)),
        ("speed", _speed(plan["run"])),
        *_time(plan),
        ("disk", _disk(plan["checkpoint"])),
    ]
    for name, text in rows:
        console.print(f"{name:<10} {text}", soft_wrap=True)
    console.print()


def _machine(machine: Mapping[str, Any]) -> str:
    count = machine["devices"]
    kind = machine["gpu"] or "GPU"
    if not machine["given"]:
        return f"{count} {kind}{'s' * (count != 1)}; --cluster FILE, or --devices N --gpu NAME says what they are"
    size = f" of {machine['memory_gib']:g} GB" if machine["gpu"] is None and machine["memory_gib"] else ""
    guess = ", assumed from the memory: the slowest known; --gpu NAME says which" if machine["assumed"] else ""
    return f"{count} × {kind}{size}{guess} ({machine['said']})"


def _memory(plan: Mapping[str, Any]) -> list[tuple[str, str]]:
    found, machine, step = plan["memory_parts"], plan["machine"], plan["step"]
    if found is None:
        return []
    names = {**_PARTS, "communication": _PARTS["communication"][found["sharing"]]}  # type: ignore[index]
    held = ", ".join(f"{names[name]} {told(size)}" for name, size in found["parts"].items() if size)
    rows = [("peak", f"{told(found['total'])} a GPU: {held}")]
    if found["usable"] is None:
        return rows
    answer = "fits" if found["fits"] else "DOES NOT FIT"
    rows.append(("", f"{answer}: {told(found['usable'])} of {machine['memory_gib']:g} GiB are usable, {reserve()}"))
    if found["recomputed"] is not None:
        rows.append(("", f"RecomputeToFit: {found['recomputed']}"))
    what = "image" if plan["frames"] == 1 else "clip"
    most, own, prompts = found["largest"], found["largest_dividing"], plan["prompts_reckoned"]
    most = f"{most} or more" if most == MOST_IMAGES else most
    text = f"{most} {what}{'s' * (most != 1)} a pass fit with {prompts} prompt{'s' * (prompts != 1)} of each"
    if own is not None and own != step["micro_batch"]:
        text += f"; of those that divide a step of {step['images']}, {own}: {MICRO} {own}"
    elif own is not None:
        text += f"; of those that divide a step of {step['images']}, the recipe's {own} is the largest"
    return [*rows, ("largest", text)]


def _run(plan: Mapping[str, Any]) -> str:
    run = plan["run"]
    if run["steps"] is None:
        return f"steps: {run['steps_from']}"
    images = run["steps"] * run["images_per_step"]
    return f"{run['steps']:,} steps ({run['steps_from']}) of {run['images_per_step']:,}: {images:,} images"


def _speed(run: Mapping[str, Any]) -> str:
    if run["images_per_second"] is None:
        return f"images a second: {run['rate_from']}"
    rate = run["images_per_second"]
    return f"{f'{rate:,.0f}' if rate >= 100 else f'{rate:.3g}'} images/s on all GPUs, {run['rate_from']}"


def _time(plan: Mapping[str, Any]) -> list[tuple[str, str]]:
    run, machine = plan["run"], plan["machine"]
    if run["hours"] is None:
        return [("time", "hours and energy need steps and speed")]
    text = f"{told_hours(run['hours'])}, {run['gpu_hours']:,.1f} GPU-hours, without evaluations"
    if run["jobs"] == 1:
        text += f"; ends within a job of {machine['job_hours']:g} h"
    elif run["jobs"] is not None and machine["requeue"]:
        text += f"; {run['jobs']} jobs of {machine['job_hours']:g} h: it is queued again {run['jobs'] - 1} times"
    elif run["jobs"] is not None:
        text += f"; does NOT end within {machine['job_hours']:g} h, and is not queued again: {run['jobs']} launches"
    energy = f"{run['kwh']:,.1f} kWh {run['kwh_from']}" if run["kwh"] is not None else "not known without a GPU"
    return [("time", text), ("energy", energy)]


def _disk(checkpoint: Mapping[str, int]) -> str:
    kept = checkpoint["kept"]
    return f"{told(checkpoint['bytes'])} a checkpoint, {kept} are kept: {told(checkpoint['bytes'] * kept)}"
