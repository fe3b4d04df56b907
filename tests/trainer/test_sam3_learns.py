"""SAM3 from random weights learns real slices by heart: terms apart in an image, and nothing where one is absent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from data_shards.batch import collate
from data_shards.build import build
from data_shards.dataset import ShardDataset
from data_shards.views import SampleView
from trainer.restore import restore
from trainer.run import Run
from trainer.scores import read_scores

REPOSITORY = Path(__file__).parents[2]
TERMS = {"spleen": 1, "right kidney": 2, "liver": 5}


@pytest.mark.slow
def test_two_terms_and_an_absent_one(test_data: Path, tmp_path: Path, trainer_command: Any) -> None:
    pytest.importorskip("open_clip")
    name = "ct_abdomen_totalseg_nifti"
    spec = yaml.safe_load((REPOSITORY / f"tests/data_shards/specs/{name}.yaml").read_text())
    spec["targets"] = [{"term": term, "value": value} for term, value in TERMS.items()]
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(spec))
    build(tmp_path / "spec.yaml", tmp_path / "shards", root=test_data / name)

    recipe = yaml.safe_load((REPOSITORY / "recipes/sam3/tiny.yaml").read_text())
    shards = str(tmp_path / "shards/train")
    recipe["model"]["init_args"]["terms_per_image"] = 2  # two minutes instead of four
    recipe["data"]["init_args"] |= {"train": shards, "test": shards, "negatives_per_image": 1}
    recipe["trainer"] |= {"default_root_dir": str(tmp_path / "run"), "accelerator": "cpu", "max_steps": 400}
    (tmp_path / "recipe.yaml").write_text("# Does it learn?\n" + yaml.safe_dump(recipe))
    code, _, error = trainer_command("fit", "-c", tmp_path / "recipe.yaml")
    assert code == 0, error
    code, _, error = trainer_command("test", "-c", tmp_path / "recipe.yaml", "--ckpt_path", "last")
    assert code == 0, error

    folder = tmp_path / "run/evaluation/tuned"
    scores = read_scores(folder / "per_case.csv")
    by_term = {term: [row.dsc for row in scores if row.term == term] for term in TERMS}
    assert sum(row.dsc for row in scores) / len(scores) > 0.9
    assert all(sum(values) / len(values) > 0.88 for values in by_term.values()), by_term
    overall = json.loads((folder / "presence.json").read_text())["groups"][0]
    assert overall["absent"] == 11 and overall["false_positives"] == 0  # slices above and below the right kidney
    assert overall["found"] > 0.8 and overall["auroc"] > 0.99

    # one image, two terms: each mask is its own term's and not the other's
    module = restore(Run(tmp_path / "run"))
    view = SampleView(ShardDataset(tmp_path / "shards/train"))
    batch = collate([view[0, 12]]).by_term()
    with torch.no_grad():
        masks = module.predict_masks(batch).masks
    for q, term in enumerate(batch.terms):
        for other, truth in enumerate(batch.masks):
            share = (masks[q] & (truth > 0)).sum() / (truth > 0).sum()
            assert share > 0.8 if other == q else share < 0.1, (term, batch.terms[other])
