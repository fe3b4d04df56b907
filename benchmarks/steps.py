"""Training steps to be timed: ours outside of a Trainer, and MedSAM's published loop over PyPI's `segment-anything`.

Shapes: B images, Q masks, S the model's input side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_shards.batch import TripletBatch
from data_shards.triplet import Provenance
from trainer.models import MedSAM
from trainer.models.medsam import VARIANTS, ViT, to_original
from trainer.modules import MedSAMModule
from trainer.modules.tuned import TunedModule
from trainer.prompts import BoxPrompts
from trainer.tuning import FullTuning, Tuning

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""What a step computes in."""
MAX_SHIFT = 20
"""Pixels at 1024 px by which a box is pushed out at most, as in MedSAM."""
Module = TypeVar("Module", bound=TunedModule)


def discs(targets: Sequence[int], side: int, seed: int = 0) -> TripletBatch:
    """Grey images of noise, one for each number, with so many discs.

    Args:
        targets: Discs of each image.
        side: Native side of the images in pixels.
        seed: What is drawn from.
    """
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:side, :side]
    radius, count = side // 8, sum(targets)
    places = rng.integers(radius, side - radius, (count, 2))
    masks = [((rows - y) ** 2 + (columns - x) ** 2 < radius**2).astype(np.uint8) for y, x in places]
    origin = Provenance("noise", patient="", volume="", modality="none", source_sha256="")
    reach = radius - 1.0
    return TripletBatch(
        images=[torch.from_numpy(rng.integers(0, 255, (1, side, side), dtype=np.uint8)) for _ in targets],
        masks=[torch.from_numpy(mask) for mask in masks],
        image_index=torch.arange(len(targets)).repeat_interleave(torch.tensor(targets)),
        boxes=torch.tensor([[x - reach, y - reach, x + reach, y + reach] for y, x in places.tolist()]),
        terms=["disc"] * count,
        keys=[f"noise-{seed}-{number}" for number in range(len(targets))],
        positions=list(range(len(targets))),
        target_index=[target for number in targets for target in range(number)],
        provenances=[origin] * len(targets),
        objects=[target for number in targets for target in range(number)],
        kinds=["semantic"] * count,
        synonyms=[()] * count,
    )


def medsam(
    side: int, device: torch.device, shape: ViT | None = None, tuning: Tuning | None = None, seed: int = 0
) -> MedSAMModule:
    """MedSAM in training as recipes/medsam/full.yaml trains it, with random weights and no zero among them."""
    torch.manual_seed(seed)
    model = MedSAM(shape or VARIANTS["vit_b"], side, weights=None)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():  # positions begin as zeros: they would hide a mistake
                parameter.normal_(std=0.02)
    prompts = BoxPrompts(max_shift=MAX_SHIFT * side // 1024)
    tuning = tuning or FullTuning(freeze=["prompt_encoder"])
    return silent(MedSAMModule(model, tuning, prompts, lr=1e-4, weight_decay=0.01, decay="all").to(device).train())


def silent(module: Module) -> Module:
    """A module that logs nothing: it trains outside of a Trainer."""
    module.log = module.log_dict = lambda *_, **__: None  # type: ignore[method-assign, assignment]
    return module


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """What a forward pass runs in."""
    return nullcontext() if precision == "fp32" else torch.autocast(device.type, DTYPES[precision])


class OurStep:
    """Steps of a module: forward pass, loss, backward pass and the optimiser that its recipe would have.

    Args:
        module: The module.
        precision: ``fp32`` or ``bf16``.
    """

    def __init__(self, module: TunedModule, precision: str = "fp32") -> None:
        from trainer.modules.optimization import adamw

        self.module, self.precision = module, precision
        groups = module.tuning.parameter_groups(module.model, module.lr, module.weight_decay, module.decay)
        self.optimizer = adamw(groups, module.betas, module.schedule, 1)["optimizer"]

    def loss(self, batch: TripletBatch) -> Tensor:
        """Loss of a batch."""
        with autocast(self.module.device, self.precision):
            return self.module.training_step(batch, 0)

    def __call__(self, batches: Sequence[TripletBatch]) -> int:
        """Take one optimiser step over micro-batches of equally many images; returns the images."""
        for batch in batches:
            (self.loss(batch) / len(batches)).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return sum(map(len, batches))


@dataclass(frozen=True)
class Draw:
    """A batch of MedSAM's published loop: one mask of each image.

    Attributes:
        images: (B, 3, S, S) float32, prepared beforehand, as the published scripts do.
        masks: (B, 1, S, S) float32 of 0 and 1: newer releases of MONAI take no whole numbers.
        boxes: (B, 4) float32 in pixels of the input.
    """

    images: Tensor
    masks: Tensor
    boxes: Tensor


def draws_of(module: MedSAMModule, batch: TripletBatch) -> list[Draw]:
    """What a batch of B images with equally many targets each is to the published loop: B images for each target.

    The boxes are those that our module asks with.
    """
    truth, preprocessing = module._truth(batch), module.model.preprocessing
    (asked,) = module.prompts.first(truth, 0)
    images = preprocessing.images(batch.images, module.device)
    assert asked.boxes is not None
    boxes = asked.boxes.to(module.device)
    count = len(truth) // len(batch)
    assert batch.image_index.tolist() == [image for image in range(len(batch)) for _ in range(count)]
    masks = truth.masks[:, None]
    return [Draw(images, masks[place::count], boxes[place::count]) for place in range(count)]


class PublishedMedSAM(nn.Module):
    """PyPI's SAM as MedSAM's training wraps it: box prompts, prompt encoder without gradients, masks enlarged."""

    def __init__(self, side: int, shape: ViT) -> None:
        super().__init__()
        from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, TwoWayTransformer

        _one_prompt_an_image()
        grid = side // shape.patch
        self.image_encoder = ImageEncoderViT(
            img_size=side,
            patch_size=shape.patch,
            embed_dim=shape.width,
            depth=shape.depth,
            num_heads=shape.heads,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
            use_rel_pos=True,
            window_size=shape.window,
            global_attn_indexes=shape.global_blocks,
            out_chans=256,
        )
        self.prompt_encoder = PromptEncoder(256, (grid, grid), (side, side), mask_in_chans=16).requires_grad_(False)
        transformer = TwoWayTransformer(depth=2, embedding_dim=256, mlp_dim=2048, num_heads=8)
        self.mask_decoder = MaskDecoder(transformer_dim=256, transformer=transformer)

    def forward(self, images: Tensor, boxes: Tensor) -> Tensor:
        """Logits (B, 1, S, S) of one mask an image, for images (B, 3, S, S) and boxes (B, 4)."""
        features = self.image_encoder(images)
        with torch.no_grad():
            sparse, dense = self.prompt_encoder(points=None, boxes=boxes[:, None], masks=None)
        low, _ = self.mask_decoder(
            image_embeddings=features,
            image_pe=self.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=False,
        )
        return F.interpolate(low, size=images.shape[-2:], mode="bilinear", align_corners=False)


def _one_prompt_an_image() -> None:
    """Let PyPI's decoder take a batch of images with a prompt each, as that of MedSAM's repository does.

    PyPI's repeats all images for each prompt, and would have to be called image by image.
    """
    from segment_anything.modeling import mask_decoder

    class Torch:
        def __getattr__(self, name: str) -> Any:
            return getattr(torch, name)

        @staticmethod
        def repeat_interleave(tensor: Tensor, repeats: int, dim: int) -> Tensor:
            return tensor if len(tensor) == repeats else torch.repeat_interleave(tensor, repeats, dim=dim)

    mask_decoder.torch = Torch()  # type: ignore[attr-defined]


class PublishedStep:
    """Steps of MedSAM's published training loop.

    Args:
        module: Our module, whose weights and rates it begins with; it learns what MedSAM learns, all but the prompts.
        precision: ``fp32`` or ``bf16``.
    """

    def __init__(self, module: MedSAMModule, precision: str = "fp32") -> None:
        from monai.losses import DiceLoss

        model, device = module.model, module.device
        assert isinstance(model, MedSAM)
        self.model = PublishedMedSAM(model.preprocessing.image_size, model.shape).to(device).train()
        plain = {name.replace(".base_layer.", "."): tensor for name, tensor in model.state_dict().items()}
        self.module = module
        self.model.load_state_dict(to_original({n: t for n, t in plain.items() if ".lora_" not in n}))
        self.device, self.precision = device, precision
        self.dice = DiceLoss(sigmoid=True, squared_pred=True, reduction="mean")
        self.cross_entropy = nn.BCEWithLogitsLoss(reduction="mean")
        learns = [*self.model.image_encoder.parameters(), *self.model.mask_decoder.parameters()]
        self.optimizer = torch.optim.AdamW(learns, lr=module.lr, weight_decay=module.weight_decay)

    def loss(self, draw: Draw) -> Tensor:
        """Loss of a batch."""
        with autocast(self.device, self.precision):
            said = self.model(draw.images, draw.boxes)
            return self.dice(said, draw.masks) + self.cross_entropy(said, draw.masks)

    def __call__(self, draws: Sequence[Draw]) -> int:
        """Take one optimiser step over draws, each of which encodes its images anew; returns the masks."""
        for draw in draws:
            (self.loss(draw) / len(draws)).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return sum(len(draw.masks) for draw in draws)


def differences(ours: OurStep, published: PublishedStep, batch: TripletBatch) -> tuple[float, float]:
    """How far both are from one function, in fp32: of the loss, and the largest of any parameter's gradient.

    The loss's is relative to it, a gradient's (its norm) to the norm of all gradients. Neither learns anything.
    """
    assert isinstance(ours.module, MedSAMModule)
    draws = draws_of(ours.module, batch)
    values = []
    kept = ours.precision, published.precision
    ours.precision = published.precision = "fp32"
    for losses in ([ours.loss(batch)], [published.loss(draw) / len(draws) for draw in draws]):
        values.append(sum(float(loss.detach()) for loss in losses))
        for loss in losses:
            loss.backward()
    ours.precision, published.precision = kept
    mine = {name: p.grad for name, p in ours.module.model.named_parameters() if p.grad is not None}
    mine, theirs = to_original(mine), {n: p.grad for n, p in published.model.named_parameters() if p.grad is not None}
    for step in (ours, published):
        step.optimizer.zero_grad()
    return apart_of(*values, mine, theirs)


def apart_of(
    ours: float, reference: float, mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor]
) -> tuple[float, float]:
    """How far two ways are from one function, by their losses and their gradients of each parameter.

    Raises:
        SystemExit: They do not learn the same parameters.
    """
    if mine.keys() != theirs.keys():
        raise SystemExit(f"only one of them learns {', '.join(sorted(mine.keys() ^ theirs.keys())[:3])}")
    whole = torch.stack([gradient.norm() for gradient in theirs.values()]).norm()
    apart = torch.stack([(mine[name] - gradient).norm() for name, gradient in theirs.items()])
    return abs(ours - reference) / abs(reference), float(apart.max() / whole)


def check_same(found: tuple[float, float], device: torch.device) -> None:
    """End where two ways are not the same function: their times would compare nothing."""
    allowed = 1e-4 if device.type == "cpu" else 1e-2  # convolutions compute in TF32 on a GPU
    if max(found) > allowed:
        raise SystemExit(f"loss and gradients differ by {found[0]:.2g} and {found[1]:.2g}: not the same function")


def compiled(module: Module) -> Module:
    """Compile the image encoder's blocks, as the callback `CompileBlocks` does in a run."""
    from trainer.callbacks.compiling import CompileBlocks

    CompileBlocks().setup(None, module, "fit")  # type: ignore[arg-type]
    return module
