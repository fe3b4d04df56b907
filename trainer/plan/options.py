"""The options of `trainer plan` that are no keys of the recipe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from data_shards.errors import CommandParser, UserError
from trainer.cluster import Cluster, cluster_of
from trainer.hardware import gpu_named
from trainer.plan.cost import Machine, machine_of, positive


@dataclass(frozen=True)
class Options:
    """What was asked besides the recipe.

    Attributes:
        words: The recipe's words, as `trainer fit` takes them.
        given: The options by name.
        cluster: What the last cluster file among the recipes says, and the file.
    """

    words: list[str]
    given: dict[str, Any]
    cluster: tuple[Cluster, str] | None

    def machine(self, devices: int | None) -> Machine | None:
        """The machine; None where nothing says what it is.

        Args:
            devices: GPUs of the recipe and its overlays; None where it takes as many as there are.
        """
        given = self.given
        if self.cluster is not None:
            cluster, file = self.cluster
            gpu = gpu_named(cluster.gpu) if cluster.gpu else None
            memory, requeue = gpu.memory_gb if gpu else None, cluster.kind == "slurm" and cluster.requeue
            stop = cluster.signal_seconds / 3600 if cluster.kind == "slurm" else 0.0
            return Machine(devices or 1, memory, gpu, False, cluster.hours, stop, requeue, file)
        asked = [f"--{name}" for name in ("devices", "memory", "gpu") if given[name] is not None]
        if not asked:
            return None
        return machine_of(given["devices"] or devices or 1, given["memory"], given["gpu"], " ".join(asked))


def read_options(arguments: Sequence[str]) -> Options:
    """Split the plan's own options from the recipe's.

    Raises:
        UserError: One lacks its value, or is out of range, or two do not go together.
    """
    parser = CommandParser(prog="trainer plan", add_help=False)
    for name, kind in (("devices", int), ("images", int), ("prompts", int)):
        parser.add_argument(f"--{name}", type=kind)
    for name in ("memory", "rate", "mfu"):
        parser.add_argument(f"--{name}", type=float)
    for name in ("gpu", "like", "cluster"):
        parser.add_argument(f"--{name}")
    own = {f"--{name}" for name in vars(parser.parse_args([]))} - {"--cluster"}
    mine, words, place = [], [], iter(arguments)
    for word in place:
        name, equals, value = word.partition("=")
        if name == "--cluster":  # an overlay, in its place
            words += ["-c", value if equals else next(place, "")]
            mine += ["--cluster", words[-1]]
        elif name in own:
            mine += [word] if equals else [word, *[value for value in [next(place, None)] if value is not None]]
        else:
            words.append(word)
    if words and not words[0].startswith("-"):
        words = ["-c", *words]
    given = vars(parser.parse_args(mine))
    for name in ("devices", "images", "prompts", "memory", "rate"):
        positive(f"--{name}", given[name])
    positive("--mfu", given["mfu"], most=1)
    both = [f"--{name}" for name in ("devices", "memory", "gpu") if given[name] is not None]
    if given["cluster"] == "":
        raise UserError("--cluster needs a file, such as recipes/clusters/slurm_h100x4.yaml")
    if given["cluster"] is not None and both:
        raise UserError(f"--cluster says what {both[0]} says: give one of them")
    rates = [f"--{name}" for name in ("rate", "like", "mfu") if given[name] is not None]
    if len(rates) > 1:
        raise UserError(f"{rates[0]} and {rates[1]} both say how fast it is: give one of them")
    return Options(words, given, None if both else _cluster_in(words))


def _cluster_in(words: Sequence[str]) -> tuple[Cluster, str] | None:
    """The last cluster file among the recipes; a file that cannot be read is the recipe parser's to refuse."""
    found = None
    for word, value in pairwise([*words, ""]):
        name, equals, rest = word.partition("=")
        if name not in ("-c", "--config"):
            continue
        path = Path(rest if equals else value)
        try:
            content = yaml.safe_load(path.read_text())
        except (OSError, ValueError, yaml.YAMLError):
            continue
        if isinstance(content, dict) and content.get("cluster") is not None:
            found = cluster_of(content["cluster"], str(path)), str(path)
    return found
