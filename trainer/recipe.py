"""Recipes: read with care, refused with one clear line.

A recipe may name classes only from allowed packages: whoever sends a recipe does not thereby send code.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from data_shards.errors import UserError, nearest

ALLOWED_PACKAGES = ("trainer", "data_shards", "lightning", "torch", "torchmetrics")
"""Where the classes of a recipe may come from."""

CLASS_HOMES = (
    "trainer.modules",
    "trainer.models",
    "trainer.tuning",
    "trainer.losses",
    "trainer.prompts",
    "trainer.callbacks",
    "data_shards.datamodule",
)
"""Where a misspelt class is looked for."""


def check_recipe(path: str | Path) -> str:
    """Check a recipe before anything that it names is imported.

    Args:
        path: The YAML file.

    Returns:
        The recipe's opening comment, with its question and launch command.

    Raises:
        UserError: The file is missing or no YAML mapping, or names a class that is unknown or not allowed, or gives a
            class an argument that it does not have.
    """
    path = Path(path)
    try:
        text = path.read_text()
    except OSError as error:
        raise UserError(f"recipe {path}: cannot be read ({error.strerror})") from error
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark else ""
        raise UserError(f"recipe {path}: not valid YAML{where} ({getattr(error, 'problem', error)})") from error
    if not isinstance(content, dict):
        raise UserError(f"recipe {path}: expected keys such as model, data and trainer")
    for key, node in _classes(content):
        check_class(str(node["class_path"]), node.get("init_args") or {}, f"recipe {path}: {key}")
    for key, value in flat(content).items():
        if isinstance(value, str) and not key.endswith("class_path"):
            _check_string(value, key, f"recipe {path}: {key}")
    return _opening(text)


def _check_string(value: str, key: str, where: str) -> None:
    """Refuse what the parser would import, or read as a part of the recipe: it takes both where it wants an object."""
    if key.rpartition(".")[2] in ("weights", "ckpt_path"):
        return
    if Path(value).is_file():
        raise UserError(f"{where}: a recipe is one file; write here what is in {value}, or give it with -c")
    package = names_something_in(value)
    if package is not None:
        _check_package(package, f"{where}: '{value}'")


def _check_package(package: str, what: str) -> None:
    if package not in ALLOWED_PACKAGES:
        raise UserError(
            f"{what} is outside the allowed packages ({', '.join(ALLOWED_PACKAGES)}); a recipe runs no other code"
        )


def names_something_in(value: str) -> str | None:
    """The package that a value names something in by dotted path; None if there is none. Nothing is imported."""
    if not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", value) or Path(value).exists():
        return None
    package = value.partition(".")[0]
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        return None
    return package if spec is not None and spec.origin is not None else None  # a mere folder has no origin


def check_class(class_path: str, arguments: Mapping[str, Any], where: str) -> None:
    """Check that a class is allowed, exists, and takes these arguments.

    Args:
        class_path: Full dotted path.
        arguments: Its ``init_args``.
        where: File and key, put before the message.

    Raises:
        UserError: It is not so.
    """
    package, _, _ = class_path.partition(".")
    module_name, _, name = class_path.rpartition(".")
    if not module_name:
        raise UserError(f"{where}: class '{class_path}' needs its full dotted path{nearest_class(class_path)}")
    _check_package(package, f"{where}: class '{class_path}'")
    found = _find(module_name, name)
    if found is None:
        raise UserError(f"{where}: there is no class '{class_path}'{nearest_class(class_path)}")
    accepted = _accepted(found)
    for argument in arguments:
        if accepted is not None and argument not in accepted:
            raise UserError(f"{where}: {name} has no argument '{argument}'{nearest(argument, accepted)}")


def nearest_class(class_path: str) -> str:
    """A hint at the class that was probably meant."""
    known = {}
    for home in CLASS_HOMES:
        module = importlib.import_module(home)
        for name in getattr(module, "__all__", None) or _own_classes(module):
            known[f"{home}.{name}"] = name
    by_name = nearest(class_path.rpartition(".")[2], known.values())
    for full, name in known.items():
        if by_name.endswith(f"'{name}'?"):
            return f"; did you mean '{full}'?"
    return f"; known: {', '.join(sorted(known))}"


def flat(node: Any, key: str = "") -> dict[str, Any]:
    """Every value of a recipe by its dotted key; lists are numbered."""
    if isinstance(node, Mapping):
        items: list[tuple[str, Any]] = [(str(name), child) for name, child in node.items()]
    elif isinstance(node, list):
        items = [(str(number), child) for number, child in enumerate(node)]
    else:
        return {key: node}
    found: dict[str, Any] = {}
    for name, child in items:
        found |= flat(child, f"{key}.{name}" if key else name)
    return found


def dotted_keys(node: Any, key: str = "") -> Iterator[str]:
    """Every key of a recipe at any depth, dotted."""
    if isinstance(node, Mapping):
        for name, child in node.items():
            dotted = f"{key}.{name}" if key else str(name)
            yield dotted
            yield from dotted_keys(child, dotted)


def _classes(node: Any, key: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every node with a class_path, at any depth, with its dotted key."""
    if isinstance(node, Mapping):
        if "class_path" in node:
            yield key, node
        for name, child in node.items():
            yield from _classes(child, f"{key}.{name}" if key else str(name))
    elif isinstance(node, list):
        for index, child in enumerate(node):
            yield from _classes(child, f"{key}[{index}]")


def _find(module_name: str, name: str) -> Any:
    """The class, or None; only modules that exist below an allowed package are imported."""
    try:
        found = getattr(importlib.import_module(module_name), name, None)
    except ModuleNotFoundError:
        return None
    return found if inspect.isclass(found) else None


def _accepted(found: type) -> set[str] | None:
    """Names of a class's arguments; None if it takes any."""
    names: set[str] = set()
    for cls in inspect.getmro(found):
        if "__init__" not in vars(cls):
            continue
        parameters = inspect.signature(vars(cls)["__init__"]).parameters.values()
        names |= {p.name for p in parameters if p.name != "self" and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            return names
    return None


def _own_classes(module: Any) -> list[str]:
    return [n for n, v in vars(module).items() if inspect.isclass(v) and v.__module__ == module.__name__]


def _opening(text: str) -> str:
    match = re.match(r"(?:#[^\n]*\n)+", text)
    return match.group() if match else ""
