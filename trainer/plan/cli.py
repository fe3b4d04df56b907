"""`trainer plan`: what a recipe trains, in what memory, and what it will cost, without weights, data or a GPU."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from rich.console import Console

from data_shards.display import check_place
from data_shards.errors import UserError
from trainer.plan.cost import Machine, bill, length, speed, steps_per_epoch
from trainer.plan.fits import refusal, verdict
from trainer.plan.options import Options, read_options
from trainer.plan.planned import PlanCLI
from trainer.plan.sheet import show_cost
from trainer.plan.text import show, show_memory
from trainer.run import Run, write_json

HELP = """\
usage: trainer plan RECIPE [-c OVERLAY ...] [--KEY VALUE ...] [--cluster FILE | --devices N --memory GB --gpu NAME]
                    [--rate IMAGES/S | --like RUN | --mfu SHARE] [--images N] [--prompts N] [--no-memory] [--json FILE]

Print what a recipe would train: parameters by part of the model (all, and those that learn), the learning rate and
weight decay of each, what a step and the run are made of, and the memory that it takes on a GPU. Of a machine besides
whether it fits, the largest pass that does, and what the run will cost: hours, GPU-hours, energy and disk.
No weights, no data and no GPU are needed. A model of any size takes seconds, and memory a minute or two where clips
are clicked on.

  trainer plan recipes/medsam/full.yaml
  trainer plan recipes/medsam/full.yaml --devices 20 --memory 80 --images 1570263
  trainer plan recipes/sam3/medical_sam3.yaml --cluster recipes/clusters/slurm_h100x4.yaml --images 10000 --rate 2.5
  trainer plan recipes/medsam/lora.yaml --model.init_args.tuning.init_args.rank 16 --json plan.json

  RECIPE, -c, --config   recipes: later ones overlay earlier ones
  --KEY VALUE            any key of the recipe, as `trainer fit` takes it
  --cluster FILE         the machine, as `trainer launch` takes it: an overlay in its place on the command line
  --devices N            or GPUs in all; those of the recipe by default
  --memory GB            of memory each; the slowest GPU that is known of this size is assumed, unless there is
  --gpu NAME             the GPU, such as H100-80GB
  --rate IMAGES/S        how fast it is on all of them, where you have measured it (frames, where clips are learnt)
  --like RUN             or as fast a GPU as in a run of yours
  --mfu SHARE            or so much of the GPUs' peak, in (0, 1]; otherwise 0.25 is assumed, which nobody measured here
  --images N             images (or clips) of an epoch, where the shards are not on this machine
  --prompts N            prompts an image, where the recipe takes all targets; otherwise 1
  --no-memory            leave out all that a pass has to be run for, which takes most of the time
  --json FILE            write the plan into FILE as JSON as well; - prints that alone
  -h, --help             print this

What does not fit ends with one line and exit code 2, after what would make it fit was tried: fewer images a pass,
activations computed twice, FSDP2, more GPUs, LoRA.

The table of memory is for one GPU that holds everything, in the recipe's precision and with its checkpointing of
activations. A pass is run on tensors without content, forward, loss and backward, and all that is alive is counted:
weights, gradients, AdamW's moments and an average for the whole run, activations and what is made in between. What
lies between the corners of the table is interpolated: right, or some 5 % too high. A prompt is a target in MedSAM, and
in SAM3 a concept with one instance and a text of its own.
What one of several GPUs holds counts DDP's second copy of the gradients, or with FSDP2 a share of weights, gradients
and moments, and the blocks that are gathered at a time; of a recipe with RecomputeToFit it has as many blocks computed
twice as the training will choose there. A card counts as filled at nine tenths of its size: the CUDA
context and libraries' workspaces take about 1 GiB, and the allocator wastes some.
Evaluations and the first minutes of a job are in no estimate of time.
Mistakes in the recipe end with one line and exit code 2.
"""


def plan_command(arguments: list[str]) -> int:
    """Run ``trainer plan`` and return its exit code.

    Raises:
        UserError: A mistake in the arguments or in the recipe, or it does not fit.
    """
    if {"-h", "--help"} & set(arguments):
        print(HELP, end="")
        return 0
    rehearsed = "--no-memory" not in arguments
    words, out = _take_json([word for word in arguments if word != "--no-memory"])
    options = read_options(words)
    if not {"-c", "--config"} & {word.partition("=")[0] for word in options.words}:
        raise UserError("plan needs a recipe: trainer plan RECIPE; see trainer plan --help")
    made = PlanCLI(["fit", *options.words])
    plan = made.plan(options.given["devices"])
    asked = options.machine(plan["step"]["devices"])
    machine = asked or Machine(plan["step"]["devices"] or 1)
    plan |= {"machine": _described(machine, asked is not None), "checkpoint": made.checkpoint(plan)}
    plan |= {"memory_at": [], "memory_parts": None, "flops": None, "prompts_reckoned": None}
    plan["run"] = length_of(made, plan, options.given["images"])
    like = None if options.given["like"] is None else rate_of(options.given["like"], machine.devices)
    # where nobody looks on, lines are as long as they need to be
    console = Console(markup=False, emoji=False, highlight=False, width=None if sys.stdout.isatty() else 140)
    if out != "-":
        show(plan, console)
    with nullcontext() if out == "-" else console.status("measuring memory; --no-memory leaves it out"):
        refused = reckon(made, plan, options, machine) if rehearsed else None
        plan["run"] |= cost_of(plan, options, machine, like)
    if out == "-":
        print(json.dumps(plan, indent=2))
    else:
        show_cost(plan, console)
        show_memory(plan, console)
    if out not in (None, "-"):
        write_json(Path(str(out)), plan)
        print(f"written {out}")
    if refused is not None:
        raise UserError(refused)
    return 0


def reckon(made: PlanCLI, plan: dict[str, Any], options: Options, machine: Machine) -> str | None:
    """Run passes, and put into a plan what they take: ``memory_at``, ``memory_parts`` and ``flops``.

    Returns:
        Why it is refused, in one line; None where it fits or that is not known.

    Raises:
        UserError: The strategy's memory is not known.
    """
    prompts = options.given["prompts"] or plan["prompts_per_image"]
    if prompts is None:
        plan["notes"].append("all targets of an image are asked for: reckoned with 1; --prompts N takes another number")
    plan["prompts_reckoned"] = prompts or 1
    try:
        plan["memory_at"] = made.memory_at(plan, prompts)
        plan["flops"] = made.flops(plan, prompts or 1)
    except Exception as error:  # any model's code runs in there
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        plan["notes"].append(f"no table of memory: a pass cannot be run on tensors without content ({why})")
        return None
    if made.to_fit:
        unknown = "" if machine.memory else "; --gpu NAME or --memory GB says how many blocks that is"
        plan["notes"].append(f"RecomputeToFit computes blocks twice as the GPU asks for: not in the table{unknown}")
    found = plan["memory_parts"] = verdict(made, plan, machine, prompts or 1)
    return refusal(plan, machine, found, options, prompts or 1) if found["fits"] is False else None


def length_of(made: PlanCLI, plan: dict[str, Any], images: int | None) -> dict[str, Any]:
    """Steps of the run, and images (of clips, frames) of each.

    Raises:
        UserError: The shards are there, and damaged.
    """
    epoch = steps_per_epoch(made.planned_data) if images is None else None
    found = length(made.resolved["trainer"], plan["step"]["images"], images, epoch, plan["step"]["passes"])
    return {**found, "images_per_step": plan["step"]["images"] * plan["frames"]}


def cost_of(plan: dict[str, Any], options: Options, machine: Machine, like: tuple[float, str] | None) -> dict[str, Any]:
    """Images a second, hours, energy and jobs of the run."""
    run, flops = plan["run"], (plan["flops"] or {}).get("model")
    found = speed(options.given["rate"], like, options.given["mfu"], machine, flops)
    return found | bill(machine, run["steps"], run["images_per_step"], found["images_per_second"])


def rate_of(folder: str, devices: int) -> tuple[float, str]:
    """Images a second that a run would make on another number of GPUs, if that alone counted, and how it is known.

    Raises:
        UserError: There is no such run, or it did not log how fast it was.
    """
    from trainer.report.data import read_run

    run = read_run(Run.existing(folder))
    rate, ranks = run.images_per_second(), int(run.record.get("world_size") or 1)
    if rate is None:
        raise UserError(f"--like {folder}: it logged no train/images_per_second, or only the first, which is a warm-up")
    hardware = run.record.get("hardware", "unknown hardware")
    said = f"as {folder}: {rate:.3g} images/s on {hardware}"
    if ranks != devices:
        said += f", times {devices}/{ranks} for as many GPUs: what they send each other is not in it"
    return rate * devices / ranks, said


def _described(machine: Machine, asked: bool) -> dict[str, Any]:
    """A machine as JSON."""
    return {
        "given": asked,
        "said": machine.said,
        "devices": machine.devices,
        "memory_gib": machine.memory,
        "gpu": None if machine.gpu is None else machine.gpu.name,
        "assumed": machine.assumed,
        "job_hours": machine.hours,
        "requeue": machine.requeue,
    }


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
