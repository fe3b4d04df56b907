"""`trainer plan` against counts by hand and the real optimiser; it reads no weights and no data."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from trainer.models import weights
from trainer.plan.planned import PlanCLI, step

REPOSITORY = Path(__file__).parents[2]
MEDSAM = REPOSITORY / "recipes/medsam"
TUNING = "model.init_args.tuning.init_args"
Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def plan(trainer_command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Plan without the table of memory, and return what ``--json -`` prints; nothing is read, and nothing written."""

    def no_weights(*_: object) -> None:
        raise AssertionError("weights were read")

    def run(*arguments: object) -> dict[str, Any]:
        code, out, err = trainer_command("plan", *arguments, "--no-memory", "--json", "-")
        assert (code, err) == (0, ""), err
        assert not list(tmp_path.iterdir()), "something was written"
        found: dict[str, Any] = json.loads(out)
        return found

    monkeypatch.setattr(weights, "_load", no_weights)
    monkeypatch.chdir(tmp_path)
    return run


def write(path: Path, content: dict[str, Any]) -> Path:
    path.write_text("# Is it planned?\n" + yaml.safe_dump(content))
    return path


def content_of(recipe: Path) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(recipe.read_text())
    return content


def totals(plan: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """Parameters of each part, all and learning; what was added apart."""
    found: dict[str, tuple[int, int]] = {}
    for group in plan["groups"]:
        name = group["part"] + (" added" if group["added"] else "")
        total, learning = found.get(name, (0, 0))
        learns = group["parameters"] if group["learning_rate"] is not None else 0
        found[name] = (total + group["parameters"], learning + learns)
    return found


def test_medsam_is_counted_as_in_the_paper(plan: Callable[..., dict[str, Any]]) -> None:
    found = plan(MEDSAM / "full.yaml")
    counts = totals(found)
    score_head = 256 * 256 * 2 + 256 * 2 + 256 * 4 + 4  # frozen: the loss is on masks alone
    assert counts["image_encoder"] == (89_670_912, 89_670_912)
    assert counts["mask_decoder"] == (4_058_340, 4_058_340 - score_head)
    assert counts["prompt_encoder"][1] == 0
    assert found["parameters"] == sum(total for total, _ in counts.values())
    assert found["learning"] == 89_670_912 + 4_058_340 - score_head
    assert {(g["learning_rate"], g["weight_decay"]) for g in found["groups"]} == {(1e-4, 0.01), (None, None)}
    assert found["memory_bytes"]["gradients"] == 4 * found["learning"]
    assert found["memory_bytes"]["adamw"] == 8 * found["learning"]
    assert found["memory_bytes"]["weights"] >= 4 * found["parameters"]
    assert found["memory_bytes"]["average"] == 0
    assert found["step"] == {"images": 160, "micro_batch": 4, "devices": None, "passes": 40, "targets_per_image": 1}
    assert found["length"] == {"max_steps": -1, "max_epochs": 100, "max_time": None}


def test_an_overlay_a_cluster_and_a_key_on_the_command_line(plan: Callable[..., dict[str, Any]]) -> None:
    cluster = ("-c", REPOSITORY / "recipes/clusters/a100x20.yaml")
    found = plan(MEDSAM / "full.yaml", *cluster, "--model.init_args.model.init_args.encoder", "vit_h")
    assert found["step"]["devices"] == 20 and found["step"]["passes"] == 1 and found["step"]["micro_batch"] == 8
    assert totals(found)["image_encoder"][0] == 637_026_048, "ViT-H, as segment-anything counts it"
    same = plan("--json=-", "-c", MEDSAM / "full.yaml", *cluster)
    assert same["step"] == found["step"]


def test_layer_decay_has_a_rate_for_each_depth(plan: Callable[..., dict[str, Any]], trainer_command: Command) -> None:
    found = plan(MEDSAM / "layer_decay.yaml")
    rates = {g["depths"][0]: g["learning_rate"] for g in found["groups"] if g["part"] == "image_encoder"}
    assert rates == {depth: pytest.approx(2e-4 * 0.8 ** (13 - depth)) for depth in range(14)}
    assert [g["depths"][0] for g in found["groups"] if g["part"] == "image_encoder"] == sorted([*range(14)] * 2)
    norms_and_biases = 2 * 2 * 768 + 3 * 768 + 768 + 4 * 768 + 768
    block = [g for g in found["groups"] if g["depths"] == [5, 5]]
    assert [(g["weight_decay"], g["parameters"]) for g in block] == [
        (0.01, 7_091_328 - norms_and_biases),
        (0.0, norms_and_biases),
    ]
    code, out, _ = trainer_command("plan", MEDSAM / "layer_decay.yaml", "--no-memory")
    assert code == 0
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert "depth 5 7,091,328 3.36e-05 0.01; 0 for 9,984" in lines
    assert sum(line.startswith("depth ") for line in lines) == 14, "one line for each"
    assert max(map(len, out.splitlines())) <= 130


def test_what_lora_adds_is_told_apart(plan: Callable[..., dict[str, Any]], trainer_command: Command) -> None:
    found = totals(plan(MEDSAM / "lora.yaml"))
    added = 12 * 16 * ((768 + 3 * 768) + (768 + 768) + 2 * (768 + 4 * 768))  # rank 16: qkv, projection, MLP's two
    assert found["image_encoder added"] == (added, added)
    assert found["image_encoder"] == (89_670_912, 0)
    _, out, _ = trainer_command("plan", MEDSAM / "lora.yaml", "--no-memory")
    assert "trainer.tuning.LoRATuning: rank 16, alpha 32" in out
    assert " ".join(["image_encoder, added", f"{added:,}", f"{added:,}", "100.0%"]) in " ".join(out.split())


def test_the_plan_is_what_the_optimiser_gets(
    tiny_recipe: Path, plan: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    content = content_of(tiny_recipe)
    tiny_recipe.unlink()
    content["model"]["init_args"]["tuning"]["init_args"]["rates"] = {"mask_decoder": 0.5}
    recipe = write(tiny_recipe.parent.parent / "rates.yaml", content)
    found = plan(recipe)
    module = PlanCLI(["fit", "-c", str(recipe)]).module
    groups = module.tuning.parameter_groups(module.model, 1e-3, 0.01, "matrices")
    expected = {(g["lr"], g["weight_decay"], sum(p.numel() for p in g["params"])) for g in groups}
    sums: dict[tuple[float, float], int] = {}
    for group in found["groups"]:
        if group["learning_rate"] is not None:
            key = (group["learning_rate"], group["weight_decay"])
            sums[key] = sums.get(key, 0) + group["parameters"]
    assert {(*key, count) for key, count in sums.items()} == expected
    assert any(group["learning_rate"] == pytest.approx(5e-4) for group in found["groups"])


def test_rates_that_depth_does_not_tell_apart_are_named(tiny_recipe: Path, trainer_command: Command) -> None:
    rates = "{mask_decoder: 0.5, mask_decoder.upscale_conv1: 0.25}"
    code, out, err = trainer_command("plan", tiny_recipe, f"--{TUNING}.rates", rates, "--no-memory")
    assert code == 0, err
    decoder = out[out.index("mask_decoder ") :]
    assert "  upscale_conv1.weight and 1 more" in decoder and "0.00025" in decoder and "0.0005" in decoder


def test_clipping_and_an_average_are_told(tiny_recipe: Path, tmp_path: Path, trainer_command: Command) -> None:
    content = content_of(tiny_recipe)
    content["trainer"] |= {"callbacks": [{"class_path": "trainer.callbacks.EMA"}], "gradient_clip_val": 0.1}
    recipe = write(tmp_path / "averaged.yaml", content)
    code, out, err = trainer_command("plan", recipe, "--no-memory", "--json", tmp_path / "plan.json")
    assert code == 0, err
    saved = json.loads((tmp_path / "plan.json").read_text())
    assert saved["memory_bytes"]["average"] == saved["memory_bytes"]["gradients"] > 0
    assert saved["optimizer"]["gradient_clipping"] == "norm 0.1"
    assert "EMA " in out and "gradients clipped to norm 0.1" in out and f"written {tmp_path}/plan.json" in out
    assert "4 images, all targets of each: 2 at once, so 2 passes on one device, fewer on more" in out
    assert "4 steps" in out


def test_a_quantised_plan_says_that_it_is_none(tiny_recipe: Path, tmp_path: Path, trainer_command: Command) -> None:
    content = content_of(tiny_recipe)
    content["model"]["init_args"]["tuning"] = {
        "class_path": "trainer.tuning.LoRATuning",
        "init_args": {"quantize": "4bit"},
    }
    code, out, err = trainer_command("plan", write(tmp_path / "qlora.yaml", content), "--no-memory")
    assert (code, err) == (0, "")
    assert "note: quantize 4bit: planned as if not" in out


@pytest.mark.parametrize(
    ("trainer", "devices", "passes"),
    [
        ({}, None, 16),
        ({"devices": "auto", "num_nodes": 2}, None, 16),
        ({"devices": -1}, None, 16),
        ({"devices": 4}, 4, 4),
        ({"devices": "4", "num_nodes": 2}, 8, 2),
        ({"devices": [0, 3]}, 2, 8),
        ({"devices": "0,1,2,3"}, 4, 4),
    ],
)
def test_devices_as_a_recipe_may_name_them(trainer: dict[str, Any], devices: int | None, passes: int) -> None:
    found = step({"batch_size": 32, "micro_batch_size": 2}, trainer)
    assert (found["devices"], found["passes"]) == (devices, passes)


LORA = ("--model.init_args.tuning", "trainer.tuning.LoRATuning")


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ((*LORA, f"--{TUNING}.targets", "[qkvv]"), "did you mean 'qkv'?"),
        ((*LORA, f"--{TUNING}.rank", 0), "rank is 1 or more, not 0"),
        ((f"--{TUNING}.freeze", '["*"]'), "FullTuning leaves nothing to learn"),
        ((f"--{TUNING}.freeze", "[image_encodr]"), "matches no parameter of LiteMedSAM"),
        ((f"--{TUNING}.layer_dcay", 0.5), "did you mean 'layer_decay'?"),
        (("--trainer.devices", 3), "batch_size 4 is not a multiple of micro_batch_size 2 × 3 rank(s)"),
        (("--data.init_args.micro_batch_size", 3), "batch_size 4 is not a multiple of micro_batch_size 3"),
        (("--data.init_args.negatives_per_image", -1), "negatives_per_image -1 is 0 or more"),
        (("--model.init_args.model.init_args.image_size", 33), "image_size 33"),
        (("--model.init_args.model", "os.system"), "os.system"),
        (("-c", "nowhere.yaml"), "recipe nowhere.yaml: cannot be read"),
        (("--json", "nowhere/plan.json"), "--json nowhere/plan.json: cannot be written there"),
        (("--json",), "--json needs a file, or - to print"),
        (("other.yaml",), "other.yaml"),
    ],
)
def test_mistakes_are_one_line(arguments: Any, what: str, tiny_recipe: Path, trainer_command: Command) -> None:
    code, out, err = trainer_command("plan", tiny_recipe, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("trainer: error: ") and err.count("\n") == 1
    assert what in err
    assert not (tiny_recipe.parent / "run").exists()


def test_mistakes_in_files_name_them(tiny_recipe: Path, tmp_path: Path, trainer_command: Command) -> None:
    overlay = write(tmp_path / "mine.yaml", {"trainer": {"max_stesp": 3}})
    code, _, err = trainer_command("plan", tiny_recipe, "-c", overlay)
    assert (code, err.count("\n")) == (2, 1)
    assert f"recipe {overlay}: unknown key 'trainer.max_stesp'; did you mean 'max_steps'?" in err
    for arguments in ((), ("--trainer.max_steps", 3)):
        code, _, err = trainer_command("plan", *arguments)
        assert (code, err.count("\n")) == (2, 1)
        assert "plan needs a recipe: trainer plan RECIPE" in err


def test_nothing_is_drawn(plan: Callable[..., dict[str, Any]]) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    plan(REPOSITORY / "recipes/quickstart.yaml")
    assert torch.equal(torch.get_rng_state(), before)
