"""A run's result in one small JSON object."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trainer.report.data import Evaluation, RunData
from trainer.scores import values_of


def summarize(data: RunData) -> dict[str, Any]:
    """Return the run's figures; None where something is not known.

    Means are over the targets that both evaluations scored; with one evaluation, or two that share no target, over all
    of the last.
    """
    dsc, iou, nsd = data.compare("dsc"), data.compare("iou"), data.compare("nsd")
    first = None if data.after else data.before  # means of different targets do not stand side by side
    return {
        "dsc_before": dsc.before if dsc else _mean(first, "dsc"),
        "dsc_after": dsc.after if dsc else _mean(data.after, "dsc"),
        "iou_before": iou.before if iou else _mean(first, "iou"),
        "iou_after": iou.after if iou else _mean(data.after, "iou"),
        "nsd_before": nsd.before if nsd else _mean(first, "nsd"),
        "nsd_after": nsd.after if nsd else _mean(data.after, "nsd"),
        "targets": len(data.scores()) or None,
        "volumes": len({row.volume for row in data.scores()}) or None,
        "dsc_gain_ci95": list(dsc.gain_ci95) if dsc and dsc.gain_ci95 else None,
        "p_value": dsc.p_value if dsc else None,
        "images_per_second": data.images_per_second(),
        "seconds": round(sum(data.stages.values()), 2) if data.stages else None,
        "stages": data.stages or None,
        "export_verified": exports_verified(data.exports),
        "versions": data.record.get("versions"),
    }


def exports_verified(exports: Sequence[dict[str, Any]]) -> bool | None:
    """True only if every export passed its gate; None without exports."""
    return all(export.get("verified") is True for export in exports) if exports else None


def _mean(evaluation: Evaluation | None, score: str) -> float | None:
    if evaluation is None:
        return None
    values = values_of(evaluation.scores, score)
    return float(values.mean()) if values.size else None
