"""Evaluations for the tests: shards whose truth is known, and models that answer by rule.

Shapes: M instances, H W native height and width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_evaluation_protocol import BRIGHT, DARK, GREY, NODE, SIDE, Bright, dump
from tiny_sam3 import make

from data_shards.batch import TripletBatch
from data_shards.scan import write_index
from data_shards.triplet import Provenance, Target, Triplet
from data_shards.writer import ShardWriter
from trainer.evaluation import sources
from trainer.evaluation.cli import evaluate_command
from trainer.modules.sam3 import SAM3Module
from trainer.volumes import Instances

SAM3_NODE = {"class_path": "trainer.models.SAM3", "init_args": {"weights": None, "image_size": 112}}
IMAGES = 12


def nodules(number: int) -> tuple[np.ndarray, np.ndarray]:
    """An image and its truth, (H, W) each: three nodules, of which one is not bright, and a bright fleck beside them.

    The squares grow with the number: 6 + number pixels a side.
    """
    side = 6 + number
    truth = np.zeros((SIDE, SIDE), np.uint8)
    for y, x in ((2, 2), (2, 40), (40, 2)):
        truth[y : y + side, x : x + side] = 1
    image = np.full(truth.shape, GREY, np.uint8)
    image[truth == 1] = BRIGHT
    image[40 : 40 + side, 2 : 2 + side] = GREY  # one of the three cannot be seen
    image[30:33, 30:33] = BRIGHT  # within the box around all three
    image[63, 63] = DARK
    return image, truth


def write_nodules(folder: Path) -> Path:
    """Twelve images with nodules in one semantic mask, and no cysts: CT and MR by turns, some without spacing."""
    with ShardWriter(folder, IMAGES, 2**20) as writer:
        for number in range(IMAGES):
            image, truth = nodules(number)
            spacing = None if number % 3 == 2 else (0.5 + number / 4, 0.5)
            origin = Provenance(
                ("lungs", "livers")[number // 6], f"p{number}", f"v{number}", ("CT", "MR")[number % 2], "0" * 64,
                "axial" if number < 4 else "coronal", None, spacing,
            )  # fmt: skip
            target = Target.from_mask(truth, "nodule")
            triplet = Triplet(f"s-{number:02d}", image, (target,), ("nodule", "cyst", "dark"), origin)
            writer.write(triplet.key, triplet.encode())
    write_index(folder)
    return folder


class Reader(SAM3Module):
    """Finds each bright square as an instance of whatever is asked for, twice, as a detector may answer."""

    def instances(self, batch: TripletBatch, terms: Sequence[Sequence[str]]) -> list[Instances]:
        from scipy.ndimage import label

        found = []
        for term in terms[0]:
            pieces, count = label(batch.images[0][0].numpy() == BRIGHT)
            masks = [torch.from_numpy(pieces == number) for number in range(1, count + 1)] * 2
            shape = (0, *batch.images[0].shape[-2:])
            stacked = torch.stack(masks) if masks and term != "dark" else torch.zeros(shape) > 0
            found.append(Instances(0, term, stacked, torch.ones(len(stacked))))
        return found


def stub(spec: Any, device: torch.device, where: str) -> Bright | SAM3Module:
    """A model that a protocol's name gives: one that reads, or one that finds dark or bright things in a box."""
    name = where.rpartition(".")[2]
    if spec.class_path == SAM3_NODE["class_path"]:
        reader = Reader(make()).eval()
        reader.model._tokenizer = object()  # type: ignore[assignment]  # nothing is read
        return reader
    return Bright(dark=name == "Dark").eval()


def evaluate(
    folder: Path, sets: list[dict[str, Any]], names: Sequence[str] = ("Bright",), *more: str, **keys: Any
) -> Path:
    """Run a protocol with `stub` as its models (those called SAM3 take words); the folder of its results."""
    nodes = {name: SAM3_NODE if name.startswith("SAM3") else NODE for name in names}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "p.yaml").write_text("# Which one is better?\n\n" + dump({"models": nodes, "sets": sets, **keys}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "_make", stub)
        assert evaluate_command([str(folder / "p.yaml"), "--out", str(folder / "out"), "--device", "cpu", *more]) == 0
    return folder / "out"


def refused(folder: Path, content: dict[str, Any], trainer_command: Callable[..., tuple[int, str, str]]) -> str:
    """The one line that a protocol's mistake gives."""
    path = folder / "p.yaml"
    path.write_text("# Which?\n\n" + dump(content))
    code, _, err = trainer_command("evaluate", path, "--out", folder / "out", "--device", "cpu")
    assert (code, len(err.splitlines())) == (2, 1), err
    assert "Traceback" not in err
    return err
