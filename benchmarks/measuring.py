"""What all benchmarks share: their arguments, fair timing in turn, and how figures are printed and kept."""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import torch

from trainer import hardware
from trainer.hardware import settle as settle

Name = TypeVar("Name")

RESULTS = Path(__file__).parent / "results"
"""Where `--save` appends what was measured, a file for each benchmark."""


def arguments(doc: str | None, **defaults: int) -> argparse.Namespace:
    """Read the command line: `--quick`, `--save`, and sizes for tests that no user needs."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smaller, under a minute on two cores")
    parser.add_argument("--save", action="store_true", help="append the result to benchmarks/results, with the machine")
    for name, value in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=value, help=argparse.SUPPRESS)
    return parser.parse_args()


def medians(runs: Mapping[Name, Callable[[], int]], repeats: int) -> dict[Name, float]:
    """Return samples a second by name: medians over rounds that run all in turn, after one round to warm up.

    Args:
        runs: What reads samples and returns how many; what slows the machine down for a while hits all alike.
        repeats: Rounds that count.
    """
    return {name: statistics.median(values) for name, values in in_turn(runs, repeats).items()}


def in_turn(runs: Mapping[Name, Callable[[], int]], repeats: int, warm_up: int = 1) -> dict[Name, list[float]]:
    """Return samples a second of every round by name, all run in turn, after rounds to warm up that do not count."""
    rates: dict[Name, list[float]] = {name: [] for name in runs}
    for round_ in range(1 - warm_up, repeats + 1):
        say(f"round {round_} of {repeats}" if round_ > 0 else "warming up")
        for name, run in runs.items():
            start = time.perf_counter()
            count = run()
            if round_ > 0:
                rates[name].append(count / (time.perf_counter() - start))
    return rates


@dataclass(frozen=True)
class Compared:
    """Two ways to do the same, timed in turn.

    Attributes:
        ours: Samples a second, median over the rounds.
        reference: The other's.
        ratio: Median over the rounds of ours divided by the reference's, so that a machine that changes its speed
            between rounds changes nothing.
        lowest: The lowest of these ratios.
        highest: The highest.
    """

    ours: float
    reference: float
    ratio: float
    lowest: float
    highest: float


def pairwise(ours: Callable[[], int], reference: Callable[[], int], repeats: int, warm_up: int = 1) -> Compared:
    """Time two ways in turn.

    Args:
        ours: Our way; does its work, waits for the device and returns how many samples that were.
        reference: The way that it is compared with.
        repeats: Rounds that count.
        warm_up: Rounds before them.
    """
    rates = in_turn({"ours": ours, "reference": reference}, repeats, warm_up)
    ratios = [one / other for one, other in zip(rates["ours"], rates["reference"], strict=True)]
    return Compared(
        ours=statistics.median(rates["ours"]),
        reference=statistics.median(rates["reference"]),
        ratio=statistics.median(ratios),
        lowest=min(ratios),
        highest=max(ratios),
    )


def device() -> torch.device:
    """The GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def matmul_rate(place: torch.device, dtype: torch.dtype = torch.bfloat16) -> float:
    """What a device reaches in one large matrix product, in 10¹² FLOP/s: see `trainer.hardware.matmul_rate`."""
    side, repeats = (8192, 20) if place.type == "cuda" else (2048, 3)
    return hardware.matmul_rate(place, dtype, [side], rounds=3, repeats=repeats)


def machine() -> str:
    """The machine in words: its GPU if it has one, its processor and how many cores this process may use."""
    own = f"{hardware.cores()} cores of {hardware.processor()}"
    parts = [own, f"torch {torch.__version__}", f"Python {platform.python_version()}"]
    if torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory / 2**30
        parts.insert(0, f"{torch.cuda.get_device_name()} ({memory:.0f} GiB)")
    return ", ".join(parts)


def say(text: str) -> None:
    """Print a line on stderr: what is being done."""
    print(text, file=sys.stderr, flush=True)


def rounded(value: Any) -> Any:
    """Return figures with four digits that mean something."""
    if isinstance(value, dict):
        return {name: rounded(item) for name, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def finish(result: dict[str, Any], save: bool = False) -> None:
    """Print the machine and the last line.

    Args:
        result: What was measured, JSON; ``benchmark`` names it.
        save: Append it to the benchmark's file of results, with date, machine and commit.
    """
    print(f"machine: {machine()}")
    found = rounded(result)
    if save:
        print(f"appended to {_keep(found)}")
    print(json.dumps(found, allow_nan=False), flush=True)


def _keep(found: dict[str, Any]) -> Path:
    """Append a result to its file: one JSON list, a run a line, the newest last."""
    path = RESULTS / f"{found['benchmark']}.json"
    runs = json.loads(path.read_text()) if path.exists() else []
    now = datetime.now(UTC).strftime("%Y-%m-%d")
    runs.append({"date": now, "machine": machine(), "commit": _commit(), **found})
    lines = ",\n".join(json.dumps(run, allow_nan=False) for run in runs)
    part = path.with_suffix(".part")
    part.write_text(f"[\n{lines}\n]\n")
    part.replace(path)
    return path


def _commit() -> str:
    """The commit that was measured, with a plus where files differ from it; empty where there is no git."""

    def git(*command: str) -> str:
        words = ["git", "--no-optional-locks", *command]
        done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=RESULTS.parent)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        commit = git("rev-parse", "--short=12", "HEAD")
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", "../trainer", "../data_shards")
    except OSError:
        return ""
    written = ("benchmarks/results/", "benchmarks/README.md")
    others = [line for line in changed.splitlines() if not line[2:].lstrip().startswith(written)]
    return commit + ("+" if commit and others else "")
