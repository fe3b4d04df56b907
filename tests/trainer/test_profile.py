"""`trainer profile` on real steps of tiny recipes: its parts, its figures, what it finds, and what it leaves alone."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from family_runs import FULL, MODULES, node

from data_shards.views import SampleView
from trainer.modules import MedSAMModule

Command = Callable[..., tuple[int, str, str]]
SHORT = ("--steps", 2, "--warmup", 1)


@pytest.fixture
def profiled(trainer_command: Command, tiny_recipe: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Profile the tiny recipe, and return its JSON, read strictly."""

    def run(*arguments: object) -> dict[str, Any]:
        code, out, err = trainer_command("profile", tiny_recipe, *SHORT, "--json", "-", *arguments)
        assert code == 0, err
        assert not (tmp_path / "run").exists(), "the run's own folder was touched"
        found: dict[str, Any] = json.loads(out[out.index("{") :], parse_constant=lambda name: pytest.fail(name))
        return found

    return run


def test_figures_hold_together(profiled: Any, tmp_path: Path) -> None:
    found = profiled("--out", tmp_path / "out")
    assert sum(found["parts_ms"].values()) == pytest.approx(found["parted_step_ms"], rel=1e-6)
    assert {"image encoder", "mask decoder", "loss", "backward", "optimiser"} <= set(found["parts_ms"])
    assert found["parts_ms"]["the rest"] < 0.2 * found["parted_step_ms"]
    # two images a pass, two passes, one target each
    assert (found["images"], found["prompts_per_image"], found["settings"]["passes"]) == (4, 1, 2)
    assert found["images_per_second"] == pytest.approx(4000 / found["step_ms"])
    assert found["tflops"] == pytest.approx(1000 * found["model_tflop_per_step"] / found["step_ms"])
    assert found["mfu"] == pytest.approx(found["tflops"] / found["device"]["matmul_tflops"]["fp32"])
    assert found["loader_images_per_second"] > 0
    assert found["graph_breaks"] and all(row["breaks"] == 0 for row in found["graph_breaks"]), found["graph_breaks"]
    # StepGuard's is known, and there is no other
    assert [Path(row["place"].partition(":")[0]).name for row in found["waits"]] == ["guard.py"]
    assert len(found["kernels"]) == 10 and sum(row["share"] for row in found["kernels"]) <= 1
    assert json.loads((tmp_path / "out/profile.json").read_text())["step_ms"] == found["step_ms"]
    assert any(event.get("name") == "image encoder" for event in _events(tmp_path / "out/trace.json"))


def _events(path: Path) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = json.loads(path.read_text())["traceEvents"]
    return events


def test_what_slows_a_step_is_found(profiled: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow loader, a read of the device in the loss, and what torch.compile cannot take in a block."""
    read, losses = SampleView.__getitem__, MedSAMModule._losses

    def slow(self: Any, *given: Any) -> Any:
        time.sleep(0.05)
        return read(self, *given)

    def reading(self: Any, *given: Any) -> Any:
        found = losses(self, *given)
        found["loss"].item()
        return found

    monkeypatch.setattr(SampleView, "__getitem__", slow)
    monkeypatch.setattr(MedSAMModule, "_losses", reading)
    found = profiled()
    line = reading.__code__.co_firstlineno + 2
    assert f"tests/trainer/test_profile.py:{line}" in [row["place"] for row in found["waits"]]
    assert found["data_wait"] > 0.05 and found["parts_ms"]["waiting for data"] > 150  # four images
    changes = [row["change"] for row in found["advice"]]
    assert any("num_workers" in change for change in changes), changes
    assert any(f"test_profile.py:{line}" in change for change in changes), changes


def test_a_graph_break_is_found_with_its_place() -> None:
    from contextlib import nullcontext

    from trainer.profile.breaks import graph_breaks

    class Broken(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = x * 2
            torch._dynamo.graph_break()
            return y + 1

    whole = torch.nn.Linear(4, 4)
    given = (torch.zeros(2, 4),)
    broken, fine = graph_breaks({"broken": (Broken(), given, {}), "fine": (whole, given, {})}, nullcontext())
    assert broken["breaks"] == 1 and "test_profile.py" in broken["reasons"][0]["at"]
    assert fine["breaks"] == 0 and fine["reasons"] == []


@pytest.mark.parametrize("family", ["sam2", "sam3"])
def test_other_families_are_profiled(family: str, tiny_shards: Path, tmp_path: Path, trainer_command: Command) -> None:
    data: dict[str, Any] = {"train": str(tiny_shards / "train"), "batch_size": 2}
    data |= {"clip_length": 2} if family == "sam2" else {}
    content = {
        "seed_everything": 0,
        "model": {
            "class_path": f"trainer.modules.{MODULES[family]}",
            "init_args": {"model": node(family, weights=None), "tuning": FULL},
        },
        "data": {"class_path": "data_shards.datamodule.TripletDataModule", "init_args": data},
        "trainer": {"default_root_dir": str(tmp_path / "run"), "max_steps": 2, "accelerator": "cpu"},
    }
    (tmp_path / "r.yaml").write_text("# Is it profiled?\n" + yaml.safe_dump(content))
    code, _, err = trainer_command("profile", tmp_path / "r.yaml", *SHORT, "--json", tmp_path / "p.json")
    assert code == 0, err
    found = json.loads((tmp_path / "p.json").read_text())
    parts = {"sam2": {"memory of frames", "mask decoder"}, "sam3": {"text encoder", "matching", "mask decoder"}}
    assert {"image encoder", "loss", "backward"} | parts[family] <= set(found["parts_ms"])
    assert found["waits"] is not None and found["mfu"] > 0, found["waits_counted"]


def test_the_page_fits_and_mistakes_are_one_line(trainer_command: Command, tiny_recipe: Path, tmp_path: Path) -> None:
    code, out, err = trainer_command("profile", tiny_recipe, *SHORT, "--trainer.strategy", "ddp")
    assert code == 0, err
    assert max(len(line) for line in out.splitlines()) <= 100
    for title in ("Speed", "Where a step's time goes", "Graph breaks", "What computes most", "What to change"):
        assert title in out
    assert "one device's share" in out  # DDP is not run
    for words, said in (
        ((tmp_path / "none.yaml",), "none.yaml"),
        ((tiny_recipe, "--steps", 0), "--steps 0"),
        ((tiny_recipe, "--model.init_args.lrr", "1"), "lrr"),
        ((tiny_recipe, "--data.init_args.train", tmp_path / "gone"), "gone"),
        ((tiny_recipe, "--data.init_args.batch_size", 100), "batch_size"),
        ((), "needs a recipe"),
    ):
        code, _, err = trainer_command("profile", *words)
        assert code == 2 and err.startswith("trainer: error: ") and err.count("\n") == 1 and said in err, err
