"""`trainer plan`: what a recipe trains, how fast and in what memory, without its weights, its data or a GPU."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import LightningDataModule
from rich.console import Console

from data_shards.display import check_place
from data_shards.errors import UserError
from data_shards.sampler import GlobalOrderSampler
from trainer.lightning_cli import RecipeCLI, RecipeParser
from trainer.models import SegmentationModel
from trainer.modules.tuned import TunedModule
from trainer.plan.activations import memory_at
from trainer.plan.groups import memory, parameter_groups
from trainer.plan.text import show, show_memory
from trainer.recipe import explain
from trainer.restore import build, instantiate, without_weights
from trainer.run import opening, write_json

HELP = """\
usage: trainer plan RECIPE [-c OVERLAY ...] [--KEY VALUE ...] [--no-memory] [--json FILE]

Print what a recipe would train: parameters by part of the model (all, and those that learn), the learning rate and
weight decay of each, what a step and the run are made of, and the memory that it takes on a GPU.
Nothing is read but the recipe: no weights, no data, and no GPU is needed. A model of any size takes seconds, and
the table of memory a minute or two where clips are clicked on.

  trainer plan recipes/medsam/full.yaml
  trainer plan recipes/medsam/full.yaml -c recipes/clusters/a100x20.yaml
  trainer plan recipes/medsam/lora.yaml --model.init_args.tuning.init_args.rank 16 --json plan.json

  RECIPE, -c, --config   recipes: later ones overlay earlier ones
  --KEY VALUE            any key of the recipe, as `trainer fit` takes it
  --no-memory            leave out the table of memory by images and prompts, which takes most of the time
  --json FILE            write the plan into FILE as JSON as well; - prints that alone
  -h, --help             print this

The table of memory is for one GPU that holds everything, in the recipe's precision and with its checkpointing of
activations. A pass is run on tensors without content, forward, loss and backward, and all that is alive is counted:
weights, gradients, AdamW's moments and an average for the whole run, activations and what is made in between. What
lies between the corners of the table is interpolated: right, or some 5 % too high. A prompt is a target in MedSAM, and
in SAM3 a concept with one instance and a text of its own.
Not in it: the CUDA context and libraries' workspaces (about 1 GiB), what the allocator wastes, DDP's second copy of the
gradients, and what FSDP saves by sharding. So a card counts as filled at nine tenths of its size.
Mistakes in the recipe end with one line and exit code 2.
"""


def plan_command(arguments: list[str]) -> int:
    """Run ``trainer plan`` and return its exit code.

    Raises:
        UserError: A mistake in the arguments or in the recipe.
    """
    if {"-h", "--help"} & set(arguments):
        print(HELP, end="")
        return 0
    rehearsed = "--no-memory" not in arguments
    words, out = _take_json([word for word in arguments if word != "--no-memory"])
    if words and not words[0].startswith("-"):
        words = ["-c", *words]
    if not {"-c", "--config"} & {word.partition("=")[0] for word in words}:
        raise UserError("plan needs a recipe: trainer plan RECIPE; see trainer plan --help")
    made = PlanCLI(["fit", *words])
    plan = made.plan()
    if out == "-":
        plan["memory_at"] = made.memory_at(plan) if rehearsed else []
        print(json.dumps(plan, indent=2))
        return 0
    # where nobody looks on, lines are as long as they need to be
    console = Console(markup=False, emoji=False, highlight=False, width=None if sys.stdout.isatty() else 140)
    show(plan, console)
    with console.status("measuring memory; --no-memory leaves it out"):
        plan["memory_at"] = made.memory_at(plan) if rehearsed else []
    show_memory(plan, console)
    if out is not None:
        write_json(Path(out), plan)
        print(f"written {out}")
    return 0


class PlanCLI(RecipeCLI):
    """The command line of ``trainer fit`` up to the point where it would read weights and look for a GPU."""

    def _set_seed(self) -> None:
        """Nothing is drawn."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Nothing is run."""

    def instantiate_classes(self) -> None:
        """Make the module without weights, and the data module, which checks its arguments.

        Raises:
            UserError: An argument is refused.
        """
        text = self._parser("fit").dump(self.config["fit"], skip_none=False, skip_link_targets=False, format="yaml")
        self.resolved: dict[str, Any] = yaml.safe_load(text)
        node = self.resolved["model"]
        where = "recipe " + " + ".join(RecipeParser.recipes)
        self.notes = _leave_unquantised(node)
        try:
            with torch.device("meta"):
                self.module: TunedModule = build(_as_on_a_gpu(node), where)
                model = without_weights(node["init_args"]["model"])
                untouched: SegmentationModel = instantiate(model, SegmentationModel, where)
            instantiate(self.resolved["data"], LightningDataModule, where)
        except (ValueError, TypeError) as error:
            raise UserError(f"{where}: {explain(str(error), set(), [])}") from error
        self.own_names = {name for name, _ in untouched.named_parameters()}

    def plan(self) -> dict[str, Any]:
        """The plan, as JSON."""
        module, resolved = self.module, self.resolved
        groups = parameter_groups(module, self.own_names)
        nodes = resolved["model"]["init_args"]
        callbacks = resolved["trainer"].get("callbacks") or []
        averaged = any(str(node.get("class_path", "")).endswith(".EMA") for node in callbacks)
        return {
            "recipes": RecipeParser.recipes,
            "question": opening(self.opening)[0],
            "model": {name: nodes["model"].get(name) for name in ("class_path", "init_args")},
            "tuning": nodes.get("tuning") or {"class_path": f"trainer.tuning.{type(module.tuning).__name__}"},
            "parameters": sum(group.parameters for group in groups),
            "learning": sum(group.learning for group in groups),
            "groups": [asdict(group) for group in groups],
            "memory_bytes": memory(module, averaged),
            "optimizer": optimizer(module, resolved["trainer"]),
            "step": step(resolved["data"]["init_args"], resolved["trainer"]),
            "terms_per_image": nodes.get("terms_per_image"),
            "frames": resolved["data"]["init_args"].get("clip_length") or 1,
            "prompts_per_image": prompts_per_image(resolved["data"]["init_args"], nodes.get("terms_per_image")),
            "length": {name: resolved["trainer"].get(name) for name in ("max_steps", "max_epochs", "max_time")},
            "precision": str(resolved["trainer"].get("precision") or "32-true"),
            "notes": self.notes,
        }

    def memory_at(self, plan: dict[str, Any]) -> list[dict[str, int]]:
        """Memory by images a pass and prompts an image; none, and a note why, where a pass cannot be rehearsed."""
        images, prompts = plan["step"]["micro_batch"], plan["prompts_per_image"]
        try:
            frames = plan["frames"]
            return memory_at(self.module, plan["precision"], plan["memory_bytes"]["total"], images, prompts, frames)
        except Exception as error:  # any model's code runs in there
            why = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
            plan["notes"].append(f"no table of memory: a pass cannot be run on tensors without content ({why})")
            return []


def optimizer(module: TunedModule, trainer: Mapping[str, Any]) -> dict[str, Any]:
    """Optimiser, schedule and clipping."""
    limit = trainer.get("gradient_clip_val")
    clipping = f"{trainer.get('gradient_clip_algorithm') or 'norm'} {limit:g}" if limit else None
    return {
        "name": "AdamW",
        "learning_rate": module.lr,
        "weight_decay": module.weight_decay,
        "betas": list(module.betas),
        "schedule": module.schedule.describe(),
        "gradient_clipping": clipping,
    }


def step(data: Mapping[str, Any], trainer: Mapping[str, Any]) -> dict[str, Any]:
    """What one optimiser step is made of.

    Args:
        data: Arguments of the data module.
        trainer: Arguments of the trainer.

    Returns:
        Images (or clips) a step and a pass, the devices (None if the recipe takes as many as there are) and the passes
        of each in a step, on one device where their number is not known.

    Raises:
        UserError: The batches do not divide.
    """
    images, micro, devices = data["batch_size"], data["micro_batch_size"], _devices(trainer)
    GlobalOrderSampler(images, images, micro, 0, devices or 1, 0)  # as it refuses them in a training
    return {
        "images": images,
        "micro_batch": micro,
        "devices": devices,
        "passes": images // (micro * (devices or 1)),
        "targets_per_image": data.get("targets_per_image"),
    }


def prompts_per_image(data: Mapping[str, Any], terms: int | None = None) -> int | None:
    """The most prompts that the recipe asks an image: targets or terms, and absent terms; None where all are taken."""
    targets = data.get("targets_per_image") or terms
    return None if targets is None else targets + (data.get("negatives_per_image") or 0)


def _devices(trainer: Mapping[str, Any]) -> int | None:
    """Devices over all nodes; None where the recipe takes as many as there are."""
    devices, nodes = trainer.get("devices", "auto"), trainer.get("num_nodes") or 1
    if isinstance(devices, str) and "," in devices:
        devices = [part for part in devices.split(",") if part.strip()]
    if isinstance(devices, list):
        return len(devices) * nodes
    text = str(devices)
    return int(text) * nodes if text.isdigit() and int(text) else None


def _as_on_a_gpu(node: Mapping[str, Any]) -> dict[str, Any]:
    """A module's node whose model takes the attention that it takes on a GPU, if it is free to choose."""
    arguments = node["init_args"]
    given = arguments["model"].get("init_args") or {}
    if given.get("attention", "") is not None:
        return dict(node)
    model = {**arguments["model"], "init_args": {**given, "attention": "sdpa"}}
    return {**node, "init_args": {**arguments, "model": model}}


def _leave_unquantised(node: dict[str, Any]) -> list[str]:
    """Take `quantize` out of a module's tuning, since there are no weights to quantise, and say so."""
    arguments = ((node.get("init_args") or {}).get("tuning") or {}).get("init_args") or {}
    bits = arguments.get("quantize")
    if bits is None:
        return []
    arguments["quantize"] = None
    return [f"quantize {bits}: planned as if not; as much learns, and the frozen linear layers take less than shown"]


def _take_json(arguments: list[str]) -> tuple[list[str], str | None]:
    """Split off ``--json FILE``.

    Raises:
        UserError: The file is missing, or cannot be where it is said to be.
    """
    words, out, rest = [], None, iter(arguments)
    for word in rest:
        if word.partition("=")[0] != "--json":
            words.append(word)
            continue
        out = word.partition("=")[2] or next(rest, "")
        if not out:
            raise UserError("--json needs a file, or - to print: see trainer plan --help")
        if out != "-":
            check_place("--json", out)
    return words, out
