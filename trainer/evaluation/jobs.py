"""What an evaluation has to do: each model on each set, and what the answers depend on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.evaluation.protocol import COPY, DIRECT, OWN, TEXT, TRUTH, Loaded, fingerprint
from trainer.evaluation.rows import Row, read
from trainer.evaluation.selection import Selected
from trainer.evaluation.sources import Models, computed_by
from trainer.evaluation.text import left_aside_note


@dataclass(frozen=True)
class Job:
    """One model on one set, with one kind of first mask.

    Attributes:
        selected: The set.
        model: Name of the model.
        initial: Who makes the first mask, by name; empty for images, `TEXT` where the model is asked in words.
        made_by: For each level of noise, 0 among them, what stands for all that the answers depend on; behind the dash
            for the versions that compute them.
        copied_by: The same for the baseline, which depends on the first mask alone.
    """

    selected: Selected
    model: str
    initial: str
    made_by: dict[float, str]
    copied_by: str

    @property
    def in_words(self) -> bool:
        """Whether the model is asked by the term alone."""
        return self.initial == TEXT

    @property
    def prompt(self) -> str:
        """How the model is asked."""
        return TEXT if self.in_words else self.selected.spec.prompt

    @property
    def copied(self) -> bool:
        """Whether there is a first mask that the baseline can repeat."""
        return self.initial not in ("", TEXT)

    @property
    def copy_of(self) -> str:
        """Whose first mask the baseline repeats."""
        return f"{DIRECT} to {self.model}" if self.initial == DIRECT else self.initial


def jobs_of(loaded: Loaded, models: Models, chosen: Sequence[Selected]) -> list[Job]:
    """Every model on every set, each way once.

    Raises:
        UserError: A model is missing, or cannot be asked as a set asks.
    """
    identities = {name: models.identity(name) for name in loaded.models}
    jobs: dict[tuple[str, str, str, str], Job] = {}
    for one in chosen:
        for model in loaded.models:
            words = models.asked_in_words(model, one.spec)
            for initial in [TEXT] if words else one.spec.initials:
                name = model if initial == OWN else initial
                place = (one.spec.title, one.spec.kind, model, name)
                jobs.setdefault(place, _job(one, model, name, identities, loaded.protocol.precision))
    return list(jobs.values())


def _job(selected: Selected, model: str, initial: str, identities: dict[str, dict[str, Any]], precision: str) -> Job:
    """A job, with what its answers depend on; titles, limits and terms only say which cases are asked for."""
    spec = selected.spec
    # rows of an earlier version lack some scores
    scored = ["dsc", "iou", "nsd", "hd95", "size", *(["lesions"] if spec.lesions else [])]
    asked = {
        "scores": scored,
        "index": selected.shards.index.sha256,
        **{name: getattr(spec, name) for name in ("kind", "margin", "extent", "tolerance", "unit", "by_term")},
        "prompt": TEXT if initial == TEXT else spec.prompt,
        "precision": precision,
        **({"negatives": spec.negatives} if initial == TEXT else {}),
    }
    direct = {"direct": initial == DIRECT}
    first = identities.get(model if initial == DIRECT else initial, {})
    with_them = fingerprint(computed_by())
    levels = () if initial in (TEXT, TRUTH) else spec.levels
    return Job(
        selected,
        model,
        initial,
        made_by={
            level: f"{fingerprint({**asked, 'noise': level}, identities[model], first, direct)}-{with_them}"
            for level in (0.0, *levels)
        },
        copied_by=f"{fingerprint(asked, COPY, first, direct)}-{with_them}",
    )


def still_valid(loaded: Loaded, out: Path, jobs: Sequence[Job]) -> tuple[list[Row], str]:
    """Rows of an earlier evaluation that this protocol would make again, and why others are left aside."""
    known: dict[tuple[str, str, str, str, float], str] = {}
    for job in jobs:
        place = (job.selected.spec.title, job.selected.spec.kind)
        known |= {(job.model, job.initial, *place, level): mark for level, mark in job.made_by.items()}
        if job.copied:
            known[COPY, job.copy_of, *place, 0.0] = job.copied_by
    here = {(job.selected.spec.title, job.selected.spec.kind) for job in jobs}
    others = {(spec.title, spec.kind) for spec in loaded.protocol.sets} - here
    names = {*loaded.models, COPY}
    kept, older, changed, unasked = [], 0, 0, 0
    for row in read(out / "per_case.csv"):
        mine = known.get((row.model, row.initial, row.set, row.kind, row.noise), "")
        # sets that this call leaves out, with --only, are checked when their turn comes
        if mine == row.made_by or ((row.set, row.kind) in others and row.model in names):
            kept.append(row)
        elif not mine:
            unasked += 1
        elif mine.partition("-")[0] == row.made_by.partition("-")[0]:
            older += 1
        else:
            changed += 1
    return kept, left_aside_note(older, changed, unasked)
