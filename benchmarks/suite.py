"""Run the benchmarks of a GPU one after another within a time, and put what they found into one file and one table.

benchmarks/gpu_suite.sh calls it; without a GPU everything is tiny.

The file holds one JSON object:
  suite          "gpu"
  date           of the run
  machine        it in words
  tiny           whether there was no GPU, so that nothing here is about speed
  seconds        that it took
  matmul_tflops  what the device reaches in a matrix product in bf16, what MFU is measured against
  parts          by benchmark {"ended": null, "left out", "no time left" or what went wrong, "seconds", "result": its
                 last line, null without one; where it ended badly "why", and "output": its last lines}
  rows           all rows of the table: {"benchmark", "what", "ours", "reference", "ratio", "mfu", "peak_gib"}
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from measuring import device, machine, matmul_rate, rounded, say

FOLDER = Path(__file__).parent
LIMIT = 570
"""Seconds that the whole may take on a GPU."""
SLOW = 240
"""Seconds that a benchmark may take at tiny size: a busy machine is no failure."""
SHARED = ("transformers", "lightning", "peft", "timm", "scipy", "safetensors", "yaml", "zstandard", "pycocotools")
"""What every benchmark imports besides torch."""
LOOP = ("segment_anything", "monai")
"""What MedSAM's published loop is made of."""


@dataclass(frozen=True)
class Part:
    """A benchmark of the suite.

    Attributes:
        name: Its file, without ``.py``.
        seconds: That it may take.
        needs: Packages that it imports besides `SHARED`.
        full: What it is told on a GPU.
        tiny: What it is told without one.
    """

    name: str
    seconds: int
    needs: tuple[str, ...] = ()
    full: str = ""
    tiny: str = "--quick"


PARTS = (
    Part("step_medsam", 190, LOOP, "--seconds 150", "--quick --side 64 --depth 2 --rounds 1"),
    Part("step_sam3", 120, (), "--seconds 90", "--quick --images 2 --prompts 2 --steps 1 --rounds 1"),
    Part("step_sam2", 90, ("sam2", "monai"), "--seconds 65", "--quick --side 64 --rounds 1 --cases 1"),
    Part("pairs", 60, LOOP, "", "--quick --rounds 1 --side 64 --depth 2"),
    Part("attention", 60, (), "", "--quick --side 8 --rounds 1"),
    Part("memory", 45, (), "", "--quick --side 64 --depth 2"),
    Part("matcher", 35, (), "", "--quick --prompts 4 --layers 2 --rounds 1"),
)


def missing(names: Sequence[str]) -> list[str]:
    """Packages that cannot be imported."""
    return [name for name in names if importlib.util.find_spec(name) is None]


def run(part: Part, tiny: bool, left: float) -> dict[str, Any]:
    """Run a benchmark; what it prints is seen.

    Args:
        part: The benchmark.
        tiny: Whether there is no GPU.
        left: Seconds that are left of the whole.
    """
    path = FOLDER / f"{part.name}.py"
    started = time.perf_counter()
    lacking = missing((*SHARED, *part.needs))
    if not path.exists():
        return _ended(part, "left out", started, f"{path.name} is not there")
    if lacking:
        wheels = "its wheel" if len(lacking) == 1 else "their wheels"
        return _ended(part, "left out", started, f"{path.name} needs {', '.join(lacking)} (carry {wheels})")
    limit = min(SLOW if tiny else part.seconds, left)
    if limit < 5:
        return _ended(part, "no time left", started, f"{path.name}: the whole may take {LIMIT} s")
    print(f"== {path.name}, {limit:.0f} s at most", flush=True)
    command = [sys.executable, str(path), *(part.tiny if tiny else part.full).split()]
    done, output = _watched(command, limit)
    last = output.rstrip().rpartition("\n")[2]
    try:
        result = json.loads(last) if done == 0 else None
    except json.JSONDecodeError:
        result = None
    if result is None:
        why = "took too long" if done is None else f"status {done}: {last.strip()[:200] or 'it said nothing'}"
        return _ended(part, why, started, why, output)
    return {"ended": None, "seconds": time.perf_counter() - started, "result": result}


def _watched(command: Sequence[str], limit: float) -> tuple[int | None, str]:
    """Run a command and show what it prints; its status (None: it took too long), and what it printed."""
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    ) as process:
        try:
            output, _ = process.communicate(timeout=limit)
            status: int | None = process.returncode
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # with the workers that it started
            output, _ = process.communicate()
            status = None
    print("".join(f"   {line}\n" for line in output.splitlines()), end="", flush=True)
    return status, output


def _ended(part: Part, ended: str, started: float, why: str, output: str = "") -> dict[str, Any]:
    """What is kept of a benchmark without a result: its last lines, and those that it had measured."""
    say(f"{'left out' if ended == 'left out' else part.name}: {why}")
    kept = [line for line in output.splitlines() if line.strip()][-20:]
    return {"ended": ended, "why": why, "seconds": time.perf_counter() - started, "result": None, "output": kept}


def rows_of(name: str, result: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of the table: those that a step benchmark has itself, else one."""
    found = []
    for row in result.get("rows") or ():
        if isinstance(row, dict) and "images_per_second" in row:
            what = f"{row['way']}, {row['precision']}, {row['images']} × {row['masks']}"
            values = (row["images_per_second"], row["reference"], row["ratio"], row["mfu"], row["peak_gib"])
            found.append((what, *values))
    if not found:
        sides = result.get("pairs_per_second")
        both = (sides.get("ours"), sides.get("reference")) if isinstance(sides, dict) else (None, None)
        ratio = result.get("ratio")
        found = [("", *both, ratio if isinstance(ratio, int | float) else None, None, None)]
    keys = ("what", "ours", "reference", "ratio", "mfu", "peak_gib")
    return [{"benchmark": name, **dict(zip(keys, values, strict=True))} for values in found]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows for people."""

    def cell(value: Any, form: str = ".3g") -> str:
        return "-" if value is None else format(value, form) if isinstance(value, int | float) else str(value)

    lines = [("benchmark", "what", "ours/s", "reference/s", "ratio", "MFU", "peak GiB")]
    lines += [
        (
            *(row["benchmark"], row["what"], cell(row["ours"]), cell(row["reference"]), cell(row["ratio"])),
            *(cell(row["mfu"], ".1%"), cell(row["peak_gib"], ".1f")),
        )
        for row in rows
    ]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file")
    parser.add_argument("--only", nargs="+", choices=[part.name for part in PARTS], help="some of the benchmarks")
    values = parser.parse_args()
    started, place = time.perf_counter(), device()
    tiny = place.type != "cuda"
    print(f"machine: {machine()}")
    if tiny:
        print("no GPU here: everything is tiny, and nothing is about speed")
    rate = matmul_rate(place)
    print(f"matrix product in bf16: {rate:.4g} TFLOP/s", flush=True)
    if not tiny:
        torch.cuda.empty_cache()
    whole = 4 * LIMIT if tiny else LIMIT
    parts: dict[str, dict[str, Any]] = {}
    rows: list[dict[str, Any]] = []

    def keep() -> None:
        """Write what is there: a machine that is taken away leaves the rest."""
        found = {
            "suite": "gpu",
            "date": datetime.now(UTC).strftime("%Y-%m-%d"),
            "machine": machine(),
            "tiny": tiny,
            "seconds": time.perf_counter() - started,
            "matmul_tflops": rate,
            "parts": parts,
            "rows": rows,
        }
        part = values.out.with_suffix(".part")
        part.write_text(json.dumps(rounded(found), indent=1, allow_nan=False) + "\n", encoding="utf-8")
        part.replace(values.out)

    for part in PARTS:
        if values.only and part.name not in values.only:
            continue
        parts[part.name] = found = run(part, tiny, whole - (time.perf_counter() - started))
        rows += rows_of(part.name, found["result"]) if found["result"] else []
        keep()
    print(table(rows))
    for name, found in parts.items():
        if found["ended"] is not None:
            print(f"{name}: {found['why']}")
    print(f"written: {values.out}, after {time.perf_counter() - started:.0f} s")
    failed = [name for name, found in parts.items() if found["ended"] not in (None, "left out")]
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
