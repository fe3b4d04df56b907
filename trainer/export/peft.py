"""An adapter that peft puts on a class of transformers: what a run tuned with LoRA has learnt, and nothing else."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor

from data_shards.errors import UserError
from trainer.export.base import DTYPES, Exporter, InputConsumer, PromptConsumer, TextAnswer, TextConsumer, VideoConsumer
from trainer.export.companions.travelling import hub_name
from trainer.export.gate import TOLERANCE
from trainer.export.transformers import TransformersExporter, family_of, has_class
from trainer.models import LiteMedSAM, SegmentationModel
from trainer.tuning import LoRATuning

if TYPE_CHECKING:
    from trainer.export.adapter import Adapter
    from trainer.export.transformers_family import Family

FILE = "adapter_model.safetensors"
"""What peft calls the file of an adapter."""
MERGED = "merged"
"""Folder of the merged model, in an adapter's."""
_BASE = "The adapter belongs on the weights that the run began with: {}."
_UNNAMED = "which the recipe does not name on the hub, so that base_model_name_or_path is empty"
_SIDE = (
    "Trained at {} px: the base is to be built for that side (image_size in its configuration), with its positions "
    "interpolated where it has a table of them; --merge or --to transformers writes a model that is."
)
_EPSILON = (
    "The run's norms have an epsilon of 1e-5, as in the original code, and a hub's configuration may say 1e-6: a small "
    "difference; the gate's base has the run's."
)
_QUANTISED = (
    "The base was quantised to 4 bits when the adapter learnt: the gate's base has those rounded weights; quantise "
    "yours alike (BitsAndBytesConfig: nf4, double quantisation)."
)


class PEFTExporter(Exporter):
    """``adapter_config.json`` and ``adapter_model.safetensors``; the consumer is `peft.PeftModel`."""

    name = "peft"
    suffix = ""
    package = "peft"
    also = ("transformers",)
    requirement = "peft transformers"
    asks: Literal["boxes", "texts", "prompts", "prompts and frames"] = "prompts"
    merged = False
    samples = 2
    image_size = 1024
    with_merged = False
    """Whether the merged model is written too."""
    family: Family

    def and_merged(self) -> PEFTExporter:
        """The export that writes the merged model too, in transformers' format."""
        found = copy.copy(self)
        found.with_merged = True
        return found

    def accepts(self, model: SegmentationModel) -> bool:
        """Whether it was tuned with LoRA, and transformers has a class for it.

        Raises:
            UserError: It was tuned otherwise, has no class, or its weights are in 8 bits.
        """
        kind = type(model).__name__
        if isinstance(model, LiteMedSAM):
            raise UserError(
                "a LiteMedSAM has no class in transformers that an adapter could be put on: --to litemedsam merges it"
            )
        layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
        if not layers:
            raise UserError(
                f"this {kind} was not tuned with LoRATuning, and 'peft' holds nothing else: --to transformers writes "
                "it whole, and merges what is linear (SAMed, FacT, SSF)"
            )
        if any(one.get_base_layer().weight.dtype == torch.int8 for one in layers):
            raise UserError(
                "the run's base is in 8 bits, which rounds what its layers take as well, so that no plain base answers "
                "alike: --to transformers merges it"
            )
        return has_class(model, self.name)

    def for_model(self, model: SegmentationModel) -> PEFTExporter:
        """The export onto the class that transformers has for the model, at the model's own input side."""
        family = family_of(model)
        assert family is not None
        found = copy.copy(self)
        found.family, found.image_size = family, family.side
        found.asks = "texts" if family.asks == "texts" else "prompts"
        quantised = any(isinstance(one, LoraLayer) and not one.get_base_layer().weight.is_floating_point()
                        for one in model.modules())  # fmt: skip
        weights = self._base_name() or _UNNAMED
        notes = [_BASE.format(weights), _SIDE.format(family.side), _EPSILON]
        found.notes = (*notes, *((_QUANTISED,) if quantised else ()), *family.notes(self.dtype))
        return found

    def write(self, model: SegmentationModel, path: Path) -> None:
        """Write the adapter and, if wanted, the merged model below it."""
        adapter = self._adapter()
        dtype = DTYPES[self.dtype]
        state = {
            n: (one.to(dtype) if one.is_floating_point() else one).contiguous() for n, one in adapter.state.items()
        }
        save_file(state, path / FILE, metadata={"format": "pt"})
        adapter.config.base_model_name_or_path = self._base_name()
        adapter.config.save_pretrained(path)
        if self.with_merged:
            whole = copy.deepcopy(model)
            LoRATuning().merge(whole)
            (path / MERGED).mkdir()
            self._whole().for_model(whole).write(whole, path / MERGED)

    def read_input(self, path: Path) -> InputConsumer | None:
        """The image processor of the merged model, if that was written."""
        return self._whole().read_input(path / MERGED) if self.with_merged else None

    def load(self, path: Path) -> PromptConsumer | TextConsumer:
        """Put the adapter on the run's base, and demand that peft took all of it.

        Whatever was written is asked besides: the adapter merged by peft, and the merged model of the folder.

        Raises:
            ValueError: A key is missing, or there is one that is not known.
        """
        from trainer.export.transformers_family import quietly

        adapter = self._adapter()
        with quietly(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what peft warns of is looked at below
            put = _on_base(self.family, adapter, path)
            merged = _on_base(self.family, adapter, path).merge_and_unload()
        answering = self.family.answering
        others = [("merged by peft", answering(merged, None))]
        if self.with_merged:
            whole: Any = self._whole().for_model(self.family.model).load(path / MERGED)
            others.append((f"of {MERGED}/", whole.image if isinstance(whole, VideoConsumer) else whole))
        return _agreeing(answering(put.get_base_model(), None), others)

    def _base_name(self) -> str | None:
        """Name on the hub of the weights that the run began with; None where a file of them, or nothing, is named."""
        named = self.weights or ""
        return (hub_name(named) or None) if ":" not in named else None

    def _whole(self) -> TransformersExporter:
        return TransformersExporter().of_type(self.dtype)  # type: ignore[return-value]

    def _adapter(self) -> Adapter:
        from trainer.export.adapter import adapter_of

        return adapter_of(self.family.model, self.family)


def _on_base(family: Family, adapter: Adapter, path: Path) -> Any:
    """The model that the run began with, but random where it learnt fully, with the adapter on it.

    Raises:
        ValueError: The adapter lacks something, or has something that the model does not.
    """
    from peft import PeftModel, get_peft_model_state_dict

    base = family.base(adapter.base, adapter.layers)
    found: Any = PeftModel.from_pretrained(base, path, torch_device="cpu").eval()
    there, taken = load_file(path / FILE), get_peft_model_state_dict(found)
    wrong = {
        "missing": taken.keys() - there.keys(),
        "unknown": there.keys() - taken.keys(),
        "not taken": {n for n in there.keys() & taken.keys() if not torch.equal(there[n].float(), taken[n].float())},
    }
    said = [f"{len(names)} {kind} ({', '.join(sorted(names)[:3])})" for kind, names in wrong.items() if names]
    if said:
        raise ValueError("; ".join(said))
    return found


def _agreeing(first: Any, others: Sequence[tuple[str, Any]]) -> Callable[..., Any]:
    """Answer as the first consumer, and demand that the others answer alike.

    Raises:
        UserError: One does not.
    """

    def answer(image: Tensor, asked: Any) -> Any:
        found = first(image, asked)
        for which, other in others:
            difference = _difference(found, other(image, asked))
            if not difference <= TOLERANCE:
                raise UserError(
                    f"export to 'peft' failed: answers of the model {which} differ by {difference:.2g} from those with "
                    "the adapter; nothing was written"
                )
        return found

    return answer


def _difference(one: list[Tensor] | TextAnswer, other: list[Tensor] | TextAnswer) -> float:
    """Largest difference of two answers, as a share of the largest logit where texts are asked."""
    if isinstance(one, TextAnswer) and isinstance(other, TextAnswer):
        scale = one.masks.abs().amax().clamp(min=1)
        pairs = [(one.masks / scale, other.masks / scale), (one.confidence, other.confidence), (one.boxes, other.boxes)]
    else:
        pairs = list(zip(one, other, strict=True))  # type: ignore[arg-type]
    return float(torch.stack([(a - b).abs().max() for a, b in pairs]).max())
