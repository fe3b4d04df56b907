"""The card that travels with exported weights: every figure and every statement in it is from a file.

What no file says is "not recorded", and what only a person can say "not given", until ``--card FILE.yaml`` gives it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from data_shards.errors import counted
from trainer.export.companions.bases import base_of
from trainer.export.companions.data import data_section, kinds_seen
from trainer.export.companions.documents import documentation
from trainer.export.companions.facts import Facts
from trainer.export.companions.markdown import NOT_GIVEN, NOT_RECORDED, bullets, section, table, text
from trainer.export.companions.scores import score_limits, score_section
from trainer.export.companions.travelling import without_paths

_HUB_LICENCES = ("apache-2.0", "mit", "gpl-3.0", "lgpl-3.0", "agpl-3.0", "bsd-3-clause", "bsd-2-clause", "unlicense")
"""Licences that the hub knows by these names, besides Creative Commons."""
_LIBRARIES = {"onnxruntime": "onnx", "torch": "sam-trainer"}
"""What the hub calls a consumer, where that is not its own name."""
_ABOUT = (
    "Written by sam-trainer from the files of the run and of its data; nothing in it was estimated or assumed. "
    f'What those files do not say is "{NOT_RECORDED}"; what only a person can say is "{NOT_GIVEN}".'
)


def render_card(facts: Facts, record: Mapping[str, Any], preprocessing: Mapping[str, Any]) -> str:
    """Write the card.

    Args:
        facts: What is known of the run.
        record: Content of ``export.json``.
        preprocessing: Content of ``preprocessing.json``.
    """
    given = facts.given
    title = given.title or facts.run.name
    parts = [
        f"---\n{yaml.safe_dump(_front(facts, record), sort_keys=False, allow_unicode=True, width=1000)}---\n",
        f"# {text(title)}\n",
        f"{text(without_paths(facts.run.question))}\n" if facts.run.question else "",
        f"{_ABOUT}\n",
        section("The model", table(("", ""), _model(facts, record))),
        section("Intended use", _use(facts)),
        section("The export, and the tool that loads it", table(("", ""), _export(record)), _notes(record)),
        section("What the weights expect, and what they give", *_input(preprocessing)),
        data_section(facts),
        section("Training", table(("", ""), training_rows(facts))),
        score_section(facts, record),
        section("Limits", bullets(limits(facts, record))),
        section("Risks and human oversight", table(("", ""), _risks(facts))),
        section("What documentation rules ask for", *documentation(facts, record, preprocessing)),
        section("Whom to ask, and what to cite", table(("", ""), _contact(facts))),
    ]
    return "\n".join(part for part in parts if part)


def _front(facts: Facts, record: Mapping[str, Any]) -> dict[str, Any]:
    """What the hub reads: only keys of which something is known."""
    base, after = base_of(facts), facts.run.after
    metrics = [
        name for name in ("dsc", "iou", "nsd") if after and any(getattr(s, name) is not None for s in after.scores)
    ]
    library = str(record.get("consumer") or "sam-trainer")
    tags = ["medical-imaging", "image-segmentation", facts.node("model")[0].lower(), facts.node("tuning")[0].lower()]
    front: dict[str, Any] = {
        **_licence(facts.given.licence),
        "library_name": _LIBRARIES.get(library, library),
        "pipeline_tag": "mask-generation",
        "tags": [tag for tag in [*tags, *(name.lower() for name in kinds_seen(facts, "modalities"))] if tag],
        "datasets": [dataset.name for dataset in facts.datasets],
        "metrics": [{"dsc": "dice", "iou": "iou", "nsd": "nsd"}[name] for name in metrics],
        "base_model": base.hub if base else "",
        "model_name": facts.given.title or facts.run.name,
    }
    return {name: value for name, value in front.items() if value}


def _licence(given: str) -> dict[str, str]:
    """The licence as the hub names it; one that it does not know is another's."""
    plain = re.sub(r"\s+", "-", given.strip().lower())
    if not plain:
        return {"license": "unknown"}
    if plain in _HUB_LICENCES or re.fullmatch(r"cc0-1\.0|cc-by(-nc)?(-sa|-nd)?-[234]\.0", plain):
        return {"license": plain}
    return {"license": "other", "license_name": plain}


def _model(facts: Facts, record: Mapping[str, Any]) -> list[tuple[str, Any]]:
    base, model = base_of(facts), facts.run.record.get("model") or {}
    name, _ = facts.node("model")
    tuning, arguments = facts.node("tuning")
    total, learnt = model.get("parameters"), model.get("trainable")
    share = f"{learnt:,} of {total:,} ({100 * learnt / total:.2f} %)" if total and learnt is not None else None
    sha256 = f"; the recipe asks for SHA-256 {base.sha256}" if base and base.sha256 else ""
    settings = ", ".join(f"{key} {value}" for key, value in arguments.items() if value not in (None, [], {}))
    checkpoint = record.get("checkpoint") or {}
    weights = {"average": "the moving average of the weights", "raw": "as they were at that step"}
    return [
        ("architecture", name),
        ("began with", f"{base.name}{sha256}" if base else "random weights: there is no base model"),
        ("licence of what it began with", "none: random weights" if base is None else base.licence),
        ("licence of these weights", facts.given.licence or NOT_GIVEN),
        ("tuning", f"{tuning}{f' ({without_paths(settings)})' if settings else ''}" if tuning else None),
        ("parameters", total),
        ("parameters that learnt", share),
        ("checkpoint", checkpoint.get("name")),
        ("optimiser steps behind it", checkpoint.get("step")),
        ("which weights", weights.get(str(checkpoint.get("weights")))),
        ("version", facts.given.version or NOT_GIVEN),
        ("exported at (UTC)", record.get("date")),
    ]


def _use(facts: Facts) -> str:
    terms, kinds = kinds_seen(facts, "targets"), kinds_seen(facts, "modalities")
    learnt = (
        f"It learnt to outline {', '.join(terms)} in {', '.join(kinds)}; nothing else was shown to it in this run."
        if terms and kinds
        else ""
    )
    rows = [
        ("intended use", facts.given.intended_use or NOT_GIVEN),
        ("out of scope", facts.given.out_of_scope or NOT_GIVEN),
        ("what it learnt", learnt),
        ("acceptable use", facts.given.acceptable_use or NOT_GIVEN),
    ]
    return table(("", ""), rows)


def _export(record: Mapping[str, Any]) -> list[tuple[str, Any]]:
    verified = {True: "yes", None: "no: it was written with --unverified"}.get(record.get("verified"), "no")
    tool = " ".join(str(record[name]) for name in ("consumer", "consumer_version") if record.get(name))
    sha256 = record.get("sha256")
    hashes = sha256 if isinstance(sha256, str) else "; ".join(f"{k} {v}" for k, v in (sha256 or {}).items())
    rows = [
        ("format", record.get("format")),
        ("file", record.get("file")),
        ("numbers", record.get("dtype")),
        ("SHA-256", hashes),
        ("loaded by the tool's own code and compared", verified),
        ("tool", tool),
    ]
    if record.get("verified"):
        rows += [
            ("compared", record.get("compared")),
            (
                "largest difference of logits",
                f"{record['max_logit_difference']:.1e} (allowed: {record['tolerance']:g})",
            ),
            ("real images", record.get("samples")),
            ("DSC on these in the tool, in the run", f"{record['dsc_consumer']:.3f}, {record['dsc_run']:.3f}"),
        ]
    return rows


def _notes(record: Mapping[str, Any]) -> str:
    return bullets(without_paths(str(note)) for note in record.get("notes") or ())


def _input(preprocessing: Mapping[str, Any]) -> list[str]:
    steps = "\n".join(f"{number}. {text(step)}" for number, step in enumerate(preprocessing["steps"], start=1))
    back = "\n".join(
        f"{number}. {text(step)}" for number, step in enumerate(preprocessing["output"]["to_native"], start=1)
    )
    rules = table(
        ("Data set", "Intensities as stored", "From", "To", "Known from"),
        [
            (name, _rule(rule["rule"]), _bound(rule, "low"), _bound(rule, "high"), rule["from"])
            for name, rule in preprocessing["intensity"].items()
        ],
    )
    confidence = preprocessing["output"]["confidence_threshold"]
    present = f"Answers of a confidence below {confidence:g} count as absent." if confidence is not None else ""
    return [
        "Before, image by image (all of it in numbers: preprocessing.json):",
        steps,
        "After, from the mask logits to the image's own pixels:",
        back,
        present,
        "How the images that the run saw were stored:" if rules else "",
        rules,
    ]


def _rule(rule: Mapping[str, Any] | None) -> str | None:
    return ", ".join(f"{name} {value}" for name, value in rule.items()) if rule else None


def _bound(rule: Mapping[str, Any], name: str) -> str | None:
    """What became 0 or 255."""
    if rule[name] is not None:
        return f"{rule[name]:g}"
    if rule["rule"] is None:
        return None
    return "kept as it is" if rule["rule"].get("kind") == "none" else "each volume's own"


def training_rows(facts: Facts) -> list[tuple[str, Any]]:
    """What the training took, as the run recorded it."""
    record, seconds = facts.run.record, facts.run.stages.get("fit")
    devices = record.get("world_size")
    on_gpus = bool(record.get("hardware")) and not str(record["hardware"]).startswith("CPU")
    hours = None if seconds is None else seconds / 3600
    spent = f"{hours * devices:.3g}" if hours is not None and devices and on_gpus else None
    commit = record.get("git_commit")
    changed = " with changes that were not committed" if record.get("git_dirty") else ""
    settings = (facts.recipe.get("model") or {}).get("init_args") or {}
    train = facts.recipe.get("data", {}).get("init_args") or {}
    skipped = len(facts.run.skipped)
    return [
        ("optimiser steps", facts.run.steps),
        ("images shown, repeats included", facts.shown),
        ("different images shown", len(facts.run.trained) if facts.run.trained is not None else None),
        ("images left out because they could not be read", skipped if facts.run.trained is not None else None),
        ("images a step", train.get("batch_size")),
        ("learning rate", settings.get("lr")),
        ("precision", record.get("precision")),
        ("seed", record.get("seed")),
        ("hardware", record.get("hardware")),
        ("processes", devices),
        ("hours of training", None if hours is None else f"{hours:.3g}"),
        ("GPU-hours", spent if on_gpus or not record else "none: trained on a CPU"),
        ("energy", facts.given.energy or None),
        ("commit of sam-trainer", f"{commit}{changed}" if commit else None),
        ("versions", ", ".join(f"{name} {version}" for name, version in (record.get("versions") or {}).items())),
    ]


def limits(facts: Facts, record: Mapping[str, Any]) -> list[str]:
    """What was not learnt, not scored or not proved, as far as the files show it."""
    train, test = facts.split("train"), facts.split("test")
    found = [facts.given.limitations, without_paths(facts.run.caveat or "")]
    terms, kinds = kinds_seen(facts, "targets"), kinds_seen(facts, "modalities")
    if kinds:
        found.append(f"Modalities shown in this training: {', '.join(kinds)}. No other was.")
    if terms:
        found.append(f"Targets shown in this training: {', '.join(terms)}. No other was.")
    if train and train.patients is not None:
        found.append(f"It learnt from {counted(train.patients, 'patient')}, as the shards count them.")
    if train and test and not (train.why or test.why):
        unscored = sorted(set(train.targets) - set(test.targets))
        unlearnt = sorted(set(test.targets) - set(train.targets))
        found.append(f"Trained on and not in the test set: {', '.join(unscored)}." if unscored else "")
        found.append(f"In the test set and not trained on: {', '.join(unlearnt)}." if unlearnt else "")
    for dataset in facts.datasets:
        found += [f"{dataset.name}: {without_paths(str(note))}." for note in dataset.manifest.get("notes") or ()]
    found += score_limits(facts, record)
    if record.get("verified") is not True:
        found.append("No tool has loaded this export yet: it was written without the gate.")
    return [line for line in found if line]


def _risks(facts: Facts) -> list[tuple[str, Any]]:
    low = []
    for evaluation in facts.scored()[:1]:
        missed = sum(score.dsc < 0.5 for score in evaluation.scores)
        low.append(f"{missed:,} of {counted(len(evaluation.scores), 'scored target')} have a DSC below 0.5")
    return [
        ("risks", facts.given.risks or NOT_GIVEN),
        ("how often it was far off", "; ".join(low)),
        ("human oversight", facts.given.human_oversight or NOT_GIVEN),
        ("bias", facts.given.bias or NOT_GIVEN),
        ("ethics approval", facts.given.ethics or NOT_GIVEN),
    ]


def _contact(facts: Facts) -> Sequence[tuple[str, Any]]:
    given = facts.given
    return [
        ("authors", ", ".join(given.authors) or NOT_GIVEN),
        ("contact", given.contact or NOT_GIVEN),
        ("homepage", given.homepage or NOT_GIVEN),
        ("funding", given.funding or NOT_GIVEN),
        ("to cite", "citation.bib, which travels with the weights"),
    ]
