"""JSON and plain values from files that may be damaged or hostile."""

from __future__ import annotations

import json
import math
import re
from typing import Any, NoReturn

from data_shards.errors import UserError

_TEXT = re.compile("[^\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]{0,1000}")
"""Nothing that breaks a line, a terminal or UTF-8."""
_KEY = re.compile("[!-~](?:[ -~]{0,998}[!-~])?")


def read_json(data: bytes, limit: int) -> dict[str, Any]:
    """Parse a JSON object strictly: UTF-8, no key twice, no NaN, at most `limit` bytes.

    Raises:
        UserError: It is something else; the message does not name the file.
    """
    if len(data) > limit:
        raise UserError(f"it has {len(data)} bytes, more than {limit}")
    try:
        content = _JSON.decode(data.decode("utf-8"))
    except UserError:
        raise
    except Exception as error:  # ValueError of many kinds, RecursionError, MemoryError
        raise UserError(f"it is no JSON ({type(error).__name__}: {error})") from error
    if not isinstance(content, dict):
        raise UserError("it is no JSON object")
    return content


def is_text(value: Any) -> bool:
    """Whether a value is text on one line, of at most 1000 characters."""
    return isinstance(value, str) and _TEXT.fullmatch(value) is not None


def is_key(value: Any) -> bool:
    """Whether a value can be a sample's key: printable ASCII, and safe as a relative path."""
    if not isinstance(value, str) or not _KEY.fullmatch(value):
        return False
    return not value.startswith("/") and "\\" not in value and ".." not in value.split("/")


def is_count(value: Any) -> bool:
    """Whether a value is a whole number from 0 to 2^40."""
    return type(value) is int and 0 <= value <= 2**40


def is_length(value: Any) -> bool:
    """Whether a value is a positive finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def is_tuple(value: Any, length: int) -> bool:
    """Whether a value is a tuple of a length."""
    return isinstance(value, tuple) and len(value) == length


def show(value: Any) -> str:
    """Return a short text of any value, safe to print."""
    text = f"'{value}'" if is_text(value) else ascii(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise UserError(f"it has the key {show(twice)} twice")
    return content


def _refuse(text: str) -> NoReturn:
    raise UserError(f"it holds {text}, which is no number")


_JSON = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_refuse)
