"""What loggers are told of a run besides its figures: decided fields, none of which is a patient's or a machine's.

Told are the fields of ``run.json`` in `RECORD`, of the data each split's hash and size, and of the recipe every number
and those strings that can be no path and no name of data. Not told are folders and files (data, weights, the run's
own), hosts, users, the command line, the environment, keys of samples, and what `cluster` and the loggers are set to.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

RECORD = (
    *("name", "question", "caveat", "git_commit", "git_dirty", "versions", "model", "tuning", "precision", "hardware"),
    *("world_size", "seed"),
)
"""Fields of ``run.json`` that are told."""
DATA = ("index_sha256", "samples")
"""Fields of each split that are told."""
RECIPE = ("seed_everything", "model", "data", "trainer", "checkpoint")
"""Keys of a recipe that are told."""
WITHHELD = "(not told)"
"""In the place of a value."""
_LOGGERS = "logger"
_DATA_WORDS = ("class_path", "kinds", "by", "clip_anchor", "on_damage")
"""Keys below `data` whose values are words of ours; any other string there may name a data set's folder."""
_FILES = ("weights", "tokenizer", "tracker", "ckpt_path")
"""Keys that name a model of a hub or a file."""
_SLASHES = ("monitor",)
"""Keys whose values have a slash and are no paths."""


def told(record: Mapping[str, Any], recipe: Mapping[str, Any]) -> dict[str, Any]:
    """What every logger is told.

    Args:
        record: Content of ``run.json``.
        recipe: The resolved recipe.
    """
    data = {split: {name: found[name] for name in DATA} for split, found in record["data"].items()}
    sections = {name: _decided(recipe[name], name, name == "data") for name in RECIPE if name in recipe}
    return {**{name: record[name] for name in RECORD}, "data": data, "recipe": sections}


def _decided(node: Any, key: str, of_data: bool) -> Any:
    if isinstance(node, Mapping):
        return {name: _decided(child, str(name), of_data) for name, child in node.items() if name != _LOGGERS}
    if isinstance(node, list | tuple):
        return [_decided(child, key, of_data) for child in node]
    if not isinstance(node, str):
        return node
    return node if _harmless(node, key, of_data) else WITHHELD


def _harmless(value: str, key: str, of_data: bool) -> bool:
    """Whether a string can be told."""
    if of_data:
        return key in _DATA_WORDS
    if key in _FILES:  # a model of a hub, such as facebook/sam3, and no folder of that name
        return bool(re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", value)) and not Path(value).exists()
    return key in _SLASHES or not re.search(r"[/\\~]", value)
