"""Whole commands on a tiny corpus: what they leave, and that a killed run goes on as if nothing had happened."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from pycocotools import mask as coco_mask

from data_shards.datamodule import TripletDataModule
from data_shards.dataset import ShardDataset
from trainer.modules.medsam import per_image_mean
from trainer.prompts import BoxPrompts
from trainer.report.answer import limits
from trainer.report.data import read_run
from trainer.report.traces import read_order
from trainer.restore import restore
from trainer.run import Run, read_json
from trainer.scores import read_scores

REPOSITORY = Path(__file__).parents[2]


def steps(run: Path) -> dict[tuple[int, int], tuple[str, str, str]]:
    """The trace by (epoch, batch); of a batch that was done twice, the later line."""
    with (run / "trace.csv").open() as handle:
        rows = list(csv.DictReader(handle))
    return {(int(r["epoch"]), int(r["batch"])): (r["step"], r["loss"], r["keys"]) for r in rows}


def test_a_run_can_be_read_years_later(tiny_run, tiny_shards):
    record = json.loads((tiny_run / "run.json").read_text())
    assert record["question"] == "Does it run?"
    assert record["data"]["train"]["index_sha256"] == ShardDataset(tiny_shards / "train").index.sha256
    assert record["data"]["train"]["samples"] == 12
    assert record["model"]["parameters"] == 9_791_556
    assert record["model"]["preprocessing"]["image_size"] == 64
    assert {"python", "torch", "lightning", "transformers"} <= record["versions"].keys()
    assert set(json.loads((tiny_run / "stages.json").read_text())) == {"fit", "evaluate-untouched", "evaluate-tuned"}
    recipe = (tiny_run / "recipe.yaml").read_text()
    assert recipe.startswith("# Does it run?\n")
    resolved = yaml.safe_load(recipe)
    assert resolved["model"]["init_args"]["tuning"]["init_args"]["freeze"] == ["prompt_encoder"], "defaults are written"


def test_every_step_sees_a_whole_batch_and_an_epoch_every_sample_once(tiny_run, tiny_shards):
    trace = steps(tiny_run)
    assert len(trace) == 8, "four steps of two micro-batches"
    first_epoch = " ".join(keys for (epoch, _), (_, _, keys) in trace.items() if epoch == 0).split()
    index = ShardDataset(tiny_shards / "train").index
    assert sorted(first_epoch) == sorted(index.key(i) for i in range(12))
    assert [step for step, _, _ in trace.values()] == ["0", "0", "1", "1", "2", "2", "3", "3"]


def test_evaluations_score_every_target_and_training_changes_them(tiny_run, tiny_shards):
    tables = {}
    for name in ("untouched", "tuned"):
        with (tiny_run / "evaluation" / name / "per_case.csv").open() as handle:
            tables[name] = list(csv.DictReader(handle))
        keys = [row["key"] for row in tables[name]]
        index = ShardDataset(tiny_shards / "test").index
        assert keys == [index.key(i) for i in range(len(index))]
        assert all(0 <= float(row["iou"]) <= float(row["dsc"]) <= 1 for row in tables[name])
    assert [r["dsc"] for r in tables["untouched"]] != [r["dsc"] for r in tables["tuned"]]


def test_metrics_are_logged_by_step(tiny_run):
    rows = [row for file in tiny_run.glob("logs/version_*/metrics.csv") for row in csv.DictReader(file.open())]
    losses = [row for row in rows if row.get("train/loss")]
    assert [int(row["step"]) for row in losses] == [0, 0, 1, 1, 2, 2, 3, 3] or len(losses) == 4
    assert all(
        float(r["train/dice_loss"]) + float(r["train/cross_entropy"]) == pytest.approx(float(r["train/loss"]), rel=1e-5)
        for r in losses
    )
    assert any(row.get("train/images_per_second") for row in rows)
    assert any(row.get("test/dsc") for row in rows)


def test_the_checkpoint_holds_nothing_pickled_and_every_weight(tiny_run):
    content = torch.load(tiny_run / "checkpoints" / "last.ckpt", weights_only=True)
    module = restore(Run(tiny_run))
    assert content["state_dict"].keys() == module.state_dict().keys()
    assert all(torch.equal(tensor, module.state_dict()[name]) for name, tensor in content["state_dict"].items())
    assert content["global_step"] == 4


def test_predict_writes_masks_at_native_resolution(tiny_recipe, trainer_command, tiny_shards, tmp_path):
    assert trainer_command("predict", "-c", tiny_recipe)[0] == 0
    lines = [json.loads(line) for line in (tmp_path / "run/predictions/rank-0.jsonl").read_text().splitlines()]
    shards = ShardDataset(tiny_shards / "test")
    assert [line["key"] for line in lines] == [shards.index.key(i) for i in range(len(shards))]
    for position, line in enumerate(lines):
        target = shards[position].targets[line["target"]]
        assert line["term"] == "disc"
        assert np.allclose(line["box"], target.box, atol=0.01)
        assert coco_mask.decode(line["mask"]).shape == (48, 40)


def test_the_best_by_a_validation_metric_is_kept_and_found(tiny_recipe, tiny_shards, trainer_command, tmp_path):
    watched = (
        *("--data.init_args.val", tiny_shards / "test", "--trainer.val_check_interval", 2),
        *("--checkpoint.monitor", "val/dsc", "--checkpoint.every_n_steps", 100, "--trainer.max_steps", 3),
    )
    assert trainer_command("fit", "-c", tiny_recipe, *watched)[0] == 0
    logged = [row for file in (tmp_path / "run/logs").glob("*/metrics.csv") for row in csv.DictReader(file.open())]
    scores = [float(row["val/dsc"]) for row in logged if row.get("val/dsc")]
    assert len(scores) == 3, "after every second micro-batch, so after every step"
    kept = sorted(path.name for path in (tmp_path / "run/checkpoints").glob("*.ckpt"))
    best = f"best-{scores.index(max(scores)) + 1:06d}.ckpt"
    assert kept == [best, "last.ckpt", "step-000003.ckpt"]
    for name in ("best", tmp_path / "run/checkpoints" / best):
        assert trainer_command("test", "-c", tiny_recipe, "--ckpt_path", name)[0] == 0
        found = read_scores(tmp_path / "run/evaluation/tuned/per_case.csv")
        assert sum(score.dsc for score in found) / len(found) == pytest.approx(max(scores), abs=1e-5)
    assert json.loads((tmp_path / "run/evaluation/tuned/evaluation.json").read_text())["checkpoint"].endswith(best)
    code, out, _ = trainer_command("validate", "-c", tiny_recipe, "--ckpt_path", "best", *watched[:2])
    assert code == 0
    assert "val/dsc" in out


def test_progress_is_lines_where_there_is_no_terminal(tiny_recipe, trainer_command):
    code, out, err = trainer_command("fit", "-c", tiny_recipe, "--trainer.max_steps", 2)
    assert code == 0
    assert "step 2/2" in out
    assert "images/s" in out
    assert err == "", "nothing to worry the user with"


def test_progress_is_a_bar_on_a_terminal(tiny_recipe):
    small = ["-c", str(tiny_recipe), "--model.init_args.model.init_args.image_size", "32", "--trainer.max_steps", "2"]
    command = [sys.executable, "-m", "trainer.cli", "fit", *small]
    master, slave = pty.openpty()
    environment = {**os.environ, "COLUMNS": "120", "TERM": "xterm"}
    process = subprocess.Popen(command, stdout=slave, stderr=slave, cwd=REPOSITORY, env=environment)
    os.close(slave)
    shown = b""
    with contextlib.suppress(OSError):  # the end of a terminal is an error
        while part := os.read(master, 4096):
            shown += part
    assert process.wait() == 0, shown.decode()
    last = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode()).strip().splitlines()
    bar = [line for line in last if line.startswith("train")][-1]
    assert "2/2" in bar
    assert "images/s" in bar
    assert "left 0:00:00" in bar
    assert last[-1].startswith("run: ")


def test_lora_trains_little_and_leaves_the_encoder(tiny_recipe, trainer_command, tmp_path):
    command = ("fit", "-c", tiny_recipe, "-c", "recipes/overlays/lora.yaml", "--trainer.max_steps", 2)
    assert trainer_command(*command)[0] == 0
    record = json.loads((tmp_path / "run/run.json").read_text())
    assert record["tuning"] == "LoRATuning"
    assert record["model"]["trainable"] < record["model"]["parameters"] / 2
    module = restore(Run(tmp_path / "run"))
    adapters = {n: p for n, p in module.model.named_parameters() if "lora_B" in n}
    assert adapters
    assert any(p.abs().sum() > 0 for p in adapters.values()), "they have learnt"


def test_accumulation_does_not_change_what_a_step_learns(tiny_recipe, trainer_command, tmp_path):
    """Micro-batches of 1, 2 and 4 give the same step: same samples, same mean loss, nearly the same weights."""
    weights = {}
    for micro in (1, 4):
        root = tmp_path / f"micro{micro}"
        changed = ("--data.init_args.micro_batch_size", micro, "--trainer.default_root_dir", root)
        assert trainer_command("fit", "-c", tiny_recipe, "--trainer.max_steps", 1, *changed)[0] == 0
        state = torch.load(root / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
        weights[micro] = {name: tensor.float() for name, tensor in state.items() if tensor.is_floating_point()}
    apart = max(float((weights[1][n] - weights[4][n]).abs().max()) for n in weights[1])
    # Adam's first step is lr × sign(gradient): only gradients near zero may tip over
    tipped = sum(int(((weights[1][n] - weights[4][n]).abs() > 1e-4).sum()) for n in weights[1])
    assert apart <= 2.1e-3
    assert tipped < 0.01 * sum(t.numel() for t in weights[1].values())


def test_killed_in_mid_epoch_a_run_goes_on_as_the_undisturbed_one(
    tiny_recipe, trainer_process, trainer_command, tmp_path
):
    # 7 micro-batches in: step 3 of 6, inside the first epoch's last step
    quiet = ("fit", "-c", tiny_recipe, "--data.init_args.micro_batch_size", 1, "--trainer.max_steps", 7)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert trainer_command(*quiet, "--trainer.default_root_dir", whole)[0] == 0
    resumed = (*quiet, "--trainer.default_root_dir", killed, "--ckpt_path", "last", "--checkpoint.every_n_steps", 2)
    process = trainer_process(*resumed)
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        trace = killed / "trace.csv"
        if trace.exists() and trace.read_text().count("\n") > 18:
            break
        time.sleep(0.01)
    assert process.poll() is None, process.stdout.read()
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = steps(killed)
    assert 18 <= len(before) < 28
    code, out, _ = trainer_command(*resumed)
    assert code == 0
    assert "going on from" in out
    assert steps(killed) == steps(whole), "losses to the last printed digit, and the same samples in the same order"
    last = [torch.load(run / "checkpoints/last.ckpt", weights_only=True)["state_dict"] for run in (whole, killed)]
    assert all(torch.equal(last[0][name], last[1][name]) for name in last[0])


@pytest.mark.parametrize("every", [1, 100], ids=["saved after the batch", "saved at the end"])
@pytest.mark.parametrize("stop", [2, 3], ids=["in mid-epoch", "after an epoch"])
def test_a_run_made_longer_goes_on_with_the_next_sample(stop, every, tiny_recipe, trainer_command, tmp_path):
    small = ("fit", "-c", tiny_recipe, "--model.init_args.model.init_args.image_size", 32)
    whole, parts = ((*small, "--trainer.default_root_dir", tmp_path / name) for name in ("whole", "parts"))
    assert trainer_command(*whole, "--trainer.max_steps", 5)[0] == 0
    assert trainer_command(*parts, "--checkpoint.every_n_steps", every, "--trainer.max_steps", stop)[0] == 0
    assert trainer_command(*parts, "--trainer.max_steps", 5, "--ckpt_path", "last")[0] == 0
    assert steps(tmp_path / "parts") == steps(tmp_path / "whole")


def test_two_ranks_take_the_same_steps_as_one(tiny_recipe, trainer_process, trainer_command, tmp_path):
    size = ("--model.init_args.model.init_args.image_size", 32, "--data.init_args.micro_batch_size", 1)
    small = ("-c", tiny_recipe, *size)
    one, two = (("--trainer.default_root_dir", tmp_path / name) for name in ("one", "two"))
    ranks = ("--trainer.devices", 2, "--trainer.strategy", "ddp")
    assert trainer_command("fit", *small, *one)[0] == 0
    for command in (("fit",), ("test", "--ckpt_path", "last")):
        process = trainer_process(*command, *small, *two, *ranks)
        shown, _ = process.communicate(timeout=300)
        assert process.returncode == 0, shown
        assert "arning" not in shown
        assert "recommended" not in shown
    alone, shared = steps(tmp_path / "one"), steps(tmp_path / "two")
    assert len(alone) == 16
    assert len(shared) == 8, "two at a time"
    for (epoch, batch), (_, loss, keys) in shared.items():  # the first rank has every other sample
        _, alone_loss, alone_keys = alone[epoch, 2 * batch]
        assert keys == alone_keys
        assert float(loss) == pytest.approx(float(alone_loss), rel=1e-3)
    # scores are gathered: each target once, whichever rank had it
    table = tmp_path / "two/evaluation/tuned/per_case.csv"
    gathered = read_scores(table)
    assert trainer_command("test", *small, *two, "--ckpt_path", "last")[0] == 0
    assert gathered == read_scores(table)
    assert len(gathered) == 6


def test_a_training_is_not_overwritten(tiny_recipe, trainer_command, tmp_path):
    small = ("fit", "-c", tiny_recipe, "--model.init_args.model.init_args.image_size", 32, "--trainer.max_steps", 2)
    assert trainer_command(*small)[0] == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.is_file()}
    code, _, err = trainer_command(*small)
    assert code == 2
    assert f"{tmp_path}/run holds a training at step 2 already: go on with --ckpt_path last" in err
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def test_ctrl_c_says_how_to_go_on(tiny_recipe, trainer_process, trainer_command, tmp_path):
    small = ("fit", "-c", tiny_recipe, "--model.init_args.model.init_args.image_size", 32)
    process = trainer_process(*small, "--trainer.max_steps", 100_000)
    last = tmp_path / "run/checkpoints/last.ckpt"
    deadline = time.monotonic() + 120
    while process.poll() is None and not last.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    shown, _ = process.communicate(timeout=60)
    assert process.returncode == 130, shown
    assert "--ckpt_path last goes on from the last checkpoint" in shown
    assert shown.endswith("trainer: interrupted\n")
    assert "Traceback" not in shown
    done = torch.load(last, weights_only=True)["global_step"]
    assert trainer_command(*small, "--trainer.max_steps", done + 1, "--ckpt_path", "last")[0] == 0


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model.init_args.lr", 1e-5),
        ("model.init_args.tuning.init_args.layer_decay", 0.5),
        ("data.init_args.batch_size", 2),
        ("data.init_args.kinds", "semantic"),
        ("data.init_args.only_with_targets", "true"),
        ("seed_everything", 7),
    ],
)
def test_a_training_does_not_go_on_with_another_recipe(key, value, tiny_run, tiny_recipe, trainer_command, tmp_path):
    """The checkpoint has its own optimiser and place in the epoch: the change would be recorded and have no effect."""
    shutil.copytree(tiny_run, tmp_path / "run")
    recorded = (tmp_path / "run/recipe.yaml").read_text()
    more = ("--trainer.max_steps", 5, "--ckpt_path", "last")
    code, _, err = trainer_command("fit", "-c", tiny_recipe, *more, f"--{key}", value)
    assert (code, err.count("\n")) == (2, 1), err
    assert f"cannot go on with another {key}" in err
    assert (tmp_path / "run/recipe.yaml").read_text() == recorded


def test_a_training_does_not_go_on_with_other_weights_of_its_data(tiny_run, tiny_recipe, trainer_command, tmp_path):
    shutil.copytree(tiny_run, tmp_path / "run")
    weights = ("-c", "recipes/overlays/balanced.yaml", "--trainer.default_root_dir", tmp_path / "run")
    code, _, err = trainer_command("fit", "-c", tiny_recipe, *weights, "--trainer.max_steps", 5, "--ckpt_path", "last")
    assert (code, err.count("\n")) == (2, 1), err
    assert "cannot go on with another data.init_args.sampling: None in " in err


def test_a_run_goes_on_with_other_micro_batches(tiny_run, tiny_recipe, trainer_command, tmp_path):
    """Other samples at once, and no other steps: the whole run's are the same as with the old ones."""
    small = ("fit", "-c", tiny_recipe, "--trainer.max_steps", 7)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert trainer_command(*small, "--trainer.default_root_dir", whole)[0] == 0
    shutil.copytree(tiny_run, parts)
    cut = ("--data.init_args.micro_batch_size", 1, "--trainer.default_root_dir", parts)
    code, out, err = trainer_command(*small, *cut, "--ckpt_path", "last")
    assert code == 0, err
    assert "step 4" in out
    orders = [read_order(root) for root in (whole, parts)]
    assert orders[0] == orders[1] and len(orders[0]) == 7
    counted = [torch.load(root / "checkpoints/last.ckpt", weights_only=True) for root in (whole, parts)]
    assert [content["global_step"] for content in counted] == [7, 7]
    rows = [row for file in parts.glob("logs/version_*/metrics.csv") for row in csv.DictReader(file.open())]
    assert {int(row["step"]) for row in rows if row.get("train/loss")} >= set(range(7)), "logged at every step"


def test_damaged_samples_are_left_out_where_the_recipe_says_so(tiny_recipe, tiny_shards, trainer_command, tmp_path):
    copy = Path(shutil.copytree(tiny_shards, tmp_path / "copy"))
    names = {}
    for split, numbers in (("train", (3, 5)), ("test", (2,))):
        index = ShardDataset(copy / split).index
        path = copy / split / str(index.shard_names[0])
        data = bytearray(path.read_bytes())
        for number in numbers:
            data[index.members(number)["image.png"][0] + 60] ^= 0xFF
        path.write_bytes(data)
        names[split] = {index.key(number) for number in numbers}
    folders = [option for split in names for option in (f"--data.init_args.{split}", copy / split)]
    skip = ("-c", "recipes/overlays/skip_damaged.yaml", "--data.init_args.max_damaged", 0.2)
    small = ("-c", tiny_recipe, *folders, *skip, "--trainer.max_steps", 3)
    for micro in (2, 1):  # one at a time, a batch can be empty
        run = tmp_path / f"run{micro}"
        more = ("--trainer.default_root_dir", run, "--data.init_args.micro_batch_size", micro)
        code, out, err = trainer_command("fit", *small, *more)
        assert code == 0, err
        assert "is skipped, as are others to come" in err
        assert f"2 damaged samples were skipped: {run}/skipped.csv names them" in err
        with (run / "skipped.csv").open() as handle:
            rows = list(csv.DictReader(handle))
        assert {row["key"] for row in rows} == names["train"]
        assert all("its bytes changed since the build" in row["reason"] for row in rows)
        seen = [key for keys in read_order(run).values() for key in keys]
        assert len(seen) == len(set(seen)) == 10 and not names["train"] & set(seen)
        code, out, err = trainer_command("test", *small, *more)
        assert code == 0, err
        assert "1 damaged sample was not scored" in out
        evaluation = read_json(run / "evaluation/untouched/evaluation.json")
        assert set(evaluation["skipped"]) == names["test"] and evaluation["targets"] == 5
        assert "its bytes changed since the build" in str(evaluation["skipped"])
        assert "2 samples could not be read and were skipped in training" in " ".join(limits(read_run(Run(run))))
    code, _, err = trainer_command(
        "fit", *small, *more[2:], "--data.init_args.max_damaged", 0.0, *more[:1], tmp_path / "no"
    )
    assert code == 2
    assert "1 damaged sample in one epoch on one rank: data.init_args.max_damaged (0) allows fewer" in err


def test_the_recipe_of_a_resumed_run_names_no_checkpoint(tiny_run, tiny_recipe, trainer_command, tmp_path):
    shutil.copytree(tiny_run, tmp_path / "run")
    assert trainer_command("fit", "-c", tiny_recipe, "--trainer.max_steps", 5, "--ckpt_path", "last")[0] == 0
    assert yaml.safe_load((tmp_path / "run/recipe.yaml").read_text())["ckpt_path"] is None
    assert read_json(tmp_path / "run/run.json")["question"] == "Does it run?"


def test_a_rehearsal_leaves_no_training_behind(tiny_recipe, trainer_command, tmp_path):
    small = ("-c", tiny_recipe, "--model.init_args.model.init_args.image_size", 32)
    for command in ("fit", "test"):
        assert trainer_command(command, *small, "--trainer.fast_dev_run", "true")[0] == 0
    assert not [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert trainer_command("fit", *small, "--trainer.max_steps", 1)[0] == 0


def test_a_part_of_an_evaluation_does_not_pass_for_the_whole(tiny_recipe, trainer_command, tmp_path):
    assert trainer_command("test", "-c", tiny_recipe, "--trainer.limit_test_batches", 2)[0] == 0
    assert [folder.name for folder in (tmp_path / "run/evaluation").iterdir()] == ["untouched-partial"]


def test_a_loss_that_is_no_number_ends_the_run_before_it_is_saved(tiny_recipe, trainer_command, tmp_path):
    at_once = ("--trainer.callbacks+", "trainer.callbacks.StepGuard", "--trainer.callbacks.rollback_after", 0)
    code, _, err = trainer_command("fit", "-c", tiny_recipe, "--model.init_args.lr", 1e12, *at_once)
    assert (code, err.count("\n")) == (2, 1)
    assert "the loss is nan at step" in err
    last = tmp_path / "run/checkpoints/last.ckpt"
    state = torch.load(last, weights_only=True)["state_dict"] if last.exists() else {}
    assert all(torch.isfinite(tensor).all() for name, tensor in state.items() if tensor.is_floating_point())


def test_seeds_of_a_run_give_other_orders_and_boxes(tiny_recipe, tiny_shards, monkeypatch):
    orders = []
    for seed in (1, 2):
        monkeypatch.setenv("PL_GLOBAL_SEED", str(seed))
        data, prompts = TripletDataModule(train=str(tiny_shards / "train")), BoxPrompts(max_shift=9)
        data.setup("fit")
        keys = [batch.keys[0] for batch in data.train_dataloader()]
        boxes = prompts(torch.full((1, 4), 20.0), torch.full((1, 2), 64), [(0, 0)], epoch=0)
        orders.append((keys, boxes.tolist()))
    assert orders[0][0] != orders[1][0]
    assert orders[0][1] != orders[1][1]


def test_several_targets_weigh_the_same_however_a_step_is_cut():
    values, image = torch.tensor([1.0, 2.0, 3.0, 10.0]), torch.tensor([0, 0, 0, 1])
    whole = per_image_mean(values, image)
    parts = [per_image_mean(values[:3], image[:3]), per_image_mean(values[3:], image[3:])]
    assert whole == pytest.approx(6.0)
    assert sum(parts) / 2 == pytest.approx(float(whole))


def test_resuming_on_other_data_is_refused(tiny_recipe, trainer_command, tmp_path, tiny_shards):
    assert trainer_command("fit", "-c", tiny_recipe, "--trainer.max_steps", 1)[0] == 0
    other = ("--data.init_args.train", tiny_shards / "test", "--trainer.max_steps", 2, "--ckpt_path", "last")
    code, _, err = trainer_command("fit", "-c", tiny_recipe, *other)
    assert code == 2
    assert "other training shards" in err
