"""Exports as graphs: every family, asked as a user of the graphs would, with other lengths than were traced."""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import io
import json
import shutil
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from copied_runs import copied
from encoders import make
from torch import Tensor, nn

from data_shards.errors import UserError
from trainer.cli import main
from trainer.export import EXPORTERS
from trainer.export.base import DTYPES
from trainer.export.exporting import _round
from trainer.export.gate import PROMPTED, compare, real_samples
from trainer.export.graphs import Graph, GraphExporter, Stored, traced
from trainer.export.torch_export import TorchExportExporter
from trainer.models import SegmentationModel
from trainer.prompts import Prompts
from trainer.restore import restore
from trainer.run import Run
from trainer.tuning import (
    AdaptFormerTuning,
    HoulsbyTuning,
    LeSAMTuning,
    MedicalSAMAdapterTuning,
    VisualPromptTuning,
)

FORMATS = ("onnx", "torch-export")
FAMILIES = ("litemedsam", "medsam", "sam2")


def tiny(family: str) -> SegmentationModel:
    if family != "sam2":
        return make(family)
    pytest.importorskip("sam2")
    from tiny_sam2 import make as make_sam2

    return make_sam2().eval()


def exporter_of(name: str, model: SegmentationModel, dtype: str = "fp32") -> GraphExporter:
    pytest.importorskip(EXPORTERS[name].package)
    found = EXPORTERS[name].for_model(model).of_type(dtype)
    assert isinstance(found, GraphExporter)
    return found


def every_form(model: SegmentationModel) -> list[Prompts]:
    """Prompts of every form about images 2, 0 and 1 of three, 4 objects, and 1, 2 and 6 points."""
    drawn = torch.Generator().manual_seed(3)
    side, index = model.preprocessing.image_size, torch.tensor([2, 0, 1, 1])
    corners = torch.rand(4, 2, 2, generator=drawn) * side
    boxes = torch.cat([corners.amin(1), corners.amax(1)], dim=1)
    points = torch.rand(4, 6, 2, generator=drawn) * side
    labels = torch.tensor([[1, 0, 1, 1, 0, -1]]).expand(4, 6)
    masks = torch.randn(4, model.mask_side, model.mask_side, generator=drawn) * 5
    return [
        Prompts(index, boxes),
        Prompts(index, points=points, labels=labels),
        Prompts(index, boxes, points[:, :2], labels[:, :2]),
        Prompts(index[:1], points=points[:1, :1], labels=labels[:1, :1], masks=masks[:1]),
        Prompts(index, boxes, masks=masks),
    ]


@pytest.mark.parametrize(
    ("name", "family"),
    [("torch-export", family) for family in FAMILIES] + [("onnx", "medsam"), ("onnx", "sam2")],  # and below
)
@torch.no_grad()
def test_graphs_answer_as_the_model_does_at_any_length(family, name, tiny_shards, tmp_path):
    model = tiny(family)
    exporter = exporter_of(name, model)
    assert exporter.accepts(model) and exporter.asks == "prompts"
    exporter.write(model, tmp_path)
    assert sorted(path.stem for path in tmp_path.iterdir()) == ["image_encoder", "mask_decoder"]
    consumer = exporter.load(tmp_path)
    side = model.preprocessing.image_size
    images = torch.rand(3, 3, side, side, generator=torch.Generator().manual_seed(2))
    asked = every_form(model)
    features = model.encode(images)
    theirs = consumer(images, asked)  # type: ignore[arg-type]
    for prompts, found in zip(asked, theirs, strict=True):
        ours = model.decode(features, prompts)[0][:, 0]
        assert ours.std() > 0
        torch.testing.assert_close(found, ours, rtol=1e-4, atol=1e-4)
    verdict = compare(exporter, tmp_path, model, real_samples(str(tiny_shards / "test"), 2))
    assert verdict.verified and verdict.asked == PROMPTED
    alone = consumer(images[:1], [Prompts(torch.zeros(2, dtype=torch.int64), asked[0].boxes[:2])])  # type: ignore
    assert alone[0].shape == (2, model.mask_side, model.mask_side)  # type: ignore[index]


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("torch-export", "bf16"), ("onnx", "fp16"), pytest.param("onnx", "bf16", marks=pytest.mark.slow)],
)
@torch.no_grad()
def test_half_the_bits_are_half_the_file_and_compute_the_same(dtype, name, tmp_path):
    model = tiny("medsam")
    _round(model, DTYPES[dtype])
    exporter = exporter_of(name, model, dtype)
    exporter.write(model, tmp_path)
    full = sum(4 * t.numel() for part in (model.prompt_encoder, model.mask_decoder) for t in part.parameters())
    assert (tmp_path / f"mask_decoder{exporter.ending}").stat().st_size < 0.6 * full
    images = torch.rand(1, 3, 64, 64)
    prompts = Prompts(torch.zeros(1, dtype=torch.int64), torch.tensor([[5.0, 8.0, 50.0, 52.0]]))
    found = exporter.load(tmp_path)(images, [prompts])[0]  # type: ignore[arg-type]
    torch.testing.assert_close(found, model.decode(model.encode(images), prompts)[0][:, 0], rtol=1e-4, atol=1e-4)


def test_what_is_stored_in_another_type_keeps_its_names_and_leaves_the_module_alone():
    module = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).eval()
    stored = Stored(module, torch.bfloat16)
    assert stored.state_dict().keys() == module.state_dict().keys()
    assert stored.state_dict()["0.weight"].dtype is torch.bfloat16 and module[0].weight.dtype is torch.float32
    assert stored.state_dict()["1.num_batches_tracked"].dtype is torch.int64
    with torch.no_grad():
        module[0].weight.fill_(0.0)  # what is stored is what counts
        assert not torch.equal(stored(torch.ones(1, 4)), module(torch.ones(1, 4)))


class Added(nn.Module):
    """The smallest of graphs, or one that depends on what is in its input."""

    def __init__(self, traceable: bool = True) -> None:
        super().__init__()
        self.linear, self.traceable = nn.Linear(64, 64), traceable

    def forward(self, given: Tensor) -> tuple[Tensor]:
        return (self.linear(given) if self.traceable or given.sum() > 0 else given,)


def graph_of(module: nn.Module) -> Graph:
    return Graph("added", module.eval(), {"given": torch.rand(2, 64)}, ("found",), {"given": {0: "rows"}})


def test_weights_that_are_too_large_for_onnx_lie_beside_it(tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    exporter, graph = EXPORTERS["onnx"], graph_of(Added())
    exporter.save(graph, tmp_path / "one.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["one.onnx"]
    monkeypatch.setattr("trainer.export.onnx.ONE_FILE", 1000)
    exporter.save(graph, tmp_path / "two.onnx")
    beside = tmp_path / "two.onnx.data"
    given = torch.rand(5, 64)
    for name in ("one", "two"):
        found = exporter.open(tmp_path / f"{name}.onnx")(given=given)["found"]
        torch.testing.assert_close(found, graph.module(given)[0].detach())
    beside.unlink()
    with pytest.raises(Exception, match=r"two\.onnx\.data"):
        exporter.open(tmp_path / "two.onnx")


@pytest.mark.parametrize("name", FORMATS)
def test_what_cannot_be_traced_is_said_in_one_line(name, tmp_path):
    with pytest.raises(
        UserError, match=r"^added: torch .* makes no graph of it \(.*\): see which other --to"
    ) as caught:
        EXPORTERS[name].save(graph_of(Added(traceable=False)), tmp_path / "x")
    assert "\n" not in str(caught.value)


def test_an_onnxscript_that_is_too_old_is_named(tmp_path, monkeypatch):
    pytest.importorskip("onnxscript")
    monkeypatch.setitem(sys.modules, "onnxscript._framework_apis.torch_2_11", None)
    monkeypatch.setattr(
        torch.onnx, "export", lambda *_, **__: importlib.import_module("onnxscript._framework_apis.torch_2_11")
    )
    with pytest.raises(
        UserError, match=r"wants a newer onnxscript \(.*\): pip install --upgrade onnxruntime onnx"
    ) as caught:
        EXPORTERS["onnx"].save(graph_of(Added()), tmp_path / "x")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "tuning", [AdaptFormerTuning, HoulsbyTuning, LeSAMTuning, MedicalSAMAdapterTuning, VisualPromptTuning]
)
@torch.no_grad()
def test_every_part_that_does_not_fold_is_traced(tuning):
    model = tiny("medsam")
    tuning().apply(model)
    own = [parameter for parameter in model.eval().parameters() if parameter.requires_grad]
    exporter = exporter_of("torch-export", model)
    images = torch.rand(3, 3, 64, 64)
    before = model.encode(images)
    for parameter in own:  # some begin at zero
        parameter.add_(0.05 * torch.randn_like(parameter))
    encoder, _ = exporter.family.graphs(model)
    (found,) = traced(encoder).module()(images)
    assert not torch.allclose(found, before, atol=1e-3)
    torch.testing.assert_close(found, model.encode(images))


def test_positions_that_sam2_s_memory_reads_are_not_in_its_graphs(tmp_path):
    """At 1024 px they would be 170 MB."""
    model = tiny("sam2")
    exporter_of("torch-export", model).write(model, tmp_path)
    with zipfile.ZipFile(tmp_path / "image_encoder.pt2") as archive:
        (listed,) = (name for name in archive.namelist() if name.endswith("constants_config.json"))
        assert "position_encoding" not in archive.read(listed).decode()


@pytest.mark.parametrize("family", ["litemedsam", "sam2"])
def test_tracing_leaves_the_model_as_it_was(tmp_path, family):
    model = tiny(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    exporter = exporter_of("torch-export", model)
    exporter.write(model, tmp_path)
    assert modes == [module.training for module in model.modules()]
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def command(run: Path, out: Path, name: str) -> tuple[object, ...]:
    return "export", run, "--to", name, "--out", out, "--samples", 2


@pytest.fixture
def run(copied_run: Path) -> Path:
    return copied_run


@pytest.fixture(scope="module")
def exported(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, str]]:
    """The tiny run in a format, exported once by the command: its folder, and what was said."""

    @functools.cache
    def of(name: str) -> tuple[Path, str]:
        pytest.importorskip(EXPORTERS[name].package)
        folder = tmp_path_factory.mktemp("exported")
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            code = main([str(one) for one in command(copied(tiny_run, folder / "run"), folder / "graphs", name)])
        assert code == 0, said.getvalue()
        return folder / "graphs", said.getvalue()

    return of


@pytest.mark.parametrize("name", FORMATS)
def test_the_gate_passes_quietly_and_says_what_the_graphs_take(exported, name):
    out, said = exported(name)
    assert said.startswith(f"verified: {EXPORTERS[name].package} ")
    record = json.loads((out / "export.json").read_text())
    assert record["verified"] is True and record["image_size"] == 64
    assert record["asked"] == ["boxes", "points", "points and masks"]
    graphs = [f"{stem}{EXPORTERS[name].ending}" for stem in ("image_encoder", "mask_decoder")]
    assert sorted(record["sha256"]) == graphs
    for what in ("point_coords", "image_embeddings (batch, 256, 16, 16)", "mask_input (objects, 1, 64, 64)", "-1"):
        assert any(what in note for note in record["notes"])
    for graph in graphs:  # no path of this machine
        content = (out / graph).read_bytes()
        assert b"site-packages" not in content and b"modeling_sam.py" not in content


def test_onnxruntime_alone_answers_with_another_batch_and_more_points(tiny_run, exported):
    """By hand and with the names in the file, as a user would without any of our code."""
    runtime = pytest.importorskip("onnxruntime")
    folder, _ = exported("onnx")
    encoder, decoder = (runtime.InferenceSession(folder / f"{stem}.onnx") for stem in ("image_encoder", "mask_decoder"))
    assert [value.shape for value in encoder.get_inputs()] == [["batch", 3, 64, 64]]
    assert decoder.get_inputs()[2].shape == ["objects", "points", 2]
    assert decoder.get_outputs()[0].shape == ["objects", 1, 64, 64]
    rng = np.random.default_rng(0)
    images = rng.random((3, 3, 64, 64), dtype=np.float32)
    (embeddings,) = encoder.run(["image_embeddings"], {"images": images})
    assert embeddings.shape == (3, 256, 16, 16)
    points = (rng.random((5, 7, 2)) * 64).astype(np.float32)
    labels = np.tile(np.array([1, 0, 1, 0, 2, 3, -1]), (5, 1))
    asked = {
        "image_embeddings": embeddings,
        "image_index": np.array([0, 2, 1, 1, 0]),
        "point_coords": points,
        "point_labels": labels,
        "mask_input": np.zeros((5, 1, 64, 64), np.float32),
        "has_mask_input": np.zeros(5, np.float32),
    }
    masks, scores = decoder.run(["low_res_masks", "iou_predictions"], asked)
    assert masks.shape == (5, 1, 64, 64) and scores.shape == (5, 1)
    model = restore(Run(tiny_run)).model
    with torch.no_grad():
        box = torch.from_numpy(points[:, 4:6].reshape(5, 4))
        prompts = Prompts(
            torch.from_numpy(asked["image_index"]),
            points=torch.from_numpy(np.delete(points, [4, 5], 1)),
            labels=torch.from_numpy(np.delete(labels, [4, 5], 1)),
            boxes=box,
        )
        ours, quality = model.decode(model.encode(torch.from_numpy(images)), prompts)
    np.testing.assert_allclose(masks, ours.numpy(), atol=1e-3)
    np.testing.assert_allclose(scores, quality.numpy(), atol=1e-3)


LAYERS = [f"mask_decoder.transformer.layers.{i}.mlp.lin1.weight" for i in (0, 1)]


def spoil_onnx(graph: Graph, honest: Path, path: Path, change: str) -> None:
    import onnx

    model = onnx.load(honest)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    if change == "swapped":
        bias = [name.replace("weight", "bias") for name in LAYERS]
        one, other = (tensors[name] for name in (LAYERS if LAYERS[0] in tensors else bias))
        one.raw_data, other.raw_data = other.raw_data, one.raw_data
    else:
        one = max(tensors.values(), key=lambda tensor: len(tensor.raw_data))
        one.raw_data = np.full(len(one.raw_data) // 4, np.nan, np.float32).tobytes()
    onnx.save(model, path)


def spoil_torch(graph: Graph, honest: Path, path: Path, change: str) -> None:
    module = copy.deepcopy(graph.module)
    parameters = dict(module.named_parameters())
    with torch.no_grad():
        one, other = (parameters[name] for name in LAYERS)
        kept = one.clone()
        one.copy_(other if change == "swapped" else torch.full_like(one, torch.nan))
        other.copy_(kept)
    TorchExportExporter().save(replace(graph, module=module), path)


@pytest.mark.parametrize(("name", "spoil"), [("onnx", spoil_onnx), ("torch-export", spoil_torch)], ids=FORMATS)
@pytest.mark.parametrize(
    ("change", "what"),
    [("swapped", "logits differ by"), ("nan", "logits differ by nan"), ("missing", "cannot load it")],
)
def test_what_is_not_the_run_s_model_does_not_pass(
    run, exported, tmp_path, trainer_command, monkeypatch, name, spoil, change, what
):
    honest, _ = exported(name)

    def save(self, graph: Graph, path: Path) -> None:
        if graph.stem == "image_encoder":
            shutil.copy(honest / path.name, path)
        elif change != "missing":
            monkeypatch.undo()
            spoil(graph, honest / path.name, path, change)

    monkeypatch.setattr(type(EXPORTERS[name]), "save", save)
    out = tmp_path / "out"
    code, _, err = trainer_command(*command(run, out, name))
    assert code == 2 and err.startswith("trainer: error: ") and err.count("\n") == 1
    assert what in err and not out.exists() and not (run / "exports").exists()


def test_adapters_that_do_not_fold_travel_in_graphs(tiny_recipe, tmp_path, trainer_command):
    adapters = ("-c", "recipes/overlays/adaptformer.yaml", "--trainer.max_steps", 2)
    assert trainer_command("fit", "-c", tiny_recipe, *adapters)[0] == 0
    out = tmp_path / "graphs"
    assert trainer_command(*command(tmp_path / "run", out, "torch-export"))[0] == 0
    held = torch.export.load(out / "image_encoder.pt2").state_dict
    own = restore(Run(tmp_path / "run")).model.state_dict()
    extra = [name for name in own if name in held and name not in tiny("litemedsam").state_dict()]
    assert extra and all(torch.equal(own[name], held[name]) for name in extra)
    code, _, err = trainer_command(*command(tmp_path / "run", tmp_path / "x.pth", "litemedsam"))
    assert code == 2 and "cannot be folded" in err


def test_lora_is_folded_before_graphs_are_made(tiny_recipe, tmp_path, trainer_command):
    lora = ("-c", "recipes/overlays/lora.yaml", "--trainer.max_steps", 2)
    assert trainer_command("fit", "-c", tiny_recipe, *lora)[0] == 0
    assert trainer_command(*command(tmp_path / "run", tmp_path / "g", "torch-export"))[0] == 0
    held = torch.export.load(tmp_path / "g/image_encoder.pt2").state_dict
    assert held.keys() <= tiny("litemedsam").state_dict().keys()
