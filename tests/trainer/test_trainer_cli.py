"""Bad input: one clear line, exit code 2, nothing half written; and help that teaches."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from data_shards.dataset import ShardDataset

REPOSITORY = Path(__file__).parents[2]


def changed(recipe: Path, change) -> Path:
    """The recipe with a change, as a new file."""
    content = yaml.safe_load(recipe.read_text())
    change(content)
    path = recipe.with_name("changed.yaml")
    path.write_text(yaml.safe_dump(content))
    return path


def rename(mapping, old, new):
    mapping[new] = mapping.pop(old)


def model_of(content):
    return content["model"]["init_args"]["model"]


TYPOS = {
    "top key": (lambda c: rename(c, "trainer", "trainr"), "'trainr", "did you mean 'trainer'?"),
    "trainer key": (
        lambda c: rename(c["trainer"], "max_steps", "max_step"),
        "'trainer.max_step'",
        "did you mean 'max_steps'?",
    ),
    "class argument": (
        lambda c: rename(c["data"]["init_args"], "batch_size", "batch_sise"),
        "TripletDataModule has no argument 'batch_sise'",
        "did you mean 'batch_size'?",
    ),
    "deep argument": (
        lambda c: rename(model_of(c)["init_args"], "image_size", "image_sice"),
        "LiteMedSAM has no argument 'image_sice'",
        "did you mean 'image_size'?",
    ),
    "class": (
        lambda c: model_of(c).update(class_path="trainer.models.LiteMedSam"),
        "there is no class 'trainer.models.LiteMedSam'",
        "did you mean 'trainer.models.LiteMedSAM'?",
    ),
    "short class": (
        lambda c: model_of(c).update(class_path="LiteMedSAM"),
        "needs its full dotted path",
        "did you mean 'trainer.models.LiteMedSAM'?",
    ),
    "foreign class": (
        lambda c: model_of(c).update(class_path="os.system"),
        "'os.system' is outside",
        "runs no other code",
    ),
    "wrong type": (
        lambda c: c["model"]["init_args"].update(lr="fast"),
        "key 'lr'",
        "Expected a float. Got value: fast",
    ),
    "wrong value": (
        lambda c: c["model"]["init_args"]["tuning"]["init_args"].update(layer_decay=2.0),
        "layer_decay is in (0, 1]",
        "not 2.0",
    ),
    "wrong size": (lambda c: model_of(c)["init_args"].update(image_size=100), "image_size 100", "a multiple of 8"),
    "frozen typo": (
        lambda c: c["model"]["init_args"]["tuning"]["init_args"].update(freeze=["promt_encoder"]),
        "pattern 'promt_encoder' matches no parameter",
        "prompt_encoder",
    ),
    "batch too large": (
        lambda c: c["data"]["init_args"].update(batch_size=64),
        "12 training samples",
        "lower batch_size",
    ),
    "batch not divisible": (
        lambda c: c["data"]["init_args"].update(batch_size=3),
        "not a multiple",
        "choose a multiple of 2",
    ),
    "no training split": (
        lambda c: c["data"]["init_args"].pop("train"),
        "data.init_args.train",
        "the folder of that split's shards",
    ),
    "weights name": (
        lambda c: model_of(c)["init_args"].update(weights="litemedsm"),
        "weights 'litemedsm'",
        "did you mean 'litemedsam'?",
    ),
    "weights file": (
        lambda c: model_of(c)["init_args"].update(weights="/nowhere/w.pth"),
        "/nowhere/w.pth",
        "no such file",
    ),
    "weights checksum": (
        lambda c: model_of(c)["init_args"].update(weights="litemedsam", weights_sha256="0" * 64),
        "wrong checksum",
        "fetch it again",
    ),
    "negative rate": (lambda c: c["model"]["init_args"].update(lr=-1.0), "lr is above 0", "here lr is -1.0"),
    "accumulation": (
        lambda c: c["trainer"].update(accumulate_grad_batches=3),
        "trainer.accumulate_grad_batches follows from",
        "batch_size",
    ),
    "test split": (lambda c: c["data"]["init_args"].update(test="/nowhere"), "data.init_args.test", "/nowhere"),
    "workers": (lambda c: c["data"]["init_args"].update(num_workers=-1), "num_workers -1", "0 or more"),
    "monitor without validation": (
        lambda c: c["checkpoint"].update(monitor="val/dsc"),
        "checkpoint.monitor val/dsc needs a validation split",
        "data.init_args.val",
    ),
    "validations that never come": (
        lambda c: (
            c["data"]["init_args"].update(val=c["data"]["init_args"]["train"]),
            c["trainer"].update(val_check_interval=1000),
        ),
        "trainer.val_check_interval 1000: an epoch has",
        "trainer.check_val_every_n_epoch to null",
    ),
    "an average twice": (
        lambda c: c["trainer"].update(callbacks=2 * [{"class_path": "trainer.callbacks.EMA"}]),
        "trainer.callbacks: EMA is there twice",
        "set it up once",
    ),
    "checkpoints twice": (
        lambda c: c["trainer"].update(
            callbacks=[{"class_path": "trainer.callbacks.RunCheckpoint", "init_args": {"every_n_steps": 7}}]
        ),
        "trainer.callbacks: every run has a RunCheckpoint already",
        "key checkpoint",
    ),
    "precision": (lambda c: c["trainer"].update(precision="bf16-true"), "bf16-true is not supported", "bf16-mixed"),
    "shards": (lambda c: c["data"]["init_args"].update(train="/nowhere/train"), "/nowhere/train", ""),
}


def the_only_line(code: int, err: str) -> str:
    """The one line of an error with exit code 2."""
    assert code == 2
    assert err.startswith("trainer: error: "), err
    assert err.count("\n") == 1, err
    assert err.endswith("\n")
    return err


@pytest.mark.parametrize("case", TYPOS)
def test_mistakes_in_a_recipe(case, tiny_recipe, trainer_command, tmp_path):
    change, what, hint = TYPOS[case]
    recipe = changed(tiny_recipe, change)
    line = the_only_line(*trainer_command("fit", "-c", recipe)[::2])
    assert what in line
    assert hint in line
    run = tmp_path / "run"
    assert not run.exists(), "nothing is half written"


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ((), ""),
        (("--trainer.max_stesp", 3), "did you mean 'max_steps'?"),
        (("--trainer.max_step", 3), "unknown key 'trainer.max_step'"),
        (("--model.init_args.tuning.init_args.layer_dcay", 0.5), "did you mean 'layer_decay'?"),
        (("--model.init_args.tuning", "trainer.tuning.LoraTuning"), "did you mean 'trainer.tuning.LoRATuning'?"),
        (("--model.init_args.tuning", "os.system"), "'os.system' is outside the allowed packages"),
        (("--model.init_args.tuning", "subprocess.Popen"), "outside the allowed packages"),
        (("--ckpt_path", "nothing.ckpt"), "nothing.ckpt: no such file"),
        (("-c", "nowhere.yaml"), "recipe nowhere.yaml: cannot be read"),
    ],
)
def test_mistakes_on_the_command_line(arguments, what, tiny_recipe, trainer_command, tmp_path):
    if not arguments:
        code, out, err = trainer_command()
        assert (code, err) == (0, "")
        assert "trainer fit -c recipes/quickstart.yaml" in out
        return
    line = the_only_line(*trainer_command("fit", "-c", tiny_recipe, *arguments)[::2])
    assert what in line
    assert not (tmp_path / "run/checkpoints").exists()


def test_a_folder_may_be_called_like_a_class(tiny_recipe, trainer_command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ("test", "-c", tiny_recipe, "--trainer.default_root_dir", "runs.Mine")
    assert trainer_command(*command)[0] == 0
    assert (tmp_path / "runs.Mine/evaluation/untouched/per_case.csv").is_file()


def test_version(trainer_command, capsys):
    from data_shards.cli import main as data_shards

    assert trainer_command("--version") == (0, "sam-trainer 0.1.0\n", "")
    assert data_shards(["--version"]) == 0
    assert capsys.readouterr().out == "sam-trainer 0.1.0\n"


def test_an_unknown_command_names_the_nearest(trainer_command):
    assert "did you mean 'predict'?" in the_only_line(*trainer_command("predcit")[::2])


def test_broken_yaml_names_file_and_line(trainer_command, tmp_path):
    (tmp_path / "broken.yaml").write_text("model: {class_path: [\n")
    line = the_only_line(*trainer_command("fit", "-c", tmp_path / "broken.yaml")[::2])
    assert "broken.yaml: not valid YAML in line 2" in line


def test_a_folder_that_cannot_be_written(tiny_recipe, trainer_command, tmp_path):
    (tmp_path / "file").write_text("")
    command = ("fit", "-c", tiny_recipe, "--trainer.default_root_dir", tmp_path / "file/run")
    line = the_only_line(*trainer_command(*command)[::2])
    assert f"cannot write to {tmp_path}/file/run" in line
    assert "choose another trainer.default_root_dir" in line


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_shard_ends_the_run_with_its_name(tiny_recipe, tiny_shards, trainer_command, tmp_path, workers):
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in (tiny_shards / "train").iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    shard = copy / "shard-000000.tar"
    index = ShardDataset(copy).index
    data = bytearray(shard.read_bytes())
    for number in range(len(index)):  # every sample: whichever comes first is found
        data[index.members(number)["image.png"][0] + 60] ^= 0xFF
    shard.write_bytes(bytes(data))
    options = ("--data.init_args.train", copy, "--data.init_args.num_workers", workers)
    line = the_only_line(*trainer_command("fit", "-c", tiny_recipe, *options)[::2])
    assert str(shard) in line
    assert "is damaged" in line
    assert "data-shards verify" in line


def test_scores_of_a_checkpoint_that_is_not_there_are_refused(tiny_recipe, trainer_command, tmp_path):
    line = the_only_line(*trainer_command("test", "-c", tiny_recipe, "--ckpt_path", "last")[::2])
    assert "has no checkpoints/last.ckpt" in line
    assert not (tmp_path / "run/evaluation").exists()


def test_a_checkpoint_of_another_tuning_is_refused(tiny_run, tiny_recipe, trainer_command):
    other = ("-c", "recipes/overlays/lora.yaml", "--ckpt_path", tiny_run / "checkpoints/last.ckpt")
    line = the_only_line(*trainer_command("test", "-c", tiny_recipe, *other)[::2])
    assert "is of another model or tuning than the recipe's" in line
    assert "missing (model." in line


def test_a_damaged_checkpoint_is_refused(tiny_run, tiny_recipe, trainer_command, tmp_path):
    damaged = tmp_path / "damaged.ckpt"
    damaged.write_bytes((tiny_run / "checkpoints/last.ckpt").read_bytes()[:100_000])
    line = the_only_line(*trainer_command("test", "-c", tiny_recipe, "--ckpt_path", damaged)[::2])
    assert "damaged.ckpt: not a readable checkpoint" in line


def test_training_samples_without_a_target_are_refused(tiny_recipe, trainer_command, monkeypatch):
    from data_shards.datamodule import TripletDataModule

    monkeypatch.setattr(TripletDataModule, "without_targets", lambda self, split: 3)
    line = the_only_line(*trainer_command("fit", "-c", tiny_recipe)[::2])
    assert "3 samples have no target" in line
    assert "keep: nonempty" in line


def test_no_network_for_a_hub_name(tiny_recipe, trainer_command, monkeypatch, tmp_path):
    import socket

    def unknown_host(*_: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown_host)
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    option = ("--model.init_args.model.init_args.weights", "nobody/nothing:model.safetensors")
    line = the_only_line(*trainer_command("fit", "-c", tiny_recipe, *option)[::2])
    assert "nobody/nothing:model.safetensors" in line
    assert "no network" in line
    assert "give its path" in line


def test_an_error_of_a_real_process_is_one_line(tiny_recipe):
    command = [sys.executable, "-m", "trainer.cli", "fit", "-c", str(tiny_recipe), "--trainer.max_stesp", "3"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, env={**os.environ})
    the_only_line(result.returncode, result.stderr)
    assert result.stdout == ""


def test_help_answers_at_once_and_teaches():
    code = "import sys; from trainer.cli import main; main(['--help']); print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY)
    assert result.stdout.endswith("False\n"), "help does not wait for torch"
    for word in ("plan", "fit", "validate", "test", "predict", "export", "report", "--ckpt_path last"):
        assert word in result.stdout


@pytest.mark.parametrize("command", ["plan", "fit", "validate", "test", "predict", "compare", "export", "report"])
def test_every_command_has_help(command, trainer_command):
    code, out, err = trainer_command(command, "--help")
    assert (code, err) == (0, "")
    assert out.startswith("usage: trainer ")
    assert f"\n  trainer {command} " in out, "an example on a line of its own"


def test_a_typo_inside_a_mapping_names_file_and_key(tiny_recipe, trainer_command, tmp_path):
    overlay = tmp_path / "mine.yaml"
    overlay.write_text("# Is it balanced?\ndata: {init_args: {sampling: {by: modality, powr: 0.5}}}\n")
    line = the_only_line(*trainer_command("fit", "-c", tiny_recipe, "-c", overlay)[::2])
    assert f"recipe {overlay}: unknown key 'powr'; did you mean 'power'?" in line
    typo = ("--data.init_args.sampling", "{by: modality, wieghts: {CT: 1}}")
    line = the_only_line(*trainer_command("fit", "-c", tiny_recipe, *typo)[::2])
    assert "unknown key 'wieghts.CT'; did you mean 'weights'?" in line
