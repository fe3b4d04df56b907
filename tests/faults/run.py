"""Injects all faults and writes the table: ``python tests/faults/run.py --out FILE [--lanes N] [--only TEXT]``."""

from __future__ import annotations

import argparse
import platform
import queue
import shutil
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections import Counter
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from cases import SAME, Case
from harness import lane
from plan import all_cases

FAILED = "FAILED"


@dataclass(frozen=True)
class Result:
    """What became of a case."""

    case: Case
    outcome: str
    seconds: float

    @property
    def kind(self) -> str:
        if self.outcome.startswith(FAILED):
            return FAILED
        if self.outcome.startswith("left out"):
            return "left out"
        stopped = "stopped" in self.outcome or "killed; the other says" in self.outcome
        if SAME in self.outcome:
            return "one line, then ended as undisturbed" if stopped else "ended as undisturbed"
        return "one line" if "stopped: " in self.outcome else "one line, then went on"


def inject(cases: list[Case], home: Path, lanes: int) -> list[Result]:
    """Go through all cases, so many at a time."""
    todo: queue.SimpleQueue[tuple[int, Case]] = queue.SimpleQueue()
    for item in enumerate(cases):
        todo.put(item)
    found: dict[int, Result] = {}

    def work(number: int) -> None:
        with lane(home / f"lane-{number}") as place:
            while True:
                try:
                    position, case = todo.get_nowait()
                except queue.Empty:
                    return
                started = time.monotonic()
                try:
                    outcome = case.strike(place)
                except AssertionError as error:
                    outcome = f"{FAILED}: {error}"
                except Exception:
                    outcome = f"{FAILED}: {traceback.format_exc()}"
                result = found[position] = Result(case, outcome, time.monotonic() - started)
                print(f"{len(found)}/{len(cases)} {case.kind}: {case.where}: {result.outcome}", flush=True)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(lanes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[position] for position in sorted(found)]


def page(results: list[Result], seconds: float) -> str:
    """The table."""
    counts = Counter(result.kind for result in results)
    by_kind: dict[str, Counter[str]] = {}
    for result in results:
        by_kind.setdefault(result.case.kind, Counter())[result.kind] += 1
    outcomes = sorted(counts)
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "lightning"))
    lines = [
        "# Injected faults",
        "",
        f"{len(results)} faults in {seconds / 60:.0f} minutes, by `make faults` (`tests/faults/`).",
        "Each is injected into a real `trainer fit` of a tiny MedSAM: 12 steps, 4 validations, EMA, a checkpoint after",
        "every second step. A run that was stopped is gone on with by `--ckpt_path last`. *As undisturbed* means the",
        "same samples in the same order, the same losses, validations and best checkpoints, and to the last bit the",
        "same weights and averages as where nothing happened. *One line* means exit code 2 (143 for SIGTERM) and no",
        "traceback.",
        f"CPU, gloo; Python {platform.python_version()}, {versions}.",
        "",
        "| kind | " + " | ".join(outcomes) + " | all |",
        "|---" * (len(outcomes) + 2) + "|",
        *(
            f"| {kind} | " + " | ".join(str(found[name] or "") for name in outcomes) + f" | {found.total()} |"
            for kind, found in by_kind.items()
        ),
        "| all | " + " | ".join(str(counts[name]) for name in outcomes) + f" | {len(results)} |",
        "",
        "| kind | where | outcome | s |",
        "|---|---|---|---|",
    ]
    for result in results:
        cells = (result.case.kind, result.case.where, result.outcome, f"{result.seconds:.0f}")
        lines.append("| " + " | ".join(" ".join(cell.split())[:400].replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run the command; 1 where a case failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="the table")
    parser.add_argument("--lanes", type=int, default=2, help="runs at a time")
    parser.add_argument("--only", help="cases with this in their kind or place")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    cases = [case for case in all_cases() if (options.only or "") in f"{case.kind}: {case.where}"]
    home = Path(tempfile.mkdtemp(prefix="faults-"))
    started = time.monotonic()
    try:
        results = inject(cases, home, options.lanes)
    finally:
        shutil.rmtree(home, ignore_errors=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(page(results, time.monotonic() - started))
    failed = sum(result.kind == FAILED for result in results)
    print(f"{len(results)} faults, {failed} failed: {options.out}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
