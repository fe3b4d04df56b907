"""What can be read and with which options, as the readers themselves document it."""

from __future__ import annotations

import inspect
import json
import re
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from data_shards.readers.base import FOLDER, known_readers


@dataclass(frozen=True)
class Format:
    """One reader.

    Attributes:
        suffixes: Endings of the names of its files; folders and files without an ending in words.
        reads: ``"images and label maps"`` or ``"drawings"``.
        summary: First line of its documentation.
        options: (name, values, meaning) of each option; the first value is the default.
    """

    suffixes: tuple[str, ...]
    reads: str
    summary: str
    options: tuple[tuple[str, str, str], ...]


def formats() -> list[Format]:
    """Return all readers, in the order of their first suffix."""
    found = []
    pictures, drawings = known_readers()
    tables: dict[str, Mapping[str, Callable[..., object]]] = {"images and label maps": pictures, "drawings": drawings}
    for reads, readers in tables.items():
        for reader in dict.fromkeys(readers.values()):
            suffixes = sorted(suffix for suffix, other in readers.items() if other is reader)
            words = {FOLDER: "a folder", "": "no ending"}
            text = inspect.getdoc(reader) or ""
            options = tuple(
                _option(item, text) for item in list(inspect.signature(reader, eval_str=True).parameters.values())[2:]
            )
            summary = " ".join(text.partition("\n\n")[0].split())
            found.append(Format(tuple(words.get(suffix, suffix) for suffix in suffixes), reads, summary, options))
    return sorted(found, key=lambda item: (item.reads != "images and label maps", item.suffixes))


def _option(parameter: inspect.Parameter, documentation: str) -> tuple[str, str, str]:
    meaning = re.search(rf"^    {parameter.name}: (.*?)(?=^    \w+: |\n\n|\Z)", documentation, re.MULTILINE | re.DOTALL)
    choices = [text for text in typing.get_args(parameter.annotation) if isinstance(text, str)]
    values = sorted(choices, key=lambda text: text != parameter.default) or [_as_yaml(parameter.default)]
    return parameter.name, " | ".join(values), " ".join(meaning[1].replace("``", "").split()) if meaning else ""


def _as_yaml(default: object) -> str:
    return default if isinstance(default, str) else json.dumps(default)
