"""How much does a MedSAM training step keep for its backward pass, per image, against the reference loop?

python benchmarks/memory.py           # MedSAM at 1024 × 1024 on tensors without content: seconds, on any machine
python benchmarks/memory.py --quick   # at 512 × 512

Ours is `MedSAMModule` with its usual loss and boxes. The reference is a loop as MedSAM's authors train: the modules of
PyPI's `segment-anything`, one box an image, Dice and binary cross-entropy on logits of the input's size. Counted are
the bytes of all storages that autograd keeps (`torch.autograd.graph.saved_tensors_hooks`), each once, and of two
images less those of one, so that weights and casts of weights do not count. "gpu" is what a GPU's autocast and kernels
keep, as `trainer.rehearsal` lays them over the CPU. Both are also run with content at a small size, where the counts
must agree; on a GPU, at full size, `max_memory_allocated` is measured too.

The last line is one JSON object:
  benchmark     "memory"
  quick         whether --quick was given
  device        what was at hand
  side          of the images, in pixels
  saved_mib     by device ("cpu", "gpu") and precision: {"ours", "reference"}, MiB an image
  ratios        by device and precision: ours over the reference's
  real          bytes an image with content over those without, of both, at a small size: 1 is equal
  peak_gib      the most that a GPU held in a step of one image in bf16, weights and gradients included: {"ours",
                "reference"}; null where there is no GPU
  ratio         the largest of `ratios`
  bar           {"needed", "met"}: at most so much
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import torch
import torch.nn.functional as F
from measuring import arguments, device, finish, say
from steps import PublishedMedSAM
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from trainer.models import MedSAM
from trainer.models.medsam import ViT
from trainer.modules import MedSAMModule
from trainer.rehearsal import as_on_cuda

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
NEEDED = 0.6
SMALL = ViT(width=64, depth=3, heads=2, global_blocks=(1,), window=3)
Step = Callable[[int], Tensor]


class Reference(PublishedMedSAM):
    """The modules of MedSAM's own loop, and its loss."""

    def __init__(self, shape: ViT, side: int) -> None:
        super().__init__(side, shape)
        self.side = side

    def loss(self, images: int) -> Tensor:
        """Loss of a pass over made-up images."""
        place = self.mask_decoder.iou_token.weight.device
        logits = self(torch.zeros(images, 3, self.side, self.side, device=place), torch.zeros(images, 4, device=place))
        truth = torch.zeros_like(logits)
        return dice(logits, truth) + F.binary_cross_entropy_with_logits(logits, truth)


def dice(logits: Tensor, truth: Tensor) -> Tensor:
    """Soft Dice loss, squares below, as `monai.losses.DiceLoss`, which asks its tensors for values: these have none."""
    shares = logits.sigmoid()
    overlap = (shares * truth).sum((2, 3))
    return (1 - (2 * overlap + 1e-5) / (shares.square().sum((2, 3)) + truth.square().sum((2, 3)) + 1e-5)).mean()


def steps(shape: ViT, side: int) -> dict[str, tuple[nn.Module, Step]]:
    """Both modules, and what gives the loss of so many images."""
    ours, theirs = MedSAMModule(MedSAM(shape, side, weights=None)), Reference(shape, side)
    return {"ours": (ours, lambda images: ours.rehearse(images, 1)), "reference": (theirs, theirs.loss)}


def saved(module: nn.Module, step: Step, images: int, place: torch.device, dtype: torch.dtype) -> int:
    """Bytes that a pass keeps for its backward pass, beside the module's own tensors."""
    own = {tensor.untyped_storage()._cdata for tensor in (*module.parameters(), *module.buffers())}
    kept: dict[int, tuple[int, Tensor]] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = (storage.nbytes(), tensor.detach())  # held, so that no other takes its place
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast(place.type, dtype, enabled=dtype != torch.float32),
    ):
        step(images)
    return sum(size for size, _ in kept.values())


@contextmanager
def without_content(gpu: bool) -> Iterator[None]:
    """Tensors without content on the CPU, which take a GPU's kernels if asked."""
    with torch.random.fork_rng(devices=[]), as_on_cuda() if gpu else nullcontext(), FakeTensorMode():
        yield


def per_image(shape: ViT, side: int, place: torch.device, dtype: torch.dtype) -> dict[str, int]:
    """Bytes that each image more makes a step keep, of both."""
    found = {}
    for name, (module, step) in steps(shape, side).items():
        module.train()
        one, two = (saved(module, step, images, place, dtype) for images in (1, 2))
        found[name] = two - one
    return found


def peak(name: str, side: int, place: torch.device) -> float:
    """GiB that a GPU holds at most in the second of two steps of one image in bf16."""
    module, step = steps(ViT(), side)[name]
    module.to(place).train()
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats(place)
        with torch.autocast(place.type, torch.bfloat16):
            loss = step(1)
        loss.backward()
    return float(torch.cuda.max_memory_allocated(place) / 2**30)


def main() -> None:
    values = arguments(__doc__, side=0, depth=ViT.depth)
    place, side, cpu = device(), values.side or (512 if values.quick else 1024), torch.device("cpu")
    shape = replace(ViT(), depth=values.depth)
    sizes: dict[str, dict[str, dict[str, int]]] = {"cpu": {}, "gpu": {}}
    for kind, found in sizes.items():
        for precision, dtype in PRECISIONS.items():
            say(f"{kind}, {precision}")
            with without_content(kind == "gpu"):
                found[precision] = per_image(shape, side, cpu, dtype)
    say("with content")
    with without_content(gpu=False):
        expected = per_image(SMALL, 64, cpu, torch.bfloat16)
    real = {name: size / expected[name] for name, size in per_image(SMALL, 64, cpu, torch.bfloat16).items()}
    peaks = {name: peak(name, side, place) for name in ("ours", "reference")} if place.type == "cuda" else None
    ratios = {
        kind: {precision: both["ours"] / both["reference"] for precision, both in found.items()}
        for kind, found in sizes.items()
    }
    for kind, found in sizes.items():
        for precision, both in found.items():
            ours, theirs = (both[name] / 2**20 for name in ("ours", "reference"))
            share = ratios[kind][precision]
            print(f"{kind}, {precision}: ours {ours:.0f} MiB an image, the reference's {theirs:.0f} MiB: {share:.2f}")
    if peaks:
        print(
            f"peak of a step of one image: ours {peaks['ours']:.2f} GiB, the reference's {peaks['reference']:.2f} GiB"
        )
    ratio = max(share for found in ratios.values() for share in found.values())
    mebibytes = {
        kind: {precision: {name: size / 2**20 for name, size in both.items()} for precision, both in found.items()}
        for kind, found in sizes.items()
    }
    finish(
        {
            "benchmark": "memory",
            "quick": values.quick,
            "device": place.type,
            "side": side,
            "saved_mib": mebibytes,
            "ratios": ratios,
            "real": real,
            "peak_gib": peaks,
            "ratio": ratio,
            "bar": {"needed": NEEDED, "met": ratio <= NEEDED},
        },
        values.save,
    )


if __name__ == "__main__":
    main()
