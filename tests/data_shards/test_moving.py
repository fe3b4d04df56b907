"""A batch on its way to a GPU: one block, one copy, begun while the device works on the batch before.

No GPU is needed: tensors pretend to be on one, streams and events are written down instead of made.
"""

from __future__ import annotations

import pickle
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_loader import COUNT, folder, take, what
from test_triplet import make, values
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from data_shards.batch import Sample, TripletBatch, collate, on_host
from data_shards.dataset import ShardDataset
from data_shards.loader import SampleView, TripletLoader
from data_shards.sampler import EvenSampler, GlobalOrderSampler

__all__ = ["folder"]
GPU = torch.device("cuda", 0)


class Copies(TorchDispatchMode):
    """Notes the copies between devices: (non-blocking or not, bytes)."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[bool, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ == "_to_copy" and args[0].device != found.device:
            self.seen.append((bool((kwargs or {}).get("non_blocking")), found.nbytes))
        return found


def mixed() -> TripletBatch:
    """Grey and colour, 8 and 16 bits and floats, several targets and none, sizes that are no multiples of anything."""
    made = [
        make(values("uint8"), masks=3),
        make(values("uint8", 3), masks=1),
        make(values("uint16"), masks=0),
        make(values("float32"), masks=2),
    ]
    return collate([Sample(n, triplet, tuple(range(len(triplet.targets)))) for n, triplet in enumerate(made)])


def tensors(batch: TripletBatch) -> list[Tensor]:
    return [*batch.images, *batch.masks]


def storages(batch: TripletBatch) -> int:
    return len({tensor.untyped_storage()._cdata for tensor in tensors(batch)})


def same(one: TripletBatch, other: TripletBatch) -> bool:
    """Whether all that two batches hold is equal, types and shapes too."""
    pairs = zip(
        [*tensors(one), one.boxes, one.image_index], [*tensors(other), other.boxes, other.image_index], strict=True
    )
    return (
        all(a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b) for a, b in pairs)
        and what(one) == what(other)
        and (one.terms, one.provenances, one.kinds) == (other.terms, other.provenances, other.kinds)
    )


@pytest.fixture
def pins(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of each block that is pinned; without a GPU nothing can be, so it stays where it is."""
    seen: list[int] = []
    empty = torch.empty

    def made(*size: Any, pin_memory: bool = False, **given: Any) -> Tensor:
        found = empty(*size, **given)
        if pin_memory:
            seen.append(found.nbytes)
        return found

    def pinned(tensor: Tensor) -> Tensor:
        seen.append(tensor.nbytes)
        return tensor.clone()

    monkeypatch.setattr(torch, "empty", made)
    monkeypatch.setattr(Tensor, "pin_memory", pinned)
    return seen


@pytest.mark.parametrize("pickled", [False, True], ids=["collated", "from a worker"])
def test_a_batch_is_pinned_as_one_block_and_copied_once(pickled: bool, pins: list[int]) -> None:
    plain = mixed()
    batch = pickle.loads(pickle.dumps(plain)) if pickled else plain
    assert (storages(batch) == 1) is pickled and same(batch, plain)
    pinned = batch.pin_memory()
    total = sum(-(-tensor.nbytes // 64) * 64 for tensor in tensors(plain))
    assert pins == [total] and storages(pinned) == 1 and same(pinned, plain)
    with FakeTensorMode(allow_non_fake_inputs=True), Copies() as copies:
        there = pinned.to(GPU, non_blocking=True)
        stays = there.to(GPU, non_blocking=True)
    assert copies.seen == [(True, total)], "one copy, and it is not waited for"
    assert {tensor.device for tensor in tensors(there)} == {GPU} and storages(there) == storages(stays) == 1
    assert [(t.shape, t.dtype) for t in tensors(there)] == [(t.shape, t.dtype) for t in tensors(plain)]
    assert there.boxes.device == there.image_index.device == torch.device("cpu")


def test_what_is_copied_back_has_the_same_values() -> None:
    """Through a block and its views, with masks that lie column by column."""
    plain = mixed()
    assert any(not mask.is_contiguous() for mask in plain.masks), "decoded masks lie column by column"
    again = pickle.loads(pickle.dumps(plain))
    assert [mask.stride() for mask in again.masks] == [mask.stride() for mask in plain.masks], "and are not turned"
    moved = again.to("meta")
    assert [(t.shape, t.stride()) for t in tensors(moved)] == [(t.shape, t.stride()) for t in tensors(again)]
    assert same(again.to("cpu"), plain)
    again.masks[0][:] = 7
    assert same(replace(again, masks=plain.masks), plain), "views do not overlap"


def test_a_block_that_holds_much_else_is_not_copied_whole() -> None:
    batch = pickle.loads(pickle.dumps(mixed()))
    few = replace(batch, masks=[], boxes=batch.boxes[:0], image_index=batch.image_index[:0])
    moved = few.to("meta")
    assert moved.images[0].untyped_storage().nbytes() < batch.images[0].untyped_storage().nbytes()
    assert moved.images[0].untyped_storage().nbytes() == sum(-(-t.nbytes // 64) * 64 for t in few.images)
    nothing = replace(few, images=[])
    assert nothing.to("meta").images == nothing.pin_memory().images == []


def test_what_is_scored_comes_back_in_one_copy() -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        masks = [torch.zeros(9, 7, dtype=torch.bool, device=GPU), torch.zeros(5, 3, device=GPU).t()]
        with Copies() as copies:
            found = on_host(masks)
    assert copies.seen == [(False, 128)] and [(m.shape, m.dtype) for m in found] == [(m.shape, m.dtype) for m in masks]
    here = mixed().masks
    assert all(one is other for one, other in zip(on_host(here), here, strict=True)) and on_host([]) == []


def test_terms_that_were_joined_travel_too() -> None:
    joined = mixed().by_term()
    assert same(pickle.loads(pickle.dumps(joined)), joined)


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_send_one_block_and_the_same_values(folder: Path, workers: int) -> None:
    shards = ShardDataset(folder)
    expected = list(TripletLoader(SampleView(shards), EvenSampler(COUNT, 4)))
    found = TripletLoader(SampleView(shards), EvenSampler(COUNT, 4), workers)
    batches = list(found)
    found.close()
    assert all(same(*pair) for pair in zip(batches, expected, strict=True))
    assert not workers or all(storages(batch) == 1 for batch in batches)


class Cuda:
    """Writes down what streams and events are asked to do, by which thread."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[tuple[str, Any]] = []
        self.threads: dict[str, set[int]] = {}
        self.entered: list[Any] = []
        told = self

        class Stream:
            def __init__(self, device: Any = None) -> None:
                self.device = device

            def wait_event(self, event: Event) -> None:
                told.note("wait", event.number)

        class Event:
            made = 0

            def __init__(self) -> None:
                self.number, Event.made = Event.made, Event.made + 1

            def record(self, stream: Stream) -> None:
                assert told.entered[-1] is stream, "the copy was asked of this stream"
                told.note("sent", self.number)

        @contextmanager
        def stream(one: Stream) -> Iterator[None]:
            told.entered.append(one)
            yield
            told.entered.pop()

        self.training = Stream()
        monkeypatch.setattr(torch.cuda, "Stream", Stream)
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "stream", stream)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self.training)
        monkeypatch.setattr(Tensor, "record_stream", lambda tensor, stream: self.note("used by", stream))
        monkeypatch.setattr(TripletBatch, "pin_memory", lambda batch: batch)

    def note(self, what: str, detail: Any) -> None:
        self.log.append((what, detail))
        self.threads.setdefault(what, set()).add(threading.get_ident())


def on_device(folder: Path, workers: int = 2) -> TripletLoader:
    shards = ShardDataset(folder)
    sampler = GlobalOrderSampler(COUNT, 8, 2, 0, 1, 5)
    view = SampleView(shards, None, 5)
    return TripletLoader(view, sampler, workers, data_hash=shards.index.sha256, device=torch.device("meta"))


def test_the_next_batch_is_on_its_way_while_one_is_used(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, source = Cuda(monkeypatch), on_device(folder)
    plain = list(TripletLoader(SampleView(ShardDataset(folder), None, 5), GlobalOrderSampler(COUNT, 8, 2, 0, 1, 5)))
    for number, batch in enumerate(source):
        assert (batch.positions, batch.terms) == (plain[number].positions, plain[number].terms)
        assert {tensor.device.type for tensor in tensors(batch)} == {"meta"}
        assert cuda.log.index(("sent", number)) < cuda.log.index(("wait", number))
        deadline = 100
        while number + 1 < len(plain) and ("sent", number + 1) not in cuda.log and (deadline := deadline - 1):
            threading.Event().wait(0.05)  # this is the step: nobody asks for the next batch
        assert number + 1 == len(plain) or ("sent", number + 1) in cuda.log
        assert source.state_dict()["samples"] == 2 * (number + 1), "what was only sent ahead does not count"
        assert ("wait", number + 1) not in cuda.log
    source.close()
    used = [detail for what_, detail in cuda.log if what_ == "used by"]
    assert used == [cuda.training] * len(plain), "one block a batch, kept until the training's stream is done with it"
    here = {threading.get_ident()}
    assert cuda.threads["wait"] == cuda.threads["used by"] == here and not cuda.threads["sent"] & here


def test_a_resume_goes_on_behind_what_was_used_not_behind_what_was_sent(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Cuda(monkeypatch)
    first = on_device(folder)
    iterator = iter(first)
    used = [next(iterator).positions for _ in range(5)]
    second = on_device(folder)
    second.load_state_dict(first.state_dict())
    rest = [batch.positions for batch in second]
    first.close(), second.close()
    order = GlobalOrderSampler(COUNT, 8, 2, 0, 1, 5)
    assert used + rest == [[draw.position for draw in draws] for draws in order]


def test_without_workers_or_a_gpu_nothing_is_sent_ahead(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = Cuda(monkeypatch)
    assert take(on_device(folder, workers=0), 3) and not cuda.log


def test_pinned_batches_are_pinned_by_the_thread_that_fetches(folder: Path, pins: list[int]) -> None:
    for workers in (0, 2):
        pins.clear()
        source = TripletLoader(SampleView(ShardDataset(folder)), EvenSampler(COUNT, 4), workers, pin_memory=True)
        batches = list(source)
        source.close()
        assert len(pins) == len(batches) == 7 and all(storages(batch) == 1 for batch in batches)


def test_lightning_moves_batches_through_the_data_module(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own way would call `to` without `non_blocking`, and wait for each copy."""
    from lightning.pytorch import LightningModule, Trainer

    from data_shards.datamodule import TripletDataModule

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(()))

        def training_step(self, batch: TripletBatch, batch_idx: int) -> Tensor:
            return self.weight * float(np.mean([image.float().mean() for image in batch.images]))

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.1)

    asked: list[tuple[torch.device, bool]] = []
    to = TripletBatch.to

    def noted(batch: TripletBatch, device: Any, non_blocking: bool = False) -> TripletBatch:
        asked.append((torch.device(device), non_blocking))
        return to(batch, device, non_blocking)

    monkeypatch.setattr(TripletBatch, "to", noted)
    data = TripletDataModule(train=str(folder), batch_size=4, micro_batch_size=4, seed=0)
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    Trainer(accelerator="cpu", max_steps=2, **quiet).fit(Module(), data)  # type: ignore[arg-type]
    assert asked == [(torch.device("cpu"), True)] * 2
