"""The report: one HTML file that needs no network, no script and no other file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from data_shards.errors import counted
from trainer.report.answer import answer, limits, scored_unlike
from trainer.report.calibration import calibration_section
from trainer.report.charts import MOST_LINES, jitter_chart, line_chart, paired_plot
from trainer.report.contents import with_contents
from trainer.report.cost import cost_section, millions
from trainer.report.data import Evaluation, RunData
from trainer.report.gate import gate_figure, gate_section
from trainer.report.groups import group_sections, mean_sd, scored_metrics
from trainer.report.markup import Markup, code, duration, facts, paragraph, score, section, signed, table, text
from trainer.report.panels import Panel
from trainer.report.pictures import choose, draw, has_box
from trainer.report.sets import sets_section
from trainer.report.style import STYLE
from trainer.report.words import word_sections
from trainer.scores import values_of

WORST = 10
"""Rows of the table of worst cases."""

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
_LEGEND = (
    ("truth", "truth", "solid", '<path class="truth" d="M4 9h26"/>'),
    ("prediction", "prediction", "dashed and filled", '<path class="prediction" d="M4 4h26v10h-26z"/>'),
)


def render(data: RunData) -> str:
    """Return the page of a run."""
    title = text(f"{data.name} – sam-trainer report")
    body = "\n".join(
        part
        for part in (
            _header(data),
            _key_figures(data),
            _panels(data),
            _training(data),
            _targets(data),
            calibration_section(data),
            _jitter(data),
            *word_sections(data),
            *group_sections(data),
            sets_section(data),
            _worst(data),
            _others(data.others),
            gate_section(data.exports),
            _facts(data),
            cost_section(data),
            _recipe(data.recipe),
        )
        if part
    )
    return document(title, body)


def document(title: str, body: str) -> str:
    """A page that needs no network, no script and no other file.

    Args:
        title: Its title, as HTML.
        body: What it shows, as HTML.
    """
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        f"<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        '<a class="skip" href="#content">Skip to the content</a>\n'
        f'<main id="content" tabindex="-1">\n{with_contents(body)}\n</main>\n</body>\n</html>\n'
    )


def _header(data: RunData) -> str:
    caveat = f'<div class="aside caveat"><p><b>Caveat.</b> {text(data.caveat)}</p></div>' if data.caveat else ""
    unlike = scored_unlike(data)
    warning = f'<div class="aside caveat"><p><b>Not scored alike:</b> {text(unlike)}</p></div>' if unlike else ""
    missing = data.missing()
    lacks = ""
    if missing:
        items = "".join(f"<li>{text(what)}: {code(command)}</li>" for what, command in missing.items())
        lacks = f'<div class="aside"><p><b>Missing here</b>, and what makes it:</p><ul>{items}</ul></div>'
    return "\n".join(
        (
            '<header>\n<p class="kicker">sam-trainer report</p>',
            f"<h1>{text(data.name)}</h1>",
            paragraph(data.question or "The recipe states no question.", "question"),
            paragraph(answer(data), "answer"),
            warning,
            paragraph(" ".join(limits(data)), "note"),
            caveat,
            lacks,
            "</header>",
        )
    )


def _key_figures(data: RunData) -> str:
    model = data.record.get("model") or {}
    total, trainable = model.get("parameters"), model.get("trainable")
    rate, fit = data.images_per_second(), data.stages.get("fit")
    gate, why = gate_figure(data.exports)
    share = (
        f"{trainable / total:.2%} of {millions(total)}".replace("%", " %") if total and trainable is not None else ""
    )
    figures = (
        ("Mean DSC", *_before_after(data, "dsc")),
        ("Mean IoU", *_before_after(data, "iou")),
        *((("Mean NSD", *_before_after(data, "nsd")),) if "nsd" in scored_metrics(data.scores()) else ()),
        ("Images per second", f"{rate:,.3g}" if rate else None, "median over the training" if rate else "not logged"),
        ("Parameters that learn", millions(trainable), share or "not recorded"),
        ("Time to fit", duration(fit), data.record.get("hardware") or ""),
        ("Export gate", gate, why),
    )
    items = "\n".join(
        f'<div><dt>{name}</dt><dd class="big">{text(value)}</dd>'
        + (f'<dd class="small">{text(small)}</dd></div>' if small else "</div>")
        for name, value, small in figures
    )
    return section("Key figures", f'<dl class="figures">\n{items}\n</dl>')


def _before_after(data: RunData, name: str) -> tuple[str | Markup | None, str]:
    compared = data.compare(name)
    if compared:
        small = f"{signed(compared.gain)} on {counted(compared.count, 'target')}"
        return Markup(f'<span class="was">{score(compared.before)} →</span> {score(compared.after)}'), small
    only = data.after or data.before
    if only is None:
        return None, "not evaluated"
    when = f"{'after' if data.after else 'before'} tuning, {counted(len(only.scores), 'target')}"
    return score(float(values_of(only.scores, name).mean())), when


def _panels(data: RunData) -> str:
    choices = choose(data)
    if not choices:
        return ""
    kept = max(len(evaluation.panels) for evaluation in (data.before, data.after) if evaluation)
    ranked = any(choice.rank for choice in choices)
    ranks = " Ranks are among all targets that were scored, the best being the 1st." if ranked else ""
    note = (
        f"{counted(len(choices), 'target')} of the {kept} that were kept as pictures, from worst to best by DSC"
        f"{' after tuning' if data.after else ''}; the numbers are DSC.{ranks}"
    )
    figures = "\n".join(draw(choice, number) for number, choice in enumerate(choices))
    paired = any(choice.before and choice.after for choice in choices)
    return section(
        "Before and after" if paired else "Pictures",
        paragraph(note, "note"),
        legend(prompt_legend([choice.panel for choice in choices])),
        f'<div class="{"panels" if paired else "panels single"}">\n{figures}\n</div>',
    )


def legend(prompt: Sequence[tuple[str, str, str, str]] = ()) -> str:
    """What the lines of pictures mean; each can be switched off.

    Args:
        prompt: The line of the prompt, from `prompt_legend`.
    """
    items = "".join(
        f'<label><input type="checkbox" id="show-{kind}" checked>'
        f'<svg viewBox="0 0 34 18" aria-hidden="true">{mark}</svg>'
        f"<span>{name} <small>({how})</small></span></label>"
        for kind, name, how, mark in (*_LEGEND, *prompt)
    )
    return f'<div class="legend" role="group" aria-label="Legend: what is drawn">{items}</div>'


def prompt_legend(panels: Sequence[Panel]) -> list[tuple[str, str, str, str]]:
    """The prompt's line of the legend; none where a model was asked in words, of which nothing is drawn."""
    box = '<rect class="prompt" x="4" y="4" width="26" height="10"/>'
    if not any(len(panel.points) for panel in panels):
        drawn = any(has_box(panel) for panel in panels)
        return [("prompt", "box", "dotted: the prompt", box)] if drawn else []
    return [("prompt", "prompt", "dotted box; circle: on the target; cross: beside it", box)]


def _training(data: RunData) -> str:
    loss, dsc, checks = (data.curves.get(name, {}) for name in ("train/loss", "train/dsc", "val/dsc"))
    charts = []
    if loss:
        charts.append(f"<figure><h3>Loss</h3>{line_chart(loss, name='training loss')}</figure>")
    if dsc:
        chart = line_chart(dsc, name="training DSC", bounds=(0.0, 1.0), points=checks)
        charts.append(f"<figure><h3>DSC</h3>{chart}</figure>")
    if not charts:
        return ""
    marks = " Circles: DSC of the validation split." if dsc and checks else ""
    note = f"Faint: as logged, a batch a point. Strong: smoothed.{marks}{_forgotten(data)}"
    return section("Training", f'<div class="charts">{"".join(charts)}</div>', paragraph(note, "note"))


def _forgotten(data: RunData) -> str:
    """How the last validation compares with the untouched model's on the same targets."""
    gain, worse = (data.curves.get(f"val/{name}", {}) for name in ("dsc_gain", "targets_worse"))
    if not gain or not worse:
        return ""
    last = max(gain)
    return (
        f" At the last validation (step {last}) mean DSC differed from the untouched model's on the same targets by "
        f"{signed(gain[last])}; {worse.get(last, 0.0):.0%} of the targets were clearly worse.".replace("%", "\u00a0%")
    )


def _targets(data: RunData) -> str:
    pairs, compared = data.pairs(), data.compare("dsc")
    if not compared:
        return ""
    named = [(f"{after.key} · {after.term}", before.dsc, after.dsc) for before, after in pairs]
    gains = [after.dsc - before.dsc for before, after in pairs]
    fewer = f"<p>Lines are drawn for {MOST_LINES} of them, evenly chosen.</p>" if len(pairs) > MOST_LINES else ""
    words = facts(
        (
            ("Rose (solid blue)", f"{compared.rose} of {compared.count}"),
            ("Fell (dashed red)", f"{compared.fell} of {compared.count}"),
            ("Smallest gain", signed(min(gains))),
            ("Largest gain", signed(max(gains))),
        )
    )
    note = (
        '<p class="note">A line is a target: point at it for its name. Boxes: quartiles and median; whiskers: the last '
        "target within 1.5 interquartile ranges.</p>"
    )
    figure = f"<figure>{paired_plot(named, 'DSC')}</figure>"
    return section("Every target", f'<div class="charts">{figure}<div class="words">{words}{note}{fewer}</div></div>')


def _jitter(data: RunData) -> str:
    """How scores fall when boxes are off."""
    found = {"before": data.before, "after": data.after}
    curves = {name: evaluation.jitter for name, evaluation in found.items() if evaluation and evaluation.jitter}
    if not curves:
        return ""
    last = list(curves.values())[-1]
    counts = " and ".join(f"{counted(curve.targets, 'target')} {name} tuning" for name, curve in curves.items())
    note = (
        f"Mean DSC when every side of the box is pushed outwards (above 0) or inwards (below 0) by so many pixels of "
        f"an input with {last.side} px a side: {counts}. The steeper a curve falls, the less a model forgives a box "
        "that is off."
    )
    legend = {"before": "grey, dashed: before tuning", "after": "blue: after tuning"}
    words = "; ".join(legend[name] for name in curves)
    figure = f"<figure>{jitter_chart(curves)}</figure>"
    body = f'<div class="words">{paragraph(note, "note")}{paragraph(words[0].upper() + words[1:] + ".", "note")}</div>'
    return section("Boxes that are off", f'<div class="charts">{figure}{body}</div>')


def _worst(data: RunData) -> str:
    pairs, label = data.pairs(), "The targets with the lowest DSC"
    nsd = "nsd" in scored_metrics(data.scores())
    if pairs:
        columns = ("Term", "DSC before", "DSC after", "Gain", *(("NSD after",) if nsd else ()), "Area (px)", "Sample")
        ranked = sorted(pairs, key=lambda pair: pair[1].dsc)[:WORST]
        rows: list[tuple[Any, ...]] = [
            (
                *(a.term, score(b.dsc), score(a.dsc), signed(a.dsc - b.dsc)),
                *((score(a.nsd),) if nsd else ()),
                *(f"{a.area_px:,}", code(a.key)),
            )
            for b, a in ranked
        ]
        return section("Worst cases", table(columns, rows, label=label, words=(0, len(columns) - 1)))
    alone = sorted(data.scores(), key=lambda row: row.dsc)[:WORST]
    rows = [
        (row.term, score(row.dsc), *((score(row.nsd),) if nsd else ()), f"{row.area_px:,}", code(row.key))
        for row in alone
    ]
    names = ("Term", "DSC", *(("NSD",) if nsd else ()), "Area (px)", "Sample")
    table_ = table(names, rows, label=label, words=(0, len(names) - 1))
    return section("Worst cases", table_) if rows else ""


def _others(evaluations: Sequence[Evaluation]) -> str:
    if not evaluations:
        return ""
    metrics = scored_metrics([row for evaluation in evaluations for row in evaluation.scores])
    rows = [(e.name, len(e.scores), *(mean_sd(e.scores, metric) for metric in metrics)) for e in evaluations]
    columns = ("Evaluation", "n", *({"dsc": "DSC", "iou": "IoU", "nsd": "NSD"}[metric] for metric in metrics))
    return section("Other evaluations", table(columns, rows, label="Other evaluations"))


def _facts(data: RunData) -> str:
    record = data.record
    if not record:
        return section(
            "About the run", paragraph("The run has no run.json, so its circumstances are not known.", "note")
        )
    model, versions = record.get("model") or {}, record.get("versions") or {}
    commit = record.get("git_commit")
    changed = " with uncommitted changes" if record.get("git_dirty") else ""
    preprocessing = ", ".join(f"{name} {value}" for name, value in (model.get("preprocessing") or {}).items())
    known = facts(
        (
            ("Model", model.get("name")),
            ("Tuning", record.get("tuning")),
            ("Precision", record.get("precision")),
            ("Hardware", record.get("hardware")),
            ("Processes", record.get("world_size")),
            ("Seed", record.get("seed")),
            ("Preprocessing", preprocessing),
            ("Git commit", Markup(f"{code(commit)}{changed}") if commit else None),
            (
                "Versions",
                Markup(", ".join(f'<span class="whole">{text(f"{n} {v}")}</span>' for n, v in versions.items())),
            ),
        )
    )
    splits = [
        (split, code(of.get("folder")), code(of.get("index_sha256")), of.get("samples"))
        for split, of in data.splits().items()
    ]
    columns = ("Data", "Folder", "SHA-256 of the index", "Samples")
    shards = table(columns, splits, label="Data of the run", words=range(3)) if splits else ""
    return section("About the run", known, f'<div class="below">{shards}</div>' if shards else "")


def _recipe(recipe: str) -> str:
    return section("Recipe", f"<details><summary>As it was resolved</summary><pre>{text(recipe)}</pre></details>")
