"""From parsed YAML to dataclasses, whose fields are the schema.

jsonargparse checks and converts the plain values; this module walks the structure, so that every mistake is one line
that names the file, the dotted key and, for a misspelt name, the nearest one.
"""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml

from data_shards.errors import UserError, nearest

T = TypeVar("T")


class _Loader(yaml.SafeLoader):
    """Refuses a key that is given twice, of which YAML's own loader drops the first."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        for number, name in enumerate(names):
            if name in names[:number]:
                raise UserError(f"the key '{name}' is given twice (line {node.start_mark.line + 1} and below)")
        return super().construct_mapping(node, deep)


def load_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping.

    Raises:
        UserError: The file is missing, is not YAML, or holds something other than a mapping.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)  # noqa: S506  # it is a SafeLoader
    except FileNotFoundError:
        raise UserError(f"{path}: no such spec file") from None
    except UserError as error:
        raise UserError(f"{path}: {error}: merge the two") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not UTF-8 text: save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a mapping of keys to values, got {_show(content)}")
    return content


def from_mapping(cls: type[T], record: Any, where: str, key: str = "") -> T:
    """Build a dataclass from a mapping.

    Args:
        cls: The dataclass.
        record: What the YAML holds.
        where: The file, for messages.
        key: Dotted key of the record in the file; empty at the top.

    Raises:
        UserError: A key is unknown or missing, or a value has the wrong type or is refused by the dataclass.
    """
    place = f"{where}: {key}" if key else where
    if not isinstance(record, Mapping):
        raise UserError(f"{place}: expected a mapping of keys to values, got {_show(record)}")
    hints = typing.get_type_hints(cls)
    fields = {item.name: item for item in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for name in record:
        if name not in fields:
            raise UserError(f"{place}: unknown key '{name}'{nearest(str(name), fields)}")
    for name, item in fields.items():
        if name not in record and item.default is item.default_factory is dataclasses.MISSING:
            raise UserError(f"{place}: the key '{name}' is missing")
    values = {
        name: _value(hints[name], value, where, f"{key}.{name}" if key else name) for name, value in record.items()
    }
    try:
        return cls(**values)
    except UserError as error:
        raise UserError(f"{place}: {error}") from None


def _value(hint: Any, value: Any, where: str, key: str) -> Any:
    """Convert one value to the type of its field."""
    members = typing.get_args(hint)
    options = tuple(option for option in _options(hint) if option is not types.NoneType)
    if all(dataclasses.is_dataclass(option) for option in options):
        if value is None and types.NoneType in members:
            return None
        chosen = typing.cast(type, options[0]) if len(options) == 1 else _of_kind(options, value, where, key)
        return from_mapping(chosen, value, where, key)
    if typing.get_origin(hint) is list and dataclasses.is_dataclass(members[0]):
        if not isinstance(value, list):
            raise UserError(f"{where}: {key}: expected a list, got {_show(value)}")
        return [_value(members[0], item, where, f"{key}[{number}]") for number, item in enumerate(value)]
    return plain_value(hint, value, where, key)


def _of_kind(members: tuple[Any, ...], value: Any, where: str, key: str) -> type:
    """Return the dataclass whose `kind` the mapping names."""
    kinds = {member.kind: member for member in members}
    if not isinstance(value, Mapping) or "kind" not in value:
        raise UserError(
            f"{where}: {key}: expected a mapping with a 'kind' ({', '.join(sorted(kinds))}), got {_show(value)}"
        )
    if str(value["kind"]) not in kinds:
        raise UserError(f"{where}: {key}.kind: unknown kind '{value['kind']}'{nearest(str(value['kind']), kinds)}")
    return typing.cast(type, kinds[str(value["kind"])])


def plain_value(hint: Any, value: Any, where: str, key: str) -> Any:
    """Check and convert one value that is no dataclass.

    Args:
        hint: The type asked for.
        value: What the YAML holds.
        where: The file, for messages.
        key: Dotted key, for messages.

    Raises:
        UserError: The value has another type.
    """
    from jsonargparse import ArgumentError

    # Text would be read once more as YAML: "3" is no number, and no number is text.
    options = _options(hint)
    literal = any(typing.get_origin(option) is typing.Literal for option in options)
    refused = isinstance(value, str) and str not in options and not literal
    refused |= value is None and not {types.NoneType, Any} & set(options)  # a key without a value
    refused |= isinstance(value, Mapping) and not all(isinstance(name, str) for name in value)
    if refused and float in options and isinstance(value, str):
        try:  # YAML 1.1 takes 1e-3 for text
            return float(value)
        except ValueError:
            pass
    if not refused:
        try:
            return _parser(hint).parse_object({"value": value}).value
        except ArgumentError:
            pass
    raise UserError(f"{where}: {key}: expected {_describe(hint)}, got {_show(value)}")


@functools.cache
def _parser(hint: Any) -> Any:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=hint)
    return parser


def _options(hint: Any) -> tuple[Any, ...]:
    """Return the types that a union allows, or the one type."""
    union = isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
    return typing.get_args(hint) if union else (hint,)


def _describe(hint: Any) -> str:
    """Return a type in a user's words."""
    names = {int: "a whole number", float: "a number", str: "text (quote it)", bool: "true or false", Any: "anything"}
    if hint in names:
        return names[hint]
    members = typing.get_args(hint)
    origin = typing.get_origin(hint)
    if origin is typing.Literal:
        return "one of " + ", ".join(map(str, members))
    if origin is list:
        return f"a list, each {_describe(members[0])}"
    if origin is dict:
        return f"a mapping of names to values, each {_describe(members[1])}"
    if len(_options(hint)) > 1:
        return " or ".join(_describe(member) for member in members if member is not types.NoneType)
    return str(hint)


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
