"""A MONAI bundle passes the gate, runs without sam-trainer, and does to images exactly what ours does."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from itertools import product
from pathlib import Path

import nibabel
import numpy as np
import pytest
import tiny_sam3
import torch
import yaml
from PIL import Image
from torch import nn

from data_shards.errors import UserError
from trainer.export import monai as exporting
from trainer.export.monai import CONFIG, METADATA, NETWORK, MONAIExporter
from trainer.models import SegmentationModel
from trainer.models.medsam import MedSAM, ViT
from trainer.models.preprocessing import Preprocessing
from trainer.prompts import Prompts

pytest.importorskip("monai")

WITHOUT_US = """
import runpy, sys
for name in ("trainer", "data_shards", "transformers", "timm"):
    sys.modules[name] = None  # as if it were not installed
sys.argv[0] = "monai.bundle"
runpy.run_module("monai.bundle", run_name="__main__")
"""


@pytest.fixture
def run(copied_run: Path) -> Path:
    return copied_run


def command(run: Path, out: Path) -> tuple[object, ...]:
    return "export", run, "--to", "monai", "--out", out, "--samples", 2


def test_the_gate_passes(run, tmp_path, trainer_command):
    bundle = tmp_path / "bundle"
    code, stdout, err = trainer_command(*command(run, bundle))
    assert (code, err) == (0, "")
    assert "verified: monai" in stdout
    record = json.loads((run / "exports/monai/export.json").read_text())
    assert record["verified"] is True and record["asked"] == ["boxes"]
    assert record["max_logit_difference"] < 1e-4 and record["max_input_difference"] == 0
    assert {CONFIG, METADATA, NETWORK, "docs/README.md", "scripts/box_prompts.py"} <= record["sha256"].keys()
    assert not list(bundle.rglob("__pycache__"))


def test_the_bundle_runs_without_us(small, tmp_path):
    pytest.importorskip("fire")
    bundle, data = tmp_path / "bundle", tmp_path / "data"
    bundle.mkdir()
    MONAIExporter().for_model(small).write(small, bundle)
    images = write_images(data)
    options = {
        "config_file": bundle / CONFIG,
        "bundle_root": bundle,
        "dataset_dir": data,
        "output_dir": tmp_path / "out",
        "device": "cpu",
    }
    told = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    ran = subprocess.run(
        [sys.executable, "-I", "-c", WITHOUT_US, "run", *told], cwd=tmp_path, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    for name, (image, boxes) in images.items():
        found = np.asarray(nibabel.load(tmp_path / "out" / f"{name}_seg.nii.gz").dataobj)
        expected, sure = labels_of(small, image, boxes)
        assert found.dtype == np.uint16 and found.size == expected.numel()
        labels = torch.from_numpy(found.astype(np.int64)).reshape(image.shape[2], image.shape[1]).T
        assert torch.equal(labels[sure], expected[sure]) and sure.float().mean() > 0.99
        assert 0 < (expected > 0).sum() < expected.numel() and len(expected.unique()) > 2


def write_images(folder: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """A PNG and a NIfTI of one slice, with their boxes, in a folder; the same as tensors (1, H, W) and (Q, 4)."""
    rng = np.random.default_rng(3)
    folder.mkdir()
    grey = rng.integers(0, 255, (50, 37), dtype=np.uint8)
    grey[10:30, 8:25] = 250
    Image.fromarray(grey).save(folder / "grey.png")
    signed = rng.integers(-900, 900, (33, 61), dtype=np.int16)
    nibabel.save(nibabel.Nifti1Image(signed.T[..., None], np.diag([-2.0, -2.0, 5.0, 1.0])), folder / "ct.nii.gz")
    boxes = {"grey": [[8, 10, 25, 30], [20, 25, 36, 49]], "ct": [[5, 5, 30, 30], [25, 3, 60, 20], [1, 1, 9, 32]]}
    items = [{"image": "grey.png", "box": boxes["grey"]}, {"image": "ct.nii.gz", "box": boxes["ct"]}]
    (folder / "boxes.json").write_text(json.dumps(items))
    arrays = {"grey": grey, "ct": signed}
    return {n: (torch.from_numpy(a.copy())[None], torch.tensor(boxes[n]).float()) for n, a in arrays.items()}


@torch.no_grad()
def labels_of(model: SegmentationModel, image: torch.Tensor, boxes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Our model's labels (H, W), and where no rounding can change them."""
    own, size = model.preprocessing, image.shape[-2:]
    asked = Prompts(torch.zeros(len(boxes), dtype=torch.int64), own.boxes(boxes, torch.tensor([size] * len(boxes)))[0])
    logits = own.to_native(model.decode(model.encode(own.images([image])), asked)[0][:, 0], *size)
    (best, second), order = logits.topk(2, dim=0)
    sure = (best.abs() > 1e-4) & ((best < 0) | (best - second > 1e-4))
    return torch.where(best > 0, order[0] + 1, 0), sure


def refused(run: Path, out: Path, trainer_command) -> str:
    """The one line of an export that is refused; nothing is left."""
    code, _, err = trainer_command(*command(run, out))
    assert code == 2 and err.startswith("trainer: error: ") and err.count("\n") == 1
    assert not out.exists() and not (run / "exports/monai").exists()
    return str(err)


def changed(model: nn.Module, kind: str) -> nn.Module:
    """A copy with two blocks' weights swapped, or with one that is no number."""
    copied = copy.deepcopy(model)
    first, second = (copied.mask_decoder.transformer.layers[place].mlp.lin1.weight.data for place in (0, 1))
    if kind == "swapped":
        first[:], second[:] = second.clone(), first.clone()
    else:
        first[0, 0] = torch.nan
    return copied


@pytest.mark.parametrize(("kind", "says"), [("swapped", "logits differ by"), ("nan", "logits differ by nan")])
def test_other_weights_do_not_pass(run, tmp_path, trainer_command, monkeypatch, kind, says):
    honest = MONAIExporter.write
    monkeypatch.setattr(MONAIExporter, "write", lambda self, model, path: honest(self, changed(model, kind), path))
    line = refused(run, tmp_path / "bundle", trainer_command)
    assert says in line and "nothing was written" in line


@pytest.mark.parametrize("lost", [NETWORK, METADATA, "scripts/box_prompts.py"])
def test_a_missing_file_does_not_load(run, tmp_path, trainer_command, monkeypatch, lost):
    honest = MONAIExporter.write

    def without(self, model, path):
        honest(self, model, path)
        (path / lost).unlink()

    monkeypatch.setattr(MONAIExporter, "write", without)
    assert "monai cannot load it" in refused(run, tmp_path / "bundle", trainer_command)


def test_a_sam3_is_refused_in_a_line():
    with pytest.raises(UserError, match="asked with boxes: --to torch-export"):
        MONAIExporter().accepts(tiny_sam3.make())


@pytest.mark.parametrize("family", ["medsam", "sam2"])
def test_other_families_answer_boxes(family, tmp_path):
    if family == "medsam":
        torch.manual_seed(0)
        model = MedSAM(ViT(width=48, depth=2, heads=3, global_blocks=(1,), window=3), 64, weights=None).eval()
    else:
        model = pytest.importorskip("tiny_sam2").make().eval()
    exporter = MONAIExporter().for_model(model)
    exporter.write(model, tmp_path)
    consumer = exporter.load(tmp_path)
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    for count in (1, 4):
        boxes = torch.tensor([[3.0, 5.0, 40.0, 60.0]]) + torch.arange(count)[:, None]
        with torch.no_grad():
            prompts = Prompts(torch.zeros(count, dtype=torch.int64), boxes)
            ours = model.decode(model.encode(image), prompts)[0][:, 0]
            theirs = consumer(image, boxes)
        assert theirs.shape == ours.shape and (theirs - ours).abs().max() < 1e-4


def test_metadata_has_what_the_schema_requires():
    written = exporting._metadata(MedSAM(ViT(width=48, depth=1, heads=3, global_blocks=(0,)), 64, weights=None))
    required = {"schema", "version", "changelog", "monai_version", "pytorch_version", "numpy_version", "task"}
    required |= {"description", "authors", "copyright", "required_packages_version", "network_data_format"}
    assert required <= written.keys()
    tensor = {"type", "format", "num_channels", "spatial_shape", "dtype", "value_range", "is_patch_data", "channel_def"}
    formats = written["network_data_format"]
    for one in [*formats["inputs"].values(), *formats["outputs"].values()]:
        assert tensor <= one.keys() and isinstance(one["num_channels"], int)
    assert formats["inputs"]["image"]["value_range"] == [0.0, 1.0]
    json.dumps(written)


@pytest.mark.parametrize(
    ("scaling", "resize", "interpolation"),
    product(("minmax", "mean_std", "centred", "zscore"), ("pad", "squash"), ("bilinear", "bicubic")),
)
def test_its_transforms_are_ours(scaling, resize, interpolation):
    from trainer.export.monai_bundle.box_prompts import FitInputd, ToNatived

    own = Preprocessing(56, resize, scaling, interpolation)
    mean, std = own.fixed_statistics or (None, None)
    fit = FitInputd("image", "box", 56, resize, scaling, interpolation, 3, mean, std)
    back = ToNatived("pred", "image", 56, resize)
    generator = torch.Generator().manual_seed(0)
    boxes = torch.tensor([[1.0, 2.0, 20.0, 30.0], [4.0, 4.0, 9.0, 12.0]])
    for channels, height, width in ((1, 40, 71), (3, 90, 33)):
        values = torch.rand(channels, height, width, generator=generator)
        for image in ((255 * values).to(torch.uint8), (2000 * values).to(torch.int16), torch.full_like(values, 7)):
            item = fit({"image": image.transpose(1, 2), "box": boxes})  # MONAI's first axis is x
            assert torch.equal(item["image"].as_tensor(), own.images([image])[0])
            sizes = torch.tensor([[height, width]] * 2)
            assert torch.equal(item["box"], own.boxes(boxes, sizes)[0])
        logits = torch.randn(2, 14, 14, generator=generator)
        native = own.to_native(logits, height, width)
        labels = back({**item, "pred": logits})["pred"].as_tensor()[0].T
        best, which = native.max(dim=0)
        assert torch.equal(labels.long(), torch.where(best > 0, which + 1, 0))


@pytest.mark.parametrize(
    ("items", "says"),
    [
        ([{"image": "a.png"}], "item 0 needs 'image' and 'box'"),
        ([{"image": "a.png", "box": [1, 2, 3]}], "a box is"),
        ([{"image": "a.png", "box": [[1, 2]] * 2}], "a box is"),
    ],
)
def test_a_list_of_images_that_is_none(tmp_path, items, says):
    from trainer.export.monai_bundle.box_prompts import read_list

    (tmp_path / "boxes.json").write_text(json.dumps(items))
    with pytest.raises(ValueError, match=says):
        read_list(str(tmp_path / "boxes.json"), "")


def test_adapters_that_cannot_be_merged_travel(tiny_recipe, tmp_path, trainer_command):
    content = yaml.safe_load(tiny_recipe.read_text())
    content["model"]["init_args"]["model"] = {
        "class_path": "trainer.models.MedSAM",
        "init_args": {
            "weights": None,
            "image_size": 64,
            "encoder": {"width": 48, "depth": 2, "heads": 3, "global_blocks": [1], "window": 3},
        },
    }
    content["model"]["init_args"]["tuning"] = {"class_path": "trainer.tuning.AdaptFormerTuning"}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(content))
    assert trainer_command("fit", "-c", tmp_path / "r.yaml")[0] == 0
    code, _, err = trainer_command(*command(tmp_path / "run", tmp_path / "bundle"))
    assert (code, err) == (0, "")
