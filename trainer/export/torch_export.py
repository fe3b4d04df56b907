"""Graphs of `torch.export`: they run in PyTorch without any of our code, or go on to AOTInductor and ExecuTorch."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from trainer.export.graphs import Graph, GraphExporter, Runner, quiet, traced

NAMES = "names.json"
"""File inside a ``.pt2`` with the names of inputs and outputs in order: torch keeps their positions alone."""


class TorchExportExporter(GraphExporter):
    """A folder of ``.pt2``; the consumer is `torch.export.load`."""

    name = "torch-export"
    ending = ".pt2"
    package = "torch"
    requirement = "torch"
    notes = (
        "torch.export.load(FILE).module() takes the inputs by position, in the order below, and returns a tuple; a "
        "version of torch reads what it wrote and seldom what a later one did. Like a pickle, a .pt2 of somebody else "
        "can run code when it is read.",
    )

    def save(self, graph: Graph, path: Path) -> None:
        """Trace and write one graph."""
        names = {"inputs": list(graph.inputs), "outputs": list(graph.outputs)}
        program = traced(graph)
        with quiet():
            torch.export.save(program, path, extra_files={NAMES: json.dumps(names)})

    def open(self, path: Path) -> Runner:
        """Open a graph with torch."""
        told = {NAMES: ""}
        with quiet():
            module = torch.export.load(path, extra_files=told).module()
        names = json.loads(told[NAMES])

        def run(**inputs: Tensor) -> dict[str, Tensor]:
            with torch.no_grad():
                found = module(*(inputs[name] for name in names["inputs"]))
            return dict(zip(names["outputs"], found, strict=True))

        return run
