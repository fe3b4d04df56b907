"""How fast is a SAM2 training step on images against the package `sam2` in a bare loop, with the same loss?

python benchmarks/step_sam2.py           # SAM2.1 tiny at 1024 px: some five minutes on two cores; base+ too on a GPU
python benchmarks/step_sam2.py --quick   # SAM2.1 tiny at 256 px, under a minute

Ours is SAM2Module on single images, from native 8-bit images on, with box prompts and Dice + cross-entropy on the mask
at the input's side. The reference is the official model, built by the package from its own configuration:
`forward_image`, `sam_prompt_encoder`, `sam_mask_decoder`, MONAI's Dice and torch's cross-entropy, AdamW; it encodes an
image once too, and its images are prepared beforehand. Both begin with the same random weights and boxes, and it is
checked first that their losses and gradients are the same. On a CPU in fp32 and bf16, on a GPU in bf16.

The last line is one JSON object:
  benchmark            "step_sam2"
  quick                whether --quick was given
  device               what it ran on
  image_size           side of the model's input in pixels
  threads              that torch uses on the CPU
  loss_difference      of the two, relative, in fp32
  gradient_difference  the largest of any parameter, relative to the norm of all gradients
  matmul_tflops        by precision: what the device reaches in a matrix product
  rows                 a list of {"way": the model's size, "precision", "images", "masks" of an image,
                       "images_per_second", "reference" (the same of the bare loop), "ratio", "lowest" and "highest"
                       over the rounds, "peak_gib" and "reference_peak_gib" (null on a CPU), "tflops", "mfu"}
  left_out             what was not measured, and why: a list of lines
  headline             which row `ratio` is of
  ratio                images a second, ours over the reference's
  bar                  {"needed", "met"}: never slower
"""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from measuring import arguments, device, finish, matmul_rate, say
from racing import REFERENCE, Entrant, Row, Running, Track, headline_of, named, race, told
from steps import DTYPES, MAX_SHIFT, OurStep, apart_of, autocast, check_same, discs, silent
from torch import Tensor, nn

from data_shards.batch import TripletBatch
from trainer.flops import step_flops
from trainer.losses import DiceCrossEntropy
from trainer.modules import SAM2Module
from trainer.prompts import BoxPrompts
from trainer.tuning import FullTuning

CONFIGS = {"tiny": "configs/sam2.1/sam2.1_hiera_t.yaml", "base_plus": "configs/sam2.1/sam2.1_hiera_b+.yaml"}
Case = tuple[str, str, int, int]
"""Model, precision, images, masks of an image."""
ON_CPU: tuple[Case, ...] = (("tiny", "fp32", 1, 1), ("tiny", "bf16", 1, 1))
ON_GPU: tuple[Case, ...] = (
    *(("tiny", "bf16", 8, 1), ("base_plus", "bf16", 8, 1), ("tiny", "bf16", 8, 4), ("base_plus", "bf16", 4, 4)),
    *(("base_plus", "bf16", 16, 1), ("tiny", "bf16", 16, 1)),
)
NEEDED = 1.0


def ours(variant: str, side: int, place: torch.device) -> SAM2Module:
    """Our module with random weights."""
    from trainer.models import SAM2

    torch.manual_seed(0)
    model = SAM2(variant, side, weights=None)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.02)
    prompts, loss = BoxPrompts(MAX_SHIFT * side // 1024), DiceCrossEntropy()
    module = SAM2Module(model, memory=False, tuning=FullTuning(freeze=()), prompts=prompts, loss=loss)
    return silent(module.to(place).train())


class BareStep:
    """A training loop around the official model.

    Args:
        module: Our module, whose weights and rates it begins with.
        variant: Its size.
        batch: What it learns from; prepared at once.
        precision: ``fp32`` or ``bf16``.
    """

    def __init__(self, module: SAM2Module, variant: str, batch: TripletBatch, precision: str = "fp32") -> None:
        from monai.losses import DiceLoss
        from sam2.build_sam import build_sam2

        from trainer.prompts import Truth

        place, preprocessing = module.device, module.model.preprocessing
        more = [f"++model.image_size={preprocessing.image_size}"]
        self.model = build_sam2(
            CONFIGS[variant], None, str(place), mode="train", hydra_overrides_extra=more, apply_postprocessing=False
        )
        self.model.load_state_dict(module.model.state_dict())
        boxes, sizes = preprocessing.boxes(batch.boxes, batch.sizes)
        masks = preprocessing.masks(batch.masks, place)
        truth = Truth(batch.image_index, boxes, sizes, masks, batch.draws)
        (asked,) = module.prompts.first(truth, 0)
        assert asked.boxes is not None
        corners = asked.boxes.reshape(-1, 2, 2).to(place), torch.tensor([[2, 3]] * len(masks), device=place)
        self.images, self.corners, self.masks = preprocessing.images(batch.images, place), corners, masks[:, None]
        self.owners = batch.image_index.to(place)
        self.precision, self.place = precision, place
        self.dice = DiceLoss(sigmoid=True, squared_pred=True, reduction="mean")
        self.cross_entropy = nn.BCEWithLogitsLoss(reduction="mean")
        learns = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(learns, lr=module.lr, weight_decay=module.weight_decay)

    def loss(self) -> Tensor:
        """Loss of its batch."""
        with autocast(self.place, self.precision):
            found = self.model.forward_image(self.images)
            high, middle, top = (level[self.owners] for level in found["backbone_fpn"])
            sparse, dense = self.model.sam_prompt_encoder(points=self.corners, boxes=None, masks=None)
            low, *_ = self.model.sam_mask_decoder(
                image_embeddings=top + self.model.no_mem_embed[0, 0, :, None, None],
                image_pe=self.model.sam_prompt_encoder.get_dense_pe(),
                sparse_prompt_embeddings=sparse,
                dense_prompt_embeddings=dense,
                multimask_output=False,
                repeat_image=False,
                high_res_features=[high, middle],
            )
            said = F.interpolate(low, size=self.images.shape[-2:], mode="bilinear", align_corners=False)
            return self.dice(said, self.masks) + self.cross_entropy(said, self.masks)

    def __call__(self) -> None:
        """Take a step."""
        self.loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def raced(case: Case, side: int, track: Track, left_out: list[str]) -> list[Row]:
    """A row for a case."""
    variant, precision, images, masks = case
    batch = discs([masks] * images, side // 2).to(track.place)

    def reference() -> Running:
        step = BareStep(ours(variant, side, track.place), variant, batch, precision)
        return Running(step, step.model, step.optimizer)

    def own() -> Running:
        step = OurStep(ours(variant, side, track.place), precision)
        return Running(partial(step, [batch]), step.module.model, step.optimizer)

    module = ours(variant, side, track.place)
    one, two = (step_flops(module, 1, count).model for count in (1, 2))
    del module
    flops = images * (2 * one - two + masks * (two - one))
    return race([Entrant(REFERENCE, reference), Entrant(variant, own, flops)], track, left_out)


def check(side: int, place: torch.device) -> tuple[float, float]:
    """Make sure that both are the same function; how far they are apart."""
    module, batch = ours("tiny", side, place), discs([2], side // 2).to(place)
    step, bare = OurStep(module), BareStep(module, "tiny", batch)
    losses = step.loss(batch), bare.loss()
    for loss in losses:
        loss.backward()
    mine, theirs = (  # what the official model computes and does not use has gradients of zero
        {name: p.grad for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
        for model in (module.model, bare.model)
    )
    found = apart_of(float(losses[0].detach()), float(losses[1].detach()), mine, theirs)
    check_same(found, place)
    return found


def main() -> None:
    values = arguments(__doc__, side=0, rounds=0, seconds=0, cases=0)
    place, started = device(), time.perf_counter()
    on_gpu = place.type == "cuda"
    side = values.side or (256 if values.quick else 1024)
    try:
        import sam2  # noqa: F401
    except ImportError as error:
        raise SystemExit(f"step_sam2: {error}: see the README for how to install sam2") from error
    cases = (ON_GPU if on_gpu else ON_CPU)[: values.cases or None]
    rates = {precision: matmul_rate(place, DTYPES[precision]) for precision in {case[1] for case in cases}}
    apart = check(side, place)
    print(f"same function: loss within {apart[0]:.1g}, gradients within {apart[1]:.1g}", flush=True)
    rows: list[Row] = []
    left_out: list[str] = []
    for case in cases:
        variant, precision, images, masks = case
        if values.seconds and rows and time.perf_counter() - started > values.seconds:
            left_out.append(f"{variant}, {images} × {masks}: no time left")
            continue
        say(f"{variant}, {precision}, {images} images with {masks} masks")
        rounds, repeats = values.rounds or (5 if on_gpu else 3), 3 if on_gpu else 1
        found = raced(case, side, Track(place, precision, images, masks, rounds, repeats, rates[precision]), left_out)
        rows += found
        print(*map(told, found), sep="\n", flush=True)
    for line in left_out:
        print(f"left out: {line}")
    headline = headline_of(rows, "step_sam2")
    result: dict[str, Any] = {
        "benchmark": "step_sam2",
        "quick": values.quick,
        "device": torch.cuda.get_device_name() if on_gpu else "CPU",
        "image_size": side,
        "threads": torch.get_num_threads(),
        "loss_difference": apart[0],
        "gradient_difference": apart[1],
        "matmul_tflops": rates,
        "rows": rows,
        "left_out": left_out,
        "headline": named(headline),
        "ratio": headline["ratio"],
        "bar": {"needed": NEEDED, "met": headline["ratio"] >= NEEDED},
    }
    finish(result, values.save)


if __name__ == "__main__":
    main()
