"""The list of a page's sections, and the links to them."""

from __future__ import annotations

import re
from html import unescape

LEAST = 4
"""Sections from which a page has a list of them."""

_SECTION = re.compile(r'<section(?: id="([^"]*)")?>\n<h2>(.*?)</h2>')


def with_contents(body: str) -> str:
    """Give every section of a page a name to link to, and list them below the page's header.

    Args:
        body: What the page shows: a header, then sections as `trainer.report.markup.section` makes them.
    """
    taken = {"content", *re.findall(r' id="([^"]+)"', body)}  # the page's own name of its main part
    links: list[tuple[str, str]] = []

    def named(match: re.Match[str]) -> str:
        key = match[1] or _free(match[2], taken)
        taken.add(key)
        links.append((key, match[2]))
        return f'<section id="{key}">\n<h2>{match[2]}</h2>'

    body = _SECTION.sub(named, body)
    if len(links) < LEAST or "</header>" not in body:
        return body
    items = "".join(f'<li><a href="#{key}">{title}</a></li>' for key, title in links)
    return body.replace("</header>", f'</header>\n<nav aria-label="Sections"><ul>{items}</ul></nav>', 1)


def _free(title: str, taken: set[str]) -> str:
    """A name made of a heading's letters and figures, unlike all others."""
    base = re.sub(r"[^a-z0-9]+", "-", unescape(title).lower()).strip("-") or "section"
    key, number = base, 2
    while key in taken:
        key, number = f"{base}-{number}", number + 1
    return key
