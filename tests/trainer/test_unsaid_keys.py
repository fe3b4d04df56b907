"""Keys with nothing below them, which the parser would drop, and keys that older recipes do not have yet."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import yaml

from data_shards.errors import UserError
from trainer.plan.planned import ReadCLI
from trainer.resuming import changes, refuse_another_recipe
from trainer.run import Run

RECIPE = Path(__file__).parents[2] / "recipes/litemedsam/lora.yaml"
ARGUMENTS = {"init_args": {"tuning": {"init_args": {"rates": {}}}}}


def read(tmp_path: Path, *parts: dict) -> None:
    words = ["fit", "-c", str(RECIPE)]
    for number, part in enumerate(parts):
        path = tmp_path / f"part{number}.yaml"
        path.write_text(yaml.safe_dump(part))
        words += ["-c", str(path)]
    ReadCLI(words)


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ({"modle": {}}, "part0.yaml: unknown key 'modle'; did you mean 'model'?"),
        ({"trainer": {"calbacks": {}}}, "part0.yaml: unknown key 'trainer.calbacks'; did you mean 'callbacks'?"),
        ({"checkpoint": {"kep": {"all": {}}}}, "unknown key 'checkpoint.kep.*'; did you mean 'keep'?"),
        ({"model": {"init_args": {"tunign": {}}}}, "unknown key 'model.init_args.tunign'"),
        ({"data": {"init_arg": {}}}, "unknown key 'data.init_arg'"),
        ({"config": {}}, "part0.yaml: config: a recipe names no other recipe"),
        ({"config": "other.yaml"}, "part0.yaml: config: a recipe names no other recipe"),
        ({"return_predictions": {}}, "unknown key 'return_predictions': another command takes it"),
    ],
)
def test_unknown_keys_with_nothing_below_them_are_refused(tmp_path, part, said):
    with pytest.raises(UserError, match=said):
        read(tmp_path, part)


@pytest.mark.parametrize("part", [{"model": {}}, {"data": {"init_args": {}}}, {"model": ARGUMENTS}])
def test_known_ones_say_nothing(tmp_path, part):
    read(tmp_path, part)


def test_another_class_may_have_no_such_key(tmp_path):
    """What an earlier recipe leaves empty is gone with its class."""
    other = {"model": {"init_args": {"tuning": {"class_path": "trainer.tuning.SSFTuning"}}}}
    read(tmp_path, {"model": {"init_args": {"tuning": {"init_args": {"learning_rates": {}}}}}}, other)


def test_a_recipe_from_before_a_key_was_there_goes_on(tmp_path):
    """``train_samples``, and an argument of the model: null now is what was meant then; a value is not."""
    now = {
        "model": {"class_path": "M", "init_args": {"lr": 1.0, "newer": None}},
        "data": {"init_args": {"batch_size": 4, "train_samples": None, "sampling": None}},
    }
    then = copy.deepcopy(now)
    del then["model"]["init_args"]["newer"], then["data"]["init_args"]["train_samples"]
    del then["data"]["init_args"]["sampling"]
    assert list(changes(then, now)) == list(changes(now, then)) == []
    run = Run(tmp_path)
    run.recipe.write_text(yaml.safe_dump(then))
    run.record.write_text("{}")
    from trainer.version import CODE, code

    same_code = {CODE: code()}
    refuse_another_recipe(run, yaml.safe_dump(now), same_code)
    for part, key in ((now["model"]["init_args"], "newer"), (now["data"]["init_args"], "sampling")):
        changed = copy.deepcopy(now)
        (changed["model"] if key == "newer" else changed["data"])["init_args"] = {**part, key: 3}
        with pytest.raises(UserError, match=rf"cannot go on with another .*init_args\.{key}: nothing"):
            refuse_another_recipe(run, yaml.safe_dump(changed), same_code)
