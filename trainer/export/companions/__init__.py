"""What travels along with every export, as texts: see `trainer.export.placing.COMPANIONS` for where they lie."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from trainer.export.companions.card import render_card
from trainer.export.companions.citation import bibliography
from trainer.export.companions.facts import Facts
from trainer.export.companions.travelling import travelling_recipe
from trainer.export.placing import COMPANIONS

RECORD = "export.json"
"""The one that names the hashes of the others."""


def companions(
    facts: Facts, record: Mapping[str, Any], preprocessing: Mapping[str, Any], folder: bool
) -> tuple[dict[str, str], dict[str, Any]]:
    """Make them.

    Args:
        facts: What is known of the run.
        record: What the gate found, and which weights these are.
        preprocessing: From `trainer.export.companions.explained.describe_preprocessing`.
        folder: Whether the export is a folder, in which some have other names.

    Returns:
        Texts by their name behind a file's, and the record with their hashes.
    """
    texts = {
        "preprocessing.json": _json(preprocessing),
        "card.md": render_card(facts, record, preprocessing),
        "recipe.yaml": travelling_recipe(facts.run.recipe),
        "citation.bib": bibliography(facts),
    }
    hashes = {COMPANIONS[name] if folder else name: _sha256(text) for name, text in texts.items()}
    whole = {**record, "companions": hashes}
    return {**texts, RECORD: _json(whole)}, whole


def _json(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
