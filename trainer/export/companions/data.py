"""What a card says of the data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from trainer.export.companions.facts import DataSetFacts, Facts, SplitFacts
from trainer.export.companions.markdown import section, table

TERMS = 40
"""Terms that a cell names at most."""


def data_section(facts: Facts) -> str:
    """Data sets, splits, and what is in them."""
    sets = table(
        ("Data set", "Title", "Modality", "Licence", "To cite", "Homepage"),
        [
            (
                one.name,
                one.said("title"),
                one.said("modality"),
                one.said("licence"),
                one.said("cite"),
                one.said("homepage"),
            )
            for one in facts.datasets
        ],
    )
    splits = table(
        (
            "Split",
            "Images",
            "Patients",
            "Cases",
            "Masks by target",
            "Images by modality",
            "Images by data set",
            "Index",
        ),
        [_split(split) for split in facts.splits],
    )
    how = table(
        ("Data set", "Files", "Dropped targets", "Left out", "Split", "Built with", "Spec", "Identifiers"),
        [_built(one) for one in facts.datasets if one.manifest],
    )
    said = (
        "Shards hold no name, date or path: patients and cases are keyed hashes. Whether pixels show who somebody is "
        "was not looked into by sam-trainer."
        if facts.datasets
        else ""
    )
    return section("Data", sets, splits, how, said)


def kinds_seen(facts: Facts, what: Literal["targets", "modalities", "datasets"]) -> list[str]:
    """Terms, modalities or data sets of the training split; empty where they are not known."""
    train = facts.split("train")
    return sorted(getattr(train, what)) if train else []


def listed(counts: Mapping[str, int]) -> str:
    """Names with their counts, the most frequent first; of very many the rest is one number."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    words = [f"{name} {count:,}" for name, count in ordered[:TERMS]]
    rest = ordered[TERMS:]
    return ", ".join(words) + (f" and {len(rest)} more with {sum(c for _, c in rest):,}" if rest else "")


def _split(split: SplitFacts) -> tuple[Any, ...]:
    why = f"not recorded: {split.why}" if split.why else None
    sha256 = f"{split.sha256[:16]}…" if split.sha256 else None
    if why:
        return split.name, split.samples, *(why,) * 5, sha256
    counts = (listed(split.targets), listed(split.modalities), listed(split.datasets))
    return split.name, split.samples, split.patients, split.volumes, *counts, sha256


def identifiers(dataset: DataSetFacts) -> str | None:
    """How guessable the hashes of identifiers are."""
    if dataset.own_key is None:
        return None
    if dataset.own_key:
        return "hashed with a key of its own"
    return "hashed with the data set's name as the key: who guesses an identifier can check the guess"


def built_with(dataset: DataSetFacts) -> str | None:
    """Version of what built the shards."""
    version = (dataset.manifest.get("versions") or {}).get("sam-trainer")
    return f"sam-trainer {version}" if version else None


def split_rule(dataset: DataSetFacts) -> str:
    """How cases went into splits."""
    rule = (dataset.manifest.get("spec") or {}).get("split") or {}
    return ", ".join(f"{name} {value}" for name, value in sorted(rule.items()) if value not in (None, ""))


def _built(dataset: DataSetFacts) -> tuple[Any, ...]:
    manifest = dataset.manifest
    return (
        dataset.name,
        len(manifest.get("sources") or ()),
        listed(manifest.get("dropped_targets") or {}) or "none",
        listed(manifest.get("left_out") or {}) or "none",
        split_rule(dataset),
        built_with(dataset),
        f"{str(manifest.get('spec_sha256'))[:16]}…",
        identifiers(dataset),
    )
