"""What a plan says of a machine: arithmetic by hand, and knobs that do what was said of them."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from data_shards.errors import UserError
from trainer.hardware import GPUS
from trainer.plan.cost import HOST, MFU, PUE, Machine, bill, length, machine_of, speed
from trainer.plan.memory import GIB, MOST_IMAGES, RESERVE, Sharing, most_images, parts, sharing_of
from trainer.plan.options import read_options

Command = Callable[..., tuple[int, str, str]]
REPOSITORY = Path(__file__).parents[2]
FSDP2 = {"class_path": "trainer.distributed.FSDP2", "init_args": {"replicas": 1, "reshard_after_forward": True}}


class Model(nn.Module):
    """Three blocks of 100, 200 and 100 numbers, the middle one frozen, and 10 outside."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(size, 1, bias=False) for size in (100, 200, 100))
        self.head = nn.Linear(10, 1, bias=False)
        self.blocks[1].weight.requires_grad_(False)
        self.register_buffer("mean", torch.zeros(3))

    def block_kinds(self) -> dict[str, list[nn.Module]]:
        return {"encoder": list(self.blocks)}


class Module(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = Model()


def test_parts_by_hand() -> None:
    module: Any = Module()
    alone = parts(module, True, Sharing("alone"), 7)
    assert alone == {
        "weights": 4 * (410 + 3), "gradients": 4 * 210, "adamw": 8 * 210, "average": 4 * 210, "communication": 0,
        "activations": 7,
    }  # fmt: skip
    ddp = parts(module, False, Sharing("ddp", 4), 7)
    assert ddp["communication"] == 4 * 210 and ddp["average"] == 0 and ddp["weights"] == alone["weights"]
    assert parts(module, False, Sharing("ddp", 4, view=True), 7)["communication"] == 0
    cut = parts(module, True, Sharing("fsdp2", 4, 4), 7)
    assert (cut["weights"], cut["gradients"], cut["adamw"], cut["average"]) == (410 + 12, 210, 420, 210)
    # outside of blocks 10 and their gradients; two blocks, a buffer of the largest, twice the gradients of one
    assert cut["communication"] == 4 * (10 + 10 + 200 + 100 + 200 + 2 * 100)
    whole = parts(module, True, Sharing("fsdp2", 4, 4, reshard=False), 7)
    assert whole["communication"] - cut["communication"] == 4 * 100


def test_how_ranks_share_a_model() -> None:
    assert sharing_of({}, 1) == Sharing("alone")
    assert sharing_of({"strategy": "auto"}, 4) == sharing_of({"strategy": "ddp"}, 4) == Sharing("ddp", 4)
    assert sharing_of({"strategy": "ddp_find_unused_parameters_true"}, 2).kind == "ddp"
    view = {"class_path": "lightning.pytorch.strategies.DDPStrategy", "init_args": {"gradient_as_bucket_view": True}}
    assert sharing_of({"strategy": view}, 2) == Sharing("ddp", 2, view=True)
    assert sharing_of({"strategy": FSDP2}, 8) == Sharing("fsdp2", 8, 8)
    copies = {**FSDP2, "init_args": {"replicas": "nodes"}}
    assert sharing_of({"strategy": copies, "num_nodes": 2}, 8).shards == 4
    with pytest.raises(UserError, match="replicas 2 do not divide 7 GPUs"):
        sharing_of({"strategy": copies, "num_nodes": 2}, 7)
    with pytest.raises(UserError, match=r"trainer.strategy deepspeed: .*FSDP2"):
        sharing_of({"strategy": "deepspeed"}, 8)


@pytest.mark.parametrize("room", [0, 99, 100, 450, 1_000, 12_345, 25_600, 10**9])
@pytest.mark.parametrize("own", [1, 8])
def test_the_largest_pass_is_found_by_measuring(room: int, own: int) -> None:
    asked: list[int] = []

    def takes(images: int) -> int:
        asked.append(images)
        return max(60 * images + 40, 100 * images)  # convex, as a pass is

    found = most_images(room, takes, own)
    true = max((n for n in range(MOST_IMAGES + 1) if n == 0 or takes(n) <= room), default=0)
    asked = asked[: -MOST_IMAGES or None]
    assert 0.95 * true <= found <= true and len(asked) <= 12


def test_length_by_hand() -> None:
    assert length({"max_steps": 50, "max_epochs": None}, 4, None, None, 1) == {
        "steps": 50,
        "steps_from": "trainer.max_steps",
    }
    assert length({"max_steps": -1, "max_epochs": 10}, 160, 1_570_263, None, 2)["steps"] == 10 * 9814
    assert length({"max_steps": 30, "max_epochs": 10}, 4, 10, None, 2)["steps"] == 20, "what comes first"
    half = length({"max_epochs": 2, "limit_train_batches": 0.5}, 4, None, 10, 2)
    assert half["steps"] == 10 and "by the shards" in half["steps_from"]
    assert length({"max_epochs": 2, "limit_train_batches": 6}, 4, None, 10, 2)["steps"] == 6
    assert length({}, 4, 40, None, 1)["steps"] == 10_000, "Lightning's thousand epochs"
    unknown = length({"max_epochs": 2}, 4, None, None, 1)
    assert unknown["steps"] is None and "--images N" in unknown["steps_from"]


def test_speed_says_where_it_is_from() -> None:
    machine = Machine(20, 80, GPUS["A100-80GB"])
    assert speed(7.0, None, None, machine, 1e12)["images_per_second"] == 7.0
    assert speed(None, (3.0, "as runs/x"), None, machine, 1e12)["rate_from"] == "as runs/x"
    guess = speed(None, None, None, machine, 2.92e12)
    assert guess["images_per_second"] == pytest.approx(MFU * 20 * 312 / 2.92) and guess["mfu"] == MFU
    assert "assumed, not measured" in guess["rate_from"] and "20 × 312 TFLOP/s, 2.92 TFLOP" in guess["rate_from"]
    given = speed(None, None, 0.5, machine, 2.92e12)
    assert given["images_per_second"] == pytest.approx(2 * guess["images_per_second"])
    assert "given by --mfu" in given["rate_from"]
    assert "--gpu NAME" in speed(None, None, None, Machine(2), 1e12)["rate_from"]
    assert "--no-memory" in speed(None, None, None, machine, None)["rate_from"]


def test_the_bill_by_hand() -> None:
    machine = Machine(20, 80, GPUS["A100-80GB"], hours=8.0, stop=0.5)
    found = bill(machine, 9_000, 160, 20.0)
    assert found["hours"] == pytest.approx(20) and found["gpu_hours"] == pytest.approx(400)
    assert found["kwh"] == pytest.approx(400 * 0.4 * HOST * PUE) and found["jobs"] == 3  # of 7.5 h
    assert "20 × 400 W" in found["kwh_from"] and f"× {PUE:g} (PUE) × 20.0 h" in found["kwh_from"]
    assert bill(Machine(2), 9_000, 160, 20.0)["kwh"] is None
    assert set(bill(machine, None, 160, 20.0).values()) == {None} == set(bill(machine, 1, 160, None).values())


def test_a_gpu_that_is_not_named_is_the_slowest_of_its_memory() -> None:
    assert machine_of(20, 80, None, "") == Machine(20, 80, GPUS["A100-80GB"], True, said="")
    assert machine_of(1, None, "h200-141gb", "").memory == 141
    assert machine_of(1, 40, "H100-80GB", "").memory == 40, "a part of it"
    assert machine_of(1, 79, None, "").gpu is None


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (("--devices", "0"), "--devices 0: above 0"),
        (("--devices", "four"), "argument --devices: invalid int value: 'four'"),
        (("--memory",), "argument --memory: expected one argument"),
        (("--memory", "-1"), "--memory -1: above 0"),
        (("--mfu", "45"), "--mfu 45: above 0, and at most 1"),
        (("--rate", "3", "--mfu", "0.5"), "--rate and --mfu both say how fast it is"),
        (("--cluster", "x.yaml", "--gpu", "H100-80GB"), "--cluster says what --gpu says"),
        (("--cluster",), "--cluster needs a file"),
    ],
)
def test_options_that_are_refused(arguments: tuple[str, ...], what: str) -> None:
    with pytest.raises(UserError, match=re.escape(what)):
        read_options(["recipe.yaml", *arguments])


def test_options_and_the_recipes_own_words(tmp_path: Path) -> None:
    cluster = tmp_path / "cluster.yaml"
    cluster.write_text(
        "trainer: {num_nodes: 2, devices: 4}\ncluster: {kind: slurm, gpu: H100-80GB, hours: 8, signal_seconds: 360}\n"
    )
    words = ["r.yaml", "--cluster", str(cluster), "--trainer.max_steps", "3", "--images=70", "-c", "o.yaml"]
    options = read_options(words)
    assert options.words == ["-c", "r.yaml", "-c", str(cluster), "--trainer.max_steps", "3", "-c", "o.yaml"]
    assert options.given["images"] == 70
    machine = options.machine(8)
    assert machine == Machine(8, 80, GPUS["H100-80GB"], False, 8.0, 0.1, True, str(cluster))
    assert read_options(["-c", str(cluster)]).machine(8) == machine, "an overlay like others"
    assert read_options(["r.yaml"]).machine(4) is None


@pytest.fixture
def large(tiny_recipe: Path) -> tuple[Any, ...]:
    """A recipe whose activations are most of its memory: four images of 256 px a pass."""
    keys = {
        "data.init_args.batch_size": 16,
        "data.init_args.micro_batch_size": 4,
        "data.init_args.targets_per_image": 1,
    }
    keys |= {"model.init_args.model.init_args.image_size": 256}
    return (tiny_recipe, *(word for name, value in keys.items() for word in (f"--{name}", value)))


def test_a_run_is_reckoned(large: tuple[Any, ...], trainer_command: Command, tmp_path: Path) -> None:
    machine = ("--devices", 2, "--gpu", "A100-80GB", "--rate", 8)
    code, out, err = trainer_command("plan", *large, *machine, "--json", tmp_path / "plan.json")
    assert (code, err) == (0, "")
    plan = json.loads((tmp_path / "plan.json").read_text())
    held = plan["memory_parts"]
    assert held["fits"] and held["sharing"] == "ddp" and held["usable"] == int(72 * GIB)
    assert held["total"] == sum(held["parts"].values())
    cell = next(cell for cell in plan["memory_at"] if (cell["images"], cell["prompts"]) == (4, 1))
    buckets = held["parts"]["communication"]
    assert held["total"] == cell["bytes"] + buckets and buckets == held["parts"]["gradients"]
    assert held["largest"] >= 8 == held["largest_dividing"] and "--data.init_args.micro_batch_size 8" in out
    assert plan["run"]["steps"] == 4 and plan["run"]["hours"] == pytest.approx(4 * 16 / 8 / 3600)
    assert plan["flops"]["model"] < plan["flops"]["hardware"] < 1.1 * plan["flops"]["model"]
    assert "2 × A100-80GB (--devices --gpu)" in out and "given by --rate" in out and "kWh at most" in out
    assert max(map(len, out.splitlines())) <= 170


def test_a_checkpoint_is_as_large_as_was_said(
    tiny_recipe: Path, tiny_run: Path, trainer_command: Command, tmp_path: Path
) -> None:
    code, _, err = trainer_command(
        "plan", tiny_recipe, "--no-memory", "--like", tiny_run, "--json", tmp_path / "p.json"
    )
    assert (code, err) == (0, "")
    plan = json.loads((tmp_path / "p.json").read_text())
    real = (tiny_run / "checkpoints/last.ckpt").resolve().stat().st_size
    assert plan["checkpoint"]["bytes"] == pytest.approx(real, rel=0.05) and plan["checkpoint"]["kept"] == 2
    assert plan["run"]["images_per_second"] > 0 and str(tiny_run) in plan["run"]["rate_from"]
    assert plan["memory_parts"] is None and plan["flops"] is None


@pytest.mark.parametrize(("share", "knob"), [(0.6, "micro_batch_size 2"), (0.2, "recompute.yaml")])
def test_the_knob_that_is_named_makes_it_fit(
    share: float, knob: str, large: tuple[Any, ...], trainer_command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(REPOSITORY)
    code, out, _ = trainer_command("plan", *large, "--json", "-")
    held = json.loads(out)["memory_parts"]["parts"]
    room = sum(held.values()) - (1 - share) * held["activations"]
    memory = ("--memory", f"{room / 0.9 / GIB:.4f}")
    code, out, err = trainer_command("plan", *large, *memory)
    assert code == 2 and err.count("\n") == 1 and "DOES NOT FIT" in out
    found = re.search(r"do not fit a GPU of .* are usable: with (.*) it takes ([\d.]+ [GM]iB)$", err.strip())
    assert found and knob in found[1]
    code, out, err = trainer_command("plan", *large, *memory, *shlex.split(found[1]))
    assert (code, err) == (0, "") and f"peak       {found[2]} a GPU" in out


def test_what_nothing_makes_fit(large: tuple[Any, ...], trainer_command: Command) -> None:
    code, _, err = trainer_command("plan", *large, "--devices", 4, "--memory", 0.01)
    assert code == 2 and err.count("\n") == 1
    found = re.search(r"nothing makes it fit; the least is [\d.]+ MiB, with (.*): take larger GPUs", err)
    assert found and ("FSDP2" in found[1] or "fsdp2.yaml" in found[1]), err


def test_what_recomputing_to_fit_will_do_is_planned(
    large: tuple[Any, ...], trainer_command: Command, tmp_path: Path
) -> None:
    """As many blocks as the training itself chooses; the knob that computes all twice is not offered besides."""
    overlay = tmp_path / "fit.yaml"

    def write(memory: float) -> None:
        callback = {"class_path": "trainer.callbacks.RecomputeToFit", "init_args": {"memory_gib": memory}}
        overlay.write_text(yaml.safe_dump({"trainer": {"callbacks": [callback]}}))

    write(1.0)
    plan = ("plan", *large, "-c", overlay)
    code, out, _ = trainer_command(*plan, "--json", "-")
    assert code == 0 and json.loads(out)["memory_parts"]["recomputed"] is None
    held = json.loads(out)["memory_parts"]["parts"]
    memory = round((sum(held.values()) - 0.2 * held["activations"]) / (1 - RESERVE) / GIB, 4)
    code, out, err = trainer_command(*plan, "--memory", memory, "--devices", 1)
    assert (code, err) == (0, ""), err
    chosen = re.search(r"RecomputeToFit: (\d+) of (\d+) blocks are computed twice", out)
    assert chosen and 0 < int(chosen[1]) < int(chosen[2])
    write(memory)
    step = ("--data.init_args.batch_size", 4)  # there are not 16 images
    code, out, err = trainer_command("fit", "-c", *large, "-c", overlay, "--trainer.max_steps", 1, *step)
    assert code == 0 and chosen[0] in out, err
    code, _, err = trainer_command(*plan, "--memory", 0.05)
    assert code == 2 and err.count("\n") == 1 and "recompute.yaml" not in err and "checkpoint_activations" not in err
