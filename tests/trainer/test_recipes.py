"""Every recipe passes the real parser; whoever sends one sends no code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonargparse import Namespace

from data_shards.errors import UserError
from trainer.lightning_cli import RecipeCLI
from trainer.recipe import check_recipe, dotted_keys

REPOSITORY = Path(__file__).parents[2]
# evaluation protocols and ablations have keys of their own: test_evaluation_protocol.py and test_ablation.py read them
OTHERS = ("evaluation", "ablations")
RECIPES = sorted(path for path in (REPOSITORY / "recipes").rglob("*.yaml") if path.parent.name not in OTHERS)
OVERLAYS = [path for path in RECIPES if path.parent.name in ("overlays", "clusters")]
WHOLE = [path for path in RECIPES if path not in OVERLAYS]


class ParsedOnly(RecipeCLI):
    """The real command line up to the point where objects are made."""

    def _set_seed(self) -> None:
        pass

    def instantiate_classes(self) -> None:
        pass

    def _run_subcommand(self, subcommand: str) -> None:
        pass


def parse(*recipes: Path, subcommand: str = "fit") -> Namespace:
    arguments = [part for recipe in recipes for part in ("-c", str(recipe))]
    return ParsedOnly([subcommand, *arguments]).config[subcommand]


def test_there_are_recipes():
    assert REPOSITORY / "recipes/quickstart.yaml" in WHOLE
    assert len(OVERLAYS) >= 2


KINDS = ("quickstart.yaml", "litemedsam/lora.yaml", "medsam/full.yaml", "sam2/medsam2.yaml", "sam3/tiny.yaml")
ONE_OF_A_KIND = [REPOSITORY / "recipes" / name for name in KINDS]
"""The others differ from these in values, not in keys."""


@pytest.mark.parametrize(
    ("recipe", "subcommand"),
    [*((recipe, "fit") for recipe in WHOLE), *((recipe, s) for recipe in ONE_OF_A_KIND for s in ("test", "predict"))],
    ids=lambda part: part if isinstance(part, str) else str(part.relative_to(REPOSITORY)),
)
def test_recipes_parse(recipe, subcommand):
    config = parse(recipe, subcommand=subcommand)
    check_arrives(yaml.safe_load(recipe.read_text()), config)
    assert config.checkpoint.dirpath == f"{config.trainer.default_root_dir}/checkpoints"


def check_arrives(written: dict[str, Any], config: Namespace, where: str = "") -> None:
    """What is written arrives: nothing is dropped on the way."""
    for name, value in written.items():
        assert name in config, f"{where}{name}"
        if isinstance(config[name], dict):  # a mapping by parameters' names, which may have dots, is a value
            assert config[name] == value, f"{where}{name}"
        elif isinstance(value, dict):
            check_arrives(value, config[name], f"{where}{name}.")


def fits(recipe: Path, overlay: Path) -> bool:
    """Whether an overlay is meant for a recipe's module: what it asks of a model differs between them."""
    by_text = recipe.parent.name == "sam3"
    names = set(dotted_keys(yaml.safe_load(overlay.read_text())))
    only_text = {"model.init_args.wording", "model.init_args.exemplars"} & names
    only_prompts = {"model.init_args.prompts"} & names
    if recipe.parent.name == "sam2" and "model.init_args.score_weight" in names:  # its loss has that weight
        return False
    if overlay.stem.startswith("sam2_") and recipe.parent.name != "sam2":
        return False
    return not (only_prompts if by_text else only_text)


@pytest.mark.parametrize(
    ("recipe", "overlay"),
    [(recipe, overlay) for recipe in ONE_OF_A_KIND for overlay in OVERLAYS if fits(recipe, overlay)],
    ids=lambda path: path.stem,
)
def test_overlays_parse_on_recipes_of_every_kind(recipe, overlay):
    config = parse(recipe, overlay)
    content = yaml.safe_load(overlay.read_text())
    for key in dotted_keys(content):
        if not key.startswith("cluster."):  # of one mapping, which arrives whole
            assert key.replace("+", "") in config, key  # `callbacks+` adds to the recipe's own
    assert config.cluster == content.get("cluster")
    lines = [line for line in overlay.read_text().splitlines() if not line.startswith("#")]
    assert len(lines) <= 3 or overlay.parent.name == "clusters", "overlays are short"


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipes_open_with_question_and_command(recipe):
    opening = check_recipe(recipe)
    assert "Launch:" in opening
    assert "?" in opening.splitlines()[0] or recipe in OVERLAYS
    for line in opening.splitlines():
        for word in line.split():
            if word.startswith("recipes/") and word.endswith(".yaml"):
                assert (REPOSITORY / word).is_file(), f"{word} is named and not there"


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_recipes_plan(recipe, trainer_command, monkeypatch):
    """Whole ones by themselves, overlays on the recipe that they name: the module is made, and something learns."""
    monkeypatch.chdir(REPOSITORY)
    named = [word for line in check_recipe(recipe).splitlines() if "Launch:" in line for word in line.split()]
    files = [word for word in named if word.endswith(".yaml")] if recipe in OVERLAYS else [recipe]
    assert files, "its launch command names it and what it overlays"
    code, out, err = trainer_command(
        "plan", *(part for file in files for part in ("-c", file)), "--no-memory", "--json", "-"
    )
    assert (code, err) == (0, ""), err
    plan = json.loads(out)
    assert 0 < plan["learning"] <= plan["parameters"] == sum(group["parameters"] for group in plan["groups"])


def write(path: Path, content: str) -> Path:
    path.write_text(content)
    return path


@pytest.mark.parametrize(
    "class_path",
    [
        "os.system",
        "subprocess.Popen",
        "builtins.eval",
        "numpy.load",
        "torchx.Thing",
        "trainer_evil.Model",
        "pickle.Unpickler",
    ],
)
def test_classes_from_elsewhere_are_refused_before_they_are_imported(tmp_path, class_path):
    recipe = write(tmp_path / "r.yaml", f"model: {{init_args: {{model: {{class_path: {class_path}}}}}}}\n")
    with pytest.raises(UserError, match="outside the allowed packages") as error:
        check_recipe(recipe)
    assert str(recipe) in str(error.value)
    assert "model.init_args.model" in str(error.value)


@pytest.mark.parametrize(
    "content",
    [
        "trainer: {callbacks: [evil.Callback]}\n",
        "trainer: {callbacks: evil.Callback}\n",
        "model: {init_args: {loss: evil.Loss}}\n",
        "callbacks: {class_path: lightning.pytorch.callbacks.LambdaCallback, init_args: {setup: evil.hook}}\n",
        "trainer: FILE\n",
        "trainer: {callbacks: FILE}\n",
        "model: {init_args: {loss: FILE}}\n",
    ],
)
def test_nothing_is_imported_by_another_door(tmp_path, content, monkeypatch):
    (tmp_path / "evil.py").write_text("raise SystemExit('imported')\n")
    part = write(tmp_path / "part.txt", "class_path: evil.Callback\n")
    monkeypatch.syspath_prepend(tmp_path)
    recipe = write(tmp_path / "r.yaml", content.replace("FILE", str(part)))
    with pytest.raises(UserError, match=r"outside the allowed packages|a recipe is one file"):
        check_recipe(recipe)


def test_a_function_is_no_class(tmp_path):
    with pytest.raises(UserError, match=r"there is no class 'torch\.load'"):
        check_recipe(write(tmp_path / "r.yaml", "model: {class_path: torch.load}\n"))


def test_the_import_of_an_allowed_module_that_fails_is_no_class(tmp_path):
    with pytest.raises(UserError, match=r"there is no class 'trainer\.nothing\.Model'"):
        check_recipe(write(tmp_path / "r.yaml", "model: {class_path: trainer.nothing.Model}\n"))


@pytest.mark.parametrize("content", ["", "- a\n- b\n", "just words\n"])
def test_a_recipe_is_a_mapping(tmp_path, content):
    with pytest.raises(UserError, match="expected keys such as model"):
        check_recipe(write(tmp_path / "r.yaml", content))
