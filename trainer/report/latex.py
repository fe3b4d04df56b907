"""What tables in LaTeX have in common: their lines, with words that may hold any sign."""

from __future__ import annotations

from collections.abc import Sequence

_SIGNS = {
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
    **{"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "\u00a0": "~", "–": "--"},
    **{"<": "$<$", ">": "$>$", "|": "$|$", "−": "$-$", "±": r"$\pm$", "·": r"$\cdot$", "∞": r"$\infty$"},
    **{"*": "$^{*}$", "†": r"$^{\dagger}$", "↓": r"$^{\downarrow}$"},
}


def latex_line(cells: Sequence[str]) -> str:
    """A line of a table, its cells escaped."""
    return " & ".join(map(escaped, cells)) + r" \\"


def escaped(words: str) -> str:
    """Words as LaTeX shows them."""
    return "".join(_SIGNS.get(sign, sign) for sign in words)
