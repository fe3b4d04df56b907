"""Mistakes with SAM2: each one line that names the place, and nothing left behind; and what is small but no mistake."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

pytest.importorskip("sam2")

from test_mistakes import refused
from test_sam2_runs import content, rows, write
from tiny_sam2 import LENGTH, SHAPE_ARGUMENTS, SIZE, make, slice_of, write_volumes

from data_shards.scan import write_index
from data_shards.triplet import Provenance, Target, Triplet
from data_shards.writer import ShardWriter
from trainer.cli import main
from trainer.models import SAM2, LiteMedSAM

Command = Callable[..., tuple[int, str, str]]
Try = Callable[..., tuple[int, str, str]]
MODULE, MODEL, DATA = "model.init_args", "model.init_args.model.init_args", "data.init_args"
"""Dotted keys of a recipe."""
TUNING, PROMPTS = f"{MODULE}.tuning", f"{MODULE}.prompts"
IMAGES = {f"{MODULE}.memory": False, f"{DATA}.clip_length": 1}
"""Changes that make a recipe one of single images."""


def tuning(kind: str, **arguments: Any) -> dict[str, Any]:
    return {"class_path": f"trainer.tuning.{kind}Tuning", "init_args": arguments}


def prompts(kind: str, **arguments: Any) -> dict[str, Any]:
    return {"class_path": f"trainer.prompts.{kind}", "init_args": arguments}


def augmentation(**arguments: Any) -> dict[str, Any]:
    return {f"{MODULE}.augmentation": {"class_path": "trainer.modules.ClipAugmentation", "init_args": arguments}}


def shape(**sizes: Any) -> dict[str, Any]:
    return {**SHAPE_ARGUMENTS, **sizes}


def with_image(triplet: Triplet, change: Callable[[np.ndarray], Any]) -> Triplet:
    image = triplet.image.astype(np.float32)
    change(image)
    return replace(triplet, image=image)


def spoil(value: float) -> Callable[[np.ndarray], Any]:
    return lambda image: image.__setitem__((3, 4), value)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Volumes of six slices, and what is wrong with some."""
    folder = tmp_path_factory.mktemp("mistakes")
    for split, volumes in (("train", range(2)), ("val", range(2, 3)), ("test", range(3, 4))):
        write_volumes(folder / split, volumes)
    whole = [slice_of(0, number) for number in range(LENGTH)]
    pixel = np.zeros(SIZE, np.uint8)
    pixel[20, 21] = 1
    alone = [
        replace(one, key=f"i{n}", provenance=Provenance("plain", f"p{n}", f"i{n}", "CT", "0" * 64))
        for n, one in enumerate(whole)
    ]
    kinds = {
        "plain": alone,
        "nan": [with_image(one, spoil(np.nan) if n == 2 else spoil(90.0)) for n, one in enumerate(whole)],
        "infinite": [with_image(one, spoil(np.inf) if n == 3 else spoil(90.0)) for n, one in enumerate(whole)],
        "pixel": [replace(one, targets=(Target.from_mask(pixel, "dot"),)) for one in whole],
        "vanished": [replace(one, targets=one.targets if n == 0 else ()) for n, one in enumerate(whole)],
        "empty": [replace(one, targets=()) for one in whole],
        "instances": [
            replace(one, targets=tuple(replace(target, kind="instance") for target in one.targets)) for one in whole
        ],
    }
    for name, triplets in kinds.items():
        with ShardWriter(folder / name, 100, 2**24) as writer:
            for triplet in triplets:
                writer.write(triplet.key, triplet.encode())
        write_index(folder / name)
    return folder


@pytest.fixture
def attempt(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trainer_command: Command) -> Iterator[Try]:
    """Run a command on the smallest recipe with keys changed; a value with ``{shards}`` names a folder there."""
    monkeypatch.chdir(tmp_path)

    def run(changed: dict[str, Any], command: str = "fit", *arguments: object) -> tuple[int, str, str]:
        made = content(shards, Path("run"))
        made["trainer"]["num_sanity_val_steps"] = 0
        for key, value in changed.items():
            node, (*path, last) = made, key.split(".")
            for name in path:
                node = node.setdefault(name, {})
            node[last] = value.format(shards=shards) if isinstance(value, str) else value
        return trainer_command(command, "-c", write(made, Path("r.yaml")), *arguments)

    yield run
    if torch.distributed.is_initialized():  # by a strategy that was refused
        torch.distributed.destroy_process_group()


def said(result: tuple[int, str, str]) -> str:
    """The line that refuses; before it stands no more than what the data leave out."""
    code, _, error = result
    *notes, line = error.splitlines()
    assert code == 2 and line.startswith("trainer: error: ") and len(line) < 600, error
    assert all(note.startswith("data.init_args.") for note in notes), error
    return line


# --- in a recipe


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({f"{DATA}.clip_length": 1}, "clip_length 1: a memory learns from clips of 2 or more slices: set it to 4 or 8"),
        ({f"{DATA}.clip_length": 8},
         "no clip of 8 slices whose first has a semantic target: a clip spans 8 slices, and no volume has more than 6"),
        ({f"{DATA}.clip_step": 3}, "a clip spans 10 slices, and no volume has more than 6 in a row: lower clip_length"),
        ({f"{DATA}.train": "{shards}/plain"},
         "train: .*/plain has no clip of 4 .*: no sample has a neighbour: build shards of volumes with `slices:"),
        ({f"{DATA}.val": "{shards}/plain"}, "val: .*/plain has no clip of 4 .*: no sample has a neighbour"),
        ({f"{DATA}.train": "{shards}/empty"}, "empty has no clip of 4 slices whose first has a semantic target$"),
        ({f"{DATA}.train": "{shards}/instances"}, "has no clip of 4 slices whose first has a semantic target$"),
        ({f"{DATA}.train": "{shards}/vanished", f"{DATA}.clip_anchor": "last"}, "whose last has a semantic target$"),
        ({f"{DATA}.train": "{shards}/vanished"}, "1 training samples are fewer than one batch_size of 2"),
        ({f"{MODULE}.memory": False}, "clip_length 4: model.init_args.memory is false, so single images are learnt"),
        ({f"{DATA}.kinds": "instance"}, "kinds instance: clips follow semantic targets"),
        ({**IMAGES, f"{DATA}.kinds": "instance"}, "12 samples have no target, so nothing to prompt with"),
        ({f"{DATA}.negatives_per_image": 1}, "negatives_per_image 1: SAM2 is asked with boxes, points and masks"),
        ({f"{DATA}.evaluated_negatives": 1}, "evaluated_negatives 1: SAM2 is asked with boxes, points and masks"),
        ({f"{DATA}.clip_anchor": "start"}, "key 'clip_anchor': Expected a Literal"),
        ({f"{DATA}.batch_size": 50}, "6 training samples are fewer than one batch_size of 50"),
        ({f"{MODEL}.image_size": 100}, "image_size 100: SAM2 takes a multiple of 32 pixels, such as 512 or 1024"),
        ({f"{MODEL}.image_size": 48}, "image_size 48: SAM2 takes a multiple of 32 pixels"),
        ({f"{MODEL}.image_size": 0}, "image_size 0: SAM2 takes a multiple of 32 pixels"),
        ({f"{MODEL}.variant": "tiney"}, "key 'variant': there is no 'tiney'; did you mean 'tiny'?"),
        ({f"{MODEL}.variant": "base+"}, "key 'variant': there is no 'base\\+'; did you mean 'base_plus'?"),
        ({f"{MODEL}.variant": None}, "variant None: one of tiny, small, base_plus, large, or another shape"),
        ({f"{MODEL}.variant": {"embed_dm": 16}}, "unknown key 'embed_dm'; did you mean 'embed_dim'?"),
        ({f"{MODEL}.variant": shape(stages=[1, 2])},
         "key 'stages': Expected a tuple with 4 elements. Got value: \\[1, 2\\]$"),
        ({f"{MODEL}.variant": shape(num_heads=3)}, "embed_dim is a multiple of num_heads"),
        ({f"{MODEL}.variant": shape(memories=1)}, "memories and pointers are 2 or more"),
        ({f"{MODEL}.variant": shape(global_blocks=[3])}, "global_blocks: 3 is the first block of a stage"),
        ({f"{MODEL}.variant": shape(global_blocks=[9])}, "global_blocks name blocks from 0 to 5"),
        ({f"{MODEL}.variant": shape(width=40)}, "width is a multiple of 32 and of memory_width"),
        ({f"{MODEL}.scaling": "minmax"}, "key 'scaling': Expected a Literal\\['mean_std', 'zscore'\\]"),
        ({f"{MODEL}.memory": False}, "key 'memory': Expected a class_path, .* of a MemoryPolicy"),
        ({f"{MODEL}.memory": {"class_path": "trainer.models.sam2_sorting.SelfSortingMemry"}},
         "there is no class 'trainer.models.sam2_sorting.SelfSortingMemry'"),
        ({f"{MODEL}.dropout": 1}, "dropout is a share in \\[0, 1\\), not 1"),
        ({f"{MODEL}.drop_path": math.nan}, "drop_path is a share in \\[0, 1\\), not nan"),
        ({PROMPTS: prompts("Exemplars")}, "trainer.prompts.Exemplars does not correspond to a subclass of Prompter"),
        ({PROMPTS: prompts("BoxPrompts", max_shft=2)}, "BoxPrompts has no argument 'max_shft'; did you mean"),
        ({f"{MODULE}.wording": {"class_path": "trainer.prompts.Wording"}}, "SAM2Module has no argument 'wording'"),
        ({f"{MODULE}.threshold": 0.5}, "SAM2Module has no argument 'threshold'"),
        ({**IMAGES, PROMPTS: prompts("GivenMaskPrompts")},
         "GivenMaskPrompts: the mask that is given is the answer, and of a single image nothing else is asked"),
        ({**IMAGES, PROMPTS: prompts("MixedPrompts", prompters=[prompts("BoxPrompts"), prompts("GivenMaskPrompts")])},
         "GivenMaskPrompts: the mask that is given is the answer"),
        ({f"{MODULE}.corrected_frames": 0}, "corrected_frames 0: 1 or more"),
        ({f"{MODULE}.corrected_frames": 2}, "corrected_frames 2: BoxPrompts correct nothing: take ClickPrompts"),
        ({f"{MODULE}.loss": {"class_path": "trainer.losses.SetPredictionLoss"}},
         "trainer.losses.SetPredictionLoss does not correspond to a subclass of BestMaskLoss"),
        ({f"{MODULE}.loss": {"class_path": "trainer.losses.BestMaskLoss", "init_args": {"focal": 20}}},
         "BestMaskLoss has no argument 'focal'; did you mean"),
        ({f"{MODULE}.loss": {"class_path": "trainer.losses.BestMaskLoss", "init_args": {"focal_weight": -1}}},
         "BestMaskLoss: focal_weight, dice_weight, iou_weight and presence_weight are 0 or more"),
        ({f"{MODULE}.loss_at": "output"}, "key 'loss_at': Expected a Literal\\['input', 'decoder'\\]"),
        ({f"{MODULE}.model": {"class_path": "trainer.models.LiteMedSAM", "init_args": {"weights": None}}},
         "SAM2Module trains trainer.models.SAM2, not LiteMedSAM: take the module of its family"),
        ({f"{MODULE}.model": {"class_path": "trainer.models.MedSAM", "init_args": {"weights": None}}},
         "SAM2Module trains trainer.models.SAM2, not MedSAM"),
        ({"model.class_path": "trainer.modules.MedSAMModule", f"{DATA}.clip_length": 1},
         "MedSAMModule knows no memory: SAM2 takes trainer.modules.SAM2Module, memory false for images"),
        ({"model.class_path": "trainer.modules.SAM3Module"}, "trainer.models.SAM2 does not correspond to .* SAM3"),
        ({TUNING: tuning("Full", freeze=["memory_atention"])},
         "freeze: pattern 'memory_atention' matches no parameter of SAM2; its parts: image_encoder, mask_downsample"),
        ({TUNING: tuning("Full", freeze=["image_encoder.blocks"])}, "'image_encoder.blocks' matches no parameter"),
        ({TUNING: tuning("Full", freeze=["*"])}, "FullTuning leaves nothing to learn"),
        ({TUNING: tuning("Full", rates={"image_encoder.trunk.possembed*": 4})}, "rates: pattern 'image_encoder.trunk"),
        ({**IMAGES, TUNING: tuning("Full", learning_rates={"memory_encoder": 1e-4})},
         "learning_rates: memory_encoder: FullTuning lets nothing of it learn"),
        ({TUNING: tuning("VisualPrompt", deep=False)}, "those of SAM2 are not all of one width: set deep to true"),
        ({"trainer.strategy": "ddp", "trainer.devices": 1},
         "trainer.strategy: model.mask_downsample.weight learns.*: set it to ddp_find_unused_parameters_true, or"),
        ({"trainer.precision": "bf16-true"}, "precision bf16-true is not supported: take bf16-mixed or 32-true"),
        ({"trainer.max_steps": -1, "trainer.max_epochs": -1, f"{MODULE}.schedule": "cosine"}, "needs to know the end"),
        ({"checkpoint.monitor": "val/dcs"}, "checkpoint.monitor val/dcs: .*did you mean 'val/dsc'?"),
        (augmentation(flip=2), "ClipAugmentation: flip, invert, shift and contrast are in \\[0, 1\\]"),
        (augmentation(shift=math.nan), "ClipAugmentation: flip, invert, shift and contrast are in \\[0, 1\\]"),
        (augmentation(brightness=math.inf), "brightness is 0 or more, not 0.5, 0.0, 0.0, 0.03, inf"),
        (augmentation(degrees=-3), "ClipAugmentation: degrees is in \\[0, 180\\]"),
        (augmentation(shear=95), "shear in \\[0, 90\\)"),
        (augmentation(scale=[2, 1]), "scale is a smaller and a larger factor above 0, not \\(2.0, 1.0\\)"),
        (augmentation(scale=[1, math.inf]), "scale is a smaller and a larger factor above 0"),
        (augmentation(zoom=2), "ClipAugmentation has no argument 'zoom'; known: brightness, contrast, degrees"),
        ({f"{MODULE}.augmentation": True}, "key 'augmentation': Expected a class_path, .* of a ClipAugmentation"),
    ],
)  # fmt: skip
def test_in_a_recipe(changed: dict[str, Any], expected: str, attempt: Try) -> None:
    line = said(attempt(changed))
    assert re.search(expected, line), line
    assert not Path("run").exists(), "nothing is left behind"


@pytest.mark.parametrize(("command", "split"), [("validate", "val"), ("test", "test")])
def test_an_evaluation_without_a_clip(command: str, split: str, attempt: Try) -> None:
    line = said(attempt({f"{DATA}.{split}": "{shards}/plain"}, command))
    assert f"data.init_args.{split}: " in line and "no sample has a neighbour" in line


def test_an_evaluation_with_nothing_to_find(attempt: Try) -> None:
    """What vanishes after the prompted slice cannot be scored."""
    assert "no target was scored" in said(attempt({f"{DATA}.test": "{shards}/vanished"}, "test"))
    changed = {f"{DATA}.val": "{shards}/vanished", "checkpoint.monitor": "val/dsc", "trainer.val_check_interval": 1}
    line = said(attempt({**changed, "trainer.check_val_every_n_epoch": None}))
    assert "checkpoint.monitor val/dsc: not logged here; known: val/false_positives" in line


# --- weights


def test_weights_that_do_not_fit(attempt: Try, tmp_path: Path) -> None:
    own = make().state_dict()
    files: dict[str, Any] = {
        "old": {name: tensor for name, tensor in own.items() if "obj_ptr_tpos" not in name and "no_obj_em" not in name},
        "lost": {name: tensor for name, tensor in own.items() if name != "no_obj_ptr"},
        "more": {**own, "head.weight": torch.zeros(2)},
        "medsam": LiteMedSAM(64, weights=None).state_dict(),
        "nan": {**own, "memory_encoder.out_proj.bias": own["memory_encoder.out_proj.bias"] * math.nan},
    }
    for name, state in files.items():
        torch.save({"model": state}, tmp_path / f"{name}.pt")
    (tmp_path / "text.pt").write_text("no weights")

    def line(name: str, **more: Any) -> str:
        return said(attempt({f"{MODEL}.weights": str(tmp_path / f"{name}.pt"), **more}))

    assert "old.pt: of SAM 2.0, which lacks no_obj_embed_spatial and obj_ptr_tpos_proj: give SAM 2.1's" in line("old")
    assert "lost.pt do not fit SAM2: 1 missing (no_obj_ptr)" in line("lost")
    assert "1 unknown (head.weight)" in line("more")
    assert "medsam.pt: no SAM2: they lack its image encoder's blocks" in line("medsam")
    assert "blocks from width 16, the recipe's 12 from 96" in line("lost", **{f"{MODEL}.variant": "tiny"})
    assert "it is empty, cut off or another kind of file" in line("text")
    assert "nothing.pt: no such file" in line("nothing")
    assert "wrong checksum, SHA-256 is " in line("lost", **{f"{MODEL}.weights_sha256": "0" * 64})
    assert not Path("run").exists()
    at_once = [{"class_path": "trainer.callbacks.StepGuard", "init_args": {"rollback_after": 0}}]
    assert "the loss is nan at step 0 on v" in line("nan", **{"trainer.callbacks": at_once})


def test_a_model_without_a_recipe() -> None:
    from data_shards.errors import UserError

    with pytest.raises(UserError, match="variant tiney: one of tiny, small, base_plus, large, or another shape"):
        SAM2("tiney", 64, weights=None)  # type: ignore[arg-type]


# --- images and targets


@pytest.mark.parametrize("kind", ["nan", "infinite"])
@pytest.mark.parametrize("scaling", ["mean_std", "zscore"])
def test_an_image_without_values_is_never_silent(kind: str, scaling: str, attempt: Try) -> None:
    """A z-score of NaN would be an image of zeros, and an evaluation's mask an empty one."""
    number = {"nan": 2, "infinite": 3}[kind]
    for command, split in (("fit", "train"), ("test", "test"), ("validate", "val"), ("predict", "test")):
        data = {f"{DATA}.val": None, f"{DATA}.{split}": f"{{shards}}/{kind}", f"{MODEL}.scaling": scaling}
        line = said(attempt({**data, "trainer.default_root_dir": command}, command))
        assert f"sample 'v0-{number}': its image holds NaN or infinity: repair it" in line


def test_an_image_without_values_can_be_skipped(attempt: Try) -> None:
    data = {f"{DATA}.on_damage": "skip", f"{DATA}.max_damaged": 1.0, f"{DATA}.test": "{shards}/nan"}
    code, _, error = attempt({**data, f"{DATA}.clip_length": 2}, "test")
    assert code == 0, error
    found = [row["key"] for row in rows(Path("run/evaluation/untouched/per_case.csv"))]
    assert sorted(found) == ["v0-1", "v0-1", "v0-5"], "the clip of slices 2 and 3 is left out"


@pytest.mark.parametrize("memory", [True, False], ids=["clips", "images"])
@pytest.mark.parametrize("loss_at", ["input", "decoder"])
def test_a_target_of_one_pixel_is_learnt(memory: bool, loss_at: str, attempt: Try) -> None:
    start = prompts("SAM2BoxPrompts")
    data = {f"{DATA}.train": "{shards}/pixel", f"{DATA}.val": "{shards}/pixel", f"{DATA}.test": "{shards}/pixel"}
    asked = {PROMPTS: prompts("ClickPrompts", start=start, corrections=2, blank=0), f"{MODULE}.loss_at": loss_at}
    changed = {**data, **asked, **({} if memory else IMAGES)}
    code, _, error = attempt(changed)
    assert code == 0, error
    assert all(math.isfinite(float(row["loss"])) for row in rows(Path("run/trace.csv")))
    code, _, error = attempt(changed, "test", "--ckpt_path", "last")
    assert code == 0, error
    found = rows(Path("run/evaluation/tuned/per_case.csv"))
    assert len(found) == (3 if memory else 6) and {row["area_px"] for row in found} == {"1"}


def test_an_object_in_the_first_slice_alone_teaches_its_absence(attempt: Try) -> None:
    code, _, error = attempt({f"{DATA}.train": "{shards}/vanished", f"{DATA}.val": None, f"{DATA}.batch_size": 1})
    assert code == 0 and "5 of 6 samples do not begin a whole clip" in error
    logged = [row for file in Path("run/logs").glob("*/metrics.csv") for row in rows(file)]
    assert any(float(row["train/presence_loss"]) > 0 for row in logged if row.get("train/presence_loss"))


def test_slices_that_no_clip_takes_are_named(attempt: Try) -> None:
    code, _, error = attempt({}, "test")
    assert code == 0 and "test: 2 of 6 samples have a target and lie in no whole clip: they are not scored" in error
    code, _, error = attempt({f"{DATA}.clip_length": 3, "trainer.default_root_dir": "other"}, "test")
    assert (code, error) == (0, "")


# --- runs


def test_a_run_goes_on_with_its_own_clips_and_changes(attempt: Try) -> None:
    assert attempt({})[0] == 0
    more = ("--ckpt_path", "last", "--trainer.max_steps", "3")
    clicks = prompts("ClickPrompts", corrections=1)
    for changed, key in (
        ({f"{DATA}.clip_length": 3}, f"{DATA}.clip_length: 4"),
        ({f"{DATA}.clip_anchor": "last"}, f"{DATA}.clip_anchor: first"),
        ({f"{MODEL}.image_size": 96}, f"{MODEL}.image_size: 64"),
        ({f"{MODEL}.variant": "tiny"}, f"{MODEL}.variant: .*embed_dim.* now tiny"),
        ({TUNING: tuning("Full", freeze=["image_encoder"])}, f"{TUNING}: None in .*, now trainer.tuning.FullTuning"),
        ({f"{MODEL}.variant": shape(memories=5)}, f"{MODEL}.variant.memories: 7"),
        (augmentation(flip=0.3), f"{MODULE}.augmentation: None in .*, now {{'flip': 0.3, .*…"),
        ({PROMPTS: clicks}, f"{PROMPTS}: None in .*, now trainer.prompts.*ClickPrompts"),
        ({f"{MODEL}.memory": {"class_path": "trainer.models.sam2_sorting.SelfSortingMemory"}},
         f"{MODEL}.memory: None in .*, now trainer.models.sam2_sorting.SelfSortingMemory"),
    ):  # fmt: skip
        line = said(attempt(changed, "fit", *more))
        assert re.search(f"cannot go on with another {key}", line), line
    assert "holds a training at step 2 already" in said(attempt({}))
    line = said(attempt({f"{MODEL}.variant": "tiny"}, "test", "--ckpt_path", "last"))
    assert "is of another model or tuning than the recipe's" in line
    code, out, error = attempt({}, "fit", *more)
    assert code == 0 and "going on from" in out, error


def test_exports_to_what_does_not_fit(attempt: Try, trainer_command: Command) -> None:
    assert attempt({})[0] == 0
    command = ("export", "run", "--out")
    assert "a SAM2 cannot be exported to 'medsam'" in refused(trainer_command(*command, "x.pth", "--to", "medsam"))
    line = refused(trainer_command(*command, "x.pt", "--to", "sam2"))
    assert "a SAM2 with variant.embed_dim 16 cannot be exported to 'sam2': the official configurations" in line
    assert "a file for 'sam2' ends in .pt" in refused(trainer_command(*command, "x.pth", "--to", "sam2"))
    assert not Path("x.pt").exists()


# --- without the package

WITHOUT = """
import sys
sys.modules["sam2"] = None  # as if it were not installed
from trainer.cli import main
for arguments in {commands!r}:
    print(main(arguments), flush=True)
"""


def test_without_the_package_one_line_says_how_to_install_it(shards: Path, tmp_path: Path) -> None:
    made = content(shards, tmp_path / "run")
    recipe = str(write(made, tmp_path / "r.yaml"))
    assert main(["fit", "-c", recipe]) == 0
    recipe = str(write({**made, "trainer": {**made["trainer"], "default_root_dir": "other"}}, tmp_path / "other.yaml"))
    lite = content(shards, tmp_path / "lite")
    lite["model"]["class_path"] = "trainer.modules.MedSAMModule"
    lite["model"]["init_args"]["model"] = {"class_path": "trainer.models.LiteMedSM", "init_args": {"weights": None}}
    lite["data"]["init_args"]["clip_length"] = 1
    misspelt = str(write(lite, tmp_path / "misspelt.yaml"))
    lite["model"]["init_args"]["model"] = {
        "class_path": "trainer.models.LiteMedSAM",
        "init_args": {"weights": None, "image_size": 64},
    }
    lite["trainer"]["max_steps"] = 1
    other = str(write(lite, tmp_path / "lite.yaml"))
    commands = [
        *([command, "-c", recipe] for command in ("fit", "plan", "test")),
        ["export", str(tmp_path / "run"), "--to", "sam2", "--out", str(tmp_path / "x.pt")],
        ["plan", "-c", misspelt],
        ["plan", "-c", other, "--no-memory", "--json", str(tmp_path / "plan.json")],
        ["fit", "--model.help", "trainer.modules.MedSAMModule"],
    ]
    process = subprocess.run(
        [sys.executable, "-c", WITHOUT.format(commands=commands)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    errors = [line for line in process.stderr.splitlines() if line.startswith("trainer: error: ")]
    install = "SAM2 needs the package sam2: SAM2_BUILD_CUDA=0 pip install --no-build-isolation sam2==1.1.0, after torch"
    assert errors[:4] == [f"trainer: error: {install}"] * 4, process.stderr
    assert len(errors) == 5 and "no class 'trainer.models.LiteMedSM'; did you mean 'trainer.models.LiteMed" in errors[4]
    codes = [line for line in process.stdout.splitlines() if line in ("0", "2")]
    assert codes == ["2"] * 5 + ["0"] * 2 and "Traceback" not in process.stderr, process.stderr
    assert not (tmp_path / "other").exists() and yaml.safe_load((tmp_path / "plan.json").read_text())["learning"]
