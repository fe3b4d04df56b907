"""Whole runs of SAM2 through the command line: recipes, kills, ranks, passes, evaluations, exports, plans."""

from __future__ import annotations

import csv
import json
import math
import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import yaml
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

pytest.importorskip("sam2")

import object_sets
from tiny_sam2 import LENGTH, SHAPE_ARGUMENTS, SIDE, clips, make, slice_of, without, write_volumes

from data_shards.batch import TripletBatch, collate
from trainer.cli import main
from trainer.models import SAM2
from trainer.models.sam2_tracking import Tracking
from trainer.modules import SAM2Module
from trainer.modules.augmentation import ClipAugmentation
from trainer.modules.optimization import gradient_norm
from trainer.prompts import BoxPrompts, ClickPrompts, GivenMaskPrompts, MixedPrompts, PointPrompts, Prompts
from trainer.restore import restore
from trainer.run import Run

REPOSITORY = Path(__file__).parents[2]
RECIPES = sorted((REPOSITORY / "recipes/sam2").glob("*.yaml"))
SMALL = REPOSITORY / "recipes/overlays/sam2_cpu.yaml"
Command = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two volumes to train on, one to validate, one to test."""
    folder = tmp_path_factory.mktemp("moving")
    for split, volumes in (("train", range(2)), ("val", range(2, 3)), ("test", range(3, 4))):
        write_volumes(folder / split, volumes)
    return folder


def smaller(recipe: Path, shards: Path, path: Path, **trainer: Any) -> list[Any]:
    """Arguments for a recipe's CPU twin on the moving things, still smaller; its run goes beside `path`."""
    data: dict[str, Any] = {split: str(shards / split) for split in ("train", "val", "test")}
    given = yaml.safe_load(recipe.read_text())["data"]["init_args"]
    if "clip_length" in given:  # volumes have 6 slices
        data["clip_length"] = 4 if given.get("clip_step", 1) == 1 else 3
    part = {
        "model": {"init_args": {"model": {"init_args": {"image_size": SIDE}}}},
        "data": {"init_args": data},
        "trainer": {
            **{"default_root_dir": str(path.with_suffix("")), "accelerator": "cpu", "log_every_n_steps": 1},
            **{"max_steps": 2, "val_check_interval": 1, "check_val_every_n_epoch": None, **trainer},
        },
        "checkpoint": {"every_n_steps": 1},
    }
    path.write_text(yaml.safe_dump(part))
    small = [] if recipe.stem == "tiny" else ["-c", SMALL]  # which is of that size itself
    return ["-c", recipe, *small, "-c", path]


def rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def content(shards: Path, root: Path, **module: Any) -> dict[str, Any]:
    """A recipe for the smallest SAM2 on clips of four slices."""
    return {
        "seed_everything": 0,
        "model": {
            "class_path": "trainer.modules.SAM2Module",
            "init_args": {
                "model": {
                    "class_path": "trainer.models.SAM2",
                    "init_args": {"variant": SHAPE_ARGUMENTS, "image_size": SIDE, "weights": None},
                },
                "lr": 1.0e-3,
                **module,
            },
        },
        "data": {
            "class_path": "data_shards.datamodule.TripletDataModule",
            "init_args": {
                **{split: str(shards / split) for split in ("train", "val", "test")},
                **{"batch_size": 2, "micro_batch_size": 1, "clip_length": 4},
            },
        },
        "trainer": {"default_root_dir": str(root), "max_steps": 2, "log_every_n_steps": 1, "accelerator": "cpu"},
        "checkpoint": {"every_n_steps": 1},
    }


def write(made: dict[str, Any], path: Path) -> Path:
    path.write_text("# Does it run?\n" + yaml.safe_dump(made))
    return path


def tensors(node: Any, key: str = "") -> dict[str, Tensor]:
    """Every tensor of a checkpoint, by its place."""
    if isinstance(node, Tensor):
        return {key: node}
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list | tuple) else ()
    return {place: tensor for name, child in items for place, tensor in tensors(child, f"{key}/{name}").items()}


# --- (a) recipes


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipes_cpu_twin_trains_and_is_evaluated(
    recipe: Path, shards: Path, tmp_path: Path, trainer_command: Command
) -> None:
    files = smaller(recipe, shards, tmp_path / "run.yaml")
    code, _, error = trainer_command("fit", *files)
    assert code == 0, error
    run = tmp_path / "run"
    losses = [float(row["loss"]) for row in rows(run / "trace.csv")]
    assert len(losses) == 2 and all(math.isfinite(loss) and loss > 0 for loss in losses)
    first = 1 if recipe.stem == "tiny" else 0  # of the others, the untouched model is validated too
    assert {int(row["step"]) for row in rows(run / "validation.csv")} == set(range(first, 3))
    last = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    moments = [state["exp_avg_sq"] for state in last["optimizer_states"][0]["state"].values()]
    assert sum(bool(moment.any()) for moment in moments) > 0.8 * len(moments) > 20, "nearly all that learns has moved"
    kept = "last" if recipe.stem == "tiny" else "best"
    code, _, error = trainer_command("test", *files, "--ckpt_path", kept)
    assert code == 0, error
    record = json.loads((run / "evaluation/tuned/evaluation.json").read_text())
    assert record["targets"] == len(rows(run / "evaluation/tuned/per_case.csv")) > 3
    assert record["prompts"].get("memory", "none") == ("none" if recipe.stem == "flare22_tiny" else "RecentMemory")


# --- (b) killed and resumed

EVERYTHING = {
    "prompts": {
        "class_path": "trainer.prompts.ClickPrompts",
        "init_args": {
            "start": {
                "class_path": "trainer.prompts.MixedPrompts",
                "init_args": {
                    "prompters": [
                        {"class_path": f"trainer.prompts.{kind}Prompts"} for kind in ("GivenMask", "SAM2Box", "Point")
                    ],
                    "weights": [0.4, 0.3, 0.3],
                    "eval_prompter": 1,
                },
            },
            "corrections": 2,
            "blank": 0,
        },
    },
    "corrected_frames": 3,
    "augmentation": {"class_path": "trainer.modules.augmentation.ClipAugmentation", "init_args": {"shift": 0.1}},
    "schedule": "cosine",
}


def fit_and_die(arguments: list[str], passes: int) -> None:
    """`trainer` in a process that is killed when the pass after so many begins."""
    step, done = SAM2Module.training_step, []

    def fatal(self: SAM2Module, batch: TripletBatch, batch_idx: int) -> Tensor:
        if len(done) == passes:
            os.kill(os.getpid(), signal.SIGKILL)
        done.append(batch_idx)
        return step(self, batch, batch_idx)

    SAM2Module.training_step = fatal  # type: ignore[method-assign]
    main(arguments)


def test_a_killed_run_ends_as_one_that_was_not(shards: Path, tmp_path: Path, trainer_command: Command) -> None:
    """In mid-epoch, between two passes of a step, with a step that was done and not saved."""
    recipes = {}
    for name in ("whole", "killed"):
        made = content(shards, tmp_path / name, **EVERYTHING)
        made["model"]["init_args"]["model"]["init_args"] |= {"dropout": 0.1, "drop_path": 0.1}
        made["data"]["init_args"] |= {"clip_anchor": "ends", "targets_per_image": 1}
        made["trainer"] |= {"max_steps": 5}  # 3 steps an epoch
        made["checkpoint"] |= {"every_n_steps": 2, "background": False}  # killed right after a step was saved
        recipes[name] = write(made, tmp_path / f"{name}.yaml")
    assert trainer_command("fit", "-c", recipes["whole"])[0] == 0
    for passes, more in ((3, ()), (4, ("--ckpt_path", "last"))):
        arguments = ["fit", "-c", str(recipes["killed"]), *more]
        process = multiprocessing.get_context("fork").Process(target=fit_and_die, args=(arguments, passes))
        process.start()
        process.join(60)
        assert process.exitcode == -signal.SIGKILL
    code, out, error = trainer_command("fit", "-c", recipes["killed"], "--ckpt_path", "last")
    assert code == 0 and "step 2" in out, error
    found = [torch.load(tmp_path / name / "checkpoints/last.ckpt", weights_only=True) for name in recipes]
    for part in ("state_dict", "optimizer_states", "lr_schedulers"):
        one, two = (tensors(each[part]) for each in found)
        assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one), part
    assert found[0]["global_step"] == found[1]["global_step"] == 5
    steps = [
        {(row["epoch"], row["batch"]): (row["loss"], row["keys"]) for row in rows(tmp_path / name / "trace.csv")}
        for name in recipes
    ]
    assert steps[0] == steps[1] and len(steps[0]) == 10


# --- (c) the show


def random_weights(path: Path) -> Path:
    """SAM2-Tiny with random weights, none of them zero or one, that takes objects to be there; Meta's layout."""
    torch.manual_seed(0)
    model = SAM2("tiny", 128, weights=None)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
        model.sam_mask_decoder.pred_obj_score_head.layers[-1].bias.fill_(5.0)
    torch.save({"model": model.state_dict()}, path)
    return path


@pytest.mark.filterwarnings("ignore:cannot import name")  # without CUDA, holes are not filled
def test_a_resumed_run_of_the_released_tiny_follows_in_metas_predictor(
    shards: Path, tmp_path: Path, trainer_command: Command
) -> None:
    from PIL import Image
    from sam2.build_sam import build_sam2_video_predictor

    weights = random_weights(tmp_path / "w.pt")
    part = {
        "model": {
            "init_args": {
                "model": {"init_args": {"image_size": 128, "weights": str(weights)}},
                "prompts": {"init_args": {"corrections": 1}},
            }
        },
        "data": {
            "init_args": {
                **{split: str(shards / split) for split in ("train", "val", "test")},
                **{"batch_size": 2, "num_workers": 0, "clip_length": 2},
            }
        },
        "trainer": {
            **{"default_root_dir": str(tmp_path / "run"), "precision": "32-true", "strategy": "auto"},
            **{"accelerator": "cpu", "num_sanity_val_steps": 0, "limit_val_batches": 0},
        },
        "checkpoint": {"monitor": None},
    }
    (tmp_path / "part.yaml").write_text(yaml.safe_dump(part))
    files = ["-c", REPOSITORY / "recipes/sam2/medsam2.yaml", "-c", tmp_path / "part.yaml"]
    code, _, error = trainer_command("fit", *files, "--trainer.max_steps=2")
    assert code == 0, error
    code, out, error = trainer_command("fit", *files, "--trainer.max_steps=3", "--ckpt_path", "last")
    assert code == 0 and "step 2" in out, error
    out = tmp_path / "out.pt"
    code, said, error = trainer_command("export", tmp_path / "run", "--to", "sam2", "--out", out, "--samples", 1)
    assert code == 0 and "verified: sam2" in said, error
    predictor = build_sam2_video_predictor(
        "configs/sam2.1/sam2.1_hiera_t.yaml", str(out), device="cpu", hydra_overrides_extra=["++model.image_size=128"]
    )
    (tmp_path / "frames").mkdir()
    for number in range(4):
        picture = np.repeat(slice_of(9, number).image[..., None], 3, axis=2)
        Image.fromarray(picture).save(tmp_path / f"frames/{number}.jpg", quality=95)
    state = predictor.init_state(str(tmp_path / "frames"))
    box = np.array([3.0, 6.0, 30.0, 24.0], dtype=np.float32)
    predictor.add_new_points_or_box(state, frame_idx=0, obj_id=1, box=box)
    theirs = {frame: logits[0, 0] for frame, _, logits in predictor.propagate_in_video(state)}
    module = restore(Run(tmp_path / "run"))
    height, width = slice_of(9, 0).image.shape
    with torch.no_grad():
        features = module.model.encode(state["images"])
        tracking, only = Tracking(module.model, 4), torch.zeros(1, dtype=torch.int64)
        scale = torch.tensor([128 / width, 128 / height]).repeat(2)
        asked = [Prompts(only, boxes=torch.from_numpy(box)[None] * scale)]
        looks = [tracking.ask(0, features.take(only), asked)]
        looks += [tracking.follow(frame, features.take(only + frame)) for frame in range(1, 4)]
    for frame, look in enumerate(looks):
        assert float(look.presence) > 0 and look.best.std() > 0.01
        small = look.best[:, None] if frame else look.best[:, None].clamp(-32, 32)
        ours = torch.nn.functional.interpolate(small, (height, width), mode="bilinear", align_corners=False)[0, 0]
        assert (ours - theirs[frame]).abs().max() < 1e-4
        sure = theirs[frame].abs() > 1e-4
        assert torch.equal((ours > 0)[sure], (theirs[frame] > 0)[sure])


# --- (d) ranks


def learner(**arguments: Any) -> SAM2Module:
    """The smallest SAM2 with all that is drawn."""
    start = MixedPrompts([GivenMaskPrompts(), BoxPrompts(max_shift=3), PointPrompts()], seed=1)
    prompts = ClickPrompts(start=start, corrections=1, blank=0, seed=1)
    made = SAM2Module(make(), **{"prompts": prompts, "corrected_frames": 2, **arguments})
    made.log_dict = lambda *_, **__: None  # type: ignore[method-assign]
    return made.train()


def gradients(made: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in made.named_parameters() if p.grad is not None and p.grad.any()}


def apart(one: dict[str, Tensor], two: dict[str, Tensor]) -> float:
    """Norm of the difference over that of the first."""
    zero = torch.zeros(1)
    difference = [one.get(name, zero) - two.get(name, zero) for name in one.keys() | two.keys()]
    return float(gradient_norm(difference) / gradient_norm(list(one.values())))


class Step(nn.Module):
    """What DDP wraps: its forward pass is a training step."""

    def __init__(self, made: SAM2Module) -> None:
        super().__init__()
        self.made = made

    def forward(self, batch: TripletBatch) -> Tensor:
        return self.made.training_step(batch, 0)


def batches_of(case: str, folder: Path) -> list[TripletBatch]:
    """One for each rank."""
    first, second = (clips(folder, [position], anchor="first") for position in (1, LENGTH))
    later = clips(folder, [LENGTH + 1], anchor="last")  # another anchor is another group
    nothing = without(first, list(range(len(first.masks))))
    return {
        "both": [first, second],
        "anchors": [first, later],
        "skipped": [collate([]), second],
        "no target": [nothing, second],
    }[case]


def rank_main(rank: int, port: int, case: str, folder: str, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    made = learner()
    step = DistributedDataParallel(Step(made), find_unused_parameters=True)
    for _ in range(2):
        made.zero_grad()
        step(batches_of(case, Path(folder))[rank]).backward()
    torch.save(gradients(made), Path(out) / f"rank{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("case", ["both", "anchors", "skipped", "no target"])
def test_a_step_on_two_ranks_is_a_step_on_one(case: str, shards: Path, tmp_path: Path) -> None:
    arguments = (object_sets.free_port(), case, str(shards / "train"), str(tmp_path))
    torch.multiprocessing.start_processes(rank_main, arguments, nprocs=2, start_method="fork")
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    alone = learner()
    batches = batches_of(case, shards / "train")
    for batch in batches:
        if batch.masks:
            (alone.training_step(batch, 0) / 2).backward()
    assert len(gradients(alone)) > 100 and apart(gradients(alone), first) < 1e-5


@pytest.mark.filterwarnings("ignore")
def test_an_evaluation_on_two_ranks_is_that_on_one(shards: Path, tmp_path: Path, trainer_command: Command) -> None:
    """Three clips, so that one rank has a clip that the other one has too."""
    found = {}
    write_volumes(tmp_path / "data/test", range(3, 6))
    for ranks, more in ((1, ()), (2, ("--trainer.devices=2", "--trainer.strategy=ddp_fork"))):
        made = content(shards, tmp_path / str(ranks))
        made["data"]["init_args"] |= {"test": str(tmp_path / "data/test"), "clip_anchor": "middle"}
        code, _, error = trainer_command("test", "-c", write(made, tmp_path / f"{ranks}.yaml"), *more)
        assert code == 0, error
        folder = tmp_path / str(ranks) / "evaluation/untouched"
        found[ranks] = [(folder / name).read_text() for name in ("per_case.csv", "presence.csv", "presence.json")]
    assert found[1] == found[2] and len(found[1][0].splitlines()) > 8


# --- (e) passes


def without_squares(batch: TripletBatch) -> TripletBatch:
    """The second volume has one object, the first two."""
    where = enumerate(zip(batch.terms, batch.image_index.tolist(), strict=True))
    return without(batch, [row for row, (term, image) in where if term == "square" and batch.keys[image] > "v1"])


@pytest.mark.parametrize("augmented", [False, True], ids=["plain", "augmented"])
@pytest.mark.parametrize("anchor", ["first", "middle", "ends"])
def test_a_step_in_two_passes_is_a_step_in_one(anchor: str, augmented: bool, shards: Path) -> None:
    """Clips of different numbers of objects, whose corrected frames differ."""
    augmentation = ClipAugmentation(shift=0.05, seed=2) if augmented else None
    made = learner(augmentation=augmentation)
    for epoch in range(3):
        found = []
        for cut in ([[0, LENGTH]], [[0], [LENGTH]]):
            made.zero_grad()
            for positions in cut:
                batch = without_squares(clips(shards / "train", positions, anchor=anchor))
                (made.loss_of(batch, epoch) / len(cut)).backward()
            found.append(gradients(made))
        assert len(found[0]) > 100 and apart(*found) < 1e-5


def test_the_loader_cuts_a_step_into_passes(shards: Path, tmp_path: Path, trainer_command: Command) -> None:
    """The same clips in a step, and the same loss, summed over its passes."""
    found = []
    for micro in (1, 2):
        made = content(shards, tmp_path / str(micro))
        made["trainer"] |= {"max_steps": 1}
        made["model"]["init_args"]["model"]["init_args"]["dropout"] = 0.0
        made["data"]["init_args"]["micro_batch_size"] = micro
        assert trainer_command("fit", "-c", write(made, tmp_path / f"{micro}.yaml"))[0] == 0
        found.append(rows(tmp_path / str(micro) / "trace.csv"))
    one, two = found
    assert (len(one), len(two)) == (2, 1)
    assert " ".join(row["keys"] for row in one) == two[0]["keys"]
    assert sum(float(row["loss"]) for row in one) / 2 == pytest.approx(float(two[0]["loss"]), rel=1e-5)


# --- (f) evaluations in clips


def expected_rows(length: int, anchor: str) -> tuple[set[tuple[str, str]], set[tuple[str, str]]]:
    """By hand for volume 3: the disc is in all 6 slices, the square in the first three."""
    starts = range(0, LENGTH - length + 1, length)
    there, gone = set(), set()
    for start in starts:
        frames = range(start, start + length)
        place = start + {"first": 0, "last": length - 1, "middle": length // 2}[anchor]
        for term, last in (("disc", LENGTH), ("square", 3)):
            if place < last:
                there |= {(f"v3-{frame}", term) for frame in frames if frame < last and frame != place}
                gone |= {(f"v3-{frame}", term) for frame in frames if frame >= last}
    return there, gone


@pytest.mark.parametrize(("length", "anchor"), [(2, "first"), (3, "first"), (3, "last"), (4, "middle"), (6, "first")])
def test_an_evaluation_scores_each_slice_once_and_no_prompted_one(
    length: int, anchor: str, shards: Path, tmp_path: Path, trainer_command: Command
) -> None:
    made = content(shards, tmp_path / "run")
    made["data"]["init_args"] |= {
        "clip_length": length,
        "clip_anchor": anchor,
        "micro_batch_size": 2,
        "val": str(shards / "test"),
    }
    recipe = write(made, tmp_path / "r.yaml")
    code, _, error = trainer_command("test", "-c", recipe)
    assert code == 0, error
    folder = tmp_path / "run/evaluation/untouched"
    there, gone = expected_rows(length, anchor)
    scored = [(row["key"], row["term"]) for row in rows(folder / "per_case.csv")]
    assert len(scored) == len(set(scored)) and set(scored) == there
    said = [(row["key"], row["term"], row["present"]) for row in rows(folder / "presence.csv")]
    assert len(said) == len(set(said))
    assert {place[:2] for place in said if place[2] == "0"} == gone
    assert {place[:2] for place in said if place[2] == "1"} == there, "what was prompted is no finding"
    code, out, error = trainer_command("validate", "-c", recipe)
    assert code == 0, error
    dsc = [float(row["dsc"]) for row in rows(folder / "per_case.csv")]
    assert any(f"{np.mean(dsc):.4f}"[:5] in line for line in out.splitlines() if "val/dsc " in line)


# --- (g) mixed precision


@pytest.mark.parametrize("memory", [True, False], ids=["clips", "images"])
def test_bf16_mixed_learns_finite_numbers(memory: bool, shards: Path, tmp_path: Path, trainer_command: Command) -> None:
    prompts = EVERYTHING if memory else {}  # a mask that is given teaches nothing of a single image
    made = content(shards, tmp_path / "run", memory=memory, **prompts)
    made["trainer"] |= {"precision": "bf16-mixed", "gradient_clip_val": 0.1, "max_steps": 3}
    made["data"]["init_args"]["clip_length"] = 4 if memory else 1
    code, _, error = trainer_command("fit", "-c", write(made, tmp_path / "r.yaml"))
    assert code == 0, error
    assert all(math.isfinite(float(row["loss"])) for row in rows(tmp_path / "run/trace.csv"))
    last = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
    values = tensors(last["state_dict"])
    assert all(tensor.isfinite().all() for tensor in values.values() if tensor.is_floating_point())
    assert {tensor.dtype for tensor in values.values()} <= {torch.float32}, "weights stay in single precision"
    logged = [row for file in (tmp_path / "run/logs").glob("*/metrics.csv") for row in rows(file)]
    norms = [float(row["train/grad_norm"]) for row in logged if row.get("train/grad_norm")]
    assert len(norms) == 3 and all(0 < norm < math.inf for norm in norms)


# --- (h) plans


@pytest.mark.parametrize("name", ["flare22_tiny", "medsam2"])
def test_a_plan_has_its_table_of_memory(name: str, tmp_path: Path, trainer_command: Command) -> None:
    tiny = tmp_path / "tiny.yaml"
    part: dict[str, Any] = {
        "model": {"init_args": {"model": {"init_args": {"variant": SHAPE_ARGUMENTS, "image_size": SIDE}}}}
    }
    if name != "flare22_tiny":
        part["data"] = {"init_args": {"clip_length": 2}}
        part["model"]["init_args"]["prompts"] = {"init_args": {"corrections": 1}}
    tiny.write_text(yaml.safe_dump(part))
    code, out, error = trainer_command(
        "plan", "-c", REPOSITORY / f"recipes/sam2/{name}.yaml", "-c", SMALL, "-c", tiny, "--json", "-"
    )
    assert (code, error) == (0, ""), error
    plan = json.loads(out)
    assert not plan["notes"], "no table of memory"
    table = {(row["images"], row["prompts"]): row["bytes"] for row in plan["memory_at"]}
    assert table[8, 16] > table[2, 4] > table[1, 1] > plan["memory_bytes"]["total"]
    assert plan["frames"] == (1 if name == "flare22_tiny" else 2)
    assert 0 < plan["learning"] <= plan["parameters"]
