"""`trainer predict --volume` and `--folder` with terms: SAM3 is asked in each slice."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

import nibabel
import numpy as np
import pytest
import torch
import yaml
from official_sam3 import merges
from tiny_sam3 import SHAPE, SIDE

from data_shards.batch import TripletBatch
from trainer.models.sam3 import SAM3
from trainer.modules.sam3 import SAM3Module
from trainer.segment import session
from trainer.segment.loading import Loaded
from trainer.volumes import Instances
from trainer.volumes.scan import open_scan

Command = Callable[..., tuple[int, str, str]]


class Told(SAM3Module):
    """Finds what is as bright as its term says, each column block an instance, whatever else it learnt."""

    origins: ClassVar[list[tuple[str, str, int | None]]] = []

    def instances(self, batch: TripletBatch, terms: Sequence[Sequence[str]]) -> list[Instances]:
        origin = batch.provenances[0]
        self.origins.append((origin.modality, origin.axis, origin.slice_index))
        found = []
        for term in terms[0]:
            image = batch.images[0][0]
            masks, sure = [], []
            for level, confidence in {"dim": ((100, 0.9),), "bright": ((200, 0.8), (220, 0.6))}.get(term, ()):
                mask = image == level
                if mask.any() and confidence >= self.threshold:
                    masks += [mask, mask]  # twice, as a detector may answer
                    sure += [confidence, confidence - 0.05]
            shape = (0, *image.shape)
            found.append(
                Instances(0, term, torch.stack(masks) if masks else torch.zeros(shape) > 0, torch.tensor(sure))
            )
        return found


def picture() -> np.ndarray:
    """Two bright things, one of which ends and comes again, and a dim one: (5, 24, 30)."""
    array = np.full((5, 24, 30), 10, np.uint8)
    array[:, 2:10, 2:10] = 200
    array[0:2, 14:22, 2:10] = array[4, 14:22, 2:10] = 220
    array[1:3, 4:20, 15:25] = 100
    return array


def save(path: Path, array: np.ndarray) -> Path:
    nibabel.save(nibabel.Nifti1Image(array.transpose(2, 1, 0), np.diag([-1.0, -1.0, 2.0, 1.0])), path)
    return path


def load(path: Path) -> np.ndarray:
    return np.asarray(nibabel.load(path).dataobj).transpose(2, 1, 0)


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every recipe has the model that finds what is so bright."""
    torch.manual_seed(0)
    module = Told(SAM3(SHAPE, SIDE, weights=None)).eval()
    module.model._tokenizer = object()  # type: ignore[assignment]  # nothing is read
    loaded = Loaded(module.model, {"class": "SAM3"}, module)
    monkeypatch.setattr(session, "load_recipe", lambda *_: loaded)


def ask(trainer_command: Command, image: Path, out: Path, *more: object) -> str:
    code, said, error = trainer_command(
        "predict", "--volume", image, "--recipe", "r.yaml", "--out", out, "--intensity", "none", *more
    )
    assert code == 0, error
    return said


def test_all_of_a_term_is_one_object(told: None, tmp_path: Path, trainer_command: Command) -> None:
    image, out = save(tmp_path / "i.nii.gz", picture()), tmp_path / "o.nii.gz"
    said = ask(trainer_command, image, out, "--text", "bright", "--text", "dim", "--text", "nothing")
    known = picture()
    np.testing.assert_array_equal(load(out), np.select([known >= 200, known == 100], [1, 2], 0))
    np.testing.assert_array_equal(nibabel.load(out).affine, nibabel.load(image).affine)
    record = json.loads((tmp_path / "o.predict.json").read_text())
    assert record["method"] == "slice-wise, a term's instances united" and record["threshold"] == 0.5
    assert record["prompts"] == [{"text": "bright"}, {"text": "dim"}, {"text": "nothing"}]
    bright, dim, nothing = record["objects"]
    assert bright["mean_confidence"] == 0.8 and dim["slices"] == 2 and nothing["slices"] == 0
    assert "nothing: nothing was found" in said and "mean confidence 0.90" in said
    assert (tmp_path / "o.png").is_file()
    ask(trainer_command, image, tmp_path / "high.nii.gz", "--text", "bright", "--threshold", 0.7)
    np.testing.assert_array_equal(load(tmp_path / "high.nii.gz"), known == 200)
    assert json.loads((tmp_path / "high.predict.json").read_text())["threshold"] == 0.7


def test_instances_are_linked_through_the_slices(told: None, tmp_path: Path, trainer_command: Command) -> None:
    image, out = save(tmp_path / "i.nii.gz", picture()), tmp_path / "o.nii.gz"
    ask(trainer_command, image, out, "--text", "dim", "--text", "bright", "--text", "none", "--instances")
    known, found = picture(), load(out)
    np.testing.assert_array_equal(found == 1, known == 100)
    np.testing.assert_array_equal(found == 2, known == 200)
    np.testing.assert_array_equal(found[:2] == 3, known[:2] == 220)
    np.testing.assert_array_equal(found[4] == 4, known[4] == 220)  # two slices without it: another object
    record = json.loads((tmp_path / "o.predict.json").read_text())
    names = [one["name"] for one in record["objects"]]
    assert names == ["dim 1", "bright 1", "bright 2", "bright 3", "none"]
    assert [one["slices"] for one in record["objects"]] == [2, 5, 2, 1, 0]
    assert record["method"] == "slice-wise, linked by overlap" and record["linking"]["gap"] == 1
    assert json.loads((tmp_path / "o.json").read_text())["labels"][1] == {
        "name": "bright 1", "value": 2, "voxels": 320, "file": "o.nii.gz"
    }  # fmt: skip


def test_some_slices_along_another_axis(told: None, tmp_path: Path, trainer_command: Command) -> None:
    image, out = save(tmp_path / "i.nii.gz", picture()), tmp_path / "o.nii.gz"
    limits = ["--axis", "coronal", "--first", 3, "--last", 6]
    Told.origins.clear()
    ask(trainer_command, image, out, "--text", "bright", "--modality", "MR", *limits)
    assert Told.origins == [("MR", "coronal", number) for number in range(3, 7)]  # what a wording may say
    expected = picture() == 200
    expected[:, :3], expected[:, 7:] = False, False
    np.testing.assert_array_equal(load(out), expected)


def test_a_folder_is_asked_alike_and_goes_on(told: None, tmp_path: Path, trainer_command: Command) -> None:
    scans, out = tmp_path / "scans", tmp_path / "out"
    scans.mkdir()
    save(scans / "a.nii.gz", picture())
    save(scans / "b.nii.gz", picture()[:2])
    command = ["predict", "--folder", scans, "--recipe", "r.yaml", "--intensity", "none", "--out", out]
    terms = ["--text", "bright", "--text", "dim"]
    code, _, error = trainer_command(*command, *terms)
    assert code == 0, error
    ask(trainer_command, scans / "a.nii.gz", tmp_path / "alone.nii.gz", *terms)
    assert (out / "a.nii.gz").read_bytes() == (tmp_path / "alone.nii.gz").read_bytes()
    assert "mean_confidence" in (out / "summary.csv").read_text().splitlines()[0]
    assert "2 of 2 images were there already" in trainer_command(*command, *terms)[1]
    for more in (["--threshold", 0.7], ["--instances"], ["--text", "other"], ["--modality", "CT"]):
        code, _, error = trainer_command(*command, *terms, *more)
        assert code == 2 and "with other prompts (and 1 other image likewise)" in error, more


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """The tiny SAM3 with random weights, and a threshold that all answers reach."""
    arguments: dict[str, Any] = {
        "shape": {**asdict(SHAPE), "global_blocks": list(SHAPE.global_blocks)}, "image_size": SIDE, "weights": None,
        "tokenizer": merges(),
    }  # fmt: skip
    model = {"class_path": "trainer.models.SAM3", "init_args": arguments}
    module = {"class_path": "trainer.modules.SAM3Module", "init_args": {"model": model, "threshold": 0.0}}
    path = tmp_path / "sam3.yaml"
    path.write_text("# Does it run?\n" + yaml.safe_dump({"seed_everything": 3, "model": module}))
    return path


def test_a_real_sam3_of_tiny_size(recipe: Path, tmp_path: Path, trainer_command: Command) -> None:
    from trainer.prompts.concepts import ConceptPrompts
    from trainer.segment.loading import load_recipe

    image, out = save(tmp_path / "i.nii.gz", picture()[1:3]), tmp_path / "o.npz"
    code, _, error = trainer_command(
        "predict", "--volume", image, "--recipe", recipe, "--text", "liver", "--text", "portal vein", "--out", out,
        "--separate", "--no-picture", "--intensity", "none",
    )  # fmt: skip
    assert code == 0, error
    model = load_recipe(str(recipe), torch.device("cpu")).model
    with open_scan(image, intensity="none") as scan, torch.no_grad():
        for place, term in enumerate(("liver", "portal vein")):
            with np.load(tmp_path / f"o-{term.replace(' ', '_')}.npz") as arrays:
                found = arrays["gts"]
            for number in range(2):
                features = model.encode(model.preprocessing.images([scan.image(number)], torch.device("cpu")))
                answer = model.detect(features, ConceptPrompts(torch.zeros(1, dtype=torch.int64), [term]))
                masks = model.preprocessing.to_native(answer.masks.of(0, torch.arange(SHAPE.queries)), 24, 30) > 0
                np.testing.assert_array_equal(found[number] > 0, masks.any(dim=0).numpy(), err_msg=f"{place}")
            assert found.any()


class TestMistakes:
    def refused(self, trainer_command: Command, tmp_path: Path, *arguments: object, command: str = "r.yaml") -> str:
        image = save(tmp_path / "i.nii.gz", picture())
        code, _, error = trainer_command(
            "predict", "--volume", image, "--recipe", command, "--out", tmp_path / "o.nii.gz", *arguments
        )
        assert code == 2 and error.count("\n") == 1 and not (tmp_path / "o.nii.gz").exists()
        return error

    def test_each_is_one_line(self, told: None, tmp_path: Path, trainer_command: Command) -> None:
        def refused(*arguments: object) -> str:
            return self.refused(trainer_command, tmp_path, *arguments)

        assert "--text asks in words alone" in refused("--text", "liver", "--box", "1,2,3,4")
        assert "--text: a term is empty" in refused("--text", " ")
        assert "--text liver: is given twice" in refused("--text", "liver", "--text", "liver")
        assert "--threshold 1.5: a confidence is in 0 to 1" in refused("--text", "liver", "--threshold", 1.5)
        assert "belong to --text" in refused("--box", "1,2,3,4", "--instances")
        assert "slices 0 to 9 are asked for" in refused("--text", "liver", "--last", 9)
        assert "SAM3 is asked in words" in refused("--box", "1,2,8,9") and "--text TERM" in refused("--box", "1,2,8,9")

    def test_other_models_have_no_words(self, tmp_path: Path, trainer_command: Command) -> None:
        model = {"class_path": "trainer.models.LiteMedSAM", "init_args": {"weights": None, "image_size": 64}}
        module = {"class_path": "trainer.modules.MedSAMModule", "init_args": {"model": model}}
        path = tmp_path / "lite.yaml"
        path.write_text("# Does it run?\n" + yaml.safe_dump({"model": module}))
        said = self.refused(trainer_command, tmp_path, "--text", "liver", command=str(path))
        assert "only SAM3 understands, not LiteMedSAM" in said
