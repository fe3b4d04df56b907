"""What tables in LaTeX have in common: their lines, with words that may hold any sign.

What is written compiles under pdflatex with its own fonts: no encoding, and no package for signs, is asked for.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

_SIGNS = {
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
    **{"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "\u00a0": "~", "–": "--"},
    **{"<": "$<$", ">": "$>$", "|": "$|$", "−": "$-$", "±": r"$\pm$", "·": r"$\cdot$", "∞": r"$\infty$"},
    **{"*": "$^{*}$", "†": r"$^{\dagger}$", "‡": r"$^{\ddagger}$"},
    **{"↓": r"$^{\downarrow}$", "↑": r"$^{\uparrow}$", "→": r"$\rightarrow$", "←": r"$\leftarrow$"},
    **{"≥": r"$\geq$", "≤": r"$\leq$", "≠": r"$\neq$", "≈": r"$\approx$", "×": r"$\times$", "÷": r"$\div$"},
    **{"√": r"$\surd$", "µ": r"$\mu$", "°": r"$^{\circ}$", "′": "$'$", "″": "$''$", "½": "$1/2$", "¼": "$1/4$"},
    **{"—": "---", "…": r"\ldots{}", "‘": "`", "’": "'", "“": "``", "”": "''", "•": r"$\bullet$", "\u202f": r"\,"},
    **{"ß": r"\ss{}", "ø": r"\o{}", "Ø": r"\O{}", "æ": r"\ae{}", "Æ": r"\AE{}", "œ": r"\oe{}", "Œ": r"\OE{}"},
    **{"ł": r"\l{}", "Ł": r"\L{}", "ı": r"\i{}", "§": r"\S{}", "¶": r"\P{}", "©": r"\copyright{}", "£": r"\pounds{}"},
}
_ACCENTS = {
    **{"\u0300": "`", "\u0301": "'", "\u0302": "^", "\u0303": "~", "\u0304": "=", "\u0306": "u", "\u0307": "."},
    **{"\u0308": '"', "\u030a": "r", "\u030b": "H", "\u030c": "v", "\u0327": "c"},
}
"""Signs that stand on or under the letter before them, and what LaTeX calls these."""
_GREEK = {
    *("ALPHA", "BETA", "GAMMA", "DELTA", "EPSILON", "ZETA", "ETA", "THETA", "IOTA", "KAPPA", "LAMDA", "MU", "NU", "XI"),
    *("OMICRON", "PI", "RHO", "SIGMA", "TAU", "UPSILON", "PHI", "CHI", "PSI", "OMEGA"),
}
_GREEK_CAPITALS = ("GAMMA", "DELTA", "THETA", "LAMDA", "XI", "PI", "SIGMA", "UPSILON", "PHI", "PSI", "OMEGA")
"""Those that look like no Latin letter."""


def latex_line(cells: Sequence[str]) -> str:
    """A line of a table, its cells escaped; one that begins with a bracket is no option of the line before it."""
    first, *rest = map(escaped, cells)
    return " & ".join(["{}" + first if first.startswith("[") else first, *rest]) + r" \\"


def escaped(words: str) -> str:
    """Words as LaTeX shows them; a sign that it has no letter for stands as its number, such as ``[U+4E2D]``."""
    return "".join(map(_sign, unicodedata.normalize("NFC", words)))


def _sign(sign: str) -> str:
    if sign in _SIGNS:
        return _SIGNS[sign]
    if sign.isspace():
        return " "
    if " " < sign <= "~":
        return sign
    return _accented(sign) or _greek(sign) or f"[U+{ord(sign):04X}]"


def _accented(sign: str) -> str:
    """A Latin letter with its accent, or a raised or lowered digit; nothing if it is neither."""
    kind, _, parts = unicodedata.decomposition(sign).rpartition("> ")
    letters = "".join(chr(int(part, 16)) for part in parts.split())
    if kind in ("<super", "<sub") and letters.isascii() and letters.isalnum():
        return f"${'^' if kind == '<super' else '_'}{{{letters}}}$"
    if not kind and len(letters) == 2 and letters[0].isascii() and letters[1] in _ACCENTS:
        return f"\\{_ACCENTS[letters[1]]}{{{letters[0]}}}"
    return ""


def _greek(sign: str) -> str:
    """A Greek letter without accents; nothing if it is none."""
    alphabet, _, name = unicodedata.name(sign, "").partition(" LETTER ")
    if alphabet == "GREEK SMALL" and name.isalpha():
        return "o" if name == "OMICRON" else f"$\\{_latin(name).lower()}$" if name in _GREEK else ""
    if alphabet == "GREEK CAPITAL" and name.isalpha():
        return f"$\\{_latin(name).capitalize()}$" if name in _GREEK_CAPITALS else _CAPITALS.get(name, "")
    return ""


_CAPITALS = {
    **{"ALPHA": "A", "BETA": "B", "EPSILON": "E", "ZETA": "Z", "ETA": "H", "IOTA": "I", "KAPPA": "K", "MU": "M"},
    **{"NU": "N", "OMICRON": "O", "RHO": "P", "TAU": "T", "CHI": "X"},
}


def _latin(name: str) -> str:
    return "lambda" if name == "LAMDA" else name
