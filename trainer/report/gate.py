"""What the checks of the exports found, in words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from data_shards.errors import counted
from trainer.report.cost import size
from trainer.report.markup import Markup, code, measure, score, section, table, text

_WORDS = {True: ("good", "✓ verified"), False: ("bad", "✗ failed"), None: ("open", "? NOT verified")}


def gate_word(export: dict[str, Any]) -> Markup:
    """Verified, failed or not verified, not by colour alone."""
    kind, word = _WORDS[_verified(export)]
    return Markup(f'<b class="{kind}">{word}</b>')


def gate_figure(exports: Sequence[dict[str, Any]]) -> tuple[Markup, str]:
    """The gate of all exports: the worst result, and why."""
    if not exports:
        return Markup('<span class="open">none</span>'), "this run has not been exported"
    for wanted in (False, None):
        found = [export for export in exports if _verified(export) is wanted]
        if found:
            kind, word = _WORDS[wanted]
            why = "; ".join(f"{export['format']}: {reason(export)}" for export in found)
            return Markup(f'<span class="{kind}">{word}</span>'), why
    names = ", ".join(f"{export['format']} in {_consumer(export)}" for export in exports)
    return Markup(f'<span class="good">{_WORDS[True][1]}</span>'), names


def reason(export: dict[str, Any]) -> str:
    """Why an export passed or did not, from its notes and figures."""
    notes = export.get("notes") or []
    notes = [notes] if isinstance(notes, str) else [str(note) for note in notes]
    difference, tolerance = export.get("max_logit_difference"), export.get("tolerance")
    if not notes and _verified(export) is False and None not in (difference, tolerance):
        notes = [f"logits differ by {measure(difference)}; the tolerance is {measure(tolerance)}"]
    if not notes and _verified(export) is not True:
        notes = ["no reason was recorded"]
    return "; ".join(notes)


def gate_section(exports: Sequence[dict[str, Any]]) -> str:
    """The table of the exports; nothing without any."""
    if not exports:
        return ""
    columns = ("Export", "Gate", "Loaded by", "File", "Logits differ by", "Tolerance", "DSC here", "DSC there")
    rows = [
        (
            code(export["format"]),
            gate_word(export),
            _consumer(export),
            _file(export),
            measure(export.get("max_logit_difference")),
            measure(export.get("tolerance")),
            score(export.get("dsc_run")),
            score(export.get("dsc_consumer")),
        )
        for export in exports
    ]
    lines = [(export["format"], line) for export in exports for line in (_compared(export), reason(export))]
    notes = "".join(f"<li>{code(name)}: {text(line)}</li>" for name, line in lines if line)
    explained = (
        '<p class="note">An export is verified when the tool that it is for has loaded it with its own loader and '
        "given the same logits, within the tolerance.</p>"
    )
    listed = f'<ul class="note">{notes}</ul>' if notes else ""
    return section(
        "Export gate", explained, table(columns, rows, label="Exports and their checks", words=range(4)), listed
    )


def _verified(export: dict[str, Any]) -> bool | None:
    value = export.get("verified")
    return value if isinstance(value, bool) else None


def _compared(export: dict[str, Any]) -> str:
    return f"compared: {export['compared']}" if export.get("compared") else ""


def _consumer(export: dict[str, Any]) -> str:
    return " ".join(str(export[name]) for name in ("consumer", "consumer_version") if export.get(name)) or "no tool"


def _file(export: dict[str, Any]) -> Markup:
    """Name of the file; precision, size and date as far as they were recorded; its hash."""
    about = (
        export.get("dtype"),
        None if export.get("bytes") is None else size(export["bytes"]),
        str(export.get("date") or "").partition("T")[0],
    )
    lines = (", ".join(str(one) for one in about if one), _hashes(export.get("sha256")))
    return Markup(code(export.get("file")) + "".join(f"<br><small>{text(line)}</small>" for line in lines if line))


def _hashes(found: Any) -> str | None:
    """The start of a file's hash; of a folder, which has one for each of its files, their number."""
    if isinstance(found, dict):
        return f"a folder, {counted(len(found), 'hash', 'hashes')} in its record"
    return f"sha256 {str(found)[:16]}…" if found else None
