"""What is known of released weights by the name under which recipes have them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from trainer.export.companions.facts import Facts
from trainer.export.companions.travelling import hub_name, last_part
from trainer.models.weights import PINNED


@dataclass(frozen=True)
class Base:
    """Weights that a run began with.

    Attributes:
        name: How they are called, without a path of the machine.
        hub: Their name on the hub; empty where they have none, or it is not known.
        licence: Licence under which they were released; None where that is not known.
        sha256: What the recipe wants their file to hash to.
    """

    name: str
    hub: str = ""
    licence: str | None = None
    sha256: str | None = None


_LICENCES: Mapping[str, str] = {
    "litemedsam": "Apache-2.0",
    "wanglab/medsam-vit-base": "Apache-2.0",
    "facebook/sam-vit-": "Apache-2.0",
    "facebook/sam2": "Apache-2.0",
    "facebook/sam3": "SAM License",
}
"""Licence of released weights, by how their name begins, as their publishers state it."""


def base_of(facts: Facts) -> Base | None:
    """What a run began with: None for random weights, without a name where the recipe does not say it."""
    arguments = facts.node("model")[1]
    if "weights" not in arguments:
        return Base("")
    source, sha256 = arguments["weights"], arguments.get("weights_sha256")
    if source is None:
        return None
    name = str(source)
    hub = hub_name(name)
    known = hub or (name if name in PINNED else "")
    licence = next((found for start, found in _LICENCES.items() if known.startswith(start)), None)
    return Base(name if known else last_part(name), hub, licence, sha256)
