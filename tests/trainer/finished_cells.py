"""Cells of an ablation as they are when they are finished, without any training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from trainer.ablation.cells import Cell
from trainer.report.panels import Panel, save_panels
from trainer.run import write_json
from trainer.scores import CaseScore, write_scores

LEVELS = {"untouched": 0.55, "full": 0.86, "lora": 0.857, "adapter": 0.80, "unet": 0.30, "prompt": 0.86}
LEARNING = {"untouched": 0, "full": 9_650_000, "lora": 4_160_000, "adapter": 594_000, "unet": 1_979_297, "prompt": 3e6}
MODALITIES = ("CT", "MR", "ultrasound")
SIDE = 48


def cell(root: Path, name: str, seed: int) -> Cell:
    """A cell of an ablation in a folder; of 30 steps."""
    tuned = name != "untouched"
    folder = root / "cells" / name / (f"seed-{seed}" if tuned else "")
    text = f"# Question?\ntrainer: {{max_steps: 30}}  # {name}\n"
    return Cell(
        *(name, seed, tuned, {}, root / f"{name}.yaml", folder, text, 30 if tuned else None, 9_790_000),
        *(int(LEARNING.get(name, 5e6)),),
        specialist=name == "unet",
    )


def leave(cell: Cell, modalities: Sequence[str] = MODALITIES, datasets: Sequence[str] = ("one", "two")) -> None:
    """Leave what a finished cell leaves: scores of 24 targets in three modalities, costs, and pictures of four."""
    rng = np.random.default_rng([cell.seed, [*sorted(LEVELS), cell.name].index(cell.name)])
    targets = np.random.default_rng(7).normal(0, 0.06, 24)
    scores = [
        CaseScore(
            *(f"case{n // 2}-a{n:05d}", 0, "lesion", modalities[n % len(modalities)], 100),
            *(float(np.clip(LEVELS.get(cell.name, 0.7) + shift + rng.normal(0, 0.015), 0, 1)), 0.5),
            *(datasets[n % len(datasets)], 0.7),
        )
        for n, shift in enumerate(targets)
    ]
    folder = cell.run.evaluation("tuned" if cell.tuned else "untouched")
    write_scores(folder / "per_case.csv", scores)
    found = {"step": 30 if cell.tuned else 0, "checkpoint": "last.ckpt" if cell.tuned else None}
    write_json(folder / "evaluation.json", found)
    save_panels(folder / "panels.npz", [panel(n, LEVELS.get(cell.name, 0.7)) for n in range(4)])
    versions = {"sam-trainer": "0.1.0", "torch": "2.14.1"}
    model = {"parameters": 9_790_000, "trainable": cell.learning}
    write_json(cell.run.record, {"model": model, "hardware": "CPU, 2 threads", "versions": versions})
    if cell.tuned:
        write_json(cell.run.stages, {"fit": 70.0})
        cell.run.checkpoints.mkdir(parents=True)
        (cell.run.checkpoints / "step-000030.ckpt").write_bytes(b"x" * 400_000)
        logs = cell.run.root / "logs"
        logs.mkdir()
        memory = 1 + cell.learning / 1e7
        lines = [f"{step},{memory},{2.0 + step / 100}" for step in range(3)]
        head = "step,train/cpu_memory_gib,train/images_per_second"
        (logs / "metrics.csv").write_text("\n".join([head, *lines]) + "\n")


def panel(number: int, level: float) -> Panel:
    """A disc, and one that is off by the more the lower the level."""
    rows, columns = np.mgrid[:SIDE, :SIDE]
    truth = ((rows - 24) ** 2 + (columns - 20 - number) ** 2 < 120).astype(np.uint8)
    guess = ((rows - 24) ** 2 + (columns - 20 - number - 10 * (1 - level)) ** 2 < 120).astype(np.uint8)
    image = (60 + 120 * truth + 3 * ((rows + columns) % 5)).astype(np.uint8)
    box = np.array([9, 13, 31, 35], np.float32)
    return Panel(f"case{number}-a0000{number}", "lesion", image, truth, guess, box)
