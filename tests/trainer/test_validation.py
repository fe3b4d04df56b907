"""What validations leave in a run, against figures that were worked out from the images; and the probe of boxes."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch.loggers import CSVLogger
from PIL import Image
from thresholding import FIRST, LOWERED, Thresholder, fit
from torch import Tensor

from data_shards.batch import Sample, TripletBatch, collate
from data_shards.dataset import ShardDataset
from data_shards.errors import UserError
from data_shards.scan import write_index
from data_shards.triplet import Provenance, Target, Triplet
from data_shards.writer import ShardWriter
from trainer.callbacks import BoxJitterProbe, PredictionRecord, ValidationPanels
from trainer.callbacks.panels import PanelKeeper, panel_of, spread_samples
from trainer.callbacks.probes import probe
from trainer.models import SegmentationModel
from trainer.models.preprocessing import Preprocessing
from trainer.modules.scoring import logged_spreads
from trainer.prompts import Prompts
from trainer.prompts.boxes import push
from trainer.run import Run, read_json
from trainer.scores import CaseScore, read_scores

COUNT = 7
"""Validation samples: odd, so that one is repeated to make two ranks even."""


def triplet(split: str, number: int) -> Triplet:
    """Rows that grow brighter by 10; the truth begins at another row in each. The fourth shows nothing."""
    image = np.repeat(np.arange(0, 250, 10, dtype=np.uint8)[:, None], 20, axis=1)
    masks = [np.zeros(image.shape, np.uint8) for _ in range(1 + (number == 1))]
    for target, mask in enumerate(masks):
        mask[20 - number - 3 * target :, 2:18] = 1
    targets = () if number == 3 else tuple(Target.from_mask(mask, f"term {n}") for n, mask in enumerate(masks))
    modality, spacing = ("CT", (0.5, 0.5)) if number % 2 else ("MR", None)
    origin = Provenance(f"set {number % 3}", f"p{number}", f"v{number}", modality, "0" * 64, spacing=spacing)
    return Triplet(f"{split}-{number}", image, targets, ("term 0", "term 1"), origin)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("thresholds")
    for split, count in (("train", 8), ("val", COUNT)):
        with ShardWriter(root / split, 50, 2**20) as writer:
            for number in range(count):
                sample = triplet(split, number)
                writer.write(sample.key, sample.encode())
        write_index(root / split)
    return root


@pytest.fixture(scope="module")
def whole(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training of four steps, each of them validated; not to be changed."""
    root = tmp_path_factory.mktemp("whole")
    fit(str(shards), str(root), 4, loggers=CSVLogger(root, "logs", flush_logs_every_n_steps=1))
    return root


def dsc_at(step: int, number: int, target: int) -> float:
    """DSC of a target after so many steps, by counting rows."""
    truth = triplet("val", number).targets[target].mask() != 0
    predicted = triplet("val", number).image > FIRST - LOWERED * step
    return 2 * (truth & predicted).sum() / (truth.sum() + predicted.sum())


PLACES = [(0, 0), (1, 0), (1, 1), (2, 0), (4, 0), (5, 0), (6, 0)]
"""(sample, target) in the order of the corpus."""


def rows_of(root: Path) -> list[dict[str, str]]:
    with (root / "validation.csv").open(newline="") as handle:
        return list(csv.DictReader(handle))


def test_every_validation_is_a_row_for_every_group_and_metric(whole: Path) -> None:
    rows = rows_of(whole)
    assert list(rows[0]) == ["step", "epoch", "kind", "group", "metric", "n", "mean", "q1", "median", "q3"]
    assert [int(row["step"]) for row in rows if (row["kind"], row["metric"]) == ("all", "dsc")] == [0, 1, 2, 3, 4]
    groups = {(row["kind"], row["group"]) for row in rows}
    assert groups == {
        ("all", "all"),
        *(("dataset", f"set {n}") for n in range(3)),
        *(("modality", name) for name in ("CT", "MR")),
        *(("term", f"term {n}") for n in range(2)),
        *(("tolerance", name) for name in ("2 mm", "2 px")),
    }
    for step in range(5):
        found = {(row["kind"], row["group"]): row for row in rows if (row["step"], row["metric"]) == (str(step), "dsc")}
        for place, chosen in (
            (("all", "all"), PLACES),
            (("modality", "CT"), [(1, 0), (1, 1), (5, 0)]),
            (("dataset", "set 0"), [(0, 0), (6, 0)]),
            (("term", "term 1"), [(1, 1)]),
        ):
            values = [dsc_at(step, *one) for one in chosen]
            row = found[place]
            assert int(row["n"]) == len(values)
            assert float(row["mean"]) == pytest.approx(np.mean(values), abs=1e-6)
            quartiles = [float(row[name]) for name in ("q1", "median", "q3")]
            assert quartiles == pytest.approx(np.percentile(values, [25, 50, 75]), abs=1e-6)


def test_untouched_and_last_scores_are_kept_by_target(whole: Path) -> None:
    for name, step in (("untouched", 0), ("last", 4)):
        scores = read_scores(whole / "validation" / f"{name}.csv")
        assert [(score.key, score.target) for score in scores] == [(f"val-{n}", t) for n, t in PLACES]
        assert [score.dsc for score in scores] == pytest.approx([dsc_at(step, *place) for place in PLACES], abs=1e-6)
        assert [score.tolerance for score in scores] == [f"2 {'mm' if n % 2 else 'px'}" for n, _ in PLACES]
        assert all(score.nsd is not None and 0 <= score.nsd <= 1 for score in scores)


def logged(root: Path) -> dict[str, list[float]]:
    """Values of every column of a run's logs, in the order of the versions."""
    columns: dict[str, list[float]] = {}
    for path in sorted(root.glob("logs/version_*/metrics.csv")):
        with path.open(newline="") as handle:
            for row in csv.DictReader(handle):
                for name, cell in row.items():
                    if cell:
                        columns.setdefault(name, []).append(float(cell))
    return columns


def test_logs_have_means_medians_groups_and_what_was_lost(whole: Path) -> None:
    columns = logged(whole)
    untouched = np.array([dsc_at(0, *place) for place in PLACES])
    for step in range(1, 5):
        now = np.array([dsc_at(step, *place) for place in PLACES])
        expected = {
            "val/dsc": now.mean(),
            "val/dsc_median": np.median(now),
            "val/dsc/modality/CT": np.mean([dsc_at(step, *place) for place in ((1, 0), (1, 1), (5, 0))]),
            "val/dsc/dataset/set 1": np.mean([dsc_at(step, *place) for place in ((1, 0), (1, 1), (4, 0))]),
            "val/dsc_gain": (now - untouched).mean(),
            "val/targets_worse": (now < untouched - 0.05).mean(),
        }
        for name, value in expected.items():
            assert columns[name][step - 1] == pytest.approx(value, abs=1e-6), (name, step)
    assert len(columns["val/nsd"]) == len(columns["val/iou"]) == 4, "the untouched model's are no part of the curve"
    assert 0 < columns["val/targets_worse"][-1] < 1, "the trial tells targets apart"
    assert not [name for name in columns if "/term/" in name]


def test_groups_are_logged_only_where_there_are_several() -> None:
    scores = [CaseScore("a", 0, "liver", "CT", 9, 0.5, 0.4, "one", 0.6, "2 px"), CaseScore("b", 0, "x", "CT", 9, 1, 1)]
    found = logged_spreads("test", scores)
    assert {name for name in found if name.count("/") > 1} == {
        *("test/dsc/dataset/one", "test/iou/dataset/one", "test/nsd/dataset/one"),
        *("test/dsc/dataset/unknown", "test/iou/dataset/unknown"),
    }
    assert found["test/nsd"] == 0.6, "of those that have it"
    assert logged_spreads("val", []) == {}


def test_a_resumed_training_records_as_an_undisturbed_one(whole: Path, shards: Path, tmp_path: Path) -> None:
    for steps in (2, 4):
        fit(str(shards), str(tmp_path), steps, loggers=CSVLogger(tmp_path, "logs", flush_logs_every_n_steps=1))
    assert (tmp_path / "validation.csv").read_bytes() == (whole / "validation.csv").read_bytes()
    for name in ("untouched", "last"):
        kept = [root / "validation" / f"{name}.csv" for root in (tmp_path, whole)]
        assert kept[0].read_bytes() == kept[1].read_bytes()
    for name in ("val/dsc_gain", "val/targets_worse"):
        assert logged(tmp_path)[name] == pytest.approx(logged(whole)[name], abs=1e-6), "also after the resume"


def test_what_was_not_saved_or_cut_off_is_recorded_once(whole: Path, shards: Path, tmp_path: Path) -> None:
    """As after a kill: validations after the last checkpoint, and the start of a row."""
    fit(str(shards), str(tmp_path), 2)
    table = tmp_path / "validation.csv"
    later = [line for line in (whole / "validation.csv").read_text().splitlines() if line.startswith(("3,", "4,"))]
    with table.open("a") as handle:
        handle.write("\n".join(later).replace("all,all", "stale,stale") + "\n4,1,term,te")
    fit(str(shards), str(tmp_path), 4)
    assert table.read_bytes() == (whole / "validation.csv").read_bytes()


def test_a_training_that_goes_on_at_an_epochs_end_keeps_the_untouched_scores(shards: Path, tmp_path: Path) -> None:
    """Lightning takes the end of an epoch for a start, and would score what has been trained as untouched."""
    by_epochs = {"val_check_interval": 1.0, "max_steps": -1, "check_val_every_n_epoch": 1}
    for root, parts in (("whole", [2]), ("parts", [1, 2, 2])):
        for epochs in parts:
            fit(str(shards), str(tmp_path / root), max_epochs=epochs, **by_epochs)
    assert {row["step"] for row in rows_of(tmp_path / "whole")} == {"0", "2", "4"}
    for name in ("validation.csv", "validation/untouched.csv", "validation/last.csv", "panels/step-000002.png"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_training_that_starts_anew_keeps_nothing_of_another(whole: Path, shards: Path, tmp_path: Path) -> None:
    shutil.copytree(whole / "validation", tmp_path / "validation")
    shutil.copy(whole / "validation.csv", tmp_path)
    fit(str(shards), str(tmp_path), 1, num_sanity_val_steps=0)
    assert {row["step"] for row in rows_of(tmp_path)} == {"1"}
    assert not (tmp_path / "validation" / "untouched.csv").exists()
    fit(str(shards), str(tmp_path / "part"), 1, num_sanity_val_steps=1)
    assert {row["step"] for row in rows_of(tmp_path / "part")} == {"1"}, "a part of the split is no reference"


def test_without_a_validation_split_nothing_is_written(shards: Path, tmp_path: Path) -> None:
    fit(str(shards), str(tmp_path), 1, val=None)
    assert not (tmp_path / "validation.csv").exists() and not (tmp_path / "panels").exists()


def test_two_ranks_record_what_one_does(whole: Path, shards: Path, tmp_path: Path) -> None:
    if torch.cuda.is_initialized():
        pytest.skip("ranks are forked, which CUDA does not allow once it is in use")
    fit(str(shards), str(tmp_path), 4, ranks=2)
    assert (tmp_path / "validation.csv").read_bytes() == (whole / "validation.csv").read_bytes()
    pictures = sorted(path.name for path in (whole / "panels").iterdir())
    assert pictures == [f"step-{step:06d}.png" for step in range(5)]
    for name in pictures:
        assert (tmp_path / "panels" / name).read_bytes() == (whole / "panels" / name).read_bytes()


class Gallery(CSVLogger):
    """A logger that takes images."""

    def __init__(self, root: Path) -> None:
        super().__init__(root, "gallery")
        self.taken: list[tuple[str, int, tuple[int, int]]] = []

    def log_image(self, key: str, images: list[Any], step: int | None = None) -> None:
        self.taken += [(key, step or 0, image.size) for image in images]


def test_loggers_that_take_images_get_the_panels(shards: Path, tmp_path: Path) -> None:
    gallery = Gallery(tmp_path)
    fit(str(shards), str(tmp_path), 2, loggers=[CSVLogger(tmp_path), gallery])
    with Image.open(tmp_path / "panels" / "step-000002.png") as picture:
        assert gallery.taken == [("val/panels", step, picture.size) for step in range(3)]


def batch_of(*numbers: int) -> TripletBatch:
    chosen = [(number, triplet("val", number)) for number in numbers]
    return collate([Sample(number, one, tuple(range(len(one.targets)))) for number, one in chosen])


def test_panels_show_the_same_samples_with_a_target_each_time(shards: Path, tmp_path: Path) -> None:
    trainer = fit(str(shards), str(tmp_path), 1)
    loader = trainer.val_dataloaders
    assert spread_samples(loader, 4, 100) == [0, 1, 2, 4, 5, 6], "the fourth shows nothing"
    assert spread_samples(loader, 4, 3) == [0, 2, 6]
    assert spread_samples(loader, 2, 3) == [0, 1, 2], "of those that two batches of two reach"


def test_panels_take_turns_with_targets_and_draw_the_prompt() -> None:
    batch, module = batch_of(0, 1, 2), Thresholder()
    outputs = module.predict_masks(batch)
    keeper = PanelKeeper([0, 1])
    keeper.keep(batch, outputs)
    first, second = keeper.gathered()
    assert (first.key, first.term) == ("val-0", "term 0")
    assert (second.key, second.term) == ("val-1", "term 1"), "the second sample shows its second target"
    assert first.box.tolist() == [2, 20, 17, 24] and first.points.shape == (0, 3)
    assert np.isnan(second.box).all() and second.points.tolist() == [[3, 4, 1], [0, 0, 0]]
    assert first.dsc == pytest.approx(dsc_at(0, 0, 0))
    assert panel_of(batch, outputs, 0).image.shape == (25, 20)


def test_a_prediction_names_box_and_points_only_where_there_are_any() -> None:
    batch = batch_of(1)
    outputs = Thresholder().predict_masks(batch)
    first, second = (PredictionRecord._line(outputs, batch, q, q) for q in range(2))
    assert first["box"] == [2, 19, 17, 24] and "points" not in first
    assert second["points"] == [[3, 4, 1], [0, 0, 0]] and "box" not in second


class Boxer(SegmentationModel):
    """Fills the box that it is asked with."""

    score_head, patch_embedding = "none", ()

    def __init__(self, side: int) -> None:
        super().__init__()
        self.preprocessing = Preprocessing(image_size=side)
        self.encoded = 0

    def encode(self, images: Tensor) -> Tensor:
        self.encoded += len(images)
        return images

    def decode(self, features: Tensor, prompts: Prompts) -> tuple[Tensor, Tensor]:
        assert prompts.boxes is not None
        side = self.preprocessing.image_size
        places = torch.arange(side)
        x0, y0, x1, y1 = (edge[:, None, None] for edge in prompts.boxes.T)
        across, down = places[None, None], places[None, :, None]
        inside = (across >= x0) & (across <= x1) & (down >= y0) & (down <= y1)
        return (inside.float() * 2 - 1)[:, None], torch.ones(len(prompts), 1)

    @property
    def mask_side(self) -> int:
        return self.preprocessing.image_size

    def at_size(self, image_size: int) -> SegmentationModel:
        return Boxer(image_size)


def test_the_probe_pushes_boxes_and_encodes_an_image_once() -> None:
    """A box of 40 × 40 px in an image of 128: at this input 8 px of 1024 are 1."""
    mask = np.zeros((128, 128), np.uint8)
    mask[30:70, 50:90] = 1
    sample = Triplet("one", mask * 200, (Target.from_mask(mask, "square"),), ("square",), triplet("val", 0).provenance)
    model = Boxer(128)
    shifts = (-400.0, -16.0, 0.0, 8.0, 80.0, 320.0)
    found = probe(model, collate([Sample(5, sample, (0,))]), 0, shifts, torch.device("cpu"))
    assert model.encoded == 1
    area = 40 * 40
    outwards = [42**2, 60**2, 110 * 118]  # the last stops at the image's border, above and to the right
    expected = [2 * 36**2 / (36**2 + area), 1, *(2 * area / (area + other) for other in outwards)]
    assert list(found) == [(5, 0)]
    assert found[5, 0][1:] == pytest.approx(expected)
    assert found[5, 0][0] == 0, "pushed in to the middle, between two pixels"


def test_push() -> None:
    boxes, sizes = torch.tensor([[10.0, 20, 30, 26]]), torch.tensor([[64, 40]])
    for shift, expected in ((3, [7, 17, 33, 29]), (15, [0, 5, 39, 41]), (-2, [12, 22, 28, 24]), (-7, [17, 23, 23, 23])):
        assert push(boxes, torch.full((1, 4), float(shift)), sizes).tolist() == [expected]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: BoxJitterProbe(shifts=(-5, 5)), "shifts are 0 or more"),
        (lambda: BoxJitterProbe(shifts=()), "shifts are 0 or more"),
        (lambda: BoxJitterProbe(samples=0), "samples 1 or more"),
        (lambda: ValidationPanels(count=0), "count is 1 or more"),
    ],
)
def test_mistakes_are_one_line(make: Any, said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_a_test_writes_summary_and_jitter(
    tiny_recipe: Path, tiny_shards: Path, trainer_command: Any, tmp_path: Path
) -> None:
    recipe = yaml.safe_load(tiny_recipe.read_text())
    recipe["model"]["init_args"]["model"]["init_args"]["image_size"] = 32
    named = {"class_path": "trainer.callbacks.BoxJitterProbe", "init_args": {"shifts": [0, 64], "samples": 100}}
    recipe["trainer"]["callbacks"] = [named]
    tiny_recipe.write_text("# Does it run?\n" + yaml.safe_dump(recipe))
    code, _, err = trainer_command("test", "-c", tiny_recipe)
    assert code == 0, err
    folder = Run(tmp_path / "run").evaluation("untouched")
    scores, jitter = read_scores(folder / "per_case.csv"), read_json(folder / "jitter.json")
    assert jitter["shifts"] == [-64, 0, 64]
    assert (jitter["side"], jitter["samples"], jitter["targets"]) == (1024, 6, 6)
    values = [score.dsc for score in scores]
    assert jitter["dsc"]["mean"][1] == pytest.approx(np.mean(values), abs=1e-5), "unshifted, they are the evaluation's"
    assert jitter["dsc"]["q1"][1] == pytest.approx(np.percentile(values, 25), abs=1e-5)
    assert len(set(jitter["dsc"]["mean"])) == 3
    with (folder / "summary.csv").open(newline="") as handle:
        summary = {(row["kind"], row["group"], row["metric"]): row for row in csv.DictReader(handle)}
    assert float(summary["term", "disc", "dsc"]["median"]) == pytest.approx(np.median(values), abs=1e-6)
    assert {place[:2] for place in summary} == {
        *(("all", "all"), ("dataset", "tiny"), ("modality", "MR"), ("term", "disc"), ("tolerance", "2 mm")),
    }
    origin = ShardDataset(tiny_shards / "test")[0].provenance
    assert (scores[0].tolerance, origin.spacing) == ("2 mm", (1, 1))
