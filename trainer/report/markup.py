"""Small pieces of HTML, and how numbers are written. Every text that comes from a run is escaped here."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

UNKNOWN = "–"
MINUS = "−"
_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


def text(content: Any) -> str:
    """Content as HTML: escaped unless it is `Markup`; nothing becomes a dash."""
    if isinstance(content, Markup):
        return content
    return UNKNOWN if content is None or content == "" else escape(str(content))


def section(title: str, *body: str, key: str = "") -> str:
    """A section with a heading; nothing without a body."""
    content = "\n".join(part for part in body if part)
    label = f' id="{escape(key)}"' if key else ""
    return f"<section{label}>\n<h2>{escape(title)}</h2>\n{content}\n</section>" if content else ""


def paragraph(content: str, style: str = "") -> str:
    """A paragraph, or nothing."""
    return f"<p{_style(style)}>{text(content)}</p>" if content else ""


def table(
    columns: Sequence[str],
    rows: Iterable[Sequence[Any]],
    *,
    label: str,
    words: Sequence[int] = (0,),
    foot: Sequence[Any] = (),
) -> str:
    """A table that scrolls within itself where it is too wide.

    Args:
        columns: Headings.
        rows: Cells, None for an unknown one.
        label: What the table shows, for who does not see it.
        words: Positions of the columns that are text; the others are numbers.
        foot: A last row that sums up.
    """
    kinds = ["" if position in words else "number" for position in range(len(columns))]

    def line(cells: Sequence[Any], tag: str = "td") -> str:
        scope = ' scope="col"' if tag == "th" else ""
        pieces = (f"<{tag}{scope}{_style(kind)}>{text(c)}</{tag}>" for c, kind in zip(cells, kinds, strict=True))
        return f"<tr>{''.join(pieces)}</tr>"

    body = "\n".join(line(row) for row in rows)
    end = f"\n<tfoot>{line(foot)}</tfoot>" if foot else ""
    name = escape(label)
    return (
        f'<div class="scroll" role="region" aria-label="{name}" tabindex="0"><table>\n'
        f"<thead>{line(columns, 'th')}</thead>\n<tbody>\n{body}\n</tbody>{end}\n</table></div>"
    )


def facts(pairs: Iterable[tuple[str, Any]]) -> str:
    """Names and values; unknown values are left out."""
    items = [(name, value) for name, value in pairs if value not in (None, "")]
    lines = "\n".join(
        f"<div{_style('wide' if len(str(value)) > 80 else '')}><dt>{escape(name)}</dt><dd>{text(value)}</dd></div>"
        for name, value in items
    )
    return f'<dl class="facts">\n{lines}\n</dl>' if items else ""


def code(content: Any) -> Markup:
    """Content as code."""
    return Markup(f"<code>{text(content)}</code>")


def score(value: float | None) -> str:
    """A score between 0 and 1: three decimals."""
    return UNKNOWN if value is None else f"{value:.3f}"


def signed(value: float | None) -> str:
    """A difference of scores: three decimals with its sign."""
    if value is None:
        return UNKNOWN
    rounded = f"{abs(value):.3f}"
    sign = "±" if float(rounded) == 0 else "+" if value > 0 else MINUS
    return sign + rounded


def interval(bounds: tuple[float, float] | None) -> str:
    """A confidence interval of a difference."""
    return UNKNOWN if bounds is None else f"{signed(bounds[0])} to {signed(bounds[1])}"


def p_value(value: float | None) -> str:
    """``p < 0.001`` or two significant digits."""
    if value is None:
        return ""
    return "p\u00a0<\u00a00.001" if value < 0.001 else f"p\u00a0=\u00a0{value:.2g}"


def measure(value: float | None) -> str:
    """A number of any size: two significant digits, small ones by their power of ten."""
    if value is None:
        return UNKNOWN
    if not math.isfinite(value):
        return str(value)
    if value == 0 or 0.001 <= abs(value) < 1e5:
        return f"{value:.2g}" if abs(value) < 100 else f"{value:,.0f}"
    digits, _, power = f"{value:.1e}".partition("e")
    return f"{digits}\u00a0×\u00a010{str(int(power)).translate(_RAISED)}"


def duration(seconds: float | None) -> str:
    """Seconds as ``2 min 25 s``."""
    if seconds is None:
        return UNKNOWN
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def _style(name: str) -> str:
    return f' class="{name}"' if name else ""
