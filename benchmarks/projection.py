"""What would a training step take on 1,000 GPUs? Reckoned, with the arithmetic shown.

python benchmarks/projection.py         # half a minute; --quick leaves all but MedSAM out

Counted: parameters, and the operations of a forward and backward pass with one prompt an image, of the full-size models
without content (MedSAM ViT-B, SAM2.1 B+ on single images, SAM3); bytes of a step.

Assumed: how fast GPUs and links are; every assumption is an option below. A step takes its compute and what of the
communication the compute does not hide: at least the last of its pieces. Stragglers, congestion and the loading of data
are not in it.

The last line is one JSON object:
  benchmark  "projection"
  quick      whether --quick was given
  assumed    the options' values
  counted    by model {"parameters", "trainable", "groups", "tflop_per_image"}
  projected  by model and way {"ddp", "fsdp2", "hsdp"}: by number of GPUs {"step_seconds", "efficiency"}
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from typing import Any

import torch
from measuring import finish, say

from trainer.flops import step_flops
from trainer.models import MedSAM
from trainer.modules import MedSAMModule

BUCKET = 25 * 2**20
"""Bytes of gradients that DDP sends at once."""
GPUS = (8, 64, 256, 1000)

ASSUMED: dict[str, tuple[float, str]] = {
    "tflops": (989.0, "10¹² operations a second of a GPU in bf16: what an H100's or H200's data sheet says, dense"),
    "mfu": (0.35, "share of these that a step reaches"),
    "images": (4, "images of a GPU in a step"),
    "gpus": (1000, "for which the arithmetic is printed"),
    "node": (8, "GPUs in a node"),
    "nvlink": (450.0, "GB/s that a GPU sends inside its node: NVLink 4, one way"),
    "infiniband": (50.0, "GB/s that a GPU sends to other nodes: one card of 400 Gbit/s each"),
    "achieved": (0.75, "share of these two that collectives reach"),
    "near": (2.0, "µs that a message takes inside a node"),
    "far": (6.0, "µs that a message takes between nodes"),
    "overlap": (0.6, "share of the compute under which communication can hide"),
    "gather_bytes": (4, "bytes of a weight that FSDP2 gathers: 4 in fp32, 2 with gather: bfloat16"),
}


@dataclass(frozen=True)
class Size:
    """What is counted of a model.

    Attributes:
        parameters: Of the model.
        trainable: Of these, what learns.
        groups: Groups of parameters that FSDP2 gathers one by one: its blocks, and all the rest.
        tflop_per_image: 10¹² operations of a forward and backward pass over one image with one prompt.
    """

    parameters: int
    trainable: int
    groups: int
    tflop_per_image: float


def full_size(quick: bool) -> dict[str, Any]:
    """The full-size modules without content, by name; without those whose package is missing."""
    with torch.device("meta"):
        modules: dict[str, Any] = {"MedSAM ViT-B": MedSAMModule(MedSAM(weights=None))}
        if quick:
            return modules
        from trainer.models import SAM2, SAM3
        from trainer.modules import SAM2Module, SAM3Module

        try:
            modules["SAM2.1 B+"] = SAM2Module(SAM2("base_plus", 1024, weights=None), memory=False)
        except ImportError as error:
            say(f"SAM2.1 B+ is left out: {error}")
        modules["SAM3"] = SAM3Module(SAM3(None, 1008, weights=None))
    return modules


def count(module: Any) -> Size:
    """Count parameters, groups and operations."""
    module.train()
    sizes = [(p.numel(), p.requires_grad) for p in module.parameters()]
    groups = 1 + sum(map(len, module.model.block_kinds().values()))
    total, learns = sum(size for size, _ in sizes), sum(size for size, learns in sizes if learns)
    return Size(total, learns, groups, step_flops(module, 1, 1).model / 1e12)


@dataclass(frozen=True)
class Cluster:
    """What is assumed of GPUs and links.

    Attributes:
        gpus: In all.
        node: In a node.
        nvlink: Bytes a second from a GPU to others of its node.
        infiniband: Bytes a second from a GPU to other nodes; each has a card of its own.
        near, far: Seconds that a message takes inside a node, and between nodes.
    """

    gpus: int
    node: int
    nvlink: float
    infiniband: float
    near: float
    far: float

    @property
    def nodes(self) -> int:
        """Nodes in all."""
        return -(-self.gpus // self.node)

    @property
    def ring(self) -> float:
        """Bytes a second along a ring through all GPUs: it enters and leaves a node once, over all of its cards."""
        return self.nvlink if self.nodes == 1 else min(self.nvlink, self.node * self.infiniband)

    @property
    def hop(self) -> float:
        """Seconds from one GPU of such a ring to the next, on average."""
        return (
            self.near if self.nodes == 1 else (self.nodes * self.far + (self.gpus - self.nodes) * self.near) / self.gpus
        )


Term = tuple[str, float]
"""How a time is reckoned, and the time in seconds."""


def terms_of(way: str, size: Size, cluster: Cluster, gather_bytes: int) -> tuple[list[Term], int]:
    """What a step's communication takes, and in how many pieces it comes, which compute can hide but for the last."""
    gradients, weights = 4 * size.trainable, gather_bytes * size.parameters
    n, m, g = cluster.gpus, cluster.nodes, min(cluster.node, cluster.gpus)
    if way == "ddp":
        buckets = math.ceil(gradients / BUCKET)
        climb = 2 * ((math.ceil(math.log2(m)) if m > 1 else 0) * cluster.far + (g - 1) * cluster.near)
        return [
            ring_term("all-reduce", 2, n, gradients, cluster.ring),
            (f"latency: {buckets} buckets × {climb * 1e6:.0f} µs up and down a tree", buckets * climb),
        ], buckets
    ranks, speed, hop = (n, cluster.ring, cluster.hop) if way == "fsdp2" else (g, cluster.nvlink, cluster.near)
    terms = [
        ring_term("all-gather, forward", 1, ranks, weights, speed),
        ring_term("all-gather, backward", 1, ranks, weights, speed),
        ring_term("reduce-scatter", 1, ranks, gradients, speed),
        (
            f"latency: {size.groups} groups × 3 × {ranks - 1} hops × {hop * 1e6:.2f} µs",
            size.groups * 3 * (ranks - 1) * hop,
        ),
    ]
    if way == "hsdp" and m > 1:
        climb = 2 * math.ceil(math.log2(m)) * cluster.far
        terms += [
            ring_term(f"all-reduce of each GPU's 1/{g} over nodes", 2, m, gradients / g, cluster.infiniband),
            (f"latency: {size.groups} groups × {climb * 1e6:.0f} µs up and down a tree", size.groups * climb),
        ]
    return terms, size.groups


def ring_term(name: str, times: int, ranks: int, size: float, speed: float) -> Term:
    """A collective along a ring: every rank sends (ranks − 1) / ranks of the bytes, twice in an all-reduce."""
    seconds = times * (ranks - 1) / ranks * size / speed
    factor = f"{times} × " if times > 1 else ""
    return f"{name}: {factor}{ranks - 1}/{ranks} × {size / 1e6:.1f} MB / {speed / 1e9:.0f} GB/s", seconds


def project(name: str, size: Size, values: argparse.Namespace) -> dict[str, Any]:
    """Steps and efficiencies by way and number of GPUs; prints the arithmetic of the largest number."""
    given = dict(part.split("=", 1) for part in values.step)
    compute = values.images * size.tflop_per_image / (values.tflops * values.mfu)
    how = (
        f"{values.images} images × {size.tflop_per_image:.2f} TFLOP / ({values.tflops:g} TFLOP/s × {values.mfu:g} MFU)"
    )
    if name in given:
        compute, how = float(given[name]), "as given"
    print(
        f"\n{name}: {size.parameters / 1e6:.1f} M parameters, {size.trainable / 1e6:.1f} M learn, {size.groups} groups"
    )
    print(f"  compute: {how} = {compute * 1e3:.2f} ms")
    found: dict[str, Any] = {}
    for way in ("ddp", "fsdp2", "hsdp"):
        found[way] = {}
        for gpus in sorted({*GPUS, values.gpus}):
            speeds = (values.achieved * values.nvlink * 1e9, values.achieved * values.infiniband * 1e9)
            cluster = Cluster(gpus, values.node, *speeds, values.near / 1e6, values.far / 1e6)
            terms, pieces = terms_of(way, size, cluster, values.gather_bytes)
            total = sum(seconds for _, seconds in terms)
            exposed = max(total / pieces, total - values.overlap * compute)
            found[way][str(gpus)] = {"step_seconds": compute + exposed, "efficiency": compute / (compute + exposed)}
            if gpus != values.gpus:
                continue
            print(f"  {way} on {gpus} GPUs ({cluster.nodes} nodes of {values.node}):")
            for text, seconds in terms:
                print(f"    {text} = {seconds * 1e3:.2f} ms")
            print(
                f"    communication {total * 1e3:.2f} ms, hidden at most {values.overlap:g} × compute = "
                f"{values.overlap * compute * 1e3:.2f} ms and all but one of {pieces} pieces, "
                f"left {exposed * 1e3:.2f} ms\n"
                f"    step {1e3 * (compute + exposed):.2f} ms, efficiency {compute / (compute + exposed):.3f} (with "
                f"nothing hidden {compute / (compute + total):.3f}), {gpus * values.images / (compute + exposed):,.0f} "
                "images/s"
            )
        print(
            f"  {way} efficiency by GPUs: "
            + ", ".join(f"{n}: {row['efficiency']:.3f}" for n, row in found[way].items())
        )
    return found


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the assumptions to a command line."""
    for name, (value, text) in ASSUMED.items():
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=type(value), default=value, help=f"assumed: {text} (default: {value:g})")
    text = (
        "compute of a step on a GPU as it was measured, such as 'SAM3=0.41', in place of the assumption; for each model"
    )
    parser.add_argument("--step", action="append", default=[], metavar="MODEL=SECONDS", help=text)


def projected(values: argparse.Namespace) -> dict[str, Any]:
    """Print the assumptions and the arithmetic: what the last line has of them."""
    sizes = {name: count(module) for name, module in full_size(values.quick).items()}
    unknown = [part for part in values.step if part.split("=")[0] not in sizes]
    if unknown:
        raise SystemExit(f"--step {unknown[0]}: MODEL=SECONDS with one of {', '.join(sizes)}")
    assumed = {key: getattr(values, key) for key in ASSUMED}
    print("assumed, not measured:")
    for key, value in assumed.items():
        print(f"  {key} {value:g}: {ASSUMED[key][1]}")
    return {
        "assumed": assumed,
        "counted": {name: vars(size) for name, size in sizes.items()},
        "projected": {name: project(name, size, values) for name, size in sizes.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="MedSAM alone")
    add_options(parser)
    values = parser.parse_args()
    finish({"benchmark": "projection", "quick": values.quick, **projected(values)})


if __name__ == "__main__":
    main()
