"""Weights taken out of graphs; those of whole models are in test_export_round.py."""

from __future__ import annotations

import importlib.util
import json
import zipfile
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from data_shards.errors import UserError
from trainer.export import EXPORTERS
from trainer.export.graphs import Graph, Stored
from trainer.models import LiteMedSAM
from trainer.models.graph_weights import graphs_in, read_graphs
from trainer.models.weights import read_weights

FORMATS = {"onnx": ".onnx", "torch-export": ".pt2"}


class Part(nn.Module):
    """A convolution with batch-norm, a transposed linear layer, a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4))
        self.part[1].running_mean.normal_()
        self.linear = nn.Linear(4, 5)
        self.linear.weight = nn.Parameter(torch.randn(4, 5).T)  # not contiguous
        self.register_buffer("scale", torch.tensor(2.0), persistent=False)

    def forward(self, given: Tensor) -> tuple[Tensor]:
        return (self.linear(self.part(given).mean(dim=(2, 3))) * self.scale,)


def written(folder: Path, name: str, stem: str = "encoder", dtype: torch.dtype | None = None) -> tuple[Path, Part]:
    """A graph in a format, and what was written."""
    pytest.importorskip(EXPORTERS[name].package)
    module = Part().eval()
    held = module if dtype is None else Stored(module, dtype)
    axes = {"given": {0: "batch"}}
    path = folder / f"{stem}{FORMATS[name]}"
    EXPORTERS[name].save(Graph(stem, held, {"given": torch.rand(2, 3, 6, 6)}, ("found",), axes), path)  # type: ignore
    return path, module


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", FORMATS)
def test_every_weight_and_no_other_comes_back_by_its_name(name, dtype, tmp_path):
    path, module = written(tmp_path, name, dtype=dtype)
    found = read_weights(str(path))
    assert found.keys() == module.state_dict().keys() and graphs_in(tmp_path) == [path]
    for key, tensor in module.state_dict().items():
        kept = tensor.to(dtype).float() if dtype and tensor.is_floating_point() else tensor
        assert torch.equal(found[key].to(tensor.dtype), kept), key
    module.load_state_dict(found)  # in tensors of their own, which can be written to
    found["linear.bias"].zero_()


@pytest.mark.parametrize("name", FORMATS)
def test_weights_that_lie_beside_a_graph_or_in_several_come_together(name, tmp_path, monkeypatch):
    monkeypatch.setattr("trainer.export.onnx.ONE_FILE", 0)
    one, module = written(tmp_path, name)
    other, _ = written(tmp_path, name, "decoder")
    assert graphs_in(tmp_path) == [other, one]
    with pytest.raises(UserError, match=rf"weights .*{one.name}: '.*' is another one in the graph beside it"):
        read_weights(str(tmp_path))
    other.write_bytes(one.read_bytes())
    assert all(torch.equal(tensor, module.state_dict()[key]) for key, tensor in read_weights(str(tmp_path)).items())
    with pytest.raises(UserError, match="several files, of which no one has a SHA-256: leave out weights_sha256"):
        read_weights(str(tmp_path), "0" * 64)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("content", [b"", b"no graph", None])
def test_damaged_graphs_are_refused_in_one_line(name, content, tmp_path):
    path, _ = written(tmp_path, name)
    path.write_bytes(path.read_bytes()[:-300] if content is None else content)
    with pytest.raises(UserError, match=rf"^weights {path}: not a readable graph \(.*\): it is empty") as caught:
        read_weights(str(path))
    assert "\n" not in str(caught.value)


def test_what_is_pickled_in_a_graph_is_not_read(tmp_path):
    path, _ = written(tmp_path, "torch-export")
    spoilt = tmp_path / "spoilt.pt2"
    with zipfile.ZipFile(path) as honest, zipfile.ZipFile(spoilt, "w") as archive:
        for entry in honest.namelist():
            content = honest.read(entry)
            if entry.endswith("weights_config.json"):
                told = json.loads(content)
                told["config"]["linear.bias"]["use_pickle"] = True
                content = json.dumps(told).encode()
            archive.writestr(entry, content)
    with pytest.raises(UserError, match=r"spoilt\.pt2: 'linear\.bias' is pickled in it, and pickles are not trusted"):
        read_graphs([spoilt])


def test_without_onnx_it_says_what_to_install(tmp_path, monkeypatch):
    path = tmp_path / "a.onnx"
    path.write_bytes(b"")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs onnx: pip install onnx"):
        read_graphs([path])


def test_graphs_of_another_model_do_not_fit(tmp_path):
    written(tmp_path, "torch-export")
    with pytest.raises(UserError, match=r"do not fit LiteMedSAM: \d+ missing .*; 8 unknown"):
        LiteMedSAM(64, weights=str(tmp_path))
