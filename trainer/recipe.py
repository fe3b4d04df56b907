"""Recipes: read with care, refused with one clear line.

A recipe may name classes only from allowed packages: whoever sends a recipe does not thereby send code.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import itertools
import pydoc
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from data_shards.errors import UserError, nearest
from trainer.cluster import cluster_of

ALLOWED_PACKAGES = ("trainer", "data_shards", "lightning", "torch", "torchmetrics")
"""Where the classes of a recipe may come from."""

CLASS_HOMES = (
    "trainer.modules",
    "trainer.models",
    "trainer.tuning",
    "trainer.losses",
    "trainer.prompts",
    "trainer.callbacks",
    "trainer.distributed",
    "trainer.loggers",
    "data_shards.datamodule",
)
"""Where a misspelt class is looked for."""
_SECRET = re.compile(r"(?i)(^|[._-])(api_?key|access_?key|password|passwd|secret|token)$")
"""Keys of what is nobody else's business."""


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
    except UnicodeDecodeError as error:
        raise UserError(f"recipe {path}: no text: a recipe is a YAML file") from error
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark else ""
        raise UserError(f"recipe {path}: not valid YAML{where} ({getattr(error, 'problem', error)})") from error
    if not isinstance(content, dict):
        raise UserError(f"recipe {path}: expected keys such as model, data and trainer")
    if content.get("cluster") is not None:
        cluster_of(content["cluster"], f"recipe {path}")
    # paths and lines of shell in there are no part of the training
    check_content({name: node for name, node in content.items() if name != "cluster"}, f"recipe {path}: ")
    for name in ("trainer", "checkpoint"):
        if not isinstance(content.get(name, {}), dict):
            raise UserError(f"recipe {path}: {name}: expected keys below it, not {content[name]!r}")
    return _opening(text)


def check_content(content: Any, where: str, key: str = "") -> None:
    """Check the keys, classes and strings of a recipe or of a part of one.

    Args:
        content: What was read from YAML.
        where: The file, put before the message.
        key: Dotted key of the part.

    Raises:
        UserError: A key is no text, or a class is unknown, not allowed, or given an argument that it does not have.
    """
    _check_keys(content, f"{where}{key}")
    if not key and isinstance(content, Mapping) and content.get("config") is not None:
        raise UserError(f"{where}config: a recipe names no other recipe: give them one after another, -c ONE -c OTHER")
    for place, value in flat(content, key).items():
        if value is not None and _SECRET.search(place):
            raise UserError(
                f"{where}{place}: a recipe holds no keys and passwords, for every run keeps it: take it out, and put "
                "it into the environment (Weights & Biases: WANDB_API_KEY)"
            )
    for place, node in _classes(content, key):
        _check_node(node, f"{where}{place}")
    for place, value in flat(content, key).items():
        if isinstance(value, str) and not place.endswith("class_path"):
            _check_string(value, place, f"{where}{place}")


def _check_keys(node: Any, where: str) -> None:
    for child in node.values() if isinstance(node, Mapping) else node if isinstance(node, list) else ():
        _check_keys(child, where)
    for name in node if isinstance(node, Mapping) else ():
        if not isinstance(name, str):
            raise UserError(f"{where.rstrip(': ')}: the key {name!r} is no text: put it in quotes, or mend it")


def _check_node(node: Mapping[str, Any], where: str) -> None:
    """Check a class and its arguments."""
    class_path, arguments = node["class_path"], node.get("init_args")
    if not isinstance(class_path, str):
        raise UserError(f"{where}: class_path is a class's full dotted path, not {class_path!r}")
    if arguments is not None and not isinstance(arguments, Mapping):
        raise UserError(f"{where}: init_args are names with values, not {arguments!r}")
    check_class(class_path, arguments or {}, where)


def _check_string(value: str, key: str, where: str) -> None:
    """Refuse what the parser would import, or read as a part of the recipe: it takes both where it wants an object."""
    if key.rpartition(".")[2] in ("weights", "tokenizer", "tracker", "ckpt_path"):
        return
    if _stat(value, Path.is_file):
        raise UserError(f"{where}: a recipe is one file; write here what is in {value}, or give it with -c")
    package = names_something_in(value)
    if package is not None:
        _check_package(package, f"{where}: '{value}'")
        if value.rpartition(".")[2][0].isupper():
            check_class(value, {}, where)
        elif callable(pydoc.locate(value)):  # found as the parser finds it
            raise UserError(f"{where}: '{value}' is a function: a recipe names classes, and calls nothing else")


def _check_package(package: str, what: str) -> None:
    if package not in ALLOWED_PACKAGES:
        raise UserError(
            f"{what} is outside the allowed packages ({', '.join(ALLOWED_PACKAGES)}); a recipe runs no other code"
        )


def names_something_in(value: str) -> str | None:
    """The package that a value names something in by dotted path; None if there is none. Nothing is imported."""
    if not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", value) or _stat(value, Path.exists):
        return None
    package = value.partition(".")[0]
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        return None
    return package if spec is not None and spec.origin is not None else None  # a mere folder has no origin


def _stat(value: str, ask: Callable[[Path], bool]) -> bool:
    """Ask about a path; a text that can be none, being too long for one, is not there."""
    try:
        return ask(Path(value))
    except (OSError, ValueError):
        return False


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
    if inspect.isabstract(found):
        raise UserError(f"{where}: class '{class_path}' is what its kinds share: name one{_known_classes(class_path)}")
    accepted = _accepted(found)
    for argument in arguments:
        if accepted is not None and argument not in accepted:
            raise UserError(f"{where}: {name} has no argument '{argument}'{nearest(argument, accepted)}")


def nearest_class(class_path: str) -> str:
    """A hint at the class that was probably meant."""
    known = {f"{home}.{name}": name for home in CLASS_HOMES for name in _classes_of(home)}
    by_name = nearest(class_path.rpartition(".")[2], known.values())
    for full, name in known.items():
        if by_name.endswith(f"'{name}'?"):
            return f"; did you mean '{full}'?"
    return _known_classes(class_path)


def _known_classes(class_path: str) -> str:
    """The classes beside a misspelt one; where that lies nowhere, where classes lie."""
    home = class_path.rpartition(".")[0]
    if home in CLASS_HOMES:
        return f"; known: {', '.join(sorted(_classes_of(home)))}"
    return f"; classes lie in {', '.join(CLASS_HOMES)}"


def _classes_of(home: str) -> list[str]:
    """Names of the classes of a module that a recipe can name."""
    module = importlib.import_module(home)
    own = (name for name, found in vars(module).items() if inspect.isclass(found) and found.__module__ == home)
    names = getattr(module, "__all__", None) or own
    classes = {name: _find(home, name, missing_packages=True) for name in names}
    return [name for name, known in classes.items() if known is not None and not inspect.isabstract(known)]


def explain(message: str, keys: set[str], recipes: list[str]) -> str:
    """Make one line with file and hint out of a parser's message.

    Args:
        message: What the parser says, over several lines.
        keys: Every dotted key that there is.
        recipes: The recipes that were read: the file with the offending key is named.
    """
    text = " ".join(message.split())
    inner = re.search(r"unknown key '(.*?)'(; (did you mean '[^']*'\?|known: [\w, ]+))?", text)
    if inner and f"key '{inner.group(1)}': " not in text:  # an inner parser explained it, and outer ones wrapped that
        return f"{_file_with(inner.group(1), recipes)}{inner.group()}"
    named = re.search(r'Parser key "([\w.]+)"', text)
    # of a list in the place of one object it is said first that it is none, which nobody meant
    no_object = r"Not a valid subclass of \w+ Subclass types .*? \(implicit class_path\) - "
    text = re.sub(rf"{no_object}(?!Expected a |Not a )", "", text)
    # of a union's complaints, wrapped in those of outer unions, the innermost and first says what is wrong
    text = re.split(r" - Expected a <class '(?:bool|NoneType)'>", text.rsplit("Errors: - ", 1)[-1])[0]
    text = text.split(" - unknown key ")[0].split(" Subclass types expect")[0].split(" Given value type: ")[0]
    text = re.sub(r"(?<=\S) - Not a valid subclass of .*", "", text)
    explained = re.search(r"(recipe \S+: )?key '[\w.]+': .*", text)
    if explained:
        return explained.group()
    unknown = re.search(r"(?:Key|[Oo]ption|[Uu]nrecognized arguments:|nested key)\s*['\"]?(?:--)?([\w.]+)", text)
    if unknown and re.search(r"not expected|not accepted|[Uu]nrecognized|does not accept", text):
        key = unknown.group(1)
        if "nrecognized arguments" in text:  # on the command line, whatever recipes have
            recipes = []
        meant = sorted(known for known in keys if known.endswith(f".{key}"))
        if meant or key in keys:
            return f"unknown key '{key}'" + (f"; did you mean '{meant[0]}'?" if meant else ": another command takes it")
        parent, _, last = key.rpartition(".")
        siblings = _children(keys, parent)
        if not siblings:  # the mistake is further up
            last, siblings = key.split(".")[0], _children(keys, "")
        return f"{_file_with(key, recipes)}unknown key '{key}'{nearest(last, siblings)}"
    missing = re.search(r"the following arguments are required: (?:\w+\.)?(\w+)$", text)
    if missing and not named:
        where = f"recipe {' + '.join(recipes)}: " if recipes else ""
        return f"{where}'{missing.group(1)}' is missing: give a recipe that has it, with -c RECIPE"
    plain = _plain(re.sub(r'^Parser key "[\w.]+": ', "", text))
    return f"{_file_with(named.group(1), recipes)}key '{named.group(1)}': {plain}" if named else plain


def refuse_empty(recipes: list[str], known: Callable[[str], bool], keys: set[str]) -> None:
    """Refuse unknown keys with nothing below them, which the parser drops without a word.

    Args:
        recipes: Those that were parsed, in order.
        known: Whether what they were parsed to has a dotted key.
        keys: Every dotted key that there is outside of classes' own arguments.

    Raises:
        UserError: There is one.
    """
    contents = [yaml.safe_load(Path(recipe).read_text()) for recipe in recipes]
    for number, (recipe, content) in enumerate(zip(recipes, contents, strict=True)):
        later = {key for other in contents[number + 1 :] for key in dotted_keys(other)}
        for key in _empty(content or {}):
            places = list(itertools.accumulate(key.split("."), "{}.{}".format))
            gone = any(f"{place}.class_path" in later for place in places)  # the class that had it, perhaps
            if places[0] == "cluster" or known(key) or gone:
                continue
            place = next(place for place in places if not known(place))
            parent, _, last = place.rpartition(".")
            hint = ": another command takes it" if place in keys else nearest(last, _children(keys, parent))
            raise UserError(f"recipe {recipe}: unknown key '{place}'{hint}")


_WORDS = {
    **dict.fromkeys(("<class '", "'>", "typing."), ""),
    "Expected a collections.abc.Sequence": "Expected a list",
    "Expected a collections.abc.Mapping": "Expected names with values",
    "Expected a int": "Expected an int",
    "Not a valid subclass of ": "Expected a class_path, with its init_args, of a ",
}
"""What the parser says, and what it means."""


def _plain(text: str) -> str:
    """A parser's words for types and classes as a person would write them."""
    for said, meant in _WORDS.items():
        text = text.replace(said, meant)
    named = re.search(r"Expected a dot import path string: ?(\S*)", text)
    words = re.match(r"Expected a Literal\[(.*?)\] - ", text)
    if named and words:  # one of some words, or else a class
        known = words[1].replace("'", "").split(", ")
        return f"there is no '{named[1]}'{nearest(named[1], known)}"
    return f"there is no class '{named[1]}'{nearest_class(named[1])}" if named else text


def _empty(node: Mapping[str, Any], key: str = "") -> Iterator[str]:
    """Dotted keys with nothing below them; a class may well be given no arguments."""
    for name, child in node.items():
        if isinstance(child, Mapping) and not (name == "init_args" and not child and "class_path" in node):
            yield from _empty(child, f"{key}{name}.") if child else [f"{key}{name}"]


def _children(keys: set[str], parent: str) -> set[str]:
    prefix = f"{parent}." if parent else ""
    return {key.removeprefix(prefix).split(".")[0] for key in keys if key.startswith(prefix)} - {"help"}


def _file_with(key: str, recipes: list[str]) -> str:
    """The last recipe that has a dotted key, or one that ends so, as ``recipe FILE: ``."""
    for recipe in reversed(recipes):
        content = yaml.safe_load(Path(recipe).read_text())
        # inside of lists, whose items have numbers, as well: `callbacks.0.init_args.shifts.1` is in `shifts`
        inside = (re.sub(r"(\.\d+)+$", "", place) for place in flat(content))
        if any(name == key or name.endswith(f".{key}") for name in {*dotted_keys(content), *inside}):
            return f"recipe {recipe}: "
    return ""


def flat(node: Any, key: str = "") -> dict[str, Any]:
    """Every value of a recipe by its dotted key; lists are numbered."""
    if isinstance(node, Mapping):
        items: list[tuple[str, Any]] = [(str(name), child) for name, child in node.items()]
    elif isinstance(node, list):
        items = [(str(number), child) for number, child in enumerate(node)]
    else:
        return {key: node}
    parts = (flat(child, f"{key}.{name}" if key else name) for name, child in items)
    return {place: value for part in parts for place, value in part.items()}


def dotted_keys(node: Any, key: str = "") -> Iterator[str]:
    """Every key of a recipe at any depth, dotted; what is inside of a list is a value."""
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


def _find(module_name: str, name: str, missing_packages: bool = False) -> Any:
    """The class, or None; only modules that exist below an allowed package are imported.

    Raises:
        UserError: It needs a package that is not installed, unless that is no matter.
    """
    try:
        found = getattr(importlib.import_module(module_name), name, None)
    except ModuleNotFoundError:
        return None
    except UserError:
        if not missing_packages:
            raise
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


def _opening(text: str) -> str:
    match = re.match(r"(?:#[^\n]*\n)+", text)
    return match.group() if match else ""
