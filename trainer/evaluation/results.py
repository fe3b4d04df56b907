"""What an evaluation leaves in its folder besides its rows: summary and page."""

from __future__ import annotations

from trainer.evaluation import page, tables, text
from trainer.evaluation.absent import absent_summary
from trainer.evaluation.curves import noise_summary
from trainer.evaluation.given import COMMAND
from trainer.evaluation.jobs import Job
from trainer.evaluation.lesions import lesion_summary
from trainer.evaluation.protocol import COPY
from trainer.evaluation.run import Evaluation
from trainer.evaluation.sizes import size_summary
from trainer.evaluation.tables import Line, Section
from trainer.evaluation.told import finite
from trainer.report.panels import load_panels
from trainer.run import write_json, write_whole


def write_results(evaluation: Evaluation) -> list[Section]:
    """Write ``summary.json``, ``summary.md``, ``report.html`` and the protocol itself.

    Returns:
        The sections of the tables.

    Raises:
        UserError: A picture cannot be read.
        OSError: The folder cannot be written.
    """
    loaded, out = evaluation.loaded, evaluation.out
    sections = sections_of(evaluation)
    left_out = [(one.spec.title, case, term) for one in evaluation.selected for case, term in one.left_out]
    head = {"protocol": str(loaded.path), "question": loaded.question, "caveat": loaded.caveat}
    content = tables.summary(sections, left_out)
    for section, found in zip(sections, content["sections"], strict=True):
        found |= {"sizes": size_summary(section), "lesions": lesion_summary(section), "noise": noise_summary(section)}
        found["absent"] = absent_summary(section)
    write_json(out / "summary.json", head | finite(content))
    name = ", ".join(loaded.models) if loaded.path == COMMAND else loaded.path.stem
    by = loaded.protocol.by
    write_whole(out / "summary.md", text.markdown(name, loaded.question, sections, left_out, by))
    write_whole(out / "protocol.yaml", loaded.text)
    pictures = _figures(evaluation)
    found = page.render(name, loaded.question, loaded.caveat, sections, pictures, left_out, loaded.text, by)
    write_whole(out / "report.html", found)
    return sections


def sections_of(evaluation: Evaluation) -> list[Section]:
    """Sets that are asked in one way together, in the order of the protocol: the cases that this call asks for."""
    groups: dict[tuple[str, str, tuple[str, ...], bool, tuple[float, ...]], list[str]] = {}
    wanted, cases = set(), set()
    for one in evaluation.selected:
        spec = one.spec
        way = (spec.kind, spec.prompt, tuple(spec.initials), spec.by_term, spec.levels)
        groups.setdefault(way, []).append(spec.title)
        wanted |= {(spec.kind, spec.title, *thing) for thing in one.objects}
        cases |= {(spec.kind, spec.title, case) for case, _, _ in one.objects}
    rows = [
        row
        for row in evaluation.table.rows
        if ((row.kind, row.set, row.case) in cases if row.is_absent else (row.kind, *row.place) in wanted)
    ]
    return [
        tables.section_of(kind, prompt, sets, _lines(evaluation.jobs, kind, sets), rows, by_term)
        for (kind, prompt, _, by_term, _), sets in groups.items()
    ]


def _lines(jobs: list[Job], kind: str, sets: list[str]) -> list[Line]:
    """Models first, then the repetitions of their first masks."""
    mine = [job for job in jobs if job.selected.spec.kind == kind and job.selected.spec.title in sets]
    copies = [(COPY, job.copy_of) for job in mine if job.copied]
    return list(dict.fromkeys([*((job.model, job.initial) for job in mine), *copies]))


def _figures(evaluation: Evaluation) -> list[page.Figure]:
    figures: list[page.Figure] = []
    for one in evaluation.selected:
        jobs = [job for job in evaluation.jobs if job.selected is one]
        for thing in one.pictures:
            paths = [(tables.label((job.model, job.initial)), evaluation.panel(job, thing)) for job in jobs]
            sides = [(who, load_panels(path)[0]) for who, path in paths if path.is_file()]
            figures.append((one.spec.title, sides))
    return figures
