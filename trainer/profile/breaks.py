"""Whether transformer blocks can be compiled in one piece: torch's own explanation, of one block of each kind."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from trainer.models import SegmentationModel
from trainer.models.recomputing import plain_forward

Inputs = dict[str, tuple[nn.Module, tuple[Any, ...], dict[str, Any]]]


@contextmanager
def watched_inputs(model: SegmentationModel) -> Iterator[Inputs]:
    """Keep what the first block of each kind and class is first given while the context is open, by kind."""
    found: Inputs = {}
    handles = []

    def keep(name: str) -> Any:
        def hook(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if name not in found:
                copy = tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), (args, kwargs))
                found[name] = (block, *copy)

        return hook

    seen = set()
    for kind, blocks in model.block_kinds().items():
        classes = {type(block) for block in blocks}
        for block in blocks:
            if (kind, type(block)) not in seen:
                seen.add((kind, type(block)))
                name = kind if len(classes) == 1 else f"{kind} ({type(block).__name__})"
                handles.append(block.register_forward_pre_hook(keep(name), with_kwargs=True))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def graph_breaks(inputs: Inputs, context: AbstractContextManager[Any]) -> list[dict[str, Any]]:
    """Graph breaks of blocks, as JSON: nothing is compiled.

    Args:
        inputs: Blocks and what they were given.
        context: The precision's.
    """
    import torch._dynamo as dynamo

    rows = []
    with context:
        for kind, (block, args, kwargs) in inputs.items():
            row: dict[str, Any] = {"kind": kind, "breaks": None, "reasons": []}
            dynamo.reset()
            try:
                told = dynamo.explain(_plain(block))(*args, **kwargs)
                row["breaks"] = told.graph_break_count
                row["reasons"] = [_reason(reason) for reason in told.break_reasons]
            except Exception as error:  # whatever torch's compiler stumbles over is a finding, not an end
                row["reasons"] = [{"why": f"cannot be traced: {type(error).__name__}: {_line(str(error))}", "at": "?"}]
            rows.append(row)
    dynamo.reset()
    return rows


def _plain(block: nn.Module) -> Any:
    """A block's forward pass without what recomputes or compiles it."""
    forward = plain_forward(block)
    return getattr(forward, "_torchdynamo_orig_callable", forward)


def _reason(reason: Any) -> dict[str, str]:
    """Why a graph ends, in a line, and where: the innermost line that is not torch's."""
    frames = [frame for frame in reason.user_stack if "torch" not in Path(frame.filename).parts]
    last = (frames or reason.user_stack or [None])[-1]
    place = "?" if last is None else f"{'/'.join(Path(last.filename).parts[-3:])}:{last.lineno}"
    return {"why": _line(reason.reason), "at": place}


def _line(text: str) -> str:
    return " ".join(text.split())[:160]
