"""Whether a recipe fits its GPUs, and if not, what would make it fit: each knob is really tried."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_shards.errors import UserError
from trainer.plan.cost import Machine
from trainer.plan.memory import GIB, RESERVE, most_images, sharing_of, usable
from trainer.plan.options import Options, read_options
from trainer.plan.planned import PlanCLI

FSDP2 = ("fsdp2.yaml", ("--trainer.strategy", '{"class_path": "trainer.distributed.FSDP2"}'))
RECOMPUTE = ("recompute.yaml", ("--model.init_args.model.init_args.checkpoint_activations", "true"))
LORA = ("lora.yaml", ("--model.init_args.tuning", "trainer.tuning.LoRATuning"))
"""Overlays, and the same as keys where the overlays' folder is not at hand."""
MICRO = "--data.init_args.micro_batch_size"


@dataclass(frozen=True)
class Knob:
    """A change of a recipe that takes less memory.

    Attributes:
        words: What is put behind the command.
        devices: GPUs in all then.
        micro: Images a pass then.
    """

    words: tuple[str, ...]
    devices: int
    micro: int

    @property
    def changes(self) -> tuple[str, ...]:
        """The words that change what one image takes: neither images a pass nor the plan's own options."""
        found, words = [], iter(self.words)
        for word in words:
            if word in (MICRO, "--devices"):
                next(words)
            else:
                found.append(word)
        return tuple(found)

    def __str__(self) -> str:
        return shlex.join(self.words)


def refuse_what_cannot_fit(words: Sequence[str]) -> None:
    """Refuse a training whose cluster file names a GPU that it does not fit; without a file or a GPU, nothing is.

    Args:
        words: As `trainer fit` takes them: ``-c RECIPE -c CLUSTER --KEY VALUE``.

    Raises:
        UserError: It does not fit; the message says what would make it, and how much it would take.
    """
    options = read_options(words)
    if options.cluster is None or options.cluster[0].gpu is None:
        return
    made = PlanCLI(["fit", *options.words])
    plan = made.plan()
    machine = options.machine(plan["step"]["devices"])
    prompts = plan["prompts_per_image"] or 1
    try:
        made.pass_bytes(plan, plan["step"]["micro_batch"], prompts)
    except Exception:  # a model that cannot be rehearsed is launched all the same
        return
    assert machine is not None
    found = verdict(made, plan, machine, prompts, largest=False)
    if not found["fits"]:
        raise UserError(refusal(plan, machine, found, options, prompts))


def verdict(
    made: PlanCLI, plan: Mapping[str, Any], machine: Machine, prompts: int, largest: bool = True
) -> dict[str, Any]:
    """What a GPU of a machine holds at the peak, whether that fits, and the largest pass that does.

    Args:
        made: The recipe.
        plan: Its plan.
        machine: The machine.
        prompts: Prompts an image.
        largest: Whether the largest pass is looked for, which runs some more.

    Returns:
        ``parts`` in bytes, ``total``, ``usable`` (None where the machine's memory is not known), ``fits``, ``sharing``,
        ``recomputed`` (what `RecomputeToFit` does, in words; None likewise, and where the recipe has none),
        ``largest`` (images a pass; None likewise) and ``largest_dividing``, the largest of which the step is made up.
    """
    own, batch = plan["step"]["micro_batch"], plan["step"]["images"]
    room = None if machine.memory is None else usable(machine.memory)
    made.put_on(machine.devices, room)
    chosen = made.recomputed(plan, own, prompts)
    parts = made.parts(machine.devices, made.pass_bytes(plan, own, prompts))
    total = sum(parts.values())
    found: dict[str, Any] = {
        "parts": parts,
        "total": total,
        "usable": room,
        "fits": None if room is None else total <= room,
        "sharing": sharing_of(made.resolved["trainer"], machine.devices).kind,
        "recomputed": None if chosen is None else str(chosen),
        "largest": None,
        "largest_dividing": None,
    }
    if room is not None and largest:
        left = room - (total - parts["activations"])
        most = most_images(left, lambda images: made.least_bytes(plan, images, prompts), own) if left > 0 else 0
        dividing = [micro for micro in range(1, most + 1) if batch % (micro * machine.devices) == 0]
        found |= {"largest": most, "largest_dividing": max(dividing, default=None)}
    return found


def refusal(plan: Mapping[str, Any], machine: Machine, found: Mapping[str, Any], options: Options, prompts: int) -> str:
    """One line: what is missing, and the first knob that makes it fit."""
    name = machine.gpu.name if machine.gpu else f"a GPU of {machine.memory:g} GB"
    micro = plan["step"]["micro_batch"]
    start = (
        f"recipe {' + '.join(plan['recipes'])}: {told(found['total'])} a GPU at {micro} "
        f"image{'s' * (micro != 1)} a pass do not fit {name}, of which {told(found['usable'])} are usable: "
    )
    least: tuple[Knob, int] | None = None
    for knob, size in _tries(plan, found, options, prompts, list(knobs(plan, machine, options, found))):
        if size <= found["usable"]:
            return f"{start}with {knob} it takes {told(size)}"
        least = (knob, size) if least is None or size < least[1] else least
    larger = "take larger GPUs, or a smaller model"
    if least is None:
        return f"{start}there is no knob left: {larger}"
    return f"{start}nothing makes it fit; the least is {told(least[1])}, with {least[0]}: {larger}"


def _tries(
    plan: Mapping[str, Any], found: Mapping[str, Any], options: Options, prompts: int, knobs: Sequence[Knob]
) -> Iterator[tuple[Knob, int]]:
    """Knobs in their order, and what a GPU would hold with each: a pass is run only where all the rest fits."""
    tried: dict[tuple[str, ...], PlanCLI | None] = {}
    for knob in knobs:
        words = knob.changes
        if words not in tried:
            try:
                tried[words] = PlanCLI(["fit", *options.words, *words])
            except UserError:  # this recipe cannot take it
                tried[words] = None
        made = tried[words]
        if made is None:
            continue
        made.put_on(knob.devices, found["usable"])
        static = sum(made.parts(knob.devices, 0).values())
        yield knob, static + (0 if static > found["usable"] else made.pass_bytes(plan, knob.micro, prompts))


def knobs(plan: Mapping[str, Any], machine: Machine, options: Options, found: Mapping[str, Any]) -> Iterator[Knob]:
    """What may be tried, the least change first.

    Args:
        plan: The plan of what does not fit.
        machine: The machine.
        options: What was asked.
        found: Its verdict: how ranks share the model now, and what is computed twice.
    """
    own, devices, batch = plan["step"]["micro_batch"], machine.devices, plan["step"]["images"]
    smaller = [micro for micro in range(own - 1, 0, -1) if batch % (micro * devices) == 0]
    least: tuple[str, ...] = (MICRO, "1") if own > 1 else ()
    recompute, lora = (_words(overlay, plan["recipes"]) for overlay in (RECOMPUTE, LORA))
    recompute = () if found["recomputed"] else recompute  # RecomputeToFit has done so
    # the overlay takes all GPUs that there are, which no job can ask for: with a cluster file the key alone
    shard = FSDP2[1] if options.cluster is not None else _words(FSDP2, plan["recipes"])
    shard = () if found["sharing"] == "fsdp2" else shard
    for micro in smaller:
        yield Knob((MICRO, str(micro)), devices, micro)
    for micro in (own, *smaller) if recompute else ():
        yield Knob((*recompute, *((MICRO, str(micro)) if micro != own else ())), devices, micro)
    if devices > 1 and shard:
        yield Knob(shard, devices, own)
        yield Knob((*shard, *recompute, *least), devices, 1)
    for factor in (2, 4, 8, 16):
        if batch % (devices * factor) == 0:
            more = _more(options, plan["nodes"], devices, factor)
            yield Knob((*shard, *recompute, *least, *more), devices * factor, 1)
    yield Knob((*lora, *least), devices, 1)
    yield Knob((*lora, *recompute, *least), devices, 1)


def _more(options: Options, nodes: int, devices: int, factor: int) -> tuple[str, str]:
    """How more GPUs are asked for."""
    if options.given["devices"] is not None:
        return "--devices", str(devices * factor)
    if options.cluster is not None or nodes > 1:
        return "--trainer.num_nodes", str(nodes * factor)
    return "--trainer.devices", str(devices * factor)


def _words(overlay: tuple[str, tuple[str, ...]], recipes: Sequence[str]) -> tuple[str, ...]:
    """An overlay as words, by its path as seen from here, or else by its keys."""
    name, keys = overlay
    folders = [
        Path("recipes/overlays"),
        *(parent / "overlays" for recipe in recipes for parent in Path(recipe).parents),
    ]
    path = next((folder / name for folder in folders if (folder / name).is_file()), None)
    return keys if path is None else ("-c", str(path))


def told(count: float) -> str:
    """Bytes in GiB."""
    return f"{count / GIB:.1f} GiB" if count >= GIB else f"{count / 2**20:.0f} MiB"


def reserve() -> str:
    """What is left free, in words."""
    return f"less {RESERVE:.0%} for CUDA, its libraries and the allocator"
