"""The spec of an ablation: a base recipe, named cells that differ from it, seeds, and a budget that all of them share.

The dataclasses are the schema of the YAML: every key is a field, documented beside it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from data_shards.errors import UserError, nearest
from data_shards.schema import from_mapping, load_yaml
from trainer.run import opening


@dataclass(frozen=True)
class Budget:
    """What every cell may use: one of the two."""

    steps: int | None = None
    """Optimiser steps: `trainer.max_steps` of every cell."""
    gpu_hours: float | None = None
    """Hours of training times devices, those of validations included; without a GPU a process counts as a device. The
    schedule of the learning rate still runs over the recipe's `trainer.max_steps`: take `schedule: constant`, or a
    `max_steps` that about fills the time."""

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.gpu_hours is None):
            raise UserError("give one of steps and gpu_hours")
        if self.steps is not None and self.steps < 1:
            raise UserError(f"steps {self.steps}: 1 or more")
        if self.gpu_hours is not None and not self.gpu_hours > 0:
            raise UserError(f"gpu_hours {self.gpu_hours:g}: above 0")

    def describe(self) -> str:
        """The budget in words."""
        return f"{self.steps:,} steps" if self.steps is not None else f"{self.gpu_hours:g} GPU-hours"


@dataclass(frozen=True)
class CellSpec:
    """How a cell differs from the base; nothing below its name leaves it as it is."""

    overlays: list[str] = field(default_factory=list)
    """Recipes that lie on the base, in this order, as `trainer fit -c BASE -c OVERLAY` takes them."""
    overrides: dict[str, Any] = field(default_factory=dict)
    """Keys that lie on those, as in a recipe."""
    tuned: bool = True
    """False: nothing is trained; the base's weights are scored as they are, once."""


@dataclass(frozen=True)
class Ablation:
    """What is compared."""

    base: str
    """The recipe that every cell starts from."""
    cells: list[str]
    """Names; in the file each has below it how it differs from the base (see `CellSpec`)."""
    budget: Budget
    """The same for every cell."""
    seeds: list[int] = field(default_factory=lambda: [0])
    """Every cell is trained once with each. A seed decides the order of the data, so that all cells see the same."""
    reference: str | None = None
    """The cell that others are compared with; the first by default."""
    overlays: list[str] = field(default_factory=list)
    """Recipes that lie on the base in every cell, below the cell's own."""
    overrides: dict[str, Any] = field(default_factory=dict)
    """Keys that lie on those in every cell, below the cell's own."""
    out: str | None = None
    """Folder of everything; `runs/ablations/NAME` by default, and ``--out`` goes before it."""

    def __post_init__(self) -> None:
        if not self.cells:
            raise UserError("cells: name at least one")
        for name in self.cells:
            if not re.fullmatch(r"[A-Za-z0-9][\w.+-]*", name):
                raise UserError(f"cells: '{name}' is the name of a folder too: letters, digits, '.', '+', '-' and '_'")
        if len({name.lower() for name in self.cells}) < len(self.cells):
            raise UserError("cells: two names differ in nothing but capitals")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise UserError(f"seeds {self.seeds}: one or more different numbers from 0 on")
        if self.reference is not None and self.reference not in self.cells:
            raise UserError(f"reference: there is no cell '{self.reference}'{nearest(self.reference, self.cells)}")


@dataclass(frozen=True)
class Loaded:
    """A spec that was read.

    Attributes:
        path: The file.
        spec: What it says.
        cells: How cells differ, by name, in the order of the file.
        question: Its opening question.
        caveat: The caveat in its opening comment.
        text: The file as it was written.
    """

    path: Path
    spec: Ablation
    cells: Mapping[str, CellSpec]
    question: str
    caveat: str
    text: str

    @property
    def name(self) -> str:
        """What it is called: its file without the ending."""
        return self.path.stem

    @property
    def reference(self) -> str:
        """The cell that others are compared with."""
        return self.spec.reference or self.spec.cells[0]


def load_ablation(path: str | Path) -> Loaded:
    """Read a spec; no recipe that it names is opened.

    Raises:
        UserError: The file is missing, or a key is unknown, missing or has a wrong value.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: there is no such spec of an ablation; recipes/ablations has some")
    content = load_yaml(path)
    if "model" in content and "cells" not in content:
        raise UserError(f"{path}: this is a recipe of one training, no ablation: see recipes/ablations")
    nodes = content.get("cells")
    if not isinstance(nodes, dict) or not all(isinstance(name, str) for name in nodes):
        raise UserError(f"{path}: cells: expected names, each with how it differs from the base below it")
    plain, overrides = _without_overrides(content, str(path))
    spec = from_mapping(Ablation, {**plain, "cells": list(nodes)}, str(path))
    cells = {name: _cell(node, path, f"cells.{name}") for name, node in nodes.items()}
    text = path.read_text(encoding="utf-8")
    question, caveat = opening(text)
    return Loaded(path, replace(spec, overrides=overrides), cells, question, caveat, text)


def _cell(node: Any, path: Path, key: str) -> CellSpec:
    """One cell's keys, checked."""
    if node is not None and not isinstance(node, dict):
        raise UserError(f"{path}: {key}: expected overlays, overrides or nothing, not {node!r}")
    plain, overrides = _without_overrides(node or {}, f"{path}: {key}")
    return replace(from_mapping(CellSpec, plain, str(path), key), overrides=overrides)


def _without_overrides(node: Mapping[str, Any], where: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split off what the parser of recipes checks."""
    overrides = node.get("overrides") or {}
    if not isinstance(overrides, dict):
        raise UserError(f"{where}: overrides: expected keys of a recipe below it, not {overrides!r}")
    return {name: value for name, value in node.items() if name != "overrides"}, overrides
