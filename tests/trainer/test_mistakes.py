"""A user's mistakes: each one line that names the place, before data is read, and nothing left behind."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from trainer.recipe import explain

REPOSITORY = Path(__file__).parents[2]
RECIPE = REPOSITORY / "recipes/litemedsam/lora.yaml"
Command = Callable[..., tuple[int, str, str]]
TUNING = "model.init_args.tuning"


def refused(result: tuple[int, str, str]) -> str:
    """The one line of a mistake."""
    code, out, err = result
    assert (code, out) == (2, ""), err
    assert err.startswith("trainer: error: ") and err.endswith("\n") and err.count("\n") == 1, err
    return err


@pytest.fixture
def given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trainer_command: Command) -> Callable[..., str]:
    """Fit a recipe with a part changed and with arguments; return the line that refuses it. The data do not exist."""
    monkeypatch.chdir(tmp_path)

    def run(part: dict[Any, Any] | None = None, *arguments: object) -> str:
        nowhere = [f"--data.init_args.{split}=nowhere/{split}" for split in ("train", "val", "test")]
        overlay = () if part is None else ("-c", "part.yaml")
        if part is not None:
            Path("part.yaml").write_text(yaml.safe_dump(part))
        small = ("--model.init_args.model.init_args.weights=null", "--trainer.default_root_dir=deep/er/run")
        line = refused(trainer_command("fit", "-c", RECIPE, *overlay, *small, *nowhere, *arguments))
        assert "nowhere" not in line, "refused before data are looked for"
        assert not Path("deep").exists(), "no folder is left, nor one above it"
        assert len(line) < 500
        return line

    return run


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        ({"model": {"init_args": {"tuning": {"class_path": "trainer.tuning.SSFTuning", "init_args": 3}}}},
         ("part.yaml: model.init_args.tuning: init_args are names with values, not 3",)),
        ({"model": {"init_args": {"tuning": {"class_path": ["trainer.tuning.SSFTuning"]}}}},
         ("part.yaml: model.init_args.tuning: class_path is a class's full dotted path",)),
        ({"model": {"init_args": {3: 4}}}, ("part.yaml: the key 3 is no text",)),
        ({"trainer": 3}, ("part.yaml: trainer: expected keys below it, not 3",)),
        ({"seed_everything": "x" * 300}, ("key 'seed_everything'",)),
        ({"model": {"init_args": {"tuning": {"class_path": "trainer.tuning.Tuning"}}}},
         ("is what its kinds share", "known: AdaptFormerTuning, FacTTuning")),
        ({"model": {"init_args": {"tuning": "trainer.tuning.VPT"}}}, ("no class 'trainer.tuning.VPT'", "FullTuning")),
        ({"model": {"init_args": {"tuning": "LoRATunin"}}}, ("did you mean 'trainer.tuning.LoRATuning'?",)),
        ({"model": {"init_args": {"tuning": {"class_path": "qqqq"}}}}, ("classes lie in", "trainer.tuning,")),
        ({"model": {"init_args": {"tuning": {"init_args": {"train": "mask_decoder"}}}}},
         ("part.yaml: key 'train': Expected a list. Got value: mask_decoder",)),
        ({"trainer": {"callbacks": [
            {"class_path": "trainer.callbacks.BoxJitterProbe", "init_args": {"shifts": ["x"]}}]}},
         ("part.yaml: key 'shifts': Expected a float. Got value: x\n",)),
        ({"trainer": {"callbacks": [{"class_path": "trainer.callbacks.EMA", "init_args": {"decay": 1}}]}},
         ("EMA's decay is in [0, 1), not 1.0\n",)),
        ({"trainer": {"callbacks": [3]}}, ("Expected a class_path, with its init_args, of a Callback. Got value: 3",)),
    ],
)  # fmt: skip
def test_in_a_recipe(part: dict[Any, Any], expected: tuple[str, ...], given: Callable[..., str]) -> None:
    line = given(part)
    for words in expected:
        assert words in line


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_no_number_is_no_amount(value: float, given: Callable[..., str]) -> None:
    """YAML has `.nan` and `.inf`, and a comparison with one that is not a number is never true."""
    tuning = {"class_path": "trainer.tuning.LoRATuning", "init_args": {"alpha": value}}
    loss = {"class_path": "trainer.losses.DiceCrossEntropy", "init_args": {"dice_weight": value}}
    probe = {"class_path": "trainer.callbacks.BoxJitterProbe", "init_args": {"shifts": [0, value]}}
    assert f"here lr is {value}" in given({"model": {"init_args": {"lr": value}}})
    assert f"score_weight {value}" in given({"model": {"init_args": {"score_weight": value}}})
    assert f"here power is {value}" in given({"model": {"init_args": {"power": value}}})
    assert f"alpha is above 0, not {value}" in given({"model": {"init_args": {"tuning": tuning}}})
    assert "rates: mask_decoder: a factor" in given(
        {"model": {"init_args": {"tuning": {**tuning, "init_args": {"rates": {"mask_decoder": value}}}}}}
    ).replace(f" {value}:", "")
    assert "are 0 or more and not both 0" in given({"model": {"init_args": {"loss": loss}}})
    assert "BoxJitterProbe: shifts are 0 or more" in given({"trainer": {"callbacks": [probe]}})


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--trainer.gradient_clip_val", -1), "trainer.gradient_clip_val -1.0: above 0, or null"),
        (("--trainer.val_check_interval", 0), "trainer.val_check_interval 0: batches of micro_batch_size"),
        (("--trainer.limit_train_batches", 0), "trainer.limit_train_batches 0: nothing would be learnt"),
        (("--checkpoint.monitor", "val/dcs"), "monitor val/dcs: no validation logs that; did you mean 'val/dsc'?"),
        (("--checkpoint.monitor", "dsc"), "checkpoint.monitor dsc: no validation logs that"),
        (("--weights", "raw"), "unknown key 'weights': another command takes it"),
        (("--max_steps", 3), "error: unknown key 'max_steps'; did you mean 'trainer.max_steps'?"),
        ((f"--{TUNING}.init_args.targets", ".*"), "match image_encoder, a TinyViTEncoder, which takes no adapter"),
        (("--trainer.callbacks", "[{class_path: trainer.callbacks.EMAA}]"), "did you mean 'trainer.callbacks.EMA'?"),
        (("--trainer.callbacks", "[{class_path: subprocess.Popen}]"), "outside the allowed packages"),
        (
            ("--trainer.callbacks+", "trainer.callbacks.EMA", "--trainer.callbacks.decay", "nan"),
            "key 'decay': Expected a float. Got value: nan\n",
        ),
        (
            ("--model.init_args.prompts={class_path: trainer.prompts.MixedPrompts, init_args: {prompters: ["
             "{class_path: trainer.prompts.BoxPrompts, init_args: {max_shft: 3}}]}}",),
            "BoxPrompts has no argument 'max_shft'; did you mean 'max_shift'?",
        ),
        (("-c", REPOSITORY / "recipes/quickstart.png"), "quickstart.png: no text: a recipe is a YAML file"),
    ],
)  # fmt: skip
def test_on_the_command_line(arguments: tuple[object, ...], expected: str, given: Callable[..., str]) -> None:
    assert expected in given(None, *arguments)


def test_an_overlay_lies_on_a_recipe(trainer_command: Command) -> None:
    overlay = REPOSITORY / "recipes/overlays/own_data.yaml"
    line = refused(trainer_command("plan", overlay))
    assert f"recipe {overlay}: data has no class_path: an overlay lies on a recipe" in line
    assert "'model' is missing: give a recipe" in refused(trainer_command("fit", "--trainer.max_steps", 3))


def test_a_run_goes_on_with_its_own_tuning(tiny_run: Path, tmp_path: Path, trainer_command: Command) -> None:
    content = yaml.safe_load((tiny_run / "recipe.yaml").read_text())
    content["model"]["init_args"]["tuning"] = {"class_path": "trainer.tuning.LoRATuning"}
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(content))
    arguments = ("-c", tmp_path / "other.yaml", "--ckpt_path", "last")
    line = refused(trainer_command("fit", *arguments))
    assert "cannot go on with another model.init_args.tuning.class_path: trainer.tuning.FullTuning" in line
    line = refused(trainer_command("validate", *arguments, "--data.init_args.val=null"))
    assert "of another model or tuning" in line, "who only scores may come from elsewhere"
    line = refused(trainer_command("validate", "-c", tiny_run / "recipe.yaml", "--data.init_args.val=null"))
    assert "`validate` needs data.init_args.val" in line


def test_a_complaint_of_a_union_keeps_what_is_wrong() -> None:
    said = (
        "Parser key \"trainer.callbacks\": Does not validate against any of the Union subtypes Errors: - key 'decay': "
        "Expected a float. Got value: nan - unknown key 'decay'; known: data, model - Expected a <class 'NoneType'>"
    )
    assert explain(said, {"data", "model"}, []) == "key 'decay': Expected a float. Got value: nan"
    assert explain("unrecognized arguments: --lr 3", {"model.lr"}, []) == "unknown key 'lr'; did you mean 'model.lr'?"


# --- recipes changed at random ---

VALUES: list[Any] = [
    *(None, "four", "", -1, 0, -0.5, 1e30, 10**12, math.nan, math.inf, -math.inf, [], [1, 2], ["a"], {}, {"a": 1}),
    *(
        {"class_path": 3},
        {"init_args": {}},
        True,
        "日本語 ü",
        "\u202e",
        "x" * 300,
        "trainer.tuning.LoRATuning",
        "null",
    ),
    *({"class_path": "trainer.tuning.LoRATuning"}, "os.system", [[[]]], {"a": {"b": None}}, "..", [None], {1: 2}),
    *({None: 1}, "a: b", "{x", "[", "\x07", b"bytes", 2.5),
]


def places(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where values stand in a recipe, at any depth."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, child in items:
        yield (*path, key)
        yield from places(child, (*path, key))


def mutated(number: int) -> dict[str, Any]:
    """A recipe with one to three places changed, renamed or left out."""
    draw = random.Random(number)
    recipes = sorted((REPOSITORY / "recipes/litemedsam").glob("*.yaml"))
    content: dict[str, Any] = yaml.safe_load(draw.choice(recipes).read_text())
    for _ in range(draw.choice([1, 1, 2, 3])):
        *path, last = draw.choice(list(places(content)))
        node: Any = content
        for key in path:
            node = node[key]
        how = draw.random()
        if how < 0.75 or isinstance(node, list):
            node[last] = copy.deepcopy(draw.choice(VALUES))
        elif how < 0.9:
            node[str(last)[::-1]] = node.pop(last)
        else:
            del node[last]
    return content


def test_a_recipe_changed_at_random_is_planned_or_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trainer_command: Command
) -> None:
    monkeypatch.chdir(tmp_path)
    codes = []
    for number in range(100):
        Path("changed.yaml").write_text(yaml.safe_dump(mutated(number), allow_unicode=True))
        code, out, err = trainer_command("plan", "changed.yaml")
        if code == 0:
            assert not err, number
        else:
            assert len(refused((code, out, err))) < 1500, number
        codes.append(code)
    assert 3 < codes.count(0) < 60, "both happen"
    assert [path.name for path in tmp_path.iterdir()] == ["changed.yaml"]
