"""What is wrong with this data, before a node is booked: ``lint(folder)`` returns a `Report`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from data_shards.lint.findings import Check, Finding, Report
    from data_shards.lint.linter import lint

__all__ = ["Check", "Finding", "Report", "lint"]


def __getattr__(name: str) -> Any:
    """Import what is asked for only then, so that the command's help is fast."""
    if name not in __all__:
        raise AttributeError(name)
    from data_shards.lint import findings, linter

    return getattr(linter if name == "lint" else findings, name)
