"""A profile on the terminal, in at most 100 columns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from trainer.profile.advice import NEAR
from trainer.profile.device import short

_BAR = 30
"""Characters of the longest bar."""
_SHOWN = 10
"""Waits that are shown."""


def show(profile: Mapping[str, Any], console: Console) -> None:
    """Print a profile, for people."""
    _grid(console, _head(profile))
    _title(console, "Speed", f"{profile['steps']['as it is']} steps as they are, after {_warm(profile)} of warm-up")
    _grid(console, _speed(profile))
    _title(console, "Where a step's time goes", f"{profile['steps']['by part']} more steps, timed part by part")
    _parts(profile, console)
    _title(console, "Waits of the program for the GPU", profile["waits_counted"])
    _waits(profile, console)
    _title(console, "Graph breaks", "one block of each kind, traced as torch.compile would")
    _graphs(profile, console)
    _title(console, "What computes most", f"{'GPU kernels' if profile['on_gpu'] else 'operators'} of one step")
    _kernels(profile, console)
    _title(console, "What to change", "")
    _advice(profile, console)


def _warm(profile: Mapping[str, Any]) -> int:
    return int(profile["steps"]["warming up"])


def _title(console: Console, title: str, said: str) -> None:
    console.print()
    console.print(Text.assemble((title, "bold"), f"  ({said})" if said else ""))


def _grid(console: Console, rows: Iterator[tuple[str, str]]) -> None:
    grid = Table.grid(padding=(0, 2))
    for name, said in rows:
        grid.add_row(name, said)
    console.print(Padding(grid, (0, 0, 0, 2)))


def _head(profile: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    settings = profile["settings"]
    passes, frames = settings["passes"], settings["frames"]
    cut = f", in {passes} passes of {settings['micro_batch_size']}" if passes > 1 else ""
    things = (
        f"{profile['images'] / frames:.4g} clips of {frames} frames"
        if frames > 1
        else f"{profile['images']:.4g} images"
    )
    yield "recipe", " + ".join(profile["recipes"])
    yield "device", f"{profile['device']['name']}; precision {settings['precision']}"
    yield "learning", f"{profile['learning']:,} of {profile['parameters']:,} parameters"
    yield "a step", f"{things}{cut}; {profile['prompts_per_image'] * frames:.3g} prompts each"
    for note in profile["notes"]:
        yield "note", note


def _speed(profile: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    device, precision = profile["device"], short(profile["settings"]["precision"])
    yield "step", f"{profile['step_ms']:,.1f} ms"
    yield "rate", f"{profile['images_per_second']:.3g} images/s, {profile['pairs_per_second']:.3g} image–mask pairs/s"
    alone = profile["loader_images_per_second"]
    yield "data", f"{profile['data_wait']:.1%} of the time is waited for; the loader alone gives {alone:,.3g} images/s"
    peak = f"{device['matmul_tflops'][precision]:.3g} TFLOP/s that matrix products reach here in {precision}"
    if profile["mfu"] is None:
        yield "MFU", f"not known: {profile['why_no_flops']}"
    else:
        yield "compute", f"{profile['model_tflop_per_step']:.3g} TFLOP a step, {profile['tflops']:.3g} TFLOP/s"
        sheet = profile["mfu_of_data_sheet"]
        yield "MFU", f"{profile['mfu']:.1%} of {peak}" + (f"; {sheet:.1%} of the data sheet's" if sheet else "")
    if profile["peak_bytes"] is not None:
        most, whole = profile["peak_bytes"] / 2**30, device["memory_bytes"] / 2**30
        yield "memory", f"{most:.3g} of {whole:.3g} GiB at the most"


def _parts(profile: Mapping[str, Any], console: Console) -> None:
    whole, parts = max(profile["parted_step_ms"], 1e-9), profile["parts_ms"]
    grid = Table.grid(padding=(0, 2))
    for justify in ("left", "right", "right", "left"):
        grid.add_column(justify=justify)
    most = max(parts.values(), default=0.0) or 1.0
    for name, milliseconds in parts.items():
        bar = "█" * max(1, round(_BAR * milliseconds / most))
        grid.add_row(name, f"{milliseconds:,.1f} ms", f"{milliseconds / whole:.1%}", Text(bar, "cyan"))
    grid.add_row("together", f"{whole:,.1f} ms", "100.0%", "")
    console.print(Padding(grid, (0, 0, 0, 2)))
    if profile["on_gpu"]:
        why = "The GPU is waited for at both ends of every part, so together they take longer than a step does."
        console.print(Padding(why, (0, 0, 0, 2)))


def _waits(profile: Mapping[str, Any], console: Console) -> None:
    if profile["waits"] is None:
        return
    rows = profile["waits"]
    lines = [f"{row['count']} × {row['place']}: {row['call']}" for row in rows[:_SHOWN]] or ["none"]
    lines += [f"and {len(rows) - _SHOWN} places more: --json FILE has all"] if len(rows) > _SHOWN else []
    console.print(Padding("\n".join(lines), (0, 0, 0, 2)))


def _graphs(profile: Mapping[str, Any], console: Console) -> None:
    for row in profile["graph_breaks"]:
        said = {None: "cannot be traced", 0: "none"}.get(row["breaks"], row["breaks"])
        lines = [f"{row['kind']}: {said}", *(f"  {reason['at']}: {reason['why']}" for reason in row["reasons"][:3])]
        console.print(Padding("\n".join(lines), (0, 0, 0, 2)))
    if profile["recompiled"]:
        console.print(Padding(f"compiled anew after the warm-up: {profile['recompiled']} graphs", (0, 0, 0, 2)))


def _kernels(profile: Mapping[str, Any], console: Console) -> None:
    grid = Table.grid(padding=(0, 2))
    for justify in ("right", "right", "right", "left"):
        grid.add_column(justify=justify)
    for row in profile["kernels"]:
        grid.add_row(f"{row['ms']:,.1f} ms", f"{row['share']:.1%}", f"{row['calls']:,} ×", row["name"][:58])
    console.print(Padding(grid, (0, 0, 0, 2)))


def _advice(profile: Mapping[str, Any], console: Console) -> None:
    if not profile["advice"]:
        near = profile["mfu"] is not None and profile["mfu"] >= NEAR
        said = (
            "Nothing: the step is near what this device gives."
            if near
            else ("No key of the recipe, as far as these figures show: the time goes into the model's own operators.")
        )
        console.print(Padding(said, (0, 0, 0, 2)))
    for number, advice in enumerate(profile["advice"], 1):
        gain = f" ({advice['gain']})" if advice["gain"] else ""
        console.print(Padding(f"{number}. {advice['what']}\n   → {advice['change']}{gain}", (0, 0, 0, 2)))
