"""A training step of SAM3 waits for the device once, for the matching: on tensors that pretend to be on a GPU."""

from __future__ import annotations

import traceback
from typing import Any

import pytest
import torch
from test_sam3_module import make_batch
from tiny_sam3 import SHAPE, SIDE
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from trainer.losses import SetPredictionLoss
from trainer.losses.matching import made_up_matches
from trainer.models import SAM3, Preprocessing
from trainer.modules import SAM3Module
from trainer.prompts import Exemplars

HOST = torch.device("cpu")


class Waits(TorchDispatchMode):
    """Notes the lines of our code that copy between host and device and wait for it."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        found = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if name in ("_to_copy", "copy_"):
            source, target = (args[0], found) if name == "_to_copy" else (args[1], args[0])
            waits = {source.device.type, target.device.type} == {"cpu", "cuda"}
            if waits and not (kwargs.get("non_blocking") or args[2:3] == (True,)):
                self.lines.append(where())
        elif name in ("index", "index_put", "index_put_", "_unsafe_index"):
            places = [place for place in args[1] if place is not None]
            if any(place.dtype in (torch.bool, torch.uint8) or place.device != args[0].device for place in places):
                self.lines.append(where())
        return found


def where() -> str:
    frames = [frame for frame in traceback.extract_stack() if "/trainer/" in frame.filename]
    last = [frame for frame in frames if "/tests/" not in frame.filename][-1]
    return f"{last.filename.rpartition('/trainer/')[2]}: {last.line}"


@pytest.mark.parametrize("exemplars", [None, Exemplars(share=1.0, boxes=1, points=1)], ids=["text", "exemplars"])
def test_a_training_step_waits_for_nothing_but_the_match(
    exemplars: Exemplars | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("open_clip")

    def match(loss: SetPredictionLoss, prediction: Any, targets: Any) -> Any:
        found = made_up_matches(len(targets.boxes), len(prediction.logits), loss.many_matcher.topk)
        return type(found)(found.first, found.many)

    monkeypatch.setattr(SetPredictionLoss, "match", match)
    # it reads sizes on the host, which is free, but not of tensors that only pretend
    monkeypatch.setattr(Preprocessing, "_inside", lambda self, sizes: torch.full((len(sizes), 2), float(SIDE)))
    waits, batch = Waits(), make_batch()
    with FakeTensorMode(allow_non_fake_inputs=True):
        with torch.device("cuda:0"):
            model = SAM3(SHAPE, SIDE, weights=None, points=exemplars is not None, checkpoint_activations=True)
        loss = SetPredictionLoss(mask_weight=1.0, dice_weight=1.0, mask_chunk=2)
        module = SAM3Module(model, loss=loss, exemplars=exemplars).train()
        module._device = torch.device("cuda", 0)
        module.log_dict = lambda *given, **named: None
        batch = batch.to("cuda:0")
        with waits, torch.autocast("cuda", torch.bfloat16):
            found = module.training_step(batch, 0)
    assert found.device.type == "cuda"
    assert not waits.lines
