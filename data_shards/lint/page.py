"""A report as one HTML file that needs no network, no script and no other file.

Everything that comes from a corpus is escaped.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from data_shards.corpus import split_folders
from data_shards.dataset import ShardDataset
from data_shards.errors import UserError
from data_shards.lint.findings import Check, Finding, Report
from data_shards.lint.pictures import COLOURS, draw
from data_shards.lint.style import STYLE

EXAMPLES = 12
"""Findings of a check that are shown."""

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
_SIGNS = {"error": "✕", "warning": "!", "note": "i"}


def render(report: Report) -> str:
    """Return the page of a report; the samples that it shows are read again.

    Raises:
        UserError: The corpus is no longer there.
    """
    album = _Album(report)
    title = escape(f"{Path(report.folder).resolve().name} – data-shards lint")
    found = report.found()
    sections = "\n".join(_section(check, counts, report, album) for check, counts in found)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        f"<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        f"{_header(report)}\n{_counts(report)}\n{_legend(report)}\n{sections}\n{_splits(report)}\n</main>\n</body>\n</html>\n"
    )


def _header(report: Report) -> str:
    remarks = [*report.remarks]
    if report.ignored:
        remarks.append(f"Not run: {', '.join(report.ignored)}.")
    aside = f'<div class="aside"><p>{escape(" ".join(remarks))}</p></div>' if remarks else ""
    verdict = "clean" if report.worst in (None, "note") else report.worst
    return (
        '<header>\n<p class="kicker">data-shards lint</p>\n'
        f"<h1>{escape(Path(report.folder).resolve().name)}</h1>\n"
        f'<p class="answer {verdict}">{escape(report.summary())}</p>\n{aside}\n</header>'
    )


def _counts(report: Report) -> str:
    splits = list(report.splits)
    rows = []
    for check, counts in report.found():
        link = f'<a href="#{escape(check.code)}">{escape(check.code)}</a>'
        cells = [f"{counts[split]:,}" if split in counts else "" for split in splits]
        rows.append([_badge(check), link, escape(check.about), *cells, f"{sum(counts.values()):,}"])
    if not rows:
        return ""
    names = ["", "Check", "What it finds", *map(escape, splits), "All"]
    table = _table(names, rows, 3, "Findings by check and split")
    return f'<section class="counts">\n<h2>What was found</h2>\n{table}\n</section>'


def _legend(report: Report) -> str:
    """Say what is drawn into the pictures, if there may be any."""
    if not any(finding.number >= 0 for finding in report.findings):
        return ""
    marks = (
        ("solid", "orange outline", "the target that the finding is about"),
        ("solid", "blue outline", "the other targets of the sample"),
        ("dotted", "white dotted box", "the box that the sample states for the target; an empty mask has none"),
    )
    rows = "".join(
        f'<li><span style="outline: 2px {kind} rgb{colour}" aria-hidden="true"></span> <b>{name}</b>: {text}</li>'
        for (kind, name, text), colour in zip(marks, COLOURS, strict=True)
    )
    return (
        f'<section class="legend">\n<h2>How to read the pictures</h2>\n<ul>{rows}</ul>\n<p class="note">'
        "Of two pictures side by side, the left one is the sample that the finding names, the right one that which "
        "it is compared with.</p>\n</section>"
    )


def _section(check: Check, counts: dict[str, int], report: Report, album: _Album) -> str:
    mine = [finding for finding in report.findings if finding.code == check.code][:EXAMPLES]
    total = sum(counts.values())
    shown = "" if total <= len(mine) else f" The first {len(mine)} of {total:,} are shown; --json has them all."
    pictured = [finding for finding in mine if finding.number >= 0]
    figures = "\n".join(_figure(finding, album) for finding in pictured)
    lines = "\n".join(f"<li>{_caption(finding)}</li>" for finding in mine if finding.number < 0)
    body = (f'<div class="panels">\n{figures}\n</div>\n' if figures else "") + (
        f"<ul>\n{lines}\n</ul>" if lines else ""
    )
    return (
        f'<section id="{escape(check.code)}">\n<h2>{_badge(check)} {escape(check.code)} '
        f'<span class="count">{total:,}</span></h2>\n<p class="note">{escape(check.about + shown)}</p>\n'
        f"{body}\n</section>"
    )


def _figure(finding: Finding, album: _Album) -> str:
    pictures = [album.picture(finding.split, finding.number, finding.target, finding.key)]
    if finding.other is not None:
        pictures.append(album.picture(finding.other.split, finding.other.number, -1, finding.other.key))
    tiles = "".join(picture or '<p class="blank">cannot be shown</p>' for picture in pictures)
    style = "tiles pair" if len(pictures) > 1 else "tiles"
    return f'<figure><div class="{style}">{tiles}</div><figcaption>{_caption(finding)}</figcaption></figure>'


def _caption(finding: Finding) -> str:
    place = " ".join(filter(None, (finding.split, finding.key)))
    if finding.other is not None:
        place = f"left: {place}; right: {finding.other.split} {finding.other.key}"
    small = f"<br><small>{escape(place)}</small>" if place else ""
    return f"{escape(finding.message)}{small}"


def _splits(report: Report) -> str:
    rows = [
        [escape(name), f"<code>{escape(facts.index_sha256)}</code>", f"{facts.samples:,}", f"{facts.linted:,}"]
        for name, facts in report.splits.items()
    ]
    names = ("Split", "SHA-256 of the index", "Samples", "Looked at")
    return f"<section>\n<h2>What was looked at</h2>\n{_table(names, rows, 2, 'Splits')}\n</section>"


def _badge(check: Check) -> str:
    sign = _SIGNS[check.severity]
    return f'<span class="badge {check.severity}"><b aria-hidden="true">{sign}</b> {check.severity}</span>'


def _table(names: Sequence[str], rows: Iterable[Sequence[str]], words: int, label: str) -> str:
    """A table of HTML cells that scrolls within itself; from column `words` on, they are numbers."""
    kinds = ["" if place < words else ' class="number"' for place in range(len(names))]
    head = "".join(f'<th scope="col"{kind}>{name}</th>' for name, kind in zip(names, kinds, strict=True))
    body = "\n".join(
        f"<tr>{''.join(f'<td{kind}>{cell}</td>' for cell, kind in zip(row, kinds, strict=True))}</tr>" for row in rows
    )
    return (
        f'<div class="scroll" role="region" aria-label="{escape(label)}" tabindex="0"><table>\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table></div>"
    )


class _Album:
    """Reads samples again and draws them."""

    def __init__(self, report: Report) -> None:
        self._folders = split_folders(report.folder)
        self._open: dict[str, ShardDataset] = {}

    def picture(self, split: str, number: int, target: int, key: str) -> str:
        """Return an image element, or nothing where the sample cannot be read."""
        try:
            if split not in self._open:
                self._open[split] = ShardDataset(self._folders[split], check=False)
            triplet = self._open[split][number]
        except (UserError, KeyError, IndexError):
            return ""
        terms = ", ".join(dict.fromkeys(item.term for item in triplet.targets)) or "no target"
        label = escape(f"{split} {key}: {terms}"[:200])
        return f'<img src="{draw(triplet, target)}" alt="{label}" title="{label}" loading="lazy">'
