"""`trainer profile`: where a step's time goes, how much of the device it uses, and what to change."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from data_shards.display import check_place
from data_shards.errors import CommandParser, UserError

HELP = """\
usage: trainer profile RECIPE [-c OVERLAY ...] [--KEY VALUE ...]
                       [--steps N] [--warmup N] [--json FILE] [--out FOLDER]

Train a recipe for a few real steps on its own data, and say where their time goes: part by part, how long data is
waited for, how much of the device is used (MFU, against the matrix products that it reaches), where the program waits
for the device, where torch.compile would break its graph, what computes most, and what to change.
Nothing is kept: no checkpoint, no evaluation, no W&B; the run's own folder is not touched.

  trainer profile recipes/quickstart.yaml
  trainer profile recipes/medsam/lora.yaml --data.init_args.train data/mine/train --data.init_args.num_workers 8
  trainer profile recipes/sam3/medical_sam3.yaml --data.init_args.train data/mine/train --out profiles/sam3

  RECIPE, -c, --config   recipes: later ones overlay earlier ones
  --KEY VALUE            any key of the recipe, as `trainer fit` takes it
  --steps N              optimiser steps that are measured as they are; 8 by default, half as many again part by part
  --warmup N             steps before them that do not count; 3 by default
  --json FILE            write the figures into FILE as JSON as well; - prints these alone
  --out FOLDER           write profile.json and trace.json, one step for chrome://tracing or ui.perfetto.dev
  -h, --help             print this

A recipe for several GPUs is profiled as one device's share of its step, without what they send each other.
Without a GPU the waits are counted on tensors that pretend to be on one. Mistakes end with one line and exit code 2.
"""


def profile_command(arguments: list[str]) -> int:
    """Run ``trainer profile`` and return its exit code.

    Raises:
        UserError: A mistake in the arguments, the recipe or its data.
    """
    if {"-h", "--help"} & set(arguments):
        print(HELP, end="")
        return 0
    given, words = _options(arguments)
    from rich.console import Console

    with Console(stderr=True).status("reading the recipe") as status:
        from trainer.profile.figures import profile_of, write_trace

        profile, trace = profile_of(words, given["warmup"], given["steps"], status.update)
    from trainer.run import write_json

    if given["out"] is not None:
        folder = Path(given["out"])
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "profile.json", profile)
        write_trace(trace, folder / "trace.json")
    if given["json"] == "-":
        print(json.dumps(profile, indent=2, allow_nan=False))
        return 0
    from trainer.profile.sheet import show

    show(profile, Console(width=None if sys.stdout.isatty() else 100, markup=False, emoji=False, highlight=False))
    if given["json"] is not None:
        write_json(Path(given["json"]), profile)
        print(f"written {given['json']}")
    if given["out"] is not None:
        print(f"written {given['out']}: profile.json, trace.json")
    return 0


def _options(arguments: list[str]) -> tuple[dict[str, Any], list[str]]:
    """Split the profile's own options from the recipe's words.

    Raises:
        UserError: One lacks its value, is out of range, or no recipe is named.
    """
    parser = CommandParser(prog="trainer profile", add_help=False)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--json")
    parser.add_argument("--out")
    mine, words, place = [], [], iter(arguments)
    for word in place:
        name, equals, _ = word.partition("=")
        if name in ("--steps", "--warmup", "--json", "--out"):
            mine += [word] if equals else [word, *[value for value in [next(place, None)] if value is not None]]
        else:
            words.append(word)
    given = vars(parser.parse_args(mine))
    if given["steps"] < 1 or given["warmup"] < 1:
        raise UserError(f"--steps {given['steps']} and --warmup {given['warmup']}: 1 or more each")
    if given["json"] is not None and given["json"] != "-":
        check_place("--json", given["json"])
    if words and not words[0].startswith("-"):
        words = ["-c", *words]
    if not {"-c", "--config"} & {word.partition("=")[0] for word in words}:
        raise UserError("profile needs a recipe: trainer profile RECIPE; see trainer profile --help")
    return given, words
