"""The page of an evaluation: its tables, and the same cases as every model answers them."""

from __future__ import annotations

from collections.abc import Sequence

from trainer.evaluation.tables import Section
from trainer.evaluation.text import difference_table, heading, left_out_note, note, score_table
from trainer.report.markup import paragraph, section, table, text
from trainer.report.page import document, legend, prompt_legend
from trainer.report.panels import Panel
from trainer.report.pictures import Choice, crop_of, tiles

Figure = tuple[str, list[tuple[str, Panel]]]
"""The name of a set, and one object of it as each model answers."""

_GRID = "grid-template-columns:repeat(auto-fill,minmax(min(100%,11rem),1fr))"


def render(
    name: str,
    question: str,
    caveat: str,
    sections: Sequence[Section],
    figures: Sequence[Figure],
    left_out: Sequence[tuple[str, str, str]],
    protocol: str,
) -> str:
    """Return the page: one file that needs nothing else.

    Args:
        name: Of the protocol.
        question: Its question.
        caveat: What limits it.
        sections: What was evaluated.
        figures: Objects to show.
        left_out: Objects that could not be followed, as (set, case, term).
        protocol: The protocol as it was written.
    """
    aside = f'<div class="aside caveat"><p><b>Caveat.</b> {text(caveat)}</p></div>' if caveat else ""
    header = "\n".join(
        (
            '<header>\n<p class="kicker">sam-trainer evaluation</p>',
            f"<h1>{text(name)}</h1>",
            paragraph(question, "question"),
            aside,
            paragraph(left_out_note(left_out), "note"),
            "</header>",
        )
    )
    written = f"<details><summary>As it was written</summary><pre>{text(protocol)}</pre></details>"
    parts = [header, *(_section(one) for one in sections), _pictures(figures), section("Protocol", written)]
    return document(text(f"{name} – sam-trainer evaluation"), "\n".join(part for part in parts if part))


def _section(one: Section) -> str:
    title, found = heading(one), []
    for metric in one.metrics:
        columns, lines = score_table(one, metric)
        found.append(table(columns, lines, label=f"{title}: {columns[0]} by modality"))
    columns, lines = difference_table(one)
    if lines:
        found.append(table(columns, lines, label=f"{title}: differences on the same objects", words=(0, 1)))
    return section(title, paragraph(note(one), "note"), *found)


def _pictures(figures: Sequence[Figure]) -> str:
    drawn = [_figure(name, sides, number) for number, (name, sides) in enumerate(figures) if sides]
    if not drawn:
        return ""
    prompt = prompt_legend([panel for _, sides in figures for _, panel in sides])
    words = "The same objects, evenly chosen, as every model answers them; the numbers are DSC on what is shown."
    return section("Side by side", paragraph(words, "note"), legend(prompt), "\n".join(drawn))


def _figure(name: str, sides: Sequence[tuple[str, Panel]], number: int) -> str:
    panel = sides[0][1]
    # wide enough for every answer
    crop = max((crop_of(Choice("", None, side)) for _, side in sides), key=lambda crop: crop.side)
    shown = tiles([(who, f"as {who} answers it", side) for who, side in sides], crop, number)
    caption = f"<b>{text(panel.term)}</b> · {text(name)}<br><small>{text(panel.key)}</small>"
    grid = f'<div class="tiles" style="{_GRID}">{shown}</div>'
    return f'<figure class="panel" style="margin-bottom:2rem">{grid}<figcaption>{caption}</figcaption></figure>'
