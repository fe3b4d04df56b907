"""Expands an ablation: the full recipe of every cell, before anything runs, so that any cell can be run by hand."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from data_shards.errors import UserError, nearest
from data_shards.stores.urls import as_url
from trainer.ablation.spec import Budget, CellSpec, Loaded
from trainer.plan.planned import PlanCLI
from trainer.recipe import flat
from trainer.report.markup import UNKNOWN
from trainer.resuming import changes, shown
from trainer.run import Run, write_whole

FROM_SCRATCH = "from scratch"
"""What is said of a specialist where a foundation model's share of learning parameters stands."""
_OF_THE_MACHINE = ("num_workers", "micro_batch_size", "cache", "cache_gb")
"""Arguments of the data module that change nothing of what is learnt."""


@dataclass(frozen=True)
class Cell:
    """One training of an ablation, and its score.

    Attributes:
        name: The cell that it belongs to.
        seed: Its seed; that of the reference where nothing is trained.
        tuned: Whether anything is trained.
        recipe: The full recipe.
        path: Where that is written.
        root: Folder of the run.
        text: The recipe as it is written.
        steps: Steps that it may take; None where time alone is its limit.
        parameters: Parameters of its model, planned without weights.
        learning: Those of them that learn.
        unmatched: What of its data differs from the reference's, in words.
        specialist: Whether its model is no foundation model, but learns from scratch.
        needs_end: Whether its learning rate falls towards the recipe's last step.
    """

    name: str
    seed: int
    tuned: bool
    recipe: dict[str, Any]
    path: Path
    root: Path
    text: str
    steps: int | None
    parameters: int
    learning: int
    unmatched: tuple[str, ...] = ()
    specialist: bool = False
    needs_end: bool = False

    @property
    def key(self) -> str:
        """Name and seed, as ``--only`` takes them."""
        return f"{self.name}/{self.seed}" if self.tuned else self.name

    @property
    def title(self) -> str:
        """Name and seed, in words."""
        return f"{self.name}, seed {self.seed}" if self.tuned else self.name

    @property
    def run(self) -> Run:
        """Its run."""
        return Run(self.root)


class CellCLI(PlanCLI):
    """A cell's recipe, parsed and made without weights: what its classes refuse is said before anything runs."""

    def instantiate_classes(self) -> None:
        """Keep the recipe as it was resolved, and make its module and data module."""
        super(PlanCLI, self).instantiate_classes()
        self.full = copy.deepcopy(self.resolved)  # a plan leaves out what it cannot do without weights
        super().instantiate_classes()


def expand(loaded: Loaded, out: Path, overlays: Sequence[str] = ()) -> list[Cell]:
    """Make the full recipe of every cell; nothing is written.

    Args:
        loaded: The spec.
        out: Folder of the ablation.
        overlays: Recipes that lie on all of a cell's own, such as a cluster or one's own data.

    Returns:
        The cells, all of the first seed first.

    Raises:
        UserError: A recipe has a mistake, a folder of data is not there, or a cell changes what the budget fixes.
    """
    firsts = {name: _resolve(loaded, name, spec, out, overlays) for name, spec in loaded.cells.items()}
    reference = firsts[loaded.reference].recipe
    found = []
    for number, seed in enumerate(loaded.spec.seeds):
        for first in firsts.values():
            if first.tuned or number == 0:
                found.append(_seeded(first, loaded, seed, out, _unmatched(first.recipe, reference)))
    return found


def _resolve(loaded: Loaded, name: str, spec: CellSpec, out: Path, overlays: Sequence[str]) -> Cell:
    """The recipe of a cell with the first seed, as the real parser makes it of all its parts."""
    for key, place in ((loaded.spec.overrides, "overrides"), (spec.overrides, f"cells.{name}.overrides")):
        _refuse_budget(key, f"{loaded.path}: {place}")
    with tempfile.TemporaryDirectory() as folder:
        parts = {
            f"{loaded.path}: overrides": loaded.spec.overrides,
            f"{loaded.path}: cells.{name}.overrides": spec.overrides,
            f"{loaded.path}: budget": _budget(loaded.spec.budget),
        }
        written = {where: _write(Path(folder) / f"{n}.yaml", part) for n, (where, part) in enumerate(parts.items())}
        common, own, budget = (["-c", str(path)] if path else [] for path in written.values())
        named = [[word for file in files for word in ("-c", file)] for files in (loaded.spec.overlays, spec.overlays)]
        more = [word for file in overlays for word in ("-c", file)]
        words = ["fit", "-c", loaded.spec.base, *named[0], *common, *named[1], *own, *more, *budget]
        try:
            cli = CellCLI(words)
            plan = cli.plan()
        except UserError as error:
            message = str(error)
            for where, path in written.items():
                message = message.replace(f"recipe {path}", where).replace(str(path), where)
            raise UserError(
                message if str(loaded.path) in message else f"{loaded.path}: cell {name}: {message}"
            ) from error
    recipe = cli.full
    (recipe.get("checkpoint") or {}).pop("dirpath", None)  # follows from the run's folder
    recipe["data"]["init_args"]["seed"] = None  # that of the run: all cells of a seed see the same in the same order
    if recipe["trainer"]["max_epochs"] is not None:
        recipe["trainer"]["max_epochs"] = -1
    hours = loaded.spec.budget.gpu_hours
    if hours is not None:
        recipe["trainer"]["max_time"] = _time(hours / _devices(recipe["trainer"], f"{loaded.path}: cell {name}"))
    _check_folders(recipe["data"]["init_args"], f"{loaded.path}: cell {name}", spec.tuned)
    learning = plan["learning"] if spec.tuned else 0
    return Cell(
        *(name, 0, spec.tuned, recipe, out, out, "", loaded.spec.budget.steps, plan["parameters"], learning),
        specialist=cli.module.model.specialist,
        needs_end=spec.tuned and cli.module.schedule.needs_end,
    )


def _seeded(first: Cell, loaded: Loaded, seed: int, out: Path, unmatched: tuple[str, ...]) -> Cell:
    """A cell with a seed, and where everything of it goes."""
    recipe = copy.deepcopy(first.recipe)
    file = f"{first.name}-seed-{seed}" if first.tuned else first.name
    root = out / "cells" / first.name / f"seed-{seed}" if first.tuned else out / "cells" / first.name
    path = out / "recipes" / f"{file}.yaml"
    recipe["seed_everything"] = seed
    recipe["trainer"]["default_root_dir"] = str(root)
    lines = [f"# {loaded.question or loaded.name} This is its cell {first.name}, seed {seed}.", "#"]
    if loaded.caveat:
        lines.insert(1, f"# Caveat: {loaded.caveat}")
    if first.tuned:
        lines += [f"# Launch: trainer fit -c {path} --ckpt_path last", f"#   trainer test -c {path} --ckpt_path last"]
    else:
        lines += [f"# Launch: trainer test -c {path}"]
    text = "\n".join([*lines, "", yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)])
    return replace(first, seed=seed, recipe=recipe, path=path, root=root, text=text, unmatched=unmatched)


def write_recipes(cells: Sequence[Cell]) -> None:
    """Write the recipe of every cell.

    Raises:
        UserError: A cell was trained by another recipe already, or the folder cannot be written.
    """
    for cell in cells:
        if cell.path.is_file() and cell.root.is_dir():
            _refuse_another(cell)
    for cell in cells:
        try:
            cell.path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(cell.path, cell.text)
        except OSError as error:
            raise UserError(f"{cell.path}: cannot be written ({error.strerror}): choose another --out") from error


def _refuse_another(cell: Cell) -> None:
    """Refuse to take what one recipe made for the result of another one.

    Raises:
        UserError: The recipes differ, and there is something that the other made.
    """
    evaluated, newest = any(cell.run.evaluation("").glob("*/per_case.csv")), cell.run.newest_checkpoint()
    if not (evaluated or newest):
        return
    try:
        before = yaml.safe_load(cell.path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        before = None
    if not isinstance(before, dict):
        raise UserError(f"{cell.path}: no recipe any more: remove it and {cell.root}, or choose another --out")
    differing = [(key, old, new) for key, old, new in changes(before, cell.recipe) if not _harmless(key)]
    if differing:
        key, old, new = differing[0]
        raise UserError(
            f"{cell.title} was made with {key} {shown(old)}, and the spec now says {shown(new)}: set it back, remove "
            f"{cell.root}, or choose another --out"
        )


def _harmless(key: str) -> bool:
    return key.rpartition(".")[2] in _OF_THE_MACHINE or key.startswith(("cluster", "trainer.enable_", "trainer.logger"))


def _refuse_budget(overrides: dict[str, Any], where: str) -> None:
    """Refuse what would break the match of the cells.

    Raises:
        UserError: A key is the budget's, or the seed's.
    """
    fixed = {
        **{f"trainer.{name}": "budget" for name in ("max_steps", "max_epochs", "max_time")},
        "seed_everything": "seeds",
        "trainer.default_root_dir": "out",
        "data.init_args.seed": "seeds",
    }
    for key in flat(overrides):
        for name, own in fixed.items():
            if f"{key}.".startswith(f"{name}."):  # max_time may be a mapping of hours and minutes
                raise UserError(f"{where}: {name} is the same for every cell: the key '{own}' sets it")


def _budget(budget: Budget) -> dict[str, Any]:
    """The keys of a recipe that a budget sets."""
    return {} if budget.steps is None else {"trainer": {"max_steps": budget.steps}}


def _devices(trainer: dict[str, Any], where: str) -> int:
    """Devices over all nodes, of a budget in hours of them.

    Raises:
        UserError: The recipe does not say how many.
    """
    devices, nodes = trainer.get("devices"), trainer.get("num_nodes") or 1
    if isinstance(devices, list):
        return len(devices) * nodes
    if str(devices).isdigit() and int(devices or 0):
        return int(devices or 0) * nodes
    if trainer.get("accelerator") == "cpu":
        return nodes
    raise UserError(f"{where}: trainer.devices {devices}: GPU-hours need a number of devices: set it in overrides")


def _time(hours: float) -> str:
    """Hours as Lightning's DD:HH:MM:SS."""
    seconds = max(1, round(hours * 3600))
    days, rest = divmod(seconds, 86400)
    return f"{days:02d}:{rest // 3600:02d}:{rest % 3600 // 60:02d}:{rest % 60:02d}"


def schedule_warning(cells: Sequence[Cell], budget: Budget) -> str:
    """That time may end a training before its learning rate has fallen, or long after; nothing with steps."""
    names = list(dict.fromkeys(cell.name for cell in cells if cell.needs_end))
    if budget.gpu_hours is None or not names:
        return ""
    return (
        f"the learning rate of {', '.join(names)} falls over trainer.max_steps, and {budget.describe()} may end before "
        "or after that: set schedule constant, or a max_steps that about fills the time, in overrides of the base"
    )


def _check_folders(data: dict[str, Any], where: str, tuned: bool) -> None:
    """Refuse data that are not there, before hours are spent on cells that need them at their end.

    Raises:
        UserError: A split is not named, or is not there.
    """
    for split in ("train", "val", "test") if tuned else ("test",):
        folder = data.get(split)
        if folder is None and split != "val":
            raise UserError(f"{where}: data.init_args.{split} is missing: the folder of that split's shards")
        if folder is not None and as_url(folder) is None and not Path(folder).is_dir():
            raise UserError(
                f"{where}: data.init_args.{split}: there is no folder {folder}; `data-shards build` makes it, and "
                "-c OVERLAY puts another in its place (as recipes/overlays/own_data.yaml does)"
            )


def _unmatched(recipe: dict[str, Any], reference: dict[str, Any]) -> tuple[str, ...]:
    """What of the data differs from the reference's, such as ``train_samples 100 (reference: 1000)``."""
    found = []
    for key, there, here in changes(reference["data"], recipe["data"]):
        name = key.removeprefix("init_args.")
        if name.rpartition(".")[2] not in _OF_THE_MACHINE:
            found.append(f"{name} {shown(here)} (reference: {shown(there)})")
    return tuple(found)


def choose(cells: Sequence[Cell], only: Sequence[str]) -> list[Cell]:
    """The cells that some words name: ``lora`` or ``lora/0``; all without any.

    Raises:
        UserError: A word names none.
    """
    for word in only:
        if not any(word in (cell.name, cell.key) for cell in cells):
            known = {cell.name for cell in cells} | {cell.key for cell in cells}
            raise UserError(f"--only {word}: there is no such cell{nearest(word, known)}")
    return [cell for cell in cells if not only or {cell.name, cell.key} & set(only)]


def _write(path: Path, content: dict[str, Any]) -> Path | None:
    if not content:
        return None
    path.write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True), encoding="utf-8")
    return path


def share(cell: Cell) -> str:
    """Share of the parameters that learns; a specialist has none to set it against."""
    if cell.specialist:
        return FROM_SCRATCH
    return f"{cell.learning / cell.parameters:.2%}" if cell.parameters else UNKNOWN
