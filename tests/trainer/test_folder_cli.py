"""`trainer predict --folder`, through the command line: geometry, resuming, mistakes."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813  # its users know it by this name
import torch
import yaml
from one_line import message
from PIL import Image
from toy_dicom import write_series

from trainer.cli import main
from trainer.segment import made
from trainer.segment.images import check_names, images_in
from trainer.segment.prompts_file import read_prompts
from trainer.volumes import output

Command = Callable[..., tuple[int, str, str]]

HEAD = "image,slice,x0,y0,x1,y1,name\n"
BOX = "8,6,30,36"
PROMPTS = f"""{HEAD}ct,2,{BOX},left
ct,,4,4,20,20,right
deep/b.nrrd,,{BOX},
photo.png,0,{BOX},thing
a,1,{BOX},left
"""
"""Of every image of `scans`, each called in another way."""


def content() -> np.ndarray:
    """A bright block in noise: (3, 40, 36)."""
    array = np.random.default_rng(0).normal(60, 10, (3, 40, 36))
    array[:, 8:32, 10:28] += 120
    return array.clip(0, 255).astype(np.uint8)


def save_nifti(path: Path) -> Path:
    affine = np.array([[-0.7, 0.1, 0, 12], [-0.1, -0.7, 0, -3], [0, 0, 2.5, 40], [0, 0, 0, 1]])
    nibabel.save(nibabel.Nifti1Image(content().transpose(2, 1, 0), affine), path)
    return path


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A NIfTI file, an NRRD file, a DICOM series, a picture in colours, and what is no image."""
    folder = tmp_path_factory.mktemp("folder") / "scans"
    (folder / "deep").mkdir(parents=True)
    save_nifti(folder / "a.nii.gz")
    image = sitk.GetImageFromArray(content())
    image.SetSpacing((0.5, 0.75, 3.0))
    image.SetOrigin((4, 5, 6))
    image.SetDirection((0, 1, 0, -1, 0, 0, 0, 0, 1))
    sitk.WriteImage(image, str(folder / "deep" / "b.nrrd"), True)
    write_series(folder / "ct", content().astype(np.int16))
    Image.fromarray(np.stack([content()[1]] * 3, axis=-1)).save(folder / "photo.png")
    (folder / "notes.txt").write_text("no image")
    (folder.parent / "prompts.csv").write_text(PROMPTS)
    return folder


def write_recipe(path: Path, seed: int = 0) -> Path:
    model = {"class_path": "trainer.models.LiteMedSAM", "init_args": {"weights": None, "image_size": 64}}
    module = {"class_path": "trainer.modules.MedSAMModule", "init_args": {"model": model}}
    path.write_text("# Does it run?\n" + yaml.safe_dump({"seed_everything": seed, "model": module}))
    return path


@pytest.fixture(scope="module")
def recipe(scans: Path) -> Path:
    return write_recipe(scans.parent / "recipe.yaml")


@pytest.fixture(scope="module")
def masks(scans: Path, recipe: Path) -> Path:
    """What the command makes of `scans`; not to be changed."""
    out = scans.parent / "masks"
    assert main([str(part) for part in command(scans, recipe, out)]) == 0
    return out


def command(scans: Path, recipe: Path, out: Path, prompts: Path | None = None) -> list[object]:
    prompts = prompts or scans.parent / "prompts.csv"
    return ["predict", "--folder", scans, "--recipe", recipe, "--prompts", prompts, "--out", out]


def summary(out: Path) -> list[dict[str, str]]:
    with (out / "summary.csv").open(newline="") as handle:
        return list(csv.DictReader(handle))


def bytes_of(folder: Path) -> dict[str, bytes]:
    """Label maps without a date in them, by name; no hidden file may be left."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert not [path for path in files if path.name.startswith(".") or "tmp" in path.suffix]
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in files
        if path.name.endswith((".nii.gz", ".nrrd", ".png"))
    }


class TestGeometry:
    def test_nifti_lies_on_nifti(self, scans: Path, masks: Path) -> None:
        source, labels = nibabel.load(scans / "a.nii.gz"), nibabel.load(masks / "a.nii.gz")
        np.testing.assert_array_equal(source.affine, labels.affine)
        assert source.shape == labels.shape and np.asarray(labels.dataobj).any()
        assert_same_grid(scans / "a.nii.gz", masks / "a.nii.gz")

    def test_nrrd_lies_on_nrrd_in_its_folder(self, scans: Path, masks: Path) -> None:
        assert_same_grid(scans / "deep" / "b.nrrd", masks / "deep" / "b.nrrd")

    def test_a_picture_gets_a_picture(self, scans: Path, masks: Path) -> None:
        with Image.open(scans / "photo.png") as source, Image.open(masks / "photo.png") as labels:
            assert labels.size == source.size and labels.mode == "L"
            assert {*np.unique(np.asarray(labels)).tolist()} <= {0, 1}

    def test_a_series_gets_segments(self, scans: Path, masks: Path, recipe: Path, trainer_command: Command) -> None:
        highdicom = pytest.importorskip("highdicom")
        pydicom = pytest.importorskip("pydicom")
        out = scans.parent / "alone.npz"
        boxes = [f"--box=2:{BOX}=left", "--box=1:4,4,20,20=right"]
        code, _, error = trainer_command(
            "predict", "--volume", scans / "ct", "--recipe", recipe, *boxes, "--out", out, "--separate", "--no-picture"
        )
        assert code == 0, error
        known = []
        for name in ("left", "right"):
            with np.load(out.with_name(f"alone-{name}.npz")) as arrays:
                known.append(arrays["gts"] > 0)
        series = [pydicom.dcmread(path) for path in sorted((scans / "ct").iterdir())]
        plain = pydicom.dcmread(masks / "ct.dcm")
        assert plain.FrameOfReferenceUID == series[0].FrameOfReferenceUID
        assert plain.StudyInstanceUID == series[0].StudyInstanceUID
        assert [item.SegmentLabel for item in plain.SegmentSequence] == ["left", "right"]
        shared = plain.SharedFunctionalGroupsSequence[0]
        orientation = shared.PlaneOrientationSequence[0].ImageOrientationPatient
        assert list(orientation) == list(series[0].ImageOrientationPatient)
        assert list(shared.PixelMeasuresSequence[0].PixelSpacing) == list(series[0].PixelSpacing)
        frames = plain.pixel_array.reshape(-1, 40, 36)
        places = [list(image.ImagePositionPatient) for image in series]
        seen = np.zeros((2, 3, 40, 36), bool)
        for frame, group in zip(frames, plain.PerFrameFunctionalGroupsSequence, strict=True):
            number = places.index(list(group.PlanePositionSequence[0].ImagePositionPatient))
            seen[group.SegmentIdentificationSequence[0].ReferencedSegmentNumber - 1, number] = frame
        np.testing.assert_array_equal(seen, known)
        assert seen.any(axis=(1, 2, 3)).all()
        segmentation = highdicom.seg.segread(masks / "ct.dcm")
        uids = [image.SOPInstanceUID for image in series]
        pixels = segmentation.get_pixels_by_source_instance(uids, ignore_spatial_locations=False,
                                                            assert_missing_frames_are_empty=True)  # fmt: skip
        np.testing.assert_array_equal(np.moveaxis(pixels, -1, 0), known)

    def test_it_is_what_volume_by_volume_gives(
        self, scans: Path, masks: Path, recipe: Path, tmp_path: Path, trainer_command: Command
    ) -> None:
        for name, where, called in (
            ("a.nii.gz", "1:", "left"), ("deep/b.nrrd", "", "object"), ("photo.png", "", "thing"),
        ):  # fmt: skip
            out = tmp_path / Path(name).name
            code, _, error = trainer_command(
                "predict", "--volume", scans / name, "--recipe", recipe, f"--box={where}{BOX}={called}", "--out", out
            )
            assert code == 0, error
            assert out.read_bytes() == (masks / name).read_bytes(), name
            alone = json.loads(next(tmp_path.glob("*.predict.json")).read_text())
            together = json.loads((masks / f"{name.split('.')[0]}.predict.json").read_text())
            assert alone["objects"] == together["objects"] and alone["prompts"] == together["prompts"]
            (tmp_path / f"{Path(name).name.split('.')[0]}.predict.json").unlink()

    def test_the_summary_has_every_object(self, masks: Path) -> None:
        rows = summary(masks)
        assert [(row["image"], row["object"]) for row in rows] == [
            ("a.nii.gz", "left"), ("ct", "left"), ("ct", "right"), ("deep/b.nrrd", "object"), ("photo.png", "thing"),
        ]  # fmt: skip
        assert {row["status"] for row in rows} == {"done"}
        labels = nibabel.load(masks / "a.nii.gz")
        voxels = int(np.asarray(labels.dataobj).astype(bool).sum())
        size = abs(np.linalg.det(labels.affine[:3, :3]))
        assert int(rows[0]["voxels"]) == voxels
        assert float(rows[0]["ml"]) == pytest.approx(voxels * size / 1000, abs=1e-3)
        assert rows[4]["ml"] == "" and float(rows[0]["seconds"]) > 0
        assert "mean_predicted_iou" in rows[0]


def assert_same_grid(one: Path, other: Path) -> None:
    first, second = sitk.ReadImage(str(one)), sitk.ReadImage(str(other))
    assert first.GetSize() == second.GetSize()
    for read in ("GetOrigin", "GetSpacing", "GetDirection"):
        np.testing.assert_allclose(getattr(first, read)(), getattr(second, read)(), atol=1e-6)


class TestGoingOn:
    def test_what_is_there_is_left_alone(
        self, scans: Path, masks: Path, recipe: Path, tmp_path: Path, trainer_command: Command
    ) -> None:
        out = tmp_path / "masks"
        shutil.copytree(masks, out)
        times = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
        code, said, error = trainer_command(*command(scans, recipe, out))
        assert code == 0, error
        assert "4 of 4 images were there already" in said and "4 images: 0 made, 4 there already" in said
        assert "1 file of it that are no images" in error
        assert all(path.stat().st_mtime_ns == time for path, time in times.items() if path.name != "summary.csv")
        assert summary(out) == summary(masks)
        (out / "a.nii.gz").unlink()
        (out / "deep" / "b.predict.json").unlink()
        (out / "deep" / ".b.predict.begun").touch()
        code, said, error = trainer_command(*command(scans, recipe, out))
        assert code == 0 and "2 made, 2 there already" in said, error
        assert bytes_of(out) == bytes_of(masks)

    def test_what_was_made_otherwise_is_not_replaced_unasked(
        self, scans: Path, masks: Path, recipe: Path, tmp_path: Path, trainer_command: Command
    ) -> None:
        out = tmp_path / "masks"
        shutil.copytree(masks, out)

        def refused(*more: object, recipe: Path = recipe, prompts: Path | None = None) -> str:
            code, _, error = trainer_command(*command(scans, recipe, out, prompts), *more)
            assert code == 2 and error.count("\n") == 1 and "give --overwrite, or another --out" in error
            assert bytes_of(out).keys() == bytes_of(masks).keys()
            return error

        other = write_recipe(tmp_path / "other.yaml", seed=1)
        assert "made by another model (and 3 other images likewise)" in refused(recipe=other)
        assert "with other options" in refused("--margin", 2)
        assert "in another format" in refused("--as", "npz")
        moved = tmp_path / "moved.csv"
        moved.write_text(PROMPTS.replace(f"a,1,{BOX}", "a,1,8,6,30,35"))
        error = refused(prompts=moved)
        assert "a.predict.json tells of masks made with other prompts: give" in error
        with (out / "photo.png").open("ab") as file:
            file.write(b"drawn on")
        assert "photo.png was changed since it was made" in refused()
        (out / "photo.predict.json").unlink()
        assert "photo.png is there, and no record" in refused()
        code, said, error = trainer_command(*command(scans, recipe, out), "--overwrite")
        assert code == 0 and "1 made, 3 there already" in said, error
        assert bytes_of(out) == bytes_of(masks)

    @pytest.mark.parametrize("moment", ["before the masks are in place", "before the record is written"])
    def test_killed_and_started_again(
        self, moment: str, scans: Path, masks: Path, recipe: Path, tmp_path: Path, trainer_command: Command
    ) -> None:
        if torch.cuda.is_initialized():
            pytest.skip("the process that is killed is forked, which CUDA does not allow once it is in use")
        out = tmp_path / "masks"
        child = os.fork()
        if child == 0:
            die_at(moment, "b")
            main([str(part) for part in command(scans, recipe, out)])
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        assert (out / "a.predict.json").is_file() and not (out / "deep" / "b.predict.json").exists()
        placed = moment == "before the record is written"
        assert (out / "deep" / "b.nrrd").exists() == placed
        assert any(path.name.startswith(".b.") for path in (out / "deep").iterdir())
        if placed:  # what is there is whole
            assert_same_grid(scans / "deep" / "b.nrrd", out / "deep" / "b.nrrd")
        code, said, error = trainer_command(*command(scans, recipe, out))
        assert code == 0, error
        assert "2 of 4 images were there already" in said and "2 made, 2 there already" in said
        assert bytes_of(out) == bytes_of(masks)
        strip = [{name: text for name, text in row.items() if name != "seconds"} for row in summary(masks)]
        assert [{name: text for name, text in row.items() if name != "seconds"} for row in summary(out)] == strip

    def test_a_volume_that_cannot_be_read_stops_no_other(
        self, scans: Path, masks: Path, recipe: Path, tmp_path: Path, trainer_command: Command
    ) -> None:
        broken, out = tmp_path / "scans", tmp_path / "masks"
        shutil.copytree(scans, broken)
        whole = (broken / "deep" / "b.nrrd").read_bytes()
        (broken / "deep" / "b.nrrd").write_bytes(whole[:200])
        (tmp_path / "prompts.csv").write_text(PROMPTS.replace("photo.png,0,8,6", "photo.png,0,8,-6"))
        code, said, error = trainer_command(*command(broken, recipe, out))
        assert code == 1
        assert "4 images: 2 made, 0 there already, 2 failed" in said
        (first, second) = [line for line in error.splitlines() if line.startswith("trainer: failed: ")]
        assert first.startswith("trainer: failed: deep/b.nrrd: ") and "b.nrrd" in first
        assert "photo.png" in second and "8,-6,30,36 of 'thing' reaches out of the image" in second
        assert "prompts.csv" in second
        rows = {row["image"]: row for row in summary(out)}
        assert rows["deep/b.nrrd"]["status"].startswith("failed: ") and rows["a.nii.gz"]["status"] == "done"
        assert (out / "a.nii.gz").read_bytes() == (masks / "a.nii.gz").read_bytes()
        (broken / "deep" / "b.nrrd").write_bytes(whole)
        (tmp_path / "prompts.csv").write_text(PROMPTS)
        code, said, _ = trainer_command(*command(broken, recipe, out))
        assert code == 0 and "2 made, 2 there already" in said
        assert bytes_of(out) == bytes_of(masks)


def die_at(moment: str, name: str) -> None:
    """Be killed while the masks of an image are written."""
    put_in_place, finish = output.put_in_place, made.Place.finish

    def place(temporary: Path, path: Path) -> None:
        if path.name.startswith(f"{name}.") and moment.endswith("in place"):
            os.kill(os.getpid(), signal.SIGKILL)
        put_in_place(temporary, path)

    def end(self: made.Place, *arguments: object) -> object:
        if Path(self.item.name).name == name:
            os.kill(os.getpid(), signal.SIGKILL)
        return finish(self, *arguments)  # type: ignore[arg-type]

    output.put_in_place, made.Place.finish = place, end  # type: ignore[assignment, method-assign]


class TestMasks:
    def test_each_object_is_shown_where_it_is_largest(
        self, scans: Path, recipe: Path, tmp_path: Path, trainer_command: Command
    ) -> None:
        truth, out = tmp_path / "truth", tmp_path / "masks"
        truth.mkdir()
        labels = np.zeros((3, 40, 36), np.uint8)
        labels[0, 8:20, 10:20] = labels[2, 8:12, 10:28] = 1
        labels[1, 22:31, 5:9], labels[2, 22:31, 5:10], labels[1, 35, 35] = 4, 4, 7
        source = nibabel.load(scans / "a.nii.gz")
        nibabel.save(nibabel.Nifti1Image(labels.transpose(2, 1, 0), source.affine), truth / "a.nii.gz")
        Image.fromarray(np.zeros((40, 36), np.uint8)).save(truth / "photo.png")
        more = ["--masks", truth, "--labels", "1=liver,4", "--out", out, "--as", "nii.gz", "--pictures"]
        code, said, error = trainer_command("predict", "--folder", scans, "--recipe", recipe, *more)
        assert code == 0, error
        record = json.loads((out / "a.predict.json").read_text())
        assert [(one["name"], one["slice"], one["box"]) for one in record["prompts"]] == [
            ("liver", 0, [10, 8, 19, 19]), ("label 4", 2, [5, 22, 9, 30]),
        ]  # fmt: skip
        assert "evaluations only" in record["prompts_from"] and "evaluations only" in said
        assert "left out: no label map: ct, deep/b.nrrd" in error
        assert "left out: its label map has no object that is wanted: photo.png" in error
        assert "4 images: 1 made, 0 there already, 3 left out" in said
        assert [row["status"] for row in summary(out)][2:] == ["left out: no label map"] * 2 + [
            "left out: its label map has no object that is wanted"
        ]
        with Image.open(out / "pictures" / "a.png") as picture:
            assert (255, 176, 0) in {colour for _, colour in picture.getcolors(2**20)}
        nibabel.save(nibabel.Nifti1Image((labels == 1).astype(np.uint8).transpose(2, 1, 0), source.affine),
                     truth / "a.nii.gz")  # fmt: skip
        code, _, error = trainer_command("predict", "--folder", scans, "--recipe", recipe, *more)
        assert code == 2 and "with other prompts" in error


class TestMistakes:
    @pytest.fixture
    def refused(self, scans: Path, recipe: Path, tmp_path: Path, trainer_command: Command) -> Callable[..., str]:
        def run(*arguments: object) -> str:
            code, said, error = trainer_command("predict", "--folder", scans, "--out", tmp_path / "out", *arguments)
            assert code == 2 and not said and error.count("\n") == 1
            assert not (tmp_path / "out").exists()
            return error

        return run

    def test_of_the_command_line(self, refused: Callable[..., str], scans: Path, recipe: Path, tmp_path: Path) -> None:
        model, prompts = ["--recipe", recipe], ["--prompts", scans.parent / "prompts.csv"]
        assert "by one of --prompts FILE.csv, --masks FOLDER and --text TERM" in refused(*model)
        assert "by one of --prompts" in refused(*model, *prompts, "--text", "liver")
        assert "only SAM3 understands, not LiteMedSAM" in refused(*model, "--text", "liver")
        assert "belong to --text" in refused(*model, *prompts, "--threshold", 0.4)
        assert "--labels belongs to --masks" in refused(*model, *prompts, "--labels", "1")
        assert "either --run RUN or --recipe RECIPE" in refused(*prompts)
        assert "is the folder of the images" in refused(*model, *prompts, "--out", scans)
        assert "is no folder" in refused(*model, *prompts, "--folder", tmp_path / "none")
        assert "matches --glob *.mha" in refused(*model, *prompts, "--glob", "*.mha")
        assert "margin -1" in refused(*model, *prompts, "--margin", -1)
        assert "--reader series" in refused(*model, *prompts, "--reader", "series")
        assert "invalid choice: 'nii'" in refused(*model, *prompts, "--as", "nii")
        assert "unexpected '--first'" in refused(*model, *prompts, "--first", 2)
        empty = tmp_path / "empty"
        empty.mkdir()
        assert "no label map has the name of an image, such as a.nii.gz" in refused(*model, "--masks", empty)
        (empty / "a.nrrd").touch()
        (empty / "a.mha").touch()
        assert "the label map of a.nii.gz may be a.mha or a.nrrd" in refused(*model, "--masks", empty)

    @pytest.mark.parametrize(
        ("text", "complaint"),
        [
            (f"{HEAD}c,0,{BOX},x", "line 2: no image of the folder is called 'c'"),
            ("slice,x0,y0,x1,y1\n", "the column 'image' is missing"),
            (f"image,x0,y0,x1\na,{BOX}", "the column 'y1' is missing"),
            (f"image,slice\na,{BOX}", "no column has prompts"),
            (f"image;x0;y0;x1;y1\na,{BOX}", "there is no column 'image;x0;y0;x1;y1'"),
            (f"{HEAD}a,0,{BOX},x,y", "line 2: has more values"),
            (f"{HEAD}\n", "it has no prompt"),
            (f"{HEAD}a,0,,,,,x", "line 2: has no prompt"),
            (f"{HEAD}a,0,1,2,3,,x", "line 2: '' in column y1 is no number"),
            (f"{HEAD}a,0,9,2,3,4,x", "line 2: x1 must be larger"),
            (f"{HEAD}a,top,{BOX},x", "line 2, column slice: 'top' is no slice"),
            (f"{HEAD}a,0,{BOX},x\na,1,{BOX},x", "line 2: 'x' is shown on slices 0 and 1"),
            (f"{HEAD}a,0,{BOX},x\na,0,{BOX},x", "line 2: 'x' has 2 boxes"),
            (f"{HEAD}twin,0,{BOX},x", "line 2: 'twin' may be one/twin.png or two/twin.png"),
            ("image,x,y,label\na,1,2,liver", "line 2: the label 'liver'"),
            ("image,x0,y0,x1,y1,x,y,label\na,1,2,3,4,,,1", "line 2: has a label, but no point"),
            ("image,x,y,first,last\na,1,2,0,1\na,3,4,0,2", "line 3: first and last are others than in line 2"),
            ("image,x,y,first\na,1,2,middle", "line 2, column first: 'middle' is no limit"),
        ],
    )
    def test_of_the_prompts(self, text: str, complaint: str, tmp_path: Path) -> None:
        for name in ("a.png", "one/twin.png", "two/twin.png"):
            path = tmp_path / "images" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.zeros((4, 4), np.uint8)).save(path)
        (tmp_path / "prompts.csv").write_text(text)
        items, _ = images_in(tmp_path / "images")
        said = message(lambda: read_prompts(tmp_path / "prompts.csv", items))
        assert complaint in said and "prompts.csv" in said

    def test_two_images_of_one_name(self, tmp_path: Path) -> None:
        Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / "a.png")
        save_nifti(tmp_path / "a.nii.gz")
        items, _ = images_in(tmp_path)
        assert "a.nii.gz and a.png: the masks of both would be called a" in message(lambda: check_names(items))
        check_names(images_in(tmp_path, "*.png")[0])


class TestImages:
    def test_series_of_one_folder_are_images_of_their_own(self, tmp_path: Path) -> None:
        def number(uid: str, place: int) -> Callable[..., None]:
            def change(dataset: object, _: int) -> None:
                dataset.SeriesInstanceUID, dataset.SeriesNumber = uid, place  # type: ignore[attr-defined]

            return change

        slices = content().astype(np.int16)
        write_series(tmp_path / "ct", slices, ["a1", "a2", "a3"], change=number("1.2.3", 3))
        write_series(tmp_path / "ct", slices[:1], ["b.dcm"], change=number("1.2.4", 4))
        items, others = images_in(tmp_path)
        assert [(item.key, item.name, item.reader) for item in items] == [
            ("ct/b.dcm", "ct/b", {}), ("ct/series-3", "ct/series-3", {"series_uid": "1.2.3"}),
        ]  # fmt: skip
        assert others == 0 and items[1].path == tmp_path / "ct"
        (alone, *_), _ = images_in(tmp_path / "ct", "series-3")
        assert alone.name == "series-3"

    def test_a_folder_that_is_a_series(self, tmp_path: Path) -> None:
        write_series(tmp_path / "ct", content().astype(np.int16))
        (item,), _ = images_in(tmp_path / "ct")
        assert (item.key, item.path, item.suffix) == ("ct", tmp_path / "ct", ".dcm")

    def test_links_are_followed_but_not_in_a_circle(self, tmp_path: Path) -> None:
        write_series(tmp_path / "store" / "ct", content().astype(np.int16))
        save_nifti(tmp_path / "store" / "a.nii.gz")
        (tmp_path / "scans" / "deep").mkdir(parents=True)
        (tmp_path / "scans" / "one.nii.gz").symlink_to(tmp_path / "store" / "a.nii.gz")
        (tmp_path / "scans" / "two").symlink_to(tmp_path / "store" / "ct")
        (tmp_path / "scans" / "deep" / "up").symlink_to(tmp_path / "scans")
        assert [item.key for item in images_in(tmp_path / "scans")[0]] == ["one.nii.gz", "two"]

    def test_what_is_drawn_on_a_series_is_no_image(self, masks: Path) -> None:
        items, others = images_in(masks)
        assert "ct.dcm" not in [item.key for item in items] and others > 0

    def test_hidden_files_and_our_own_pictures_are_none(self, scans: Path, masks: Path, tmp_path: Path) -> None:
        (tmp_path / ".hidden.png").touch()
        shutil.copytree(masks, tmp_path / "masks")
        save_nifti(tmp_path / "a.nii")
        items, _ = images_in(tmp_path, leave=[tmp_path / "masks"])
        assert [item.key for item in items] == ["a.nii"]
        assert "photo.png" not in [Path(item.key).name for item in images_in(tmp_path)[0]]


def test_points_and_limits_reach_the_model(scans: Path, recipe: Path, tmp_path: Path, trainer_command: Command) -> None:
    (tmp_path / "p.csv").write_text("image,slice,x,y,label,first,last\na,1,18,20,,0,1\na,1,3,3,-,0,1\n")
    out = tmp_path / "out"
    code, said, error = trainer_command(*command(scans, recipe, out, tmp_path / "p.csv"), "--as", "png")
    assert code == 0, error
    record = json.loads((out / "a.predict.json").read_text())
    assert record["prompts"][0]["points"] == [[18, 20, 1], [3, 3, 0]] and record["slices"] == {"first": 0, "last": 1}
    assert sorted(path.name for path in (out / "a").iterdir()) == ["00000.png", "00001.png", "00002.png"]
    assert "left out: no prompt: ct, deep/b.nrrd, photo.png" in error and "1 made" in said
    assert "1 of 4 images were there already" in trainer_command(
        *command(scans, recipe, out, tmp_path / "p.csv"), "--as", "png"
    )[1]  # fmt: skip


def test_sam2_answers_on_a_single_picture(scans: Path, tmp_path: Path, trainer_command: Command) -> None:
    pytest.importorskip("sam2")
    from tiny_sam2 import SHAPE_ARGUMENTS
    from tiny_sam2 import SIDE as SIDE_2

    arguments = {"variant": SHAPE_ARGUMENTS, "image_size": SIDE_2, "weights": None}
    model = {"class_path": "trainer.models.SAM2", "init_args": arguments}
    module = {"class_path": "trainer.modules.SAM2Module", "init_args": {"model": model}}
    recipe = tmp_path / "sam2.yaml"
    recipe.write_text("# Does it run?\n" + yaml.safe_dump({"model": module}))
    code, _, error = trainer_command(*command(scans, recipe, tmp_path / "out"), "--glob", "*.png")
    assert code == 2 and "no image of the folder is called 'ct'" in error
    (tmp_path / "p.csv").write_text(f"{HEAD}photo,,{BOX},thing\n")
    code, _, error = trainer_command(*command(scans, recipe, tmp_path / "out", tmp_path / "p.csv"), "--glob", "*.png")
    assert code == 0, error
    record = json.loads((tmp_path / "out" / "photo.predict.json").read_text())
    assert record["method"] == "memory" and record["objects"][0]["name"] == "thing"
    with Image.open(tmp_path / "out" / "photo.png") as labels:
        assert int(np.asarray(labels).sum()) == record["objects"][0]["voxels"]


def test_help_says_what_the_columns_are(trainer_command: Command) -> None:
    code, said, _ = trainer_command("predict", "--folder", "--help")
    assert code == 0 and "x0, y0, x1, y1    a box" in said and "for evaluations only" in said
    assert "--volume" not in said.partition("options:")[2] and "--first" not in said
