"""Weights out of graphs: ``.onnx`` and torch.export's ``.pt2``, whose tensors have the names of our model.

Nothing in them is run or unpickled: of a ``.pt2`` (a zip archive) the list of weights, in JSON, and their raw bytes are
read; of an ONNX graph its initializers.
"""

from __future__ import annotations

import importlib.util
import json
import math
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_shards.errors import UserError

ENDINGS = (".onnx", ".pt2")
"""What files of graphs end in."""
BUNDLE = "models/model.pt2"
"""Where a MONAI bundle has its one graph, whose parts are those that other folders have in a file each."""
WEIGHTS = "weights"
"""In an ONNX graph's metadata: names of the initializers that are weights and not constants, as a list in JSON."""
_LIST = "data/weights/model_weights_config.json"
"""In a ``.pt2``, below a folder named as the file is: each weight's file, type, sizes and strides, by its name."""
_TYPES = {
    1: torch.uint8, 2: torch.int8, 3: torch.int16, 4: torch.int32, 5: torch.int64, 6: torch.float16, 7: torch.float32,
    8: torch.float64, 12: torch.bool, 13: torch.bfloat16,
}  # fmt: skip
"""By the number that torch.export's schema (``ScalarType``) gives them."""
_COUNT, _COUNTED = "num_batches_tracked", "running_mean"
"""What a graph in evaluation has no use for, and what it stands beside."""


def graphs_in(folder: Path) -> list[Path]:
    """The graphs in a folder: of a MONAI bundle its one, otherwise all that have the ending of the first."""
    if (folder / BUNDLE).is_file():
        return [folder / BUNDLE]
    for ending in ENDINGS:
        if found := sorted(folder.glob(f"*{ending}")):
            return found
    return []


def read_graphs(paths: list[Path]) -> dict[str, Tensor]:
    """Read the weights of the graphs of one model.

    Args:
        paths: Files, see `graphs_in`.

    Returns:
        Tensors by our model's names, and whatever else the graphs hold by theirs.

    Raises:
        UserError: A file is damaged or another one, two hold other weights under one name, or ``onnx`` is missing.
    """
    state: dict[str, Tensor] = {}
    for path in paths:
        try:
            read = dict(_onnx(path) if path.suffix == ".onnx" else _pt2(path))
            if not read:  # to protobuf, an empty file is an empty graph
                raise ValueError("no weights")
        except UserError:
            raise
        except Exception as error:  # protobuf, zip, JSON and numpy raise of many kinds
            raise UserError(
                f"weights {path}: not a readable graph ({type(error).__name__}): it is empty, cut off or another kind "
                "of file; export it again"
            ) from error
        if path.parts[-2:] == tuple(BUNDLE.split("/")):
            read = {name.partition(".")[2]: tensor for name, tensor in read.items()}
        for name, tensor in read.items():
            if name in state and not torch.equal(state[name], tensor):
                raise UserError(f"weights {path}: '{name}' is another one in the graph beside it: of two models")
            state[name] = tensor
    counted = [name.removesuffix(_COUNTED) for name in state if name.endswith(f".{_COUNTED}")]
    return {f"{name}{_COUNT}": torch.tensor(0) for name in counted} | state


def _onnx(path: Path) -> Iterator[tuple[str, Tensor]]:
    if importlib.util.find_spec("onnx") is None:
        raise UserError(f"weights {path}: to read them out of ONNX needs onnx: pip install onnx")
    import onnx
    from onnx import numpy_helper

    model = onnx.load(path)
    told = {entry.key: entry.value for entry in model.metadata_props}
    weights = json.loads(told[WEIGHTS]) if WEIGHTS in told else None
    for tensor in model.graph.initializer:
        if weights is not None and tensor.name not in weights:
            continue
        array = numpy_helper.to_array(tensor)
        if (
            tensor.data_type == onnx.TensorProto.BFLOAT16
        ):  # which NumPy does not have: by version whole numbers, or more
            yield tensor.name, torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
        else:
            yield tensor.name, torch.from_numpy(array.copy())


def _pt2(path: Path) -> Iterator[tuple[str, Tensor]]:
    with zipfile.ZipFile(path) as archive:
        (listed,) = (name for name in archive.namelist() if name.endswith(f"/{_LIST}"))
        folder = listed.rpartition("/")[0]
        for name, entry in json.loads(archive.read(listed))["config"].items():
            if entry["use_pickle"]:
                raise UserError(f"weights {path}: '{name}' is pickled in it, and pickles are not trusted")
            yield name, _tensor(archive.read(f"{folder}/{entry['path_name']}"), entry["tensor_meta"])


def _tensor(content: bytes, told: dict[str, Any]) -> Tensor:
    """A tensor of its own, of the bytes of a storage and what the list tells of it."""
    sizes, strides = ([one["as_int"] for one in told[which]] for which in ("sizes", "strides"))
    if not math.prod(sizes):
        return torch.zeros(sizes, dtype=_TYPES[told["dtype"]])
    storage = torch.frombuffer(bytearray(content), dtype=_TYPES[told["dtype"]])
    return storage.as_strided(sizes, strides, told["storage_offset"]["as_int"]).clone(
        memory_format=torch.contiguous_format
    )
