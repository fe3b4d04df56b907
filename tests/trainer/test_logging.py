"""Loggers: what reaches them, what never does, and runs that go on."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
import wandb_records
import yaml
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image

from data_shards.build import build
from data_shards.dataset import ShardDataset
from data_shards.errors import UserError
from trainer.cli import main
from trainer.loggers import TensorBoard, WandB, told
from trainer.loggers.told import WITHHELD
from trainer.loggers.wandb import PRIVATE
from trainer.report.panels import Panel
from trainer.report.sheet import draw_sheet
from trainer.run import Run, read_json

REPOSITORY = Path(__file__).parents[2]
OVERLAYS = REPOSITORY / "recipes" / "overlays"
KEY = "0123456789abcdef" * 2 + "deadbeef"
"""An API key that has none."""
PATIENT, MRN, FOLDER = "DOE^JANE", "MRN778899", "Doe_Jane_1970"
needs_wandb = pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
needs_tensorboard = pytest.mark.skipif(
    importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed"
)


def shards_of_patients(folder: Path) -> Path:
    """Shards whose files, folders, cases and patients have names."""
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:32, :32]
    mask = np.stack([(rows - 16) ** 2 + (columns - 14 - z) ** 2 < 36 for z in range(4)])
    cases = []
    for split in ("train", "val"):
        image = rng.normal(80, 15, mask.shape) + 90 * mask
        names = {kind: f"{MRN}_{split}_{kind}.nii.gz" for kind in ("image", "mask")}
        for kind, array in (("image", image.clip(0, 255).astype(np.uint8)), ("mask", mask.astype(np.uint8))):
            nibabel.save(nibabel.Nifti1Image(array.transpose(2, 1, 0), np.eye(4)), folder / names[kind])
        cases.append({"id": f"{PATIENT} {split}", "patient": f"{PATIENT} {split}", "split": split, **names})
    spec = {
        "dataset": "discs", "modality": "MR", "cases": cases, "targets": [{"term": "disc", "value": 1}],
        "intensity": {"kind": "none"}, "split": {"kind": "explicit"}, "licence": "none", "cite": "nobody",
    }  # fmt: skip
    (folder / "spec.yaml").write_text(yaml.safe_dump(spec))
    build(folder / "spec.yaml", folder / "shards", root=folder)
    return folder / "shards"


def content(shards: Path, root: Path) -> dict[str, Any]:
    """A recipe of two validated steps."""
    model = {"class_path": "trainer.models.LiteMedSAM", "init_args": {"weights": None, "image_size": 32}}
    return {
        "seed_everything": 0,
        "model": {"class_path": "trainer.modules.MedSAMModule", "init_args": {"model": model, "lr": 1.0e-3}},
        "data": {
            "class_path": "data_shards.datamodule.TripletDataModule",
            "init_args": {"train": str(shards / "train"), "val": str(shards / "val"), "batch_size": 2},
        },
        "trainer": {
            "default_root_dir": str(root), "max_steps": 2, "log_every_n_steps": 1, "accelerator": "cpu",
            "val_check_interval": 2,
        },
    }  # fmt: skip


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps that went on for a third in another process, with both overlays; not to be changed."""
    if any(importlib.util.find_spec(name) is None for name in ("wandb", "tensorboard")):
        pytest.skip("wandb or tensorboard is not installed")
    folder = tmp_path_factory.mktemp("logged") / FOLDER
    folder.mkdir()
    root = folder.parent / "run"
    recipe = folder / "planted_recipe.yaml"
    recipe.write_text("# Does it log?\n" + yaml.safe_dump(content(shards_of_patients(folder), root)))
    overlays = [part for name in ("wandb", "tensorboard") for part in ("-c", str(OVERLAYS / f"{name}.yaml"))]
    command = ["fit", "-c", str(recipe), *overlays]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_API_KEY", KEY)
        assert main(command) == 0
    more = [*command, "--ckpt_path", "last", "--trainer.max_steps", "3"]
    environment = {**os.environ, "WANDB_API_KEY": KEY, "PLANTED_SECRET": "swordfish-in-the-environment"}
    done = subprocess.run(
        [sys.executable, "-m", "trainer.cli", *more], capture_output=True, text=True, cwd=REPOSITORY, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert "wandb sync" in done.stderr and done.stderr.count("wandb") < 5, "one line, and none of the package's own"
    return root


def offline_runs(root: Path) -> list[Path]:
    return sorted((root / "wandb").glob("offline-run-*"))


def rows_of(root: Path) -> list[dict[str, float]]:
    """Every attempt's rows, without blanks."""
    files = sorted((root / "logs").glob("version_*/metrics.csv"))
    return [{k: float(v) for k, v in row.items() if v} for file in files for row in csv.DictReader(file.open())]


def test_nothing_of_patients_and_machine_is_in_any_byte_that_weights_and_biases_keeps(logged: Path) -> None:
    data = logged.parent / FOLDER
    datasets = [ShardDataset(data / "shards" / split) for split in ("train", "val")]
    origins = [one[number].provenance for one in datasets for number in range(len(one))]
    keys = [str(key) for one in datasets for key in one.index.keys]
    assert len(keys) == 8
    forbidden = {
        "patient": [PATIENT, "DOE^", MRN, FOLDER, *(origin.patient for origin in origins)],
        "origin": [*(origin.volume for origin in origins if origin.volume)],
        "sample": keys,
        "key": [KEY, KEY[:12], "swordfish"],
        "argv": ["planted_recipe", "--ckpt_path", "trainer.cli", "overlays/wandb"],
        "machine": [f'"{socket.gethostname()}"', sys.executable, str(REPOSITORY)],
    }
    for folder in offline_runs(logged):
        said = wandb_records.everything(folder)
        assert "train/loss" in said and "index_sha256" in said, "or nothing was read"
        for kind, words in forbidden.items():
            assert [word for word in words if word in said] == [], kind
        for record in wandb_records.records(folder):
            assert record.WhichOneof("record_type") not in ("environment", "output", "output_raw", "stats")
            assert not record.run.host and not record.run.HasField("git")
        assert not (folder / "files" / "output.log").exists() and not (folder / "files" / "requirements.txt").exists()
    beside = [path for path in (logged / "wandb").iterdir() if path.is_file()]
    assert all(word not in path.read_text() for path in beside for words in forbidden.values() for word in words)


def test_the_search_would_find_what_the_package_collects_by_itself(tmp_path: Path) -> None:
    """Without our settings, the command line and the console are there."""
    pytest.importorskip("wandb")
    script = tmp_path / "planted_program.py"
    script.write_text(
        f"import wandb\nrun = wandb.init(project='p', dir={str(tmp_path)!r}, mode='offline')\n"
        "print('swordfish')\nrun.log({'x': 1})\nrun.finish()\n"
    )
    subprocess.run([sys.executable, script, "--patient", PATIENT], check=True, capture_output=True)
    said = wandb_records.everything(offline_runs(tmp_path)[0])
    assert all(word in said for word in (PATIENT, "planted_program.py", "swordfish"))


def test_weights_and_biases_holds_figures_and_what_the_run_is_made_of(logged: Path) -> None:
    folders = offline_runs(logged)
    assert len(folders) == 2
    runs = [wandb_records.records(folder) for folder in folders]
    ids = {record.run.run_id for records in runs for record in records if record.HasField("run")}
    assert ids == {(logged / "wandb" / "run-id").read_text().strip()}, "the run goes on there too"
    history: list[dict[str, Any]] = []
    for record in (record for records in runs for record in records if record.HasField("history")):
        history.append({item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item})
    found: dict[int, dict[str, Any]] = {}
    for row in history:
        found.setdefault(row["trainer/global_step"], {}).update(row)
    for row in rows_of(logged):
        for name, value in row.items():
            if name not in ("step", "epoch"):
                assert found[int(row["step"])][name] == pytest.approx(value, rel=1e-6), name
    assert sum("val/panels" in row for row in history) == 3, "after each of three steps"
    updates = [record.config.update for records in runs for record in records if record.HasField("config")]
    configs = [{update.key: json.loads(update.value_json) for update in each} for each in updates]
    config, record = [each for each in configs if "data" in each][-1], read_json(logged / "run.json")
    assert config["git_commit"] == record["git_commit"] and config["versions"] == record["versions"]
    assert config["data"]["train"]["index_sha256"] == record["data"]["train"]["index_sha256"]
    assert config["recipe"]["model"]["init_args"]["lr"] == 1e-3
    assert config["recipe"]["data"]["init_args"]["train"] == WITHHELD
    pictures = list(folders[0].glob("files/media/images/val/*.png"))
    with Image.open(pictures[0]) as picture, Image.open(next((logged / "panels").iterdir())) as kept:
        assert picture.size == kept.size


def test_tensorboard_holds_figures_settings_and_panels(logged: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams import plugin_data_pb2

    assert len(list((logged / "tensorboard").glob("events.*"))) == 2
    held = EventAccumulator(str(logged / "tensorboard"))
    held.Reload()
    for name in ("train/loss", "val/dsc", "train/grad_norm", "train/lr", "train/images_per_second"):
        expected = [(int(row["step"]), row[name]) for row in rows_of(logged) if name in row]
        found = [(event.step, event.value) for event in held.Scalars(name)]
        assert [step for step, _ in found] == [step for step, _ in expected]
        assert [value for _, value in found] == pytest.approx([value for _, value in expected], rel=1e-5)
    assert [image.step for image in held.Images("val/panels")] == [1, 2, 3]
    with Image.open(next((logged / "panels").iterdir())) as kept:
        assert (held.Images("val/panels")[0].width, held.Images("val/panels")[0].height) == kept.size
    plugin = plugin_data_pb2.HParamsPluginData.FromString(
        held.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    )
    settings = plugin.session_start_info.hparams
    assert (
        settings["data.train.index_sha256"].string_value
        == read_json(logged / "run.json")["data"]["train"]["index_sha256"]
    )
    assert settings["recipe.model.init_args.lr"].number_value == 1e-3
    said = b"".join(path.read_bytes() for path in (logged / "tensorboard").iterdir()).decode("latin-1")
    assert all(word not in said for word in (PATIENT, MRN, FOLDER, KEY, "planted_recipe"))


def test_csv_is_told_the_same(logged: Path) -> None:
    found = yaml.safe_load((logged / "logs/version_0/hparams.yaml").read_text())
    record = read_json(logged / "run.json")
    assert {"git_commit", "versions", "data", "recipe"} <= set(found)
    assert found["data"]["val"] == {name: record["data"]["val"][name] for name in ("index_sha256", "samples")}


def test_told_is_decided_field_by_field() -> None:
    names = ("name", "question", "caveat", "git_commit", "git_dirty", "versions", "model", "tuning", "precision")
    record: dict[str, Any] = {name: name for name in (*names, "hardware", "world_size", "seed")}
    record |= {"data": {"train": {"folder": "/x/Doe", "index_sha256": "ab", "samples": 3}}, "host": "secret-host"}
    recipe = {
        "model": {"init_args": {"weights": "facebook/sam3", "tokenizer": "/x/Doe", "freeze": ["image_encoder.*"]}},
        "data": {"init_args": {"train": ["/x/Doe", "Doe"], "kinds": "all", "batch_size": 4, "sampling": {"by": "x"}}},
        "trainer": {"default_root_dir": "~/Doe", "max_steps": 9, "logger": [{"init_args": {"entity": "Doe"}}]},
        "checkpoint": {"monitor": "val/dsc", "dirpath": "runs/Doe"},
        "cluster": {"account": "Doe"},
        "ckpt_path": "/x/Doe",
    }  # fmt: skip
    found = told(record, recipe)
    assert "Doe" not in json.dumps(found) and "secret-host" not in json.dumps(found)
    assert found["data"] == {"train": {"index_sha256": "ab", "samples": 3}}
    kept = found["recipe"]
    assert kept["model"]["init_args"] == {
        "weights": "facebook/sam3", "tokenizer": WITHHELD, "freeze": ["image_encoder.*"],
    }  # fmt: skip
    assert kept["data"]["init_args"] == {
        "train": [WITHHELD] * 2, "kinds": "all", "batch_size": 4, "sampling": {"by": "x"},
    }  # fmt: skip
    assert kept["trainer"] == {"default_root_dir": WITHHELD, "max_steps": 9}
    assert kept["checkpoint"] == {"monitor": "val/dsc", "dirpath": WITHHELD}


def test_a_picture_for_loggers_names_no_sample() -> None:
    rng = np.random.default_rng(0)
    image, mask = rng.integers(0, 255, (24, 24), dtype=np.uint8), np.eye(24, dtype=np.uint8)
    none = np.zeros((0, 3), np.float32)
    drawn = [
        [Panel(key, "disc", image, mask, mask, np.array([1, 1, 9, 9], np.float32), none)] for key in ("Doe", "Jane")
    ]
    assert draw_sheet(drawn[0], "").tobytes() != draw_sheet(drawn[1], "").tobytes()
    one, other = (draw_sheet(panels, "", keys=False) for panels in drawn)
    assert one.tobytes() == other.tobytes() and one.size == draw_sheet(drawn[0], "").size


@pytest.mark.parametrize(
    ("logger", "said"),
    [
        ({"class_path": "trainer.loggers.WandB", "init_args": {"api_key": KEY}}, "api_key: a recipe holds no keys"),
        ({"class_path": "lightning.pytorch.loggers.WandbLogger"}, "take trainer.loggers.WandB"),
        ({"class_path": "trainer.loggers.WandB", "init_args": {"offline": False}}, "export WANDB_API_KEY="),
        ({"class_path": "trainer.loggers.WandB", "init_args": {"projekt": "x"}}, "did you mean 'project'"),
    ],
)
@needs_wandb
def test_mistakes_are_one_line(
    logger: dict[str, Any],
    said: str,
    tiny_recipe: Path,
    trainer_command: Callable[..., tuple[int, str, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text(yaml.safe_dump({"trainer": {"logger": logger}}))
    code, _, err = trainer_command("fit", "-c", tiny_recipe, "-c", overlay)
    assert code == 2 and said in err and len(err.strip().splitlines()) == 1
    assert KEY not in err and not (tmp_path / "run").exists()


def test_a_key_on_the_command_line_is_refused(
    tiny_recipe: Path, trainer_command: Callable[..., tuple[int, str, str]]
) -> None:
    code, _, err = trainer_command("fit", "-c", tiny_recipe, f"--trainer.logger.init_args.api_key={KEY}")
    assert code == 2 and "put it into the environment" in err and KEY not in err


@needs_wandb
@needs_tensorboard
def test_a_missing_package_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: None)
    for logger, extra in ((WandB, "wandb"), (TensorBoard, "tensorboard")):
        with pytest.raises(UserError, match=rf"pip install 'sam-trainer\[{extra}\]'"):
            logger()


class Service:
    """In the place of the package's run."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.dir, self.url, self.gone = "runs/x/wandb/offline-run-1/files", "https://service/run", False

    def define_metric(self, *_: Any, **__: Any) -> None: ...

    def log(self, row: dict[str, Any]) -> None:
        if self.gone:
            raise BrokenPipeError("the service has ended")
        self.rows.append(row)

    def finish(self, exit_code: int) -> None:
        self.log({"exit": exit_code})


@needs_wandb
def test_online_nothing_more_is_collected_and_one_id_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(wandb, "init", lambda **arguments: asked.append(arguments) or Service())
    for _ in range(2):
        logger = WandB(offline=False, group="sweep")
        logger.place(Run(tmp_path / "mine"))
        logger.log_metrics({"train/loss": 1.0}, 3)
        assert logger.experiment.rows == [{"train/loss": 1.0, "trainer/global_step": 3}]
    assert len(asked) == 2 and asked[0]["id"] == asked[1]["id"] and asked[0]["resume"] == "allow"
    assert asked[0]["mode"] is None and asked[0]["name"] == "mine" and asked[0]["group"] == "sweep"
    for name, value in PRIVATE.items():
        assert getattr(asked[0]["settings"], name) == value
    assert KEY not in str(asked[0])


@needs_wandb
def test_the_service_that_refuses_ends_a_run_with_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    def refuse(**_: Any) -> None:
        raise wandb.errors.CommError("permission denied\nand much more")

    monkeypatch.setattr(wandb, "init", refuse)
    logger = WandB()
    logger.place(Run(tmp_path))
    with pytest.raises(UserError, match=r"Weights & Biases: permission denied; leave offline true"):
        logger.log_hyperparams({"a": 1})


@needs_wandb
def test_a_service_that_breaks_down_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import wandb

    service = Service()
    monkeypatch.setattr(wandb, "init", lambda **_: service)
    logger = WandB()
    logger.place(Run(tmp_path))
    logger.log_metrics({"x": 1.0}, 0)
    service.gone = True
    for step in (1, 2):
        logger.log_metrics({"x": 1.0}, step)
    logger.finalize("success")
    assert len(service.rows) == 1
    assert capsys.readouterr().err.strip() == (
        "Weights & Biases broke down (BrokenPipeError): the run goes on without it, see metrics.csv"
    )


@needs_wandb
@needs_tensorboard
def test_the_first_rank_alone_logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    for logger in (WandB(), TensorBoard()):
        logger.place(Run(tmp_path))
        logger.log_hyperparams({"a": 1})
        logger.log_image("val/panels", [Image.new("RGB", (4, 4))], 0)
        logger.finalize("success")
    assert not list(tmp_path.iterdir())


@needs_wandb
def test_panels_can_be_kept_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    service = Service()
    monkeypatch.setattr(wandb, "init", lambda **_: service)
    logger = WandB(panels=False)
    logger.place(Run(tmp_path))
    logger.log_image("val/panels", [Image.new("RGB", (4, 4))], 0)
    assert service.rows == []


@needs_tensorboard
def test_a_run_that_goes_on_from_before_its_end_draws_its_curve_once(tmp_path: Path) -> None:
    """As after a kill: steps that were logged and not saved are logged again."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for first, last, value in ((0, 4, 1.0), (2, 5, 2.0)):
        logger = TensorBoard()
        logger.place(Run(tmp_path), first)
        for step in range(first, last):
            logger.log_metrics({"train/loss": torch.tensor(value)}, step)
        logger.finalize("success")
    held = EventAccumulator(str(tmp_path / "tensorboard"))
    held.Reload()
    assert [(event.step, event.value) for event in held.Scalars("train/loss")] == [
        (0, 1.0), (1, 1.0), (2, 2.0), (3, 2.0), (4, 2.0),
    ]  # fmt: skip
