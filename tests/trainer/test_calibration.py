"""Whether a model's probabilities are to be believed: figures recomputed from logits and truth, and their section."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import forked_ranks
import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor

from data_shards.batch import TripletBatch
from data_shards.datamodule import TripletDataModule
from data_shards.errors import UserError
from data_shards.scan import write_index
from data_shards.triplet import Provenance, Target, Triplet
from data_shards.writer import ShardWriter
from trainer.callbacks import CalibrationRecord
from trainer.callbacks.calibration import summary
from trainer.modules.reliability import BINS, calibration_error, in_bins, region_of, reliability
from trainer.modules.scoring import Prediction, ScoredModule
from trainer.report.calibration import calibration_section
from trainer.report.data import read_run
from trainer.report.page import render
from trainer.run import Run, write_json
from trainer.scores import CaseScore, write_scores

COUNT = 7
"""Samples: odd, so that one is repeated to make two ranks even."""
HEIGHT, WIDTH = 60, 90


def sample(number: int) -> Triplet:
    """Noise over one or two squares."""
    noise = np.random.default_rng(number).integers(0, 256, (HEIGHT, WIDTH), dtype=np.uint8)
    targets = []
    for target in range(1 + number % 2):
        mask = np.zeros((HEIGHT, WIDTH), np.uint8)
        mask[20 + number : 40, 5 + 40 * target : 25 + 42 * target] = 1
        noise[mask != 0] |= 128
        targets.append(Target.from_mask(mask, f"term {target}"))
    origin = Provenance("set", f"p{number}", f"v{number}", "CT", "0" * 64)
    return Triplet(f"test-{number}", noise, tuple(targets), ("term 0", "term 1"), origin)


def logits_of(image: np.ndarray, target: int) -> np.ndarray:
    """What `Sure` says of a target: the brighter the surer, and of the first target too sure."""
    return (image.astype(np.float32) - 140) / (20 if target == 0 else 80)


class Sure(ScoredModule):
    """Takes brightness for evidence, whatever the target."""

    def __init__(self, whole: bool = False, estimates: bool = True) -> None:
        super().__init__()
        self.nothing = torch.nn.Parameter(torch.zeros(1))
        self.whole_images, self.predicts_iou = whole, estimates

    def predict_masks(self, batch: TripletBatch) -> Prediction:
        """Masks, and 0.9, 0.4, … as what their IoU should be."""
        rows = list(zip(batch.image_index.tolist(), batch.target_index, strict=True))
        logits = [torch.from_numpy(logits_of(batch.images[image][0].numpy(), target)) for image, target in rows]
        return Prediction(
            masks=[one > 0 for one in logits],
            scores=torch.tensor([0.9 - 0.5 * target for _, target in rows]),
            boxes=batch.boxes.clone(),
            points=torch.zeros(len(rows), 0, 2),
            labels=torch.zeros(len(rows), 0),
            reliability=self.reliability_of(batch, dict(enumerate(logits))),
        )


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("shards")
    with ShardWriter(root / "test", 50, 2**20) as writer:
        for number in range(COUNT):
            writer.write(f"test-{number}", sample(number).encode())
    write_index(root / "test")
    return root


def score(shards: str, root: str, ranks: int = 1, micro: int = 2, **options: Any) -> None:
    """Evaluate on some ranks."""
    trainer = Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy="ddp" if ranks > 1 else "auto",
        default_root_dir=root,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[CalibrationRecord()],
        use_distributed_sampler=False,
    )
    module = Sure(**options)
    trainer.test(module, datamodule=TripletDataModule(test=f"{shards}/test", micro_batch_size=micro), verbose=False)
    assert not module.keeps_reliability, "what comes after the evaluation costs nothing more"


def read(root: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((root / "evaluation/untouched/calibration.json").read_text())
    return content


def by_hand(whole: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """Share, mean probability and share inside of each bin, and Brier score: pixel by pixel, a target as any other."""
    edges = np.linspace(0, 1, BINS + 1)
    sums, brier = np.zeros((3, BINS)), []
    for number in range(COUNT):
        one = sample(number)
        for position, target in enumerate(one.targets):
            truth = target.mask() != 0
            probability = 1 / (1 + np.exp(-logits_of(one.image, position).astype(np.float64)))
            if not whole:
                x0, y0, x1, y1 = (int(side) for side in target.box)
                right, down = (max(8, round((b - a + 1) / 10)) for a, b in ((x0, x1), (y0, y1)))
                part = np.s_[max(y0 - down, 0) : y1 + down + 1, max(x0 - right, 0) : x1 + right + 1]
                truth, probability = truth[part], probability[part]
            place = np.clip(np.digitize(probability, edges) - 1, 0, BINS - 1)
            for b in range(BINS):
                mine = place == b
                sums[:, b] += np.array([mine.sum(), probability[mine].sum(), truth[mine].sum()]) / truth.size
            brier.append(np.mean((probability - truth) ** 2))
    with np.errstate(invalid="ignore"):
        return sums[0] / len(brier), sums[1] / sums[0], sums[2] / sums[0], float(np.mean(brier))


def check(found: dict[str, Any], whole: bool = False) -> None:
    """The file has what is found by hand."""
    share, probability, inside, brier = by_hand(whole)
    none = [None if math.isnan(value) else value for value in probability]
    assert found["targets"] == 10
    assert found["share"] == pytest.approx(share, abs=1e-6)
    assert [value is None for value in found["probability"]] == [value is None for value in none]
    for name, values in (("probability", probability), ("inside", inside)):
        kept = [value for value in found[name] if value is not None]
        assert kept == pytest.approx(values[share > 0], abs=2e-6)
    assert found["brier"] == pytest.approx(brier, abs=2e-6)
    assert found["ece"] == pytest.approx(np.nansum(share * np.abs(probability - inside)), abs=2e-6)


def test_bins_errors_and_estimates_are_those_found_by_hand(shards: Path, tmp_path: Path) -> None:
    score(str(shards), str(tmp_path))
    found = read(tmp_path)
    check(found)
    assert (found["region"], found["enlarged_by"], found["at_least_px"]) == ("box", 0.1, 8)
    ious = []
    for number in range(COUNT):
        one = sample(number)
        for position, target in enumerate(one.targets):
            truth, mask = target.mask() != 0, logits_of(one.image, position) > 0
            ious.append((0.9 - 0.5 * position, (truth & mask).sum() / (truth | mask).sum()))
    estimated, measured = np.array(ious).T
    assert found["iou"]["targets"] == 10
    assert found["iou"]["error"] == pytest.approx(np.abs(estimated - measured).mean(), abs=1e-6)
    assert found["iou"]["mean_measured"] == pytest.approx(measured.mean(), abs=1e-6)
    assert [n for n in found["iou"]["share"] if n] == [0.3, 0.7]
    assert found["iou"]["measured"][6] == pytest.approx(measured[estimated < 0.5].mean(), abs=1e-6), "0.4 · 15 = 6"


def test_of_a_model_that_is_asked_in_words_every_pixel_counts(shards: Path, tmp_path: Path) -> None:
    score(str(shards), str(tmp_path), whole=True, estimates=False)
    found = read(tmp_path)
    check(found, whole=True)
    assert found["region"] == "image" and found["enlarged_by"] is None
    assert "iou" not in found, "its scores are no estimates of the IoU"


def test_two_ranks_find_what_one_finds(shards: Path, tmp_path: Path) -> None:
    score(str(shards), str(tmp_path / "one"), micro=3)
    forked_ranks.run(score, tmp_path / "two", 2, shards=str(shards))
    one, two = read(tmp_path / "one"), read(tmp_path / "two")
    check(two)  # the repeated sample counts once
    assert two["iou"]["targets"] == 10
    assert two["iou"]["share"] == one["iou"]["share"]
    assert two["iou"]["error"] == pytest.approx(one["iou"]["error"], abs=2e-6)


def test_what_is_no_number_promises_nothing() -> None:
    truth = torch.zeros(20, 20, dtype=torch.uint8)
    truth[5:10, 5:10] = 1
    logits = torch.full((20, 20), math.nan)
    sums = reliability(logits, truth)
    assert np.isfinite(sums).all() and sums[0, 0] == pytest.approx(1) and sums[1].sum() == 0
    assert calibration_error(sums) == pytest.approx(sums[3].sum()) == pytest.approx(25 / 18**2)


@pytest.mark.parametrize(("low", "high"), [(0, 30), (100, 180), (295, 300)])
def test_the_region_is_the_box_enlarged_and_stays_in_the_image(low: int, high: int) -> None:
    truth = torch.zeros(300, 300, dtype=torch.uint8)
    truth[low:high, 10:13] = 1
    reach = max(8, round((high - low) / 10))
    seen = torch.zeros(300, 300, dtype=torch.bool)
    seen[region_of(truth)] = True
    rows, columns = seen.any(1).nonzero()[:, 0], seen.any(0).nonzero()[:, 0]
    assert (int(rows[0]), int(rows[-1])) == (max(low - reach, 0), min(high - 1 + reach, 299))
    assert (int(columns[0]), int(columns[-1])) == (2, 20)
    assert reliability(torch.zeros(300, 300), torch.zeros(300, 300))[0].sum() == pytest.approx(1), "nothing: all"


def perfect(size: int) -> tuple[Tensor, Tensor]:
    """Logits whose probabilities are true: of the pixels with p, a share of p is inside."""
    generator = torch.Generator().manual_seed(0)
    probability = torch.rand(size, size, generator=generator)
    return probability.logit(), (torch.rand(size, size, generator=generator) < probability).to(torch.uint8)


def test_a_model_that_is_right_about_itself_has_no_error_and_a_surer_one_has() -> None:
    logits, truth = perfect(700)
    error = calibration_error(reliability(logits, truth, whole=True))
    assert error < 0.004
    assert calibration_error(reliability(3 * logits, truth, whole=True)) > 0.1


def written(root: Path, name: str, sharpness: float, estimates: bool = True) -> None:
    """An evaluation whose probabilities are `sharpness` times as sure as they should be."""
    logits, truth = perfect(300)
    sums = reliability(sharpness * logits, truth, whole=True)
    ious = in_bins(np.array([0.9, 0.8]), np.array([0.7, 0.75])) if estimates else np.zeros((4, BINS))
    folder = root / "evaluation" / name
    write_scores(folder / "per_case.csv", [CaseScore(f"k{n}", 0, "cyst", "CT", 9, 0.8, 0.7) for n in range(2)])
    write_json(folder / "calibration.json", summary(2 * sums, ious, 0.25, 2, whole=False))


def test_the_report_draws_both_and_says_what_it_means(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("# Does it?\n")
    written(tmp_path, "untouched", 4.0, estimates=False)
    written(tmp_path, "tuned", 1.0)
    data = read_run(Run(tmp_path))
    assert data.before and data.after and data.before.calibration and data.after.calibration
    before, after = data.before.calibration, data.after.calibration
    assert before.ece > 0.15 and after.ece < 0.01
    found = calibration_section(data)
    assert found.count("<svg") == 2 and found.count('class="jitter before"') == 1
    assert found.count('class="jitter after"') == 2, "the untouched one estimates no IoU"
    said = re.search(r"After tuning: where the model says (\d+)\s%, (\d+)\s%", found)
    assert said and [int(number) for number in said.groups()] == pytest.approx([90, 90], abs=1)
    said = re.search(r"Before tuning: where the model says (\d+)\s%, (\d+)\s%", found)
    assert said and int(said[1]) - int(said[2]) > 15, "it is too sure"
    assert "off by 0.125 on average" in found
    assert found in render(data)


def test_runs_without_the_file_have_no_section_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("# Does it?\n")
    written(tmp_path, "tuned", 1.0)
    path = tmp_path / "evaluation/tuned/calibration.json"
    whole = json.loads(path.read_text())
    for broken in (
        {**whole, "share": [1.0]},
        {**whole, "ece": None},
        {**whole, "inside": [2.0] * BINS},
        {"targets": 1},
    ):
        path.write_text(json.dumps(broken))
        with pytest.raises(UserError, match=r"calibration\.json: damaged"):
            read_run(Run(tmp_path))
    path.unlink()
    data = read_run(Run(tmp_path))
    assert calibration_section(data) == "" and "believed" not in render(data)
