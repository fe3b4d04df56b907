"""The tables of an evaluation in words: cells and notes that page and Markdown share, and the Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from data_shards.errors import counted
from trainer.evaluation.protocol import COPY
from trainer.evaluation.rows import Row
from trainer.evaluation.tables import ALL, METRICS, Line, Section, differences, figures, label
from trainer.report.markup import UNKNOWN, interval, p_value, score, signed

TITLES = {"2d": "Images", "3d": "Volumes", "video": "Videos"}
_HOW = {
    "2d": "each target of each image",
    "3d": "each object of a volume on the middle one of its slices; it is followed from there",
    "video": "each object of a video on its first frame; it is followed from there",
}
_PROMPTS = {"box": "A tight box shows", "point": "The point farthest from the border shows", "mask": "The mask shows"}

Cells = list[str]


def heading(section: Section) -> str:
    """What a section is called."""
    return f"{TITLES[section.kind]} by {section.prompt}: {', '.join(section.sets)}"


def note(section: Section) -> str:
    """How a section's objects were asked for and scored."""
    count = counted(len(next(iter(section.rows.values()), [])), "object")
    how = "frame by frame, averaged" if section.kind == "video" else "in 3D" if section.kind == "3d" else "in 2D"
    words = [
        f"{_PROMPTS[section.prompt]} {_HOW[section.kind]}: {count}, the same for all.",
        "Mean; median (quartiles). Each object counts once, also where several are of one volume.",
        f"NSD {how}: share of both surfaces within {' or '.join(section.tolerances)} of the other.",
    ]
    if section.partial:
        words.append(f"{counted(section.partial, 'object')} that not all have answered yet left out.")
    return " ".join(words)


def score_table(section: Section, metric: str) -> tuple[Cells, list[Cells]]:
    """Columns and lines of a score by modality; the first score's table has the computing time too."""
    modalities, timed = section.modalities, metric == section.metrics[0]
    shown = [*modalities, *([ALL] if len(modalities) > 1 else [])]
    lines = []
    for line, rows in section.rows.items():
        cells = [_figures_cell(rows, metric, modality) for modality in shown]
        seconds = None if line[0] == COPY or not rows else sum(row.seconds for row in rows) / len(rows)
        time = [UNKNOWN if seconds is None else f"{seconds:.2g} s"] if timed else []
        lines.append([label(line), *cells, f"{len(rows):,}", *time])
    return [METRICS[metric], *shown, "n", *(["time an object"] if timed else [])], lines


def _figures_cell(rows: Sequence[Row], metric: str, modality: str) -> str:
    found = figures(rows, metric, modality)
    if found is None:
        return UNKNOWN
    return f"{score(found.mean)}; {score(found.median)} ({score(found.q1)}–{score(found.q3)})"


def difference_table(section: Section) -> tuple[Cells, list[Cells]]:
    """Columns and lines of the paired differences; no lines where there is one model alone."""
    lines: dict[tuple[Line, Line], dict[str, str]] = {}
    for one in differences(section):
        found = one.found
        bounds = f" ({interval(found.gain_ci95)})" if found.gain_ci95 else ""
        chance = f", {p_value(found.p_value)}" if found.p_value is not None else ""
        lines.setdefault((one.line, one.against), {})[one.metric] = f"{signed(found.gain)}{bounds}{chance}"
    rows = [
        [label(line), label(against), *(cells.get(metric, UNKNOWN) for metric in section.metrics)]
        for (line, against), cells in lines.items()
    ]
    return ["Difference (95 % CI)", "against", *(METRICS[metric] for metric in section.metrics)], rows


def left_out_note(left_out: Sequence[tuple[str, str, str]]) -> str:
    """Which objects could not be followed."""
    if not left_out:
        return ""
    shown = "; ".join(f"{term} of {case} ({name})" for name, case, term in left_out[:5])
    more = f"; and {len(left_out) - 5:,} more" if len(left_out) > 5 else ""
    count = counted(len(left_out), "object")
    verb = "is" if len(left_out) == 1 else "are"
    return f"{count} {verb} left out, being in one slice alone: {shown}{more}."


def left_aside_note(older: int, changed: int, unasked: int) -> str:
    """Why rows of an earlier evaluation do not count; empty where all do.

    Args:
        older: Rows that other versions have computed.
        changed: Rows of another model, of other data or of other settings.
        unasked: Rows of what the protocol does not name.
    """
    reasons = (
        (older, "computed with other versions of sam-trainer, torch, transformers or sam2"),
        (changed, "of another model, other data or other settings"),
        (unasked, "of models, sets or first masks that the protocol does not name"),
    )
    total = counted(older + changed + unasked, "earlier row")
    why = "; ".join(f"{count:,} {words}" for count, words in reasons if count)
    return f"{total} left aside: {why}" if why else ""


def in_short(sections: Sequence[Section], left_out: Sequence[tuple[str, str, str]]) -> str:
    """The tables of the scores, for a terminal."""
    parts = []
    for section in sections:
        tables = [markdown_table(*score_table(section, metric)) for metric in section.metrics if metric != "nsd"]
        parts += [f"{heading(section)} (mean; median and quartiles)", *tables]
    return "\n\n".join(part for part in (*parts, left_out_note(left_out)) if part)


def markdown(name: str, question: str, sections: Sequence[Section], left_out: Sequence[tuple[str, str, str]]) -> str:
    """The tables as Markdown."""
    parts = [f"# {name}", question]
    for section in sections:
        parts += [f"## {heading(section)}", note(section)]
        tables = [score_table(section, metric) for metric in section.metrics]
        for columns, lines in (*tables, difference_table(section)):
            if lines:
                parts.append(markdown_table(columns, lines))
    parts.append(left_out_note(left_out))
    return "\n\n".join(part for part in parts if part) + "\n"


def markdown_table(columns: Cells, lines: Sequence[Cells]) -> str:
    """A table as Markdown."""
    rows = [columns, ["---"] * len(columns), *lines]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)
