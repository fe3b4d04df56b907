"""What rules for the documentation of models ask for, field by field, from the same facts as the rest of a card.

The points are those of Annex XI, section 1, and Annex IV of the EU's AI Act (Regulation 2024/1689). A filled table is
no statement that the act applies, or that it is met.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trainer.export.companions.bases import base_of
from trainer.export.companions.data import built_with, identifiers, kinds_seen, listed, split_rule
from trainer.export.companions.facts import DataSetFacts, Facts
from trainer.export.companions.markdown import NOT_GIVEN, table

_SAID = (
    "Points of the EU's AI Act (Regulation 2024/1689), as XI 1(2)(c): annex XI, section 1, point 2(c). The table says "
    "what is known, and not whether the act applies or is met."
)


def documentation(facts: Facts, record: Mapping[str, Any], preprocessing: Mapping[str, Any]) -> list[str]:
    """One row for each point."""
    rows = [
        *_description(facts, record, preprocessing),
        *_process(facts),
        *_data(facts),
        *_compute(facts),
        *_quality(facts, record),
    ]
    return [_SAID, table(("Asked for", "By", "Known"), rows)]


def _description(
    facts: Facts, record: Mapping[str, Any], preprocessing: Mapping[str, Any]
) -> list[tuple[str, str, Any]]:
    given, model = facts.given, facts.run.record.get("model") or {}
    shape = " × ".join(map(str, preprocessing["input"]["shape"]))
    output = f"masks, whose logits have {preprocessing['output']['mask_side']} px a side"
    tool = " ".join(str(record[name]) for name in ("consumer", "consumer_version") if record.get(name))
    base = base_of(facts)
    return [
        ("intended tasks and systems", "XI 1(1)(a), IV 1(a)", given.intended_use or NOT_GIVEN),
        ("acceptable use", "XI 1(1)(b)", given.acceptable_use or NOT_GIVEN),
        ("provider", "IV 1(a)", ", ".join(given.authors) or NOT_GIVEN),
        ("version", "IV 1(a)", given.version or NOT_GIVEN),
        ("date", "XI 1(1)(c)", record.get("date")),
        ("architecture", "XI 1(1)(d)", facts.node("model")[0]),
        ("number of parameters", "XI 1(1)(d)", model.get("parameters")),
        ("input and output", "XI 1(1)(e)", f"images, {shape}, and prompts; {output}"),
        ("licence", "XI 1(1)(f)", given.licence or NOT_GIVEN),
        ("means of integration", "XI 1(2)(a)", f"{record.get('format')}{f', loaded by {tool}' if tool else ''}"),
        ("model that it was made from", "IV 2(a)", base.name if base else "none: it began with random weights"),
    ]


def _process(facts: Facts) -> list[tuple[str, str, Any]]:
    settings = (facts.recipe.get("model") or {}).get("init_args") or {}
    loss = settings.get("loss")
    loss = loss.get("class_path", "").rpartition(".")[2] if isinstance(loss, Mapping) else None
    module = str((facts.recipe.get("model") or {}).get("class_path") or "").rpartition(".")[2]
    return [
        ("training method", "XI 1(2)(b)", f"{module} with {facts.node('tuning')[0]}" if module else None),
        (
            "what it was optimised for",
            "XI 1(2)(b)",
            loss or (f"the loss of {module} in recipe.yaml" if module else None),
        ),
        ("key choices and why", "XI 1(2)(b)", "every setting: recipe.yaml; why: not recorded"),
    ]


def _data(facts: Facts) -> list[tuple[str, str, Any]]:
    counts = ", ".join(f"{split.name} {split.samples:,} images" for split in facts.splits if split.samples is not None)
    sources = "; ".join(f"{one.name}: {one.said('homepage') or 'source not recorded'}" for one in facts.datasets)
    licences = "; ".join(f"{one.name}: {one.said('licence') or 'not recorded'}" for one in facts.datasets)
    curated = "; ".join(f"{one.name}: {_curated(one)}" for one in facts.datasets if one.manifest)
    splits = "; ".join(f"{one.name}: {split_rule(one)}" for one in facts.datasets if one.manifest)
    hashed = "; ".join(f"{one.name}: {identifiers(one) or 'not recorded'}" for one in facts.datasets)
    hashes = ", ".join(f"{split.name} {split.sha256}" for split in facts.splits if split.sha256)
    kinds, terms = kinds_seen(facts, "modalities"), kinds_seen(facts, "targets")
    return [
        ("data sets", "XI 1(2)(c)", ", ".join(one.name for one in facts.datasets)),
        ("where they are from", "XI 1(2)(c)", sources),
        ("licences of the data", "XI 1(2)(c)", licences),
        ("number of data points", "XI 1(2)(c)", counts),
        ("scope", "XI 1(2)(c)", f"{', '.join(kinds)}; {', '.join(terms)}" if kinds and terms else None),
        ("how the data were obtained", "XI 1(2)(c)", facts.given.data_consent or NOT_GIVEN),
        ("curation", "XI 1(2)(c)", curated),
        ("split", "IV 2(d)", splits),
        ("hashes of the data", "XI 1(2)(c)", hashes),
        ("identifiers", "XI 1(2)(c)", hashed),
        ("measures against bias", "XI 1(2)(c)", facts.given.bias or NOT_GIVEN),
    ]


def _curated(dataset: DataSetFacts) -> str:
    """What was not taken of a data set, and what decided that."""
    dropped, left = (listed(dataset.manifest.get(name) or {}) for name in ("dropped_targets", "left_out"))
    builder = built_with(dataset) or "builder not recorded"
    return f"{dropped or 'no'} targets dropped, {left or 'nothing'} left out ({builder})"


def _compute(facts: Facts) -> list[tuple[str, str, Any]]:
    record, seconds = facts.run.record, facts.run.stages.get("fit")
    return [
        ("floating-point operations", "XI 1(2)(d)", None),
        ("training time", "XI 1(2)(d)", None if seconds is None else f"{seconds / 3600:.3g} h"),
        ("hardware", "XI 1(2)(d)", record.get("hardware")),
        ("energy", "XI 1(2)(e)", facts.given.energy or None),
        ("code", "IV 2(a)", f"commit {record['git_commit']}" if record.get("git_commit") else None),
        ("versions", "IV 2(a)", ", ".join(f"{n} {v}" for n, v in (record.get("versions") or {}).items())),
    ]


def _quality(facts: Facts, record: Mapping[str, Any]) -> list[tuple[str, str, Any]]:
    scored = facts.scored()
    figures = "; ".join(
        f"{one.name}: mean DSC {sum(s.dsc for s in one.scores) / len(one.scores):.3f} of {len(one.scores):,} targets"
        for one in scored
    )
    verified = "the tool's own code loaded it and agreed" if record.get("verified") else "not verified"
    return [
        ("accuracy", "IV 2(g), IV 4", figures),
        ("proof that the export works", "IV 2(g)", verified),
        ("foreseeable risks", "IV 3, IV 5", facts.given.risks or NOT_GIVEN),
        ("human oversight", "IV 2(e)", facts.given.human_oversight or NOT_GIVEN),
        ("ethics approval", "–", facts.given.ethics or NOT_GIVEN),
        ("contact", "IV 1(a)", facts.given.contact or NOT_GIVEN),
    ]
