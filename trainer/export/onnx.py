"""ONNX: graphs that onnxruntime and everything built on it runs, without Python or torch."""

from __future__ import annotations

import contextlib
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_shards.errors import UserError
from trainer.export.graphs import Graph, GraphExporter, Runner, quiet, traced, translating
from trainer.models.graph_weights import WEIGHTS

OPSET = 18
"""Version of the operators: onnxruntime 1.14 and later take it, and torch's exporter writes it without converting."""
ONE_FILE = 2**31 - 2**24
"""Bytes of weights that go into the graph's own file; ONNX takes less than 2 GiB, and the graph itself needs some."""
REQUIREMENT = "onnxruntime onnx onnxscript"


class OnnxExporter(GraphExporter):
    """A folder of ``.onnx``; the consumer is onnxruntime on the CPU."""

    name = "onnx"
    ending = ".onnx"
    package = "onnxruntime"
    also = ("onnx", "onnxscript")
    requirement = REQUIREMENT
    notes = (f"Opset {OPSET}. Weights of 2 GiB and more lie beside their graph as FILE.onnx.data.",)

    def save(self, graph: Graph, path: Path) -> None:
        """Trace, translate, write and check one graph.

        Raises:
            UserError: What writes ONNX is not installed, or cannot write this.
        """
        missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
        if missing:
            raise UserError(f"export to '{self.name}' needs {' and '.join(missing)}: pip install {REQUIREMENT}")
        import onnx

        program = traced(graph)
        with quiet(), torch.no_grad():  # else attention is decomposed otherwise than it was traced
            with translating(graph), current():
                written = torch.onnx.export(
                    program,
                    dynamo=True,
                    opset_version=OPSET,
                    input_names=list(graph.inputs),
                    output_names=list(graph.outputs),
                    optimize=False,  # keeps each weight, by its name, to be taken back; onnxruntime folds as it opens
                    verbose=False,
                )
            assert written is not None
            _tidy(written.model.graph, graph)
            weights = graph.module.state_dict()
            written.model.metadata_props[WEIGHTS] = json.dumps([*weights])
            size = sum(tensor.numel() * tensor.element_size() for tensor in weights.values())
            written.save(path, external_data=size > ONE_FILE)
            onnx.checker.check_model(str(path))

    def open(self, path: Path) -> Runner:
        """Open a graph in onnxruntime, on the CPU."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        outputs = [output.name for output in session.get_outputs()]

        def run(**inputs: Tensor) -> dict[str, Tensor]:
            given = {name: np.ascontiguousarray(tensor.detach().numpy()) for name, tensor in inputs.items()}
            found = session.run(outputs, given)
            return {name: torch.from_numpy(array) for name, array in zip(outputs, found, strict=True)}

        return run


@contextlib.contextmanager
def current() -> Iterator[None]:
    """Say what to install where onnxscript is older than this torch wants it; pip does not know that.

    Raises:
        UserError: It is.
    """
    try:
        yield
    except ImportError as error:
        raise UserError(
            f"export to 'onnx': torch {torch.__version__} wants a newer onnxscript ({error}): pip install --upgrade "
            f"{REQUIREMENT}"
        ) from error


def _tidy(written: Any, graph: Graph) -> None:
    """Call dynamic axes what they are, and drop what torch remembers of where things come from in its code.

    Args:
        written: The ``onnx_ir.Graph``.
        graph: What it was written from.
    """
    from onnx_ir import Shape

    names = {}
    for value in written.inputs:
        for axis, name in graph.axes.get(value.name, {}).items():
            names[value.shape[axis].value] = name
    written.metadata_props.clear()
    for node in written:
        node.metadata_props.clear()
    made = [value for node in written for value in node.outputs]
    for value in {id(one): one for one in (*written.inputs, *written.initializers.values(), *made)}.values():
        value.metadata_props.clear()
        if value.shape is not None:
            dims = [length if isinstance(length, int) else length.value for length in value.shape]
            value.shape = Shape([names.get(length, length) if isinstance(length, str) else length for length in dims])
