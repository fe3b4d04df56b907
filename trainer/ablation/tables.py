"""The tables of an ablation, as Markdown and as LaTeX; the page and the terminal take the same cells."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from data_shards.errors import counted
from trainer.ablation.cells import FROM_SCRATCH
from trainer.ablation.results import KINDS, METRICS, Entry, Result, Results, Row, costs
from trainer.ablation.spec import Loaded
from trainer.report.markup import UNKNOWN, duration, score, signed
from trainer.report.records import read_record
from trainer.run import write_whole

NAMES = {"dsc": "DSC", "nsd": "NSD"}
COSTS = 7
"""Columns of costs in the main table, after the cell's name; those of scores follow."""
LEVEL = 0.05
"""A corrected p-value below it is marked."""
BETTER, WORSE = "*", "↓"


@dataclass(frozen=True)
class Table:
    """A table in words.

    Attributes:
        title: What it shows.
        columns: Headings.
        rows: Cells.
        words: Positions of the columns that are text; the others are numbers.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    words: tuple[int, ...] = (0,)


def count(number: int | None) -> str:
    """A number of parameters in few digits."""
    if number is None:
        return UNKNOWN
    return f"{number / 1e6:,.2f} M" if number >= 1e6 else f"{number / 1e3:,.1f} k" if number >= 1e3 else str(number)


def size(number: int | None) -> str:
    """Bytes in few digits."""
    if number is None:
        return UNKNOWN
    return f"{number / 1e6:,.1f} MB" if number >= 1e5 else f"{number / 1e3:,.1f} kB"


def spread(entry: Entry | None) -> str:
    """Median [quartiles], with a mark where it differs from the reference beyond chance."""
    if entry is None:
        return UNKNOWN
    return f"{score(entry.median)} [{score(entry.q1)}, {score(entry.q3)}]{mark(entry)}"


def mark(entry: Entry) -> str:
    """The sign of a difference beyond chance; nothing where there is none."""
    if entry.p_holm is None or entry.p_holm >= LEVEL or not entry.difference:
        return ""
    return BETTER if entry.difference > 0 else WORSE


def _p(value: float | None) -> str:
    return UNKNOWN if value is None else "<\u00a00.001" if value < 0.001 else f"{value:.2g}"


def difference(entry: Entry | None, reference: str) -> tuple[str, str]:
    """Mean difference with its interval, and the corrected p-value."""
    if entry is None or entry.cell == reference:
        return ("reference" if entry else UNKNOWN), UNKNOWN
    if entry.difference is None:
        return UNKNOWN, UNKNOWN
    ends = (
        None
        if entry.difference_low is None
        else f" ({signed(entry.difference_low)} to {signed(entry.difference_high)})"
    )
    return signed(entry.difference) + (ends or ""), _p(entry.p_holm)


def main_table(results: Results) -> Table:
    """A row for each cell: its costs, its scores over all targets, and its difference from the reference."""
    lines = []
    for row in results.rows:
        entries = {name: results.entry(row.name, name) for name in METRICS}
        gain, p = difference(entries["dsc"], results.reference)
        lines.append((row.name, *cost_cells(row), *(spread(entries[name]) for name in METRICS), gain, p))
    memory = "Peak memory" if _on_gpu(results) else "Peak memory (process)"
    return Table(
        "Cost and scores over all targets",
        (
            *("Cell", "Learns", "% of all", "To keep", "Checkpoint", memory, "Images/s", "Time to fit"),
            *("DSC, median [Q1, Q3]", "NSD, median [Q1, Q3]", "Mean difference of DSC (95 % CI)", "p (Holm)"),
        ),
        tuple(lines),
    )


def cost_cells(row: Row) -> tuple[str, ...]:
    """What a cell costs, in words."""
    known = {name: value for name, value in costs(row).items() if isinstance(value, int | float)}
    share, memory, rate, seconds = (
        known.get(name) for name in ("learning_share", "peak_memory_gib", "images_per_second", "fit_seconds")
    )
    kept, checkpoint = known["learning_bytes"], known.get("checkpoint_bytes")
    return (
        count(row.results[-1].learning),
        FROM_SCRATCH if row.specialist else UNKNOWN if share is None else f"{100 * share:.2f}",
        size(int(kept)) if kept else "nothing",
        size(None if checkpoint is None else int(checkpoint)),
        UNKNOWN if memory is None else f"{memory:.2f} GiB",
        UNKNOWN if rate is None else f"{rate:.3g}",
        UNKNOWN if seconds is None else duration(seconds),
    )


def _on_gpu(results: Results) -> bool:
    return any(one.on_gpu for row in results.rows for one in row.finished)


def group_tables(results: Results) -> list[Table]:
    """Scores of each data set and each modality, a column for each cell; nothing where there is only one."""
    tables = []
    for kind in KINDS[1:]:
        groups = results.groups(kind)
        for metric in METRICS if groups else ():
            lines = []
            for group in groups:
                entries = [results.entry(row.name, metric, kind, group) for row in results.rows]
                targets = max((one.n for one in entries if one), default=0)
                lines.append((group, f"{targets:,}", *(spread(one) for one in entries)))
            title = f"{NAMES[metric]} by {'data set' if kind == 'dataset' else kind}, median [Q1, Q3]"
            head = "Data set" if kind == "dataset" else "Modality"
            tables.append(Table(title, (head, "n", *(row.name for row in results.rows)), tuple(lines)))
    return tables


def seed_table(results: Results) -> Table | None:
    """Mean DSC of each seed, where there are several: how much of a difference is the seed's."""
    seeds = sorted({one.cell.seed for row in results.rows if row.tuned for one in row.results})
    if len(seeds) < 2:
        return None
    lines = []
    for row in results.rows:
        by_seed = {one.cell.seed: _mean(one) for one in row.results} if row.tuned else {}
        lines.append((row.name, *(by_seed.get(seed, UNKNOWN) for seed in seeds)))
    return Table("Mean DSC of each seed", ("Cell", *(f"seed {seed}" for seed in seeds)), tuple(lines))


def _mean(result: Result) -> str:
    values = [one.dsc for one in result.scores]
    return score(sum(values) / len(values)) if values else result.standing.state


def jitter_table(results: Results) -> Table | None:
    """Mean DSC with boxes that are off, over the seeds; nothing where no recipe asks for it."""
    curves = {row.name: [one.jitter for one in row.finished if one.jitter] for row in results.rows}
    shifts = sorted({shift for found in curves.values() for curve in found for shift in curve.shifts})
    if not shifts:
        return None
    lines = []
    for name, found in curves.items():
        cells = []
        for shift in shifts:
            values = [curve.dsc[curve.shifts.index(shift)] for curve in found if shift in curve.shifts]
            cells.append(score(sum(values) / len(values)) if values else UNKNOWN)
        lines.append((name, *cells))
    side = next(curve.side for found in curves.values() for curve in found)
    title = f"Mean DSC when every side of the box is pushed outwards (inwards below 0) by pixels of {side}"
    return Table(title, ("Cell", *(f"{shift:+g} px" if shift else "0 px" for shift in shifts)), tuple(lines))


def all_tables(results: Results) -> list[Table]:
    """Every table, the main one first."""
    more = (seed_table(results), jitter_table(results))
    return [main_table(results), *group_tables(results), *(one for one in more if one)]


def missing(results: Results) -> list[str]:
    """Cells without scores, each with why, in words."""
    said = {"waiting": "not begun", "begun": "stopped on the way", "trained": "trained, not scored yet"}
    found = []
    for one in results.unfinished:
        how = one.standing
        reason = f"FAILED in {how.reason}" if how.state == "failed" else said.get(how.state, "has no targets")
        found.append(f"{one.cell.title}: {reason}")
    return found


def notes(loaded: Loaded, results: Results) -> list[str]:
    """What the tables mean, and what limits them."""
    spec, seeds = loaded.spec, len(loaded.spec.seeds)
    entry = next((one for one in results.entries if one.kind == "all"), None)
    found = [f"Every cell: {spec.budget.describe()}, the same data in the same order for the same seed."]
    found += _unmatched(results)
    found += [
        f"{row.name} is no foundation model but a specialist: it knows nothing before the first step, and all of it "
        "learns, so that no share is given. Images, boxes and steps are those of the others."
        for row in results.rows
        if row.specialist
    ]
    if entry:
        where = counted(entry.volumes, "volume")
        found.append(
            f"Scores of {counted(entry.n, 'target')} from {where}; the targets of one volume are not "
            "independent of each other, so that intervals and p-values are too confident where a volume has "
            "many."
        )
    if seeds > 1:
        found.append(
            "A target's scores by several seeds are averaged first: the target is the unit, not the seed. "
            "Cells are compared on the seeds that both have finished."
        )
    found.append(
        f"{BETTER} better, {WORSE} worse than {results.reference}: two-sided Wilcoxon signed-rank test on the same "
        f"targets, corrected by Holm over all tests of the same kind of group, p < {LEVEL}. Intervals: percentile "
        "bootstrap of 10,000 resamples."
    )
    found.append(
        "To keep: the parameters that learnt, in fp32. Checkpoint: the file from which a training goes on, with "
        "the optimiser's state. Peak memory: "
        + (
            "tensors on the GPU."
            if _on_gpu(results)
            else "the whole training process, its libraries included, since it ran without a GPU."
        )
    )
    return found


def _unmatched(results: Results) -> list[str]:
    """Cells whose data are others on purpose."""
    by_name = {row.name: row.results[0].cell.unmatched for row in results.rows}
    return [f"{name} differs in its data: {', '.join(parts)}." for name, parts in by_name.items() if parts]


def hardware(results: Results) -> str:
    """What the cells ran on."""
    return ", ".join(dict.fromkeys(one.hardware for row in results.rows for one in row.finished if one.hardware))


def software(results: Results) -> str:
    """What computed the cells: packages, and the commit where it is known."""
    found = []
    for one in (one for row in results.rows for one in row.finished):
        record = read_record(one.cell.run.record)
        versions = record.get("versions") or {}
        named = [f"{name} {versions[name]}" for name in ("sam-trainer", "torch", "lightning") if name in versions]
        commit = str(record.get("git_commit") or "")[:10]
        found.append(", ".join([*named, *([f"commit {commit}"] if commit else [])]))
    return "; ".join(dict.fromkeys(line for line in found if line))


def write_markdown(path: Path, loaded: Loaded, results: Results) -> None:
    """Write ``results.md``."""
    parts = [f"# {loaded.name}", loaded.question]
    if loaded.caveat:
        parts.append(f"**Caveat.** {loaded.caveat}")
    for one in all_tables(results):
        parts += [f"## {one.title}", _markdown(one)]
    lacking = missing(results)
    if lacking:
        parts += ["## Not finished", "\n".join(f"- {_pipes(line)}" for line in lacking)]
    ran = hardware(results)
    parts += ["## How to read this", "\n".join(f"- {line}" for line in notes(loaded, results))]
    if ran:
        parts.append(f"Ran on: {ran}.")
    write_whole(path, "\n\n".join(part for part in parts if part) + "\n")


def _markdown(table: Table) -> str:
    rules = ["---" if place in table.words else "---:" for place in range(len(table.columns))]
    lines = [table.columns, rules, *table.rows]
    return "\n".join("| " + " | ".join(map(_pipes, line)) + " |" for line in lines)


def _pipes(text: str) -> str:
    return text.replace("|", "\\|").replace("*", "\\*")
