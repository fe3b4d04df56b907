"""Ablations: cells are expanded, run, skipped, resumed and compared; what fails is said, and the rest stands."""

from __future__ import annotations

import csv
import signal
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from scipy.stats import wilcoxon

from data_shards.datamodule import TripletDataModule
from data_shards.errors import UserError
from tests.conftest import REPOSITORY, tiny_content
from trainer.ablation.cells import Cell, choose, expand, write_recipes
from trainer.ablation.cluster import jobs
from trainer.ablation.results import collect
from trainer.ablation.running import run_cells, standing
from trainer.ablation.spec import load_ablation
from trainer.launch import slurm
from trainer.run import STOPPED, write_json
from trainer.scores import CaseScore, write_scores

SPECS = sorted((REPOSITORY / "recipes/ablations").glob("*.yaml"))
CELLS = {
    "full": None,
    "lora": {"overrides": {"model": {"init_args": {"tuning": {"class_path": "trainer.tuning.LoRATuning"}}}}},
    "untouched": {"tuned": False},
}


@pytest.fixture(scope="module")
def expanded_once(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Cell]]:
    """The cells of the spec as it is without changes, and the folder that they are in."""
    folder = tmp_path_factory.mktemp("expanded")
    return folder / "out", expanded(_write(folder, tiny_shards, {}), folder / "out")


@pytest.fixture
def cells(expanded_once: tuple[Path, list[Cell]], tmp_path: Path) -> list[Cell]:
    """The same in a folder of this test, written."""
    there, once = expanded_once
    here = tmp_path / "out"
    moved = []
    for cell in once:
        root, path = here / cell.root.relative_to(there), here / cell.path.relative_to(there)
        text = cell.text.replace(str(there), str(here))
        moved.append(replace(cell, root=root, path=path, text=text, recipe=yaml.safe_load(text)))
    write_recipes(moved)
    return moved


@pytest.fixture
def write_spec(tiny_shards: Path, tmp_path: Path) -> Callable[..., Path]:
    """Write a spec on the tiny recipe; keys change it, None takes one out."""

    return lambda **keys: _write(tmp_path, tiny_shards, keys)


def _write(folder: Path, shards: Path, keys: dict[str, Any]) -> Path:
    base = folder / "base.yaml"
    base.write_text("# Does it run?\n" + yaml.safe_dump(tiny_content(shards, folder / "elsewhere")))
    spec = {"base": str(base), "budget": {"steps": 3}, "seeds": [0, 1], "cells": CELLS, **keys}
    path = folder / "tiny.yaml"
    content = yaml.safe_dump({name: value for name, value in spec.items() if value is not None}, sort_keys=False)
    path.write_text("# Does LoRA match full fine-tuning?\n# Caveat: of a disc in noise.\n" + content)
    return path


def expanded(spec: Path, out: Path) -> list[Cell]:
    return expand(load_ablation(spec), out)


class Fake:
    """Stands for the processes: leaves what `trainer fit` and `trainer test` leave, with scores of its own."""

    def __init__(self, **scores: float) -> None:
        self.scores, self.calls = scores, []
        self.failing: dict[str, str] = {}
        self.stopping: dict[str, int] = {}

    def __call__(self, cell: Cell, words: Sequence[str]) -> int:
        self.calls.append((cell.key, words[0]))
        log = cell.root.with_name(f"{cell.root.name}.log")
        log.parent.mkdir(parents=True, exist_ok=True)
        if reason := self.failing.get(cell.key):
            log.write_text(f"epoch 0\ntrainer: error: {reason}\n")
            return 2
        if (stop := self.stopping.pop(cell.key, None)) is not None:
            self.checkpoint(cell, 1)
            if stop == signal.SIGINT:
                raise KeyboardInterrupt
            return STOPPED
        if words[0] == "fit":
            assert words == ["fit", "-c", str(cell.path), "--ckpt_path", "last"]
            self.checkpoint(cell, cell.steps or 7)
            write_json(cell.run.stages, {"fit": 2.0})
            write_json(cell.run.record, {"model": {"parameters": 1000, "trainable": 10}, "hardware": "CPU"})
            return 0
        name = "tuned" if cell.tuned else "untouched"
        assert ("--ckpt_path" in words) == cell.tuned
        write_scores(cell.run.evaluation(name) / "per_case.csv", self.table(cell))
        found = {"step": (cell.steps or 7) if cell.tuned else 0, "checkpoint": "last.ckpt" if cell.tuned else None}
        write_json(cell.run.evaluation(name) / "evaluation.json", found)
        return 0

    def checkpoint(self, cell: Cell, step: int) -> None:
        cell.run.checkpoints.mkdir(parents=True, exist_ok=True)
        (cell.run.checkpoints / f"step-{step:06d}.ckpt").write_bytes(b"x" * 100)

    def table(self, cell: Cell) -> list[CaseScore]:
        """Twelve targets of two modalities, the cell's own level plus a wobble of the seed."""
        level = self.scores.get(cell.name, 0.7)
        wobble = np.random.default_rng(cell.seed).normal(0, 0.01, 12)
        return [
            CaseScore(
                f"case{n // 4}-a{n:05d}", 0, "disc", "CT" if n % 2 else "MR", 100, level + n / 100 + w, 0.5, "d", 0.8
            )
            for n, w in enumerate(wobble)
        ]


def test_every_cell_is_a_full_recipe_before_anything_runs(cells):
    assert [cell.key for cell in cells] == ["full/0", "lora/0", "untouched", "full/1", "lora/1"]
    for cell in cells:
        recipe = yaml.safe_load(cell.path.read_text())
        assert recipe["seed_everything"] == cell.seed
        assert recipe["data"]["init_args"]["seed"] is None, "the run's seed orders the data: alike in all cells"
        assert recipe["trainer"]["max_steps"] == 3
        assert recipe["trainer"]["default_root_dir"] == str(cell.root)
        assert f"trainer {'fit' if cell.tuned else 'test'} -c {cell.path}" in cell.path.read_text()
    tunings = {cell.name: cell.recipe["model"]["init_args"]["tuning"]["class_path"] for cell in cells}
    assert tunings == {
        "full": "trainer.tuning.FullTuning",
        "lora": "trainer.tuning.LoRATuning",
        "untouched": "trainer.tuning.FullTuning",
    }
    learning = {cell.name: cell.learning for cell in cells}
    assert 0 == learning["untouched"] < learning["lora"] < learning["full"] <= cells[0].parameters
    data = [{**cell.recipe["data"]} for cell in cells]
    assert all(one == data[0] for one in data)
    assert not any(cell.unmatched for cell in cells)


def test_data_that_differ_are_said(write_spec, tmp_path):
    cells = {"all": None, "one": {"overrides": {"data": {"init_args": {"targets_per_image": 1}}}}}
    one = expanded(write_spec(cells=cells), tmp_path / "out")[1]
    assert one.unmatched == ("targets_per_image 1 (reference: None)",)


def test_hours_are_divided_by_devices(write_spec, tmp_path):
    spec = write_spec(budget={"gpu_hours": 3.5}, overrides={"trainer": {"devices": 2}})
    assert expanded(spec, tmp_path / "out")[0].recipe["trainer"]["max_time"] == "00:01:45:00"


def test_a_rate_that_falls_over_steps_and_a_budget_of_hours_are_warned_of(write_spec, tmp_path, trainer_command):
    falling = {"overrides": {"model": {"init_args": {"schedule": "cosine"}}}}
    spec = write_spec(cells={"full": None, "cosine": falling, "untouched": {"tuned": False}}, budget={"gpu_hours": 1})
    code, _, err = trainer_command("ablate", spec, "--out", tmp_path / "out", "--dry-run")
    assert code == 0
    assert "warning: the learning rate of cosine falls over trainer.max_steps, and 1 GPU-hours may end before" in err
    assert "warning" not in trainer_command("ablate", spec, "--out", tmp_path / "out", "--dry-run", "--steps", 3)[2]


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"base": None}, "the key 'base' is missing"),
        ({"budgets": {"steps": 3}}, "unknown key 'budgets'; did you mean 'budget'"),
        ({"budget": {"steps": 3, "gpu_hours": 1}}, "budget: give one of steps and gpu_hours"),
        ({"budget": {"steps": 0}}, "budget: steps 0: 1 or more"),
        ({"seeds": [1, 1]}, r"seeds \[1, 1\]"),
        ({"reference": "ful"}, "there is no cell 'ful'; did you mean 'full'"),
        ({"cells": {"a/b": None}}, "'a/b' is the name of a folder too"),
        ({"cells": {"a": {"overlay": []}}}, "cells.a: unknown key 'overlay'; did you mean 'overlays'"),
        (
            {"cells": {"a": {"overrides": {"trainer": {"max_steps": 9}}}}},
            "trainer.max_steps is the same for every cell",
        ),
        (
            {"cells": {"a": {"overrides": {"modle": {"lr": 1}}}}},
            "cells.a.overrides: unknown key 'modle.lr'; did you mean 'model'",
        ),
        ({"cells": {"a": {"overlays": ["none.yaml"]}}}, "recipe none.yaml: cannot be read"),
        ({"overrides": {"data": {"init_args": {"test": "nowhere"}}}}, "there is no folder nowhere"),
        (
            {"overrides": {"model": {"init_args": {"tuning": {"class_path": "os.system"}}}}},
            "outside the allowed packages",
        ),
    ],
)
def test_mistakes_are_one_line_that_names_the_spec(write_spec, tmp_path, keys, said):
    spec = write_spec(**keys)
    with pytest.raises(UserError, match=said) as error:
        expanded(spec, tmp_path / "out")
    assert str(spec) in str(error.value)
    assert not (tmp_path / "out").exists()


def test_cells_are_run_once_and_go_on(cells):
    fake, lines = Fake(), []
    fake.stopping["lora/0"] = signal.SIGINT
    with pytest.raises(KeyboardInterrupt):
        run_cells(cells, fake, lines.append)
    states = [standing(cell).state for cell in cells]
    assert states == ["finished", "begun", "waiting", "waiting", "waiting"]
    before = list(fake.calls)
    assert run_cells(cells, fake, lines.append) == 0
    assert {standing(cell).state for cell in cells} == {"finished"}
    rest = fake.calls[len(before) :]
    assert rest == [
        *(("lora/0", "fit"), ("lora/0", "test"), ("untouched", "test")),
        *((key, stage) for key in ("full/1", "lora/1") for stage in ("fit", "test")),
    ]
    assert any("lora, seed 0: goes on" in line for line in lines)
    assert run_cells(cells, fake, lines.append) == 0
    assert len(fake.calls) == len(before) + len(rest), "nothing is done twice"


def test_sigterm_ends_with_its_code(cells):
    fake = Fake()
    fake.stopping["full/0"] = signal.SIGTERM
    with pytest.raises(SystemExit) as stopped:
        run_cells(cells, fake, print)
    assert stopped.value.code == STOPPED
    assert fake.calls == [("full/0", "fit")]


def test_a_cell_that_is_trained_and_not_scored_is_scored(cells):
    Fake()(cells[0], ["fit", "-c", str(cells[0].path), "--ckpt_path", "last"])
    assert standing(cells[0]).state == "trained"
    fake = Fake()
    run_cells(cells[:1], fake, print)
    assert fake.calls == [("full/0", "test")]


def test_scores_of_an_earlier_step_do_not_count(cells):
    run_cells(cells[:1], Fake(), print)
    write_json(cells[0].run.evaluation("tuned") / "evaluation.json", {"step": 1, "checkpoint": "last.ckpt"})
    assert standing(cells[0]).state == "trained"


def test_a_failed_cell_is_said_with_its_reason_and_the_rest_stands(cells):
    fake, lines = Fake(), []
    fake.failing["lora/0"] = "out of memory: lower micro_batch_size"
    assert run_cells(cells, fake, lines.append) == 1
    assert standing(cells[1]).state == "failed"
    assert [standing(cell).state for cell in cells if cell is not cells[1]] == ["finished"] * 4
    results = collect(cells, "full")
    assert [one.cell.key for one in results.unfinished] == ["lora/0"]
    assert "out of memory: lower micro_batch_size" in results.unfinished[0].standing.reason
    assert results.entry("lora", "dsc").seeds == 1
    fake.failing.clear()
    assert run_cells(cells, fake, lines.append) == 0, "the same command tries it again"
    assert not collect(cells, "full").unfinished


def test_what_another_recipe_made_is_not_taken(cells):
    run_cells(cells[:1], Fake(), print)
    write_recipes(cells)  # the same again
    changed = [
        replace(cell, recipe=yaml.safe_load(cell.text.replace("max_steps: 3", "max_steps: 5"))) for cell in cells
    ]
    with pytest.raises(UserError, match=r"full, seed 0 was made with trainer\.max_steps 3, and the spec now says 5"):
        write_recipes(changed)
    write_recipes(changed[1:])  # of those nothing was made yet


def test_cells_are_chosen_by_name_and_seed(cells):
    assert [cell.key for cell in choose(cells, ["lora", "full/1"])] == ["lora/0", "full/1", "lora/1"]
    with pytest.raises(UserError, match=r"--only lara: there is no such cell; did you mean 'lora'"):
        choose(cells, ["lara"])


def test_figures_are_those_of_the_scores(cells):
    """Recomputed with NumPy and SciPy from the scores themselves."""
    fake = Fake(full=0.7, lora=0.75, untouched=0.3)
    run_cells(cells, fake, print)
    results = collect(cells, "full")
    by_cell = {cell.key: np.array([one.dsc for one in fake.table(cell)]) for cell in cells}
    lora, full = ((by_cell[f"{name}/0"] + by_cell[f"{name}/1"]) / 2 for name in ("lora", "full"))
    entry = results.entry("lora", "dsc")
    assert (entry.n, entry.volumes, entry.seeds, entry.pairs) == (12, 3, 2, 12)
    assert (entry.q1, entry.median, entry.q3) == pytest.approx(tuple(np.percentile(lora, [25, 50, 75])), abs=2e-6)
    assert entry.difference == pytest.approx((lora - full).mean(), abs=2e-6)
    ours = wilcoxon(lora - full).pvalue
    assert entry.p == pytest.approx(ours, rel=1e-6)
    # two cells are compared by two metrics; of NSD, alike in all, there is nothing to test
    theirs = wilcoxon(by_cell["untouched"] - full).pvalue
    assert entry.p_holm == pytest.approx(2 * min(ours, theirs), rel=1e-6)
    assert results.groups("modality") == ["CT", "MR"]
    assert results.groups("dataset") == [], "one data set is all of them"
    assert results.entry("lora", "dsc", "modality", "CT").n == 6
    assert results.entry("full", "dsc").difference is None


def test_the_command_writes_every_table(write_spec, tmp_path, trainer_command, monkeypatch):
    fake = Fake(full=0.7, lora=0.75, untouched=0.3)
    monkeypatch.setattr("trainer.ablation.running.start_process", fake)
    out = tmp_path / "out"
    code, printed, err = trainer_command("ablate", write_spec(), "--out", out, "--dry-run")
    assert (code, err) == (0, "")
    assert "lora" in printed
    assert not out.exists()
    fake.failing["lora/1"] = "no luck & 5 % <b>"
    code, printed, err = trainer_command("ablate", write_spec(), "--out", out)
    assert code == 1
    assert "lora, seed 1: FAILED in fit: no luck" in printed
    markdown, latex, page = ((out / f"results.{kind}").read_text() for kind in ("md", "tex", "html"))
    for text in (markdown, latex, page):
        assert "untouched" in text
    assert "lora, seed 1: FAILED in fit: no luck & 5 % <b> (exit code 2)" in markdown
    assert "no luck &amp; 5 % &lt;b&gt;" in page
    assert "<b>lora</b>" in page
    assert "of a disc in noise" in page
    assert page.count("<svg") == 5, "score against what learns, differences of DSC and NSD, boxes of CT and of MR"
    assert latex.count("\\toprule") == latex.count("\\bottomrule") == 4  # all, modalities by two metrics, seeds
    rows = list(csv.DictReader((out / "results.csv").open()))
    assert {row["cell"] for row in rows} == {"full", "lora", "untouched"}
    lora = next(row for row in rows if (row["cell"], row["kind"], row["metric"]) == ("lora", "all", "dsc"))
    assert float(lora["p"]) < 0.01
    assert (lora["learning"], lora["parameters"], lora["checkpoint_bytes"]) == ("10", "1000", "100")
    runs = list(csv.DictReader((out / "runs.csv").open()))
    assert [row["state"] for row in runs] == ["finished", "finished", "finished", "failed", "finished"]
    calls = len(fake.calls)
    assert trainer_command("ablate", write_spec(), "--out", out, "--report")[0] == 0
    assert len(fake.calls) == calls, "--report runs nothing"


@pytest.mark.parametrize("spec", SPECS, ids=lambda path: path.stem)
def test_recipes_of_ablations_expand(spec, tiny_shards, tmp_path, monkeypatch):
    """By the real parser, with the data of somebody: every cell is made, and something learns."""
    monkeypatch.chdir(REPOSITORY)
    folders = {
        split: str(tiny_shards / name) for split, name in (("train", "train"), ("val", "test"), ("test", "test"))
    }
    data = tmp_path / "data.yaml"
    data.write_text(yaml.safe_dump({"data": {"init_args": folders}}))
    loaded = load_ablation(spec)
    assert loaded.question.endswith(("?", "."))
    assert f"Launch: trainer ablate recipes/ablations/{spec.name}" in loaded.text
    cells = expand(loaded, tmp_path / "out", [str(data)])
    assert len(cells) >= 8
    assert all((cell.learning > 0) == cell.tuned for cell in cells)
    assert all(cell.recipe["data"]["init_args"]["train"] == folders["train"] for cell in cells)
    different = {yaml.safe_dump({**cell.recipe, "trainer": None}) for cell in cells}
    tuned = [cell for cell in cells if cell.tuned]
    assert len(different) >= len(tuned), "no two cells are the same"
    specialists = {cell.name for cell in cells if cell.specialist}
    assert specialists == ({"unet"} if spec.stem == "peft_vs_full" else set())
    if specialists:
        unet, full = (next(cell for cell in cells if cell.name == name) for name in ("unet", "full"))
        assert unet.recipe["model"]["init_args"]["model"]["class_path"] == "trainer.models.BoxUNet"
        assert unet.learning == unet.parameters == 1_979_297 and not unet.unmatched
        assert unet.recipe["data"] == full.recipe["data"], "the same images in the same order"
        assert unet.recipe["model"]["init_args"]["prompts"] == full.recipe["model"]["init_args"]["prompts"]


def test_smaller_sets_lie_in_larger_ones(tiny_shards):
    def order(count: int | None, seed: int = 0) -> set[int]:
        data = TripletDataModule(train=str(tiny_shards / "train"), batch_size=1, seed=seed, train_samples=count)
        data.setup("fit")
        return set(data._train_order()(seed, 0)[0].tolist())

    assert len(order(4)) == 4
    assert order(4) < order(7) < order(None)
    assert order(4) == order(4, seed=3), "the same images for every seed"
    with pytest.raises(UserError, match=r"train_samples 99: .* has 12 to draw from"):
        order(99)


@pytest.fixture
def cluster(tmp_path: Path) -> Path:
    path = tmp_path / "cluster.yaml"
    path.write_text("trainer: {devices: 2, accelerator: cpu}\ncluster: {kind: slurm, gpu: null, hours: 1}\n")
    return path


def test_cells_become_arrays(write_spec, cluster, tmp_path):
    """One array trains, and each task of the other scores what the task of its number has trained."""
    loaded, out = load_ablation(write_spec(seeds=[0])), tmp_path / "out"
    cells = expand(loaded, out, [str(cluster)])
    write_recipes(cells)
    ((fit, score), (rest,)) = jobs(cells, loaded, str(cluster))
    trained = [cell for cell in cells if cell.tuned]
    assert [task.root for task in fit.tasks] == [cell.root.absolute() for cell in trained]
    assert [task.arguments[2] for task in score.tasks] == [str(cell.path) for cell in trained]
    assert all("--ckpt_path" in task.arguments for task in score.tasks)
    assert "#SBATCH --dependency=aftercorr:77" in slurm.script(score, after="77")
    assert "#SBATCH --array=1-2" in slurm.script(fit)
    assert [task.arguments[:2] for task in rest.tasks] == [("test", "-c")]
    run_cells(cells, Fake(), print)
    assert jobs(cells, loaded, str(cluster)) == [], "what is finished is not submitted again"


@pytest.mark.parametrize("kind", ["local", "kubernetes"])
def test_arrays_need_slurm(write_spec, cluster, tmp_path, kind):
    given = "kind: kubernetes, image: x, volumes: []" if kind == "kubernetes" else "kind: local"
    cluster.write_text(f"cluster: {{{given}}}\n")
    with pytest.raises(UserError, match=r"leave --cluster out|no arrays|volumes|image"):
        jobs([], load_ablation(write_spec()), str(cluster))


def test_a_real_ablation_runs(write_spec, tmp_path, trainer_command):
    """Two cells with real processes: trained, scored, and compared; the second time nothing is left to do."""
    cells = {"full": None, "lora": CELLS["lora"]}
    spec, out = write_spec(cells=cells, seeds=[0], budget={"steps": 2}), tmp_path / "out"
    code, _, err = trainer_command("ablate", spec, "--out", out)
    assert code == 0, err
    rows = {row["cell"]: row for row in csv.DictReader((out / "runs.csv").open())}
    assert {row["state"] for row in rows.values()} == {"finished"}
    assert int(rows["lora"]["learning"]) < int(rows["full"]["learning"])
    for row in rows.values():
        assert float(row["peak_memory_gib"]) > 0.1
        assert float(row["images_per_second"]) > 0
        assert int(row["checkpoint_bytes"]) > 1e6
    assert (out / "results.html").stat().st_size > 10_000
    code, _, err = trainer_command("ablate", spec, "--out", out)
    assert code == 0
    assert "2 cells of 2 finished before: skipped" in err
