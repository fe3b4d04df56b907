"""The same targets as every cell outlines them, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from data_shards.errors import counted
from trainer.ablation.results import Result, Results
from trainer.ablation.running import evaluation
from trainer.report.markup import paragraph, section
from trainer.report.page import legend, prompt_legend
from trainer.report.panels import Panel, load_panels
from trainer.report.pictures import Choice, crop_of, tiles

TARGETS = {0.0: "Hardest", 0.5: "Median", 1.0: "Easiest"}
"""Which of the kept targets are shown, by their place in the order of the reference's DSC."""
Place = tuple[str, str, int]


def pictures(results: Results) -> str:
    """A figure for each of some targets, with a picture for every cell of its first seed; nothing without any kept."""
    kept = {row.name: _panels(row.finished[0]) for row in results.rows if row.finished}
    reference = kept.get(results.reference, {})
    shared = [place for place in reference if all(place in panels for panels in kept.values())]
    ranked = sorted(shared, key=lambda place: (reference[place].dsc, place))
    if len(kept) < 2 or not ranked:
        return ""
    wanted = {round(share * (len(ranked) - 1)): why for share, why in TARGETS.items()}
    drawn = [
        _figure(f"{why} for {results.reference}", [(name, panels[ranked[at]]) for name, panels in kept.items()], at)
        for at, why in sorted(wanted.items())
    ]
    note = (
        f"{counted(len(drawn), 'target')} of the {len(ranked)} that were kept as pictures, chosen by the DSC of "
        f"{results.reference}; the numbers are DSC, of the first seed."
    )
    shown = [reference[place] for place in ranked]
    return section("The same targets by each cell", paragraph(note, "note"), legend(prompt_legend(shown)), *drawn)


def _panels(result: Result) -> dict[Place, Panel]:
    """What a cell kept, by key, term and number among the same, which the pictures do not tell."""
    folder = evaluation(result.cell)
    path = folder / "panels.npz" if folder else None
    found: dict[Place, Panel] = {}
    for panel in load_panels(path) if path is not None and path.is_file() else ():
        number = sum((key, term) == (panel.key, panel.term) for key, term, _ in found)
        found[panel.key, panel.term, number] = panel
    return found


def _figure(why: str, sides: Sequence[tuple[str, Panel]], number: int) -> str:
    """One target as each cell sees it; the number is unique on the page."""
    _, panel = sides[0]
    worst = min((side for _, side in sides), key=lambda side: side.dsc)
    drawn = tiles([(name, f"by {name}", side) for name, side in sides], crop_of(Choice("", worst, panel)), number)
    columns = "grid-template-columns:repeat(auto-fill,minmax(min(46%,7.2rem),1fr))"
    return (
        f'<figure class="panel below"><div class="tiles" style="{columns}">{drawn}</div>'
        f"<figcaption><b>{escape(why)}</b> · {escape(panel.term)}<br><small>{escape(panel.key)}</small></figcaption>"
        "</figure>"
    )
