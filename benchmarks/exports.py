"""Which tool loads which export, and how far are its answers from ours? The gate itself, for each family and format.

python benchmarks/exports.py                               # all, at released sizes: an hour on two cores, 16 GB
python benchmarks/exports.py --families litemedsam sam2    # two families
python benchmarks/exports.py --formats onnx peft           # two formats
python benchmarks/exports.py --quick                       # tiny models where the tool takes any size: some minutes
python benchmarks/exports.py --formats onnx --save         # put the rows into the results and README's matrix

A run of each family is made without training: LiteMedSAM has its released weights, the others have random ones, since
no hub is needed so. Runs that go to `peft` have LoRA in the encoder, with additions that are not zero. Each is exported
by `trainer export`, whose gate loads the file with the tool's own code and asks both about real slices of the ICBM 152
template that nilearn carries. What the gate refuses to hold ("cannot be exported") has no row; what fails has one.

What to read: "largest difference" is that of logits between the run's model and the tool's, in fp32, over all pixels;
for SAM3, whose logits are sums over hundreds of channels, as a share of the largest. "input" is the largest difference
of the image that the tool's own preprocessing makes of a slice, where the export configures one.

It prints a table in Markdown, and ends with status 1 where a gate failed.

The last line is one JSON object:
  benchmark  "exports"
  quick      whether --quick was given
  torch      its version
  rows       a list of {"family", "format", "consumer" and its version, "image_size", "largest_difference",
             "input_difference" (null where the tool has no preprocessing of its own), "megabytes", "seconds", "ended":
             null or what went wrong}; figures are null where the gate failed
"""

from __future__ import annotations

import argparse
import contextlib
import io
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from measuring import finish, say
from samples import encoded, slices, write_shards
from step_sam3 import TINY

from data_shards.errors import UserError
from trainer.cli import main as trainer_command
from trainer.export import EXPORTERS, Exporter
from trainer.models import SegmentationModel
from trainer.modules.tuned import TunedModule
from trainer.restore import instantiate
from trainer.run import Run, read_json

RESULTS = Path(__file__).with_name("results") / "exports.md"
README = Path(__file__).parents[1] / "README.md"
TABLE = (
    "| family | format | loaded by | px | largest difference | input | MB | s |",
    "|---|---|---|---|---|---|---|---|",
)
ADAPTED = "peft"
"""The format that holds adapters instead of a model."""
_HIERA = {
    "embed_dim": 16, "stages": [1, 2, 2, 1], "global_blocks": [4], "window_spec": [8, 4, 4, 2], "background": 4,
    "width": 32, "memory_width": 16, "memory_layers": 1, "feedforward": 64,
}  # fmt: skip
_VIT = {"width": 32, "depth": 3, "heads": 2, "global_blocks": [1], "window": 3}

FAMILIES: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "litemedsam": ("MedSAMModule", "LiteMedSAM", {"weights": "litemedsam", "image_size": 256}, {"image_size": 64}),
    "medsam": ("MedSAMModule", "MedSAM", {"weights": None}, {"encoder": _VIT, "image_size": 64}),
    "sam2": ("SAM2Module", "SAM2", {"weights": None}, {"variant": _HIERA, "image_size": 64}),
    "sam3": ("SAM3Module", "SAM3", {"weights": None}, {"shape": asdict(TINY), "image_size": 112}),
}
"""By family: module, model, the model's arguments, and those that are others with --quick."""


def holds(exporter: Exporter, model: SegmentationModel) -> bool:
    """Whether a format can hold a model."""
    try:
        return exporter.accepts(model)
    except UserError:  # says why not: its sizes, or no such class
        return False


def made(family: str, adapted: bool, quick: bool, shards: Path, root: Path) -> tuple[Run, SegmentationModel]:
    """A run of a family as `trainer fit` leaves it, without training, and its model; its weights are new."""
    module, model, arguments, tiny = FAMILIES[family]
    nodes: dict[str, Any] = {
        "model": {
            "class_path": f"trainer.models.{model}",
            "init_args": {**arguments, **(tiny if quick else {})},
        }
    }
    if adapted:
        nodes["tuning"] = {"class_path": "trainer.tuning.LoRATuning", "init_args": {"rank": 4}}
    node = {"class_path": f"trainer.modules.{module}", "init_args": nodes}
    torch.manual_seed(0)
    learnt: TunedModule = instantiate(node, TunedModule, family)
    with torch.no_grad():
        for name, parameter in learnt.named_parameters():
            if "lora_B" in name:  # zero before the first step: nothing would show
                parameter.normal_(std=0.02)
    run = Run(root)
    run.checkpoints.mkdir(parents=True)
    run.recipe.write_text(yaml.safe_dump({"model": node, "data": {"init_args": {"test": str(shards)}}}))
    torch.save({"state_dict": learnt.state_dict(), "global_step": 0}, run.checkpoints / "last.ckpt")
    return run, learnt.model


def tried(family: str, form: str, run: Run, folder: Path, samples: int) -> dict[str, Any]:
    """Export by the command."""
    exporter = EXPORTERS[form]
    out = folder / f"{family}-{form}{exporter.suffix}"
    started = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as said:
        code = trainer_command(["export", str(run.root), "--to", form, "--out", str(out), "--samples", str(samples)])
    row: dict[str, Any] = {"family": family, "format": form, "seconds": time.perf_counter() - started}
    if code:
        line = said.getvalue().strip().splitlines()[-1].removeprefix("trainer: error: ")
        figures = ("consumer", "image_size", "largest_difference", "input_difference", "megabytes")
        return {**row, **dict.fromkeys(figures), "ended": line}
    record = read_json(run.exports / form / "export.json")
    differences = [record[name] for name in record if name.startswith("max_") and name != "max_input_difference"]
    paths = [out] if out.is_file() else [path for path in out.rglob("*") if path.is_file()]
    return {
        **row,
        "consumer": f"{record['consumer']} {record['consumer_version']}",
        "image_size": record["image_size"],
        "largest_difference": max(value for value in differences if value is not None),
        "input_difference": record["max_input_difference"],
        "megabytes": sum(path.stat().st_size for path in paths) / 1e6,
        "ended": None,
    }


def shown(row: Mapping[str, Any]) -> str:
    """A line of the table."""
    if row["ended"]:
        return f"| {row['family']} | `{row['format']}` | FAILED: {row['ended']} | | | | | |"
    own = "–" if row["input_difference"] is None else f"{row['input_difference']:.2g}"
    return (
        f"| {row['family']} | `{row['format']}` | {row['consumer']} | {row['image_size']} | "
        f"{row['largest_difference']:.1e} | {own} | {row['megabytes']:,.1f} | {row['seconds']:.0f} |"
    )


def save(lines: Sequence[str]) -> None:
    """Put lines of the table into the results, in the place of those of the same family and format, and into README."""
    text = RESULTS.read_text(encoding="utf-8")
    head = text.partition("\n| ")[0].rstrip()
    own = (cells(line) for line in text.splitlines() if line.startswith("| ") and "`" in line)
    merged = {(row[0], row[1]): row for row in (*own, *map(cells, lines))}
    families = list(FAMILIES)
    rows = sorted(merged.values(), key=lambda row: (families.index(row[0]), row[1]))
    RESULTS.write_text(
        "\n".join([head, "", *TABLE, *("| " + " | ".join(row) + " |" for row in rows), ""]), encoding="utf-8"
    )
    before, opened, rest = README.read_text(encoding="utf-8").partition("<!-- exports -->\n")
    _, closed, after = rest.partition("<!-- /exports -->\n")
    matrix = ["| family | `--to` | loaded by | px | largest difference |", "|---|---|---|---|---|"]
    matrix += ["| " + " | ".join(row[:5]) + " |" for row in rows]
    README.write_text("".join([before, opened, "\n".join([*matrix, ""]), closed, after]), encoding="utf-8")


def cells(line: str) -> list[str]:
    """What is in a line of a table."""
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny models where the tool takes any size")
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES), metavar="FAMILY")
    parser.add_argument("--formats", nargs="+", choices=EXPORTERS, default=list(EXPORTERS), metavar="FORMAT")
    parser.add_argument("--samples", type=int, default=1, help="images that the gate compares on (1)")
    parser.add_argument("--save", action="store_true", help=f"put the rows into {RESULTS.name} and README's matrix")
    values = parser.parse_args()
    if values.save and values.quick:
        parser.error("--save: the results are of released sizes, and not of --quick")
    rows = []
    with tempfile.TemporaryDirectory(prefix="exports-") as name:
        folder = Path(name)
        shards = write_shards(folder / "shards", [encoded(one, "png") for one in slices(2)], 2, 2)
        print("\n".join(TABLE))
        for family in values.families:
            for form in values.formats:
                say(f"{family} to {form}")
                place = folder / f"{family}-{form}"
                run, model = made(family, form == ADAPTED, values.quick, shards, place / "run")
                held = holds(EXPORTERS[form], model)
                del model  # a large one takes gigabytes, there and on the disk
                if held:
                    rows.append(tried(family, form, run, place, values.samples))
                    print(shown(rows[-1]), flush=True)
                shutil.rmtree(place)
    if values.save:
        save([shown(row) for row in rows])
    finish({"benchmark": "exports", "quick": values.quick, "torch": version("torch"), "rows": rows})
    sys.exit(any(row["ended"] for row in rows))


if __name__ == "__main__":
    main()
