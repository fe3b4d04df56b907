"""A model as graphs: what formats such as ONNX, which hold computations and not layouts of weights, are written from.

Two sides that do not know each other. A family (`GraphFamily`, one a kind of model, in ``graphs_sam.py``,
``graphs_sam3.py`` …) cuts its model into graphs and says how a consumer is built of them once they run somewhere. A
format (`GraphExporter`, in ``onnx.py``, ``torch_export.py`` …) writes one graph to one file and opens it again.

Shapes: as each graph says of its inputs and outputs.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import io
import logging
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from data_shards.errors import UserError
from trainer.export.base import DTYPES, BoxConsumer, Exporter, PromptConsumer, TextConsumer
from trainer.models import SegmentationModel

Runner = Callable[..., dict[str, Tensor]]
"""A loaded graph: called with its inputs by name, all of them, it returns its outputs by name."""

FAMILIES = {
    "SAMDecoding": "trainer.export.graphs_sam:SAMGraphs",
    "SAM2": "trainer.export.graphs_sam2:SAM2Graphs",
    "SAM3": "trainer.export.graphs_sam3:SAM3Graphs",
}
"""Where the `GraphFamily` of a model is, by the name of the model's class or of one it derives from."""


@dataclass(frozen=True)
class Graph:
    """One graph of a model.

    Attributes:
        stem: Name of its file, without the ending.
        module: What is traced, in evaluation mode: its ``forward`` takes the inputs by position and returns the outputs
            as a tuple of tensors (also where it is one). It registers no more than what it uses, under the names that
            our model has for them: all graphs' tensors together are the model's.
        inputs: Examples by name, in order. No axis that is dynamic may be of length 1, which tracing takes for fixed,
            and no two different ones may be of the same length.
        outputs: Names, in order.
        axes: By the input's name: which of its axes are dynamic, and what they are called. One name is one length.
    """

    stem: str
    module: nn.Module
    inputs: Mapping[str, Tensor]
    outputs: tuple[str, ...]
    axes: Mapping[str, Mapping[int, str]] = field(default_factory=lambda: MappingProxyType({}))


class GraphFamily(ABC):
    """How one kind of model is cut into graphs, and asked when it is made of them.

    Args:
        model: The model, in evaluation mode on the CPU; with its adapters, where these cannot be merged.
    """

    asks: ClassVar[Literal["boxes", "texts", "prompts"]] = "prompts"
    """What `consumer` returns a consumer of, see `trainer.export.base.Exporter`."""
    stems: ClassVar[tuple[str, ...]]
    """Names of the graphs' files, without the ending."""
    notes: tuple[str, ...] = ()
    """What a user of the graphs should know: what they take and give, and what is not in them."""

    def __init__(self, model: SegmentationModel) -> None:
        self.image_size = model.preprocessing.image_size

    @abstractmethod
    def graphs(self, model: SegmentationModel) -> list[Graph]:
        """Cut a model into graphs; it is not changed."""

    def write_beside(self, model: SegmentationModel, path: Path) -> None:  # noqa: B027 - few have anything
        """Write what the graphs need beside themselves, such as a tokenizer, into their folder."""

    def read_beside(self, path: Path) -> None:  # noqa: B027
        """Read that again, before `consumer` is called."""

    @abstractmethod
    def consumer(self, runners: Mapping[str, Runner]) -> BoxConsumer | TextConsumer | PromptConsumer:
        """Build a consumer of what `asks` says.

        Args:
            runners: The loaded graphs by stem.
        """


def traced(graph: Graph) -> torch.export.ExportedProgram:
    """Trace a graph with its dynamic axes, without what would only tell of the machine: paths of code, examples.

    Raises:
        UserError: Torch cannot trace it.
    """
    axes: dict[str, torch.export.Dim] = {}
    shapes = tuple(
        {axis: axes.setdefault(name, torch.export.Dim(name, min=1)) for axis, name in graph.axes.get(one, {}).items()}
        for one in graph.inputs
    )
    whole = (shapes,) if isinstance(graph.module, Stored) else shapes  # which takes all inputs as one argument
    with torch.no_grad(), quiet(), translating(graph):
        program = torch.export.export(graph.module, tuple(graph.inputs.values()), dynamic_shapes=whole, strict=False)
    program.example_inputs = None
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)
    return program


@contextlib.contextmanager
def translating(graph: Graph) -> Iterator[None]:
    """Say in one line what of a graph cannot be translated; it may be anybody's adapter.

    Raises:
        UserError: Something cannot.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # torch raises of many kinds
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise UserError(
            f"{graph.stem}: torch {torch.__version__} makes no graph of it ({reason}): see which other --to holds it"
        ) from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Nothing that torch or a format's own code prints, logs or warns of reaches the user; what it raises does."""
    before = logging.root.manager.disable
    with (
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(before)


class GraphExporter(Exporter):
    """A format that holds graphs: a folder with one file a graph.

    A graph holds any module, so what cannot be merged into a layout's own weights, such as AdaptFormer or visual
    prompts, travels too.
    """

    suffix = ""
    merged = None
    image_size = 0  # the model's own, see `for_model`
    ending: ClassVar[str]
    """How a graph's file ends."""
    family: GraphFamily

    def accepts(self, model: SegmentationModel) -> bool:
        """Whether there is a family for it."""
        return _family_of(model) is not None

    def for_model(self, model: SegmentationModel) -> Exporter:
        """The export at the model's own side, asked as its family is."""
        kind = _family_of(model)
        assert kind is not None
        found = copy.copy(self)
        found.family = kind(model)
        found.image_size, found.asks = found.family.image_size, found.family.asks
        found.notes = (*self.notes, *found.family.notes)
        return found

    def write(self, model: SegmentationModel, path: Path) -> None:
        """Write all graphs, with weights in the type that was asked for; they compute in fp32."""
        dtype = DTYPES[self.dtype]
        for graph in self.family.graphs(model):
            stored = graph if dtype is torch.float32 else replace(graph, module=Stored(graph.module, dtype))
            self.save(stored, path / f"{graph.stem}{self.ending}")
        self.family.write_beside(model, path)

    def load(self, path: Path) -> BoxConsumer | TextConsumer | PromptConsumer:
        """Open all graphs."""
        self.family.read_beside(path)
        return self.family.consumer({stem: self.open(path / f"{stem}{self.ending}") for stem in self.family.stems})

    @abstractmethod
    def save(self, graph: Graph, path: Path) -> None:
        """Write one graph to one file."""

    @abstractmethod
    def open(self, path: Path) -> Runner:
        """Open one graph with the consumer's own code."""


class Stored(nn.Module):
    """A module whose tensors are held in another type and brought to fp32 in every pass: a file of half the size.

    Args:
        module: The module; it is not changed.
        dtype: What its tensors of numbers with a point are held in. They keep their names.
    """

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self._computing = (module,)  # in a tuple, so that its own tensors are not registered
        kept = set(module.state_dict())
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            held = tensor.detach().to(dtype) if tensor.is_floating_point() else tensor.detach()
            path, _, last = name.rpartition(".")
            _part(self, path).register_buffer(last, held, persistent=name in kept)

    def forward(self, *inputs: Tensor) -> Any:
        """What the module computes."""
        tensors = {
            name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in self.named_buffers()
        }
        return torch.func.functional_call(self._computing[0], tensors, inputs)


def _part(module: nn.Module, path: str) -> nn.Module:
    """The module below another that has a path; what is not there is made, empty."""
    for name in path.split(".") if path else ():
        if name not in module._modules:
            module.add_module(name, nn.Module())
        module = module.get_submodule(name)
    return module


def _family_of(model: nn.Module) -> type[GraphFamily] | None:
    """By name: SAM2's class is there only where its package is."""
    for kind in type(model).__mro__:
        if kind.__name__ in FAMILIES:
            where, _, name = FAMILIES[kind.__name__].partition(":")
            found: type[GraphFamily] = getattr(importlib.import_module(where), name)
            return found
    return None
