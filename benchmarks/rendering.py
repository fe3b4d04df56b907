"""Turn what the benchmarks found into pages: benchmarks/README.md, and the table in the project's README.

python benchmarks/rendering.py           # after `python benchmarks/NAME.py --save`, or `make bench`, which does both
python benchmarks/rendering.py --names   # the benchmarks that `make bench` runs
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measuring import device

FOLDER = Path(__file__).parent
START, END = "<!-- speed -->\n", "<!-- /speed -->"
"""Where the project's README holds the table."""
Found = dict[str, Any]
"""A kept result."""


@dataclass(frozen=True)
class Claim:
    """A claim and the benchmark that measures it.

    Attributes:
        name: The benchmark.
        what: What is compared, for people.
        reference: What ours is compared with.
        needed: The bar in words.
        sides: Our figure and the reference's in words, of a result.
        ratio: Its figure to be read.
        met: Whether the bar is met.
        needs_gpu: Whether full size is for a GPU alone: elsewhere a tiny model is measured.
    """

    name: str
    what: str
    reference: str
    needed: str
    sides: Callable[[Found], tuple[str, str]]
    ratio: Callable[[Found], str] = lambda found: f"{found['ratio']:.3g}"
    met: Callable[[Found], bool] = lambda found: bool(found["bar"]["met"])
    needs_gpu: bool = False

    def newest(self) -> list[Found]:
        """The newest kept result of every machine, the oldest first; of small sizes where others cannot be."""
        path = FOLDER / "results" / f"{self.name}.json"
        runs = json.loads(path.read_text()) if path.exists() else []
        return list({run["machine"]: run for run in runs if self.needs_gpu or not run["quick"]}.values())

    def command(self) -> str:
        """What `make bench` runs here at full size."""
        return f"{self.name}.py" + (" --quick" if self.needs_gpu and device().type == "cpu" else "")


def rows() -> list[list[str]]:
    """A row for each claim and machine, and one for a claim that has not been measured."""
    table = []
    for claim in CLAIMS:
        command = f"`benchmarks/{claim.name}.py`"
        found = claim.newest()
        for run in found:
            ours, theirs = claim.sides(run)
            verdict = "met" if claim.met(run) else "**not met**"
            figures = [ours, f"{theirs} ({claim.reference})", f"**{claim.ratio(run)}**", f"{claim.needed}: {verdict}"]
            what = claim.what + (" (a tiny model)" if run["quick"] else "")
            table.append([what, *figures, _short(run["machine"]), run["date"], command])
        if not found:
            table.append([claim.what, "not measured yet", claim.reference, "", claim.needed, "", "", command])
    return table


def _short(machine: str) -> str:
    """A machine without its software: the GPU, or cores and processor."""
    return machine.partition(", torch ")[0].replace("(R)", "").replace("(TM)", "")


def table() -> str:
    """The claims as a Markdown table."""
    head = ["what", "ours", "reference", "ratio", "bar", "machine", "date", "how"]
    lines = [head, ["---"] * len(head), *rows()]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def page() -> str:
    """benchmarks/README.md."""
    software = sorted({run["machine"].partition(", ")[2] for claim in CLAIMS for run in claim.newest()})
    runs = sorted({run["commit"] for claim in CLAIMS for run in claim.newest() if run["commit"]})
    return (
        "# What is claimed about speed, and what was measured\n\n"
        "`make bench` runs every benchmark below at the full size of the machine that it is on, appends what it finds "
        "to `benchmarks/results/NAME.json`\nwith date, machine and commit, and writes this page; `make bench QUICK=1` "
        "runs them all at small sizes and keeps nothing. One alone:\n\n"
        "```\n"
        "python benchmarks/step_medsam.py --help     # what is compared, and what each key of its last line means\n"
        "python benchmarks/step_medsam.py --quick    # under a minute on two cores\n"
        "python benchmarks/step_medsam.py --save     # full size, kept\n"
        "benchmarks/gpu_suite.sh                     # the suite for a GPU, ten minutes at most\n"
        "```\n\n"
        "Each is a pairwise run: ours and the reference in turn, in one process, so that what slows the machine down "
        "hits both; the ratio is the\nmedian over the rounds. Ratios of rates are ours over the reference's (more is "
        "better), those of bytes too (less is better). The newest\nresult of each machine is shown.\n\n"
        f"{table()}\n"
        f"Machines and versions: {'; '.join(software) or 'none yet'}. Commits measured (+: with changes on top): "
        f"{', '.join(runs) or 'none yet'}.\n"
    )


def into(text: str) -> str:
    """Put the table into the project's README."""
    before, start, rest = text.partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        raise SystemExit(f"rendering: README.md lacks {START.strip()} … {END}")
    return before + start + table() + end + after


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--names", action="store_true", help="print the files of the benchmarks, and write nothing")
    if parser.parse_args().names:
        print(*(claim.command() for claim in CLAIMS), sep="\n")
        return
    (FOLDER / "README.md").write_text(page(), encoding="utf-8")
    readme = FOLDER.parent / "README.md"
    readme.write_text(into(readme.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"written: {FOLDER / 'README.md'} and the table in {readme}")


def _row(found: Found) -> tuple[str, str]:
    """Images a second of a step's headline."""
    row = next(row for row in found["rows"] if row["ratio"] == found["ratio"])
    return f"{row['images_per_second']:.3g} images/s", f"{row['reference']:.3g}"


def _saved(found: Found) -> tuple[str, str]:
    """MiB an image of the device and precision in which ours keeps most of the reference's."""
    most = max(((place, name) for place, row in found["ratios"].items() for name in row), key=lambda at: _of(found, at))
    sides = found["saved_mib"][most[0]][most[1]]
    return f"{sides['ours']:,.0f} MiB ({most[0].upper()}, {most[1]})", f"{sides['reference']:,.0f}"


def _of(found: Found, at: tuple[str, str]) -> float:
    return float(found["ratios"][at[0]][at[1]])


def _attention(found: Found) -> tuple[str, str]:
    """Milliseconds of a global layer in the precision that the ratio is of."""
    precision = min(found["ratios"], key=found["ratios"].__getitem__)
    times = found["milliseconds"][precision]["global"]
    return f"{times[found['chosen']]:,.0f} ms ({found['chosen']}, {precision}, global)", f"{times['reference']:,.0f}"


def _matched(found: Found) -> tuple[str, str]:
    """Milliseconds at 20 targets a prompt, or the most there are."""
    targets = str(max(number for number in found["targets"] if number <= 20))
    times = found["milliseconds"][targets]
    return f"{times['batched']:.3g} ms at {targets} targets", f"{times['per_image']:.3g}"


def _stops(found: Found) -> tuple[str, str]:
    form = min(found["ratios"], key=found["ratios"].__getitem__)
    stops = found["stop_seconds"][form]
    return f"{stops['background']:.2g} s for {found['megabytes']:,} MB ({form})", f"{stops['blocking']:.2g} s"


def _loaded(found: Found) -> tuple[str, str]:
    rates = found["samples_per_second"]
    return f"{rates['zstd']['loader']:,.0f} samples/s a core", f"{rates['reference_1024']['loader']:.3g}"


CLAIMS: tuple[Claim, ...] = (
    Claim(
        "step_medsam",
        "a MedSAM training step",
        "PyPI segment-anything, MONAI's Dice, BCE",
        "never slower on a CPU; 3 × on a GPU",
        _row,
    ),
    Claim(
        "pairs",
        "image–mask pairs at 3.4 masks an image",
        "the same loop, which encodes an image for each mask",
        "2.8 × on a CPU; 8 × on a GPU",
        lambda found: (
            f"{found['pairs_per_second']['ours']:.3g} pairs/s",
            f"{found['pairs_per_second']['reference']:.3g}",
        ),
    ),
    Claim(
        "memory",
        "bytes kept for the backward pass, MedSAM at 1024², an image",
        "segment-anything's",
        "at most 0.6 ×",
        _saved,
    ),
    Claim(
        "attention",
        "attention with SAM's relative positions (ratio: all twelve layers)",
        "segment-anything's",
        "never slower",
        _attention,
    ),
    Claim("step_sam2", "a SAM2 training step", "PyPI sam2's modules in a bare loop", "never slower", _row),
    Claim(
        "step_sam3",
        "a SAM3 training step with masks",
        "the same, one term an image as Sam3Model is asked",
        "never slower",
        _row,
        needs_gpu=True,
    ),
    Claim(
        "overhead",
        "a run's step beside the same model in a bare loop",
        "the bare loop",
        "at most 3 % longer",
        lambda found: (f"{found['step_ms']['run']:,.0f} ms", f"{found['step_ms']['bare']:,.0f}"),
        lambda found: f"{found['overhead']:+.1%}",
    ),
    Claim(
        "loader",
        "lossless samples read, decoded and put into batches",
        "PNG folders at 1024²",
        "1000 a second and core",
        _loaded,
    ),
    Claim(
        "index",
        "a million samples opened",
        "the tars listed",
        "1 s, 400 MB, 5 s to a first batch",
        lambda found: (f"{found['open_seconds']:.2g} s", f"{found['tar_seconds']:.3g} s"),
        met=lambda found: all(item["met"] for item in found["bar"].values()),
    ),
    Claim(
        "matcher",
        "matching for SAM3's losses (ratio: mean over 1 to 100 targets)",
        "one assignment after another",
        "1 wait a step",
        _matched,
    ),
    Claim(
        "metrics",
        "NSD of masks of 1024²",
        "PyPI surface-distance",
        "5 ×",
        lambda found: (
            f"{found['milliseconds']['ours']:.3g} ms",
            f"{found['milliseconds']['surface_distance']:.3g}",
        ),
    ),
    Claim("checkpoint", "standstill for a checkpoint", "writing it and waiting", "shorter", _stops),
)


if __name__ == "__main__":
    main()
