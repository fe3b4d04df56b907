"""Regular expressions from files: one that could keep a processor busy for hours is refused before it is used."""

from __future__ import annotations

import functools
import math
import re
from typing import Any

from data_shards.errors import UserError
from data_shards.strict import show

_parser: Any = re._parser  # type: ignore[attr-defined]  # the tree that `re` itself compiles
_LONGEST = 500
"""Characters of a pattern."""
_KEY = 1000
"""Characters of the longest text that is searched: a sample's key."""
_MOST_WAYS = 10**9
"""Ways in which a pattern may fit a text, at most: each may have to be tried."""


@functools.lru_cache(maxsize=64)
def compile_pattern(text: str) -> re.Pattern[str]:
    """Compile a pattern with one group, which is safe to search in a sample's key.

    Raises:
        UserError: It is no such pattern.
    """
    if len(text) > _LONGEST:
        raise UserError(f"the pattern has {len(text)} characters, more than {_LONGEST}")
    try:
        pattern = re.compile(text)
        tree = list(_parser.parse(text))
        ways = _sequence(tree) * (1 if tree and str(tree[0][0]) == "AT" else _KEY)
    except (re.error, RecursionError, OverflowError) as error:
        raise UserError(f"{show(text)} is no regular expression ({error})") from error
    if pattern.groups != 1:
        raise UserError(f"the pattern {show(text)} needs one group, as in '^(P[0-9]+)_'; it has {pattern.groups}")
    if ways > _MOST_WAYS:
        hint = "use fewer *, + and ?, none inside another, no references and no lookarounds"
        raise UserError(f"the pattern {show(text)} could take hours: {hint}")
    return pattern


def _sequence(items: Any) -> float:
    return math.prod(_ways(str(kind), value) for kind, value in items)


def _ways(kind: str, value: Any) -> float:
    """Return in how many ways a part of a pattern may fit at one place; infinity where it is not known."""
    if kind in ("LITERAL", "NOT_LITERAL", "ANY", "IN", "AT", "CATEGORY"):
        return 1
    if kind == "SUBPATTERN":
        return _sequence(value[3])
    if kind == "BRANCH":
        return sum(map(_sequence, value[1]))
    if kind in ("MAX_REPEAT", "MIN_REPEAT"):
        least, most, item = int(value[0]), min(int(value[1]), _KEY), _sequence(value[2])
        if item == 1:
            return max(1, most - least + 1)
        return sum(item**count for count in range(least, most + 1)) if most <= 3 else math.inf
    return math.inf  # references to groups, looks ahead and back
