"""The tables of an evaluation in words: cells and notes that page and Markdown share, and the Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from data_shards.errors import counted
from trainer.evaluation.absent import absent_tables
from trainer.evaluation.curves import noise_tables
from trainer.evaluation.lesions import lesion_tables
from trainer.evaluation.protocol import COPY, TEXT
from trainer.evaluation.rows import Row
from trainer.evaluation.sizes import size_tables
from trainer.evaluation.subgroups import subgroup_tables
from trainer.evaluation.tables import ALL, DISTANCES, METRICS, Line, Section, differences, figures, intervals, label
from trainer.evaluation.told import TITLES, Cells, Told, markdown_table
from trainer.report.markup import UNKNOWN, interval, p_value, score, signed

_HOW = {
    "2d": "each target of each image",
    "3d": "each object of a volume on the middle one of its slices; it is followed from there",
    "video": "each object of a video on its first frame; it is followed from there",
}
_PROMPTS = {"box": "A tight box shows", "point": "The point farthest from the border shows", "mask": "The mask shows"}
_BY_TEXT = {
    "2d": "its term in each image, and the instances that it finds are united",
    "3d": "its term in each slice, and the instances that it finds are united",
    "video": "its term in each frame, and the instances that it finds are united",
}


def heading(section: Section) -> str:
    """What a section is called."""
    return f"{TITLES[section.kind]} by {section.prompt}: {', '.join(section.sets)}"


def note(section: Section) -> str:
    """How a section's objects were asked for and scored."""
    count = counted(len(section.objects), "object")
    how = "frame by frame, averaged" if section.kind == "video" else "in 3D" if section.kind == "3d" else "in 2D"
    words = [f"{_asked(section)}: {count}, the same for all."]
    if section.prompt != TEXT and any(initial == TEXT for _, initial in section.rows):
        words.append(f"A model that is asked by text gets no more than {_BY_TEXT[section.kind]}.")
    words += [
        "Mean; median (quartiles). Each object counts once, also where several are of one volume.",
        f"NSD {how}: share of both surfaces within {' or '.join(section.tolerances)} of the other.",
    ]
    if "hd95" in section.metrics:
        units = " or ".join(dict.fromkeys(tolerance.rpartition(" ")[2] for tolerance in section.tolerances))
        words.append(f"HD95 in {units}, infinite where a mask is empty: median (quartiles), the infinite ones counted.")
    if section.partial:
        words.append(f"{counted(section.partial, 'object')} that not all have answered yet left out.")
    return " ".join(words)


def _asked(section: Section) -> str:
    """What a model is shown."""
    if section.prompt == TEXT:
        return f"A model gets of each object {_BY_TEXT[section.kind]}"
    if section.kind == "2d" and section.by_term:
        return f"{_PROMPTS[section.prompt]} each target of a term in an image, and the answers are united"
    return f"{_PROMPTS[section.prompt]} {_HOW[section.kind]}"


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
    if metric in DISTANCES:
        cell = f"{distance(found.median)} ({distance(found.q1)}–{distance(found.q3)})"
        return f"{cell}, {found.infinite:,} ∞" if found.infinite else cell
    return f"{score(found.mean)}; {score(found.median)} ({score(found.q1)}–{score(found.q3)})"


def distance(value: float) -> str:
    """A distance that may be infinite."""
    return "∞" if value == float("inf") else f"{value:.1f}"


def interval_table(section: Section) -> tuple[Cells, list[Cells]]:
    """Columns and lines of mean and median of all objects with their 95 % confidence intervals."""
    lines = []
    for metric in section.metrics:
        say = distance if metric in DISTANCES else score
        for line, rows in section.rows.items():
            found, cells = figures(rows, metric), []
            values = (None, None) if found is None else (found.mean, found.median)
            for value, bounds in zip(values, intervals(rows, metric), strict=True):
                sure = f" ({say(bounds[0])}–{say(bounds[1])})" if bounds else ""
                cells.append(UNKNOWN if value is None else say(value) + sure)
            lines.append([METRICS[metric], label(line), *cells])
    return ["score", "model", "mean (95 % CI)", "median (95 % CI)"], lines


def difference_table(section: Section) -> tuple[Cells, list[Cells]]:
    """Columns and lines of the paired differences; no lines where there is one model alone."""
    lines: dict[tuple[Line, Line], dict[str, str]] = {}
    shown = [metric for metric in section.metrics if metric not in DISTANCES]
    for one in differences(section):
        found = one.found
        bounds = f" ({interval(found.gain_ci95)})" if found.gain_ci95 else ""
        chance = f", {p_value(found.p_value)}" if found.p_value is not None else ""
        lines.setdefault((one.line, one.against), {})[one.metric] = f"{signed(found.gain)}{bounds}{chance}"
    rows = [
        [label(line), label(against), *(cells.get(metric, UNKNOWN) for metric in shown)]
        for (line, against), cells in lines.items()
    ]
    return ["Difference (95 % CI)", "against", *(METRICS[metric] for metric in shown)], rows


def answer(section: Section) -> str:
    """What came out, in a sentence: mean DSC of the first model, and how the others differ on the same objects."""
    first, *others = [line for line in section.rows if line[0] != COPY]
    rows = section.rows[first]
    found = figures(rows, "dsc")
    if found is None:
        return ""
    where = f"{heading(section)}, {counted(len(rows), 'object')}"
    said = f"{where}: mean DSC is {score(found.mean)} (median {score(found.median)}) with {label(first)}"
    gains = {one.line: one.found for one in differences(section) if one.metric == "dsc" and one.against == first}
    parts = []
    for line in others:
        if line in gains:
            bounds = f" (95 % CI {interval(gains[line].gain_ci95)})" if gains[line].gain_ci95 else ""
            parts.append(f"{label(line)} {signed(gains[line].gain)}{bounds}")
    return f"{said}; against it {', '.join(parts)}." if parts else f"{said}."


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


def more_tables(section: Section, by: Sequence[str] | None) -> list[Told]:
    """What the scores alone do not say: subgroups, sizes, lesions, absent terms and noise."""
    more = [*lesion_tables(section), *absent_tables(section), *noise_tables(section)]
    return [*subgroup_tables(section, by), *size_tables(section), *more]


def in_short(
    sections: Sequence[Section], left_out: Sequence[tuple[str, str, str]], by: Sequence[str] | None = None
) -> str:
    """The tables of the scores, for a terminal; those of subgroups where they were asked for."""
    parts = []
    for section in sections:
        shown = [metric for metric in section.metrics if metric not in ("nsd", *DISTANCES)]
        tables = [markdown_table(*score_table(section, metric)) for metric in shown]
        parts += [f"{heading(section)} (mean; median and quartiles)", *tables]
        more = [*(subgroup_tables(section, by) if by else []), *lesion_tables(section)]
        more += [*absent_tables(section), *noise_tables(section)]
        parts += [f"{one.title}\n\n{markdown_table(one.columns, one.lines)}" for one in more]
    return "\n\n".join(part for part in (*parts, left_out_note(left_out)) if part)


def markdown(
    name: str,
    question: str,
    sections: Sequence[Section],
    left_out: Sequence[tuple[str, str, str]],
    by: Sequence[str] | None = None,
) -> str:
    """The tables as Markdown."""
    parts = [f"# {name}", question]
    for section in sections:
        parts += [f"## {heading(section)}", answer(section) if section.rows else "", note(section)]
        tables = [score_table(section, metric) for metric in section.metrics]
        for columns, lines in (*tables, interval_table(section), difference_table(section)):
            if lines:
                parts.append(markdown_table(columns, lines))
        parts += [one.markdown for one in more_tables(section, by)]
    parts.append(left_out_note(left_out))
    return "\n\n".join(part for part in parts if part) + "\n"
