"""What only a person can say of exported weights: ``trainer export --card FILE.yaml``."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from data_shards.errors import UserError
from data_shards.schema import from_mapping, load_yaml


@dataclass(frozen=True)
class Given:
    """The keys of that file; whatever is left out stands in the card as "not given".

    Attributes:
        title: The model's name, in place of the run's.
        version: Its version.
        authors: Who made it.
        contact: Whom to ask.
        homepage: Where it is found.
        licence: Licence of the exported weights, such as ``apache-2.0``.
        intended_use: What it is meant for, by whom, on whom.
        out_of_scope: What it is not meant for.
        limitations: Known limits besides those that the run's files show.
        risks: Known risks, and what was done about them.
        human_oversight: Who checks what it draws, and how.
        ethics: Approval of an ethics committee, or why none was needed.
        acceptable_use: Rules that users agree to.
        funding: Who paid.
        energy: Energy that the training took, and how that was measured.
        data_consent: On what ground the data were obtained and used.
        bias: What was looked into of how patients and devices are represented.
    """

    title: str = ""
    version: str = ""
    authors: list[str] = field(default_factory=list)
    contact: str = ""
    homepage: str = ""
    licence: str = ""
    intended_use: str = ""
    out_of_scope: str = ""
    limitations: str = ""
    risks: str = ""
    human_oversight: str = ""
    ethics: str = ""
    acceptable_use: str = ""
    funding: str = ""
    energy: str = ""
    data_consent: str = ""
    bias: str = ""


def read_given(path: str | Path | None) -> Given:
    """Read the file; without one nothing is given.

    Raises:
        UserError: It is missing, no YAML, or has an unknown key.
    """
    if path is None:
        return Given()
    if not Path(path).is_file():
        raise UserError(f"--card {path}: no such file: give a YAML file with keys such as authors, contact, licence")
    return from_mapping(Given, load_yaml(Path(path)), str(path))
