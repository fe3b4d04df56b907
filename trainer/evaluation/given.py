"""A protocol out of the command line: models by their folders, data by theirs, one way of asking or several."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import yaml

from data_shards.errors import UserError
from trainer.evaluation.protocol import Kind, Loaded, ModelSpec, Protocol, SetSpec
from trainer.recipe import check_recipe
from trainer.run import Run

Prompt = Literal["box", "point", "mask", "text"]
COMMAND = Path("trainer evaluate")
"""What messages name instead of a file."""
QUESTION = "How well do these models answer the same cases?"
_CHECKPOINTS = "checkpoints"


@dataclass(frozen=True)
class Asking:
    """How every set is asked; see `SetSpec`, whose keys these are."""

    kind: Kind = "2d"
    margin: int = 0
    objects: Literal["target", "term"] = "target"
    lesions: bool = False
    noise: tuple[float, ...] = ()
    negatives: int = 0


def given_protocol(
    models: Sequence[str],
    data: Sequence[str],
    prompts: Sequence[Prompt],
    asking: Asking,
    by: Sequence[str] | None = None,
) -> Loaded:
    """Put together what the command line names; no model and no shard is opened.

    Args:
        models: Runs, checkpoints of runs, or recipes, each alone or as ``NAME=PATH``; the others are compared with the
            first.
        data: Folders of shards.
        prompts: Each makes a set of each folder.
        asking: How each of them is asked.
        by: See `Protocol.by`.

    Raises:
        UserError: A path is none of these, two models have one name, or a value is wrong.
    """
    specs: dict[str, ModelSpec] = {}
    for one in models:
        name, spec = _model(one)
        if name in specs:
            raise UserError(f"{COMMAND}: two models are called '{name}': give each a name, as in NAME={one}")
        specs[name] = spec
    titles = _titles(data)
    keys = {**asdict(asking), "noise": list(asking.noise)}
    try:
        sets = [
            SetSpec(folder, name=title if len(prompts) == 1 else f"{title} by {prompt}", prompt=prompt, **keys)
            for folder, title in zip(data, titles, strict=True)
            for prompt in prompts
        ]
        protocol = Protocol(list(specs), sets, by=None if by is None else list(by))
    except UserError as error:
        raise UserError(f"{COMMAND}: {error}") from None
    return Loaded(COMMAND, protocol, specs, QUESTION, "", _text(specs, sets, by))


def _text(models: Mapping[str, ModelSpec], sets: Sequence[SetSpec], by: Sequence[str] | None) -> str:
    """The same as a file: what is as it would be without is left out."""
    named = {name: {key: value for key, value in asdict(spec).items() if value} for name, spec in models.items()}
    content = {"models": named, "sets": [{key: value for key, value in asdict(one).items() if value} for one in sets]}
    content |= {"by": list(by)} if by is not None else {}
    return f"# {QUESTION}\n" + yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def _model(given: str) -> tuple[str, ModelSpec]:
    """Name and origin of a model."""
    named = re.fullmatch(r"(?P<name>[^=/]+)=(?P<path>.+)", given)
    path = Path(named["path"] if named else given)
    name = named["name"] if named else ""
    if path.suffix in (".yaml", ".yml") and path.is_file():
        check_recipe(str(path))
        return name or path.stem, ModelSpec(recipe=str(path))
    for root in path.parents:  # a checkpoint may be a file or a folder of shards
        if root.name == _CHECKPOINTS and path.exists():
            run = Run.existing(root.parent)
            return name or f"{root.parent.name} {path.stem}", ModelSpec(run=str(run.root), checkpoint=str(path))
    if not path.exists():
        raise UserError(f"{COMMAND}: {path}: there is no such run, checkpoint or recipe")
    if path.is_file():
        raise UserError(
            f"{COMMAND}: {path}: no checkpoint in the folder of its run, which says what model it is of: give the run, "
            "or a protocol with a class_path (recipes/evaluation has some)"
        )
    Run.existing(path)
    return name or path.resolve().name, ModelSpec(run=str(path))


def _titles(folders: Sequence[str]) -> list[str]:
    """The last parts of paths, as many as tell them apart."""
    parts = [Path(folder).parts for folder in folders]
    for count in range(1, max(map(len, parts)) + 1):
        titles = ["/".join(part[-count:]) for part in parts]
        if len(set(titles)) == len(titles):
            return titles
    raise UserError(f"{COMMAND}: --data names one folder twice")
