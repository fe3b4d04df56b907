"""SAM3 in Meta's layout, as the builders of PyPI's `sam3` read it.

Shapes: P texts, N object queries, S input side, h w side of the masks.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Sequence, Set
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from data_shards.errors import UserError
from trainer.export.base import Exporter, TextAnswer, TextConsumer
from trainer.models import SAM3, SAM3Shape, SegmentationModel
from trainer.models.sam3_names import META_POSITIONS, OF_THE_TRACKER, to_meta, unknown_to_ours
from trainer.models.tokenizer import packaged_merges
from trainer.models.weights import read_weights

RELEASED = SAM3Shape()
"""The only shape that the official builder builds."""
PREFIX = "detector."
"""Of the detector's names in Meta's files: without it, the official builder loads nothing and does not say so."""
_WITHOUT_BASE = (
    "For the image model alone: videos and clicks need Meta's tracker, which --base FILE (Meta's sam3.pt) copies. "
    "Projections of point exemplars that the run does not have are zero; texts and boxes never meet them."
)
_WITH_BASE = (
    "The tracker and its neck are those of {}, as they were: they see the features of an image encoder that may have "
    "learnt something else since."
)


class SAM3Exporter(Exporter):
    """Meta's ``.pt``: ``{"model": {"detector.…": …, "tracker.…": …}}``; the consumer is the official builder.

    Args:
        base: Meta's own checkpoint: what our model does not have is copied from it.
    """

    name = "sam3"
    suffix = ".pt"
    package = "sam3"
    also = ("open-clip-torch",)
    requirement = "sam3==0.1.4 open-clip-torch"
    image_size = 1008
    asks = "texts"
    samples = 2  # a forward pass is 6 TFLOP and more

    def __init__(self, base: Path | None = None) -> None:
        self.base = base
        self.notes = (_WITHOUT_BASE,) if base is None else (_WITH_BASE.format(base.name),)

    def based_on(self, checkpoint: Path) -> SAM3Exporter:
        """The export that copies the tracker, and what else our model does not have, from Meta's checkpoint.

        Raises:
            UserError: There is no such file.
        """
        if not checkpoint.is_file():
            raise UserError(f"--base {checkpoint}: no such file: give Meta's sam3.pt")
        return SAM3Exporter(checkpoint)

    def accepts(self, model: SegmentationModel) -> bool:
        """Whether it is a SAM3.

        Raises:
            UserError: It is one of other sizes than the released one's.
        """
        if isinstance(model, SAM3) and model.shape != RELEASED:
            other = next(name for name, size in vars(RELEASED).items() if getattr(model.shape, name) != size)
            raise UserError(
                f"a SAM3 with shape.{other} {getattr(model.shape, other)} cannot be exported to '{self.name}': the "
                f"official builder takes {getattr(RELEASED, other)} and nothing else"
            )
        return isinstance(model, SAM3)

    def write(self, model: SegmentationModel, path: Path) -> None:
        """Write detector and, from the base, tracker.

        Raises:
            UserError: The base is not in Meta's layout, or of other sizes.
        """
        assert isinstance(model, SAM3)
        shape = model.shape
        detector = to_meta(self.state(model))
        side = self.image_size // shape.patch
        computed = unknown_to_ours(detector, shape.heads, shape.window, side, shape.global_blocks)
        tracker = self._copy(detector, computed) if self.base is not None else {}
        whole = {f"{PREFIX}{name}": tensor.contiguous() for name, tensor in (detector | computed).items()}
        torch.save({"model": whole | tracker}, path)

    def load(self, path: Path) -> TextConsumer:
        """Load the file into the official image model, on the CPU, and demand that no key was missing."""
        with _OnCPU(), warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()) as said:
            warnings.simplefilter("ignore")  # that there is no CUDA
            from sam3 import model_builder

            consumer = model_builder.build_sam3_image_model(
                bpe_path=str(packaged_merges()[0]), device="cpu", checkpoint_path=str(path), load_from_HF=False
            )
        if "missing" in said.getvalue():
            raise ValueError(" ".join(said.getvalue().split()))
        _check_keys(path, consumer.state_dict().keys())

        def answer(image: Tensor, texts: Sequence[str]) -> TextAnswer:
            with _OnCPU():
                return _ask(consumer, image, texts)

        return answer

    def _copy(self, detector: dict[str, Tensor], computed: dict[str, Tensor]) -> dict[str, Tensor]:
        """Fill in from the base what our model does not know, and return what it has for video."""
        base = read_weights(str(self.base))
        for name, tensor in (detector | computed).items():
            theirs = base.get(PREFIX + name)
            if theirs is None or theirs.shape != tensor.shape:
                what = "is missing" if theirs is None else f"is {tuple(theirs.shape)} and not {tuple(tensor.shape)}"
                raise UserError(f"--base {self.base}: {PREFIX}{name} {what}: give Meta's sam3.pt")
        tracker = {name: tensor for name, tensor in base.items() if OF_THE_TRACKER.match(name)}
        if not any(name.startswith("tracker.") for name in tracker):
            raise UserError(f"--base {self.base}: it has no tracker: give Meta's sam3.pt")
        detector[META_POSITIONS][:, :1] = base[PREFIX + META_POSITIONS][:, :1]
        computed.update({name: base[PREFIX + name].float() for name in computed if not name.endswith("freqs_cis")})
        return tracker


class _OnCPU(TorchFunctionMode):
    """The official code asks for "cuda" and pinned memory by name; inside, it gets the CPU and plain memory."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(kwargs or {})
        if given.get("device") == "cuda":
            given["device"] = "cpu"
        return args[0] if func is Tensor.pin_memory else func(*args, **given)


def _ask(consumer: Any, image: Tensor, texts: Sequence[str]) -> TextAnswer:
    """Ask the official image model; text by text, since each takes as much memory as the image."""
    from sam3.model.data_misc import FindStage

    first = torch.zeros(1, dtype=torch.int64)
    stage = FindStage(first, first, None, None, None, None, None, None)
    seen = consumer.backbone.forward_image(image)
    found = []
    for text in texts:
        read = consumer.backbone.forward_text([text], device="cpu")
        found.append(consumer.forward_grounding({**seen, **read}, stage, None, consumer._get_dummy_prompt()))
    # as its own Sam3Processor does
    confidence = [out["pred_logits"][..., 0].sigmoid() * out["presence_logit_dec"].sigmoid() for out in found]
    boxes, masks = (torch.cat([out[name] for out in found]) for name in ("pred_boxes", "pred_masks"))
    return TextAnswer(torch.cat(confidence), boxes, masks)


def _check_keys(path: Path, wanted: Set[str]) -> None:
    """Check that a file has every key of the official detector and no other; the builder itself lets both pass.

    Raises:
        ValueError: It does not.
    """
    content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["model"]
    names = {name.removeprefix(PREFIX) for name in content if name.startswith(PREFIX)}
    for kind, keys in (("missing", wanted - names), ("unknown", names - wanted)):
        keys = {name for name in keys if not OF_THE_TRACKER.match(name)}
        if keys:
            raise ValueError(f"{len(keys)} {kind} ({', '.join(sorted(keys)[:3])})")
