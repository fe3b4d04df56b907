"""The figures of a profile, as JSON."""

from __future__ import annotations

import inspect
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.profiler import profile

from data_shards.errors import UserError
from trainer.callbacks import CompileBlocks, StepGuard
from trainer.callbacks.throughput import PassCost
from trainer.flops import step_flops
from trainer.lightning_cli import RecipeParser
from trainer.modules.tuned import TunedModule
from trainer.profile.advice import advise
from trainer.profile.breaks import graph_breaks, watched_inputs
from trainer.profile.device import described, short
from trainer.profile.phases import BY_PART, PLAIN, TRACED, WARM_UP, WATCHED, Phases
from trainer.profile.rehearsed import waits_of_step
from trainer.profile.running import ProfileCLI, made, read_recipe
from trainer.profile.sections import PARTS, Clock, measured
from trainer.waits import Wait

_LOADER_SECONDS, _LOADER_BATCHES = 3.0, 50
"""For how long the loader is read alone, at most."""
_TOP = 10


def profile_of(words: list[str], warm_up: int, steps: int, say: Callable[[str], None]) -> tuple[dict[str, Any], Any]:
    """Train a recipe for a few steps, and say where their time goes.

    Args:
        words: The recipe's words, as `trainer fit` takes them.
        warm_up: Steps before those that count.
        steps: Steps that are measured as they are; half as many, two at least, are measured by part.
        say: Told what is going on, in a few words.

    Returns:
        The profile, and torch's profile of one step.

    Raises:
        UserError: A mistake in the recipe or its data.
    """
    on_gpu = torch.cuda.is_available()
    counts = {
        WARM_UP: warm_up,
        PLAIN: steps,
        BY_PART: max(2, steps // 2),
        TRACED: 1,
        **({WATCHED: 1} if on_gpu else {}),
    }
    recipe = read_recipe(words, sum(counts.values()))
    settings = _settings(recipe.resolved, recipe.passes)
    phases = Phases(counts, say)
    say("making the model and opening the data")
    with made(recipe, phases) as cli:
        device, module = cli.trainer.strategy.root_device, cli.model
        phases.clock = clock = Clock(device)
        phases.cost, found = _cost(module, cli.datamodule, say)
        with measured(clock, cli.trainer, cli.datamodule, module), watched_inputs(module.model) as inputs:
            cli.train()
        _check(phases, cli)
        found |= {"recipes": list(RecipeParser.recipes), "notes": list(recipe.notes), "settings": settings}
        found |= {"parameters": sum(p.numel() for p in module.model.parameters())}
        found |= {"learning": sum(p.numel() for p in module.model.parameters() if p.requires_grad)}
        found |= _speed(phases)
        say("reading batches without training")
        found["loader_images_per_second"] = loader_alone(cli.datamodule.train_dataloader())
        say("tracing blocks for graph breaks")
        found["graph_breaks"] = graph_breaks(inputs, cli.trainer.precision_plugin.forward_context())
        found["compiled"] = any(isinstance(one, CompileBlocks) for one in cli.trainer.callbacks)
        found |= {"recompiled": phases.graphs, "fused_optimizer": phases.fused}
        say("looking for waits")
        found |= _waits(phases, cli, on_gpu)
    say("measuring matrix products")
    found |= {"device": described(device, settings["precision"]), "on_gpu": device.type == "cuda"}
    found |= _use(found, phases)
    assert phases.trace is not None
    found["kernels"] = kernels(phases.trace, device.type == "cuda")
    found["advice"] = advise(found)
    return found, phases.trace


def _settings(resolved: Mapping[str, Any], passes: int) -> dict[str, Any]:
    """What of a recipe bears on its speed."""
    data, trainer = resolved["data"]["init_args"], resolved["trainer"]
    module = resolved["model"]["init_args"]
    model: Mapping[str, Any] = (module.get("model") or {}).get("init_args") or {}
    return {
        "micro_batch_size": data["micro_batch_size"],
        "passes": passes,
        "frames": data.get("clip_length") or 1,
        "num_workers": data.get("num_workers", 0),
        "targets_per_image": data.get("targets_per_image"),
        "precision": str(trainer.get("precision") or "32-true"),
        "log_every_n_steps": trainer.get("log_every_n_steps") or 50,
        "checkpoint_activations": bool(model.get("checkpoint_activations")),
        "prompt_buckets": module.get("prompt_buckets"),
    }


def _cost(module: TunedModule, datamodule: Any, say: Callable[[str], None]) -> tuple[PassCost | None, dict[str, Any]]:
    """What a pass costs, and how much of what it does is done a second time."""
    say("counting what a pass computes")
    frames = int(getattr(datamodule, "clip_length", 1))
    try:
        one, two = (step_flops(module, 1, prompts, frames) for prompts in (1, 2))
    except Exception as error:  # any model's code runs in there
        why = " ".join(str(error).split())[:160] or type(error).__name__
        return None, {"why_no_flops": why, "recomputed": None}
    cost = PassCost(image=2 * one.model - two.model, prompt=two.model - one.model)
    return cost, {"why_no_flops": None, "recomputed": 1 - one.model / one.hardware}


def _check(phases: Phases, cli: ProfileCLI) -> None:
    """Refuse a training that ended before everything was measured.

    Raises:
        UserError: It did.
    """
    if phases.trace is None or not phases.parts:
        folder, size = cli.datamodule.folders["train"], cli.datamodule.batch_size
        raise UserError(
            f"data.init_args.train: the training on {folder} ended after {cli.trainer.global_step} steps: a profile "
            f"takes {sum(phases.steps.values())} of {size} images: give more samples, lower data.init_args.batch_size, "
            "or leave trainer.limit_train_batches out"
        )


def _speed(phases: Phases) -> dict[str, Any]:
    """Rates of the steps as they are, and milliseconds of a step by part."""
    seconds, steps, parted = phases.seconds[PLAIN], phases.steps[PLAIN], phases.steps[BY_PART]
    parts = {part: 1000 * phases.parts[part] / parted for part in PARTS if phases.parts.get(part)}
    return {
        "steps": dict(phases.steps),
        "step_ms": 1000 * seconds / steps,
        "images": phases.images / steps,
        "prompts_per_image": phases.prompts / max(1, phases.images),
        "images_per_second": phases.images / seconds,
        "pairs_per_second": phases.prompts / seconds,
        "data_wait": min(1.0, phases.waited[PLAIN] / seconds),
        "parts_ms": parts,
        "parted_step_ms": sum(parts.values()),
        "peak_bytes": phases.peak_bytes,
    }


def _use(found: Mapping[str, Any], phases: Phases) -> dict[str, Any]:
    """How much of the device the steps used, as they are."""
    device, precision = found["device"], short(found["settings"]["precision"])
    if phases.cost is None:
        return {"model_tflop_per_step": None, "tflops": None, "mfu": None, "mfu_of_data_sheet": None}
    each = phases.flops / phases.steps[PLAIN] / 1e12
    reached, sheet = 1000 * each / found["step_ms"], device["sheet_tflops"]
    return {
        "model_tflop_per_step": each,
        "tflops": reached,
        "mfu": reached / device["matmul_tflops"][precision],
        "mfu_of_data_sheet": None if sheet is None else reached / sheet,
    }


def _waits(phases: Phases, cli: ProfileCLI, on_gpu: bool) -> dict[str, Any]:
    """Where a step waits for the device, and what was looked at."""
    if on_gpu:
        how = "in one optimiser step, as CUDA's debug mode tells them"
        return {"waits": _counted(phases.waits), "waits_counted": how}
    how = "in forward pass and loss of one pass, on tensors that pretend to be on a GPU"
    half = "16" in str(cli.trainer.precision)
    try:
        assert phases.batch is not None, "no batch had a target"
        waits = waits_of_step(cli.model, phases.batch, half)
    except Exception as error:  # any model's code runs in there
        why = " ".join(str(error).split())[:120] or type(error).__name__
        return {"waits": None, "waits_counted": f"not counted: the step cannot be rehearsed ({why})"}
    if phases.judged:  # the optimiser's part is not rehearsed: of it this is known
        line = inspect.getsourcelines(StepGuard._judge)[1]
        waits.append(Wait("StepGuard reads loss and gradient norm, once a step", f"trainer/callbacks/guard.py:{line}"))
        how += "; StepGuard's besides"
    return {"waits": _counted(waits), "waits_counted": how}


def _counted(waits: list[Wait]) -> list[dict[str, Any]]:
    """Waits by place, the most frequent first."""
    counts = Counter((wait.place, wait.call) for wait in waits)
    return [{"place": place, "call": call, "count": count} for (place, call), count in counts.most_common()]


def loader_alone(loader: Any) -> float:
    """Images a second of a loader that nothing else runs beside; its first batch, which starts workers, not counted."""
    images, started = 0, None
    try:
        for number, batch in enumerate(loader):
            if started is None:
                started = time.perf_counter()
                continue
            images += len(batch)
            if time.perf_counter() - started > _LOADER_SECONDS or number >= _LOADER_BATCHES:
                break
        return images / (time.perf_counter() - started) if started is not None and images else 0.0
    finally:
        loader.close()


def kernels(trace: profile, on_gpu: bool) -> list[dict[str, Any]]:
    """What computes most by itself: kernels of a GPU, or operators on a CPU.

    Args:
        trace: Torch's profile of one step.
        on_gpu: Which.
    """
    kind = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    rows = []
    for row in trace.key_averages():
        own = float(getattr(row, kind))
        named = row.key in PARTS or row.key.startswith(("ProfilerStep", "[pl]", "Optimizer."))
        if own > 0 and not (on_gpu and named):
            # on a CPU, what a part takes outside of torch's operators is Python's
            rows.append((f"Python in {row.key}" if row.key in PARTS else row.key, own / 1000, int(row.count)))
    whole = sum(milliseconds for _, milliseconds, _ in rows) or 1.0
    rows.sort(key=lambda row: -row[1])
    names = ("name", "ms", "calls", "share")
    return [dict(zip(names, (*row, row[1] / whole), strict=True)) for row in rows[:_TOP]]


def write_trace(trace: profile, path: Path) -> None:
    """Write torch's profile for chrome://tracing or ui.perfetto.dev."""
    trace.export_chrome_trace(str(path))
