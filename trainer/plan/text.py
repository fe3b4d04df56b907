"""A plan on the terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from trainer.plan.groups import Group

CARDS = (24, 40, 80, 141)
"""Memory of common GPUs in GB."""
USABLE = 0.9
"""Share of a GPU's memory that a pass may take: CUDA itself and the allocator's waste take the rest."""


def show(plan: Mapping[str, Any], console: Console) -> None:
    """Print a plan."""
    rows = {
        "recipe": " + ".join(plan["recipes"]),
        "question": plan["question"],
        "model": _described(plan["model"], ("weights", "weights_sha256")),
        "tuning": _described(plan["tuning"]),
        "step": _step_text(plan["step"], plan.get("terms_per_image"), plan.get("frames", 1)),
        "length": _length_text(plan["length"]),
        "optimiser": _optimizer_text(plan["optimizer"], plan["precision"]),
        "memory": _memory_text(plan["memory_bytes"]),
    }
    for name, text in rows.items():
        if text:
            console.print(f"{name:<10} {text}", soft_wrap=True)
    console.print(_table([Group(**{**group, "depths": tuple(group["depths"])}) for group in plan["groups"]]))


def show_memory(plan: Mapping[str, Any], console: Console) -> None:
    """Print what a pass takes by images and prompts, what fits which GPU, and the plan's notes."""
    if plan["memory_at"]:
        what = _what(plan.get("frames", 1))
        console.print(f"memory     of one GPU in all, by {what}s of a pass and prompts of each; * as in the recipe")
        console.print(_memory_table(plan))
    for note in plan["notes"]:
        console.print(f"note: {note}", soft_wrap=True)


def _memory_table(plan: Mapping[str, Any]) -> Table:
    sizes = {(cell["images"], cell["prompts"]): cell["bytes"] for cell in plan["memory_at"]}
    rows, columns = (list(dict.fromkeys(cell[name] for cell in plan["memory_at"])) for name in ("images", "prompts"))
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    for column in columns:
        table.add_column(_counted(column, "prompt", column == plan["prompts_per_image"]), justify="right")
    what = _what(plan.get("frames", 1))
    for row in rows:
        own = row == plan["step"]["micro_batch"]
        table.add_row(_counted(row, what, own), *(_bytes(sizes[row, column]) for column in columns))
    table.add_section()
    for number, card in enumerate(CARDS):
        if number and max(sizes.values()) <= USABLE * CARDS[number - 1] * 2**30:
            break  # all fits the smaller one
        table.add_row(f"{what}s in {card} GB", *(_most(sizes, rows, column, card) for column in columns))
    return table


def _what(frames: int) -> str:
    """What a pass takes several of."""
    return "image" if frames == 1 else "clip"


def _counted(count: int, what: str, own: bool) -> str:
    return f"{count} {what}{'s' * (count != 1)}{' *' * own}"


def _most(sizes: Mapping[tuple[int, int], int], rows: Sequence[int], column: int, card: int) -> str:
    """The most images a pass that fit a card."""
    fitting = [row for row in rows if sizes[row, column] <= USABLE * card * 2**30]
    if not fitting:
        return "–"
    return f"{fitting[-1]} or more" if fitting[-1] == rows[-1] else str(fitting[-1])


def _table(groups: Sequence[Group]) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("part")
    for heading in ("parameters", "learning", "share", "learning rate"):
        table.add_column(heading, justify="right")
    table.add_column("weight decay")
    for part, added in dict.fromkeys((group.part, group.added) for group in groups):
        mine = [group for group in groups if (group.part, group.added) == (part, added)]
        name = f"{part}, added" if added else part
        rates = sorted({group.learning_rate for group in mine if group.learning_rate is not None})
        if len(rates) < 2:
            table.add_row(name, *_counts(mine), f"{rates[0]:.3g}" if rates else "frozen", _decays(mine))
            continue
        table.add_row(name, *_counts(mine))
        lines = [[group for group in mine if group.learning_rate == rate] for rate in rates]
        for rate, label, line in sorted(
            zip(rates, _labels(lines), lines, strict=True), key=lambda row: row[2][0].depths
        ):
            learning = sum(group.learning for group in line)
            table.add_row(f"  {label}", "", f"{learning:,}", "", f"{rate:.3g}", _decays(line))
    table.add_section()
    table.add_row("all", *_counts(groups))
    return table


def _counts(groups: Sequence[Group]) -> tuple[str, str, str]:
    total, learning = sum(group.parameters for group in groups), sum(group.learning for group in groups)
    return f"{total:,}", f"{learning:,}", f"{learning / max(1, total):.1%}"


def _decays(groups: Sequence[Group]) -> str:
    """Weight decay of what learns: one for all, or the largest and the exceptions, as ``0.01; 0 for 2,304``."""
    counts: Counter[float] = Counter()
    for group in groups:
        if group.weight_decay is not None:
            counts[group.weight_decay] += group.parameters
    told = [f"{decay:g} for {counts[decay]:,}" for decay in sorted(counts, reverse=True)]
    return "; ".join([told[0].partition(" ")[0], *told[1:]]) if told else ""


def _labels(lines: Sequence[Sequence[Group]]) -> list[str]:
    """Short names of groups with different rates in one part: their depths if these tell them apart."""
    ranges = [(min(g.depths[0] for g in line), max(g.depths[1] for g in line)) for line in lines]
    if all(one[1] < other[0] for one, other in pairwise(sorted(ranges))):
        return [f"depth {low}" if low == high else f"depths {low} to {high}" for low, high in ranges]
    counts = [sum(group.tensors for group in line) for line in lines]
    firsts = [line[0].first.partition(".")[2] for line in lines]
    return [f"{first}{f' and {n - 1} more' if n > 1 else ''}" for first, n in zip(firsts, counts, strict=True)]


def _described(node: Mapping[str, Any], left_out: Sequence[str] = ()) -> str:
    """A class and its arguments, as ``trainer.tuning.LoRATuning: rank 8``; what is null or off is left out."""
    told = []
    for name, value in (node.get("init_args") or {}).items():
        if name not in left_out and value not in (None, False, {}, []):
            listed = " ".join(map(str, value)) if isinstance(value, list) else value
            if isinstance(value, Mapping):
                listed = "{" + ", ".join(f"{key}: {part}" for key, part in value.items()) + "}"
            told.append(f"{name} {listed:g}" if isinstance(value, float) else f"{name} {listed}")
    return str(node["class_path"]) + (f": {', '.join(told)}" if told else "")


def _step_text(step: Mapping[str, Any], terms: int | None, frames: int) -> str:
    devices = step["devices"]
    on = "one device, fewer on more" if devices is None else f"{devices} device" + "s" * (devices != 1)
    passes = f"{step['passes']} pass" + "es" * (step["passes"] != 1)
    targets, kind = (step["targets_per_image"], "target") if terms is None else (terms, "term")
    drawn = "all targets of each" if targets is None else f"{targets} {kind}{'s' * (targets != 1)} of each"
    what = "images" if frames == 1 else f"clips of {frames} slices"
    return f"{step['images']} {what}, {drawn}: {step['micro_batch']} at once, so {passes} on {on}"


def _length_text(length: Mapping[str, Any]) -> str:
    """Epochs or steps, as the recipe says; Lightning's −1 is no limit."""
    told = [
        f"{length[name]:,} {name.removeprefix('max_')}"
        for name in ("max_steps", "max_epochs")
        if (length[name] or -1) >= 0
    ]
    told += [f"{length['max_time']} of time"] if length["max_time"] else []
    return " or ".join(told) or "1,000 epochs, Lightning's default: set trainer.max_steps or trainer.max_epochs"


def _optimizer_text(optimizer: Mapping[str, Any], precision: str) -> str:
    clipping = optimizer["gradient_clipping"]
    return (
        f"{optimizer['name']}, β {' '.join(f'{beta:g}' for beta in optimizer['betas'])}, learning rate "
        f"{optimizer['learning_rate']:g}, {optimizer['schedule']}, "
        + (f"gradients clipped to {clipping}, " if clipping else "")
        + precision
    )


def _memory_text(sizes: Mapping[str, int]) -> str:
    named = {"weights": "weights", "gradients": "gradients", "adamw": "AdamW", "average": "EMA"}
    told = [f"{label} {_bytes(sizes[name])}" for name, label in named.items() if sizes[name]]
    return f"{_bytes(sizes['total'])} before activations: {', '.join(told)}"


def _bytes(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
