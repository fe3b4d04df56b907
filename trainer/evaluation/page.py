"""The page of an evaluation: its tables, and the same cases as every model answers them."""

from __future__ import annotations

from collections.abc import Sequence

from trainer.evaluation.absent import absent_tables
from trainer.evaluation.curves import noise_curves, noise_tables
from trainer.evaluation.lesions import lesion_tables
from trainer.evaluation.protocol import COPY
from trainer.evaluation.sizes import Sizes, size_tables, sizes_of
from trainer.evaluation.subgroups import subgroup_tables
from trainer.evaluation.tables import Section, label
from trainer.evaluation.text import answer, difference_table, heading, interval_table, left_out_note, note, score_table
from trainer.evaluation.thirds import UNITS
from trainer.evaluation.told import Told
from trainer.report.boxes import box_plot
from trainer.report.markup import Markup, paragraph, section, table, text
from trainer.report.page import document, legend, prompt_legend
from trainer.report.panels import Panel
from trainer.report.pictures import Choice, crop_of, tiles
from trainer.report.scatter import bland_altman, noise_chart, series_legend, size_scatter

Figure = tuple[str, list[tuple[str, Panel]]]
"""The name of a set, and one object of it as each model answers."""

MOST_TERMS = 6
"""Terms whose sizes are drawn; the table has all."""
_GRID = "grid-template-columns:repeat(auto-fill,minmax(min(100%,11rem),1fr))"


def render(
    name: str,
    question: str,
    caveat: str,
    sections: Sequence[Section],
    figures: Sequence[Figure],
    left_out: Sequence[tuple[str, str, str]],
    protocol: str,
    by: Sequence[str] | None = None,
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
        by: What subgroup tables are of; see `Protocol.by`.
    """
    aside = f'<div class="aside caveat"><p><b>Caveat.</b> {text(caveat)}</p></div>' if caveat else ""
    header = "\n".join(
        (
            '<header>\n<p class="kicker">sam-trainer evaluation</p>',
            f"<h1>{text(name)}</h1>",
            paragraph(question, "question"),
            *(paragraph(answer(one), "answer") for one in sections if one.rows),
            aside,
            paragraph(left_out_note(left_out), "note"),
            "</header>",
        )
    )
    written = f"<details><summary>As it was written</summary><pre>{text(protocol)}</pre></details>"
    parts = [header, *(_section(one, by) for one in sections), _pictures(figures), section("Protocol", written)]
    return document(text(f"{name} – sam-trainer evaluation"), "\n".join(part for part in parts if part))


def _section(one: Section, by: Sequence[str] | None) -> str:
    title, found = heading(one), [_boxes(one)]
    for metric in one.metrics:
        columns, lines = score_table(one, metric)
        found.append(table(columns, lines, label=f"{title}: {columns[0]} by modality"))
    columns, lines = interval_table(one)
    found.append(table(columns, lines, label=f"{title}: mean and median with 95 % confidence intervals", words=(0, 1)))
    columns, lines = difference_table(one)
    if lines:
        every = range(len(columns))
        found.append(table(columns, lines, label=f"{title}: differences on the same objects", words=every))
    found += [_told(told, title) for told in subgroup_tables(one, by)]
    found += [_told(told, title) + _sizes(one, told) for told in size_tables(one)]
    found += [_told(told, title) for told in (*lesion_tables(one), *absent_tables(one))]
    found += [_told(told, title) + _noise(one) for told in noise_tables(one)]
    return section(title, paragraph(note(one), "note"), *found)


def _told(told: Told, title: str) -> str:
    """A table with its heading and note."""
    head = f"<h3>{text(told.title)}</h3>\n{paragraph(told.note, 'note')}"
    names = {place for place in (0, 1) if place in told.words}
    lines = [
        [
            Markup(f'<span class="whole">{text(cell)}</span>') if place in names else cell
            for place, cell in enumerate(line)
        ]
        for line in told.lines
    ]
    drawn = table(told.columns, lines, label=f"{title}: {told.title}", words=told.words)
    return f'<div class="below">{head}{drawn}</div>'


def _numbers(one: Section) -> dict[str, int]:
    """Colour and mark of each line, the same in all charts of a section."""
    return {label(line): number for number, line in enumerate(line for line in one.rows if line[0] != COPY)}


def _boxes(one: Section) -> str:
    """DSC by modality, a box for each model."""
    groups = {
        modality: {
            label(line): [row.dsc for row in rows if row.modality == modality]
            for line, rows in one.rows.items()
            if line[0] != COPY
        }
        for modality in one.modalities
    }
    if not any(values for series in groups.values() for values in series.values()):
        return ""
    drawn = box_plot(groups, name="DSC", label=f"{heading(one)}: DSC by modality")
    return f'<div class="charts" style="margin-bottom:1.6rem">{drawn}</div>'


def _sizes(one: Section, told: Told) -> str:
    """Predicted over true sizes and Bland–Altman plots, the most frequent terms first."""
    numbers, by_term = _numbers(one), dict[tuple[str, str], list[Sizes]]()
    for size in sizes_of(one):
        if f"({UNITS[size.unit]})" in told.columns[3]:
            by_term.setdefault((size.unit, size.term), []).append(size)
    drawn = [_term(sizes, numbers, number == 0) for number, sizes in enumerate(list(by_term.values())[:MOST_TERMS])]
    left = len(by_term) - len(drawn)
    more = (
        paragraph(f"The {len(drawn)} most frequent terms are drawn, {left} more are in the table.", "note")
        if left > 0
        else ""
    )
    return "".join((series_legend(numbers), *drawn, more))


def _term(sizes: Sequence[Sizes], numbers: dict[str, int], opened: bool) -> str:
    """The charts of one term's sizes."""
    term, unit = sizes[0].term, UNITS[sizes[0].unit]
    points = {label(size.line): (size.names, size.predicted, size.true) for size in sizes}
    charts = [size_scatter(points, unit=unit, label=f"{term}: predicted over true size", numbers=numbers)]
    titles = ["Predicted against true"]
    drawn = [0.0, *(value for size in sizes for value in (*(size.predicted - size.true), *(size.found.limits or ())))]
    ends = float(min(drawn)), float(max(drawn))
    for size in sizes:
        name, found = label(size.line), size.found
        charts.append(
            bland_altman(
                points[name],
                bias=found.bias,
                limits=found.limits,
                ends=ends,
                unit=unit,
                label=f"{term}, {name}: Bland–Altman plot, bias {found.bias:.3g} {unit}",
                number=numbers[name],
            )
        )
        titles.append(f"Bland–Altman, {name}")
    figures = "".join(
        f'<figure><h4 style="margin:0 0 .4rem">{text(title)}</h4>{chart}</figure>'
        for title, chart in zip(titles, charts, strict=True)
    )
    state = " open" if opened else ""
    return f'<details{state}><summary>{text(term)}</summary><div class="charts below">{figures}</div></details>'


def _noise(one: Section) -> str:
    """The mean DSC over the noise of prompts."""
    numbers = _numbers(one)
    curves = {label(curve.line): curve for curve in noise_curves(one)}
    told = "; ".join(f"{name} from {curve.means[0]:.3f} to {curve.means[-1]:.3f}" for name, curve in curves.items())
    chart = noise_chart(
        {name: (curve.levels, curve.means, curve.bands) for name, curve in curves.items()},
        label=f"mean DSC over the noise of the prompt: {told}",
        numbers=numbers,
    )
    return f'{series_legend({name: numbers[name] for name in curves})}<div class="charts">{chart}</div>'


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
