"""The one table of all checks: their files are named here, and what is in them registers itself."""

from __future__ import annotations

from data_shards.lint import checks, duplicates, images, leaks, terms
from data_shards.lint.findings import CHECKS

__all__ = ["CHECKS", "checks", "duplicates", "images", "leaks", "terms"]
