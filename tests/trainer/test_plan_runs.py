"""The plan's peak of memory against real trainings of every family's tiny twin, on the CPU.

Said and held in MiB, as found on torch 2.14: MedSAM 162.9 and 162.9, recomputed 144.7 and 144.7, with LoRA 153.2 and
149.1, two passes a step with an average of the weights 134.3 and 134.3, DDP 134.3 and 134.3; LiteMedSAM 796.7 and
796.7; SAM2 on images 64.5 and 63.7, on clips 74.2 and 74.3, recomputed 35.5 and 35.6; SAM3 46.1 and 45.9, recomputed
39.0 and 42.2, with LoRA 21.1 and 21.1. Under FSDP2 148.9 are said; 156.7 to 158.0 were held on an idle machine, 175.2
on a busy one: gloo's threads free their buffers later there. Full-size models on a GPU could not be run here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import forked_ranks
import plan_ranks
import pytest

RUNS: dict[str, dict[str, Any]] = {
    "medsam": {"family": "medsam", "side": 256, "images": 8},
    "medsam, recomputed": {
        "family": "medsam", "side": 256, "images": 8, "model": {"checkpoint_activations": True},
    },
    "medsam, LoRA": {"family": "medsam", "side": 256, "images": 8, "tuning": "LoRATuning"},
    "medsam, two passes, EMA": {"family": "medsam", "side": 256, "images": 4, "passes": 2, "ema": True},
    "litemedsam": {"family": "litemedsam", "side": 64, "images": 4},
    "sam2, images": {"family": "sam2", "side": 128, "images": 8},
    "sam2, clips": {"family": "sam2", "side": 128, "images": 2, "frames": 4},
    "sam2, clips, recomputed": {
        "family": "sam2", "side": 128, "images": 2, "frames": 4, "model": {"checkpoint_activations": True},
    },
    "sam3": {"family": "sam3", "side": 112, "images": 4},
    "sam3, recomputed": {"family": "sam3", "side": 112, "images": 4, "model": {"checkpoint_activations": True}},
    "sam3, LoRA": {"family": "sam3", "side": 112, "images": 4, "tuning": "LoRATuning"},
    "medsam, ddp": {"family": "medsam", "side": 256, "images": 4, "ranks": 2, "strategy": "ddp"},
    "medsam, fsdp2": {"family": "medsam", "side": 256, "images": 4, "ranks": 2, "strategy": "fsdp2", "width": 128},
}  # fmt: skip


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return plan_ranks.write_shards(tmp_path_factory.mktemp("volumes"))


@pytest.mark.parametrize("name", RUNS)
def test_a_real_training_holds_what_was_said(name: str, shards: Path, tmp_path: Path) -> None:
    if name.startswith("sam2"):
        pytest.importorskip("sam2")
    options = dict(RUNS[name])
    forked_ranks.run(plan_ranks.main, tmp_path, options.pop("ranks", 1), shards=str(shards), **options)
    for path in tmp_path.glob("peak-*.json"):
        found = json.loads(path.read_text())
        said = sum(found["said"].values())
        print(f"{name}: said {said / 2**20:.1f}, held {found['held'] / 2**20:.1f}", found["said"])
        assert said == pytest.approx(found["held"], rel=0.2 if name.endswith("fsdp2") else 0.15)
        assert found["said"]["activations"] > 0.1 * said
