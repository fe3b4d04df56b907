"""A SAM3 as three graphs agrees with the model in both formats, with its own tokens, and with adapters."""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import tiny_sam3
import torch
import yaml
from copied_runs import copied
from tiny_sam3 import SHAPE, SIDE

from data_shards.vocabulary import synonyms
from trainer.cli import main
from trainer.export import EXPORTERS, exporting
from trainer.export.graphs import Graph
from trainer.export.graphs_sam3 import TOKENIZER, TOKENS, SAM3Graphs
from trainer.export.torch_export import TorchExportExporter
from trainer.prompts import ConceptPrompts

FORMATS = ("onnx", "torch-export")


@pytest.fixture(scope="module")
def trained(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of a tiny SAM3 with adapters in its image encoder, which cannot be merged."""
    return train(tiny_shards, tmp_path_factory.mktemp("sam3"), "trainer.tuning.AdaptFormerTuning")


def train(shards: Path, folder: Path, tuning: str) -> Path:
    shape = {**asdict(SHAPE), "global_blocks": list(SHAPE.global_blocks)}
    model = {"class_path": "trainer.models.SAM3", "init_args": {"weights": None, "image_size": SIDE, "shape": shape}}
    content = {
        "seed_everything": 0,
        "model": {
            "class_path": "trainer.modules.SAM3Module",
            "init_args": {"model": model, "tuning": {"class_path": tuning}},
        },
        "data": {
            "class_path": "data_shards.datamodule.TripletDataModule",
            "init_args": {"train": str(shards / "train"), "test": str(shards / "test"), "batch_size": 2},
        },
        "trainer": {"default_root_dir": str(folder / "run"), "max_steps": 1, "accelerator": "cpu"},
        "checkpoint": {"every_n_steps": 1},
    }
    (folder / "r.yaml").write_text("# Does it run?\n" + yaml.safe_dump(content))
    assert main(["fit", "-c", str(folder / "r.yaml")]) == 0
    return folder / "run"


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of that run, without its exports."""
    return copied(trained, tmp_path / "run")


@pytest.fixture(scope="module")
def exported(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, str]]:
    """The run in a format, exported once by the command: its folder, and what was said."""

    @functools.cache
    def of(to: str) -> tuple[Path, str]:
        folder = tmp_path_factory.mktemp("exported")
        command = ["export", str(copied(trained, folder / "run")), "--to", to, "--out", str(folder / "graphs")]
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            assert main(command) == 0, said.getvalue()
        return folder / "graphs", said.getvalue()

    return of


@pytest.mark.parametrize("to", FORMATS)
def test_the_gate_passes_with_adapters_in_it(exported, to):
    out, said = exported(to)
    assert said.startswith("verified: ")
    record = json.loads((out / "export.json").read_text())
    assert record["verified"] is True and record["asked"] == ["texts"]
    assert record["max_logit_difference"] < 1e-4 and record["max_confidence_difference"] < 1e-4
    ending = EXPORTERS[to].ending
    assert {TOKENIZER, TOKENS, *(f"{stem}{ending}" for stem in SAM3Graphs.stems)} <= record["sha256"].keys()
    assert any("exemplars" in note for note in record["notes"])


@pytest.mark.parametrize("to", FORMATS)
def test_any_number_of_images_and_texts(tmp_path, to):
    model = tiny_sam3.make()
    exporter = EXPORTERS[to].for_model(model)
    exporter.write(model, tmp_path)
    open_ = {stem: exporter.open(tmp_path / f"{stem}{exporter.ending}") for stem in SAM3Graphs.stems}
    for images, texts, image_index in ((1, 1, [0]), (3, 2, [2, 0]), (2, 4, [0, 1, 1, 0])):
        pixels, index = tiny_sam3.images(images), torch.tensor(image_index)
        ids, valid = tiny_sam3.tokens(*range(3, 3 + texts))
        levels = open_["image_encoder"](images=pixels)
        text = open_["text_encoder"](input_ids=ids, attention_mask=valid.long())["text"]
        found = open_["decoder"](**levels, image_index=index, text=text, attention_mask=valid.long())
        with torch.no_grad():
            features, known = model.encode(pixels), model.read_tokens(ids, valid)
            asked = ConceptPrompts(index, [""] * texts)
            ours = model.detect_tokens(features, known, valid, torch.arange(texts), asked)
        assert ours.presence is not None and ours.semantic is not None
        wanted = {
            "confidence": ours.confidence,
            "presence": ours.presence[-1].sigmoid(),
            "boxes": ours.boxes[-1],
            "masks": tiny_sam3.every_mask(ours),
            "semantic": ours.semantic,
        }
        assert found.keys() == wanted.keys()
        for name, own in wanted.items():
            assert found[name].shape == own.shape
            assert (found[name] - own).abs().max() < 1e-4 * own.abs().max().clamp(min=1), name


def changed(model, kind: str):
    """A copy with two layers' weights swapped, or with one that is no number."""
    copied = copy.deepcopy(model)
    first, second = (layer.mlp.fc1.weight.data for layer in copied.text_encoder.text_model.encoder.layers[:2])
    if kind == "swapped":
        first[:], second[:] = second.clone(), first.clone()
    else:
        first[0, 0] = torch.nan
    return copied


@pytest.fixture
def retraced(monkeypatch) -> Callable[..., None]:
    """Of graphs that were exported before, only some are traced again: what is said of the rest is not in question."""

    def take(honest: Path, *again: str) -> None:
        save = TorchExportExporter.save

        def copy_or_save(self, graph: Graph, path: Path) -> None:
            save(self, graph, path) if graph.stem in again else shutil.copy(honest / path.name, path)

        monkeypatch.setattr(TorchExportExporter, "save", copy_or_save)

    return take


@pytest.mark.parametrize("kind", ["swapped", "nan", "missing"])
def test_what_is_not_the_run_does_not_pass(run, exported, retraced, tmp_path, trainer_command, monkeypatch, kind):
    retraced(exported("torch-export")[0], *([] if kind == "missing" else ["text_encoder"]))
    graphs, beside = SAM3Graphs.graphs, SAM3Graphs.write_beside

    def without(self, model, path):
        beside(self, model, path)
        (path / TOKENIZER).unlink()

    if kind == "missing":
        monkeypatch.setattr(SAM3Graphs, "write_beside", without)
    else:
        monkeypatch.setattr(SAM3Graphs, "graphs", lambda self, model: graphs(self, changed(model, kind)))
    line = refused(run, tmp_path / "graphs", trainer_command)
    assert {"missing": "cannot load it", "nan": "nan"}.get(kind, "differ by") in line


def test_other_tokens_do_not_pass(run, exported, retraced, tmp_path, trainer_command, monkeypatch):
    restore, beside = exporting.restore, SAM3Graphs.write_beside

    def louder(*given: object) -> Any:
        """The run, listening: what has hardly been trained says about the same to every text."""
        module: Any = restore(*given)
        module.model.text_projection.weight.data.mul_(30)
        return module

    def other(self, model, path):
        beside(self, model, path)
        made = json.loads((path / TOKENIZER).read_text())
        made["normalizer"] = {"type": "Replace", "pattern": {"String": "disc"}, "content": "left kidney"}
        (path / TOKENIZER).write_text(json.dumps(made))

    retraced(exported("torch-export")[0], "text_encoder")
    monkeypatch.setattr(exporting, "restore", louder)
    code, _, err = trainer_command("export", run, "--to", "torch-export", "--out", tmp_path / "honest")
    assert (code, err) == (0, "")
    shutil.rmtree(run / "exports")
    retraced(tmp_path / "honest")
    monkeypatch.setattr(SAM3Graphs, "write_beside", other)
    assert "differ by" in refused(run, tmp_path / "graphs", trainer_command)


def refused(run: Path, out: Path, trainer_command) -> str:
    """The one line of an export that is refused; nothing is left."""
    code, _, err = trainer_command("export", run, "--to", "torch-export", "--out", out)
    assert code == 2 and err.startswith("trainer: error: ") and err.count("\n") == 1
    assert not out.exists() and not (run / "exports").exists()
    return str(err)


def test_the_tokenizer_file_knows_every_term(tmp_path):
    import data_shards.vocabulary as vocabulary

    model = tiny_sam3.make()
    family = SAM3Graphs(model)
    family.write_beside(model, tmp_path)
    family.read_beside(tmp_path)
    content = yaml.safe_load(Path(vocabulary.__file__).with_suffix(".yaml").read_text())
    terms = [name for region in content.values() for term, others in region.items() for name in (term, *others)]
    assert len(terms) > 500 and synonyms("liver", ())  # the same file that the readers take
    terms += ["“Crohn’s”  disease", "ﬁbrous", "ＷＩＤＥ", "a\tb\x07c", "e\u0301", "liver " * 50, "x" * 400, "T2*, 3 mm"]
    ids, valid = model.tokenizer(terms)
    read = family._tokenizer.encode_batch(terms)
    assert [one.ids for one in read] == ids.tolist()
    assert [one.attention_mask for one in read] == valid.long().tolist()
    said = json.loads((tmp_path / TOKENS).read_text())
    assert (said["start"], said["end"], said["context"]) == (49406, 49407, 32)
    for text, tokens in said["examples"].items():
        assert family._tokenizer.encode(text).ids[: len(tokens)] == tokens
