"""What to change, as the figures of a profile say."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from trainer.profile.device import short
from trainer.profile.sections import BACKWARD, ENCODER, LOGGING, OPTIMIZER

_WAITING, _LOGGED, _OPTIMISED = 0.05, 0.1, 0.2
"""Shares of a step from which data, logging and the optimiser are worth a word."""
_FASTER = 1.25
"""From how many times as fast matrix products another precision is proposed."""
NEAR = 0.4
"""MFU from which nothing is said about how a GPU is used."""
_FREE = 0.45
"""Share of a GPU's memory up to which more of it is proposed to be used."""
_DONE_TWICE = 0.05
"""Share of the arithmetic that is done again, from which it is worth a word."""


@dataclass(frozen=True)
class Advice:
    """Something to change.

    Attributes:
        what: What was seen.
        change: The recipe's key and what to set it to, or the line of code.
        gain: What that may bring, from the figures; empty where these do not say.
    """

    what: str
    change: str
    gain: str = ""


def advise(profile: Mapping[str, Any]) -> list[dict[str, str]]:
    """Propose changes.

    Args:
        profile: As `trainer.profile.figures` makes it, but for the advice.
    """
    kinds = (_threads, _data, _precision, _memory, _compiling, _waits, _rest)
    return [asdict(advice) for kind in kinds for advice in kind(profile)]


def _data(profile: Mapping[str, Any]) -> Iterator[Advice]:
    share, workers = profile["data_wait"], profile["settings"]["num_workers"]
    if share <= _WAITING:
        return
    alone, rate, cores = profile["loader_images_per_second"], profile["images_per_second"], profile["device"]["cores"]
    wanted = rate / max(1e-9, 1 - share)
    seen = f"{share:.0%} of the time waits for data: the loader alone gives {alone:,.3g} images/s"
    gain = f"up to {share:.0%} of the step"
    needed = max(workers + 1, math.ceil(1.25 * wanted * max(1, workers) / max(alone, 1e-9)))
    if needed < cores:
        yield Advice(seen, f"data.init_args.num_workers: from {workers} to {needed}, of {cores} cores", gain)
    elif workers < max(1, cores - 1):
        yield Advice(seen, f"data.init_args.num_workers: from {workers} to {max(1, cores - 1)}, all but one core", gain)
    else:
        change = f"all {cores} cores read already (num_workers {workers}): take more cores, or build smaller shards"
        yield Advice(seen, change, gain)


def _threads(profile: Mapping[str, Any]) -> Iterator[Advice]:
    threads, cores = profile["device"]["threads"], profile["device"]["cores"]
    if not profile["on_gpu"] and threads < cores:
        seen = f"torch computes in {threads} of {cores} threads that it may have on this processor"
        yield Advice(seen, f"the environment's OMP_NUM_THREADS and MKL_NUM_THREADS: {cores}, or not set at all")


def _precision(profile: Mapping[str, Any]) -> Iterator[Advice]:
    rates, now = profile["device"]["matmul_tflops"], short(profile["settings"]["precision"])
    for name, precision in (("bf16", "bf16-mixed"), ("fp32", "32-true")):
        if name != now and rates[name] > _FASTER * rates[now]:
            times, parts = rates[name] / rates[now], profile["parts_ms"]
            computed = sum(parts.get(part, 0.0) for part in (ENCODER, BACKWARD)) / max(profile["parted_step_ms"], 1e-9)
            yield Advice(
                f"matrix products are {times:.1f} × as fast in {name} as in {now} on this device",
                f"trainer.precision: {precision}",
                f"up to {computed * (1 - 1 / times):.0%} of the step, that of encoder and backward pass",
            )


def _memory(profile: Mapping[str, Any]) -> Iterator[Advice]:
    """More of a GPU's memory for less work or larger passes."""
    peak, whole, settings = profile["peak_bytes"], profile["device"]["memory_bytes"], profile["settings"]
    if peak is None or whole is None or peak > _FREE * whole:
        return
    free = f"a step takes {peak / 2**30:.3g} of {whole / 2**30:.3g} GiB"
    twice = profile["recomputed"] or 0.0
    if settings["checkpoint_activations"] and twice > _DONE_TWICE:
        change = "model.init_args.model.init_args.checkpoint_activations: false, or for fewer kinds of blocks"
        yield Advice(
            f"{free}, and {twice:.0%} of the arithmetic is done twice", change, f"up to {twice:.0%} of the step"
        )
    elif settings["passes"] > 1:
        size = settings["micro_batch_size"]
        larger = next(n for n in range(2, settings["passes"] + 1) if settings["passes"] % n == 0) * size
        change = f"data.init_args.micro_batch_size: from {size} to {larger}; what is learnt stays the same"
        yield Advice(f"{free}, and is cut into {settings['passes']} passes", change)


def _compiling(profile: Mapping[str, Any]) -> Iterator[Advice]:
    broken = [row for row in profile["graph_breaks"] if row["breaks"] != 0]
    if profile["compiled"]:
        for row in broken:
            at = "; ".join(reason["at"] for reason in row["reasons"][:2])
            yield Advice(f"blocks of kind {row['kind']} are compiled in pieces", f"mend the graph break at {at}")
        if profile["recompiled"] and profile["settings"]["prompt_buckets"] is False:
            seen = f"{profile['recompiled']} graphs were compiled anew after the warm-up"
            yield Advice(seen, "model.init_args.prompt_buckets: true, so that there are few numbers of prompts")
    elif profile["on_gpu"] and (profile["mfu"] or 1.0) < NEAR:
        whole = [row["kind"] for row in profile["graph_breaks"] if row["breaks"] == 0]
        seen = f"MFU is {profile['mfu']:.0%}, and no block is compiled"
        if whole:
            seen += f"; without a graph break: {', '.join(whole)}"
        yield Advice(seen, "trainer.callbacks: - class_path: trainer.callbacks.CompileBlocks")


def _waits(profile: Mapping[str, Any]) -> Iterator[Advice]:
    others = [row for row in profile["waits"] or [] if "/guard.py" not in row["place"]]
    if others:
        places = ", ".join(dict.fromkeys(row["place"] for row in others[:3]))
        count = sum(row["count"] for row in others)
        seen = f"{count} {'wait' if count == 1 else 'waits'} of the program for the GPU besides StepGuard's"
        change = f"keep on the device what is read at {places}; or read it at logged steps alone"
        yield Advice(seen, change, "" if profile["on_gpu"] else "no matter on a CPU")


def _rest(profile: Mapping[str, Any]) -> Iterator[Advice]:
    parts, whole = profile["parts_ms"], max(profile["parted_step_ms"], 1e-9)
    optimizer, logging = parts.get(OPTIMIZER, 0.0) / whole, parts.get(LOGGING, 0.0) / whole
    if optimizer > _OPTIMISED:
        slow = (
            "" if profile["fused_optimizer"] or not profile["on_gpu"] else ", and is not fused: not all is on the GPU"
        )
        yield Advice(
            f"the optimiser takes {optimizer:.0%} of the step{slow}",
            "data.init_args.batch_size: larger, for fewer steps (that changes what is learnt), or tune less (LoRA)",
            f"up to {optimizer:.0%} of the step",
        )
    if logging > _LOGGED:
        often = profile["settings"]["log_every_n_steps"]
        more = f"trainer.log_every_n_steps: from {often} to {10 * often}, " if often < 50 else ""
        yield Advice(
            f"logging and callbacks take {logging:.0%} of the step",
            f"{more}or leave callbacks of the recipe out",
            f"up to {logging:.0%} of the step",
        )
